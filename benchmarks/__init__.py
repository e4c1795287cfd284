"""Ours against diffusers on the same weights: `python -m benchmarks`."""
