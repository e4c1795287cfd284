"""What all verbs that draw share: how exactly, where to, who looks at it before, and what it carries."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from autoencoder.files import require_writable
from ldm.config import UserError
from pipelines import watermark
from pipelines.credentials import credentials_of, credentials_option
from pipelines.safety import SafetyChecker, provenance

if TYPE_CHECKING:
    from pipelines.latent_diffusion import LatentDiffusion


def out_options(reader: argparse.ArgumentParser, pictures: bool = True) -> None:
    """How exactly, where to, and what it carries; for pictures, not masks, also who looks at them before."""
    speed_options(reader)
    help = "folder for what is made"
    reader.add_argument("--out", type=Path, required=True, metavar="DIR", help=help)
    credentials_option(reader)
    if not pictures:
        reader.set_defaults(checker=None, keep_flagged=False, watermark=None)
        return
    help = "a stock safety checker, folder or hub name: pictures that it flags are not written"
    reader.add_argument("--checker", metavar="NAME", help=help)
    help = "write them nevertheless, with what the checker said inside"
    reader.add_argument("--keep-flagged", action="store_true", help=help)
    help = "a text of up to 10 bytes (English letters), invisibly in the pixels; for pictures of at least 256 x 256"
    reader.add_argument("--watermark", metavar="TEXT", help=help)


def speed_options(reader: argparse.ArgumentParser) -> None:
    """How exactly: of everything that draws."""
    help = "bf16 is faster where the processor has it, and pictures differ slightly (default f32)"
    reader.add_argument("--precision", choices=("f32", "bf16"), default="f32", help=help)
    help = "compute the inner levels of the U-Net once in N steps: faster, other pictures (default 1: always)"
    reader.add_argument("--reuse", type=int, default=1, metavar="N", help=help)


def opened(options: argparse.Namespace) -> tuple[LatentDiffusion, SafetyChecker | None]:
    """The model, on the best device, and the checker that is asked for.

    What would fail after the work fails here: the folder for the pictures is made, and the checker, the certificate and
    the watermark are tried. Without the checker nothing is drawn.
    """
    from pipelines.latent_diffusion import LatentDiffusion, best_device
    from pipelines.safety import ClipSafetyChecker

    if options.keep_flagged and options.checker is None:
        raise UserError("--keep-flagged is given without --checker, so that nothing would be flagged.")
    if options.checker == "":
        raise UserError("--checker is empty; name a folder or a model on the hub, or leave it out.")
    credentials_of(options)
    if options.watermark is not None:
        watermark.require_text(options.watermark)
    asked = [getattr(options, name, None) for name in ("picture", "mask", "first", "second")]
    for file in [Path(one) for one in asked if one] + getattr(options, "pictures", []):
        if re.fullmatch(r"\d{4,}\.png|sheet\.png", file.name):
            spare(file, options.out / file.name)
    require_writable(options.out)
    checker = None if options.checker is None else ClipSafetyChecker.from_pretrained(options.checker)
    model = LatentDiffusion.from_pretrained(options.model).to(best_device())
    if "guidance" in options:
        options.guidance = scale(options, model)
    return replace(model, precision=options.precision, reuse=options.reuse), checker


FIGURES = (".png", ".svg", ".pdf")
"""What a plot of figures is saved as"""


def require_picture(out: Path, kinds: Sequence[str]) -> None:
    """UserError if `--out` is not the name of a picture that ends in one of `kinds`."""
    if out.suffix not in kinds or out.is_dir():
        raise UserError(f"--out is {out}, but must be the name of a picture that ends in {', '.join(kinds)}.")


def scale(options: argparse.Namespace, model: LatentDiffusion) -> float:
    """Of guidance: as it is asked for, or the usual one; UserError if the model has nothing to be guided by."""
    from ldm.conditioning import Unconditional

    if not isinstance(model.conditioner, Unconditional):
        return options.usual_guidance if options.guidance is None else options.guidance
    asked = [f"--{name}" for name in ("interval", "rescale", "project") if getattr(options, name, None)]
    asked += ["--guidance"] if options.guidance not in (None, 1.0) else []
    if asked:
        raise UserError(
            f"{' and '.join(asked)} is given, but this model is told nothing to be guided by; leave it out."
        )
    return 1.0


def require_room(options: argparse.Namespace, size: tuple[int, int]) -> None:
    """UserError if pictures of (width, height) are too small for a watermark that is asked for."""
    if options.watermark is not None:
        watermark.require_room(size)


def spare(read: Path, written: Path) -> None:
    """UserError if a picture that is read is also where one might be written."""
    if read.resolve() == written.resolve():
        raise UserError(f"{read} lies in --out and would be replaced; choose another folder with --out.")


def keep(
    images: Sequence[Image.Image],
    options: argparse.Namespace,
    notes: Sequence[Mapping[str, object]],
    checker: SafetyChecker | None,
    captions: Sequence[str] | None = None,
    columns: int | None = None,
) -> None:
    """Save each picture with its notes inside, and a sheet of all; those that the checker flags stay unwritten."""
    from pipelines.sheets import contact_sheet

    shown, notes, written = judged(images, notes, options, checker)
    if checker:
        flagged = sum(bool(note["flagged"]) for note in notes)
        print(f"{checker.name} flagged {flagged} of {number(len(images))}; {then(options)}")
    files = {}
    for i, image in enumerate(shown):
        file = options.out / f"{i:04d}.png"
        if written[i]:
            files[file] = image, notes[i]
        else:  # nor is one of an earlier call left in its place
            file.unlink(missing_ok=True)
    sheet = options.out / "sheet.png"
    shared = {key: value for key, value in notes[0].items() if all(note.get(key) == value for note in notes)}
    shared["made_by"] = f"{shared['made_by']}, as a sheet"
    write(files, options, options.watermark)
    write({sheet: (contact_sheet(shown, captions, columns=columns), shared)}, options, None)
    print(f"{number(sum(written))} in {options.out}, all of them on {sheet}")


def number(count: int) -> str:
    """So many pictures, in words."""
    return f"{count} picture{'' if count == 1 else 's'}"


def keep_one(
    image: Image.Image,
    stem: Path,
    about: Mapping[str, object],
    options: argparse.Namespace,
    checker: SafetyChecker | None,
) -> None:
    """Save a picture as STEM.png, unless the checker flags it; then there is none, nor an earlier one."""
    file = Path(f"{stem}.png")
    (image,), (note,), (written,) = judged([image], [about], options, checker)
    if checker and note["flagged"]:
        print(f"{checker.name} flagged {file}; {then(options)}")
    if written:
        write({file: (image, note)}, options, options.watermark)
    else:
        file.unlink(missing_ok=True)


def judged(
    images: Sequence[Image.Image],
    notes: Sequence[Mapping[str, object]],
    options: argparse.Namespace,
    checker: SafetyChecker | None,
) -> tuple[Sequence[Image.Image], Sequence[Mapping[str, object]], list[bool]]:
    """Pictures and their notes with what the checker says, and which are written; the others are black."""
    from pipelines.safety import withheld

    if checker is None:
        return images, notes, [True] * len(images)
    black, verdicts = withheld(images, checker)
    flagged = [verdict.flagged for verdict in verdicts]
    notes = [
        dict(note) | {"checked_by": checker.name, "flagged": bad}
        for note, bad in zip(notes, flagged, strict=True)
    ]
    if options.keep_flagged:
        return images, notes, [True] * len(images)
    return black, notes, [not bad for bad in flagged]


def then(options: argparse.Namespace) -> str:
    """What becomes of flagged pictures."""
    return f"these are {'written nevertheless' if options.keep_flagged else 'not written'}"


def write(
    files: Mapping[Path, tuple[Image.Image, Mapping[str, object]]],
    options: argparse.Namespace,
    text: str | None,
) -> None:
    """Save pictures with their notes inside, with `text` as a watermark, and signed where that is asked for."""
    signer = credentials_of(options)
    for file, (image, about) in files.items():
        if text is not None:
            image, about = watermark.marked(image, text), {**about, "watermark": text}
            if watermark.watermark_of(image) != text:
                print(f"ldm: the watermark can't be read back from {file}", file=sys.stderr, flush=True)
        image.save(file, pnginfo=provenance(**about))
        if signer:
            signer.sign(file)
