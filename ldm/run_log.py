"""What a person sees of a run: lines on the screen, metrics.jsonl, pictures, the tracker."""

from __future__ import annotations

import json
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor
from tqdm import tqdm

from autoencoder.files import write_text
from ldm import trackers
from ldm.checkpoint import writing


class RunLog:
    """Notes of every step, written as means; pictures; remarks. The base of `Run`.

    Attributes:
        step: optimizer steps done.
    """

    def __init__(self, out: Path, accelerator: Accelerator) -> None:
        self.out, self.accelerator = out, accelerator
        self.device, self.main = accelerator.device, accelerator.is_main_process
        self.step = 0
        self._notes: dict[str, list[Tensor | float]] = {}
        self._remarks: dict[str, float] = {}

    @property
    def fresh(self) -> bool:
        """Whether nothing has been trained yet: the time to try what would else fail for the first time hours later."""
        return self.step == 0

    def say(self, text: str) -> None:
        """Print on the first process, above the progress bar."""
        if self.main:
            # The terminal may be gone, or a signal come while another text is printed.
            with suppress(OSError, RuntimeError):
                tqdm.write(text, file=sys.stderr)

    def tell(self, text: str) -> None:
        """Say what came of the training."""
        self.say(text)

    def picture(self, sheet: Image.Image, name: str) -> None:
        """Save a picture as samples/NAME-STEP.png, with what its `info` says of it."""
        folder = self.out / "samples"
        file = folder / f"{name}-{self.step:08d}.png"
        about = PngInfo()
        for key, text in sheet.info.items():
            about.add_text(str(key), str(text))
        with writing(file):
            folder.mkdir(exist_ok=True)
            sheet.save(file, pnginfo=about)
        for tracker in self.accelerator.trackers:
            if not trackers.log_picture(tracker, name, sheet, self.step) and self.fresh:
                self.say(f"{tracker.name} takes no pictures from Accelerate; they are in {folder}")

    def note(self, **values: Tensor | float) -> None:
        """Add to what `log` writes the mean of; called by all processes alike. Costs no wait for the device."""
        for name, value in values.items():
            self._notes.setdefault(name, []).append(value)

    def remark(self, **values: float) -> None:
        """Values for the next `log` that the first process alone knows; nothing is logged of a fresh run."""
        if not self.fresh:
            self._remarks |= values

    def log(self) -> None:
        """Write the means since the last call, over all processes, and the remarks, to files and the tracker.

        Values that are not finite, of steps that were skipped, are left out of the means.
        """
        names = sorted(self._notes)
        sums = torch.zeros(len(names), 2, dtype=torch.float64)
        for row, name in zip(sums, names, strict=True):
            values = _doubles(self._notes[name])
            finite = values[values.isfinite()]
            row[0], row[1] = finite.sum(), len(finite)
        sums = self._reduced(sums)
        means = {
            name: total / count for name, (total, count) in zip(names, sums.tolist(), strict=True) if count
        }
        record = means | self._remarks
        self._notes, self._remarks = {}, {}
        if self.main:
            metrics = self.out / "metrics.jsonl"
            with writing(metrics), metrics.open("a") as file:
                file.write(json.dumps({"step": self.step, "time": round(time.time(), 2)} | record) + "\n")
        self.accelerator.log(record, step=self.step)

    def _reduced(self, sums: Tensor) -> Tensor:
        """Sums over all processes."""
        if self.accelerator.num_processes == 1:
            return sums
        kind = torch.float32 if self.device.type == "mps" else torch.float64
        return self.accelerator.reduce(sums.to(self.device, kind), "sum").cpu().double()

    def notes(self) -> dict[str, Any]:
        """The notes of the interval that is under way, for a checkpoint: [processes, values] each. Collective."""
        return {name: self._gathered(_doubles(values)) for name, values in sorted(self._notes.items())}

    def _gathered(self, values: Tensor) -> Tensor:
        if self.accelerator.num_processes == 1:
            return values[None]
        kind = torch.float32 if self.device.type == "mps" else torch.float64
        return self.accelerator.gather(values[None].to(self.device, kind)).cpu().double()

    def take_up_notes(self, saved: dict[str, Tensor]) -> None:
        """Go on with such an interval: with this process's own values, or on another number of them with the means."""
        ranks, rank = self.accelerator.num_processes, self.accelerator.process_index
        for name, values in saved.items():
            own = values[rank] if len(values) == ranks else values.mean(dim=0)
            self._notes[name] = own.tolist()

    def forget_later_metrics(self) -> None:
        """Lines of steps that were lost with a crash, and are done again, leave metrics.jsonl; so does a torn one."""

        def kept(line: str) -> bool:
            try:
                return json.loads(line)["step"] <= self.step
            except ValueError:
                return False

        metrics = self.out / "metrics.jsonl"
        if self.main and metrics.exists():
            self.write(metrics.name, "".join(filter(kept, metrics.read_text().splitlines(keepends=True))))

    def write(self, name: str, text: str) -> None:
        """Replace the file NAME of the run folder by `text` in one step."""
        with writing(self.out / name):
            write_text(self.out / name, text)

    def append(self, name: str, **record: Any) -> None:
        """Add a line to the file NAME of the run folder, with the time; on the first process."""
        if self.main:
            with writing(self.out / name), (self.out / name).open("a", encoding="utf-8") as file:
                file.write(json.dumps({"time": round(time.time(), 2)} | record) + "\n")


def _doubles(values: list[Tensor | float]) -> Tensor:
    """[N] float64, on the CPU; tensors come from the device together."""
    there = [value.detach().reshape(()) for value in values if isinstance(value, Tensor)]
    fetched = iter(torch.stack(there).double().tolist() if there else ())
    return torch.tensor(
        [next(fetched) if isinstance(value, Tensor) else value for value in values], dtype=torch.float64
    )
