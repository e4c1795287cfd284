"""Layers prepared for a CPU: weights packed for oneDNN, fused with what follows them.

The operators are those that PyTorch's own compiler calls, in `torch.ops.mkldnn`, and have no public name. Each stands
beside its plain twin, which serves where they are missing or wrong. Weights are copied: a layer that was changed must
be prepared again. No gradients. Feature maps are channels-last, so that a map [B,C,H,W] is rows of pixels [B,H*W,C].
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import skip_init

from autoencoder.layers import ResnetBlock, folded, unfolded

ONEDNN: Any = torch.ops.mkldnn


class Linear:
    """Rows [..., in] => [..., out]: x W^T + b. A 1x1 convolution's weight [out,in,1,1] will do."""

    def __init__(
        self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, packed: bool | None = None
    ) -> None:
        self.weight = weight.detach().flatten(1).to(dtype)
        self.bias = None if bias is None else bias.detach().to(dtype)
        self.packed = packable(weight, dtype) if packed is None else packed
        if self.packed:
            self.weight = ONEDNN._reorder_linear_weight(self.weight.contiguous())

    @classmethod
    def of(cls, layer: nn.Linear | nn.Conv2d, dtype: torch.dtype) -> Linear:
        return cls(layer.weight, layer.bias, dtype)

    def __call__(self, x: Tensor) -> Tensor:
        if self.packed:
            return ONEDNN._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return F.linear(x, self.weight, self.bias)

    def gelu(self, x: Tensor) -> Tensor:
        """GELU of the product."""
        if self.packed:
            return ONEDNN._linear_pointwise(x, self.weight, self.bias, "gelu", [], "none")
        return F.gelu(F.linear(x, self.weight, self.bias))

    def onto(self, x: Tensor, rest: Tensor) -> Tensor:
        """The product, added to `rest` [..., out]."""
        if self.packed:
            return ONEDNN._linear_pointwise.binary(x, rest, self.weight, self.bias, "add")
        return F.linear(x, self.weight, self.bias) + rest


class Conv:
    """A convolution of channels-last maps [B,in,H,W]."""

    def __init__(self, layer: nn.Conv2d, dtype: torch.dtype, packed: bool | None = None) -> None:
        self.dtype, self.weight = dtype, layer.weight.detach()  # the layer's own: no copy but the packed one
        self.bias = None if layer.bias is None else layer.bias.detach().to(dtype)
        self.stride, self.padding = list(layer.stride), [int(side) for side in layer.padding]
        self.packed = packable(layer.weight, dtype) if packed is None else packed
        if not self.packed:
            self.weight = self._laid_out()
        self._for: dict[torch.Size, Tensor] = {}

    def __call__(self, x: Tensor) -> Tensor:
        return self.biased(x, self.bias)

    def biased(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """With another bias [out] than the layer's, or none."""
        if not self.packed:
            return F.conv2d(x, self.weight, bias, self.stride, self.padding)
        where = (self.padding, self.stride, [1, 1], 1)
        return ONEDNN._convolution_pointwise(x, self._weight(x), bias, *where, "none", [], "")

    def onto(self, x: Tensor, rest: Tensor) -> Tensor:
        """The convolution, added to `rest` [B,out,H',W']."""
        if not self.packed:
            return F.conv2d(x, self.weight, self.bias, self.stride, self.padding) + rest
        where = (self.padding, self.stride, [1, 1], 1)
        return ONEDNN._convolution_pointwise.binary(
            x, rest, self._weight(x), self.bias, *where, "add", 1.0, None, [], None
        )

    def _laid_out(self) -> Tensor:
        return self.weight.to(self.dtype).contiguous(memory_format=torch.channels_last)

    def _weight(self, x: Tensor) -> Tensor:
        """Packed as suits maps of this shape."""
        if x.shape not in self._for:
            self._for[x.shape] = ONEDNN._reorder_convolution_weight(
                self._laid_out(), self.padding, self.stride, [1, 1], 1, list(x.shape)
            )
        return self._for[x.shape]


class Doubling:
    """Twice the resolution by repeating pixels, then a 3x3 convolution, as `layers.folded` has it."""

    def __init__(self, layer: nn.Conv2d, dtype: torch.dtype) -> None:
        with torch.no_grad():
            weight, bias = folded(layer)
        four = nn.Conv2d(layer.in_channels, len(bias), 2, padding=1, device="meta")
        four.weight, four.bias = (nn.Parameter(part, requires_grad=False) for part in (weight, bias))
        self.conv = Conv(four, dtype)

    def __call__(self, x: Tensor) -> Tensor:
        """[B,in,H,W] => [B,out,2H,2W]."""
        return unfolded(self.conv(x))


class Norm:
    """GroupNorm, and a SiLU after it if asked for."""

    def __init__(self, layer: nn.GroupNorm, dtype: torch.dtype) -> None:
        self.groups, self.eps = layer.num_groups, layer.eps
        self.weight, self.bias = layer.weight.detach().to(dtype), layer.bias.detach().to(dtype)

    def __call__(self, x: Tensor) -> Tensor:
        return F.group_norm(x, self.groups, self.weight, self.bias, self.eps)

    def silu(self, x: Tensor) -> Tensor:
        return F.silu(self(x), inplace=True)


class Residual:
    """A ResnetBlock; what time adds or scales comes computed (`time_of`)."""

    def __init__(self, block: ResnetBlock, dtype: torch.dtype) -> None:
        self.block = block
        self.norm1, self.norm2 = Norm(block.norm1, dtype), Norm(block.norm2, dtype)
        self.conv1, self.conv2 = Conv(block.conv1, dtype), Conv(block.conv2, dtype)
        self.shortcut = None if block.conv_shortcut is None else Linear.of(block.conv_shortcut, dtype)

    def time_of(self, emb: Tensor) -> Tensor:
        """SiLU of embedded times [T,D] => [T,C], the bias of the first convolution in it; scale and shift [T,2C]."""
        assert self.block.time_emb_proj is not None
        time = self.block.time_emb_proj(emb)
        if not self.block.scale_shift:
            time = time + self.block.conv1.bias
        return time.to(self.norm1.weight.dtype)

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


def rows(x: Tensor) -> Tensor:
    """A channels-last map [B,C,H,W] as rows of pixels [B,H*W,C]: a view."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def maps(x: Tensor, like: Tensor) -> Tensor:
    """Rows [B,H*W,C] as a channels-last map of the height and width of another: a view."""
    return x.unflatten(1, like.shape[-2:]).permute(0, 3, 1, 2)


def packable(weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether a weight is where oneDNN's fused operators are, and they can be used."""
    return weight.device.type == "cpu" and packs(dtype)


@cache
def packs(dtype: torch.dtype) -> bool:
    """Whether oneDNN's fused operators are there and right in a precision; if not, says so, once."""
    if not torch.backends.mkldnn.is_available():
        why = "this PyTorch was built without oneDNN"
    else:
        try:
            unlike = _largest_error(dtype)
        except (AttributeError, RuntimeError, TypeError, ValueError) as error:
            why = f"{type(error).__name__}: {error}".splitlines()[0]
        else:
            if unlike < 50 * torch.finfo(dtype).eps:
                return True
            why = f"they are off by {unlike:.1g}"
    warnings.warn(
        f"oneDNN's fused operators can't be used in {str(dtype).removeprefix('torch.')} ({why}); "
        "drawing takes PyTorch's own, which are slower.",
        stacklevel=2,
    )
    return False


@torch.no_grad()
def _largest_error(dtype: torch.dtype) -> float:
    """Of every fused operator against its plain twin on a small example, relative to the largest value."""
    generator = torch.Generator().manual_seed(0)
    x, rest, weight = (torch.randn(2, 16, 4, 4, generator=generator) for _ in range(3))
    x, rest = (part.to(dtype, memory_format=torch.channels_last) for part in (x, rest))
    layer = skip_init(nn.Conv2d, 16, 16, 3, padding=1)  # which draws nothing from the person's random numbers
    for part in (layer.weight, layer.bias):
        part.copy_(torch.randn(part.shape, generator=generator) / 12)
    weight = weight[:1].reshape(16, 16) / 4
    made = []
    for packed in (True, False):
        linear, conv = Linear(weight, layer.bias, dtype, packed), Conv(layer, dtype, packed)
        pixels = rows(x)
        results = [conv(x), conv.onto(x, rest.clone()), linear(pixels), linear.gelu(pixels)]
        made.append([*results, linear.onto(pixels, rows(rest).clone())])
    pairs = zip(*made, strict=True)
    return max(float((a - b).float().abs().max() / b.float().abs().max()) for a, b in pairs)
