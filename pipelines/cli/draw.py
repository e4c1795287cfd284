"""`ldm generate | recreate`: pictures from prompts, and the same again. What all verbs that draw share is here too."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.config import UserError
from pipelines.cli.out import keep, opened, out_options, require_room

if TYPE_CHECKING:
    from PIL.Image import Image

    from ldm.guidance import Guidance
    from pipelines.latent_diffusion import LatentDiffusion
    from pipelines.record import Record

MODEL = "a run folder, a stock diffusers folder, or a hub name"


def add_draw(verbs: Any) -> None:
    """Add the verbs to the command's sub-parsers."""
    help = "draw pictures from prompts"
    draw = verbs.add_parser("generate", help=help, description=help)
    draw.add_argument("model", metavar="MODEL", help=MODEL)
    prompt_options(draw)
    sampling_options(draw)
    draw.add_argument("--size", type=size, metavar="WxH", help="in pixels; by default that of training")
    draw.add_argument("--batch", type=int, default=16, help="pictures drawn together (default 16)")
    tile = "decode pictures larger than N pixels in tiles of N, for less memory"
    draw.add_argument("--tile", type=int, metavar="N", help=tile)
    eta = "share of the noise that ddim, euler or dpmpp_2m renew in each step (default 0)"
    draw.add_argument("--eta", type=float, metavar="X", help=eta)
    draw.add_argument(
        "--columns", type=int, metavar="N", help="of sheet.png; by default about as many as rows"
    )
    out_options(draw)
    draw.set_defaults(run=generate)

    help = "draw a picture again from what is written inside its file"
    again = verbs.add_parser("recreate", help=help, description=help)
    again.add_argument("model", metavar="MODEL", help=MODEL)
    again.add_argument("pictures", type=Path, nargs="+", metavar="PICTURE.png", help="that ldm generate made")
    again.add_argument("--other-model", action="store_true", help="allow another model than the picture's")
    out_options(again)
    again.set_defaults(run=run_recreate)


def prompt_options(reader: argparse.ArgumentParser) -> None:
    """What to draw, and how many of each."""
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
    """How to draw."""
    reader.add_argument("--steps", type=int, default=30, help="sampling steps (default 30)")
    reader.add_argument("--sampler", help="by default the one the model names")
    reader.add_argument("--spacing", help="of the steps, such as karras; by default the model's")
    guidance_option(reader, 4.0)
    interval_option(reader)
    help = "share of the guided output brought back to its usual deviation, such as 0.7, against glare"
    reader.add_argument("--rescale", type=float, metavar="X", help=help)
    help = "leave out what only raises contrast (adaptive projected guidance), for high scales"
    reader.add_argument("--project", action="store_true", help=help)
    help = "latents beyond X deviations are pulled back (dynamic thresholding), such as 4"
    reader.add_argument("--threshold", type=float, metavar="X", help=help)
    seed_option(reader)


def guidance_option(reader: argparse.ArgumentParser, usual: float = 1.0) -> None:
    """`opened` puts the usual scale in its place, or says that the model can't be guided."""
    help = f"scale of guidance, 1 is none (default {usual:g}); for models that are told something"
    reader.add_argument("--guidance", type=float, help=help)
    reader.set_defaults(usual_guidance=usual)


def interval_option(reader: argparse.ArgumentParser) -> None:
    help = "guide only where LOW < sigma / alpha <= HIGH, such as 0.3 3: faster, more variety"
    reader.add_argument("--interval", type=float, nargs=2, metavar=("LOW", "HIGH"), help=help)


def seed_option(reader: argparse.ArgumentParser) -> None:
    help = "picture i is drawn from N + i (default 0); or a list like 3,7,9, a seed for each picture"
    reader.add_argument("--seed", type=seeds, default=0, metavar="N", help=help)


def seeds(text: str) -> int | list[int]:
    """N, or N,N,..."""
    try:
        given = [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number, nor a list like 3,7,9") from None
    return given if "," in text else given[0]


def size(text: str) -> tuple[int, int]:
    """WxH"""
    width, _, height = text.lower().partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is not WIDTHxHEIGHT, like 64x64")
    return int(width), int(height)


def prompts_of(options: argparse.Namespace) -> list[str]:
    """The prompts on the command line and in a file."""
    from pipelines.prompts import read_lines

    if options.n < 1:
        raise UserError(f"--n is {options.n}, but must be at least 1.")
    return [*options.prompts, *(read_lines(options.file) if options.file else [])]


def sampled(options: argparse.Namespace) -> dict[str, Any]:
    """The settings that the verbs with prompts share, as the functions take them."""
    names = ("steps", "sampler", "spacing", "negative", "n", "seed")
    return {name: getattr(options, name) for name in names} | {"guidance": guidance(options)}


def guidance(options: argparse.Namespace) -> float | Guidance:
    """A plain scale, or more where it is asked for; UserError if there is nothing to apply it to."""
    from ldm.guidance import Guidance, Projection, Threshold

    asked: dict[str, Any] = {}
    if options.interval:
        asked["interval"] = tuple(options.interval)
    if options.rescale is not None:
        asked["rescale"] = options.rescale
    if options.project:
        asked["projection"] = Projection()
    unused = [f"--{name}" for name in ("interval", "rescale", "project") if getattr(options, name)]
    if unused and options.guidance == 1:
        raise UserError(f"{' and '.join(unused)} says how to guide, but --guidance is 1, which is none.")
    if options.threshold is not None:
        asked["threshold"] = Threshold(limit=options.threshold)
    return Guidance(scale=options.guidance, **asked) if asked else options.guidance


def told(options: argparse.Namespace, model: LatentDiffusion) -> dict[str, Any]:
    """Prompts and classes as the functions take them: to a model of classes alone, one is a prompt."""
    from ldm.conditioning import ClassAndText

    prompts, classes = prompts_of(options), options.classes
    require_classes(classes, model)
    if not isinstance(model.conditioner, ClassAndText):
        prompts, classes = prompts + classes, []
    require_words(prompts, model)
    return {"prompts": prompts or None, "classes": classes or None}


def told_one(options: argparse.Namespace, model: LatentDiffusion, needed: bool = True) -> dict[str, Any]:
    """`told`, for the verbs with one prompt; UserError for a class beside it that the model has no place for."""
    from ldm.conditioning import ClassAndText

    prompt, name = options.prompt, options.class_name
    require_classes([] if name is None else [name], model)
    if name is not None and not isinstance(model.conditioner, ClassAndText):
        if prompt is not None:
            raise UserError(
                f"--class is {name!r} and the prompt {prompt!r}, but this model is told one of the two; leave one out."
            )
        prompt, name = name, None
    if needed or name is not None:
        require_words([] if prompt is None else [prompt], model)
    return {"prompt": prompt, "classes": name}


def require_classes(names: Sequence[str], model: LatentDiffusion) -> None:
    """UserError if a model that is told no classes is given some."""
    from ldm.conditioning import labels_of

    if names and labels_of(model.conditioner) is None:
        raise UserError(f"--class is {names[0]!r:.60}, but this model is told no classes; leave it out.")


def require_words(prompts: Sequence[str], model: LatentDiffusion) -> None:
    """UserError if a model that is told something is told nothing."""
    from ldm.conditioning import Unconditional

    if not prompts and not isinstance(model.conditioner, Unconditional):
        raise UserError(f'There is no prompt, but this model needs {model.needs}; "" is none in particular.')


def class_option(reader: argparse.ArgumentParser) -> None:
    """For the verbs with one prompt."""
    help = "the name of a class; for a model of both, beside the caption"
    reader.add_argument("--class", dest="class_name", metavar="NAME", help=help)


def words_of(asked: Mapping[str, Any], count: int) -> list[dict[str, Any]]:
    """What each of `count` pictures was told, as notes have it, for what `told` gave."""
    columns = (
        [text for text in asked[name] for _ in range(count // len(asked[name]))]
        if asked[name]
        else [None] * count
        for name in ("prompts", "classes")
    )
    return [{"prompt": prompt, "class_name": name} for prompt, name in zip(*columns, strict=True)]


def generate(options: argparse.Namespace) -> None:
    if options.columns is not None and options.columns < 1:
        raise UserError(f"--columns is {options.columns}, but must be at least 1.")
    model, checker = opened(options)
    require_room(options, options.size or model.size)
    asked = told(options, model)
    names = ("size", "batch", "tile", "eta")
    settings = sampled(options) | {name: getattr(options, name) for name in names}
    images = model(**asked, progress=True, **settings)
    notes = [record.notes() for record in records(options, model, asked, len(images))]
    keep(images, options, notes, checker, captions(notes), options.columns)


def records(
    options: argparse.Namespace, model: LatentDiffusion, asked: Mapping[str, Any], count: int
) -> list[Record]:
    """What each of `count` pictures was drawn from."""
    from pipelines.latent_diffusion import seeds_of
    from pipelines.record import Record, arithmetic, fingerprint

    shared: dict[str, Any] = {
        "model": Path(options.model).name,
        "model_sha256": fingerprint(model),
        "sampler": options.sampler or model.sampler,
        "drawn_on": arithmetic(model),
        "guidance": guidance(options),
    } | {name: getattr(options, name) for name in ("negative", "steps", "spacing", "tile", "eta")}
    words, made = words_of(asked, count), []
    for i, seed in enumerate(seeds_of(options.seed, count)):
        first = i // options.batch * options.batch
        place = {"batch": min(options.batch, count - first), "place": i - first}
        made.append(Record(**shared, **words[i], seed=seed, **place))
    return made


def run_recreate(options: argparse.Namespace) -> None:
    from pipelines.record import arithmetic, fingerprint, read_record, recreate

    read = [read_record(file) for file in options.pictures]
    model, checker = opened(options)
    for _, picture in read:
        require_room(options, picture.size)
    identity, here = fingerprint(model), arithmetic(model)
    images = []
    for file, (record, picture) in zip(options.pictures, read, strict=True):
        if record.model_sha256 != identity and not options.other_model:
            raise UserError(
                f"{file} was drawn by another model, {record.model} ({record.model_sha256[:12]}), than "
                f"{options.model} ({identity[:12]}); give that one, or --other-model."
            )
        image = recreate(model, record, picture.size)
        print(f"{file}: {likeness(image, picture, record, here)}")
        images.append(image)
    now = {"model": Path(options.model).name, "model_sha256": identity, "drawn_on": here}
    notes = [replace(record, watermark=None).notes() | now for record, _ in read]
    keep(images, options, notes, checker, captions(notes))


def likeness(image: Image, picture: Image, record: Record, here: str) -> str:
    """How near a picture drawn again comes to that of the file, in words; marked likewise, if that is."""
    from pipelines.publishing.gate import furthest
    from pipelines.watermark import marked

    if record.watermark:
        try:
            image = marked(image, record.watermark)
        except UserError as problem:
            return f"not compared, as that has the watermark {record.watermark!r} in its pixels: {problem}"
    apart = furthest([image], [picture.convert("RGB")])
    if apart:
        return f"up to {apart} of 255 from it (drawn on {record.drawn_on}, now on {here})"
    return "the same, bit for bit" + (f", with watermark {record.watermark!r}" if record.watermark else "")


def captions(notes: Sequence[Mapping[str, object]]) -> list[str] | None:
    """The prompt of each picture, if there are any."""
    prompts = [str(note.get("prompt", "")) for note in notes]
    return prompts if any(prompts) else None
