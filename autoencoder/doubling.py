"""3x3 convolutions of maps doubled by repeating pixels, that train with a quarter of the multiplications on a CPU.

Along a row, with weights u v w and s = u + v + w, an even value of the doubled map is u x[i-1] + (v + w) x[i], or
s x[i] - u (x[i] - x[i-1]), and an odd one s x[i] + w (x[i+1] - x[i]). What both make of x[i] is made once: 3 products
where the doubled map has 6. For rows and columns at once 9 remain of 36, all of them plain products of matrices.

Shapes: B batch, C and O channels in and out, H x W pixels of the map, N pixels of all samples.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

SEEN = torch.tensor([[1.0, 1.0, 1.0], [-1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
"""Weights of a row => weights of the map, and of its differences for even and for odd values"""
OWN, BOTH = (0, 0), slice(1, None)
KINDS: tuple[tuple[int | slice, int | slice], ...] = OWN, (BOTH, 0), (0, BOTH), (BOTH, BOTH)
"""Which weights, by row and column, belong to each of the maps that `differences` gives"""
WIDE = 32
"""Channels from which it is faster (docs/log.md)"""


def pays(x: Tensor, conv: nn.Conv2d) -> bool:
    """Whether maps [B,C,H,W] train faster this way."""
    trains = x.device.type == "cpu" and torch.is_grad_enabled()
    return trains and x.dtype != torch.float64 and min(conv.weight.shape[:2]) >= WIDE


def doubled(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """What a 3x3 convolution of padding 1 makes of a map [B,C,H,W] doubled: [B,O,2H,2W], channels-last."""
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    assert conv.bias is not None
    return Doubled.apply(x.to(dtype), by_kinds(conv.weight).to(dtype), conv.bias.to(dtype))  # type: ignore[no-any-return, no-untyped-call]


def by_kinds(weight: Tensor) -> Tensor:
    """Of a convolution [O,C,3,3] => [3,3,O,C] by SEEN for rows and columns, in float32."""
    return torch.einsum("ak,bl,oikl->aboi", SEEN, SEEN, weight.float())


class Doubled(torch.autograd.Function):
    """Map [B,C,H,W], weights [3,3,O,C] by SEEN for rows and columns, bias [O] => [B,O,2H,2W], channels-last."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weights)

        def product(map_: Tensor, row: int, column: int) -> Tensor:
            return F.linear(map_, weights[row, column], bias if (row, column) == OWN else None)

        return of_products(x, product)

    @staticmethod
    @once_differentiable  # what is saved here has no gradient of its own
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        x, weights = ctx.saved_tensors
        into, of_weights = [], torch.empty_like(weights)
        parts = gathered(gradient.permute(0, 2, 3, 1))
        for map_, part, at in zip(differences(x.permute(0, 2, 3, 1)), parts, KINDS, strict=True):
            weight = weights[at].reshape(-1, weights.shape[-1])
            into.append((part @ weight).view(map_.shape))
            of_weights[at] = (part.T @ map_.flatten(0, 2)).view(weights[at].shape)
        return together(into).permute(0, 3, 1, 2), of_weights, parts[0].sum(0)


def of_products(x: Tensor, product: Callable[[Tensor, int, int], Tensor]) -> Tensor:
    """What the convolution makes of a map [B,C,H,W]: [B,O,2H,2W], channels-last.

    Args:
        product: of pixels [B,*,*,C] with the weights by row and column of SEEN, a fresh [B,*,*,O]; that of `OWN`
            with the bias.
    """
    map_, of_rows, of_columns, of_both = differences(x.permute(0, 2, 3, 1))
    samples, height, width, _ = map_.shape
    own = product(map_, *OWN)
    rows = [product(of_rows, 1 + p, 0) for p in (0, 1)]
    made = x.new_empty(samples, height, 2, width, 2, own.shape[-1])
    for q in (0, 1):  # column odd?
        here = product(of_columns, 0, 1 + q)[:, :, q : q + width].add_(own)
        for p in (0, 1):  # row odd?
            there = product(of_both, 1 + p, 1 + q)[:, p : p + height, q : q + width]
            there += rows[p][:, p : p + height]
            torch.add(here, there, out=made[:, :, p, :, q])
    return made.flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)


def differences(x: Tensor) -> tuple[Tensor, ...]:
    """A map [B,H,W,C], its differences from row to row [B,H+1,W,C], from column to column [B,H,W+1,C] and of both
    [B,H+1,W+1,C]; around the map are zeros."""
    rows = stepped(x, 1)
    return x.contiguous(), rows, stepped(x, 2), stepped(rows, 2)


def stepped(x: Tensor, dim: int) -> Tensor:
    last = x.shape[dim] - 1
    made = x.new_empty([size + (i == dim) for i, size in enumerate(x.shape)])
    made.narrow(dim, 0, 1).copy_(x.narrow(dim, 0, 1))
    torch.sub(x.narrow(dim, 1, last), x.narrow(dim, 0, last), out=made.narrow(dim, 1, last))
    torch.neg(x.narrow(dim, last, 1), out=made.narrow(dim, last + 1, 1))
    return made


def gathered(gradient: Tensor) -> list[Tensor]:
    """Of what the products made, [N,K*O] for the K kinds of each of KINDS, from that of the doubled map [B,2H,2W,O]."""
    made = gradient.unflatten(2, (-1, 2)).unflatten(1, (-1, 2))  # [B,H,2,W,2,O]
    samples, height, _, width, _, channels = made.shape
    rows = made.new_empty(samples, height + 1, width, 2, channels)
    columns = made.new_empty(samples, height, width + 1, 2, channels)
    both = made.new_empty(samples, height + 1, width + 1, 2, 2, channels)
    for p in (0, 1):
        # the difference at one border is an even value's alone, at the other an odd one's
        unseen = 0 if p else -1
        for border in (rows[:, unseen, :, p], columns[:, :, unseen, p], both[:, unseen, :, p]):
            border.zero_()
        both[:, :, unseen, :, p] = 0
        torch.add(made[:, :, p, :, 0], made[:, :, p, :, 1], out=rows[:, p : p + height, :, p])
        torch.add(made[:, :, 0, :, p], made[:, :, 1, :, p], out=columns[:, :, p : p + width, p])
        for q in (0, 1):
            both[:, p : p + height, q : q + width, p, q] = made[:, :, p, :, q]
    own = columns[:, :, :-1, 0] + columns[:, :, 1:, 1]
    return [part.flatten(0, 2).flatten(1) for part in (own, rows, columns, both)]


def together(maps: list[Tensor]) -> Tensor:
    """Maps of the sizes that `differences` gives => [B,H,W,C]: the transpose of that. The maps are used up."""
    own, rows, columns, both = maps
    rows.add_(both[:, :, :-1]).sub_(both[:, :, 1:])
    own.add_(columns[:, :, :-1]).sub_(columns[:, :, 1:])
    return own.add_(rows[:, :-1]).sub_(rows[:, 1:])
