"""`ldm plot`: pictures that explain a path, a model or a run."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from pipelines.cli_draw import MODEL


def add_plot(verbs: Any) -> None:
    """Add the verb to the command's sub-parsers."""
    what = verbs.add_parser("plot", help="pictures that explain a noise path, a model or a run")
    kinds = what.add_subparsers(dest="kind", required=True, metavar="WHAT")

    def kind(name: str, help: str, run: Any) -> argparse.ArgumentParser:
        sub = kinds.add_parser(name, help=help, description=help)
        sub.add_argument("--out", type=Path, required=True, metavar="FILE.png", help="the picture")
        sub.set_defaults(run=run)
        return sub

    kind("schedules", "betas, share of signal and SNR of all noise paths", plot_schedules)

    noising = kind("noising", "a picture on its way to noise", plot_noising)
    noising.add_argument("picture", type=Path, metavar="PICTURE")
    noising.add_argument(
        "--path", default="flow", help='as `ldm plot schedules` names it, such as "VP cosine"'
    )
    noising.add_argument("--count", type=int, default=8, help="levels shown (default 8)")

    curves = kind("curves", "everything that a run has logged, against its steps", plot_curves)
    curves.add_argument("run_folder", type=Path, metavar="RUN")

    guidance = kind("guidance", "the same noise at several scales of guidance", plot_guidance)
    steps = kind("steps", "time and distance from the limit against sampling steps", plot_steps)
    for sub in (guidance, steps):
        sub.add_argument("model", metavar="MODEL", help=MODEL)
        sub.add_argument("prompts", metavar="PROMPT", nargs="+", help="a caption, or the name of a class")
        sub.add_argument("--seed", type=int, default=0, help="picture i is drawn from seed + i (default 0)")
    guidance.add_argument("--scales", type=float, nargs="+", default=[1, 2, 4, 7, 12], metavar="G")
    guidance.add_argument("--steps", type=int, default=30, help="sampling steps (default 30)")
    steps.add_argument("--samplers", nargs="+", default=["ddim", "heun", "dpmpp_2m", "unipc"], metavar="NAME")
    steps.add_argument("--counts", type=int, nargs="+", default=[5, 10, 20, 40], metavar="N")


def plot_schedules(options: argparse.Namespace) -> None:
    from pipelines.plots import schedules

    save(schedules(), options.out)


def plot_noising(options: argparse.Namespace) -> None:
    from ldm.config import UserError
    from pipelines.inputs import read_picture, upright
    from pipelines.plots import PATHS, noising

    if options.path not in PATHS:
        raise UserError(f"--path is {options.path!r}; choose one of {', '.join(PATHS)}.")
    if options.count < 2:
        raise UserError(f"--count is {options.count}, but must be at least 2.")
    save(noising(PATHS[options.path], upright(read_picture(options.picture)), options.count), options.out)


def plot_curves(options: argparse.Namespace) -> None:
    from pipelines.plots import curves

    save(curves(options.run_folder), options.out)


def plot_guidance(options: argparse.Namespace) -> None:
    from pipelines.latent_diffusion import LatentDiffusion, best_device
    from pipelines.plots import guidance_sweep

    model = LatentDiffusion.from_pretrained(options.model).to(best_device())
    sheet = guidance_sweep(model, options.prompts, options.scales, steps=options.steps, seed=options.seed)
    save(sheet, options.out)


def plot_steps(options: argparse.Namespace) -> None:
    from pipelines.latent_diffusion import LatentDiffusion, best_device
    from pipelines.plots import steps_sweep

    model = LatentDiffusion.from_pretrained(options.model).to(best_device())
    save(
        steps_sweep(model, options.prompts, options.samplers, options.counts, seed=options.seed), options.out
    )


def save(figure: Any, file: Path) -> None:
    """A picture or a matplotlib Figure."""
    if hasattr(figure, "savefig"):
        figure.savefig(file, dpi=110)
    else:
        figure.save(file)
    print(file)
