"""What people run and publish."""

from pipelines.latent_diffusion import LatentDiffusion

__all__ = ["LatentDiffusion"]
