"""What the benchmark says of a row: not how fast anything is."""

import time
from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("diffusers", reason="the benchmark's other side")

from autoencoder.packed import Kept
from benchmarks import models, timing
from benchmarks.__main__ import for_a_gpu, measured
from benchmarks.autoencoder_rows import passes
from benchmarks.models import SMALL, Shape, told, unets
from benchmarks.peaks import peaks
from benchmarks.timing import Case, Effort, Giving, Keeping, Row
from benchmarks.unet_rows import forward, our_loop, stock_loop, training
from ldm.guidance import Guidance
from ldm.memory import CLEAR

KEYS = {
    "name",
    "ratio",
    "target",
    "difference",
    "ours_s",
    "peer_s",
    "share_of_peak",
    "ours_peak_mb",
    "peer_peak_mb",
}
TINY = Shape(
    unet=SMALL.unet | {"block_out_channels": (32, 32, 64)},
    autoencoder={},
    latents=(8,),
    picture=32,
)


def slow(seconds: float, value: float) -> torch.Tensor:
    time.sleep(seconds)
    return torch.tensor([value, 4.0])


def test_a_row() -> None:
    case = Case(
        name="sleep",
        ours=lambda: slow(0.01, 1.0),
        peer=lambda: slow(0.04, 2.0),
        fast_peer=lambda: slow(0.02, 2.0),
        target=1.5,
        unit=2,
    )
    row = case.measure(Effort(seconds=0, least=3)).as_dict()
    assert row.keys() >= KEYS and row["ours_s"] > 0
    assert row["difference"] == 0.25
    assert row["ratio"] > row["fast_ratio"] > 1
    assert row["per_second"] == pytest.approx(2 / row["ours_s"])


def test_each_side_has_its_own_memory_in_its_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[object] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(timing, "keep_freed", lambda: done.append("keep"))
    monkeypatch.setattr(timing, "malloc_thresholds", lambda *, mmap, trim: done.append(trim))
    sides = Keeping(lambda: done.append("ours")), Giving(lambda: done.append("peer"))
    timing.in_turns([*sides], Effort(seconds=0, least=2))
    assert done == 2 * ["keep", "ours", "ours", 64 * 2**20, "peer", "peer"]


def test_both_sides_draw_the_same() -> None:
    """The loops that are compared, on a small network: preparation and guidance against diffusers' own classes."""
    ours, peer = unets(TINY)
    told_ = told(TINY, 2), told(TINY, 2, seed=9), torch.randn(2, 4, 8, 8)
    for sampler in ("ddim", "dpmpp_2m"):
        wanted = stock_loop(peer, sampler, 5, *told_)
        made = our_loop(ours, "f32", sampler, 5, *told_, Kept())
        assert float((made - wanted).abs().max() / wanted.abs().max()) <= 1e-4
        hasty = our_loop(ours, "f32", sampler, 5, *told_, Kept(), Guidance(scale=4.0, interval=(0.5, 4.0)), 2)
        assert float((hasty - wanted).abs().max() / wanted.abs().max()) > 1e-4


HELD = 2**20
"""Numbers of what stays, 4 MB"""


def holders() -> Iterator[Case]:
    """Ours takes 64 MB and 4 more, of which alone it keeps; the peer, as if it trained, keeps 4 at each call."""
    others = torch.ones(16 * HELD)  # of which nothing is counted
    kept: list[torch.Tensor] = []

    def ours() -> None:
        kept.append(torch.ones(16 * HELD)[:HELD].clone())

    def peer() -> None:
        kept.append(torch.ones(HELD))

    yield Case(name="another", ours=others.sum, peer=others.sum)
    yield Case(name="holders", ours=ours, peer=Keeping(peer))


def steps() -> Iterator[Case]:
    return training(TINY)


@pytest.mark.skipif(not CLEAR.exists(), reason="reads peak memory from /proc, which Linux has")
@pytest.mark.skipif(torch.cuda.is_available(), reason="of a GPU the tensors there are counted")
def test_the_most_memory_of_each_side() -> None:
    """Of one call, or of two of training; not what others hold, and not what was there before."""
    cases = {case.name: case for case in holders()}
    held = peaks(holders, cases["holders"])
    assert held["ours_peak_mb"] == pytest.approx(68, abs=3)
    assert held["peer_peak_mb"] == pytest.approx(8, abs=3)

    case = next(steps())
    weights = sum(p.numel() for p in unets(TINY)[0].parameters()) * 4 / 2**20
    for most in peaks(steps, case).values():  # a gradient and two means of each weight, and activations
        assert most is not None and most > 3 * weights - 2


def test_a_row_that_fails_is_told_and_does_not_end_the_benchmark() -> None:
    def fails() -> None:
        raise RuntimeError("out of memory")

    one = Case(name="one", ours=fails, peer=fails)
    other = Case(name="other", ours=lambda: slow(0, 1.0), peer=lambda: slow(0, 1.0), precision=None)
    told, row = measured(lambda: iter([one, other]), [""], quick=True)
    assert told == "one: RuntimeError: out of memory" and isinstance(row, Row) and row.name == "other"


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """The GPU's branches, on the CPU; gives how the networks were compiled, which is but traced here."""
    asked: list[dict] = []

    def compiling(graphs: bool) -> dict:
        asked.append(true(graphs))
        return {"backend": "eager", "fullgraph": True, "dynamic": False}

    true = models.compiling
    monkeypatch.setattr(models, "compiling", compiling)
    monkeypatch.setattr(models, "on_gpu", lambda: True)
    monkeypatch.setattr("ldm.device.device_of", lambda module: "cuda")
    return asked


def test_on_a_gpu_both_sides_are_compiled_alike_in_bf16(on_a_gpu: list[dict]) -> None:
    """The difference is that of two bf16 results, not more: nothing is compared that a graph has written over."""
    tiny = Shape(
        unet=SMALL.unet
        | {
            "block_out_channels": (32, 32),
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        },
        autoencoder={"block_out_channels": (8,), "norm_num_groups": 4, "layers_per_block": 1},
        latents=(4,),
        picture=8,
    )
    for rows in (forward, passes):
        on_a_gpu.clear()
        row = next(rows(tiny)).measure(Effort(seconds=0, least=1))
        assert row.difference is not None and row.difference < 5e-2 and row.fast_ratio
        assert len(on_a_gpu) in (2, 4)
        assert all(asked["mode"] == "reduce-overhead" for asked in on_a_gpu)
    assert for_a_gpu(row).fast_target == 1.3 and "bf16" in row.name
