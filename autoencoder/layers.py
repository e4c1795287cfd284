"""The convolutional building blocks of the autoencoders; the U-Net of `ldm` is made of the same ones.

Attribute names are those of diffusers, so that weight files need no converter.
Shapes: B batch, C channels, H x W pixels (or latent pixels), T channels of the time embedding.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

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


LARGE = 1024
"""Pixels from which PyTorch's forward pass of GroupNorm over channels-last maps in bf16 is fast; there it is another"""
BACKWARD = getattr(torch.ops.aten, "native_group_norm_backward", None)


class GroupNorm(nn.GroupNorm):
    """GroupNorm that trains fast on a CPU.

    Where a group has few channels, PyTorch's backward pass over channels-last activations in bf16 takes up to 50 times
    as long as over contiguous ones (8x16x64x64 in 8 groups, two cores: 5.3 against 0.2 ms). In float32 it does not, so
    that from 4 channels a group on it pays to go there (docs/log.md): and back, or in the backward pass alone where the
    map is large.
    """

    def forward(self, x: Tensor) -> Tensor:
        each = self.num_channels // self.num_groups
        trains = x.device.type == "cpu" and torch.is_grad_enabled() and _channels_last(x)
        if each >= 16 or x.dtype != torch.bfloat16 or not trains:
            return super().forward(x)
        if each < 4:
            return super().forward(x.contiguous()).contiguous(memory_format=torch.channels_last)
        scale, shift = self.weight.float(), self.bias.float()  # which a network in bf16 has in bf16
        # one group is a narrow discriminator's, whose penalty asks for a second gradient
        if self.num_groups > 1 and x.shape[2] * x.shape[3] >= LARGE and BACKWARD is not None:
            return LargeNorm.apply(x, scale, shift, self.num_groups, self.eps)  # type: ignore[no-any-return, no-untyped-call]
        return F.group_norm(x.float(), self.num_groups, scale, shift, self.eps).to(x.dtype)


class LargeNorm(torch.autograd.Function):
    """GroupNorm of large channels-last maps [B,C,H,W] in bf16, weights in float32: PyTorch's forward pass in bf16, its
    backward pass in float32, and what is kept between them in bf16.

    At 8x64x64x64 in 8 groups, two cores, forward 0.4 instead of 1.7 ms by way of float32, backward alike.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
        samples, channels, height, width = x.shape
        sizes = samples, channels, height * width, groups
        made, mean, rstd = torch.native_group_norm(x, weight, bias, *sizes, eps=eps)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.sizes = sizes
        return made

    @staticmethod
    @once_differentiable  # what is saved here has no gradient of its own
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, mean, rstd = ctx.saved_tensors
        wide = (part.float() for part in (gradient, x, mean, rstd))
        into, of_weight, of_bias = BACKWARD(*wide, weight, *ctx.sizes, [True] * 3)  # type: ignore[misc]
        return into.to(x.dtype), of_weight, of_bias, None, None


def _channels_last(x: Tensor) -> bool:
    return x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


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
        h = self.conv1(F.silu(self.norm1(x)))
        if self.time_emb_proj is None:
            h = self.norm2(h)
        else:
            if temb is None:
                raise ValueError("temb is None: this ResnetBlock was built with temb_channels, pass [B, T].")
            time = self.time_emb_proj(F.silu(temb))[:, :, None, None]
            if self.scale_shift:
                scale, shift = time.chunk(2, dim=1)
                h = self.norm2(h) * (1 + scale) + shift
            else:
                h = self.norm2(h + time)
        h = self.conv2(self.dropout(F.silu(h)))
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
        out = F.scaled_dot_product_attention(q, k, v).squeeze(1)
        return x + self.to_out[0](out).transpose(1, 2).reshape(x.shape)
