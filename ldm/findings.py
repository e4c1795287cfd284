"""What a dry run has found, and how it is said."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from ldm.config import UserError


class Part(NamedTuple):
    """A network and its numbers of weights."""

    name: str
    trained: int
    frozen: int


@dataclass(kw_only=True)
class Findings:
    """Bytes, seconds and counts of one process."""

    steps: int
    """Optimizer steps of the run; `done` of them lie in its checkpoints"""
    batch: int
    """Samples an optimizer step"""
    keep: int
    """Checkpoints kept"""
    save_every: int
    """Steps between checkpoints"""
    done: int = 0
    parts: list[Part] = field(default_factory=list)
    bytes: dict[str, int] = field(
        default_factory=lambda: dict.fromkeys(
            ("weights", "gradients", "optimizer", "averages", "activations"), 0
        )
    )
    """Of memory, by what it is for"""
    by_accumulate: dict[int, int] = field(default_factory=dict)
    """Memory of a training step, from a few samples, by run.accumulate, the recipe's value first"""
    room: int = 0
    """Memory that there is"""
    peaks: dict[str, int] = field(default_factory=dict)
    """Memory measured in training, validation and saving, where the system tells"""
    disk: dict[str, int] = field(
        default_factory=lambda: dict.fromkeys(("cache", "checkpoints", "model", "pictures and logs"), 0)
    )
    """What the run folder will hold, also while it is being written"""
    free: int = 0
    """Bytes free on the disk, and in the run folder already"""
    there: int = 0
    step_seconds: float = math.nan
    cache_seconds: float = 0.0
    repeated_seconds: float = 0.0
    """Of all pictures, logs and checkpoints until the end"""
    finish_seconds: float = 0.0

    def note_peak(self, phase: str, measured: int | None) -> None:
        if measured is not None:
            self.peaks[phase] = max(measured, self.peaks.get(phase, 0))

    @property
    def seconds(self) -> float:
        """Until the end of the run."""
        rest = self.cache_seconds + self.repeated_seconds + self.finish_seconds
        return rest + (self.steps - self.done) * self.step_seconds

    @property
    def foreseen(self) -> int:
        """Memory of a training step of the recipe; 0 if it is not known."""
        return next(iter(self.by_accumulate.values()), 0)

    def memory(self) -> str:
        """What the run takes, as far as it is known, what there is, and what to lower."""
        lower = "lower run.batch_size, data.size or the network, or set run.gradient_checkpointing"
        splits = "which splits the batch and changes nothing else"
        if not self.foreseen:
            return f"raise run.accumulate, {splits}, or {lower}"
        phases = self.peaks if "training" in self.peaks else {"a training step": self.foreseen} | self.peaks
        takes = ", ".join(f"{phase} takes about {gigabytes(count)}" for phase, count in phases.items())
        kinds = ", ".join(f"{name} {gigabytes(count)}" for name, count in self.bytes.items())
        known = f"{takes}, of {gigabytes(self.room)}; in a step {kinds}"
        larger = [phase for phase, count in phases.items() if count > self.room]
        if larger and self.foreseen <= self.room:
            return f"{known}; {' and '.join(larger)} can't fit: end other programs, or lower data.size or the network"
        if not larger:
            return f"{known}; that fits if nothing else takes memory: end other programs, or {lower}"
        fitting = next(((n, count) for n, count in self.by_accumulate.items() if count <= self.room), None)
        if fitting is None:
            return f"{known}; not even one sample at a time fits: {lower.replace('run.batch_size, ', '')}"
        n, count = fitting
        return f"{known}; raise run.accumulate to {n} ({gigabytes(count)}), {splits}, or {lower}"

    def report(self, home: Path) -> str:
        """A page of text about the run in the folder `home`."""
        width = max(len(part.name) for part in self.parts)
        counts = [f"{p.name:{width}} {p.trained:15,} trained {p.frozen:15,} frozen" for p in self.parts]
        kinds = ", ".join(f"{name} {gigabytes(count)}" for name, count in self.bytes.items())
        peaks = [f"{phase} {gigabytes(count)}" for phase, count in self.peaks.items()]
        measured = f"measured: {', '.join(peaks)}" if peaks else "not measured on this system"
        disk = ", ".join(f"{name} {gigabytes(count)}" for name, count in self.disk.items() if count)
        rest = {"cache": self.cache_seconds, "pictures, logs and checkpoints": self.repeated_seconds}
        rest |= {"training": (self.steps - self.done) * self.step_seconds, "end": self.finish_seconds}
        times = ", ".join(f"{name} {hours(seconds)}" for name, seconds in rest.items())
        return "\n".join(
            [
                "Weights",
                *(f"  {line}" for line in counts),
                "Memory of a process at its peak",
                f"  foreseen: training {gigabytes(self.foreseen)} of {gigabytes(self.room)}",
                f"  {measured}",
                f"  of which {kinds}",
                "Disk",
                f"  {gigabytes(sum(self.disk.values()))} at most: {disk}; {gigabytes(self.free)} are free",
                "Time",
                f"  {self.batch / self.step_seconds:,.1f} images/s; {hours(self.seconds)} for the "
                f"{self.steps - self.done} steps from here: {times}",
                f"  {hours(self.save_every * self.step_seconds)} between checkpoints (run.save_every "
                f"{self.save_every}): what a killed process loses at most",
                f"All was tried once and worked; {home} is as it was.",
            ]
        )

    def check_disk(self, home: Path) -> None:
        """UserError if the run folder will not fit onto its disk."""
        needed = sum(self.disk.values()) - self.there
        if needed > self.free:
            raise UserError(
                f"{home} will need {gigabytes(needed)} more, but {gigabytes(self.free)} are free on its disk; "
                "make room, or set run.out or run.keep."
            )


def gigabytes(count: int) -> str:
    """1500000000 => 1.50 GB"""
    return f"{count / 1e9:,.2f} GB" if count >= 1e7 else f"{count / 1e9:,.4f} GB"


def hours(seconds: float) -> str:
    """5400.0 => 1.5 h"""
    if seconds < 90:
        return f"{seconds:.1f} s"
    return f"{seconds / 3600:,.1f} h" if seconds >= 5400 else f"{seconds / 60:.1f} min"


def folder_bytes(folder: Path) -> int:
    """What the files in a folder take; 0 if there is none."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
