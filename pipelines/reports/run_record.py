"""What a training run has left in its folder, read without a model or data."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from ldm.config import UserError
from pipelines.evaluation.extractors import first_line
from pipelines.reports import run_plots

SHOWN_STEPS = 6
"""Looks at the same prompts, from the first to the last, that are shown side by side"""
LOSSES = ("_loss_ema", "_loss_raw")
JUDGED = ("_satisfied", "_distance", "psnr_db", "_ssim", "_lpips")
"""Ends of the names of what a run is judged by while it trains"""


@dataclass(frozen=True)
class Record:
    """What lies in a run's folder."""

    folder: Path
    recipe: dict[str, Any]
    """config.yaml"""
    lines: run_plots.Lines
    """metrics.jsonl; empty if nothing has been logged yet"""
    starts: list[dict[str, Any]]
    """history.jsonl: one entry each time that the run was started"""
    result: dict[str, Any]
    """result.json; empty if the run has not ended"""

    @property
    def latent(self) -> bool:
        """Whether it is a run of stage 2."""
        return "autoencoder" in self.recipe

    @property
    def step(self) -> int:
        """The last that is known of."""
        return max([line["step"] for line in self.lines] + [self.result.get("step", 0)])


def read_record(folder: Path) -> Record:
    """UserError if the folder is not that of a run."""
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder} holds no config.yaml; give the folder of a training run.")
    recipe = read_recipe(folder / "config.yaml")
    there = (folder / "metrics.jsonl").is_file() and (folder / "metrics.jsonl").stat().st_size
    history = folder / "history.jsonl"
    written = history.read_text().splitlines() if history.is_file() else []
    result = folder / "result.json"
    return Record(
        folder,
        recipe,
        run_plots.logged(folder) if there else [],
        [json.loads(line) for line in written],
        json.loads(result.read_text()) if result.is_file() else {},
    )


def read_recipe(file: Path) -> dict[str, Any]:
    """UserError if the file is not the recipe of a run."""
    try:
        recipe = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as problem:
        raise UserError(
            f"{file} is no YAML ({first_line(problem)}); give the folder of a training run."
        ) from None
    run = recipe.get("run") if isinstance(recipe, dict) else None
    if not isinstance(run, dict) or not {"steps", "batch_size"} <= run.keys():
        raise UserError(f"{file} is no recipe of a run, with run.steps; give the folder of a training run.")
    return recipe


def stage_one_of(record: Record) -> Record | None:
    """The run of the autoencoder, where the recipe says or beside this run; None if it is neither."""
    name = Path(str(record.recipe["autoencoder"]))
    for folder in (name, record.folder.resolve().parent / name.name):
        if (folder / "config.yaml").is_file():
            return read_record(folder)
    return None


def newest(record: Record) -> dict[str, float]:
    """The last value of what a run is judged by."""
    found: dict[str, float] = {}
    for name in run_plots.names(record.lines):
        if name == "loss" or name.endswith((LOSSES[0], *JUDGED)):
            found[name] = run_plots.points(record.lines, name)[1][-1]
    return found


def batch(record: Record) -> int:
    return int(record.recipe["run"]["batch_size"])


def sheets(folder: Path, name: str, most: int = SHOWN_STEPS) -> list[tuple[int, Image.Image]]:
    """Pictures that a run saved as samples/NAME-STEP.png with their steps; `most` of them, evenly spread."""
    files = sorted((folder / "samples").glob(f"{name}-*.png"))
    if len(files) > most:
        files = [files[i * (len(files) - 1) // (most - 1)] for i in range(most)]
    return [(int(file.stem.rpartition("-")[2]), Image.open(file)) for file in files]
