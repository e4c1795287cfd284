"""AutoencoderKL: images to a Gaussian over latents and back (Rombach et al. 2022, section 3.1).

Shapes: images [B, 3, H, W] in [-1, 1]; latents [B, C, h, w] with h = H/f, w = W/f.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn

from autoencoder.equivariance import Transform
from autoencoder.model import Decoder, Encoder, NetworkConfig, at_least_float32, check_images, check_latents
from autoencoder.store import load_folder, save_folder


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig(NetworkConfig):
    """Keys and defaults of diffusers' AutoencoderKL. `encode` and `decode` apply no factor, shift or mean."""

    shift_factor: float | None = None
    """Some stock pipelines subtract it from latents before scaling"""
    latents_mean: tuple[float, ...] | None = None
    """Mean of each latent channel, subtracted by some stock pipelines"""
    latents_std: tuple[float, ...] | None = None
    """Standard deviation of each latent channel, divided out by some stock pipelines"""
    use_quant_conv: bool = True
    """Whether a 1x1 convolution follows the encoder"""
    use_post_quant_conv: bool = True
    """Whether a 1x1 convolution precedes the decoder"""


class Posterior(NamedTuple):
    """Diagonal Gaussian over latents, in at least float32.

    A tuple, so that DDP and Accelerate find the tensors in it.
    """

    mean: Tensor
    """[B, C, h, w]."""
    logvar: Tensor
    """[B, C, h, w], within [-30, 20]."""

    @classmethod
    def from_moments(cls, moments: Tensor) -> Self:
        """[B, 2C, h, w], means then log-variances, as the encoder gives them."""
        mean, logvar = at_least_float32(moments).chunk(2, dim=1)
        return cls(mean, logvar.clamp(-30.0, 20.0))

    @property
    def std(self) -> Tensor:
        """Standard deviation [B, C, h, w]."""
        return torch.exp(0.5 * self.logvar)

    def sample(self, noise: Tensor) -> Tensor:
        """The latents that standard normal `noise` [B, C, h, w] stands for."""
        return self.mean + self.std * noise

    def kl(self) -> Tensor:
        """KL divergence from the standard normal in nats, summed over C, h and w: [B].

        Kingma and Welling 2014, appendix B.
        """
        return 0.5 * (self.mean.square() + self.logvar.exp() - 1 - self.logvar).sum(dim=(1, 2, 3))


class AutoencoderKL(nn.Module):
    """The autoencoder of latent diffusion; weights and config are diffusers' AutoencoderKL."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        latent, moments = config.latent_channels, 2 * config.latent_channels
        self.encoder = Encoder(config, moments)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(moments, moments, 1) if config.use_quant_conv else None
        self.post_quant_conv = nn.Conv2d(latent, latent, 1) if config.use_post_quant_conv else None

    def encode(self, x: Tensor) -> Posterior:
        """Images [B, in_channels, H, W] in [-1, 1] => Gaussian over raw latents [B, C, H/f, W/f].

        Raises ValueError for another number of channels or sides that f does not divide.
        """
        check_images(x, self.config)
        moments = self.encoder(x.to(self.dtype))
        if self.quant_conv is not None:
            moments = self.quant_conv(moments)
        return Posterior.from_moments(moments)

    def decode(self, z: Tensor) -> Tensor:
        """Raw latents [B, C, h, w] => images [B, out_channels, f*h, f*w], about [-1, 1] but not clipped.

        Raises ValueError for another number of channels.
        """
        check_latents(z, self.config.latent_channels)
        z = z.to(self.dtype)
        if self.post_quant_conv is not None:
            z = self.post_quant_conv(z)
        return self.decoder(z)

    def forward(
        self, x: Tensor, noise: Tensor | None = None, transform: Transform | None = None
    ) -> tuple[Tensor, Posterior]:
        """Reconstruct images from a sample of their posterior; the one call that training makes.

        Args:
            x: images [B, in_channels, H, W] in [-1, 1].
            noise: standard normal [B, C, h, w]; None decodes the posterior's mean.
            transform: of the latents before they are decoded; the reconstruction is then of `transform(x, f)`.

        Returns:
            Reconstruction like x, and the posterior.
        """
        posterior = self.encode(x)
        z = posterior.mean if noise is None else posterior.sample(noise)
        return self.decode(z if transform is None else transform(z)), posterior

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights; inputs are brought to it."""
        return self.decoder.conv_in.weight.dtype

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the stock folder that diffusers reads; see `store.save_folder`."""
        save_folder(folder, self.config, "AutoencoderKL", self.state_dict())

    @classmethod
    def from_pretrained(cls, source: str | Path) -> Self:
        """Read a stock folder, here or on the hub; see `store.load_folder`."""
        return load_folder(source, AutoencoderConfig, "AutoencoderKL", cls)
