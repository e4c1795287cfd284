"""GroupNorm, with SiLU after it or without, on a CPU in one pass over what a core's cache holds: `norm.c` for tensors.

PyTorch's own takes up to 50 times as long backwards over channels-last maps in bf16 (docs/log.md), and keeps what is
between it and SiLU. Where it does not serve (`serves`), both are PyTorch's.

Shapes: B batch, C channels, H x W pixels, G groups.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from autoencoder.compiled import at_hand, call, lanes
from autoencoder.winograd import channels_last, narrow


def serves(x: Tensor, weight: Tensor) -> bool:
    """Whether these maps are normalised faster this way: channels-last ones, as others would have to be copied."""
    if x.dim() != 4 or x.numel() == 0 or not at_hand(x, weight) or not lanes():
        return False
    fits = (
        x.dtype in (torch.float32, torch.bfloat16)
        and x.shape[1] == len(weight)
        and len(weight) % lanes() == 0
    )
    return fits and x.is_contiguous(memory_format=torch.channels_last)


def normalised(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Maps [B,C,H,W] => the same; and mean and 1 / deviation [B,G].

    Args:
        weight: [C], with `bias`, in float32.
        silu: whether SiLU comes after it.
    """
    y, mean = torch.empty_like(x), x.new_empty(len(x), groups, dtype=torch.float32)
    rstd = torch.empty_like(mean)
    parts = (part.data_ptr() for part in (x, weight, bias, y, mean, rstd))
    call("norm_forward", *parts, eps, narrow(x), silu, *sizes(x), groups)
    return y, mean, rstd


class Normalised(torch.autograd.Function):
    """Maps [B,C,H,W] => the same; see `normalised`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool
    ) -> Tensor:
        y, mean, rstd = normalised(x, weight, bias, groups, eps, silu)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.groups, ctx.silu = groups, silu
        return y

    @staticmethod
    @once_differentiable  # what the C does has no gradient of its own
    def backward(ctx: Any, back: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, bias, mean, rstd = ctx.saved_tensors
        into, of_weight, of_bias = torch.empty_like(x), torch.empty_like(weight), torch.empty_like(bias)
        parts = (x, channels_last(back), weight, bias, mean, rstd, into, of_weight, of_bias)
        call("norm_backward", *(p.data_ptr() for p in parts), narrow(x), ctx.silu, *sizes(x), ctx.groups)
        return into, of_weight, of_bias, None, None, None


class GroupNorm(nn.GroupNorm):
    """GroupNorm, and SiLU after it if asked for."""

    def forward(self, x: Tensor, silu: bool = False) -> Tensor:
        """[B,C,H,W] => the same shape."""
        if self.affine and serves(x, self.weight):
            # in a network in bf16 they are narrower
            weights = (part.float().contiguous() for part in (self.weight, self.bias))
            return Normalised.apply(x, *weights, self.num_groups, self.eps, silu)  # type: ignore[no-any-return, no-untyped-call]
        made = super().forward(x)
        return F.silu(made) if silu else made


def sizes(x: Tensor) -> tuple[int, int, int]:
    """Samples, pixels, channels."""
    return len(x), x.shape[2] * x.shape[3], x.shape[1]
