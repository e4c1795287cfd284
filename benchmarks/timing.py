"""Two ways to the same result, timed in turns: machines are noisy, so only ratios from one run are claimed."""

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

Work = Callable[[], Any]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row to be measured. Both sides give what is compared, a tensor, or None where nothing is."""

    name: str
    ours: Work
    peer: Work
    target: float | None = None
    """Ratio to reach on this kind of machine"""
    precision: torch.dtype = torch.float32
    """In which matrices are multiplied, for the share of peak"""
    unit: float = 1
    """Pictures, samples or steps in one call"""


@dataclass(frozen=True, kw_only=True)
class Row:
    """What came of a case. Seconds are medians of one call."""

    name: str
    ratio: float
    """Median of the ratios peer / ours of the rounds"""
    spread: tuple[float, float]
    """Quartiles of these ratios"""
    target: float | None
    difference: float | None
    """Largest difference of the results over the largest absolute value of the peer's"""
    ours_s: float
    peer_s: float
    per_second: float
    """Pictures, samples or steps a second, ours"""
    share_of_peak: float
    """Floating-point operations a second of ours over those of this machine's matrix product"""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure(case: Case, rounds: int) -> Row:
    """Both sides once to warm up and compare, then `rounds` times in turns."""
    with FlopCounterMode(display=False) as counter:
        made = case.ours()
    expected = case.peer()
    ours, peer = [], []
    for _ in range(rounds):
        ours.append(seconds(case.ours))
        peer.append(seconds(case.peer))
    ratios = [b / a for a, b in zip(ours, peer, strict=True)]
    quartiles = statistics.quantiles(ratios, n=4) if rounds > 1 else [ratios[0]] * 3
    typical = statistics.median(ours)
    return Row(
        name=case.name,
        ratio=quartiles[1],
        spread=(quartiles[0], quartiles[2]),
        target=case.target,
        difference=difference(made, expected),
        ours_s=typical,
        peer_s=statistics.median(peer),
        per_second=case.unit / typical,
        share_of_peak=counter.get_total_flops() / typical / matrix_rate(case.precision),
    )


def seconds(work: Work) -> float:
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
    return 2 * side**3 / min(seconds(lambda: a @ b) for _ in range(5))
