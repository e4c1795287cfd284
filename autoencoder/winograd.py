"""Convolutions prepared for a CPU with fewer multiplications, in float32 (Winograd 1980; Lavin and Gray 2016).

    y = A^T [(G g G^T) * (B^T d B)] A          * value by value

as `winograd_training` explains: 36 products for 16 values of a 3x3 convolution instead of 144, and 16 for 9 values of a
2x2 convolution instead of 36. Here the weights g stay at the points, packed, and what is multiplied for all pairs of
channels is one convolution with as many groups as there are points.

Shapes: B batch, C and O channels in and out, H x W pixels, T tiles of a batch, of t x t pixels made of s x s.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor, nn

from autoencoder.packed import Conv
from autoencoder.winograd_training import MAPS, Maps, framed, maps, tiles

HALVES = maps((0.0, 1.0, -1.0), taps=2)
WIDE, FEW, MUCH, FEWER = 96, 16, 2**20, 1.5
"""Channels, tiles, tiles times pairs of channels, and times fewer products, from which it pays"""
LARGEST = 2**26
"""Bytes of weights at the points: the innermost layers of Stable Diffusion's U-Net would take gigabytes"""
AT_ONCE = 128
"""Tiles that are made at once, or a row of them"""


class Winograd(Conv):
    """A 3x3 or 2x2 convolution of channels-last maps with stride 1, padded by 1, in float32.

    As a `Conv` it is what is multiplied: a 1x1 convolution [1,s*s*C,T,1] => [1,s*s*O,T,1] in s*s groups.
    """

    def __init__(self, layer: nn.Conv2d, ways: Maps = MAPS) -> None:
        self.ways, self.made = ways, layer.out_channels
        super().__init__(layer, torch.float32, groups=ways.sees**2)
        self.padding = [0, 0]

    def biased(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """A fresh map [B,O,H',W'], some rows of tiles at a time, as they are more than the map; always as many, so that
        weights are packed once."""
        tile, sees = self.ways.tile, self.ways.sees
        samples, _, *sides = x.shape
        height, width = (side + 2 - (sees - tile) for side in sides)
        down, across = -(-height // tile), -(-width // tile)
        padded = framed(x, 1 + tile * down - height, 1 + tile * across - width)
        made = x.new_empty(samples, down, tile, across, tile, self.made)
        steps = (n for n in range(1, down + 1) if down % n == 0 and n * samples * across <= AT_ONCE)
        step = max(steps, default=1)
        for first in range(0, down, step):
            rows = padded[:, tile * first : tile * (first + step) + sees - tile]
            points = self.ways.seen @ tiles(rows, tile, sees)  # [T,s*s,C]
            points = super().biased(points.flatten(1).t()[None, :, :, None], None)
            y = self.ways.made @ points[0, :, :, 0].t().unflatten(1, (sees**2, -1))  # [T,t*t,O]
            y = y.view(samples, step, across, tile, tile, -1).transpose(2, 3)
            if bias is None:
                made[:, first : first + step] = y
            else:
                torch.add(y, bias, out=made[:, first : first + step])
        return made.flatten(3, 4).flatten(1, 2)[:, :height, :width].contiguous().permute(0, 3, 1, 2)

    def _laid_out(self) -> Tensor:
        made, seen = self.weight.shape[:2]
        once = self.weight.to(self.dtype).permute(2, 3, 0, 1).reshape(-1, made * seen)
        return (self.ways.weight @ once).view(-1, seen, 1, 1)


class Quick(Conv):
    """A 3x3 or 2x2 convolution of stride 1, padded by 1, in the way that is faster for the maps that come."""

    def __init__(self, layer: nn.Conv2d, dtype: torch.dtype) -> None:
        super().__init__(layer, dtype)
        self.layer, self.ways = layer, MAPS if layer.kernel_size == (3, 3) else HALVES
        self._winograd: Winograd | None = None

    def biased(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if not self.pays(x):
            return super().biased(x, bias)
        self._winograd = self._winograd or Winograd(self.layer, self.ways)
        return self._winograd.biased(x, bias)

    def onto(self, x: Tensor, rest: Tensor) -> Tensor:
        return self.biased(x, self.bias).add_(rest) if self.pays(x) else super().onto(x, rest)

    def pays(self, x: Tensor) -> bool:
        """Whether Winograd's way is faster, as measured on one core and two (docs/log.md).

        What goes to points and back must be little beside the products, tiles enough for weights that are up to four
        times as many, and products fewer even though a direct convolution leaves out those with the border's zeros. In
        bfloat16 the product is twice as fast, the way to points is not, and results are too coarse.
        """
        samples, channels, *sides = x.shape
        made, taps, (tile, sees) = len(self.weight), self.weight.shape[-1], self.ways[:2]
        sides = [side + 3 - taps for side in sides]
        tiles = samples * prod(-(-side // tile) for side in sides)
        fewer = samples * prod(taps * side - 2 for side in sides) >= FEWER * tiles * sees**2
        enough = tiles >= FEW and tiles * channels * made >= MUCH and min(channels, made) >= WIDE
        small = 4 * sees**2 * channels * made <= LARGEST
        return fewer and enough and small and self.packed and self.dtype == torch.float32
