"""3x3 convolutions in C against PyTorch's own, and that they serve where they are faster and nowhere else."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from autoencoder import compiled, winograd
from autoencoder.fast_blocks import Conv3x3 as ToDraw
from autoencoder.layers import Upsample
from autoencoder.norms import GroupNorm
from autoencoder.winograd import DRAWS, TRAINS, Conv3x3, Winograd, at_points, convolved, serves, twice

needed = pytest.mark.skipif(
    not winograd.panel(), reason="the C can't be compiled on this machine, or isn't for it"
)
DTYPES = [torch.float32, torch.bfloat16]


def direct(x: Tensor, weight: Tensor, bias: Tensor, doubled: bool) -> Tensor:
    return F.conv2d(twice(x) if doubled else x, weight, bias, padding=1)


def passes(convolve: object, *inputs: Tensor, doubled: bool) -> list[Tensor]:
    """Output of a convolution, and the gradients of what goes in when another map comes back."""
    made = convolve(*inputs, doubled)  # type: ignore[operator]
    back = torch.randn(made.shape, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    return [made, *torch.autograd.grad(made, inputs, back.to(made.dtype))]


def error(made: Tensor, exact: Tensor) -> float:
    return float((made - exact).detach().norm() / exact.detach().norm())


@needed
@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize(
    "shape", [(2, 32, 96, 8, 12), (1, 64, 32, 1, 3), (3, 32, 64, 9, 14), (5, 96, 32, 4, 4)]
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("doubled", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_in_all_directions(
    shape: tuple[int, ...], layout: torch.memory_format, doubled: bool, dtype: torch.dtype
) -> None:
    """In float32 at most four times as far from the exact result as PyTorch's own; in bf16 no further than it."""
    torch.manual_seed(0)
    samples, channels, made, height, width = shape
    x, weight = torch.randn(samples, channels, height, width).to(dtype), torch.randn(made, channels, 3, 3)
    x, weight = (part.to(memory_format=layout).requires_grad_() for part in (x, weight))
    bias = torch.randn(made, requires_grad=True)
    exact = (part.detach().double().requires_grad_() for part in (x, weight, bias))
    usual = (part.detach().to(dtype).requires_grad_() for part in (x, weight, bias))
    ours = passes(Winograd.apply, x, weight, bias, doubled=doubled)
    wanted, usually = (passes(direct, *parts, doubled=doubled) for parts in (exact, usual))
    for a, b, c in zip(ours, wanted, usually, strict=True):
        assert a.shape == b.shape
        assert error(a, b) <= (
            max(4 * error(c, b), 2e-6) if dtype == torch.float32 else max(1.05 * error(c, b), 2e-6)
        )
    assert ours[0].is_contiguous(memory_format=torch.channels_last) and ours[0].dtype == dtype
    assert ours[2].stride() == weight.stride()


@needed
@pytest.mark.usefixtures("instructions")
def test_gradients_of_more_tiles_than_are_met_at_once() -> None:
    """And of more channels than are summed up together; bit for bit on any number of threads."""
    torch.manual_seed(0)
    x, back, weight = torch.randn(4, 128, 44, 41), torch.randn(4, 64, 44, 41), torch.randn(64, 128, 3, 3)
    wanted = torch.nn.grad.conv2d_weight(x.double(), weight.shape, back.double(), padding=1)
    made, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            made.append(winograd.gradient(x, back, weight))
    finally:
        torch.set_num_threads(before)
    assert error(made[0], wanted) < 5e-6 and all(torch.equal(made[0], other) for other in made[1:])


@needed
@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("doubled", [False, True])
def test_prepared_with_bias_and_residual(dtype: torch.dtype, doubled: bool) -> None:
    torch.manual_seed(0)
    layer, x = nn.Conv2d(64, 96, 3, padding=1), torch.randn(4, 64, 16, 12).to(dtype)
    conv = ToDraw(layer, dtype)
    assert serves(x, layer.weight, DRAWS, doubled)
    wanted = layer(twice(x.float()) if doubled else x.float())
    if doubled:
        made = conv.doubled(x)
    else:
        rest, other = torch.randn(4, 96, 16, 12).to(dtype), torch.randn(96).to(dtype)
        made = conv(x)
        assert error(conv.onto(x, rest.clone()), wanted + rest) <= (1e-6 if dtype == torch.float32 else 5e-3)
        biased = wanted - layer.bias[:, None, None] + other[:, None, None]  # type: ignore[index]
        assert error(conv.biased(x, other), biased) <= (1e-6 if dtype == torch.float32 else 5e-3)
    assert error(made, wanted) <= (1e-6 if dtype == torch.float32 else 5e-3)
    assert not conv._for  # nothing was packed for a direct convolution


@needed
@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_and_the_rest_of_a_batch_change_nothing(dtype: torch.dtype) -> None:
    """Bit for bit: sums are never shared out."""
    torch.manual_seed(0)
    x, weight = torch.randn(7, 64, 10, 9).to(dtype), torch.randn(128, 64, 3, 3)
    back = torch.randn(7, 128, 10, 9).to(dtype)
    points, usual = at_points(weight), torch.get_num_threads()
    try:
        made = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            made.append(
                (at_points(weight)[:, :, :-1], convolved(x, points), winograd.gradient(x, back, weight))
            )
    finally:
        torch.set_num_threads(usual)
    assert all(torch.equal(a, b) for other in made[1:] for a, b in zip(made[0], other, strict=True))
    parts = torch.cat([convolved(part, points) for part in x.split(3)])
    assert torch.equal(parts, made[0][1])


@needed
@pytest.mark.parametrize(
    ("shape", "dtype", "draws", "trains"),
    [
        ((1, 32, 12), torch.float32, True, False),  # 9 tiles: enough if their weights are ready
        ((1, 32, 16), torch.float32, True, True),
        ((1, 48, 16), torch.float32, False, False),  # no multiple of a panel
        ((64, 32, 3), torch.float32, False, False),  # less than a tile
        ((1, 64, 28), torch.bfloat16, True, False),
        ((1, 64, 32), torch.bfloat16, True, True),
        ((4, 32, 64), torch.bfloat16, False, False),  # narrow
        (
            (4, 512, 32),
            torch.bfloat16,
            True,
            False,
        ),  # their weights at the points leave the caches in each step
        ((4, 64, 32), torch.float64, False, False),
        ((1, 1024, 16), torch.float32, False, False),  # weights at the points would take 150 MB
    ],
)
def test_where_it_serves(shape: tuple[int, ...], dtype: torch.dtype, draws: bool, trains: bool) -> None:
    if winograd.panel() != 32:
        pytest.skip("written for panels of 32 channels")
    samples, channels, side = shape
    x, weight = torch.empty(samples, channels, side, side, dtype=dtype), torch.empty(channels, channels, 3, 3)
    assert (serves(x, weight, DRAWS, False), serves(x, weight, TRAINS, False)) == (draws, trains)


@needed
def test_networks_train_by_it_in_float32_and_under_autocast() -> None:
    torch.manual_seed(0)
    layer, x = Upsample(64), torch.randn(1, 64, 16, 16, requires_grad=True)
    assert "Winograd" in type(layer(x).grad_fn).__name__
    with torch.autocast("cpu", torch.bfloat16):
        made = layer(x)
    assert "Winograd" in type(made.grad_fn).__name__ and made.dtype == torch.bfloat16
    assert layer.resized(x, (31, 32)).shape == (1, 64, 31, 32)
    seen: list[Tensor] = []
    layer.conv.register_forward_hook(lambda module, inputs, out: seen.append(out))
    F.relu_(layer(x)).sum().backward()
    assert seen[0].shape == (1, 64, 32, 32)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        (gradient,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
        gradient.sum().backward()


def test_it_starts_as_a_convolution_does() -> None:
    torch.manual_seed(0)
    usual = nn.Conv2d(8, 8, 3, padding=1).state_dict()
    torch.manual_seed(0)
    ours = Conv3x3(8, 8).state_dict()
    assert list(ours) == list(usual) and all(torch.equal(ours[name], usual[name]) for name in usual)


@needed
def test_it_is_compiled_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under another name for another processor, and nothing half-made is left."""
    compiled.opened(tmp_path / "kept")
    (file,) = (tmp_path / "kept").iterdir()
    with monkeypatch.context() as patched:
        patched.setattr(compiled, "compile_to", lambda *_: pytest.fail("compiled again"))
        compiled.opened(tmp_path / "kept")
    monkeypatch.setattr(compiled, "processor", lambda: "another")
    compiled.opened(tmp_path / "kept")
    assert len([*(tmp_path / "kept").iterdir()]) == 2 and file.exists()


@needed
def test_where_the_cache_cant_be_written_it_is_compiled_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert compiled.opened_somewhere().vector_lanes() == compiled.lanes()


@needed
def test_what_doesnt_fit_is_refused_by_pytorch() -> None:
    """Not read past its end."""
    layer = Conv3x3(64, 64)
    with pytest.raises(RuntimeError, match="expected input"):
        layer(torch.randn(2, 32, 16, 16))
    assert layer(torch.randn(64, 16, 16)).shape == (64, 16, 16)  # without samples, as PyTorch's own


@needed
def test_what_has_no_address_or_is_watched_is_pytorchs() -> None:
    """Tensors that are not there, and modes that count or trace what is done."""
    layer, norm = Conv3x3(64, 64), GroupNorm(4, 64)
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.randn(2, 64, 16, 16)
        assert norm(layer(x), silu=True).shape == x.shape
    with FlopCounterMode(display=False) as counter:
        layer(torch.randn(2, 64, 16, 16))
    assert counter.get_total_flops() == 2 * 9 * 64 * 64 * 2 * 16 * 16
    (tangent,) = torch.func.vmap(lambda one: (layer(one[None])[0],))(torch.randn(2, 64, 16, 16))
    assert tangent.shape == (2, 64, 16, 16)


@needed
def test_a_pytorch_that_does_not_tell_who_watches_is_not_passed_by(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch._C, "_len_torch_dispatch_stack")
    compiled.say_unkept.cache_clear()
    layer, x = Conv3x3(64, 64), torch.randn(2, 64, 16, 16)
    with pytest.warns(UserWarning, match="does not tell who watches its operations") as warned:
        made = [layer(x) for _ in range(2)]
    assert len(warned) == 1 and "Winograd" not in type(made[0].grad_fn).__name__


@needed
def test_checkpointing_keeps_it() -> None:
    layer, x = Conv3x3(64, 64), torch.randn(2, 64, 16, 16, requires_grad=True)
    with mock.patch.object(winograd, "convolved", wraps=winograd.convolved) as done:
        checkpoint(layer, x, use_reentrant=False).sum().backward()
    assert done.call_count == 3  # forward, again, and back


@needed
def test_a_frozen_weight_leaves_the_bias_its_gradient() -> None:
    layer = Conv3x3(64, 64)
    layer.weight.requires_grad_(False)
    layer(torch.randn(2, 64, 16, 16)).sum().backward()
    assert torch.equal(layer.bias.grad, torch.full((64,), 512.0))


@needed
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_networks_of_another_precision_are_prepared(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer, x = nn.Conv2d(64, 64, 3, padding=1).to(dtype), torch.randn(2, 64, 16, 16)
    conv, rest = ToDraw(layer, torch.float32), torch.randn(2, 64, 16, 16)
    wanted = F.conv2d(x, layer.weight.float(), layer.bias.float(), padding=1)  # type: ignore[union-attr]
    for made, exact in ((conv(x), wanted), (conv.onto(x, rest), wanted + rest)):
        assert error(made, exact) < 1e-5


@needed
def test_weights_that_lie_apart_and_other_borders() -> None:
    x = torch.randn(2, 64, 16, 16)
    layer = Conv3x3(64, 64)
    layer.bias = nn.Parameter(torch.randn(128)[::2])
    assert error(layer(x), F.conv2d(x, layer.weight, layer.bias, padding=1)) < 1e-5
    layer.padding_mode = "circular"
    layer._reversed_padding_repeated_twice = [1, 1, 1, 1]
    around = F.conv2d(F.pad(x, (1, 1, 1, 1), mode="circular"), layer.weight, layer.bias)
    assert error(layer(x), around) < 1e-5
    stock = nn.Sequential(
        nn.Conv2d(64, 64, 3, padding=1, padding_mode="circular"), nn.Conv2d(64, 64, 3, padding=1)
    )
    winograd.put_into(stock)
    assert [type(part) for part in stock] == [nn.Conv2d, Conv3x3]


@needed
def test_its_threads_are_pytorchs() -> None:
    """One OpenMP in a process, as two would contend for the cores. (This process may have one of another library.)"""
    program = (
        "import torch; from autoencoder.winograd import at_points; at_points(torch.randn(32, 32, 3, 3));"
        "print({line.split()[-1] for line in open('/proc/self/maps') if 'libgomp' in line})"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    (mapped,) = ast.literal_eval(done.stdout)
    assert "torch" in mapped


@pytest.mark.parametrize(
    ("compiler", "said"),
    [
        ("nowhere/cc", "the compiler that CC names, nowhere/cc, is not found"),
        ("false", "false says: 1"),
        ("gcc 'x", "No closing quotation"),
        ("{here}/cc", "Exec format error"),
    ],
)
def test_without_a_compiler_it_is_pytorchs_own(
    compiler: str, said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """And a warning says so, once."""
    if compiled.library() is None:
        pytest.skip("not a machine that the C is for")
    (tmp_path / "cc").write_bytes(b"no program")
    (tmp_path / "cc").chmod(0o755)
    monkeypatch.setenv("CC", compiler.format(here=tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compiled.library.cache_clear()
    try:
        layer, x = Upsample(32), torch.randn(2, 32, 16, 16)
        with pytest.warns(UserWarning, match="which are slower") as warned:
            made = [layer(x) for _ in range(2)]
        assert len(warned) == 1 and said in str(warned[0].message)
        assert torch.equal(made[1], F.conv2d(twice(x), layer.conv.weight, layer.conv.bias, padding=1))
        assert not [*tmp_path.rglob("*.*")]
    finally:
        compiled.library.cache_clear()


def test_a_library_that_cant_be_loaded_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "compile_to", lambda file, compiler: file.write_text(64 * "no library"))
    monkeypatch.setattr(compiled, "chosen_compiler", lambda: ["cc"])
    with pytest.raises(compiled.Uncompiled, match="invalid ELF header"):
        compiled.opened(tmp_path)


def test_it_can_be_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LDM_C", "0")
    assert compiled.library.__wrapped__() is None


def test_memory_that_is_short_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "library", lambda: SimpleNamespace(winograd=lambda *_: 1))
    with pytest.raises(MemoryError, match="not memory enough"):
        compiled.call("winograd")
