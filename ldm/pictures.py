"""One picture from bytes that nobody vouches for to RGB pixels of a chosen size.

Only the formats in `FORMATS` are ever opened, no URL is fetched, nothing outside the data folder is read, and the
header is judged before anything is decoded. Whatever is wrong is a `BadPicture` that names the picture.
"""

from __future__ import annotations

import functools
import io
import os
import stat
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError
from torch import Tensor

from ldm.config import UserError

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
PICTURES = {".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"}
OTHER_PICTURES = {
    ".svg",
    ".eps",
    ".ps",
    ".pdf",
    ".psd",
    ".heic",
    ".heif",
    ".ico",
    ".jp2",
    ".jxl",
    ".tga",
    ".exr",
}
"""Files that somebody may have meant as pictures: they are counted as bad, not passed over."""
MASK_COLUMNS = ("mask", "masks", "annotation", "segmentation")
"""Of pictures that say what others show"""
LARGEST_FILE = 2**30
"""Bytes: a picture file larger than this is not read."""
SIGNS = {
    b"<svg": "SVG",
    b"<?xml": "XML or SVG",
    b"<": "HTML or XML",
    b"%PDF": "PDF",
    b"%!PS": "PostScript",
    b"\xc5\xd0\xd3\xc6": "EPS",
}


class BadPicture(UserError):
    """A picture that can't be used; `name` is where it is and `reason` what is wrong with it."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)
        self.name, self.reason = name, reason

    def __str__(self) -> str:
        return f"{self.name} {self.reason}"


class Stored(NamedTuple):
    """Where a picture is: its bytes themselves, or a file."""

    name: str
    data: bytes | None = None
    path: str | None = None
    root: Path | None = None
    """The resolved folder that the file must lie in"""


class Some(Sequence[Stored]):
    """Some of the pictures, in the order of `indices`."""

    def __init__(self, pictures: Sequence[Stored], indices: Sequence[int]) -> None:
        self.pictures, self.indices = pictures, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: Any) -> Any:
        return self.pictures[self.indices[index]]


class Joined(Sequence[Stored]):
    """The pictures of several places, one after the other."""

    def __init__(self, parts: Sequence[Sequence[Stored]]) -> None:
        self.parts, self.ends = parts, list(accumulate(map(len, parts)))

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        part = bisect_right(self.ends, index)
        return self.parts[part][index - (self.ends[part - 1] if part else 0)]


class Picture(NamedTuple):
    """A decoded picture."""

    image: Image.Image  # upright; RGB, RGBA if parts are transparent, or L
    format: str  # as Pillow names it
    mode: str  # as stored
    remark: str  # what the person should know about it, or nothing


def content(stored: Stored) -> bytes:
    """The bytes of a picture.

    Raises:
        BadPicture: there are none, or its file is not a regular one inside `root`.
    """
    if stored.data is not None:
        if not stored.data:
            raise BadPicture(stored.name, "is empty")
        return stored.data
    if not stored.path:
        raise BadPicture(stored.name, "has neither bytes nor a file")
    if "://" in stored.path:
        raise BadPicture(stored.name, "is a URL, and nothing is fetched; download it first")
    path = Path(stored.path)
    if stored.root and not path.resolve().is_relative_to(stored.root):
        raise BadPicture(stored.name, f"leads out of the data folder, to {path.resolve()}")
    if path.is_dir():
        raise BadPicture(stored.name, "is a folder")
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))  # a FIFO would block for ever
    except OSError as problem:
        raise BadPicture(stored.name, f"can't be opened: {problem.strerror}") from None
    with open(handle, "rb") as file:  # noqa: PTH123
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise BadPicture(stored.name, "is not a regular file")
        if status.st_size > LARGEST_FILE:
            raise BadPicture(stored.name, f"is a file of {status.st_size:,} bytes")
        try:
            return file.read() or _empty(stored.name)
        except OSError as problem:
            raise BadPicture(stored.name, f"can't be read: {problem.strerror}") from None


def _empty(name: str) -> bytes:
    raise BadPicture(name, "is empty")


def decoded(name: str, data: bytes, megapixels: float, *, whole: bool = False) -> Picture:
    """The picture in `data`, turned upright as its EXIF data says, colours as sRGB.

    Args:
        megapixels: a picture with more in its header is not decoded.
        whole: also verify the check sums of formats that have them, which decoding alone does not.

    Raises:
        BadPicture: it is in no known format, too large, damaged, or has values that can't be shown.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            if width * height > megapixels * 1e6:
                raise BadPicture(name, f"is {width}x{height}, larger than data.max_megapixels {megapixels:g}")
            if whole and image.format == "PNG":
                with Image.open(io.BytesIO(data), formats=FORMATS) as other:
                    other.verify()
            still = not getattr(image, "is_animated", False) or image.format == "MPO"
            remark = "" if still else "has several frames: only the first is used"
            mode, kind = image.mode, image.format or ""
            image.load()
            return Picture(_plain(ImageOps.exif_transpose(image)), kind, mode, remark)
    except BadPicture:
        raise
    except UnidentifiedImageError:
        start = data[:256].lstrip().lower()
        sign = next((name for sign, name in SIGNS.items() if start.startswith(sign.lower())), None)
        what = f"is {sign}" if sign else "is in no format that is read"
        raise BadPicture(name, f"{what}; pictures are {', '.join(FORMATS)}") from None
    except Image.DecompressionBombError as problem:
        raise BadPicture(name, f"is larger than data.max_megapixels {megapixels:g}: {problem}") from None
    except Exception as problem:  # a damaged file can make a decoder raise anything
        first = " ".join(str(problem).split()) or type(problem).__name__
        raise BadPicture(name, f"is damaged: {first}") from None


def _plain(image: Image.Image) -> Image.Image:
    """Any upright picture as RGB, RGBA or L; ValueError if its values can't be shown."""
    if image.mode.startswith(("I", "F")):
        return Image.fromarray(_grey(image))
    if image.has_transparency_data:
        clear = image.convert("RGBA")
        solid = _as_srgb(clear.convert("RGB"), image.info.get("icc_profile"))
        solid.putalpha(clear.getchannel("A"))
        return solid
    if image.mode in ("CMYK", "LAB"):
        return _as_srgb(image, image.info.get("icc_profile"))
    return _as_srgb(image.convert("RGB"), image.info.get("icc_profile") if image.mode == "RGB" else None)


def _grey(image: Image.Image) -> np.ndarray:
    """[H,W] uint8 of a grey picture of more than 8 bits: scaled, not clipped."""
    grey = np.asarray(image).astype(np.float64)
    low, high = grey.min(), grey.max()
    if not np.isfinite(grey).all():
        raise ValueError("it has values that are not numbers (NaN or infinite)")
    if image.mode.startswith("F") and high <= 1:
        white = 1.0
    elif image.mode.startswith("F") and high <= 255:
        white = 255.0
    else:
        white = 65535.0
    if low < 0 or high > white:
        raise ValueError(f"its values run from {low:g} to {high:g}; use 0 to 1, 255 or 65535")
    return (grey * (255 / white)).round().astype(np.uint8)


def _as_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """RGB, CMYK or LAB as sRGB, through the embedded colour profile where there is a usable one."""
    transform = _transform(profile, image.mode)
    if transform is None:
        return image.convert("RGB")
    return ImageCms.applyTransform(image, transform) or image


@functools.lru_cache(maxsize=64)
def _transform(profile: bytes | None, mode: str) -> ImageCms.ImageCmsTransform | None:
    """From a profile to sRGB; None if there is nothing to convert, or the profile is damaged or of another mode."""
    srgb = ImageCms.createProfile("sRGB")
    try:
        if mode == "LAB":
            return ImageCms.buildTransform(ImageCms.createProfile("LAB"), srgb, mode, "RGB")
        if not profile:
            return None
        embedded = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if mode == "RGB" and "srgb" in ImageCms.getProfileDescription(embedded).lower():
            return None
        return ImageCms.buildTransform(embedded, srgb, mode, "RGB")
    except (ImageCms.PyCMSError, OSError, ValueError):
        return None


def fitted(
    image: Image.Image,
    size: int | tuple[int, int],
    background: str,
    place: tuple[float, float] = (0.5, 0.5),
) -> Image.Image:
    """Any PIL image as RGB of `size`: turned upright, flattened onto `background`, shrunk or grown, cropped.

    Args:
        size: side of a square, or (width, height), in pixels.
        place: where the crop lies in what is too long, from (0, 0), left and top, to (1, 1).
    """
    image = ImageOps.exif_transpose(image)
    if image.mode not in ("RGB", "RGBA"):
        image = _plain(image)
    target = (size, size) if isinstance(size, int) else size
    return ImageOps.fit(flattened(image, background), target, Image.Resampling.LANCZOS, centering=place)


def flattened(image: Image.Image, background: str) -> Image.Image:
    """RGB, RGBA or L as RGB, with `background` behind what is transparent."""
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, background), image)
    return image.convert("RGB")


def to_tensor(image: Image.Image) -> Tensor:
    """RGB picture => [3,H,W] float32 in [-1, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div(127.5).sub(1)


def to_images(pixels: Tensor) -> list[Image.Image]:
    """[B,3,H,W] in [-1, 1] => RGB pictures, as stock pipelines round them."""
    levels = (pixels.float() / 2 + 0.5).clamp(0, 1).mul(255).round()
    return [Image.fromarray(p) for p in levels.to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()]
