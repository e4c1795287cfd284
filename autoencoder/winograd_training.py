"""3x3 convolutions that train with a quarter of the multiplications, in float32 on a CPU.

Winograd 1980; Lavin and Gray 2016. Four neighbouring values of a row convolved with three weights depend on six values;
at six points, polynomials of them are multiplied value by value: 6 products instead of 12. For rows and columns at once
a tile of 4x4 costs 36 products for each pair of channels instead of 144, in the forward pass and in both gradients.

Tiles are taken to points one by one: a single product of all of them is as fast on one core, and half as fast on two.

Shapes: B batch, C and O channels in and out, H x W pixels, T = B * H/4 * W/4 tiles, of 16 pixels made of 36.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
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
    """What takes a tile to points and back, for rows and columns at once."""

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
        samples, _, height, width = x.shape
        seen = (MAPS.seen @ tiles(framed(x))).transpose(0, 1)  # [36,T,C]
        weights = (MAPS.weight @ weight.permute(0, 2, 3, 1).flatten(1, 2)).transpose(0, 1)  # [36,O,C]
        made = MAPS.made @ (seen @ weights.mT).transpose(0, 1)  # [T,16,O]
        made = made.view(samples, height // TILE, width // TILE, TILE, TILE, -1).transpose(2, 3)
        ctx.save_for_backward(seen, weights)
        ctx.shape = x.shape
        return made.reshape(samples, height, width, -1).add_(bias).permute(0, 3, 1, 2)

    @staticmethod
    @once_differentiable  # what is saved here has no gradient of its own
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:  # type: ignore[override]
        seen, weights = ctx.saved_tensors
        made = gradient.permute(0, 2, 3, 1).unflatten(1, (-1, TILE)).unflatten(3, (-1, TILE)).transpose(2, 3)
        made = (MAPS.made.T @ made.reshape(-1, TILE**2, gradient.shape[1])).transpose(0, 1)  # [36,T,O]
        into = None
        if ctx.needs_input_grad[0]:
            into = put_together(MAPS.seen.T @ (made @ weights).transpose(0, 1), ctx.shape)
        weight = MAPS.weight.T @ (made.mT @ seen).transpose(0, 1)  # [O,9,C]
        return into, weight.unflatten(1, (3, 3)).permute(0, 3, 1, 2), gradient.sum((0, 2, 3))


def framed(x: Tensor, below: int = 1, right: int = 1) -> Tensor:
    """Maps [B,C,H,W] => [B,1+H+below,1+W+right,C], with zeros around them."""
    samples, channels, height, width = x.shape
    padded = x.new_empty(samples, 1 + height + below, 1 + width + right, channels)
    for border in (padded[:, 0], padded[:, height + 1 :], padded[:, :, 0], padded[:, :, width + 1 :]):
        border.zero_()
    padded[:, 1 : height + 1, 1 : width + 1] = x.permute(0, 2, 3, 1)
    return padded


def tiles(padded: Tensor) -> Tensor:
    """Overlapping tiles [T,36,C] of maps [B,4 down + 2,4 across + 2,C]."""
    samples, height, width, channels = padded.shape
    sample, row, pixel, channel = padded.stride()
    strides = sample, TILE * row, TILE * pixel, row, pixel, channel
    shape = samples, height // TILE, width // TILE, SEEN, SEEN, channels
    return padded.as_strided(shape, strides, padded.storage_offset()).reshape(-1, SEEN**2, channels)


def put_together(parts: Tensor, shape: torch.Size) -> Tensor:
    """[T,36,C] => maps [B,C,H,W]; what several tiles say of a pixel is added up: `tiles` and `framed`, transposed."""
    samples, channels, height, width = shape
    down, across, over = height // TILE, width // TILE, SEEN - TILE
    parts = parts.view(samples, down, across, SEEN, SEEN, channels).permute(3, 4, 0, 1, 2, 5)
    padded = parts.new_empty(samples, down + 1, TILE, across + 1, TILE, channels)
    padded[:, -1] = padded[:, :, :, -1] = 0
    pixels = padded.permute(2, 4, 0, 1, 3, 5)
    pixels[:, :, :, :-1, :-1] = parts[:TILE, :TILE]
    pixels[:over, :, :, 1:, :-1] += parts[TILE:, :TILE]
    pixels[:, :over, :, :-1, 1:] += parts[:TILE, TILE:]
    pixels[:over, :over, :, 1:, 1:] += parts[TILE:, TILE:]
    inner = padded.view(samples, height + TILE, width + TILE, channels)[:, 1 : height + 1, 1 : width + 1]
    return inner.permute(0, 3, 1, 2)
