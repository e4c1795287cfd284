"""`ldm doctor picture`: where is a picture from, as far as it says itself?"""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from ldm.config import UserError
from ldm.pictures import Stored, content, decoded
from pipelines.credentials import state
from pipelines.inputs import MEGAPIXELS
from pipelines.safety import SOURCE_TYPE
from pipelines.watermark import watermark_of

NOTES = ("made_by", "model", "prompt", "class_name", "seed")
"""Which notes are shown"""


def doctor_picture(files: list[Path]) -> None:
    """Print what each file says of its origin: notes, content credentials, invisible watermark.

    Raises:
        UserError: a file is no picture.
    """
    for file in files:
        print(file)
        for name, value in findings(file):
            print(f"  {name + ':':<20}{printable(value)}")


def printable(text: str) -> str:
    """A stranger's text on one line, without what a terminal would obey."""
    return " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())


def findings(file: Path) -> Iterator[tuple[str, str]]:
    """What is found in a picture file, by kind."""
    data = content(Stored(str(file), path=str(file)))
    picture = decoded(str(file), data, MEGAPIXELS).image
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        notes = {key: str(value) for key, value in getattr(image, "text", {}).items()}
    made = notes.get("digital_source_type") == SOURCE_TYPE
    yield "notes", "a model made it" if made else "none that say how it was made"
    yield from ((name, notes[name]) for name in NOTES if name in notes)
    try:
        yield "signature (C2PA)", state(file) or "none"
    except UserError as problem:
        yield "signature (C2PA)", f"not looked for: {problem}"
    try:
        yield "watermark", watermark_of(picture) or "none that can be read"
    except UserError as problem:
        yield "watermark", f"not looked for: {problem}"
