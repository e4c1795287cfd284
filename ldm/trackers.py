"""Trackers by the names that Accelerate gives them: checked early, told the recipe, shown pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import LoggerType
from PIL import Image

from ldm.config import UserError, flat, plain


def chosen_tracker(name: str) -> str | None:
    """What Accelerate is to be given for `run.tracker`, None for none; it passes over missing packages in silence.

    Raises:
        UserError: there is no such tracker, or its package is not installed.
    """
    if name == "none":
        return None
    if name not in LOGGER_TYPE_TO_CLASS:
        raise UserError(
            f"run.tracker is {name!r}; choose none or one of {', '.join(sorted(LOGGER_TYPE_TO_CLASS))}."
        )
    if name in LoggerType.list() and name not in {str(tracker) for tracker in get_available_trackers()}:
        raise UserError(
            f"run.tracker is {name}, but the package {name} is not installed; pip install {name}, or set it to none."
        )
    return name


def start(accelerator: Accelerator, name: str, recipe: Any, out: Path) -> None:
    """Open the tracker, its files in OUT/NAME or its project named as the run's folder, and log the settings."""
    local = LOGGER_TYPE_TO_CLASS[name].requires_logging_directory
    accelerator.init_trackers(name if local else out.resolve().name, config=settings(recipe))


def settings(recipe: Any) -> dict[str, bool | int | float | str]:
    """{"run.seed": 0, "data.path": "scenes", ...}: trackers take single values, so the others become text."""
    return {
        key: value if isinstance(value, bool | int | float | str) else str(value)
        for key, value in flat(plain(recipe)).items()
    }


def log_picture(tracker: Any, name: str, picture: Image.Image, step: int) -> bool:
    """Whether a tracker of Accelerate's takes pictures; if so it is given this one, in the form that it wants."""
    if not hasattr(tracker, "log_images"):
        return False
    if tracker.name == "tensorboard":
        tracker.log_images({name: np.asarray(picture)[None]}, step=step, dataformats="NHWC")
    elif tracker.name in ("aim", "clearml"):
        tracker.log_images({name: np.asarray(picture)}, step=step)
    else:
        tracker.log_images({name: [picture]}, step=step)
    return True
