"""Figures of merit against one setting of drawing: guidance, steps or sampler."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from matplotlib.figure import Figure

from ldm.conditioning import Unconditional
from ldm.config import UserError
from pipelines.evaluation.bench import Bench, Evaluation
from pipelines.evaluation.compare import in_words, less_is_better, read_result
from pipelines.evaluation.drawn import drawer, how_drawn, training_pictures
from pipelines.evaluation.evaluate import measure
from pipelines.evaluation.protocol import differing
from pipelines.evaluation.subjects import kind_of
from pipelines.reports.run_plots import tidy

Setting = Literal["guidance", "steps", "sampler"]
SHOWN = ("class_accuracy", "prompts_satisfied", "clip_score", "fid", "fd", "kid", "precision", "recall")
"""Figures that a plot shows, as far as they were measured"""

LETTERS = 54
"""Of a plot's heading that fit above a panel"""


def sweep(model: str, what: Evaluation, setting: Setting, values: Sequence[Any], folder: Path) -> list[Path]:
    """Evaluate a model with each value of a setting, everything else alike, as FOLDER/SETTING-VALUE.json.

    What is there of the same weights, measured in the same way, is taken for done, which is said.

    Raises:
        UserError: the model draws nothing, or has nothing to be guided by.
        ValueError: one of the values can't be drawn with; nothing was measured then.
    """
    if kind_of(model) != "latent diffusion":
        raise UserError(f"{model} is an autoencoder, which draws nothing: there is no {setting} to vary.")
    bench, files = Bench(model, what), []
    if setting == "guidance" and isinstance(drawer(bench).conditioner, Unconditional):
        raise UserError(f"{model} is told nothing to be guided by: there is no guidance to vary.")
    drawings = {value: replace(what.drawing, **{setting: value}) for value in values}
    for drawing in drawings.values():
        drawing.by(drawer(bench))
    for value, drawing in drawings.items():
        file = folder / f"{setting}-{value}.json"
        bench.what = replace(what, drawing=drawing)
        if not measured_before(file, bench):
            measure(bench, file)
        files.append(file)
    return files


def measured_before(file: Path, bench: Bench) -> bool:
    """Whether a file holds what the bench would find, or something else, which is said."""
    if not file.exists():
        return False
    kept, now = read_result(file), how_drawn(bench, training_pictures(bench, {}))
    differences = differing(kept["protocol"], now) + differing(kept.get("model", {}), bench.subject.about)
    if bench.state.is_main_process:
        otherwise = f"of something else ({'; '.join(differences)}), and is written anew"
        print(f"{file} is {otherwise if differences else 'there already'}")
    return not differences


def plot(files: Sequence[Path], setting: Setting) -> Figure:
    """Each figure against the setting, with its interval, a panel a figure.

    Raises:
        UserError: the results differ in more than that setting, or hold no figure that is shown.
    """
    results = [read_result(file) for file in files]
    for result, file in zip(results, files, strict=True):
        if unlike := differing(results[0]["protocol"], result["protocol"], [setting]):
            raise UserError(f"{files[0]} and {file} differ in more than {setting}: {'; '.join(unlike)}.")
    common = [name for name in results[0]["figures"] if all(name in result["figures"] for result in results)]
    names = [name for shown in SHOWN for name in common if name.partition(" (")[0] == shown]
    if not names:
        raise UserError(f"{files[0]} has none of the figures that are plotted: {', '.join(SHOWN)}.")
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(3.6 * columns, 2.7 * rows + 0.3), layout="constrained")
    about = textwrap.fill(in_short(results[0], setting), LETTERS * columns)
    figure.suptitle(about, fontsize=9, color="dimgray")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    at = [result["protocol"][setting] for result in results]
    for axes, name in zip(panels, names, strict=False):
        found = [result["figures"][name] for result in results]
        axes.plot(at, [one["value"] for one in found], marker="o")
        if all(one["interval"] for one in found):
            low, high = zip(*(one["interval"] for one in found), strict=True)
            axes.fill_between(at, low, high, alpha=0.2, linewidth=0)
        tidy(axes, f"{in_words(name)} ({'less' if less_is_better(name) else 'more'} is better)")
        axes.set_xticks(at)
        axes.set_xlabel(setting)
    for axes in panels[len(names) :]:
        axes.remove()
    return figure


def in_short(result: dict[str, Any], setting: Setting) -> str:
    """What all points of a plot have in common, in a line."""
    how = result["protocol"]
    kept = [f"{name} {how[name]}" for name in ("sampler", "steps", "guidance") if name != setting]
    kept += ["interval {:g} to {:g}".format(*how["interval"])] if "interval" in how else []
    kept += [f"reuse {how['reuse']}"] if how.get("reuse", 1) > 1 else []
    kept.append(how["precision"])
    real = f"{how['reference']['pictures']:,} real ones of split {how['reference']['split']}"
    about = f"{how['n']:,} pictures of {result['model']['name']} for each value, {', '.join(kept)}; against {real}"
    return f"{about}; shaded: 95 % interval"
