"""`ldm plot`: pictures that explain a path, a model or a run."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autoencoder.files import require_writable
from pipelines.cli.draw import MODEL
from pipelines.cli.out import FIGURES, require_picture
from pipelines.safety import provenance

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL.Image import Image

    from pipelines.latent_diffusion import LatentDiffusion


def add_plot(verbs: Any) -> None:
    """Add the verb to the command's sub-parsers."""
    what = verbs.add_parser("plot", help="pictures that explain a noise path, a model or a run")
    kinds = what.add_subparsers(dest="kind", required=True, metavar="WHAT")

    def kind(name: str, help: str, plot: Any, ends: Sequence[str] = (".png",)) -> argparse.ArgumentParser:
        sub = kinds.add_parser(name, help=help, description=help)
        out = "the picture" + (f", or {' or '.join(ends[1:])}" if ends[1:] else "")
        sub.add_argument("--out", type=Path, required=True, metavar="FILE.png", help=out)
        sub.set_defaults(run=run_plot, plot=plot, ends=ends)
        return sub

    kind("schedules", "betas, share of signal and SNR of all noise paths", plot_schedules, FIGURES)

    noising = kind("noising", "a picture on its way to noise", plot_noising)
    noising.add_argument("picture", type=Path, metavar="PICTURE")
    noising.add_argument(
        "--path", default="flow", help='as `ldm plot schedules` names it, such as "VP cosine"'
    )
    noising.add_argument("--count", type=int, default=8, help="levels shown (default 8)")

    curves = kind("curves", "everything that a run has logged, against its steps", plot_curves, FIGURES)
    curves.add_argument("run_folder", type=Path, metavar="RUN")

    levels = kind("losses", "a run's loss on held-out pictures, by noise level", plot_losses, FIGURES)
    levels.add_argument("run_folder", type=Path, metavar="RUN")

    guidance = kind("guidance", "the same noise at several scales of guidance", plot_guidance)
    steps = kind("steps", "time and distance from the limit against sampling steps", plot_steps, FIGURES)
    way = kind("trajectory", "from noise to a picture: x_t, and the x_0 seen in it", plot_trajectory)
    sheet = kind("sheet", "a row of pictures for each prompt", plot_sheet)
    for sub, least in ((guidance, "+"), (steps, "+"), (way, "*"), (sheet, "*")):
        sub.add_argument("model", metavar="MODEL", help=MODEL)
        sub.add_argument("prompts", metavar="PROMPT", nargs=least, help="a caption, or the name of a class")
        sub.add_argument("--seed", type=int, default=0, help="picture i is drawn from seed + i (default 0)")
    way.add_argument("--count", type=int, default=8, help="steps shown (default 8)")
    sheet.add_argument("--n", type=int, default=4, help="pictures a prompt (default 4)")
    for sub in (way, sheet):
        sub.add_argument("--steps", type=int, default=30, help="sampling steps (default 30)")
        sub.add_argument("--sampler", help="by default the one the model names")
        sub.add_argument("--guidance", type=float, default=4.0, help="scale of guidance (default 4)")

    between = kind("interpolation", "between two pictures, through noise and through latents", plot_between)
    between.add_argument("model", metavar="MODEL", help=MODEL)
    between.add_argument("first", metavar="PICTURE|SEED")
    between.add_argument("second", metavar="PICTURE|SEED")
    between.add_argument("prompt", metavar="PROMPT", nargs="?", help="a caption, or the name of a class")
    between.add_argument("--count", type=int, default=8, help="pictures in a row (default 8)")
    between.add_argument("--steps", type=int, default=30, help="sampling steps (default 30)")
    guidance.add_argument("--scales", type=float, nargs="+", default=[1, 2, 4, 7, 12], metavar="G")
    guidance.add_argument("--steps", type=int, default=30, help="sampling steps (default 30)")
    steps.add_argument("--samplers", nargs="+", default=["ddim", "heun", "dpmpp_2m", "unipc"], metavar="NAME")
    steps.add_argument("--counts", type=int, nargs="+", default=[5, 10, 20, 40], metavar="N")


def run_plot(options: argparse.Namespace) -> None:
    """Draw and save; that it can be saved is looked at first."""
    require_picture(options.out, options.ends)
    require_writable(options.out.parent)
    drawn = options.plot(options)
    if hasattr(drawn, "savefig"):
        drawn.savefig(options.out, dpi=110)
    else:
        drawn.save(options.out, pnginfo=provenance(made_by="ldm plot"))
    print(options.out)


def plot_schedules(options: argparse.Namespace) -> Figure:
    from pipelines.reports.plots import schedules

    return schedules()


def plot_noising(options: argparse.Namespace) -> Image:
    from ldm.config import UserError
    from pipelines.inputs import read_picture, upright
    from pipelines.reports.plots import PATHS, noising

    if options.path not in PATHS:
        raise UserError(f"--path is {options.path!r}; choose one of {', '.join(PATHS)}.")
    if options.count < 2:
        raise UserError(f"--count is {options.count}, but must be at least 2.")
    return noising(PATHS[options.path], upright(read_picture(options.picture)), options.count)


def plot_curves(options: argparse.Namespace) -> Figure:
    from pipelines.reports.run_plots import curves

    return curves(options.run_folder)


def plot_losses(options: argparse.Namespace) -> Figure:
    from pipelines.reports.run_plots import losses

    return losses(options.run_folder)


def opened(options: argparse.Namespace) -> LatentDiffusion:
    from pipelines.latent_diffusion import LatentDiffusion, best_device

    return LatentDiffusion.from_pretrained(options.model).to(best_device())


def plot_guidance(options: argparse.Namespace) -> Image:
    from pipelines.reports.plots import guidance_sweep

    model = opened(options)
    return guidance_sweep(model, options.prompts, options.scales, steps=options.steps, seed=options.seed)


def plot_steps(options: argparse.Namespace) -> Figure:
    from pipelines.reports.plots import steps_sweep

    model = opened(options)
    return steps_sweep(model, options.prompts, options.samplers, options.counts, seed=options.seed)


def sampled(options: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(options, name) for name in ("steps", "sampler", "guidance", "seed")}


def plot_trajectory(options: argparse.Namespace) -> Image:
    from pipelines.reports.plots import trajectory

    model = opened(options)
    return trajectory(model, options.prompts or None, count=options.count, **sampled(options))


def plot_sheet(options: argparse.Namespace) -> Image:
    from pipelines.reports.plots import prompt_sheet

    model = opened(options)
    return prompt_sheet(model, options.prompts or None, n=options.n, **sampled(options))


def plot_between(options: argparse.Namespace) -> Image:
    from pipelines.inputs import read_picture
    from pipelines.reports.plots import interpolation

    ends = (options.first, options.second)
    first, second = (int(end) if end.isdecimal() else read_picture(Path(end), None) for end in ends)
    settings = {"count": options.count, "steps": options.steps}
    return interpolation(opened(options), first, second, options.prompt, **settings)
