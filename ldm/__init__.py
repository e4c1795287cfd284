"""Diffusion in latents: paths, predictions, samplers, guidance, networks, data and the training harness."""
