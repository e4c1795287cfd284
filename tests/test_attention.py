"""Attention in C against the exact one and PyTorch's own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from autoencoder import compiled
from autoencoder.attention import attend, serves
from autoencoder.fast import Prepared
from autoencoder.kl import AutoencoderConfig, AutoencoderKL
from ldm.unet import mask_bias
from tests.test_unet import randomise

HALF = torch.bfloat16
needed = pytest.mark.skipif(
    compiled.library() is None, reason="the C can't be compiled on this machine, or isn't for it"
)


def parts(
    samples: int, heads: int, queries: int, keys: int, width: int, large: float = 1, dtype: torch.dtype = HALF
) -> list[Tensor]:
    """q, k, v, none of which lies in one piece; scores have a deviation of `large`."""
    torch.manual_seed(0)
    packed = torch.randn(samples, max(queries, keys), heads * 3 * width).to(dtype)
    q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in packed.chunk(3, dim=-1))
    return [large * q[:, :, :queries], k[:, :, :keys], v[:, :, :keys]]


def exact(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    bias = None if bias is None else bias.double()
    return F.scaled_dot_product_attention(q.double(), k.double(), v.double(), attn_mask=bias)


def written_out(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    scores = (q * q.shape[-1] ** -0.5) @ k.mT
    return (scores if bias is None else scores + bias).softmax(-1) @ v


def error(made: Tensor, wanted: Tensor) -> float:
    return float((made - wanted).detach().norm() / wanted.detach().norm())


def masked(samples: int, keys: int) -> Tensor:
    """All tokens of the first prompt count, then one less each."""
    return mask_bias(torch.arange(keys) < keys - torch.arange(samples)[:, None]).bfloat16()


@needed
@pytest.mark.usefixtures("instructions")
@torch.no_grad()
@pytest.mark.parametrize(
    "shape",
    [(2, 4, 64, 64, 32), (1, 1, 1, 1, 8), (3, 2, 37, 37, 40), (2, 3, 25, 77, 80), (2, 1, 129, 300, 5)],
)
@pytest.mark.parametrize("with_bias", [False, True])
def test_as_exact_as_rounding_allows(shape: tuple[int, ...], with_bias: bool) -> None:
    """No further from the exact result than what PyTorch makes when it rounds scores, and within the digits of bf16."""
    q, k, v = parts(*shape)
    bias = masked(len(q), k.shape[2]) if with_bias and k.shape[2] > 2 else None
    made, wanted = attend(q, k, v, bias), exact(q, k, v, bias)
    usual = written_out(q, k, v, bias)
    assert made.dtype == torch.bfloat16 and made.transpose(1, 2).is_contiguous()
    assert error(made, wanted) <= max(error(usual, wanted), 2e-3)
    assert error(made, wanted) < 4e-3


def both_ways(way: Callable[..., Tensor], parts: list[Tensor], bias: Tensor | None) -> list[Tensor]:
    """What comes out, and the gradients of q, k and v when something comes back."""
    asked = [part.detach().requires_grad_() for part in parts]
    y = way(*asked, bias)
    back = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(HALF)
    return [y, *torch.autograd.grad(y, asked, back.to(y.dtype))]


@needed
@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((2, 4, 64, 64, 32), HALF),
        ((2, 1, 1, 1, 8), HALF),
        ((3, 2, 37, 37, 40), HALF),
        ((2, 3, 25, 77, 80), HALF),
        ((2, 1, 259, 300, 5), HALF),  # more queries than are remembered at once
        ((2, 2, 64, 64, 32), torch.float32),
        ((1, 3, 37, 96, 64), torch.float32),
        ((2, 1, 1000, 64, 32), torch.float32),
    ],
)
@pytest.mark.parametrize("with_bias", [False, True])
def test_gradients_as_exact_as_rounding_allows(
    shape: tuple[int, ...], dtype: torch.dtype, with_bias: bool
) -> None:
    given = parts(*shape[:5], dtype=dtype)
    bias = masked(shape[0], shape[3]).to(dtype) if with_bias and shape[3] > 2 else None
    made, usual = both_ways(attend, given, bias), both_ways(written_out, given, bias)
    wanted = both_ways(exact, [part.double() for part in given], bias)
    assert "Attended" in type(made[0].grad_fn).__name__
    digits = 3e-3 if dtype == HALF else 1e-6
    for a, b, c in zip(made, usual, wanted, strict=True):
        assert a.dtype == dtype and (a.transpose(1, 2).is_contiguous() or a is not made[0])
        assert error(a, c) <= max(1.5 * error(b, c), digits) or c.norm() < 1e-6 * wanted[3].norm()


@needed
def test_gradients_are_the_same_whatever_the_threads() -> None:
    """Bit for bit; and a second one is refused."""
    given, before, made = parts(5, 3, 70, 70, 32), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            made.append(both_ways(attend, given, None))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in made[1:] for a, b in zip(made[0], other, strict=True))
    q, k, v = (part.detach().requires_grad_() for part in given)
    (gradient,) = torch.autograd.grad(attend(q, k, v).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@needed
@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("dtype", [HALF, torch.float32])
def test_what_comes_back_and_the_bias_may_lie_in_any_way(dtype: torch.dtype) -> None:
    """One number for all, a bias for all samples, in another precision."""
    given = [part.detach().requires_grad_() for part in parts(2, 2, 64, 64, 32, dtype=dtype)]
    bias = torch.randn(1, 1, 1, 64, generator=torch.Generator().manual_seed(3)).to(HALF).float()
    made, wanted = attend(*given, bias), exact(*given, bias)
    assert error(made, wanted) < 4e-3
    for a, b in zip(
        torch.autograd.grad(made.sum(), given), torch.autograd.grad(wanted.sum(), given), strict=True
    ):
        assert (a - b).abs().max() <= 2e-2 * max(b.abs().max(), 1)


@needed
@pytest.mark.usefixtures("instructions")
def test_what_is_masked_gets_no_gradient() -> None:
    q, k, v = parts(2, 3, 20, 35, 24)
    told = masked(2, 35)
    k[1, :, -1], v[1, :, -1] = 50 * q[1, :, 0], 1000
    _, of_q, of_k, of_v = both_ways(attend, [q, k, v], told)
    assert of_k[1, :, -1].abs().max() == 0 == of_v[1, :, -1].abs().max()
    assert of_k[0, :, -1].abs().min() > 0 and of_q.isfinite().all()


@needed
@pytest.mark.usefixtures("instructions")
@torch.no_grad()
def test_large_scores() -> None:
    """Beyond what e^x of float32 can hold: all that a query sees is the key that is nearest to it."""
    q, k, v = parts(2, 2, 50, 45, 64, large=1000)
    best = (q.double() @ k.double().mT).argmax(-1)
    nearest = v.gather(2, best[..., None].expand_as(q))
    made = attend(q, k, v)
    assert error(made, exact(q, k, v)) < 4e-3
    assert (made == nearest).all(-1).double().mean() > 0.9


@needed
@pytest.mark.usefixtures("instructions")
@torch.no_grad()
def test_what_is_masked_is_not_seen() -> None:
    """Not even where it is much nearer than all that is, nor what lies between a tensor's parts or behind its end."""
    q, k, v = parts(2, 3, 20, 35, 24)
    told = masked(2, 35)
    wanted = attend(q, k, v, told)
    k[1, :, -1], v[1, :, -1] = 50 * q[1, :, 0], 1000
    assert torch.equal(attend(q, k, v, told), wanted)
    assert not torch.equal(attend(q, k, v), wanted)
    room = torch.full((2, 3, 36, 40), torch.nan, dtype=torch.bfloat16)
    inside = []
    for part in (q, k, v):
        inside.append(room.clone()[:, :, : part.shape[2], :24])
        inside[-1].copy_(part)
    assert torch.equal(attend(*inside, told), wanted)


@needed
@torch.no_grad()
@pytest.mark.parametrize("shape", [(5, 3, 70, 70, 32), (1, 1, 100, 33, 64)])
def test_threads_and_the_rest_of_a_batch_change_nothing(shape: tuple[int, ...]) -> None:
    """Bit for bit: sums are never shared out."""
    (q, k, v), usual, made = parts(*shape), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5, 40):
            torch.set_num_threads(threads)
            made.append(attend(q, k, v))
    finally:
        torch.set_num_threads(usual)
    assert all(torch.equal(made[0], other) for other in made[1:])
    each = [attend(*one) for one in zip(q.split(1), k.split(1), v.split(1), strict=True)]
    assert torch.equal(torch.cat(each), made[0])
    assert torch.equal(attend(q[:, :, 1:], k, v), made[0][:, :, 1:])


@needed
def test_where_it_serves() -> None:
    q, k, v = parts(2, 2, 20, 20, 32)
    assert serves(q, k, v) and not serves(q, k, v.float())
    assert not serves(q.float(), k.float(), v.float())  # keys are no multiple of what is multiplied at once
    assert not serves(q, k.mT.contiguous().mT, v)
    assert not serves(q, k[:, :, :19], v) and not serves(q, k[..., :16], v[..., :16])
    assert not serves(q, k[:, :, :0], v[:, :, :0])
    long = [part.expand(2, 2, 2**20, 32) for part in parts(1, 1, 1, 1, 32)]
    assert not serves(*long) or torch.get_num_threads() < 2  # each thread would pack all keys of a head
    one = [part.float() for part in parts(1, 1, 64, 64, 32)]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert not serves(*one)  # a thread would be idle on the way back
        with torch.no_grad():
            assert serves(*one)
    finally:
        torch.set_num_threads(before)


@needed
@torch.no_grad()
@pytest.mark.parametrize("draw", ["a U-Net", "an autoencoder"])
def test_networks_draw_by_it(draw: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And as well without it."""

    def made() -> tuple[Tensor, Tensor]:
        if draw == "a U-Net":
            q, k, v = parts(2, 2, 20, 20, 32)
            return attend(q, k, v), exact(q, k, v)
        config = AutoencoderConfig(block_out_channels=(16, 24), norm_num_groups=8)
        plain: AutoencoderKL = randomise(AutoencoderKL(config))  # type: ignore[assignment]
        z = torch.randn(1, plain.config.latent_channels, 5, 4, generator=torch.Generator().manual_seed(0))
        return Prepared(plain, torch.bfloat16).decode(z), plain.decode(z)

    called: list[str] = []
    usual: Callable[..., None] = compiled.call
    monkeypatch.setattr("autoencoder.attention.call", lambda *args: called.append(args[0]) or usual(*args))
    results = [made()]
    assert set(called) == {"attention"}
    monkeypatch.setattr("autoencoder.attention.lanes", lambda: 0)
    called.clear()
    results.append(made())
    assert not called and all(error(*result) < 0.05 for result in results)
