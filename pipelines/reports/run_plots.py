"""What a training run has logged, as figures: for `ldm plot curves`, `ldm plot losses` and the report."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from ldm.config import UserError

WORDS = {
    "ema": "of averaged weights",
    "raw": "of raw weights",
    "psnr": "PSNR",
    "ssim": "SSIM",
    "lpips": "LPIPS",
    "kl": "KL",
}
"""Parts of names, as people write them"""

LEVEL = re.compile(r"(?P<split>.+)_loss_(?P<weights>ema|raw)/ln_snr_(?P<at>-?[\d.]+)")
"""A loss at one noise level, as `ldm.validation` names it"""

FEW = 8
"""Points of a curve up to which each is marked"""

Lines = list[dict[str, Any]]
Points = tuple[list[int], list[float]]
"""Steps, and a value at each"""
Levels = dict[str, dict[float, Points]]
"""Losses on held-out pictures: "test, ema" -> ln SNR, from clean to noise -> points"""


def name_of(run: Path) -> str:
    """Its folder, and the one that it lies in, where the runs on the same pictures are."""
    return "/".join(run.resolve().parts[-2:])


def logged(run: Path) -> Lines:
    """The lines of metrics.jsonl: {"step", "time", and what was noted}.

    Raises:
        UserError: there is none, or it has no whole line yet.
    """
    try:
        written = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    except OSError:
        raise UserError(f"{run} holds no metrics.jsonl; give the folder of a training run.") from None
    lines = [json.loads(line) for line in written if line.endswith("\n")]  # the last may be being written
    if not {name for line in lines for name in line} - {"step", "time"}:
        raise UserError(f"{run}/metrics.jsonl has no lines yet.")
    return lines


def names(lines: Lines) -> list[str]:
    """What was noted, losses first, but for those at single noise levels."""
    noted = {name for line in lines for name in line} - {"step", "time"}
    return sorted(
        (name for name in noted if not LEVEL.fullmatch(name)), key=lambda name: ("loss" not in name, name)
    )


def points(lines: Lines, name: str) -> Points:
    """Steps at which something was noted, and its values."""
    there = [(line["step"], line[name]) for line in lines if name in line]
    return [step for step, _ in there], [value for _, value in there]


def by_level(lines: Lines) -> Levels:
    """The losses on held-out pictures by noise level, of averaged and raw weights; empty if there are none."""
    found: Levels = {}
    for name in dict.fromkeys(name for line in lines for name in line):
        if match := LEVEL.fullmatch(name):
            weights = found.setdefault(f"{match['split']}, {match['weights']}", {})
            weights[float(match["at"])] = points(lines, name)
    return {weights: dict(sorted(levels.items(), reverse=True)) for weights, levels in found.items()}


def speeds(lines: Lines, batch: int) -> Points:
    """Steps, and pictures a second up to each since the line before; stops longer than ten times the median are left
    out, as the run stood still then."""
    gaps = [(b["step"], b["step"] - a["step"], b["time"] - a["time"]) for a, b in pairwise(lines)]
    gaps = [(step, steps, seconds) for step, steps, seconds in gaps if steps > 0 and seconds > 0]
    if not gaps:
        return [], []
    usual = median(seconds / steps for _, steps, seconds in gaps)
    kept = [(step, steps * batch / seconds) for step, steps, seconds in gaps if seconds < 10 * usual * steps]
    return [step for step, _ in kept], [speed for _, speed in kept]


def curve(axes: Axes, steps: list[int], values: list[float], **style: Any) -> None:
    """A line; where there are few points they are marked."""
    axes.plot(steps, values, marker="o" if len(steps) <= FEW else None, markersize=4, **style)


def small() -> Figure:
    """A figure whose letters can be read on a phone, where it is as wide as the window."""
    return Figure(figsize=(4.6, 3.1), layout="constrained")


def panel(lines: Lines, names: list[str], title: str) -> Figure:
    """Some of what was noted against the steps, in one small figure."""
    figure = small()
    axes = figure.subplots()
    for name in names:
        curve(axes, *points(lines, name), label=title_of(name))
    if len(names) > 1:
        axes.legend(fontsize=8, frameon=False)
    against_steps(axes, title)
    return figure


def against_steps(axes: Axes, title: str) -> None:
    """Finish a panel; losses and norms over more than a decade are logarithmic, or their end would lie flat."""
    if (
        any(word in title for word in ("loss", "norm", "reconstruction"))
        and 0 < axes.dataLim.ymin < axes.dataLim.ymax / 10
    ):
        axes.set_yscale("log")
        plain_log(axes.yaxis)
    axes.set_xlim(left=0)
    axes.set_xlabel("step", fontsize=9)
    tidy(axes, title)


def plain_log(axis: Axis) -> None:
    """Ticks of a logarithmic axis at 1, 2, 5, 10 and so on, as people write them."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def tidy(axes: Axes, title: str) -> None:
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def title_of(name: str) -> str:
    """What was noted, in words."""
    if name == "dropped":
        return "share of captions or classes left out"
    said = " ".join(WORDS.get(word, word) for word in name.removesuffix("_db").split("_"))
    return f"{said} (dB)" if name.endswith("_db") else said


def curves(run: Path) -> Figure:
    """Everything that a run has logged against its steps, one panel a name; `losses` shows those by noise level."""
    lines = logged(run)
    noted = names(lines)
    columns = min(3, len(noted))
    rows = -(-len(noted) // columns)
    figure = Figure(figsize=(4.5 * columns, 3 * rows), layout="constrained")
    figure.suptitle(name_of(run), fontsize=9, color="dimgray")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, name in zip(panels, noted, strict=False):
        curve(axes, *points(lines, name))
        against_steps(axes, title_of(name))
    for axes in panels[len(noted) :]:
        axes.remove()
    return figure


def losses(run: Path) -> Figure:
    """Loss on held-out pictures by noise level: over the steps of the run, and the newest; averaged and raw weights.

    Raises:
        UserError: the run has noted none.
    """
    found = by_level(logged(run))
    if not found:
        raise UserError(f"{run} has no losses by noise level; train with validation.every above 0.")
    drawn = kinds_of_levels(found)
    figure = Figure(figsize=(5.2 * len(drawn), 3.9), layout="constrained")
    figure.suptitle(name_of(run), fontsize=9, color="dimgray")
    for draw, axes in zip(drawn, figure.subplots(1, len(drawn), squeeze=False)[0], strict=True):
        draw(axes, found)
    return figure


def kinds_of_levels(found: Levels) -> list[Callable[[Axes, Levels], None]]:
    """What shows losses by noise level: over the steps, if there was more than one look, and the newest."""
    looks = max(len(steps) for levels in found.values() for steps, _ in levels.values())
    return [draw_levels, draw_last] if looks > 1 else [draw_last]


def draw_levels(axes: Axes, found: Levels) -> None:
    """A line for each noise level, dark where there is much noise: of averaged weights, and dotted of raw ones."""
    for weights, levels in found.items():
        shades = colormaps["viridis_r"]
        for i, (at, there) in enumerate(levels.items()):
            colour = shades(0.1 + 0.9 * i / max(1, len(levels) - 1))
            line, label = ("-", f"{at:.1f}") if weights.endswith("ema") else (":", None)
            curve(axes, *there, color=colour, linestyle=line, linewidth=1.2, label=label)
    axes.legend(title="ln SNR", fontsize=7, title_fontsize=8, frameon=False, ncols=2, loc="upper right")
    split = next(iter(found)).partition(",")[0]
    against_steps(axes, f"{split} loss by noise level (dotted: raw weights)")


def draw_last(axes: Axes, found: Levels) -> None:
    """The newest loss at each noise level, noise at the right."""
    for weights, levels in found.items():
        newest = [values[-1] for _, values in levels.values()]
        style = "o-" if weights.endswith("ema") else "s:"
        axes.plot([*levels], newest, style, markersize=4, label=weights_in_words(weights))
    axes.invert_xaxis()
    axes.set(xlabel="ln SNR (noise to the right)")
    axes.legend(fontsize=8, frameon=False)
    step = max(steps[-1] for levels in found.values() for steps, _ in levels.values())
    tidy(axes, f"loss at each noise level, step {step:,}")


def weights_in_words(weights: str) -> str:
    """A key of `Levels` as people write it."""
    return weights.replace("ema", "averaged weights").replace(", raw", ", raw weights")
