"""What is chosen for speed gives the same result."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from autoencoder.layers import GroupNorm
from ldm.blocks import attend


def test_group_norm_is_the_stock_one_in_either_layout() -> None:
    torch.manual_seed(0)
    ours, stock = GroupNorm(4, 16), nn.GroupNorm(4, 16)
    x = torch.randn(2, 16, 8, 8)
    for layout in (torch.contiguous_format, torch.channels_last):
        results = []
        for norm in (ours, stock):
            seen = x.clone(memory_format=layout).requires_grad_()
            out = norm(seen)
            out.square().sum().backward()
            results.append((out, seen.grad))
        assert results[0][0].is_contiguous(memory_format=layout), (
            "the layout must go on to the next convolution"
        )
        for mine, theirs in zip(*results, strict=True):
            torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("masked", [False, True])
def test_short_attention_in_bf16_is_attention(masked: bool) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 8) for n in (12, 5, 5))
    bias = torch.tensor([0.0, 0, 0, -10_000, -10_000]).expand(2, 1, 1, 5) if masked else None
    exact = [t.clone().requires_grad_() for t in (q, k, v)]
    F.scaled_dot_product_attention(*exact, attn_mask=bias).square().sum().backward()
    half = [t.bfloat16().requires_grad_() for t in (q, k, v)]
    attend(*half, None if bias is None else bias.bfloat16()).square().sum().backward()
    for one, other in zip(exact, half, strict=True):
        error = (one.grad - other.grad.float()).norm() / one.grad.norm()
        assert error < 0.02, "bf16 has 8 bits"
