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
INK, PAPER, FAILED = "#222222", "#ffffff", "#c0392b"


def contact_sheet(
    images: Sequence[Image.Image],
    captions: Sequence[str] | None = None,
    *,
    columns: int | None = None,
    tile: int = 128,
    wrong: Sequence[bool] | None = None,
) -> Image.Image:
    """Pictures in rows, each `tile` pixels wide with its caption below it; captions of `wrong` ones in red.

    `info["tiles"]` says what lies where, for `tiles`; it outlives saving if it is written into the PNG.
    """
    columns = columns or math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    size = max(9, tile // 11)
    font = ImageFont.load_default(size)
    texts = [textwrap.wrap(c, max(8, round(tile / size * 1.9)))[:3] for c in captions] if captions else []
    heights = [round(tile * image.height / image.width) for image in images]
    height = max(heights) + GAP + (size + 3) * max(map(len, texts), default=0)
    sheet = Image.new("RGB", (GAP + columns * (tile + GAP), GAP + rows * (height + GAP)), PAPER)
    brush = ImageDraw.Draw(sheet)
    places = []
    for i, image in enumerate(images):
        x, y = GAP + i % columns * (tile + GAP), GAP + i // columns * (height + GAP)
        sheet.paste(image.resize((tile, heights[i]), Image.Resampling.BICUBIC), (x, y))
        places.append((captions[i] if captions else "", [x, y, x + tile, y + heights[i]]))
        if texts:
            ink = FAILED if wrong and wrong[i] else INK
            brush.multiline_text((x, y + max(heights) + 3), "\n".join(texts[i]), ink, font=font, spacing=2)
    sheet.info["tiles"] = json.dumps(places)
    return sheet


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
