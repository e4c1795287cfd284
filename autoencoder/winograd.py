"""3x3 convolutions with a quarter of the multiplications, on a CPU: `winograd.c` for tensors.

Maps are channels-last, float32 or bfloat16; sums are always float32. Where it does not serve (`serves`), a convolution
is PyTorch's own.

Shapes: B batch, C and O channels in and out, H x W pixels.
"""

from __future__ import annotations

import ctypes
from math import prod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from autoencoder.compiled import at_hand, call, lanes

TILE, POINTS = 4, 36


class Limits(NamedTuple):
    """Between which it is faster (docs/log.md)."""

    few: int
    """Tiles of a batch, at least"""
    large: int
    """Bytes of weights at the points, at most: more leave the caches, and of the largest networks would be gigabytes"""


DRAWS = {torch.float32: Limits(8, 2**26), torch.bfloat16: Limits(48, 2**26)}
"""With weights that are ready"""
TRAINS = {torch.float32: Limits(16, 2**26), torch.bfloat16: Limits(64, 2**25)}
"""With weights that are made ready in each step"""
NARROW = {torch.float32: 32, torch.bfloat16: 64}
"""Channels from which it is faster"""


def panel() -> int:
    """Of how many channels it takes multiples; 0 where it is not to be had."""
    return 2 * lanes()


def serves(x: Tensor, weight: Tensor, limits: dict[torch.dtype, Limits], doubled: bool) -> bool:
    """Whether a convolution of these maps is faster this way, with weights [O,C,3,3]; limits are DRAWS or TRAINS."""
    if x.dtype not in limits or x.dim() != 4 or not at_hand(x, weight) or not panel():
        return False
    samples, channels, *sides = x.shape
    made, seen = weight.shape[:2]
    if channels != seen or made % panel() or seen % panel() or min(made, seen) < NARROW[x.dtype]:
        return False
    sides = [side << doubled for side in sides]
    tiles = samples * prod(-(-side // TILE) for side in sides)
    few, large = limits[x.dtype]
    return min(sides) >= TILE and tiles >= few and 4 * POINTS * made * seen <= large


def at_points(weight: Tensor, back: bool = False) -> Tensor:
    """Weights [O,C,3,3] in float32, laid out in any way, as `convolved` wants them: [O/panel,36,C + 1,panel].

    `back`: those of the convolution that takes gradients back, turned round, with in and out exchanged.
    """
    address, (made, seen) = weight.data_ptr(), weight.shape[:2]
    by_made, by_seen, by_row, by_column = weight.stride()
    if back:
        address += 4 * (2 * by_row + 2 * by_column)  # bytes to the last of the nine
        made, seen, by_made, by_seen, by_row, by_column = seen, made, by_seen, by_made, -by_row, -by_column
    points = torch.empty(made // panel(), POINTS, seen + 1, panel())  # a row unused: `apart`, in the C
    call(
        "winograd_weights", address, longs(by_made, by_seen, by_row, by_column), points.data_ptr(), seen, made
    )
    return points


def convolved(
    x: Tensor, points: Tensor, bias: Tensor | None = None, rest: Tensor | None = None, doubled: bool = False
) -> Tensor:
    """Maps [B,C,H,W] => [B,O,H,W]; `doubled` by repeating pixels, [B,O,2H,2W].

    Bias [O] and `rest`, of the shape and precision of the result, are added.
    """
    samples, seen, height, width = x.shape
    made, height, width = points.shape[0] * points.shape[3], height << doubled, width << doubled
    bias = None if bias is None else bias.float().contiguous()
    x, rest = channels_last(x), None if rest is None else channels_last(rest)
    # no view of a tensor: what comes after may work in place
    y = torch.empty((samples, made, height, width), dtype=x.dtype, memory_format=torch.channels_last)
    added = (None if part is None else part.data_ptr() for part in (bias, rest))
    maps = x.data_ptr(), doubled, narrow(x), points.data_ptr(), *added, y.data_ptr()
    call("winograd", *maps, samples, height, width, seen, made)
    return y


def gradient(x: Tensor, back: Tensor, weight: Tensor, doubled: bool = False) -> Tensor:
    """Of weights [O,C,3,3] in float32, from maps [B,C,H,W] and what comes back, as `convolved` made it."""
    samples, made, height, width = back.shape
    x, back, of_weight = channels_last(x), channels_last(back), torch.empty_like(weight)
    maps = x.data_ptr(), doubled, back.data_ptr(), narrow(x), of_weight.data_ptr(), longs(*of_weight.stride())
    call("winograd_gradient", *maps, samples, height, width, x.shape[1], made)
    return of_weight


def longs(*numbers: int) -> ctypes.Array[ctypes.c_long]:
    return (ctypes.c_long * len(numbers))(*numbers)


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
        into = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:
            into = convolved(back, at_points(weight, back=True))
            into = F.avg_pool2d(into, 2, divisor_override=1) if ctx.doubled else into
        if ctx.needs_input_grad[1]:
            of_weight = gradient(x, back, weight, ctx.doubled)
        if ctx.needs_input_grad[2]:
            of_bias = back.sum((0, 2, 3), dtype=torch.float32)
        return into, of_weight, of_bias, None


class Conv3x3(nn.Conv2d):
    """A convolution that keeps the size of maps, and trains in the faster way."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1)

    def forward(self, x: Tensor, doubled: bool = False) -> Tensor:
        """[B,C,H,W] => [B,O,H,W]; `doubled` by repeating pixels beforehand, [B,O,2H,2W]."""
        if torch.is_autocast_enabled("cpu") and x.device.type == "cpu" and x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype("cpu"))
        whole = self.weight.dtype == self.bias.dtype == torch.float32  # type: ignore[union-attr]
        if whole and self.padding_mode == "zeros" and serves(x, self.weight, TRAINS, doubled):
            return Winograd.apply(x, self.weight, self.bias, doubled)  # type: ignore[no-any-return, no-untyped-call]
        return super().forward(twice(x) if doubled else x)


def put_into(network: nn.Module) -> None:
    """In place of a network's own 3x3 convolutions that keep the size; weights stay the same tensors."""
    for parent in list(network.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is nn.Conv2d and fits(layer):
                with torch.device("meta"):
                    ours = Conv3x3(layer.in_channels, layer.out_channels)
                ours.weight, ours.bias = layer.weight, layer.bias
                setattr(parent, name, ours)


def fits(layer: nn.Conv2d) -> bool:
    own = layer.kernel_size, layer.stride, layer.padding, layer.dilation
    plain = layer.groups == 1 and layer.bias is not None and layer.padding_mode == "zeros"
    return own == ((3, 3), (1, 1), (1, 1), (1, 1)) and plain


def twice(x: Tensor) -> Tensor:
    """[B,C,H,W] => [B,C,2H,2W], by repeating pixels."""
    return F.interpolate(x, scale_factor=2, mode="nearest")
