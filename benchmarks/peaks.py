"""The most memory that one call of each side holds, on top of plain weights, inputs and interpreter, which both sides
hold alike: weights packed or copied at the first call, activations, gradients, what an optimizer keeps.

On a CPU each side is called in a fresh process, after the other side's networks were let go. It is forked from one
that has imported everything and computed nothing, so it takes little longer than the call. On a GPU the tensors there
are counted, in the process of the benchmark, since compiling anew would take minutes a row.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch

from benchmarks.models import device, on_gpu
from benchmarks.rows import Measurable
from benchmarks.timing import Keeping, Work
from ldm.memory import STATUS, Memory

Cases = Callable[[], Iterator[Measurable]]
SIDES = "ours", "peer"


def peaks(cases: Cases, case: Measurable) -> dict[str, Any]:
    """The fields of `Row` that tell the memory of a `Case`; None where the system does not (neither CUDA nor Linux).

    Args:
        cases: gives the case again, by its name, in another process; importable there.
    """
    if on_gpu():
        return {f"{side}_peak_mb": most_held(getattr(case, side)) for side in SIDES}
    return {f"{side}_peak_mb": in_fresh_process(cases, case.name, side) for side in SIDES}


def in_fresh_process(cases: Cases, name: str, side: str) -> float | None:
    context: Any = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.rows"])
    with ProcessPoolExecutor(1, mp_context=context) as process:
        return process.submit(alone, cases, name, side).result()


def alone(cases: Cases, name: str, side: str) -> float | None:
    """`most_held` of one side of the case of a name, once all that was made for others is let go."""
    work: Work = next(getattr(case, side) for case in cases() if case.name == name)
    gc.collect()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)
    return most_held(work)


def most_held(work: Work) -> float | None:
    """Megabytes held at most in the first call on top of what was held before; of training, in the first two, as an
    optimizer makes its state at the end of the first."""
    memory = Memory(torch.device(device()))
    memory.forget()
    before, files = memory.held(), file_pages()
    if isinstance(work, Keeping):
        work.settle()
    work()
    peak = memory.peak()
    return None if peak is None else (peak - before - (file_pages() - files)) / 2**20


def file_pages() -> int:
    """Bytes of files in memory: of libraries, whose code comes as it is called for the first time. 0 on a GPU."""
    if on_gpu() or not STATUS.exists():
        return 0
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("RssFile"))
    return 1024 * int(line.split()[1])
