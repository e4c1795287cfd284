"""3x3 convolutions with a quarter of the multiplications, on a CPU: `winograd.c` for tensors.

Maps are channels-last, float32 or bfloat16; sums are always float32. Where it does not serve (`serves`), a convolution
is PyTorch's own.

Shapes: B batch, C and O channels in and out, H x W pixels.
"""

from __future__ import annotations

import ctypes
from functools import cache
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from autoencoder.compiled import call, library

TILE, POINTS = 4, 36
FEW = {torch.float32: 8, torch.bfloat16: 48}
"""Tiles of a batch from which it is faster when weights are ready (docs/log.md)"""
TRAINS = {torch.float32: 16, torch.bfloat16: 64}
"""The same, when they are made ready in each step"""
NARROW = {torch.float32: 32, torch.bfloat16: 64}
"""Channels from which it is faster"""
LARGEST = 2**26
"""Bytes of weights at the points: the innermost layers of Stable Diffusion's U-Net would take gigabytes"""


@cache
def panel() -> int:
    """Of how many channels it takes multiples; 0 where it is not to be had."""
    made = library()
    return made.winograd_panel() if made else 0


def serves(x: Tensor, weight: Tensor, few: dict[torch.dtype, int], doubled: bool) -> bool:
    """Whether a convolution of these maps is faster this way, with weights [O,C,3,3]; `few` as FEW or TRAINS."""
    if x.device.type != "cpu" or x.dtype not in few or torch.compiler.is_compiling() or not panel():
        return False
    samples, _, *sides = x.shape
    made, seen = weight.shape[:2]
    if made % panel() or seen % panel() or min(made, seen) < NARROW[x.dtype]:
        return False
    sides = [side << doubled for side in sides]
    tiles = samples * prod(-(-side // TILE) for side in sides)
    return min(sides) >= TILE and tiles >= few[x.dtype] and 4 * POINTS * made * seen <= LARGEST


def at_points(weight: Tensor) -> Tensor:
    """Weights [O,C,3,3] in float32, laid out in any way, as `convolved` wants them: [O/panel,36,C,panel]."""
    made, seen = weight.shape[:2]
    points = weight.new_empty(made // panel(), POINTS, seen, panel())
    call("winograd_weights", weight.data_ptr(), strides(weight), points.data_ptr(), seen, made)
    return points


def convolved(
    x: Tensor, points: Tensor, bias: Tensor | None = None, rest: Tensor | None = None, doubled: bool = False
) -> Tensor:
    """Maps [B,C,H,W] => [B,O,H,W]; `doubled` by repeating pixels, [B,O,2H,2W].

    Bias [O] in float32 and `rest`, of the shape of the result, are added.
    """
    samples, seen, height, width = x.shape
    made, height, width = points.shape[0] * points.shape[3], height << doubled, width << doubled
    x, rest = channels_last(x), None if rest is None else channels_last(rest)
    y = x.new_empty(samples, height, width, made).permute(0, 3, 1, 2)
    added = (None if part is None else part.data_ptr() for part in (bias, rest))
    maps = x.data_ptr(), doubled, narrow(x), points.data_ptr(), *added, y.data_ptr()
    call("winograd", *maps, samples, height, width, seen, made)
    return y


def gradient(x: Tensor, back: Tensor, weight: Tensor, doubled: bool = False) -> Tensor:
    """Of weights [O,C,3,3] in float32, from maps [B,C,H,W] and what comes back, as `convolved` made it."""
    samples, made, height, width = back.shape
    x, back, of_weight = channels_last(x), channels_last(back), torch.empty_like(weight)
    maps = x.data_ptr(), doubled, back.data_ptr(), narrow(x), of_weight.data_ptr(), strides(of_weight)
    call("winograd_gradient", *maps, samples, height, width, x.shape[1], made)
    return of_weight


def strides(weight: Tensor) -> ctypes.Array[ctypes.c_long]:
    return (ctypes.c_long * 4)(*weight.stride())


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def narrow(x: Tensor) -> bool:
    return x.dtype == torch.bfloat16


class Winograd(torch.autograd.Function):
    """Maps [B,C,H,W], weight [O,C,3,3] and bias [O] in float32 => as `convolved`, in the precision of the maps."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, doubled: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.doubled = doubled
        return convolved(x, at_points(weight), bias, doubled=doubled)

    @staticmethod
    @once_differentiable  # what the C does has no gradient of its own
    def backward(ctx: Any, back: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        into = None
        if ctx.needs_input_grad[0]:
            into = convolved(back, at_points(weight.flip(2, 3).transpose(0, 1)))
            into = F.avg_pool2d(into, 2, divisor_override=1) if ctx.doubled else into
        return into, gradient(x, back, weight, ctx.doubled), back.sum((0, 2, 3), dtype=torch.float32), None


class Conv3x3(nn.Conv2d):
    """A convolution that keeps the size of maps, and trains in the faster way."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1)

    def forward(self, x: Tensor, doubled: bool = False) -> Tensor:
        """[B,C,H,W] => [B,O,H,W]; `doubled` by repeating pixels beforehand, [B,O,2H,2W]."""
        if torch.is_autocast_enabled("cpu") and x.device.type == "cpu":
            x = x.to(torch.get_autocast_dtype("cpu"))
        whole = self.weight.dtype == torch.float32
        if whole and torch.is_grad_enabled() and serves(x, self.weight, TRAINS, doubled):
            return Winograd.apply(x, self.weight, self.bias, doubled)  # type: ignore[no-any-return, no-untyped-call]
        return super().forward(twice(x) if doubled else x)


def twice(x: Tensor) -> Tensor:
    """[B,C,H,W] => [B,C,2H,2W], by repeating pixels."""
    return F.interpolate(x, scale_factor=2, mode="nearest")
