"""What spoils pictures: blur, fewer pixels, noise, JPEG. Training learns to undo it, measuring says how well.

Pictures are PIL images in RGB with 8 bits, as a spoiled file would be; randomness comes from a generator that is
handed in, so that the same seed and position spoil in the same way.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter

Range = tuple[float, float]


def blurred(picture: Image.Image, radius: float) -> Image.Image:
    """Gaussian blur with a standard deviation of `radius` pixels."""
    return picture.filter(ImageFilter.GaussianBlur(radius))


def smaller(picture: Image.Image, factor: int) -> Image.Image:
    """Shrunk by a whole factor, bicubic with antialiasing; at least one pixel a side is left."""
    size = max(1, round(picture.width / factor)), max(1, round(picture.height / factor))
    return picture.resize(size, Image.Resampling.BICUBIC)


def noisy(picture: Image.Image, std: float, rng: np.random.Generator) -> Image.Image:
    """Gaussian noise with a standard deviation of `std` of 255 levels, rounded and clipped to what a file can hold."""
    levels = np.asarray(picture, dtype=np.float32)
    spoiled = levels + std * rng.standard_normal(levels.shape, dtype=np.float32)
    return Image.fromarray(spoiled.round().clip(0, 255).astype(np.uint8))


def compressed(picture: Image.Image, quality: int) -> Image.Image:
    """Through a JPEG file of `quality`, 1 to 95."""
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=quality)
    file.seek(0)
    with Image.open(file, formats=("JPEG",)) as read:
        return read.convert("RGB")


def noise_level(picture: Image.Image) -> float:
    """Standard deviation of Gaussian noise, of 255 levels, estimated from the picture itself (Immerkaer 1996).

    From what a difference of two Laplacians leaves of it: lines count as noise, so that clean pictures get more than 0.
    """
    grey = np.asarray(picture.convert("RGB"), dtype=np.float64).transpose(2, 0, 1)
    if min(grey.shape[1:]) < 3:
        raise ValueError(f"the picture is {picture.size}, too small to estimate its noise; give the noise")
    rows = grey[:, :-2] - 2 * grey[:, 1:-1] + grey[:, 2:]
    rest = rows[:, :, :-2] - 2 * rows[:, :, 1:-1] + rows[:, :, 2:]
    return float(math.sqrt(math.pi / 2) * np.abs(rest).mean() / 6)


@dataclass(frozen=True, kw_only=True)
class Damage:
    """Ranges that the strength of each damage is drawn from, evenly; null: that one never happens."""

    blur: Range | None = (0.3, 1.5)
    """Standard deviation of Gaussian blur in pixels"""
    noise: Range | None = (2.0, 40.0)
    """Standard deviation of Gaussian noise, of 255 levels"""
    jpeg: Range | None = (10.0, 80.0)
    """Quality of JPEG compression, 1 to 95"""
    share: float = 0.6
    """Probability of each of them; a picture may get several, in this order, or none"""

    def __post_init__(self) -> None:
        limits = {"blur": (0.0, 64.0), "noise": (0.0, 255.0), "jpeg": (1.0, 95.0)}
        for name, (least, most) in limits.items():
            value = getattr(self, name)
            if value is not None and not least <= value[0] <= value[1] <= most:
                raise ValueError(
                    f"restore.{name} is {value}, but must be two numbers from {least:g} to {most:g}"
                )
        if not 0 < self.share <= 1:
            raise ValueError(f"restore.share is {self.share}, but must lie in (0, 1]")

    def done(self, picture: Image.Image, rng: np.random.Generator) -> Image.Image:
        """The picture, damaged."""
        strength = {
            name: rng.uniform(*span)
            for name in ("blur", "noise", "jpeg")
            if (span := getattr(self, name)) is not None and rng.uniform() < self.share
        }
        if "blur" in strength:
            picture = blurred(picture, strength["blur"])
        if "noise" in strength:
            picture = noisy(picture, strength["noise"], rng)
        if "jpeg" in strength:
            picture = compressed(picture, round(strength["jpeg"]))
        return picture
