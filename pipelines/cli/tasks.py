"""`ldm upscale | restore | segment | recover`: what models do that were trained to make pictures from pictures."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from ldm.config import UserError
from pipelines.cli.draw import MODEL, class_option, guidance_option, told_one
from pipelines.cli.out import keep_one, number, opened, out_options, require_room, spare, speed_options, write


def add_tasks(verbs: Any) -> None:
    """Add the verbs to the command's sub-parsers."""
    help = "pictures several times as large (super-resolution)"
    large = verbs.add_parser("upscale", help=help, description=help)
    task_options(large, run_upscale, samples=1, steps=30)
    noise = (
        "noise to hide flaws of the small picture in, from 0 to what the model was trained with (default 0)"
    )
    large.add_argument("--noise", type=float, default=0.0, metavar="X", help=noise)
    tile = "make pictures larger than N pixels in tiles of N, for less memory"
    large.add_argument("--tile", type=int, metavar="N", help=tile)

    help = "pictures without noise, blur and JPEG artefacts"
    sound = verbs.add_parser("restore", help=help, description=help)
    task_options(sound, run_restore, samples=1, steps=30)
    noise = "for a model trained to draw: the noise in the pictures, of 255; by default estimated"
    sound.add_argument("--noise", type=float, metavar="X", help=noise)
    jpeg = "for a model trained to draw: they are JPEGs of this quality, 1 to 95"
    sound.add_argument("--jpeg", type=int, metavar="QUALITY", help=jpeg)

    help = "what each pixel shows: masks, confidence and boxes"
    parts = verbs.add_parser("segment", help=help, description=help)
    task_options(parts, run_segment, samples=8, steps=20, pictures=False)

    help = "spoil pictures of a set, let a model make them good, and measure"
    judge = verbs.add_parser("recover", help=help, description=help)
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
    speed_options(judge)
    judge.add_argument(
        "--out", type=Path, required=True, metavar="FILE.json", help="the result; a sheet lies beside it"
    )
    judge.set_defaults(run=run_recover)


def task_options(
    reader: argparse.ArgumentParser, run: Any, samples: int, steps: int, pictures: bool = True
) -> None:
    """What all of them are told; `pictures`: it makes some to look at, not masks."""
    reader.add_argument("model", metavar="MODEL", help=MODEL)
    help = "files; what is made of each keeps its name"
    reader.add_argument("pictures", metavar="PICTURE", nargs="+", type=Path, help=help)
    reader.add_argument(
        "--prompt", metavar="TEXT", help="a caption or the name of a class, if it is told one"
    )
    class_option(reader)
    help = f"drawn of each picture, and {'averaged' if pictures else 'put to the vote'} (default {samples})"
    reader.add_argument("--samples", type=int, default=samples, metavar="N", help=help)
    reader.add_argument("--steps", type=int, default=steps, help=f"sampling steps (default {steps})")
    reader.add_argument("--sampler", help="by default the one the model names")
    guidance_option(reader)
    reader.add_argument("--seed", type=int, default=0, help="of what is drawn (default 0)")
    out_options(reader, pictures)
    reader.set_defaults(run=run)


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
        written = options.out / f"{file.stem}.png"
        spare(file, written)
        if written.exists() and file.parent.resolve() == options.out.resolve():
            raise UserError(f"{written} lies beside {file} and would be replaced; choose another --out.")
    for file in tqdm(options.pictures, unit="img", disable=len(options.pictures) == 1):
        yield read_picture(file), options.out / file.stem


def settings(options: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(options, name) for name in ("samples", "steps", "sampler", "guidance", "seed")}


def note(options: argparse.Namespace, **more: Any) -> dict[str, object]:
    """What a picture says about how it was made."""
    about = {"made_by": f"ldm {options.verb}", "model": Path(options.model).name, "prompt": options.prompt}
    about |= {"class_name": options.class_name, **settings(options), **more}
    return {key: value for key, value in about.items() if value is not None}


def run_upscale(options: argparse.Namespace) -> None:
    from ldm.tasks import Upscale
    from pipelines.tasks import require_task, upscale

    model, checker = opened(options)
    require_task(model, Upscale)
    more, words = {"noise": options.noise, "tile": options.tile}, told_one(options, model)
    grows = getattr(model.task, "factor", 1)
    for picture, stem in each(options):
        require_room(options, (picture.width * grows, picture.height * grows))
        made = upscale(model, picture, **words, **settings(options), **more)
        keep_one(made, stem, note(options, **more), options, checker)
    print(f"made of {number(len(options.pictures))}, in {options.out}")


def run_restore(options: argparse.Namespace) -> None:
    from ldm.degradations import noise_level
    from pipelines.inputs import upright
    from pipelines.tasks import restore

    model, checker = opened(options)
    words = told_one(options, model, needed=model.task is not None)
    for picture, stem in each(options):
        require_room(options, picture.size)
        damage = {"noise": options.noise, "jpeg": options.jpeg}
        if model.task is None and damage == {"noise": None, "jpeg": None}:
            damage["noise"] = round(noise_level(upright(picture)), 1)
            say = f"{stem.name}: noise of about {damage['noise']} of 255, estimated; --noise or --jpeg says otherwise"
            tqdm.write(say)
        made = restore(model, picture, **words, **damage, **settings(options))
        keep_one(made, stem, note(options, **damage), options, checker)
    print(f"made of {number(len(options.pictures))}, in {options.out}")


def run_segment(options: argparse.Namespace) -> None:
    from ldm.tasks import Segment
    from pipelines.tasks import require_task, segment

    model, _ = opened(options)
    require_task(model, Segment)
    words = told_one(options, model)
    for picture, stem in each(options):
        found = segment(model, picture, **words, **settings(options))
        confidence = Image.fromarray((found.confidence * 255).round().astype(np.uint8))
        made = {"mask": found.picture(), "confidence": confidence, "boxes": found.over(picture)}
        about = note(options)
        write({Path(f"{stem}-{name}.png"): (image, about) for name, image in made.items()}, options, None)
        Path(f"{stem}-boxes.json").write_text(json.dumps(found.boxes(), indent=1) + "\n")
    print(
        f"made of {number(len(options.pictures))}, in {options.out}: NAME-mask.png (numbers of classes), "
        "NAME-confidence.png, NAME-boxes.json, NAME-boxes.png"
    )


def run_recover(options: argparse.Namespace) -> None:
    from pipelines.evaluation.recover import Trial, recover

    asked = {name: value for name, value in vars(options).items() if name not in ("run", "verb", "out")}
    for name, value in recover(Trial(**asked), options.out).items():
        print(f"{name}: {value}")
