"""Layers prepared for a CPU: weights packed for oneDNN, fused with what follows them.

The operators are those that PyTorch's own compiler calls, in `torch.ops.mkldnn`, and have no public name. Each stands
beside its plain twin, which serves where they are missing or wrong. Weights are copied: a layer that was changed must
be packed again (`Kept`). No gradients. Feature maps are channels-last: a map [B,C,H,W] is rows of pixels [B,H*W,C].
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any, Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoencoder.notices import Notice

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

    def times(self, x: Tensor, factor: Tensor) -> Tensor:
        """The product, multiplied by `factor` [..., out]."""
        if self.packed:
            return ONEDNN._linear_pointwise.binary(x, factor, self.weight, self.bias, "mul")
        return F.linear(x, self.weight, self.bias) * factor

    def onto(self, x: Tensor, rest: Tensor) -> Tensor:
        """The product, added to `rest` [..., out]."""
        if self.packed:
            return ONEDNN._linear_pointwise.binary(x, rest, self.weight, self.bias, "add")
        return F.linear(x, self.weight, self.bias) + rest


class Conv:
    """A convolution of channels-last maps [B,in,H,W]."""

    def __init__(
        self, layer: nn.Conv2d, dtype: torch.dtype, packed: bool | None = None, groups: int = 1
    ) -> None:
        self.dtype, self.weight = dtype, layer.weight.detach()  # the layer's own: no copy but the packed one
        self.bias = None if layer.bias is None else layer.bias.detach().to(dtype)
        self.stride, self.padding = list(layer.stride), [int(side) for side in layer.padding]
        self.groups = groups
        self.packed = packable(layer.weight, dtype) if packed is None else packed
        if not self.packed:
            self.weight = self._laid_out()
        self._for: dict[torch.Size, Tensor] = {}

    def __call__(self, x: Tensor) -> Tensor:
        return self.biased(x, self.bias)

    def biased(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """With another bias [out] than the layer's, or none."""
        if not self.packed:
            return F.conv2d(x, self.weight, bias, self.stride, self.padding, groups=self.groups)
        where = (self.padding, self.stride, [1, 1], self.groups)
        return ONEDNN._convolution_pointwise(x, self._weight(x), bias, *where, "none", [], "")

    def onto(self, x: Tensor, rest: Tensor) -> Tensor:
        """The convolution, added to `rest` [B,out,H',W']."""
        if not self.packed:
            return F.conv2d(x, self.weight, self.bias, self.stride, self.padding, groups=self.groups) + rest
        where = (self.padding, self.stride, [1, 1], self.groups)
        return ONEDNN._convolution_pointwise.binary(
            x, rest, self._weight(x), self.bias, *where, "add", 1.0, None, [], None
        )

    def _laid_out(self) -> Tensor:
        return self.weight.to(self.dtype).contiguous(memory_format=torch.channels_last)

    def _weight(self, x: Tensor) -> Tensor:
        """Packed as suits maps of this shape."""
        if x.shape not in self._for:
            self._for[x.shape] = ONEDNN._reorder_convolution_weight(
                self._laid_out(), self.padding, self.stride, [1, 1], self.groups, list(x.shape)
            )
        return self._for[x.shape]


Packed = TypeVar("Packed")


class Kept(Generic[Packed]):
    """What a network was last packed into, until it is wanted in another way or its weights have changed.

    Several threads may ask. It takes as much memory as the network, or some times as much (`autoencoder.winograd`).
    Whether weights have changed is known by PyTorch's count of changes in place, and by their norms, as changes through
    `.data` are not counted.
    """

    def __init__(self) -> None:
        self._last: tuple[object, Packed] | None = None

    def __reduce__(self) -> tuple[type[Kept[Any]], tuple[()]]:
        return Kept, ()  # packed weights can't be copied: a copy begins with none

    def of(self, network: nn.Module, way: object, pack: Callable[[], Packed]) -> Packed:
        """What `pack` makes of a network.

        Args:
            way: on what else the result depends: precision, sizes.
        """
        weights: list[Tensor] = [*network.parameters()]
        with torch.no_grad():
            each = [norm.float() for norm in torch._foreach_norm(weights)]
            norms = torch.stack(each).tolist()  # a GPU is waited for once
        seen = [(id(p), p.data_ptr(), changes(p)) for p in weights]
        wanted = network, way, seen, norms
        last = self._last
        if last is None or last[0] != wanted:
            last = self._last = None  # let go before others take as much memory
            last = self._last = wanted, pack()
        return last[1]


def changes(weight: Tensor) -> object:
    """How often it was changed in place; made in inference mode it does not tell, and counts as changed each time."""
    return object() if weight.is_inference() else weight._version


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
        Notice,
        stacklevel=2,
    )
    return False


@torch.no_grad()
def _largest_error(dtype: torch.dtype) -> float:
    """Of every fused operator against its plain twin on a small example, relative to the largest value."""
    generator = torch.Generator().manual_seed(0)
    x, rest, weight = (torch.randn(2, 16, 4, 4, generator=generator) for _ in range(3))
    x, rest = (part.to(dtype, memory_format=torch.channels_last) for part in (x, rest))
    # on the meta device, which draws nothing from the person's random numbers (`skip_init` loads sympy besides)
    layer = nn.Conv2d(16, 16, 3, padding=1, device="meta")
    drawn = {
        name: torch.randn(part.shape, generator=generator) / 12 for name, part in layer.named_parameters()
    }
    layer.load_state_dict(drawn, assign=True)
    weight = weight[:1].reshape(16, 16) / 4
    grouped = nn.Conv2d(16, 16, 1, groups=4, device="meta")
    grouped.load_state_dict({"weight": weight[:, :4, None, None].clone(), "bias": layer.bias}, assign=True)
    made = []
    for packed in (True, False):
        linear, conv = Linear(weight, layer.bias, dtype, packed), Conv(layer, dtype, packed)
        pixels = rows(x)
        results = [conv(x), conv.onto(x, rest.clone()), linear(pixels), linear.gelu(pixels)]
        results.append(linear.times(pixels, rows(rest)))
        results.append(Conv(grouped, dtype, packed, groups=4)(x))
        made.append([*results, linear.onto(pixels, rows(rest).clone())])
    pairs = zip(*made, strict=True)
    return max(float((a - b).float().abs().max() / b.float().abs().max()) for a, b in pairs)
