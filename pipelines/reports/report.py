"""`ldm report`: a training run on one page that needs no server and no network.

What was trained with which recipe, how it went, what it draws, what was measured and how, where and for how long. All
of it is read from the run's folder; what is not there is said to be missing, not left out in silence.
"""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Any

import torch
import yaml
from matplotlib.figure import Figure
from PIL import Image

from autoencoder.untrusted import inside
from ldm.config import flat
from pipelines.evaluation.compare import in_words
from pipelines.reports import run_plots
from pipelines.reports.page import Page
from pipelines.reports.run_record import (
    JUDGED,
    LOSSES,
    Record,
    batch,
    newest,
    read_record,
    sheets,
    stage_one_of,
)
from pipelines.sheets import tiles

SHOWN_PROMPTS = 16
SHOWN_PICTURES = 8
"""That are reconstructed"""


def report(run: Path, out: Path | None = None) -> Path:
    """Write the page about a run of either stage, by default as RUN/report.html; gives where it lies.

    Raises:
        UserError: `run` is not the folder of a training run.
    """
    record = read_record(run)
    first = stage_one_of(record) if record.latent else record
    page = Page(f"{'Latent model' if record.latent else 'Autoencoder'} {run_plots.name_of(run)}")
    opening(page, record)
    page.contents()
    if record.latent:
        samples(page, record)
    curves(page, record)
    reconstructions(page, record, first)
    page.heading("Metrics")
    metrics(page, record)
    if first and first is not record:
        metrics(page, first)
    timings(page, record)
    recipe(page, record)
    environment(page, record)
    out = out or run / "report.html"
    page.save(out)
    return out


def opening(page: Page, record: Record) -> None:
    """Whether it has ended, and the figures that everybody asks for first."""
    steps = record.recipe["run"]["steps"]
    if record.result:
        page.verdict(f"Finished after {record.step:,} steps.", "good")
    else:
        page.verdict(f"Under way, or stopped: {record.step:,} of {steps:,} steps so far.", "doubtful")
    reached = f"{record.step:,}" if record.result else f"{record.step:,} of {steps:,}"
    facts = {"steps": reached, "samples seen": f"{record.step * batch(record):,}"}
    if "seconds" in record.result:
        facts["time"] = duration(record.result["seconds"])
    _, speeds = run_plots.speeds(record.lines, batch(record))
    if speeds:
        facts["pictures a second"] = f"{median(speeds):.3g}"
    facts |= {run_plots.title_of(name): number(value) for name, value in newest(record).items()}
    page.facts(facts)
    for name, what in (
        ("skipped.jsonl", "steps were skipped for want of a finite gradient"),
        ("bad_pictures.jsonl", "pictures could not be read and were left out"),
    ):
        if (record.folder / name).is_file():
            count = len((record.folder / name).read_text().splitlines())
            page.verdict(f"{count:,} {what}; they are named in {name}.", "doubtful")


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
    step, newest_look = cut[-1]
    if len(newest_look) > 1:
        page.subheading(f"At step {step:,}")
        page.tiles([image for _, image in newest_look], [prompt for prompt, _ in newest_look])
    for i, (prompt, _) in enumerate(newest_look[:SHOWN_PROMPTS]):
        page.subheading(prompt or f"picture {i + 1}")
        there = [(step, parts[i][1]) for step, parts in cut if i < len(parts)]
        page.tiles([image for _, image in there], [f"step {step:,}" for step, _ in there])
    if len(newest_look) > SHOWN_PROMPTS:
        page.text(f"How {len(newest_look) - SHOWN_PROMPTS} more came about is on the sheets in samples/.")


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
            "Losses by noise level are of the same pictures with the same noise at every look. ln SNR is the logarithm "
            "of signal over noise power: high is nearly clean, low is nearly noise."
        )
    elif record.latent:
        page.text("No loss by noise level was measured (validation.every).")


def panels(record: Record) -> Iterator[Figure]:
    """Loss first, also by noise level; then what a run is judged by, speed, and all the rest that was logged."""
    lines, noted = record.lines, run_plots.names(record.lines)
    together = [name for name in noted if name == "loss" or name.endswith(LOSSES)]
    judged = [name for name in noted if name.endswith(JUDGED)]
    yield run_plots.panel(lines, together, "loss")
    if found := run_plots.by_level(lines):
        for draw in run_plots.kinds_of_levels(found):
            figure = run_plots.small()
            draw(figure.subplots(), found)
            yield figure
    for name in judged:
        if len(run_plots.points(lines, name)[0]) > 1:  # a single one stands above, as a figure
            yield run_plots.panel(lines, [name], run_plots.title_of(name))
    steps, speeds = run_plots.speeds(lines, batch(record))
    if speeds:
        figure = run_plots.small()
        axes = figure.subplots()
        run_plots.curve(axes, steps, speeds)
        axes.set_ylim(bottom=0)
        run_plots.against_steps(axes, "pictures a second (saving and validation included)")
        yield figure
    for name in noted:
        if name not in together + judged:
            yield run_plots.panel(lines, [name], run_plots.title_of(name))


def reconstructions(page: Page, record: Record, first: Record | None) -> None:
    """What the autoencoder makes of pictures: over the course of its training, if the looks say what is where."""
    page.heading("Reconstructions")
    if first is None:
        where = record.recipe["autoencoder"]
        page.text(
            f"The autoencoder's run is neither at {where} nor beside this one, so that they can't be shown."
        )
        return
    page.text(f"By the autoencoder of {first.folder.resolve().name}{said_of(first)}. Averaged weights.")
    looks = [(step, by_caption(sheet)) for step, sheet in sheets(first.folder, "reconstructions")]
    final = first.folder / "reconstructions.png"
    if looks and all({"original", "EMA"} <= rows.keys() for _, rows in looks):
        originals = looks[-1][1]["original"][:SHOWN_PICTURES]
        for i, original in enumerate(originals):
            made = {f"step {step:,}": rows["EMA"][i] for step, rows in looks}
            page.tiles([original, *made.values()], ["original", *made])
    elif final.is_file():
        page.picture(Image.open(final), "originals, and below each what is made of it")
    else:
        page.text("No reconstructions have been saved.")


def said_of(record: Record) -> str:
    """What a run of stage 1 has measured at its end, as a part of a sentence."""
    figures = {"psnr_db": "PSNR {} dB", "ssim": "SSIM {}", "lpips": "LPIPS {}"}
    told = [of.format(number(record.result[name])) for name, of in figures.items() if name in record.result]
    split = record.result.get("psnr_split")
    return f": {', '.join(told)}" * bool(told) + f" on split {split}" * bool(split)


def by_caption(sheet: Image.Image) -> dict[str, list[Image.Image]]:
    """The pictures of a sheet, those with one caption together."""
    found: dict[str, list[Image.Image]] = {}
    for caption, image in tiles(sheet):
        found.setdefault(caption, []).append(image)
    return found


def metrics(page: Page, record: Record) -> None:
    """What `ldm evaluate` has left in RUN/evaluations, each figure with how it was measured."""
    name = record.folder.resolve().name
    files = sorted((record.folder / "evaluations").glob("*.json"))
    if not files:
        page.text(f"Nothing has been measured of {name} yet: that is done by the command ldm evaluate.")
    for file in files:
        page.subheading(f"{name}: {file.stem}")
        try:
            evaluation(page, json.loads(file.read_text()), file.parent)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as problem:
            page.verdict(f"{file.name} can't be read: {problem!r}", "bad")


def evaluation(page: Page, found: Mapping[str, Any], folder: Path) -> None:
    """Figures, the pictures that lie beside them, and the protocol."""
    rows = [[in_words(name), *said(figure)] for name, figure in found["figures"].items()]
    missing = [f"{in_words(name)}: {reason}" for name, reason in found.get("left_out", {}).items()]
    about = {name: found[name] for name in ("measured", "data") if name in found}
    protocol = "\n".join(f"{name}: {value}" for name, value in flat(about | found["protocol"]).items())
    pictures = {name: Image.open(inside(folder, file)) for name, file in found.get("pictures", {}).items()}
    page.table(["figure", "value ± standard error", "95 % interval"], rows)
    if missing:
        page.text("Not measured:")
        page.list(missing)
    page.details("How this was measured", protocol)
    for name, picture in pictures.items():
        page.picture(picture.convert("RGB"), PICTURES.get(name, name.replace("_", " ")))


PICTURES = {
    "drawn": "Some of the drawn pictures.",
    "nearest": "The drawn pictures that come nearest to training pictures, each above these.",
    "reconstructions": "Real pictures, each above what the autoencoder gives back of it.",
}
"""What lies beside a result"""


def said(figure: Mapping[str, Any]) -> tuple[str, str]:
    """The value with its standard error, and the interval, both to the second digit of the error."""
    value, error, ends = figure["value"], figure.get("error"), figure.get("interval")
    if not error:
        return number(value), f"{number(ends[0])} to {number(ends[1])}" if ends else ""
    digits = max(0, 1 - math.floor(math.log10(error)))
    low_high = f"{ends[0]:,.{digits}f} to {ends[1]:,.{digits}f}" if ends else ""
    return f"{value:,.{digits}f} ± {error:,.{digits}f}", low_high


def timings(page: Page, record: Record) -> None:
    page.heading("Timings")
    rows = [["steps", f"{record.step:,}"], ["samples seen", f"{record.step * batch(record):,}"]]
    if "seconds" in record.result:
        rows.append(["from the start to the result, all starts together", duration(record.result["seconds"])])
    _, speeds = run_plots.speeds(record.lines, batch(record))
    if speeds:
        rows.append(["pictures a second, median", f"{median(speeds):.3g}"])
        rows.append(["slowest, fastest interval", f"{min(speeds):.3g}, {max(speeds):.3g}"])
    rows.append(["starts", f"{len(record.starts):,}" if record.starts else "not recorded"])
    page.table([], rows)


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
        page.table(["started", "at step", "on"], [start_of(start) for start in record.starts])
    else:
        page.text("Where it was trained has not been recorded.")
    changes = [change for start in record.starts for change in start.get("changed", ())]
    if changes:
        page.text("Settings that were changed between starts:")
        page.list(changes)
    page.text(
        f"This page was made on {datetime.now():%Y-%m-%d} with Python {platform.python_version()} and torch "
        f"{torch.__version__} on {platform.system()} {platform.machine()}."
    )


def start_of(start: Mapping[str, Any]) -> list[str]:
    """A line of history.jsonl as a row: when, at which step, on what."""
    on = [f"{name} {words(it)}" for name, it in start.items() if name not in ("time", "step", "changed")]
    return [f"{datetime.fromtimestamp(start['time']):%Y-%m-%d %H:%M}", f"{start['step']:,}", ", ".join(on)]


def number(value: float) -> str:
    """Four digits, as people write them."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def words(value: Any) -> str:
    """A setting in a few words."""
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def duration(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    return f"{hours:.1f} h" if hours >= 2 else f"{minutes:.1f} min" if minutes >= 2 else f"{seconds:.0f} s"
