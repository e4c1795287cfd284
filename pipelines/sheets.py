"""Pictures of pictures: contact sheets with captions, originals beside reconstructions."""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from ldm.config import UserError

GAP = 8
LINES, SPACING = 3, 2
"""Of a caption at most, and pixels between them"""
INK, PAPER, FAILED = "#222222", "#ffffff", "#c0392b"


def contact_sheet(
    images: Sequence[Image.Image],
    captions: Sequence[str] | None = None,
    *,
    columns: int | None = None,
    tile: int = 128,
    wrong: Sequence[bool] | None = None,
    headings: Sequence[str] = (),
) -> Image.Image:
    """Pictures in rows, each `tile` pixels wide with its caption below it; captions of `wrong` ones in red.

    `headings` stand above the rows, one each, and name what the pictures of a row have in common.
    `info["tiles"]` says what lies where, for `tiles`; it outlives saving if it is written into the PNG.
    """
    columns = columns or math.ceil(math.sqrt(len(images)))
    width = columns * (tile + GAP) - GAP
    tall = [max(1, round(tile * image.height / image.width)) for image in images]
    small, large = (ImageFont.load_default(size) for size in (max(12, tile // 10), max(14, tile // 8)))
    under = [_lines(caption, small, tile) for caption in captions or ()]
    above = [_lines(heading, large, width) for heading in headings]
    below = max((_height(text, small) for text in under), default=0)
    rows, y = [], GAP
    for row, first in enumerate(range(0, len(images), columns)):
        top = y + (_height(above[row], large) if above else 0)
        rows.append((y, top))
        y = top + max(tall[first : first + columns]) + below + (2 * GAP if under else GAP)
    sheet = Image.new("RGB", (width + 2 * GAP, y), PAPER)
    brush = ImageDraw.Draw(sheet)
    for (start, _), text in zip(rows, above, strict=False):
        brush.multiline_text((GAP, start), text, INK, font=large, spacing=SPACING)
    places = []
    for i, image in enumerate(images):
        x, y = GAP + i % columns * (tile + GAP), rows[i // columns][1]
        sheet.paste(image.resize((tile, tall[i]), Image.Resampling.BICUBIC), (x, y))
        places.append((captions[i] if captions else "", [x, y, x + tile, y + tall[i]]))
        if under:
            ink = FAILED if wrong and wrong[i] else INK
            brush.multiline_text((x, y + tall[i] + 3), under[i], ink, font=small, spacing=SPACING)
    sheet.info["tiles"] = json.dumps(places)
    return sheet


def _lines(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """A text in at most `LINES` lines that are no wider than `width` pixels; "…" stands for what finds no room."""
    most = width // 2  # letters in a line: hardly one is narrower than two pixels
    text = text[: LINES * most + 1]
    letters = max(1, min(len(text), most))
    while letters > 8:
        lines = textwrap.wrap(text, letters, max_lines=LINES, placeholder=" …")
        if all(font.getlength(line) <= width for line in lines):
            return "\n".join(lines)
        letters -= 1
    return "\n".join(textwrap.wrap(text, letters, max_lines=LINES, placeholder="…"))


def _height(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> int:
    """Pixels that a text takes, with room to what follows."""
    box = ImageDraw.Draw(Image.new("RGB", (1, 1))).multiline_textbbox(
        (0, 0), text, font=font, spacing=SPACING
    )
    return math.ceil(box[3]) + 4 if text else 0


def sheet_beside(result: Path) -> Path:
    """Where the contact sheet of a result lies; UserError if the result is not to be a file FILE.json."""
    if result.suffix != ".json" or result.is_dir():
        raise UserError(
            f"--out is {result}, but must name a file .json; a sheet with its name lies beside it."
        )
    return result.with_suffix(".png")


def tiles(sheet: Image.Image) -> list[tuple[str, Image.Image]]:
    """The captions and pictures of a contact sheet, in their order; none if it does not say where they lie."""
    places = json.loads(sheet.info.get("tiles", "[]"))
    return [(caption, sheet.crop(box)) for caption, box in places]


def side_by_side(
    *rows: Sequence[Image.Image], labels: Sequence[str] = (), columns: int = 8, tile: int = 96
) -> Image.Image:
    """Corresponding pictures of several rows one below the other, `columns` at a time; `labels` name the rows."""
    ordered: list[Image.Image] = []
    captions: list[str] = []
    for first in range(0, len(rows[0]), columns):
        for row, label in zip(rows, labels or [""] * len(rows), strict=True):
            ordered += row[first : first + columns]
            captions += [label] * len(row[first : first + columns])
    return contact_sheet(ordered, captions if labels else None, columns=min(columns, len(rows[0])), tile=tile)
