"""The convolutional building blocks of the autoencoders; the U-Net of `ldm` is made of the same ones.

Attribute names are those of diffusers, so that weight files need no converter.
Shapes: B batch, C channels, H x W pixels (or latent pixels), T channels of the time embedding.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from autoencoder.attention import attend
from autoencoder.norms import GroupNorm
from autoencoder.winograd import Conv3x3


class Checkpointed(nn.Module):
    """Base of the blocks whose layers' insides need not be kept for the backward pass."""

    checkpointing = False  # see enable_checkpointing

    def through(self, layer: Callable[..., Tensor], *inputs: object) -> Tensor:
        """What `layer`, a part of this block, makes of the inputs."""
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(layer, *inputs, use_reentrant=False)
        return layer(*inputs)


def enable_checkpointing(network: nn.Module) -> None:
    """Keep only what goes in and out of each layer of the blocks and compute the rest again in the backward pass.

    Gradients stay the same; memory shrinks and a training step costs one more forward pass.
    """
    for module in network.modules():
        if isinstance(module, Checkpointed):
            module.checkpointing = True


class ResnetBlock(nn.Module):
    """Two 3x3 convolutions, each after GroupNorm and SiLU, around a residual connection.

    Args:
        in_channels: C of the input, divisible by `groups`.
        out_channels: C of the output, divisible by `groups`; where it differs, a 1x1 convolution takes the
            input across.
        temb_channels: T of the time embedding, or None for a block without time.
        groups: groups of both normalisations.
        eps: added to the variance in both normalisations.
        dropout: probability of zeroing an activation before the second convolution, 0..1.
        scale_shift: the time embedding scales and shifts after the second normalisation (Dhariwal and
            Nichol 2021, section 3) instead of being added before it.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        temb_channels: int | None = None,
        groups: int = 32,
        eps: float = 1e-6,
        dropout: float = 0.0,
        scale_shift: bool = False,
    ) -> None:
        super().__init__()
        self.scale_shift = scale_shift
        self.norm1 = GroupNorm(groups, in_channels, eps)
        self.conv1 = Conv3x3(in_channels, out_channels)
        self.time_emb_proj = (
            nn.Linear(temb_channels, 2 * out_channels if scale_shift else out_channels)
            if temb_channels
            else None
        )
        self.norm2 = GroupNorm(groups, out_channels, eps)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = Conv3x3(out_channels, out_channels)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor, temb: Tensor | None = None) -> Tensor:
        """[B, in_channels, H, W], time embedding [B, T] before its SiLU => [B, out_channels, H, W]."""
        h = self.conv1(self.norm1(x, silu=True))
        if self.time_emb_proj is None:
            h = self.norm2(h, silu=True)
        else:
            if temb is None:
                raise ValueError("temb is None: this ResnetBlock was built with temb_channels, pass [B, T].")
            time = self.time_emb_proj(F.silu(temb))[:, :, None, None]
            if self.scale_shift:
                scale, shift = time.chunk(2, dim=1)
                h = F.silu(self.norm2(h) * (1 + scale) + shift)
            else:
                h = self.norm2(h + time, silu=True)
        h = self.conv2(self.dropout(h))
        if self.conv_shortcut is not None:
            x = self.conv_shortcut(x)
        return x + h


class Downsample(nn.Module):
    """Halves height and width with a 3x3 convolution of stride 2.

    Args:
        channels: C of input and output.
        padding: 1 pads every side by one pixel (the U-Net); 0 pads only the right and the bottom by one
            (the autoencoder).
    """

    def __init__(self, channels: int, *, padding: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] => [B, C, H/2, W/2]."""
        if self.conv.padding == (0, 0):
            x = F.pad(x, (0, 1, 0, 1))
        return self.conv(x)


class Upsample(nn.Module):
    """Doubles height and width by repeating pixels, then a 3x3 convolution.

    Args:
        channels: C of input and output.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv3x3(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] => [B, C, 2H, 2W]."""
        return self.resized(x, (2 * x.shape[2], 2 * x.shape[3]))

    def resized(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """[B, C, H, W] => [B, C, *size], a size of at most twice H and W."""
        if size == (2 * x.shape[2], 2 * x.shape[3]):
            return self.conv(x, doubled=True)
        return self.conv(F.interpolate(x, size=size, mode="nearest"))


class Attention(nn.Module):
    """Single-head self-attention over all pixels with a residual connection: the autoencoders' middle.

    Args:
        channels: C of input and output, divisible by `groups`; also the width of the head.
        groups: groups of the normalisation.
        eps: added to the variance in the normalisation.
    """

    def __init__(self, channels: int, *, groups: int = 32, eps: float = 1e-6) -> None:
        super().__init__()
        self.group_norm = GroupNorm(groups, channels, eps)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] => [B, C, H, W]."""
        pixels = self.group_norm(x).flatten(2).transpose(1, 2)  # [B, H*W, C]
        q, k, v = (project(pixels).unsqueeze(1) for project in (self.to_q, self.to_k, self.to_v))
        out = attend(q, k, v).squeeze(1)
        return x + self.to_out[0](out).transpose(1, 2).reshape(x.shape)
