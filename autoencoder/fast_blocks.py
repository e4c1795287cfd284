"""Blocks of the autoencoder and the U-Net, prepared for a CPU: the mathematics of `layers`, made of `packed`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoencoder import doubling
from autoencoder.layers import ResnetBlock
from autoencoder.packed import Conv, Linear, maps, rows
from autoencoder.winograd import Conv3x3

WIDE, MUCH = 96, 2**24
"""Channels, and pixels times pairs of channels, from which nine products are faster than a convolution"""


class Doubling:
    """Twice the resolution by repeating pixels, then a 3x3 convolution: nine products of matrices, as `doubling` has
    it, or of small maps one convolution, as `folded` has it."""

    def __init__(self, layer: nn.Conv2d, dtype: torch.dtype) -> None:
        self.layer, self.dtype = layer, dtype
        self._four: Conv | None = None
        self._nine: list[list[Linear]] = []

    def __call__(self, x: Tensor) -> Tensor:
        """[B,in,H,W] => [B,out,2H,2W]."""
        return self._of_products(x) if self.pays(x) else self._at_once(x)

    def pays(self, x: Tensor) -> bool:
        """Whether products are faster, as measured on one core and two (docs/log.md)."""
        made, seen = self.layer.weight.shape[:2]
        enough = min(made, seen) >= WIDE and x.shape[0] * x.shape[2] * x.shape[3] * made * seen >= MUCH
        return enough and x.device.type == "cpu"

    @torch.no_grad()
    def _of_products(self, x: Tensor) -> Tensor:
        if not self._nine:
            bias = {doubling.OWN: self.layer.bias}
            self._nine = [
                [Linear(weight, bias.get((row, column)), self.dtype) for column, weight in enumerate(weights)]
                for row, weights in enumerate(doubling.by_kinds(self.layer.weight))
            ]
        return doubling.of_products(x, lambda pixels, row, column: self._nine[row][column](pixels))

    @torch.no_grad()
    def _at_once(self, x: Tensor) -> Tensor:
        """Value (p, q) of each pixel's four lies in the convolution's map moved by p and q: taken in one copy."""
        if self._four is None:
            weight, bias = folded(self.layer)
            four = nn.Conv2d(self.layer.in_channels, len(bias), 2, padding=1, device="meta")
            four.weight, four.bias = (nn.Parameter(part, requires_grad=False) for part in (weight, bias))
            self._four = Conv(four, self.dtype)
        parts = self._four(x).permute(0, 2, 3, 1).contiguous()  # [B,H+1,W+1,2*2*out]
        (samples, height, width, kinds), (sample, row, pixel, _) = parts.shape, parts.stride()
        shape = samples, height - 1, 2, width - 1, 2, kinds // 4
        made = parts.as_strided(shape, (sample, row, row + kinds // 2, pixel, pixel + kinds // 4, 1))
        return made.flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)


def folded(conv: nn.Conv2d) -> tuple[Tensor, Tensor]:
    """Weight [4 out, in, 2, 2] and bias [4 out] that do to a map what a 3x3 convolution does to it doubled.

    An even row of the doubled map sees through three weights two rows of the map, i - 1 and twice i; an odd row sees
    twice i, and i + 1. Rows by columns that makes four convolutions of 2x2, done as one: 4/9 of the products.
    """
    sees = conv.weight.new_tensor([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]])  # odd?, 2, 3
    weight = torch.einsum("pak,qbl,oikl->pqoiab", sees, sees, conv.weight).flatten(0, 2)
    assert conv.bias is not None
    return weight.contiguous(memory_format=torch.channels_last), conv.bias.repeat(4)


class Norm(nn.GroupNorm):
    """GroupNorm in a precision, and a SiLU after it if asked for. A module, so that `tile_norms` can hook into it."""

    def __init__(self, layer: nn.GroupNorm, dtype: torch.dtype) -> None:
        super().__init__(layer.num_groups, layer.num_channels, layer.eps, device="meta")
        self.weight, self.bias = (
            nn.Parameter(part.detach().to(dtype), requires_grad=False) for part in (layer.weight, layer.bias)
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B,C,H,W] => the same shape.

        On small maps with few channels a group, PyTorch's is slow in bfloat16 (2x128x16x16 in 32 groups, one core:
        0.51 ms, by way of float32 0.19 ms).
        """
        few = self.num_channels < 16 * self.num_groups and x.shape[2] * x.shape[3] < 1024
        if few and x.dtype == torch.bfloat16 and x.device.type == "cpu":
            scale, shift = self.weight.float(), self.bias.float()
            return F.group_norm(x.float(), self.num_groups, scale, shift, self.eps).to(x.dtype)
        return super().forward(x)

    def silu(self, x: Tensor) -> Tensor:
        return F.silu(self(x), inplace=True)


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
        h = self.norm1.silu(x)
        if time is None:
            h = self.norm2.silu(self.conv1(h))
        elif self.block.scale_shift:
            scale, shift = time[:, :, None, None].chunk(2, dim=1)
            h = F.silu(torch.addcmul(shift, self.norm2(self.conv1(h)), 1 + scale), inplace=True)
        elif len(time) == 1:
            h = self.norm2.silu(self.conv1.biased(h, time[0]))
        else:
            h = self.norm2.silu(self.conv1.biased(h, None).add_(time[:, :, None, None]))
        return self.conv2.onto(h, x if self.shortcut is None else maps(self.shortcut(rows(x)), x))
