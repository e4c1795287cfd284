"""3x3 convolutions prepared for a CPU with a quarter of the multiplications, in float32 (Lavin and Gray 2016).

    y = A^T [(G g G^T) * (B^T d B)] A          * value by value: 36 products for 16 values instead of 144

as `winograd_training` explains; here the weights g stay at the points, packed, and what is multiplied for all pairs of
channels is one convolution of 36 groups.

Shapes: B batch, C and O channels in and out, H x W pixels, T tiles of a batch, of 16 pixels made of 36.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor, nn

from autoencoder.packed import Conv
from autoencoder.winograd_training import MAPS, SEEN, TILE, framed, tiles

WIDE, FEW, MUCH, FEWER = 96, 16, 2**20, 1.5
"""Channels, tiles, tiles times pairs of channels, and times fewer products, from which it pays"""
LARGEST = 2**26
"""Bytes of weights at the points: the innermost layers of Stable Diffusion's U-Net would take gigabytes"""
AT_ONCE = 128
"""Tiles that are made at once, or a row of them"""


class Winograd(Conv):
    """The 3x3 convolution of channels-last maps [B,C,H,W] => [B,O,H,W] in float32.

    As a `Conv` it is what is multiplied: a 1x1 convolution [1,36*C,T,1] => [1,36*O,T,1] in 36 groups.
    """

    def __init__(self, layer: nn.Conv2d) -> None:
        self.made = layer.out_channels
        super().__init__(layer, torch.float32, groups=36)
        self.padding = [0, 0]

    def biased(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """A fresh map, some rows of tiles at a time, as they are more than twice as much; always as many, so that
        weights are packed once."""
        samples, _, height, width = x.shape
        down, across = -(-height // TILE), -(-width // TILE)
        padded = framed(x, 1 + TILE * down - height, 1 + TILE * across - width)
        made = x.new_empty(samples, down, TILE, across, TILE, self.made)
        steps = (n for n in range(1, down + 1) if down % n == 0 and n * samples * across <= AT_ONCE)
        step = max(steps, default=1)
        for first in range(0, down, step):
            rows = padded[:, TILE * first : TILE * (first + step) + SEEN - TILE]
            points = MAPS.seen @ tiles(rows)  # [T,36,C]
            points = super().biased(points.flatten(1).t()[None, :, :, None], None)
            y = MAPS.made @ points[0, :, :, 0].t().unflatten(1, (SEEN**2, -1))  # [T,16,O]
            y = y.view(samples, step, across, TILE, TILE, -1).transpose(2, 3)
            if bias is None:
                made[:, first : first + step] = y
            else:
                torch.add(y, bias, out=made[:, first : first + step])
        y = made.flatten(3, 4).flatten(1, 2)[:, :height, :width]
        return y.contiguous().permute(0, 3, 1, 2)

    def _laid_out(self) -> Tensor:
        made, seen = self.weight.shape[:2]
        once = self.weight.to(self.dtype).permute(2, 3, 0, 1).reshape(9, -1)
        return (MAPS.weight @ once).view(36 * made, seen, 1, 1)


class Conv3x3(Conv):
    """A 3x3 convolution that keeps the size, in the way that is faster for the maps that come."""

    def __init__(self, layer: nn.Conv2d, dtype: torch.dtype) -> None:
        super().__init__(layer, dtype)
        self.layer = layer
        self._winograd: Winograd | None = None

    def biased(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if not pays(self, x):
            return super().biased(x, bias)
        self._winograd = self._winograd or Winograd(self.layer)
        return self._winograd.biased(x, bias)

    def onto(self, x: Tensor, rest: Tensor) -> Tensor:
        return self.biased(x, self.bias).add_(rest) if pays(self, x) else super().onto(x, rest)


def pays(conv: Conv3x3, x: Tensor) -> bool:
    """Whether Winograd's way is faster, as measured on one core and two (docs/log.md).

    What goes to points and back must be little beside the products, tiles enough for weights that are four times as
    many, and products fewer even though a direct convolution leaves out those with the border's zeros. In bfloat16 the
    product is twice as fast, the way to points is not, and results are too coarse.
    """
    samples, channels, *sides = x.shape
    made = len(conv.weight)
    tiles = samples * prod(-(-side // TILE) for side in sides)
    fewer = samples * prod(3 * side - 2 for side in sides) >= FEWER * tiles * SEEN**2
    enough = tiles >= FEW and tiles * channels * made >= MUCH and min(channels, made) >= WIDE
    small = 4 * SEEN**2 * channels * made <= LARGEST
    return fewer and enough and small and conv.packed and conv.dtype == torch.float32
