"""Stage 1: pixels to latents and back."""
