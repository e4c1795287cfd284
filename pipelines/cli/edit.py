"""`ldm edit | inpaint | vary | invert | interpolate`: pictures from pictures."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from ldm.config import UserError
from pipelines.cli.draw import (
    MODEL,
    captions,
    class_option,
    guidance,
    guidance_option,
    prompt_options,
    sampled,
    sampling_options,
    seed_option,
    size,
    told,
    told_one,
    words_of,
)
from pipelines.cli.out import keep, opened, out_options, require_room

if TYPE_CHECKING:
    from pipelines.latent_diffusion import LatentDiffusion


def add_edit(verbs: Any) -> None:
    """Add the verbs to the command's sub-parsers."""
    edit = verb(verbs, "edit", "change a picture as a prompt says (image to image)", run_edit)
    prompt_options(edit)
    sampling_options(edit)
    edit.add_argument(
        "--strength", type=float, default=0.6, help="near 0 keeps the picture, 1 nothing (default 0.6)"
    )

    fill = verb(verbs, "inpaint", "draw part of a picture anew, or what lies around it", run_inpaint)
    prompt_options(fill)
    sampling_options(fill)
    where = fill.add_mutually_exclusive_group(required=True)
    where.add_argument(
        "--mask", type=Path, metavar="PICTURE", help="white where to draw, black where to keep"
    )
    where.add_argument("--canvas", type=size, metavar="WxH", help="draw around the picture, up to this size")
    fill.add_argument("--soft", type=int, default=0, metavar="PIXELS", help="blur the hole's edge outwards")
    fill.add_argument("--resample", type=int, default=1, metavar="N", help="do each step N times (RePaint)")

    vary = verb(verbs, "vary", "pictures like a picture", run_vary)
    inversion_options(vary)
    vary.add_argument("--amount", type=float, default=0.4, help="0 is the picture, 1 any other (default 0.4)")
    vary.add_argument("--n", type=int, default=4, help="pictures (default 4)")
    seed_option(vary)

    back = verb(
        verbs, "invert", "the noise that a picture is drawn from, and the picture from that", run_invert
    )
    inversion_options(back)
    back.add_argument(
        "--to", metavar="PROMPT", help="draw this from the noise, instead of what the picture shows"
    )
    back.add_argument("--iterations", type=int, default=5, help="for each step, from 1 (default 5)")

    help = "pictures on the way between two pictures, seeds or prompts"
    between = verbs.add_parser("interpolate", help=help, description=help)
    between.add_argument("model", metavar="MODEL", help=MODEL)
    between.add_argument("first", metavar="PICTURE|SEED", help="where the way begins")
    help = "where it ends; the same seed again, if only the prompt is to change"
    between.add_argument("second", metavar="PICTURE|SEED", help=help)
    inversion_options(between)
    between.add_argument("--size", type=size, metavar="WxH", help="scale and crop the pictures to this first")
    between.add_argument("--to", metavar="PROMPT", help="of the last picture, if it is another")
    between.add_argument("--count", type=int, default=8, help="pictures, both ends among them (default 8)")
    out_options(between)
    between.set_defaults(run=run_interpolate)


def verb(verbs: Any, name: str, help: str, run: Any) -> argparse.ArgumentParser:
    """A sub-parser with what every verb that starts from one picture is told."""
    reader: argparse.ArgumentParser = verbs.add_parser(name, help=help, description=help)
    reader.add_argument("model", metavar="MODEL", help=MODEL)
    reader.add_argument("picture", type=Path, metavar="PICTURE", help="the file to begin with")
    fit = "scale and crop the picture to this first; a model draws best at the size of training"
    reader.add_argument("--size", type=size, metavar="WxH", help=fit)
    out_options(reader)
    reader.set_defaults(run=run)
    return reader


def inversion_options(reader: argparse.ArgumentParser) -> None:
    """How to go to noise and back."""
    help = "what the picture shows: a caption, or the name of a class"
    reader.add_argument("prompt", metavar="PROMPT", nargs="?", help=help)
    class_option(reader)
    reader.add_argument("--steps", type=int, default=30, help="steps of DDIM (default 30)")
    guidance_option(reader)


def run_edit(options: argparse.Namespace) -> None:
    from pipelines.editing import image_to_image

    picture = picture_of(options, options.picture)
    model, checker = opened(options)
    require_room(options, picture.size)
    asked = told(options, model)
    images = image_to_image(model, picture, **asked, strength=options.strength, **sampled(options))
    notes = drawn_notes(options, model, asked, len(images), strength=options.strength)
    keep(images, options, notes, checker, captions(notes))


def run_inpaint(options: argparse.Namespace) -> None:
    from pipelines.editing import inpaint, outpaint
    from pipelines.inputs import to_mask

    picture = picture_of(options, options.picture)
    mask = picture_of(options, options.mask) if options.mask else None
    model, checker = opened(options)
    require_room(options, options.canvas or picture.size)
    asked = told(options, model)
    how = {"soft": options.soft, "resample": options.resample}
    if mask:
        print(f"{to_mask(mask, picture).mean():.0%} of the picture is white in the mask and drawn anew")
        images = inpaint(model, picture, mask, **asked, **how, **sampled(options))
    else:
        images = outpaint(model, picture, options.canvas, **asked, **how, **sampled(options))
    notes = drawn_notes(options, model, asked, len(images), **how)
    keep(images, options, notes, checker, captions(notes))


def run_vary(options: argparse.Namespace) -> None:
    from pipelines.inversion import vary
    from pipelines.latent_diffusion import seeds_of

    picture = picture_of(options, options.picture)
    model, checker = opened(options)
    require_room(options, picture.size)
    how, asked = inverted(options) | {"amount": options.amount}, told_one(options, model)
    images = vary(model, picture, **asked, n=options.n, seed=options.seed, **how)
    notes = [notes_of(options, **how, seed=seed) for seed in seeds_of(options.seed, len(images))]
    keep(images, options, notes, checker)


def run_invert(options: argparse.Namespace) -> None:
    from pipelines.inversion import drawn_again, from_noise, invert

    picture = picture_of(options, options.picture)
    model, checker = opened(options)
    require_room(options, picture.size)
    how, asked = inverted(options), told_one(options, model)
    noise = invert(model, picture, **asked, iterations=options.iterations, **how)
    again = drawn_again(model, picture, noise, **asked, **how)
    print(
        f"drawn again from its noise: PSNR {again.psnr:.1f} dB; the autoencoder alone gives {again.ceiling:.1f} dB"
    )
    images = [again.picture]
    if options.to is not None:
        images += from_noise(model, noise, options.to, classes=asked["classes"], **how)
    keep(
        images,
        options,
        [notes_of(options, **how, to=to) for to in (None, options.to)][: len(images)],
        checker,
    )


def run_interpolate(options: argparse.Namespace) -> None:
    from pipelines.inversion import interpolate

    ends = {name: getattr(options, name) for name in ("first", "second")}
    if options.size and all(end.isdecimal() for end in ends.values()):
        raise UserError(
            "--size is given, but both ends are seeds: there is no picture to scale; leave it out."
        )
    first, second = (int(end) if end.isdecimal() else picture_of(options, Path(end)) for end in ends.values())
    model, checker = opened(options)
    sizes = [end.size for end in (first, second) if not isinstance(end, int)]
    require_room(options, sizes[0] if sizes else model.size)
    how = inverted(options) | {"to": options.to}
    images = interpolate(model, first, second, **told_one(options, model), count=options.count, **how)
    about = notes_of(options, **how, **{name: Path(end).name for name, end in ends.items()})
    keep(images, options, [about | {"picture": i} for i in range(len(images))], checker, columns=len(images))


def picture_of(options: argparse.Namespace, file: Path) -> Image.Image:
    from pipelines.inputs import read_picture

    return read_picture(file, options.size)


def inverted(options: argparse.Namespace) -> dict[str, Any]:
    return {"steps": options.steps, "guidance": options.guidance}


def notes_of(options: argparse.Namespace, **more: object) -> dict[str, object]:
    """What pictures were made from: the verb, the names of the files, never their folders, and the settings."""
    about: dict[str, object] = {"made_by": f"ldm {options.verb}", "model": Path(options.model).name}
    for name in ("picture", "mask"):
        if file := getattr(options, name, None):
            about[f"from_{name}"] = file.name
    about |= {name: getattr(options, name, None) for name in ("prompt", "class_name")}
    return {key: value for key, value in (about | more).items() if value is not None}


def drawn_notes(
    options: argparse.Namespace, model: LatentDiffusion, asked: dict[str, Any], count: int, **more: object
) -> list[dict[str, object]]:
    """The notes of each of `count` pictures that were drawn of prompts."""
    from pipelines.latent_diffusion import seeds_of
    from pipelines.record import guidance_note

    how = {name: getattr(options, name) for name in ("steps", "spacing", "negative", "size")}
    how["guidance"] = guidance_note(guidance(options))
    how |= {"sampler": options.sampler or model.sampler, **more}
    return [
        notes_of(options, **how, **words, seed=seed)
        for words, seed in zip(words_of(asked, count), seeds_of(options.seed, count), strict=True)
    ]
