"""How much memory training takes: measured while it happens, and foreseen from a few samples."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
CLEAR = Path("/proc/self/clear_refs")
STATUS = Path("/proc/self/status")
LIMIT = Path("/sys/fs/cgroup/memory.max")
"""Of a container, in bytes; or the word max"""


class Memory:
    """What this process holds: on a GPU its tensors, elsewhere everything that lies in RAM, interpreter included."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.gpu = device, device.type == "cuda"

    def held(self) -> int:
        """Bytes, now."""
        return torch.cuda.memory_allocated(self.device) if self.gpu else psutil.Process().memory_info().rss

    def room(self) -> int:
        """Bytes that could be held before the machine has none left, those that are held counted."""
        if self.gpu:
            free, _ = torch.cuda.mem_get_info(self.device)
            return free + torch.cuda.memory_reserved(self.device)
        there = psutil.virtual_memory().available + self.held()
        limit = LIMIT.read_text().strip() if LIMIT.exists() else ""
        return min(there, int(limit)) if limit.isdecimal() else there

    def forget(self) -> None:
        """Let `peak` count from here."""
        if self.gpu:
            torch.cuda.reset_peak_memory_stats(self.device)
        elif CLEAR.exists():
            CLEAR.write_text("5")  # see proc(5): resets the high-water mark of this process

    def peak(self) -> int | None:
        """The most bytes held since `forget`; None where the system doesn't tell (neither CUDA nor Linux)."""
        if self.gpu:
            return torch.cuda.max_memory_allocated(self.device)
        if not CLEAR.exists():
            return None
        line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))
        return 1024 * int(line.split()[1])


def keep_freed() -> None:
    """Have the C library keep what is freed for what is needed next, where it is glibc.

    Each step of training takes and frees the same. Given back to the system in between, large tensors come anew with
    tens of thousands of page faults a step, up to 11 % of a step on a CPU (docs/log.md).
    """
    malloc_thresholds(mmap=32 * 2**20, trim=2**31 - 1)  # the most that it takes


def malloc_thresholds(*, mmap: int, trim: int) -> None:
    """Bytes from which glibc asks the system for each block alone, and which may lie free at the end of its heap before
    they are given back. Where the C library is another, nothing is done."""
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
        mallopt(M_MMAP_THRESHOLD, mmap)
        mallopt(M_TRIM_THRESHOLD, trim)


class Saved:
    """Bytes that autograd keeps from a forward pass for the backward pass, weights not counted.

    Storage is counted, not tensors: a view keeps all of what it is a view of.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._weights = {p.untyped_storage().data_ptr() for module in modules for p in module.parameters()}
        self._storages: dict[int, int] = {}

    @property
    def sizes(self) -> list[int]:
        """Of each storage, the largest first."""
        return sorted(self._storages.values(), reverse=True)

    def clear(self) -> None:
        self._storages = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        with torch.autograd.graph.saved_tensors_hooks(self._note, lambda kept: kept):
            yield

    def _note(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._weights:
            self._storages[storage.data_ptr()] = storage.nbytes()
        return tensor


WORKING = 10
"""Copies of the largest activation that a backward pass needs beside what is saved: gradients in and out of a layer,
other layouts, other precisions. Foreseen so, the peak was within 10 % of the measured one on a CPU (fruits, stage 1
at 192 pictures in float32 and bf16, stage 2 at 256 in bf16); of five more, scenes, within 5 % (docs/log.md)."""


def foreseen(few: tuple[int, int], sizes: tuple[list[int], list[int]], batch: int) -> int:
    """Bytes of activations in the backward pass of `batch` samples, from what two smaller batches save."""
    one, two = few
    each = [(b - a) / (two - one) if two > one else 0.0 for a, b in zip(*sizes, strict=True)]
    grown = [b + slope * (batch - two) for b, slope in zip(sizes[1], each, strict=True)]
    return round(sum(grown) + WORKING * max(grown, default=0))


def lasting(networks: Iterable[nn.Module], parts: Mapping[str, Any]) -> dict[str, int]:
    """Bytes that this process holds from step to step, by what they are for.

    Args:
        parts: what the checkpoints of a `Run` consist of.
    """
    weights = [p for network in networks for p in network.parameters()]
    held = {"weights": size(weights), "gradients": size([p for p in weights if p.requires_grad])}
    held |= {"optimizer": 0, "averages": 0}
    for name, part in parts.items():
        if name != "run" and not isinstance(part, nn.Module):
            held["optimizer" if hasattr(part, "param_groups") else "averages"] += size(part.state_dict())
    return held


def size(state: Any) -> int:
    """Bytes on this process of all tensors in a nest of dicts and lists."""
    if isinstance(state, DTensor):
        return size(state.to_local())
    if isinstance(state, Tensor):
        return state.numel() * state.element_size()
    if isinstance(state, dict):
        return sum(map(size, state.values()))
    return sum(map(size, state)) if isinstance(state, list | tuple) else 0
