"""Blocks of the autoencoder and the U-Net, prepared for a CPU: the mathematics of `layers`, made of `packed`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoencoder.layers import ResnetBlock
from autoencoder.norms import GroupNorm
from autoencoder.packed import Conv, Linear, maps, rows
from autoencoder.winograd import DRAWS, at_points, convolved, serves, twice


class Conv3x3(Conv):
    """A 3x3 convolution that keeps the size, in the way that is faster for the maps that come."""

    def __init__(self, layer: nn.Conv2d, dtype: torch.dtype) -> None:
        super().__init__(layer, dtype)
        self.layer = layer
        self._points: Tensor | None = None

    def biased(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if not serves(x, self.layer.weight, DRAWS, doubled=False):
            return super().biased(x, bias)
        return convolved(x, self.points(), bias)

    def onto(self, x: Tensor, rest: Tensor) -> Tensor:
        if not serves(x, self.layer.weight, DRAWS, doubled=False):
            return super().onto(x, rest)
        return convolved(x, self.points(), self.layer.bias, rest)

    def doubled(self, x: Tensor) -> Tensor:
        """Of the map at twice the resolution, by repeating pixels: [B,in,H,W] => [B,out,2H,2W]."""
        if not serves(x, self.layer.weight, DRAWS, doubled=True):
            return self(twice(x))
        return convolved(x, self.points(), self.layer.bias, doubled=True)

    def points(self) -> Tensor:
        """Weights for `convolved`, made at the first call."""
        if self._points is None:
            self._points = at_points(self.layer.weight.detach().float())
        return self._points


class Norm(GroupNorm):
    """In a precision, and for one's own: `tile_norms` hooks into it."""

    def __init__(self, layer: nn.GroupNorm, dtype: torch.dtype) -> None:
        super().__init__(layer.num_groups, layer.num_channels, layer.eps, device="meta")
        self.weight, self.bias = (
            nn.Parameter(part.detach().to(dtype), requires_grad=False) for part in (layer.weight, layer.bias)
        )


class Residual:
    """A ResnetBlock; what time adds or scales comes computed: SiLU of embedded times through `time_emb_proj`, with
    `time_bias`, [T,C], or scale and shift [T,2C]."""

    def __init__(self, block: ResnetBlock, dtype: torch.dtype) -> None:
        self.block = block
        self.norm1, self.norm2 = Norm(block.norm1, dtype), Norm(block.norm2, dtype)
        self.conv1, self.conv2 = (Conv3x3(conv, dtype) for conv in (block.conv1, block.conv2))
        self.shortcut = None if block.conv_shortcut is None else Linear.of(block.conv_shortcut, dtype)

    @property
    def time_bias(self) -> Tensor:
        """Of what takes embedded times to this block; that of the first convolution in it where time is added."""
        assert self.block.time_emb_proj is not None and self.block.conv1.bias is not None
        bias = self.block.time_emb_proj.bias
        return bias if self.block.scale_shift else bias + self.block.conv1.bias

    def __call__(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        """[B,in,H,W], time of one row or B => [B,out,H,W]."""
        h = self.norm1(x, silu=True)
        if time is None:
            h = self.norm2(self.conv1(h), silu=True)
        elif self.block.scale_shift:
            scale, shift = time[:, :, None, None].chunk(2, dim=1)
            h = F.silu(torch.addcmul(shift, self.norm2(self.conv1(h)), 1 + scale), inplace=True)
        elif len(time) == 1:
            h = self.norm2(self.conv1.biased(h, time[0]), silu=True)
        else:
            h = self.norm2(self.conv1.biased(h, None).add_(time[:, :, None, None]), silu=True)
        return self.conv2.onto(h, x if self.shortcut is None else maps(self.shortcut(rows(x)), x))
