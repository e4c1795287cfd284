"""Ways to the same result, timed in turns: machines are noisy, so only ratios from one run are claimed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ldm.memory import keep_freed, malloc_thresholds

Work = Callable[[], Any]


@dataclass(frozen=True)
class Keeping:
    """Work on a CPU whose freed memory the C library keeps for what comes next, as our runs have it."""

    work: Work

    def __call__(self) -> Any:
        return self.work()

    def settle(self) -> None:
        """What each of its turns begins with, not timed: the setting, and once the work, as the side before may have
        given back what it freed."""
        keep_freed()
        self.work()


class Giving(Keeping):
    """Work on a CPU with glibc's own thresholds, as in a program that sets nothing: they grow with what is freed, and
    these are the largest that they come to, so that the fewest pages are taken anew."""

    def settle(self) -> None:
        malloc_thresholds(mmap=32 * 2**20, trim=64 * 2**20)
        self.work()


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How long each row is measured."""

    seconds: float
    """After which no round is begun"""
    least: int
    """Rounds whatever they take"""
    most: int = 15
    """Rounds at most"""


FULL, QUICK = Effort(seconds=10, least=2), Effort(seconds=1.5, least=1)


@dataclass(frozen=True, kw_only=True)
class Row:
    """What came of a case. `ours` and `peer` are medians, in seconds of one call."""

    name: str
    ratio: float
    """peer / ours: the median of the rounds"""
    ours: float
    peer: float
    spread: tuple[float, float] | None = None
    """Quartiles of the ratio"""
    target: float | None = None
    """Ratio to reach on this kind of machine"""
    fast_target: float | None = None
    """Ratio to the peer with its fast settings to reach, likewise"""
    difference: float | None = None
    """Largest difference of the results over the largest absolute value of the peer's"""
    fast_peer: float | None = None
    """The peer with its documented fast settings, likewise"""
    fast_ratio: float | None = None
    """fast_peer / ours: the median of the rounds"""
    per_second: float | None = None
    """Pictures, samples or steps a second, ours"""
    share_of_peak: float | None = None
    """Floating-point operations of the peer's formulas a second of ours, over those of this machine's matrix product"""
    share_target: float | None = None
    ours_peak_mb: float | None = None
    """The most memory held in a call, as `benchmarks.peaks` counts it, or of a fresh process all"""
    peer_peak_mb: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """As the record keeps it: seconds say so in their names."""
        timed = "ours", "peer", "fast_peer"
        return {f"{key}_s" if key in timed else key: value for key, value in asdict(self).items()}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row to be timed. All sides give what is compared, a tensor, or None where nothing is."""

    name: str
    ours: Work
    peer: Work
    fast_peer: Work | None = None
    target: float | None = None
    precision: torch.dtype | None = torch.float32
    """In which matrices are multiplied, for the share of peak; None where most of the work is something else"""
    share_target: float | None = None
    unit: float = 1
    """Pictures, samples or steps in one call"""
    long: bool = False
    """Left out of a quick benchmark"""
    compared: Callable[[], tuple[Tensor, Tensor]] | None = None
    """What both sides make of the same, where each is timed at what is its own: order, noise"""

    def measure(self, effort: Effort) -> Row:
        """All sides once to warm up and compare, then in turns."""
        made = self.ours()
        with FlopCounterMode(display=False) as counter:
            expected = self.peer()
        unlike = difference(*self.compared()) if self.compared else difference(made, expected)
        sides = [self.ours, self.peer, *([self.fast_peer] if self.fast_peer else [])]
        graphs = 2 * sides if torch.cuda.is_available() else []  # which are recorded at the second call
        for side in sides[2:] + graphs:
            side()
        rounds = in_turns(sides, effort)
        ours, peer, *fast = (list(times) for times in zip(*rounds, strict=True))
        ratios = [b / a for a, b in zip(ours, peer, strict=True)]
        quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else [ratios[0]] * 3
        typical = statistics.median(ours)
        share = None
        if self.precision:
            share = counter.get_total_flops() / typical / matrix_rate(self.precision)
        return Row(
            name=self.name,
            ratio=quartiles[1],
            spread=(quartiles[0], quartiles[2]),
            target=self.target,
            difference=unlike,
            ours=typical,
            peer=statistics.median(peer),
            fast_peer=statistics.median(fast[0]) if fast else None,
            fast_ratio=statistics.median(b / a for a, b in zip(ours, fast[0], strict=True)) if fast else None,
            per_second=self.unit / typical,
            share_of_peak=share,
            share_target=self.share_target,
        )


def in_turns(sides: list[Work], effort: Effort) -> list[list[float]]:
    """Seconds of each side, round by round."""
    rounds: list[list[float]] = []
    end = time.perf_counter() + effort.seconds
    while len(rounds) < effort.least or (time.perf_counter() < end and len(rounds) < effort.most):
        rounds.append([seconds(side) for side in sides])
    return rounds


def seconds(work: Work) -> float:
    if isinstance(work, Keeping) and not torch.cuda.is_available():
        work.settle()
    synchronise()
    start = time.perf_counter()
    work()
    synchronise()
    return time.perf_counter() - start


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def difference(made: Tensor | None, expected: Tensor | None) -> float | None:
    if made is None or expected is None:
        return None
    return ((made.float() - expected.float()).abs().max() / expected.float().abs().max()).item()


@cache
def matrix_rate(precision: torch.dtype) -> float:
    """Floating-point operations a second of this machine's matrix product in a precision: the best of several."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    side = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device, dtype=precision) for _ in range(2))
    a @ b
    return 2 * side**3 / min(seconds(lambda: a @ b) for _ in range(8))
