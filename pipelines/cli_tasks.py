"""`ldm upscale | restore | segment | recover`: what models do that were trained to make pictures from pictures."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from ldm.config import UserError
from pipelines.cli_draw import MODEL, class_option, make, spare, told_one
from pipelines.safety import provenance

if TYPE_CHECKING:
    from pipelines.latent_diffusion import LatentDiffusion


def add_tasks(verbs: Any) -> None:
    """Add the verbs to the command's sub-parsers."""
    large = verbs.add_parser("upscale", help="pictures several times as large (super-resolution)")
    task_options(large, run_upscale, samples=1, steps=30)
    noise = (
        "noise to hide flaws of the small picture in, from 0 to what the model was trained with (default 0)"
    )
    large.add_argument("--noise", type=float, default=0.0, metavar="X", help=noise)
    tile = "make pictures larger than N pixels in tiles of N, for less memory"
    large.add_argument("--tile", type=int, metavar="N", help=tile)

    sound = verbs.add_parser("restore", help="pictures without noise, blur and JPEG artefacts")
    task_options(sound, run_restore, samples=1, steps=30)
    noise = "of a model not trained to restore: the noise in the pictures, of 255; by default estimated"
    sound.add_argument("--noise", type=float, metavar="X", help=noise)

    parts = verbs.add_parser("segment", help="what each pixel shows: masks, confidence and boxes")
    task_options(parts, run_segment, samples=8, steps=20)

    judge = verbs.add_parser(
        "recover", help="spoil pictures of a set, let a model make them good, and measure"
    )
    judge.add_argument("model", metavar="MODEL", help=MODEL)
    judge.add_argument("--data", metavar="P", help="the pictures; by default those the run was trained on")
    judge.add_argument("--split", default="test", help="of the pictures (default test)")
    judge.add_argument("--n", type=int, default=64, help="pictures (default 64)")
    judge.add_argument("--samples", type=int, default=1, help="drawn of each, and averaged (default 1)")
    judge.add_argument("--steps", type=int, default=30, help="sampling steps (default 30)")
    judge.add_argument("--guidance", type=float, default=1.0, help="scale of guidance (default 1: none)")
    judge.add_argument("--seed", type=int, default=0, help="of what is spoiled, and of what is drawn")
    masks = "for segmentation: the column or folder of the true masks, as segment.masks of a recipe"
    judge.add_argument("--masks", metavar="NAME", help=masks)
    alone = "for restoration: %s alone, instead of what it was trained on"
    judge.add_argument("--blur", type=float, metavar="PIXELS", help=alone % "Gaussian blur")
    judge.add_argument("--noise", type=float, metavar="X", help=alone % "Gaussian noise of X of 255")
    judge.add_argument("--jpeg", type=float, metavar="QUALITY", help=alone % "JPEG artefacts")
    judge.add_argument(
        "--out", type=Path, required=True, metavar="FILE.json", help="the result; a sheet lies beside it"
    )
    judge.set_defaults(run=run_recover)


def task_options(reader: argparse.ArgumentParser, run: Any, samples: int, steps: int) -> None:
    reader.add_argument("model", metavar="MODEL", help=MODEL)
    reader.add_argument("pictures", metavar="PICTURE", nargs="+", type=Path)
    reader.add_argument(
        "--prompt", metavar="TEXT", help="a caption or the name of a class, if it is told one"
    )
    class_option(reader)
    help = f"drawn of each picture, and averaged (default {samples})"
    reader.add_argument("--samples", type=int, default=samples, metavar="N", help=help)
    reader.add_argument("--steps", type=int, default=steps, help=f"sampling steps (default {steps})")
    reader.add_argument("--sampler", help="by default the one the model names")
    reader.add_argument("--guidance", type=float, default=1.0, help="scale of guidance (default 1: none)")
    reader.add_argument("--seed", type=int, default=0, help="of what is drawn (default 0)")
    reader.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the results")
    reader.set_defaults(run=run)


def opened(options: argparse.Namespace) -> LatentDiffusion:
    """The model, on the best device; the folder for the results is made first, so that no work is lost."""
    from pipelines.latent_diffusion import LatentDiffusion, best_device

    make(options.out)
    return LatentDiffusion.from_pretrained(options.model).to(best_device())


def each(options: argparse.Namespace) -> Iterator[tuple[Image.Image, Path]]:
    """The pictures, and where in the folder for results what is made of each belongs, without an end to its name."""
    from pipelines.inputs import read_picture

    names = [picture.stem for picture in options.pictures]
    for name in names:
        if names.count(name) > 1:
            raise UserError(
                f"Two pictures are named {name}, whose results would lie in one file; rename one."
            )
    for file in options.pictures:
        spare(file, options.out / f"{file.stem}.png")
    for file in tqdm(options.pictures, unit="img", disable=len(options.pictures) == 1):
        yield read_picture(file), options.out / file.stem


def settings(options: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(options, name) for name in ("samples", "steps", "sampler", "guidance", "seed")}


def note(options: argparse.Namespace, **more: Any) -> Any:
    """What a picture says about how it was made."""
    about = {"made_by": f"ldm {options.verb}", "model": Path(options.model).name, "prompt": options.prompt}
    about |= {"class_name": options.class_name, **settings(options), **more}
    return provenance(**{key: value for key, value in about.items() if value is not None})


def run_upscale(options: argparse.Namespace) -> None:
    from pipelines.tasks import upscale

    model = opened(options)
    more, words = {"noise": options.noise, "tile": options.tile}, told_one(options, model)
    for picture, stem in each(options):
        made = upscale(model, picture, **words, **settings(options), **more)
        made.save(f"{stem}.png", pnginfo=note(options, **more))
    print(f"{len(options.pictures)} pictures in {options.out}")


def run_restore(options: argparse.Namespace) -> None:
    from ldm.degradations import noise_level
    from pipelines.inputs import upright
    from pipelines.tasks import restore

    model = opened(options)
    words = told_one(options, model)
    for picture, stem in each(options):
        noise = options.noise
        if model.task is None and noise is None:
            noise = round(noise_level(upright(picture)), 1)
            say = (
                f"{stem.name}: noise of about {noise} of 255; a model that draws removes Gaussian noise alone"
            )
            tqdm.write(say)
        made = restore(model, picture, **words, noise=noise, **settings(options))
        made.save(f"{stem}.png", pnginfo=note(options, noise=noise))
    print(f"{len(options.pictures)} pictures in {options.out}")


def run_segment(options: argparse.Namespace) -> None:
    from pipelines.tasks import segment

    model = opened(options)
    words = told_one(options, model)
    for picture, stem in each(options):
        found = segment(model, picture, **words, **settings(options))
        found.picture().save(f"{stem}-mask.png", pnginfo=note(options))
        confidence = (found.confidence * 255).round().astype(np.uint8)
        Image.fromarray(confidence).save(f"{stem}-confidence.png", pnginfo=note(options))
        found.over(picture).save(f"{stem}-boxes.png", pnginfo=note(options))
        Path(f"{stem}-boxes.json").write_text(json.dumps(found.boxes(), indent=1) + "\n")
    print(
        f"{len(options.pictures)} pictures in {options.out}: NAME-mask.png (numbers of classes), "
        "NAME-confidence.png, NAME-boxes.json, NAME-boxes.png"
    )


def run_recover(options: argparse.Namespace) -> None:
    from pipelines.recover import Trial, recover

    asked = {name: value for name, value in vars(options).items() if name not in ("run", "verb", "out")}
    for name, value in recover(Trial(**asked), options.out).items():
        print(f"{name}: {value}")
