"""The command `ldm`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ldm.config import command
from pipelines.cli.doctor import add_doctor
from pipelines.cli.draw import add_draw
from pipelines.cli.edit import add_edit
from pipelines.cli.evaluate import add_evaluate
from pipelines.cli.plot import add_plot
from pipelines.cli.publish import add_publish
from pipelines.cli.tasks import add_tasks


def parser() -> argparse.ArgumentParser:
    main = argparse.ArgumentParser(
        prog="ldm", description="Draw with latent diffusion models that you trained yourself."
    )
    verbs = main.add_subparsers(dest="verb", required=True, metavar="VERB")

    add_draw(verbs)
    add_edit(verbs)
    add_tasks(verbs)
    add_doctor(verbs)
    add_publish(verbs)
    add_plot(verbs)
    add_evaluate(verbs)
    add_report(verbs)
    add_ema(verbs)
    demo = verbs.add_parser(
        "demo", help="train both stages on drawn scenes, then draw held-out prompts and check them"
    )
    demo.add_argument(
        "--out", type=Path, default=Path("runs/scenes"), metavar="DIR", help="default runs/scenes"
    )
    demo.set_defaults(run=run_demo)

    return main


def add_report(verbs: Any) -> None:
    what = "a run on one page: recipe, curves, samples, reconstructions, metrics, timings"
    page = verbs.add_parser("report", help=what, description=what)
    page.add_argument("folder", type=Path, metavar="RUN", help="the folder of a run of either stage")
    page.add_argument("--out", type=Path, metavar="FILE.html", help="default RUN/report.html")
    page.set_defaults(run=run_report)


def add_ema(verbs: Any) -> None:
    average = verbs.add_parser(
        "ema", help="the model of a run with its weights averaged over a length chosen now"
    )
    average.add_argument("folder", type=Path, metavar="RUN", help="a run that was trained with --ema_every N")
    average.add_argument(
        "--sigma-rel", type=float, required=True, help="length as a share of the training, like 0.07"
    )
    average.add_argument("--step", type=int, help="where the average ends, by default at the last snapshot")
    average.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the stock model")
    average.set_defaults(run=run_ema)


MANY_PROMPTS, ONE_PROMPT = ("generate", "edit", "inpaint"), ("vary", "invert", "interpolate")


def explain(problem: BaseException) -> str | None:
    """A sentence for want of memory; None for anything else."""
    name, text = type(problem).__name__, " ".join(str(problem).split())
    if isinstance(problem, MemoryError) or name == "OutOfMemoryError" or "can't allocate memory" in text:
        return (
            f"out of memory ({text[:200] or name}); ask for less at once, with --batch, --size, --tile or --n"
        )
    return None


@command("ldm", explain)
def main(argv: Sequence[str]) -> None:
    reader = parser()
    options, more = reader.parse_known_args(argv)
    flags = [word for word in more if word.startswith("-")]
    if not flags and options.verb in MANY_PROMPTS:  # argparse does not see prompts that come after an option
        options.prompts, more = options.prompts + more, []
    elif not flags and options.verb in ONE_PROMPT and options.prompt is None and len(more) == 1:
        options.prompt, more = more[0], []
    if more:
        reader.error(f"unrecognized arguments: {' '.join(flags or more)}")
    options.run(options)


def run_report(options: argparse.Namespace) -> None:
    from pipelines.reports.report import report

    print(report(options.folder, options.out))


def run_ema(options: argparse.Namespace) -> None:
    from pipelines.averaged import write_averaged

    write_averaged(options.folder, options.sigma_rel, options.out, options.step)


def run_demo(options: argparse.Namespace) -> None:
    from pipelines.cli.demo import demo

    demo(options.out)
