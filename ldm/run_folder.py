"""A run's folder: made, mended after a crash, and kept from being gone on with by another recipe."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
import time
from pathlib import Path
from typing import IO, Any

import torch
import yaml
from accelerate.utils import broadcast_object_list, gather_object

from autoencoder.files import mend
from ldm.checkpoint import writing
from ldm.config import UserError, differences, filled, plain
from ldm.contract import begun
from ldm.sampling import processors
from ldm.tasks import TASKS

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


OWNER = ".owner"
"""Says which process trains in a run folder, and is locked for as long as it lives"""


def open_folder(out: Path, recipe: Any) -> tuple[IO[str], list[str]]:
    """Make the folder, or clear what killed writes left in it.

    Returns:
        What keeps other starts out until it is closed, and what `changed_settings` gives.

    Raises:
        UserError: it can't be made or written to, another process trains there, or it holds a run with other settings
            that matter.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise UserError(f"The run folder {out} can't be made: {problem.strerror}; set run.out.") from None
    owner = own(out)
    mend(out)
    mend(out / "checkpoints")
    return owner, changed_settings(out, recipe)


def own(out: Path) -> IO[str]:
    """Keep other starts out of a run folder: two that train there at once would replace each other's files.

    The lock is of this process: those that it forks do not hold it, and it is gone whatever ends it.
    """
    with writing(out):
        file = (out / OWNER).open("a+", encoding="utf-8")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as problem:
        if problem.errno in (errno.EACCES, errno.EAGAIN):
            file.seek(0)
            raise UserError(
                f"{out} is being trained in by {file.read() or 'another process'}; "
                "end that one or wait for it, or choose another run.out."
            ) from None  # other errors: a file system without locks, on which nobody is kept out
    with writing(out):
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}, started at {time.strftime('%F %T')}")
        file.flush()
        os.fsync(file.fileno())
    return file


def require_one_folder(out: Path, owner: IO[str] | None) -> None:
    """UserError if a process of this run does not see the folder that the first, which has `owner`, has opened.

    Called by all processes together.
    """
    told = ""
    if owner:
        owner.seek(0)
        told = owner.read()
    (told,) = broadcast_object_list([told])
    seen = owner is not None or ((out / OWNER).exists() and (out / OWNER).read_text() == told)
    blind = sorted({machine for machine in gather_object([None if seen else platform.node()]) if machine})
    if blind:
        raise UserError(
            f"{out} on the machine {', '.join(blind)} is not the folder that the first machine has; "
            "set run.out to one on a disk that all machines see."
        )


def changed_settings(out: Path, recipe: Any) -> list[str]:
    """Which settings have changed since the last start of the run in a folder, if there is one.

    Those of tasks that the recipe does not choose have no effect, and are not compared.

    Raises:
        UserError: one that matters has.
    """
    saved = out / "config.yaml"
    if not saved.exists() or not begun(out):
        return []
    before = filled(yaml.safe_load(saved.read_text()), recipe)
    idle = tuple(f"{task}." for task in TASKS if task != getattr(recipe, "task", None))
    changed = [change for change in differences(before, plain(recipe)) if not change.startswith(idle)]
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
        "cores": str(processors()),
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
