"""Encoder and decoder of the convolutional autoencoders (Esser et al. 2021; Rombach et al. 2022).

Images are [B, 3, H, W] in [-1, 1]; n blocks make latents [B, C, H/f, W/f] with f = 2^(n-1): the resolution
changes between blocks. Attribute names are those of diffusers.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from autoencoder.layers import Attention, Checkpointed, Downsample, ResnetBlock, Upsample
from autoencoder.norms import GroupNorm
from autoencoder.store import StockConfig


@dataclass(frozen=True, kw_only=True)
class NetworkConfig(StockConfig):
    """What the configs of AutoencoderKL and VQModel share; keys and defaults are diffusers'.

    Raises ValueError for a number below one and for widths that the groups do not divide.
    """

    in_channels: int = 3
    """Channels of the images that are encoded"""
    out_channels: int = 3
    """Channels of the images that are decoded"""
    block_out_channels: tuple[int, ...] = (64,)
    """Channels of each block, from the image's resolution down; each block after the first halves it"""
    layers_per_block: int = 1
    """Residual blocks in each block of the encoder; the decoder has one more"""
    norm_num_groups: int = 32
    """Groups of every GroupNorm; must divide each of block_out_channels"""
    mid_block_add_attention: bool = True
    """Whether the middle of encoder and decoder attends over all pixels"""
    latent_channels: int = 4
    """Channels of the latents"""
    sample_size: int = 32
    """Side of the training images in pixels; stock pipelines read it, the network takes any size"""
    scaling_factor: float = 0.18215
    """Stock pipelines multiply latents by it; encode and decode do not"""
    force_upcast: bool = True
    """Tells stock pipelines to decode in float32 because float16 overflows"""

    def __post_init__(self) -> None:
        counts = ("in_channels", "out_channels", "layers_per_block", "norm_num_groups", "latent_channels")
        for key in counts:
            if getattr(self, key) < 1:
                raise ValueError(f"{key} = {getattr(self, key)} must be at least 1.")
        if not self.block_out_channels:
            raise ValueError("block_out_channels is empty: give the channels of at least one block.")
        for width in self.block_out_channels:
            if width < 1 or width % self.norm_num_groups:
                groups = self.norm_num_groups
                raise ValueError(
                    f"block_out_channels holds {width}, not a multiple of norm_num_groups = {groups}."
                )

    @property
    def factor(self) -> int:
        """Image pixels that a latent pixel stands for, along one side."""
        return 1 << (len(self.block_out_channels) - 1)

    def fixed(self) -> dict[str, object]:
        """See `StockConfig.fixed`."""
        blocks = len(self.block_out_channels)
        return {
            "act_fn": "silu",
            "down_block_types": ("DownEncoderBlock2D",) * blocks,
            "up_block_types": ("UpDecoderBlock2D",) * blocks,
        }


def _resnets(in_channels: int, out_channels: int, layers: int, groups: int) -> nn.ModuleList:
    widths = (in_channels, *[out_channels] * layers)
    return nn.ModuleList(ResnetBlock(before, after, groups=groups) for before, after in pairwise(widths))


class DownBlock(Checkpointed):
    """Residual blocks, then half the resolution if `downsample`."""

    def __init__(
        self, in_channels: int, out_channels: int, *, layers: int, groups: int, downsample: bool
    ) -> None:
        super().__init__()
        self.resnets = _resnets(in_channels, out_channels, layers, groups)
        self.downsamplers = nn.ModuleList([Downsample(out_channels, padding=0)] if downsample else [])

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_channels, H, W] => [B, out_channels, H/2, W/2], or H, W without downsampling."""
        for layer in (*self.resnets, *self.downsamplers):
            x = self.through(layer, x)
        return x


class UpBlock(Checkpointed):
    """Residual blocks, then twice the resolution if `upsample`."""

    def __init__(
        self, in_channels: int, out_channels: int, *, layers: int, groups: int, upsample: bool
    ) -> None:
        super().__init__()
        self.resnets = _resnets(in_channels, out_channels, layers, groups)
        self.upsamplers = nn.ModuleList([Upsample(out_channels)] if upsample else [])

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_channels, H, W] => [B, out_channels, 2H, 2W], or H, W without upsampling."""
        for layer in (*self.resnets, *self.upsamplers):
            x = self.through(layer, x)
        return x


class MidBlock(Checkpointed):
    """Two residual blocks at the lowest resolution, with attention between them if `attention`."""

    def __init__(self, channels: int, *, groups: int, attention: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(channels, channels, groups=groups) for _ in range(2))
        self.attentions = nn.ModuleList([Attention(channels, groups=groups)] if attention else [])

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] => [B, C, H, W]."""
        for layer in (self.resnets[0], *self.attentions, self.resnets[1]):
            x = self.through(layer, x)
        return x


class Encoder(nn.Module):
    """Image to latent features.

    Args:
        config: the autoencoder's.
        features: channels of the output; twice the latent channels where they hold mean and log-variance.
    """

    def __init__(self, config: NetworkConfig, features: int) -> None:
        super().__init__()
        widths, groups = config.block_out_channels, config.norm_num_groups
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            DownBlock(before, after, layers=config.layers_per_block, groups=groups, downsample=i < last)
            for i, (before, after) in enumerate(pairwise((widths[0], *widths)))
        )
        self.mid_block = MidBlock(widths[-1], groups=groups, attention=config.mid_block_add_attention)
        self.conv_norm_out = GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], features, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_channels, H, W] in [-1, 1] => [B, features, H/f, W/f]."""
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        x = self.mid_block(x)
        return self.conv_out(self.conv_norm_out(x, silu=True))


class Decoder(nn.Module):
    """Latents to image: the encoder's mirror, with one residual block more in every block.

    Args:
        config: the autoencoder's.
    """

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        widths, groups = config.block_out_channels[::-1], config.norm_num_groups
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = MidBlock(widths[0], groups=groups, attention=config.mid_block_add_attention)
        self.up_blocks = nn.ModuleList(
            UpBlock(before, after, layers=config.layers_per_block + 1, groups=groups, upsample=i < last)
            for i, (before, after) in enumerate(pairwise((widths[0], *widths)))
        )
        self.conv_norm_out = GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], config.out_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        """[B, latent_channels, h, w] => [B, out_channels, f*h, f*w], about [-1, 1] but not clipped."""
        x = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(self.conv_norm_out(x, silu=True))


def at_least_float32(x: Tensor) -> Tensor:
    """Widen half precision, in which exponentials, sums and distances of latents lose too much."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def check_images(x: Tensor, config: NetworkConfig) -> None:
    """Raise ValueError unless `x` is [B, in_channels, H, W] with H and W multiples of the factor."""
    if x.ndim != 4 or x.shape[1] != config.in_channels:
        raise ValueError(f"x has the shape {[*x.shape]}: images must be [B, {config.in_channels}, H, W].")
    for side, size in zip(("height", "width"), x.shape[2:], strict=True):
        if size == 0 or size % config.factor:
            nearest = max(1, round(size / config.factor)) * config.factor
            raise ValueError(
                f"x has a {side} of {size}, not a multiple of {config.factor}: the nearest is {nearest}."
            )


def check_latents(z: Tensor, channels: int) -> None:
    """Raise ValueError unless `z` is [B, channels, h, w]."""
    if z.ndim != 4 or z.shape[1] != channels:
        raise ValueError(f"z has the shape {[*z.shape]}: latents must be [B, {channels}, h, w].")
