"""What is measured. Each function makes its networks, gives its rows to be measured, and lets go of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

from benchmarks import autoencoder_rows, fresh, loop_rows, unet_rows
from benchmarks.harness import Overhead
from benchmarks.models import Shape, on_gpu
from benchmarks.timing import Case, Effort, Row
from ldm.unet_config import UNetConfig


class Measurable(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def long(self) -> bool: ...

    def measure(self, effort: Effort) -> Row: ...


def harness(size: Shape) -> Iterator[Measurable]:
    if on_gpu():
        yield Overhead(network=UNetConfig(**size.unet, sample_size=size.latents[0]))
    else:
        yield Overhead()


NETWORKS: tuple[Callable[[Shape], Iterator[Case]], ...] = (
    unet_rows.forward,
    unet_rows.sampling,
    unet_rows.hasty,
    autoencoder_rows.passes,
    unet_rows.training,  # after it the C library keeps what is freed, for both sides
    autoencoder_rows.training,
)
"""Those whose memory is measured too"""
ROWS: tuple[Callable[[Shape], Iterator[Measurable]], ...] = (
    *NETWORKS,
    loop_rows.loops,
    loop_rows.stock_loops,
    harness,
    fresh.rows,
)
