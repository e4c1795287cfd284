"""A run's folder: made, mended after a crash, and kept from being gone on with by another recipe."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from typing import Any

import torch
import yaml

from autoencoder.files import mend
from ldm.config import UserError, differences, filled, plain
from ldm.contract import begun

IMMATERIAL = (
    "run.out",
    "run.save_every",
    "run.log_every",
    "run.keep",
    "run.tracker",
    "run.timeout",
    "run.accumulate",
    "run.shard",
    "run.gradient_checkpointing",
    "run.compile",
    "show",
    "validation",
    "readiness",
    "workers",
    "autoencoder",
    "data.path",
    "data.bad_share",
    "data.max_megapixels",
)
"""Settings that may change between two starts of one run without changing what it learns: the contract holds the
autoencoder and the pictures, wherever they lie. Neither does run.steps before the learning rate has begun to fall."""
OF_THE_RESULT = ("sampler", "spacing")
"""These are written into the model that a run ends with, and may change until then."""


def open_folder(out: Path, recipe: Any) -> list[str]:
    """Make the folder, or clear what killed writes left in it; gives what `changed_settings` does.

    Raises:
        UserError: it can't be made, or holds a run with other settings that matter.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise UserError(f"The run folder {out} can't be made: {problem.strerror}; set run.out.") from None
    mend(out)
    mend(out / "checkpoints")
    return changed_settings(out, recipe)


def changed_settings(out: Path, recipe: Any) -> list[str]:
    """Which settings have changed since the last start of the run in a folder, if there is one.

    Raises:
        UserError: one that matters has.
    """
    saved = out / "config.yaml"
    if not saved.exists() or not begun(out):
        return []
    before = filled(yaml.safe_load(saved.read_text()), recipe)
    changed = differences(before, plain(recipe))
    steps = before["run"]["steps"]
    may_change = IMMATERIAL + (("run.steps",) if _same_steps(out, recipe, steps) else ())
    may_change += () if is_finished(out, steps) else OF_THE_RESULT
    material = [change for change in changed if not change.startswith(may_change)]
    if material:
        raise UserError(
            f"{out} holds a run with other settings: {'; '.join(material)}. "
            "Set them back to go on with it, or choose another run.out."
        )
    return changed


def _same_steps(out: Path, recipe: Any, steps: int) -> bool:
    """Whether all steps done so far of a run of `steps` were those of a run of as many as the recipe says."""
    done = max((int(step.name.removeprefix("step-")) for step in out.glob("checkpoints/step-*")), default=0)
    schedules = [recipe.optimizer]
    if hasattr(recipe, "gan_optimizer") and recipe.loss.gan.weight:
        schedules.append(recipe.gan_optimizer)
    if done == steps and getattr(recipe, "kind", "") == "vq":
        return False  # the last step starts no unused codes again
    return done <= recipe.run.steps and all(
        rates.rate(step, steps) == rates.rate(step, recipe.run.steps)
        for rates in schedules
        for step in range(done)
    )


def environment(device: torch.device) -> dict[str, str]:
    """What a run runs on, in words, for history.jsonl."""
    cuda = device.type == "cuda"
    machine = torch.cuda.get_device_name(device) if cuda else platform.processor() or platform.machine()
    return {
        "device": str(device),
        "machine": machine,
        "cores": str(len(os.sched_getaffinity(0))),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def is_finished(out: Path, steps: int) -> bool:
    """Whether the run in `out` has been trained to step `steps` and has its result."""
    try:
        return json.loads((out / "result.json").read_text())["step"] == steps
    except (OSError, ValueError, KeyError):
        return False
