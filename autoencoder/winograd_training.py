"""3x3 convolutions that train with a quarter of the multiplications, in float32 on a CPU.

Winograd 1980; Lavin and Gray 2016. Four neighbouring values of a row convolved with three weights depend on six values;
at six points, polynomials of them are multiplied value by value: 6 products instead of 12. For rows and columns at once
a tile of 4x4 costs 36 products for each pair of channels instead of 144, in the forward pass and in both gradients.

Shapes: B batch, C and O channels in and out, H x W pixels, T = B * H/4 * W/4 tiles, of 16 pixels made of 36.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

TILE, SEEN = 4, 6
POINTS = (0.0, 2 / 3, -2 / 3, 3 / 2, -3 / 2)
"""And infinity. They decide how large rounding errors become (Barabasz et al. 2020): 1.7 times those of a direct
convolution, with the usual 0, 1, -1, 2, -2 four times"""
WIDE, MANY = 64, 4
"""Channels, and tiles of one sample, from which it is faster (docs/log.md). The number of samples does not decide:
parts of a batch are computed as the whole is, and take as much memory each"""


class Maps(NamedTuple):
    """What takes tiles to points and back, for rows and columns at once."""

    seen: Tensor
    """[36,36] pixels of a tile => points"""
    weight: Tensor
    """[36,9] weights => points"""
    made: Tensor
    """[16,36] points => pixels"""


def _maps() -> Maps:
    def powers(count: int) -> Tensor:
        finite = torch.tensor(POINTS, dtype=torch.float64)[:, None] ** torch.arange(count)
        return torch.cat([finite, torch.eye(count, dtype=torch.float64)[-1:]])  # of infinity the last alone

    parts = torch.linalg.inv(powers(SEEN)).T, powers(3), powers(TILE).T
    return Maps(*(torch.kron(part, part).float() for part in parts))


MAPS = _maps()


class Conv3x3(nn.Conv2d):
    """A convolution that keeps the size of maps."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[B,C,H,W] => [B,O,H,W]."""
        if torch.is_grad_enabled() and pays(x, self.weight):
            return Winograd.apply(x, self.weight, self.bias)  # type: ignore[no-untyped-call]
        return super().forward(x)


def pays(x: Tensor, weight: Tensor) -> bool:
    """Whether maps are such as train faster by tiles."""
    plain = x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32
    if not plain or torch.is_autocast_enabled("cpu") or x.shape[2] % TILE or x.shape[3] % TILE:
        return False
    return min(weight.shape[:2]) >= WIDE and (x.shape[2] // TILE) * (x.shape[3] // TILE) >= MANY


class Winograd(torch.autograd.Function):
    """Maps [B,C,H,W], sides multiples of 4, weight [O,C,3,3] and bias [O] => [B,O,H,W], channels-last."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        samples, channels, height, width = x.shape
        seen = (MAPS.seen @ taken_apart(x)).view(SEEN**2, -1, channels)
        weights = weight.permute(2, 3, 0, 1).reshape(9, -1)
        weights = (MAPS.weight @ weights).view(SEEN**2, -1, channels)
        made = MAPS.made @ (seen @ weights.mT).flatten(1)
        made = made.view(TILE, TILE, samples, height // TILE, width // TILE, -1).permute(2, 3, 0, 4, 1, 5)
        ctx.save_for_backward(seen, weights)
        ctx.shape = x.shape
        return made.reshape(samples, height, width, -1).add_(bias).permute(0, 3, 1, 2)

    @staticmethod
    @once_differentiable  # what is saved here has no gradient of its own
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:  # type: ignore[override]
        seen, weights = ctx.saved_tensors
        channels = ctx.shape[1]
        tiles = gradient.permute(0, 2, 3, 1).unflatten(1, (-1, TILE)).unflatten(3, (-1, TILE))
        made = tiles.permute(2, 4, 0, 1, 3, 5).reshape(TILE**2, -1)
        made = (MAPS.made.T @ made).view(SEEN**2, -1, gradient.shape[1])
        into = None
        if ctx.needs_input_grad[0]:
            into = put_together(MAPS.seen.T @ (made @ weights).flatten(1), ctx.shape)
        weight = (MAPS.weight.T @ (made.mT @ seen).flatten(1)).view(3, 3, -1, channels)
        return into, weight.permute(2, 3, 0, 1), gradient.sum((0, 2, 3))


def taken_apart(x: Tensor) -> Tensor:
    """Maps [B,C,H,W], with zeros around them, as the values that tiles depend on: [36,T*C]."""
    samples, channels, height, width = x.shape
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
    sample, row, pixel, channel = padded.stride()
    strides = row, pixel, sample, TILE * row, TILE * pixel, channel
    shape = SEEN, SEEN, samples, height // TILE, width // TILE, channels
    return padded.as_strided(shape, strides).reshape(SEEN**2, -1)


def put_together(parts: Tensor, shape: torch.Size) -> Tensor:
    """[36,T*C] => maps [B,C,H,W]; what several tiles say of a pixel is added up. The transpose of `taken_apart`."""
    samples, channels, height, width = shape
    down, across = height // TILE, width // TILE
    parts = parts.view(SEEN, SEEN, samples, down, across, channels)
    padded = parts.new_zeros(samples, down + 1, TILE, across + 1, TILE, channels)
    pixels = padded.permute(2, 4, 0, 1, 3, 5)
    over = SEEN - TILE
    pixels[:, :, :, :-1, :-1] = parts[:TILE, :TILE]
    pixels[:over, :, :, 1:, :-1] += parts[TILE:, :TILE]
    pixels[:, :over, :, :-1, 1:] += parts[:TILE, TILE:]
    pixels[:over, :over, :, 1:, 1:] += parts[TILE:, TILE:]
    inner = padded.view(samples, height + TILE, width + TILE, channels)[:, 1 : height + 1, 1 : width + 1]
    return inner.permute(0, 3, 1, 2)
