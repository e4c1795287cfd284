"""What is chosen for speed gives the same result."""

import pytest
import torch
import torch.nn.functional as F

from autoencoder.attention import attend


@pytest.mark.parametrize("masked", [False, True])
def test_attention_in_bf16_is_attention(masked: bool) -> None:
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
