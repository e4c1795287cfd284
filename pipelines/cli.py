"""The command `ldm`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL.PngImagePlugin import PngInfo

from ldm.config import UserError, command


def parser() -> argparse.ArgumentParser:
    main = argparse.ArgumentParser(
        prog="ldm", description="Draw with latent diffusion models that you trained yourself."
    )
    verbs = main.add_subparsers(dest="verb", required=True, metavar="VERB")

    draw = verbs.add_parser("generate", help="draw pictures from prompts")
    draw.add_argument("model", metavar="MODEL", help="a run folder, a stock diffusers folder, or a hub name")
    draw.add_argument("prompts", metavar="PROMPT", nargs="*", help="a caption, or the name of a class")
    draw.add_argument("--prompts", dest="file", type=Path, metavar="FILE", help="more prompts, one a line")
    draw.add_argument(
        "--class", dest="classes", action="append", default=[], metavar="NAME", help="the name of a class"
    )
    draw.add_argument("--negative", default="", metavar="TEXT", help="a caption to be guided away from")
    draw.add_argument("--n", type=int, default=1, help="pictures a prompt (default 1)")
    draw.add_argument("--steps", type=int, default=30, help="sampling steps (default 30)")
    draw.add_argument("--sampler", help="by default the one the model names")
    draw.add_argument("--guidance", type=float, default=4.0, help="scale of guidance, 1 is none (default 4)")
    draw.add_argument("--seed", type=int, default=0, help="picture i is drawn from seed + i (default 0)")
    draw.add_argument("--size", type=size, metavar="WxH", help="in pixels; by default that of training")
    draw.add_argument("--batch", type=int, default=16, help="pictures drawn together (default 16)")
    draw.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder for the pictures and sheet.png"
    )
    draw.set_defaults(run=generate)

    name = verbs.add_parser(
        "recognise", help="how many drawn pictures a classifier of the real ones names rightly"
    )
    name.add_argument("model", metavar="MODEL", help="a run folder, a stock diffusers folder, or a hub name")
    name.add_argument(
        "--data", required=True, metavar="P", help="the pictures, with classes, that it was trained on"
    )
    name.add_argument("--each", type=int, default=4, help="pictures drawn for each class (default 4)")
    name.add_argument("--steps", type=int, default=30, help="sampling steps (default 30)")
    name.add_argument("--guidance", type=float, default=4.0, help="scale of guidance, 1 is none (default 4)")
    name.add_argument("--seed", type=int, default=0, help="picture i is drawn from seed + i (default 0)")
    name.add_argument(
        "--out", type=Path, required=True, metavar="FILE.json", help="the result; a sheet lies beside it"
    )
    name.set_defaults(run=run_recognise)

    add_ema(verbs)
    demo = verbs.add_parser(
        "demo", help="train both stages on drawn scenes, then draw held-out prompts and check them"
    )
    demo.add_argument(
        "--out", type=Path, default=Path("runs/scenes"), metavar="DIR", help="default runs/scenes"
    )
    demo.set_defaults(run=run_demo)
    return main


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


def size(text: str) -> tuple[int, int]:
    """WxH"""
    width, _, height = text.lower().partition("x")
    if not (width.isdigit() and height.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} is not WIDTHxHEIGHT, like 64x64")
    return int(width), int(height)


@command("ldm")
def main(argv: Sequence[str]) -> None:
    reader = parser()
    options, more = reader.parse_known_args(argv)
    flags = [word for word in more if word.startswith("-")]
    if flags or (more and options.verb != "generate"):
        reader.error(f"unrecognized arguments: {' '.join(flags or more)}")
    if more:  # argparse does not see prompts that come after an option
        options.prompts += more
    options.run(options)


def generate(options: argparse.Namespace) -> None:
    """Draw, and save each picture with what it was drawn from inside it."""
    from pipelines.latent_diffusion import LatentDiffusion, best_device
    from pipelines.sheets import contact_sheet

    prompts = [*options.prompts, *options.classes]
    if options.file:
        prompts += [line for line in options.file.read_text(encoding="utf-8").splitlines() if line.strip()]
    if options.n < 1:
        raise UserError(f"--n is {options.n}, but must be at least 1.")
    options.out.mkdir(parents=True, exist_ok=True)
    model = LatentDiffusion.from_pretrained(options.model).to(best_device())
    images = model(
        prompts or None,
        steps=options.steps,
        sampler=options.sampler,
        guidance=options.guidance,
        negative=options.negative,
        n=options.n,
        seed=options.seed,
        size=options.size,
        batch=options.batch,
        progress=True,
    )
    told = [prompt for prompt in prompts for _ in range(options.n)]
    for i, image in enumerate(images):
        note = PngInfo()
        settings = {
            "steps": options.steps,
            "sampler": options.sampler or model.sampler,
            "guidance": options.guidance,
        }
        about = {
            "prompt": told[i] if told else "",
            "seed": options.seed + i,
            "model": Path(options.model).name,
        }
        for key, value in (about | settings).items():
            note.add_text(key, str(value))
        image.save(options.out / f"{i:04d}.png", pnginfo=note)
    contact_sheet(images, told or None).save(options.out / "sheet.png")
    print(f"{len(images)} pictures in {options.out}, all of them on {options.out / 'sheet.png'}")


def run_recognise(options: argparse.Namespace) -> None:
    from pipelines.recognise import recognise

    recognise(
        options.model, options.data, options.out, options.each, options.steps, options.guidance, options.seed
    )


def run_ema(options: argparse.Namespace) -> None:
    from pipelines.averaged import write_averaged

    write_averaged(options.folder, options.sigma_rel, options.out, options.step)


def run_demo(options: argparse.Namespace) -> None:
    from pipelines.demo import demo

    demo(options.out)
