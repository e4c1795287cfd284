"""Attention, on a CPU by `attention.c`, where its scores never leave a core's cache.

PyTorch's kernel takes twice as long in bf16, and on the way back more; in float32 it is about as fast (docs/log.md).

Shapes: B batch, N queries, L keys and values, D width of a head.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from autoencoder.compiled import at_hand, call, lanes
from autoencoder.winograd import longs, narrow, panel

LARGEST = 2**26
"""Numbers of the keys of a head, times the threads that pack them: with all else, up to 2 GB on the way back"""
LONG = 2**20
"""Numbers of the keys of a head from which in float32 PyTorch's kernel is faster"""
SHORT = 256 * 256
"""Scores of a head up to which in bf16 PyTorch's kernel is slower than attention written out"""


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(D) + bias) v: [B,heads,N,D], twice [B,heads,L,D] and bias [B,1,1,L], which has no gradient,
    => [B,heads,N,D]."""
    bias = None if bias is None else bias.to(q.dtype)  # under autocast the scores are narrower than the bias
    if serves(q, k, v):
        bias = None if bias is None else bias.detach().expand(len(q), 1, 1, k.shape[2]).contiguous()
        return Attended.apply(q, k, v, bias)  # type: ignore[no-any-return, no-untyped-call]
    half = q.device.type == "cpu" and q.dtype == torch.bfloat16
    if not half or q.shape[-2] * k.shape[-2] > SHORT:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    scores = (q * q.shape[-1] ** -0.5) @ k.mT
    return (scores if bias is None else scores + bias).softmax(-1).to(v.dtype) @ v


def serves(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether these are attended to faster this way."""
    if q.dtype not in (torch.float32, torch.bfloat16) or not at_hand(q, k, v) or not lanes():
        return False
    samples, heads, _, width = q.shape
    packed, threads = k.shape[2] * -(-width // panel()) * panel(), torch.get_num_threads()
    if q.dtype == torch.float32 and (
        width % panel() or k.shape[2] % panel() or q.shape[2] < panel() or packed > LONG
    ):
        return False
    if threads * packed > LARGEST or (torch.is_grad_enabled() and samples * heads < threads):
        return False  # on the way back threads share nothing but samples and heads out
    same = k.dtype == v.dtype == q.dtype and k.shape == v.shape == (samples, heads, k.shape[2], width)
    return same and q.numel() > 0 and k.numel() > 0 and all(part.stride(-1) == 1 for part in (q, k, v))


class Attended(torch.autograd.Function):
    """As `attend`, with bias [B,1,1,L]. What comes lies in any way but in D, as parts of one product do; the result as
    [B,N,heads,D]."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(q, k, v, bias)
        y = like(q)
        call("attention", *addresses(q, k, v, bias, y), steps(q, k, v, y), narrow(q), *sizes(q, k))
        return y

    @staticmethod
    @once_differentiable  # what the C does has no gradient of its own
    def backward(ctx: Any, back: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, bias = ctx.saved_tensors
        back = back if back.stride(-1) == 1 else back.contiguous()
        made = like(q), like(k), like(v)
        where = addresses(q, k, v, bias, back, *made)
        call("attention_backward", *where, steps(q, k, v, back, *made), narrow(q), *sizes(q, k))
        return *made, None


def like(x: Tensor) -> Tensor:
    """An empty [B,heads,N,D] that lies as [B,N,heads,D]."""
    return torch.empty_like(x.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)


def addresses(*parts: Tensor | None) -> list[int | None]:
    return [None if part is None else part.data_ptr() for part in parts]


def steps(*parts: Tensor) -> Any:
    return longs(*(step for part in parts for step in part.stride()[:3]))


def sizes(q: Tensor, k: Tensor) -> tuple[int, ...]:
    """Samples, heads, queries, keys, width."""
    samples, heads, queries, width = q.shape
    return samples, heads, queries, k.shape[2], width
