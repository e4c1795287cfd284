"""What the benchmark says of a row: not how fast anything is."""

import time

import pytest
import torch

pytest.importorskip("diffusers", reason="the benchmark's other side")

from autoencoder.packed import Kept
from benchmarks import timing
from benchmarks.models import SMALL, Shape, told, unets
from benchmarks.timing import Case, Effort, Giving, Keeping
from benchmarks.unet_rows import our_loop, stock_loop
from ldm.guidance import Guidance


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
    assert {"name", "ratio", "target", "difference", "ours_s", "peer_s", "share_of_peak"} <= row.keys()
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
    tiny = Shape(
        unet=SMALL.unet | {"block_out_channels": (32, 32, 64)},
        autoencoder={},
        latents=(8,),
        picture=32,
    )
    ours, peer = unets(tiny)
    told_ = told(tiny, 2), told(tiny, 2, seed=9), torch.randn(2, 4, 8, 8)
    for sampler in ("ddim", "dpmpp_2m"):
        wanted = stock_loop(peer, sampler, 5, *told_)
        made = our_loop(ours, "f32", sampler, 5, *told_, Kept())
        assert float((made - wanted).abs().max() / wanted.abs().max()) <= 1e-4
        hasty = our_loop(ours, "f32", sampler, 5, *told_, Kept(), Guidance(scale=4.0, interval=(0.5, 4.0)), 2)
        assert float((hasty - wanted).abs().max() / wanted.abs().max()) > 1e-4
