"""Rows gated by the GELU of others, on a CPU in one pass: `gate.c` for tensors.

PyTorch's operations write four tensors on the way there and back six, where here it is one each. Where it does not
serve (`serves`), they do the same.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from autoencoder.compiled import at_hand, call, lanes
from autoencoder.winograd import narrow


def gated(x: Tensor) -> Tensor:
    """Values beside gates [..., 2*width] => values times the GELU of gates [..., width]."""
    if serves(x):
        return Gated.apply(x)  # type: ignore[no-any-return, no-untyped-call]
    value, gate = x.chunk(2, dim=-1)
    return value * F.gelu(gate)


def serves(x: Tensor) -> bool:
    known = x.dtype in (torch.float32, torch.bfloat16) and at_hand(x) and lanes() > 0
    return known and x.dim() > 0 and x.shape[-1] % (2 * lanes()) == 0 and x.is_contiguous()


class Gated(torch.autograd.Function):
    """As `gated`, of rows that lie one after another."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        y = x.new_empty(*x.shape[:-1], x.shape[-1] // 2)
        call("gate_forward", x.data_ptr(), y.data_ptr(), narrow(x), *sizes(y))
        return y

    @staticmethod
    @once_differentiable  # what the C does has no gradient of its own
    def backward(ctx: Any, back: Tensor) -> Tensor:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        back, into = back.contiguous(), torch.empty_like(x)
        call("gate_backward", x.data_ptr(), back.data_ptr(), into.data_ptr(), narrow(x), *sizes(back))
        return into


def sizes(y: Tensor) -> tuple[int, int]:
    """Rows and their width."""
    return y.numel() // max(y.shape[-1], 1), y.shape[-1]
