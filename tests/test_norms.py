"""GroupNorm with SiLU in C against PyTorch's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoencoder.compiled import lanes
from autoencoder.norms import GroupNorm, Normalised, serves
from autoencoder.tile_norms import TileNorms

needed = pytest.mark.skipif(not lanes(), reason="the C can't be compiled on this machine, or isn't for it")
DTYPES = [torch.float32, torch.bfloat16]


def filled(norm: nn.GroupNorm) -> nn.GroupNorm:
    generator = torch.Generator().manual_seed(2)
    for weight in norm.parameters():
        nn.init.normal_(weight, generator=generator)
    return norm


def maps(channels: int, size: tuple[int, int], dtype: torch.dtype, offset: float = 2.0) -> Tensor:
    torch.manual_seed(0)
    x = torch.randn(3, channels, *size) + offset * torch.randn(channels)[:, None, None]
    return x.to(dtype, memory_format=torch.channels_last)


def passed(norm: nn.GroupNorm, x: Tensor, silu: bool) -> list[Tensor]:
    """What comes out, and the gradients when another map comes back."""
    inputs = [x.requires_grad_(), *norm.parameters()]
    back = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    out = norm(x, silu) if isinstance(norm, GroupNorm) else F.silu(norm(x)) if silu else norm(x)
    return [out, *torch.autograd.grad(out, inputs, back.to(out.dtype))]


def error(made: Tensor, exact: Tensor) -> float:
    return float((made - exact).detach().norm() / exact.detach().norm())


@needed
@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize(("channels", "groups"), [(16, 4), (96, 3), (64, 64), (32, 1)])
@pytest.mark.parametrize("size", [(1, 1), (5, 3), (40, 40)])
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_in_all_directions(
    channels: int, groups: int, size: tuple[int, int], silu: bool, dtype: torch.dtype
) -> None:
    """In float32 little further from the exact result than PyTorch's own; in bf16 as near as rounding allows."""
    ours, usual = filled(GroupNorm(groups, channels)), filled(nn.GroupNorm(groups, channels))
    x = maps(channels, size, dtype)
    made = passed(ours, x.clone(), silu)
    assert "Normalised" in type(made[0].grad_fn).__name__
    usually = passed(usual, x.detach().float(), silu)
    exact = passed(usual.double(), x.detach().double(), silu)
    assert made[0].dtype == dtype and made[0].is_contiguous(memory_format=torch.channels_last)
    for a, b, c in zip(made, usually, exact, strict=True):
        rounding = 3e-3 if a.dtype == torch.bfloat16 else 1e-6
        assert error(a, c) <= 2 * error(b, c) + rounding or c.norm() < 1e-5 * x.norm()


@needed
@pytest.mark.parametrize("silu", [False, True])
def test_values_far_from_zero_are_normalised_exactly(silu: bool) -> None:
    """A mean of a thousand deviations costs no digits but those that the input itself has lost."""
    norm, x = GroupNorm(4, 32), 1000 + maps(32, (16, 16), torch.float32, offset=0)
    exact = F.group_norm(x.double(), 4, eps=norm.eps)
    assert error(norm(x, silu), F.silu(exact) if silu else exact) < 1e-4


@needed
def test_extremes_of_silu() -> None:
    """Where e^-x is beyond float32, and where it is not a number."""
    norm, x = GroupNorm(1, 32), maps(32, (4, 4), torch.float32)
    nn.init.constant_(norm.weight, 300.0)
    made = norm(x, silu=True)
    assert torch.allclose(made, F.silu(F.group_norm(x, 1, norm.weight, norm.bias, norm.eps)), atol=1e-4)
    x[1, 3, 2, 2] = torch.nan
    made = norm(x, silu=True)
    assert made[1].isnan().all() and made[[0, 2]].isfinite().all()


@needed
@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_and_the_rest_of_a_batch_change_nothing(dtype: torch.dtype) -> None:
    """Bit for bit."""
    norm, x, usual = filled(GroupNorm(4, 64)), maps(64, (30, 30), dtype), torch.get_num_threads()
    made = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            made.append(passed(norm, x.detach(), silu=True))
    finally:
        torch.set_num_threads(usual)
    assert all(torch.equal(a, b) for other in made[1:] for a, b in zip(made[0], other, strict=True))
    assert torch.equal(torch.cat([norm(part, silu=True) for part in x.split(2)]), made[0][0])


def test_what_it_does_not_serve_is_pytorchs() -> None:
    norm, x = filled(GroupNorm(4, 32)), maps(32, (5, 5), torch.float32)
    for unfit in (x.contiguous(), x[:, :24], x.double(), x[:0]):
        assert not serves(unfit, norm.weight)
    made = norm(x.contiguous(), silu=True)
    assert torch.equal(made, F.silu(F.group_norm(x.contiguous(), 4, norm.weight, norm.bias, norm.eps)))


@needed
def test_a_second_gradient_is_refused() -> None:
    norm, x = GroupNorm(4, 32), maps(32, (5, 5), torch.float32).requires_grad_()
    (gradient,) = torch.autograd.grad(norm(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@torch.no_grad()
@pytest.mark.parametrize("silu", [False, True])
def test_tiles_are_normalised_by_the_whole_and_silu_comes_after(silu: bool) -> None:
    norm, x = filled(GroupNorm(4, 32)), maps(32, (8, 8), torch.float32)
    wanted, tiles = norm(x, silu=silu), TileNorms([norm])
    for _ in range(2):
        with tiles.watching():
            made = []
            for part in x.chunk(2, dim=2):
                tiles.weight = torch.full((1, 1), 0.5)
                made.append(norm(part.contiguous(memory_format=torch.channels_last), silu=silu))
        tiles.learn()
    assert error(torch.cat(made, dim=2), wanted) < 1e-5


@needed
def test_it_keeps_nothing_between_normalising_and_silu() -> None:
    norm, x = GroupNorm(4, 32), maps(32, (16, 16), torch.float32).requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda part: kept.append(part) or part, lambda part: part):
        Normalised.apply(x, norm.weight, norm.bias, 4, norm.eps, True)
    assert sum(part.numel() for part in kept) < 1.1 * x.numel()
