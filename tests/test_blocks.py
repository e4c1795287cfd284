"""What is chosen for speed gives the same result."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from autoencoder.layers import GroupNorm
from ldm.blocks import attend


@pytest.mark.parametrize("side", [8, 32])
@pytest.mark.parametrize("groups", [8, 4, 1])  # each a way of its own in bf16 and channels-last
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_group_norm_is_the_stock_one_in_either_layout(groups: int, dtype: torch.dtype, side: int) -> None:
    torch.manual_seed(0)
    ours, stock = GroupNorm(groups, 16), nn.GroupNorm(groups, 16)
    for norm in (ours, stock):
        nn.init.normal_(norm.weight, generator=torch.Generator().manual_seed(2))
    x = 1 + torch.randn(2, 16, side, side).to(dtype)
    wanted = passed(stock, x.float())
    for layout in (torch.contiguous_format, torch.channels_last):
        made = passed(ours, x.clone(memory_format=layout))
        assert made[0].dtype == dtype
        assert made[0].is_contiguous(memory_format=layout), "the layout must go on to the next convolution"
        for mine, theirs in zip(made, wanted, strict=True):
            bound = 1e-5 if dtype == torch.float32 else 0.02
            assert (mine.float() - theirs).abs().max() <= bound * theirs.abs().max()


def passed(norm: nn.GroupNorm, x: torch.Tensor) -> list[torch.Tensor]:
    """What comes out, and the gradients when another map comes back."""
    inputs = [x.requires_grad_(), *norm.parameters()]
    back = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x.dtype)
    out = norm(x)
    return [out, *torch.autograd.grad(out, inputs, back)]


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
