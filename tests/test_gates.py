"""Gated rows in C against PyTorch's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from autoencoder.compiled import lanes
from autoencoder.gates import gated, serves
from ldm.blocks import GEGLU

needed = pytest.mark.skipif(not lanes(), reason="the C can't be compiled on this machine, or isn't for it")
DTYPES = [torch.float32, torch.bfloat16]


def usual(x: Tensor) -> Tensor:
    value, gate = x.chunk(2, dim=-1)
    return value * F.gelu(gate)


def rows(*shape: int) -> Tensor:
    return 3 * torch.randn(shape, generator=torch.Generator().manual_seed(0))


def both_ways(function: object, x: Tensor) -> tuple[Tensor, Tensor]:
    """What comes out, and the gradient when something comes back."""
    x = x.detach().clone().requires_grad_()
    y = function(x)  # type: ignore[operator]
    back = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    return y, torch.autograd.grad(y, x, back.to(y.dtype))[0]


@needed
@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 32), (7, 96), (2, 5, 64), (3, 2, 2, 1024)])
def test_no_further_from_the_exact_result_than_pytorchs(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = rows(*shape).to(dtype)
    assert serves(x)
    made, plain, exact = both_ways(gated, x), both_ways(usual, x), both_ways(usual, x.double())
    assert "Gated" in type(made[0].grad_fn).__name__ and made[0].dtype == dtype
    for a, b, c in zip(made, plain, exact, strict=True):
        assert (a - c).norm() <= 1.2 * (b - c).norm() + 1e-7 * c.norm()


@needed
@pytest.mark.usefixtures("instructions")
def test_all_gates_within_float32() -> None:
    """To five digits of what each is, far out as well, where next to nothing is let through; and what is no number."""
    gate = torch.cat([torch.linspace(-9, 9, 4075), torch.tensor([-3e37, -1e3, -50.0, 0.0, 50.0, 3e37])])
    gate = F.pad(gate, (0, -len(gate) % 32))
    (y, of_x), far = both_ways(gated, torch.cat([torch.ones_like(gate), gate])), gate.abs() > 10
    wide = gate.double()
    exact = wide * torch.special.erfc(-wide / 2**0.5) / 2
    assert ((y - exact).abs() <= 1e-5 * exact.abs() + 1e-30).all() and y.isfinite().all()
    assert (of_x - both_ways(usual, torch.cat([torch.ones_like(wide), wide]))[1]).abs()[
        len(gate) :
    ].max() < 1e-6
    assert of_x.isfinite().all() and far.sum() == 5
    x = torch.cat([torch.ones(64), torch.full((64,), torch.nan)])
    x[64:127] = 0.5
    assert gated(x)[-1].isnan() and gated(x)[:-1].isfinite().all()


@needed
@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_and_the_rest_of_a_batch_change_nothing(dtype: torch.dtype) -> None:
    """Bit for bit."""
    x, before, made = rows(37, 128).to(dtype), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            made.append(both_ways(gated, x))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in made[1:] for a, b in zip(made[0], other, strict=True))
    assert torch.equal(torch.cat([gated(part) for part in x.split(10)]), made[0][0])


@needed
def test_what_comes_back_may_lie_in_any_way() -> None:
    x = rows(6, 64).requires_grad_()
    (made,) = torch.autograd.grad(gated(x).sum(), x)
    (wanted,) = torch.autograd.grad(usual(x).sum(), x)
    assert torch.allclose(made, wanted, atol=1e-6)


def test_what_it_does_not_serve_is_pytorchs() -> None:
    x = rows(6, 64)
    for unfit in (x[:, ::2], x[:, :40].contiguous(), x.double(), x.T, x.to("meta"), torch.tensor(1.0)):
        assert not serves(unfit)
    assert torch.equal(gated(x.double()), usual(x.double()))
    assert gated(rows(0, 64)).shape == (0, 32)


@needed
def test_the_networks_layer_takes_it_and_a_second_gradient_is_refused() -> None:
    layer, x = GEGLU(16, 32), rows(4, 16).requires_grad_()
    y = layer(x)
    assert "Gated" in type(y.grad_fn).__name__
    (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
