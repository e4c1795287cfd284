"""An invisible watermark: a short text in the pixels themselves, which outlives what strips notes and signatures.

Needs the package blind-watermark, `pip install -e ".[watermark]"`; nothing goes over the network. What it outlives and
what not was measured (docs/log.md). Anybody who has the package can read it, and remove it: it is no proof of anything.
"""

from __future__ import annotations

import binascii
import multiprocessing
import warnings
from typing import Any

import numpy as np
from PIL import Image

from ldm.config import UserError

SMALLEST = 256
"""Pixels a side: with fewer too many pictures do not hold it"""
LONGEST = 10
"""Bytes of the text, in UTF-8"""
BITS = 97
"""Text and checksum, and one more: as a prime number it brings the copies of a bit under each other in no row of
blocks, so that a light stripe does not take all of them"""
MARGIN = 8
"""Levels, of 255, by which black and white are drawn in, so that there is room for what is added"""


def require_text(text: str) -> None:
    """UserError unless this can be a watermark, and the package is there."""
    library()
    if not 0 < len(text.encode()) <= LONGEST or "\0" in text:
        raise UserError(f"--watermark is {text!r}, but must be of 1 to {LONGEST} bytes (in UTF-8).")


def require_room(size: tuple[int, int]) -> None:
    """UserError for pictures of (width, height) that are too small to hold one."""
    if min(size) < SMALLEST:
        raise UserError(
            f"--watermark is given, but a picture of {size[0]} x {size[1]} pixels does not hold one reliably: it must "
            f"have at least {SMALLEST} a side; draw it larger, or leave this out and give --credentials."
        )


def marked(image: Image.Image, text: str) -> Image.Image:
    """The picture with the text in it; changes pixels by some levels."""
    require_room(image.size)
    mark = library().WaterMark()
    room = [min(max(level, MARGIN), 255 - MARGIN) for level in range(256)]
    mark.read_img(img=np.asarray(image.convert("RGB").point(room * 3))[:, :, ::-1])
    mark.read_wm(bits_of(text), mode="bit")
    return Image.fromarray(mark.embed()[:, :, ::-1].round().clip(0, 255).astype(np.uint8))


def watermark_of(image: Image.Image) -> str | None:
    """The text in a picture; None if there is none that can be read."""
    if min(image.size) < SMALLEST:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of pictures of a single colour
        found = (
            library()
            .WaterMark()
            .extract(embed_img=np.asarray(image.convert("RGB"))[:, :, ::-1], wm_shape=BITS, mode="bit")
        )
    return text_of(np.asarray(found, dtype=bool))


def bits_of(text: str) -> np.ndarray:
    """[BITS] bool: the text, filled up with zeros, its checksum, and the first bit again."""
    body = text.encode().ljust(LONGEST, b"\0")
    sealed = body + binascii.crc_hqx(body, 0xFFFF).to_bytes(2, "big")
    return np.resize(np.unpackbits(np.frombuffer(sealed, np.uint8)), BITS).astype(bool)


def text_of(bits: np.ndarray) -> str | None:
    """The inverse of `bits_of`; None for bits that are no such text."""
    sealed = np.packbits(bits[: BITS - 1]).tobytes()
    body = sealed[:LONGEST]
    if binascii.crc_hqx(body, 0xFFFF).to_bytes(2, "big") != sealed[LONGEST:]:
        return None
    try:
        return body.rstrip(b"\0").decode() or None
    except UnicodeDecodeError:
        return None


def library() -> Any:
    """The package; how this program starts processes stays as it was, which importing it changes."""
    method = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method(None, force=True)
    try:
        import blind_watermark
    except ImportError as problem:
        raise UserError(
            f"Watermarks need the package blind-watermark ({problem}); run: pip install blind-watermark"
        ) from None
    finally:
        multiprocessing.set_start_method(method, force=True)
    blind_watermark.bw_notes.close()
    return blind_watermark
