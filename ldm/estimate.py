"""A run, and what it would have taken if it runs out of memory: the estimate of a dry run that tries no whole batch."""

from __future__ import annotations

import gc
import os
import shutil
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor

from ldm.dry_run import FEW, DryRun, new_findings
from ldm.faults import out_of_memory
from ldm.findings import Findings
from ldm.memory import lasting
from ldm.training import Run

Train = Callable[[Any, Run], None]


def undertake(recipe: Any, train: Train, rehearsed: Train) -> None:
    """The run of a recipe, `train(recipe, run)`. Memory that runs out in it does so with a note of what it takes.

    Args:
        rehearsed: `train` as a dry run calls it.
    """
    run = Run(recipe.run, recipe)
    try:
        with run.signals:
            train(recipe, run)
    except Exception as problem:
        if not out_of_memory(problem):
            raise
        held = sum(lasting(run.placed, run.parts).values())
        share = recipe.run.batch_size // run.accelerator.num_processes
        alone = replace(recipe.run, batch_size=share, shard=False, tracker="none")
        rank, sharded = run.accelerator.process_index, run.sharded
        print("out of memory; working out what this run takes", file=sys.stderr, flush=True)
        traceback.clear_frames(problem.__traceback__)
        del run
        problem.add_note(estimated(replace(recipe, run=alone), rehearsed, rank, held if sharded else None))
        raise


def estimated(recipe: Any, rehearsed: Train, rank: int, held: int | None) -> str:
    """What the recipe takes on one process, in words, from a rehearsal in a folder within the run's."""
    _leave_others()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    scratch = recipe.run.out / f".estimate-{rank}.writing"  # the next start removes what a kill leaves
    doing, found = ["starting"], new_findings(recipe)
    try:
        rehearsed(recipe, Estimate(recipe, scratch, doing, found, held))
    except Known:
        return found.memory()
    except (
        Exception
    ) as problem:  # whatever keeps the estimate from being made, the first problem is the one to tell
        return f"{found.memory()} (not all of it is known, as {doing[-1]} failed too: {problem})"
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return found.memory()


def _leave_others() -> None:
    """Have Accelerate forget the other processes of a run that has failed: what follows concerns this one alone."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        os.environ.pop(name, None)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


class Known(Exception):
    """All that was to be found out is."""


class Estimate(DryRun):
    """A dry run without a word and without whole batches, which ends once everything has been saved.

    Args:
        held: bytes that last from step to step in the run itself, if its processes share them out.
    """

    def __init__(
        self, recipe: Any, scratch: Any, doing: list[str], found: Findings, held: int | None
    ) -> None:
        self._held = held
        super().__init__(recipe, scratch, doing, found)

    def _open_folder(self) -> list[str]:
        shutil.rmtree(self.out, ignore_errors=True)
        self.out.mkdir(parents=True)
        self._take_over_inspection()
        return []

    def say(self, text: str) -> None:
        pass

    def _shared_out(self, held: dict[str, int]) -> int:
        return 0 if self._held is None else sum(held.values()) - self._held

    def _probe(self, stream: Iterator[dict[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
        yield from ()

    def _step(self, stream: Iterator[dict[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
        for batch in super()._step(stream):
            yield {name: values[: FEW[-1]] for name, values in batch.items()}

    def _finish(self) -> None:
        raise Known
