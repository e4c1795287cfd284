"""`ldm generate | edit | inpaint | interpolate`: pictures from prompts and from pictures."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image, UnidentifiedImageError

from ldm.config import UserError
from pipelines.safety import provenance

if TYPE_CHECKING:
    from pipelines.latent_diffusion import LatentDiffusion

MODEL = "a run folder, a stock diffusers folder, or a hub name"


def add_draw(verbs: Any) -> None:
    """Add the verbs to the command's sub-parsers."""
    draw = verbs.add_parser("generate", help="draw pictures from prompts")
    draw.add_argument("model", metavar="MODEL", help=MODEL)
    prompt_options(draw)
    sampling_options(draw)
    draw.add_argument("--spacing", help="of the steps, such as karras; by default the model's")
    draw.add_argument("--size", type=size, metavar="WxH", help="in pixels; by default that of training")
    draw.add_argument("--batch", type=int, default=16, help="pictures drawn together (default 16)")
    tile = "decode pictures larger than N pixels in tiles of N, for less memory"
    draw.add_argument("--tile", type=int, metavar="N", help=tile)
    draw.set_defaults(run=generate)

    edit = verbs.add_parser("edit", help="change a picture as a prompt says (image to image)")
    edit.add_argument("model", metavar="MODEL", help=MODEL)
    edit.add_argument("picture", type=Path, metavar="PICTURE")
    prompt_options(edit)
    sampling_options(edit)
    edit.add_argument(
        "--strength", type=float, default=0.6, help="0 keeps the picture, 1 nothing (default 0.6)"
    )
    edit.set_defaults(run=run_edit)

    fill = verbs.add_parser("inpaint", help="draw part of a picture anew, or what lies around it")
    fill.add_argument("model", metavar="MODEL", help=MODEL)
    fill.add_argument("picture", type=Path, metavar="PICTURE")
    prompt_options(fill)
    sampling_options(fill)
    where = fill.add_mutually_exclusive_group(required=True)
    where.add_argument(
        "--mask", type=Path, metavar="PICTURE", help="white where to draw, black where to keep"
    )
    where.add_argument("--canvas", type=size, metavar="WxH", help="draw around the picture, up to this size")
    fill.add_argument("--soft", type=int, default=0, metavar="PIXELS", help="blur the hole's edge outwards")
    fill.add_argument("--resample", type=int, default=1, metavar="N", help="do each step N times (RePaint)")
    fill.set_defaults(run=run_inpaint)

    between = verbs.add_parser("interpolate", help="pictures on the way between two pictures or seeds")
    between.add_argument("model", metavar="MODEL", help=MODEL)
    between.add_argument("first", metavar="PICTURE|SEED")
    between.add_argument("second", metavar="PICTURE|SEED")
    between.add_argument("prompt", metavar="PROMPT", nargs="?", help="a caption, or the name of a class")
    between.add_argument("--count", type=int, default=8, help="pictures, both ends among them (default 8)")
    between.add_argument("--steps", type=int, default=30, help="sampling steps (default 30)")
    between.add_argument("--guidance", type=float, default=1.0, help="scale of guidance (default 1: none)")
    out_option(between)
    between.set_defaults(run=run_interpolate)


def prompt_options(reader: argparse.ArgumentParser) -> None:
    reader.add_argument("prompts", metavar="PROMPT", nargs="*", help="a caption, or the name of a class")
    reader.add_argument("--prompts", dest="file", type=Path, metavar="FILE", help="more prompts, one a line")
    reader.add_argument(
        "--class",
        dest="classes",
        action="append",
        default=[],
        metavar="NAME",
        help="the name of a class; for a model of both, of the captions'",
    )
    reader.add_argument("--negative", default="", metavar="TEXT", help="a caption to be guided away from")
    reader.add_argument("--n", type=int, default=1, help="pictures a prompt (default 1)")


def sampling_options(reader: argparse.ArgumentParser) -> None:
    reader.add_argument("--steps", type=int, default=30, help="sampling steps (default 30)")
    reader.add_argument("--sampler", help="by default the one the model names")
    reader.add_argument(
        "--guidance", type=float, default=4.0, help="scale of guidance, 1 is none (default 4)"
    )
    reader.add_argument("--seed", type=int, default=0, help="picture i is drawn from seed + i (default 0)")
    out_option(reader)


def out_option(reader: argparse.ArgumentParser) -> None:
    help = "folder for the pictures and sheet.png"
    reader.add_argument("--out", type=Path, required=True, metavar="DIR", help=help)


def size(text: str) -> tuple[int, int]:
    """WxH"""
    width, _, height = text.lower().partition("x")
    if not (width.isdigit() and height.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} is not WIDTHxHEIGHT, like 64x64")
    return int(width), int(height)


def prompts_of(options: argparse.Namespace) -> list[str]:
    """The prompts on the command line and in a file."""
    prompts = list(options.prompts)
    if options.file:
        prompts += [line for line in options.file.read_text(encoding="utf-8").splitlines() if line.strip()]
    if options.n < 1:
        raise UserError(f"--n is {options.n}, but must be at least 1.")
    return prompts


def opened(options: argparse.Namespace) -> LatentDiffusion:
    """The model, on the best device; the folder for the pictures is made first, so that no work is lost."""
    from pipelines.latent_diffusion import LatentDiffusion, best_device

    options.out.mkdir(parents=True, exist_ok=True)
    return LatentDiffusion.from_pretrained(options.model).to(best_device())


def picture_of(file: Path) -> Image.Image:
    try:
        picture = Image.open(file)
        picture.load()
    except (UnidentifiedImageError, Image.DecompressionBombError):
        raise UserError(f"{file} is not a picture that can be read, or far too large.") from None
    return picture


def picture_or_seed(word: str) -> Image.Image | int:
    return int(word) if word.isdigit() else picture_of(Path(word))


def sampled(options: argparse.Namespace) -> dict[str, Any]:
    """The settings that all drawing verbs share, as the functions take them."""
    names = ("steps", "sampler", "guidance", "negative", "n", "seed")
    return {name: getattr(options, name) for name in names}


def generate(options: argparse.Namespace) -> None:
    from ldm.conditioning import ClassAndText

    prompts, classes = prompts_of(options), options.classes
    model = opened(options)
    if not isinstance(model.conditioner, ClassAndText):  # a class is then a prompt like others
        prompts, classes = prompts + classes, []
    names = ("size", "batch", "tile", "spacing")
    settings = sampled(options) | {name: getattr(options, name) for name in names}
    images = model(prompts or None, classes=classes or None, progress=True, **settings)
    each = [name for name in classes for _ in range(len(images) // len(classes))]
    keep(images, options, model, prompts, each)


def run_edit(options: argparse.Namespace) -> None:
    from pipelines.editing import image_to_image

    prompts, picture = prompts_of(options) + options.classes, picture_of(options.picture)
    model = opened(options)
    images = image_to_image(model, picture, prompts or None, strength=options.strength, **sampled(options))
    keep(images, options, model, prompts, strength=options.strength, picture=options.picture.name)


def run_inpaint(options: argparse.Namespace) -> None:
    from pipelines.editing import inpaint, outpaint

    prompts, picture = prompts_of(options) + options.classes, picture_of(options.picture)
    settings = sampled(options) | {"soft": options.soft, "resample": options.resample}
    model = opened(options)
    if options.canvas:
        images = outpaint(model, picture, options.canvas, prompts or None, **settings)
    else:
        images = inpaint(model, picture, picture_of(options.mask), prompts or None, **settings)
    keep(
        images,
        options,
        model,
        prompts,
        soft=options.soft,
        resample=options.resample,
        picture=options.picture.name,
    )


def run_interpolate(options: argparse.Namespace) -> None:
    from pipelines.editing import interpolate
    from pipelines.sheets import contact_sheet

    first, second = picture_or_seed(options.first), picture_or_seed(options.second)
    model = opened(options)
    settings = {"count": options.count, "steps": options.steps, "guidance": options.guidance}
    images = interpolate(model, first, second, options.prompt, **settings)
    about = {"prompt": options.prompt or "", "from": options.first, "to": options.second}
    for i, image in enumerate(images):
        image.save(options.out / f"{i:04d}.png", pnginfo=provenance(**about, **settings, picture=i))
    contact_sheet(images, columns=len(images)).save(
        options.out / "sheet.png", pnginfo=provenance(**about, **settings)
    )
    print(f"{len(images)} pictures in {options.out}, all of them on {options.out / 'sheet.png'}")


def keep(
    images: Sequence[Image.Image],
    options: argparse.Namespace,
    model: LatentDiffusion,
    prompts: Sequence[str],
    classes: Sequence[str] = (),
    **more: object,
) -> None:
    """Save each picture with what it was drawn from inside it, and a sheet of all."""
    from pipelines.sheets import contact_sheet

    told = [prompt for prompt in prompts for _ in range(options.n)]
    settings: dict[str, object] = {
        "steps": options.steps,
        "sampler": options.sampler or model.sampler,
        "guidance": options.guidance,
        "negative": options.negative,
    }
    for i, image in enumerate(images):
        about: dict[str, object] = {
            "prompt": told[i] if told else "",
            "seed": options.seed + i,
            "model": Path(options.model).name,
        } | ({"class": classes[i]} if classes else {})
        image.save(options.out / f"{i:04d}.png", pnginfo=provenance(**about, **settings, **more))
    contact_sheet(images, told or None).save(
        options.out / "sheet.png", pnginfo=provenance(**settings, **more)
    )
    print(f"{len(images)} pictures in {options.out}, all of them on {options.out / 'sheet.png'}")
