"""`--dry-run`: a few steps of everything in a folder beside the run's, which is then removed, and what they say.

The script's own loop runs, with a `DryRun` in place of its `Run`: first on a few samples, from which the memory of a
whole batch is foreseen; then a short probe of real steps; then one step after which all that happens every so many
steps happens; then the end of the script.
"""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldm.buckets import Buckets
from ldm.config import UserError, to_yaml
from ldm.data import Source
from ldm.faults import out_of_memory
from ldm.findings import Findings, Part, folder_bytes
from ldm.memory import Memory, Saved, foreseen, lasting
from ldm.run_folder import changed_settings
from ldm.trackers import chosen_tracker
from ldm.training import Run

FEW = (2, 4)
"""Samples in the batches from which the memory of a whole one is foreseen"""
PROBE_SECONDS = 20.0
PROBE_STEPS = 20
PICTURES = 64
"""Pictures that are cached, and measured at the end, in place of all"""


def rehearse(recipe: Any, train: Callable[[Any, Run], None]) -> None:
    """Try all that `train(recipe, run)` does and print what was found; the run's folder stays as it is.

    Raises:
        UserError: it can't work like this; says what was tried when it failed.
    """
    scratch = recipe.run.out.parent / f".{recipe.run.out.name}.dry-run"
    missing = [folder for folder in scratch.parents if not folder.exists()]
    doing, found = ["starting"], new_findings(recipe)
    try:
        run = DryRun(recipe, scratch, doing, found)
        with run.signals:
            train(recipe, run)
    except (UserError, OSError, ValueError, RuntimeError, MemoryError) as problem:
        hint = f" {found.memory()}." if out_of_memory(problem) else ""
        raise UserError(f"The dry run failed while {doing[-1]}: {problem}{hint}") from problem
    finally:
        if int(os.environ.get("RANK", 0)) == 0:  # the process that reads what all have written
            clear(scratch, missing)


def new_findings(recipe: Any) -> Findings:
    """Those of the run of a recipe, of which nothing is known yet."""
    run = recipe.run
    return Findings(steps=run.steps, batch=run.batch_size, keep=run.keep, save_every=run.save_every)


def clear(scratch: Path, missing: Iterable[Path]) -> None:
    """Remove the scratch folder, and those of its parents that were made for it."""
    shutil.rmtree(scratch, ignore_errors=True)
    for folder in missing:
        if folder.exists() and not any(folder.iterdir()):
            folder.rmdir()


class FirstPictures:
    """The first `n` pictures of a source, which is otherwise as it was."""

    def __init__(self, source: Source, n: int) -> None:
        self._source, self._n, self.began = source, min(n, len(source)), math.nan
        self.texts = None if source.texts is None else source.texts[: self._n]
        self.labels = None if source.labels is None else source.labels[: self._n]
        self.sizes = None if source.sizes is None else source.sizes[: self._n]
        self.fingerprint = f"the first {self._n}"
        pictures, captions = len(source) / self._n, 1.0
        if source.texts and self.texts:
            captions = len(set(source.texts)) / len(set(self.texts))
        self.ratios = {"latents": pictures, "text": captions}  # of the whole source to this part

    def __len__(self) -> int:
        return self._n

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def of_one_size(self) -> np.ndarray:
        """Indices of pictures that make a batch together."""
        if self.sizes is None:
            return np.arange(self._n)
        _, group, counts = np.unique(self.sizes, axis=0, return_inverse=True, return_counts=True)
        return np.flatnonzero(group == counts.argmax())

    def picture(self, index: int, *arguments: Any) -> Image.Image:
        if math.isnan(self.began):
            self.began = time.time()
        return self._source.picture(index, *arguments)


class DryRun(Run):
    """A run of a few steps in a scratch folder that notes what they take.

    Args:
        doing: what is being tried is added to it, for the sentence that says what failed.
        found: is filled in.
    """

    def __init__(self, recipe: Any, scratch: Path, doing: list[str], found: Findings) -> None:
        self.home, self.doing, self.found = recipe.run.out, doing, found
        self._first: FirstPictures | None = None
        self._watched: Saved | None = None  # watches while the batches are small
        self._counted: list[list[int]] = []  # bytes of each storage, a list for each small batch
        self._last = False
        self._every: tuple[int, float, int] | None = (
            None  # what is done each so many steps: when, and bytes then
        )
        self._looped = 0.0
        chosen_tracker(recipe.run.tracker)
        tracker = recipe.run.tracker if recipe.run.tracker == "tensorboard" else "none"
        steps = len(FEW) + PROBE_STEPS + 2
        super().__init__(replace(recipe.run, out=scratch, steps=steps, tracker=tracker), recipe)
        if tracker != recipe.run.tracker:
            self.say(f"the tracker {recipe.run.tracker} is not contacted")
        self.memory = Memory(self.device)
        doing.append("building the networks")

    def _open_folder(self) -> list[str]:
        if self.main:
            print(to_yaml(self.recipe))
            changed_settings(self.home, self.recipe)
            shutil.rmtree(self.out, ignore_errors=True)  # left by a dry run that was killed
        super()._open_folder()
        if self.main:
            self._take_over_inspection()
        self.accelerator.wait_for_everyone()
        self.found.free, self.found.there = shutil.disk_usage(self.out).free, folder_bytes(self.home)
        begun = [int(folder.name.removeprefix("step-")) for folder in self.home.glob("checkpoints/step-*")]
        self.found.done = max(begun, default=0)
        return []

    def _take_over_inspection(self) -> None:
        """What the run has found looking at all pictures, which can take long, is not looked for again."""
        for seen in self.home.glob("cache/inspected-*.safetensors"):
            (self.out / "cache").mkdir(exist_ok=True)
            shutil.copy2(seen, self.out / "cache")

    @contextmanager
    def _at_home(self) -> Iterator[None]:
        here = self.out, self.config
        self.out, self.config = self.home, self.recipe.run
        yield
        self.out, self.config = here

    def finished(self) -> bool:
        with self._at_home():
            return super().finished()

    def say(self, text: str) -> None:
        super().say(f"dry run: {text}")

    def tell(self, text: str) -> None:
        pass  # a few steps make no model, and its folder is removed

    @property
    def fresh(self) -> bool:
        return False  # what a run tries at its start is tried after the probe

    def resume(self, *arguments: Any, **parts: Any) -> None:
        super().resume(*arguments, **parts)
        for module in self.placed:
            counts = [
                sum(p.numel() for p in module.parameters() if p.requires_grad == t) for t in (True, False)
            ]
            self.found.parts.append(Part(type(module).__name__, *counts))

    def part_of(self, source: Source) -> Source:
        self.doing.append("caching latents and captions")
        self._first = FirstPictures(source, PICTURES)
        return self._first  # type: ignore[return-value]

    def shares(self, source: Source, what: str) -> Iterator[Tensor]:
        self.doing.append(f"measuring the {what}")
        first, began = FirstPictures(source, PICTURES), self._now()
        yield from super().shares(first, what)  # type: ignore[arg-type]
        self.found.finish_seconds += (self._now() - began) * (first.ratios["latents"] - 1)
        self.doing.append("writing the model")

    # --- the loop ----------------------------------------------------------------------------------------------

    def batches(
        self, dataset: Any, order: np.ndarray | Buckets, workers: int = 0
    ) -> Iterator[dict[str, Tensor]]:
        """A few samples, whole batches until the probe has lasted long enough, and those of one more step."""
        if self._first is not None:
            self._note_cache(self._first)
            order = self._first.of_one_size()
        stream = super().batches(dataset, order, workers)
        self.doing.append("training on a few samples")
        yield from self._few(stream)
        self._foresee()
        yield from self._probe(stream)
        self._last = True
        yield from self._step(stream)
        stream.close()  # type: ignore[attr-defined]
        self._finish()

    def _finish(self) -> None:
        """What comes after the last step follows."""
        self._close()
        self.doing.append("finishing")
        self._looped = self._now()

    def _few(self, stream: Iterator[dict[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
        steps = -(-len(FEW) // self.config.accumulate)
        self._watched = Saved(self.placed)
        for i, batch in enumerate(islice(stream, steps * self.config.accumulate)):
            self._counted.append([])
            with self._watched.watching():
                yield {name: values[: FEW[i % len(FEW)]] for name, values in batch.items()}
        self._watched = None

    def _probe(self, stream: Iterator[dict[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
        """Whole batches until they have lasted long enough to tell the time of a step."""
        if (
            self.found.foreseen > self.found.room and not self.memory.gpu
        ):  # a GPU says so; RAM ends the process
            raise UserError(f"{self.found.memory()}.")
        self.doing.append("training")
        self.memory.forget()
        yield from self._step(stream)  # the first of its size: libraries choose their kernels
        began, steps = self._now(), 0
        while steps < PROBE_STEPS and self._longest(self._now() - began) < PROBE_SECONDS:
            yield from self._step(stream)
            steps += 1
        self.found.step_seconds = (self._now() - began) / steps
        self.found.note_peak("training", self.memory.peak())

    def _step(self, stream: Iterator[dict[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
        yield from islice(stream, self.config.accumulate)

    def update(self, *arguments: Any, **named: Any) -> None:
        if self._watched is not None:
            self._counted[-1] = max(self._counted[-1], self._watched.sizes, key=sum)
        super().update(*arguments, **named)
        if self._watched is not None:
            self._watched.clear()

    def _foresee(self) -> None:
        """The memory of a whole batch, and of smaller ones: what a sample adds is the same for each."""
        few = (min(self.batch, FEW[0]), min(self.batch, FEW[1]))
        counted = self._counted[0], self._counted[1]
        held = lasting(self.placed, self.parts)
        beside = self.memory.held() + held["gradients"] - self._shared_out(held)
        self.found.bytes |= held | {"activations": foreseen(few, counted, self.batch)}
        self.found.room, whole = self.memory.room(), self.batch * self.config.accumulate
        self.found.by_accumulate = {
            whole // batch: beside + foreseen(few, counted, batch)
            for batch in range(self.batch, 0, -1)
            if whole % batch == 0
        }

    def _shared_out(self, held: dict[str, int]) -> int:
        """Bytes of what is `held` here that other processes hold in the run that this is about."""
        return 0

    def _note_cache(self, first: FirstPictures) -> None:
        cache = self.out / "cache"
        for folder in cache.iterdir():
            ratio = first.ratios["text" if folder.name.startswith("text") else "latents"]
            self.found.disk["cache"] += round(ratio * folder_bytes(folder))
        written = max(path.stat().st_mtime for path in cache.rglob("*"))
        self.found.cache_seconds = (written - first.began) * first.ratios["latents"]

    def _now(self) -> float:
        if self.memory.gpu:
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def _longest(self, seconds: float) -> float:
        """Of all processes, so that all do the same number of steps."""
        return float(self.accelerator.gather(torch.tensor([seconds], device=self.device)).max())

    # --- what is done every so many steps ------------------------------------------------------------------------

    def due(self, every: int) -> bool:
        self._close()
        if not self._last or not self.accelerator.sync_gradients:
            return False
        self.doing.append("showing, logging or exporting")
        self.memory.forget()
        self._every = (every, self._now(), self._lasting())
        return True

    def _close(self) -> None:
        if self._every is not None:
            every, began, before = self._every
            times = math.ceil((self.found.steps - self.found.done) / every)
            self.found.repeated_seconds += (self._now() - began) * times
            self.found.disk["pictures and logs"] += (self._lasting() - before) * times
            self.found.note_peak("validation", self.memory.peak())
        self._every = None

    def _lasting(self) -> int:
        """Bytes of what is added to the folder and never replaced."""
        replaced = ("cache", "checkpoints", "model")
        return folder_bytes(self.out) - sum(folder_bytes(self.out / name) for name in replaced)

    def save(self) -> None:
        self.found.note_peak("validation", self.memory.peak())
        self.doing.append("saving a checkpoint")
        self.memory.forget()
        super().save()
        self._writer.wait()
        self.found.note_peak("saving", self.memory.peak())
        self.memory.forget()

    def _stop(self, number: int) -> None:
        raise SystemExit(128 + number)  # there is nothing to go on with

    def end(self, **result: float | str) -> None:
        """Print what was found. UserError if the disk has not the room."""
        self.found.finish_seconds += self._now() - self._looped
        super().end(**result)
        if not self.main:
            return
        saved = next((self.out / "checkpoints").iterdir())
        more = self.found.keep + 1  # before one is removed
        self.found.disk["checkpoints"] = folder_bytes(saved) * more
        self.found.disk["model"] = 2 * folder_bytes(self.out / "model")  # written beside the one before
        print(self.found.report(self.home))
        self.found.check_disk(self.home)
