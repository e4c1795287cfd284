"""Attention to draw with in bf16 on a CPU, where its scores never leave a core's cache: `attention.c` for tensors.

Of PyTorch's two ways, one writes all scores to memory that is new each time, and the fused kernel takes twice as long
as this (docs/log.md). In float32 that kernel is as fast.

Shapes: B batch, N queries, L keys and values, D width of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from autoencoder.compiled import at_hand, call, library
from autoencoder.winograd import longs


def serves(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether these are attended to faster this way, with no gradients asked for."""
    half = all(part.dtype == torch.bfloat16 for part in (q, k, v))
    if not half or torch.is_grad_enabled() or not at_hand(q, k, v) or not library():
        return False
    samples, heads, _, width = q.shape
    fits = k.shape == v.shape == (samples, heads, k.shape[2], width) and q.numel() > 0 and k.numel() > 0
    return fits and all(part.stride(-1) == 1 for part in (q, k, v))


def attended(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(D) + bias) v: [B,heads,N,D], twice [B,heads,L,D] and bias [B,1,1,L] => [B,heads,N,D].

    What comes lies in any way but in D, as parts of one product do; the result as [B,N,heads,D].
    """
    samples, heads, queries, width = q.shape
    y = q.new_empty(samples, queries, heads, width).transpose(1, 2)
    bias = None if bias is None else bias.to(q.dtype).expand(samples, 1, 1, k.shape[2]).contiguous()
    parts = (None if part is None else part.data_ptr() for part in (q, k, v, bias, y))
    steps = longs(*(step for part in (q, k, v, y) for step in part.stride()[:3]))
    call("attention", *parts, steps, samples, heads, queries, k.shape[2], width)
    return y
