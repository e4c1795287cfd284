"""`ldm report`: a training run on one page that needs no server and no network.

What was trained with which recipe, how it went, what it draws, what was measured and how, where and for how long. All
of it is read from the run's folder; what is not there is said to be missing, not left out in silence.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
import yaml
from matplotlib.figure import Figure
from PIL import Image

from ldm.config import UserError, flat
from pipelines import run_plots
from pipelines.page import Page
from pipelines.sheets import tiles

SHOWN_STEPS = 6
"""Looks at the same prompts, from the first to the last, that are shown side by side"""
SHOWN_PICTURES = 8
"""Reconstructed pictures, likewise"""


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
    recipe = yaml.safe_load((folder / "config.yaml").read_text())
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


def report(run: Path, out: Path | None = None) -> Path:
    """Write the page about a run of either stage, by default as RUN/report.html; gives where it lies.

    Raises:
        UserError: `run` is not the folder of a training run.
    """
    record = read_record(run)
    first = stage_one_of(record) if record.latent else record
    page = Page(f"{'Latent model' if record.latent else 'Autoencoder'} {run.resolve().name}")
    opening(page, record)
    page.contents()
    if record.latent:
        samples(page, record)
    curves(page, record)
    reconstructions(page, record, first)
    metrics(page, record)
    timings(page, record)
    recipe(page, record)
    environment(page, record)
    out = out or run / "report.html"
    page.save(out)
    return out


def stage_one_of(record: Record) -> Record | None:
    """The run of the autoencoder, where the recipe says or beside this run; None if it is neither."""
    name = Path(str(record.recipe["autoencoder"]))
    for folder in (name, record.folder.resolve().parent / name.name):
        if (folder / "config.yaml").is_file():
            return read_record(folder)
    return None


def opening(page: Page, record: Record) -> None:
    """Whether it has ended, and the figures that everybody asks for first."""
    steps = record.recipe["run"]["steps"]
    if record.result:
        page.verdict(f"Finished after {record.step:,} steps.", "good")
    else:
        page.verdict(f"Not finished: {record.step:,} of {steps:,} steps are known of.", "doubtful")
    facts = {"steps": f"{record.step:,} of {steps:,}", "samples seen": f"{record.step * batch(record):,}"}
    if "seconds" in record.result:
        facts["time"] = duration(record.result["seconds"])
    _, speeds = run_plots.speeds(record.lines, batch(record))
    if speeds:
        facts["pictures a second"] = number(sorted(speeds)[len(speeds) // 2])
    facts |= {name.replace("_", " "): number(value) for name, value in newest(record).items()}
    page.facts(facts)
    for name, what in (
        ("skipped.jsonl", "steps were skipped for want of a finite gradient"),
        ("bad_pictures.jsonl", "pictures could not be read and were left out"),
    ):
        if (record.folder / name).is_file():
            count = len((record.folder / name).read_text().splitlines())
            page.verdict(f"{count:,} {what}; they are named in {name}.", "doubtful")


def newest(record: Record) -> dict[str, float]:
    """The last value of what a run is judged by."""
    found: dict[str, float] = {}
    for name in run_plots.names(record.lines):
        if name == "loss" or name.endswith(
            ("_loss_ema", "_satisfied", "_distance", "psnr_db", "ssim", "lpips")
        ):
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


def samples(page: Page, record: Record) -> None:
    """Each prompt's pictures over the course of training, from the same noise."""
    page.heading("Samples")
    looks = sheets(record.folder, "drawn")
    if not looks:
        page.text("No samples have been saved.")
        return
    show = record.recipe["show"]
    page.text(
        "Drawn with the averaged weights, each prompt from the same noise at every look: "
        f"{show['steps']} steps, guidance {show['guidance']:g}."
    )
    cut = [(step, tiles(sheet)) for step, sheet in looks]
    if not all(parts for _, parts in cut):  # saved by an older version
        whole(page, looks)
        return
    for i, (prompt, _) in enumerate(cut[-1][1]):
        page.subheading(prompt or f"picture {i + 1}")
        there = [(step, parts[i][1]) for step, parts in cut if i < len(parts)]
        page.tiles([image for _, image in there], [f"step {step:,}" for step, _ in there])


def whole(page: Page, looks: Sequence[tuple[int, Image.Image]]) -> None:
    for step, sheet in looks:
        page.picture(sheet.convert("RGB"), f"step {step:,}")


def curves(page: Page, record: Record) -> None:
    page.heading("Curves")
    if not record.lines:
        page.text("Nothing has been logged.")
        return
    page.plots(list(panels(record)))
    if run_plots.by_level(record.lines):
        page.text(
            "Held-out losses are of the same pictures with the same noise at every look. ln SNR is the logarithm of "
            "signal over noise power: high is nearly clean, low is nearly noise."
        )
    elif record.latent:
        page.text("No loss by noise level was measured (validation.every).")


def panels(record: Record) -> Iterator[Figure]:
    """Loss first, then by noise level, speed, and all the rest that was logged."""
    lines, noted = record.lines, run_plots.names(record.lines)
    together = [name for name in noted if name == "loss" or name.endswith(("_loss_ema", "_loss_raw"))]
    yield run_plots.panel(lines, together, "loss")
    if found := run_plots.by_level(lines):
        for draw in (run_plots.draw_levels, run_plots.draw_last):
            figure = run_plots.small()
            draw(figure.subplots(), found)
            yield figure
    steps, speeds = run_plots.speeds(lines, batch(record))
    if speeds:
        figure = run_plots.small()
        axes = figure.subplots()
        run_plots.curve(axes, steps, speeds)
        axes.set_ylim(bottom=0)
        run_plots.tidy(axes, "pictures a second (saving and validation included)")
        yield figure
    for name in noted:
        if name not in together:
            yield run_plots.panel(lines, [name], name.replace("_", " "))


def reconstructions(page: Page, record: Record, first: Record | None) -> None:
    """What the autoencoder makes of pictures: over the course of its training, if the looks say what is where."""
    page.heading("Reconstructions")
    if first is None:
        page.text(
            f"The run of the autoencoder is not at {record.recipe['autoencoder']}, nor beside this one."
        )
        return
    looks = sheets(first.folder, "reconstructions")
    figures = {
        name: number(value) for name, value in first.result.items() if name.endswith(("_db", "ssim", "lpips"))
    }
    said = ", ".join(
        f"{name.removesuffix('_db').replace('_', ' ')} {value}" for name, value in figures.items()
    )
    split = first.result.get("psnr_split")
    page.text(
        f"Of the autoencoder in {first.folder.name}"
        + f": {said}" * bool(said)
        + f" on split {split}" * bool(split)
        + "."
    )
    cut = [(step, by_caption(sheet)) for step, sheet in looks]
    if cut and all(rows.get("original") and rows.get("EMA") for _, rows in cut):
        for i in range(min(SHOWN_PICTURES, len(cut[0][1]["original"]))):
            page.tiles(
                [cut[0][1]["original"][i], *(rows["EMA"][i] for _, rows in cut)],
                ["original", *(f"step {step:,}" for step, _ in cut)],
            )
    elif (first.folder / "reconstructions.png").is_file():
        page.picture(
            Image.open(first.folder / "reconstructions.png"), "originals, and what is made of them below"
        )
    elif looks:
        whole(page, looks[-1:])
    else:
        page.text("No reconstructions have been saved.")


def by_caption(sheet: Image.Image) -> dict[str, list[Image.Image]]:
    """The pictures of a sheet, those with one caption together."""
    found: dict[str, list[Image.Image]] = {}
    for caption, image in tiles(sheet):
        found.setdefault(caption, []).append(image)
    return found


def metrics(page: Page, record: Record) -> None:
    """What `ldm evaluate` has left in RUN/evaluations, each figure with how it was measured."""
    page.heading("Metrics")
    files = sorted((record.folder / "evaluations").glob("*.json"))
    if not files:
        page.text("Nothing has been measured yet; see ldm evaluate.")
    for file in files:
        page.subheading(file.stem)
        try:
            found = json.loads(file.read_text())
            rows = [
                [name, number(figure["value"]), spread(figure), interval(figure)]
                for name, figure in found["figures"].items()
            ]
            pictures = [
                (Image.open(file.parent / name), what) for what, name in found.get("pictures", {}).items()
            ]
            protocol = flat(found["protocol"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as problem:
            page.verdict(f"{file.name} can't be read: {problem!r}", "bad")
            continue
        page.table(["figure", "value", "standard error", "95 % interval"], rows)
        for image, what in pictures:
            page.picture(image, what.replace("_", " "))
        page.details(
            "how this was measured", "\n".join(f"{name}: {value}" for name, value in protocol.items())
        )


def spread(figure: Mapping[str, Any]) -> str:
    return "" if figure.get("error") is None else f"± {number(figure['error'])}"


def interval(figure: Mapping[str, Any]) -> str:
    ends = figure.get("interval")
    return "" if not ends else f"{number(ends[0])} to {number(ends[1])}"


def timings(page: Page, record: Record) -> None:
    page.heading("Timings")
    rows = [["steps", f"{record.step:,}"], ["samples seen", f"{record.step * batch(record):,}"]]
    if "seconds" in record.result:
        rows.append(["from the start to the result, all starts together", duration(record.result["seconds"])])
    _, speeds = run_plots.speeds(record.lines, batch(record))
    if speeds:
        rows.append(["pictures a second, median", number(sorted(speeds)[len(speeds) // 2])])
        rows.append(["slowest, fastest interval", f"{number(min(speeds))}, {number(max(speeds))}"])
    rows.append(["starts", f"{len(record.starts):,}" if record.starts else "not recorded"])
    page.table(["", ""], rows)


RECIPE = {
    "data": "data.path",
    "split": "data.split",
    "size in pixels": "data.size",
    "told": "conditioning.kind",
    "text encoder": "conditioning.text.encoder",
    "kind": "kind",
    "channels": "network.block_out_channels",
    "noise path": "path.kind",
    "prediction": "prediction",
    "sampler": "sampler",
    "optimizer": "optimizer.name",
    "learning rate": "optimizer.lr",
    "batch": "run.batch_size",
    "precision": "run.precision",
    "seed": "run.seed",
}
"""What the page says of a recipe without being asked"""


def recipe(page: Page, record: Record) -> None:
    page.heading("Recipe")
    said = {key: value for key, value in flat(record.recipe).items() if value is not None}
    page.facts({name: words(said[key]) for name, key in RECIPE.items() if key in said})
    page.details(
        "config.yaml, every setting",
        yaml.safe_dump(record.recipe, sort_keys=False, allow_unicode=True, width=72),
    )


def environment(page: Page, record: Record) -> None:
    page.heading("Environment")
    if record.starts:
        page.table(
            ["started", "at step", "on"],
            [
                [
                    f"{datetime.fromtimestamp(start['time']):%Y-%m-%d %H:%M}",
                    f"{start['step']:,}",
                    ", ".join(
                        f"{words(value)} {name}" if name == "processes" else f"{name} {words(value)}"
                        for name, value in start.items()
                        if name not in ("time", "step", "changed")
                    ),
                ]
                for start in record.starts
            ],
        )
        changes = [change for start in record.starts for change in start.get("changed", ())]
        if changes:
            page.text("Settings that were changed between starts:")
            page.list(changes)
    else:
        page.text("Where it was trained has not been recorded.")
    page.text(
        f"This page was made on {datetime.now():%Y-%m-%d} with Python {platform.python_version()} and torch "
        f"{torch.__version__} on {platform.system()} {platform.machine()}."
    )


def number(value: float) -> str:
    """Four digits, as people write them."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def words(value: Any) -> str:
    """A setting in a few words."""
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def duration(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    return f"{hours:.1f} h" if hours >= 2 else f"{minutes:.1f} min" if minutes >= 2 else f"{seconds:.0f} s"
