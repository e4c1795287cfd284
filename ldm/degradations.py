"""What spoils pictures: blur, fewer pixels, noise, JPEG. Training learns to undo it, measuring says how well.

Pictures are PIL images in RGB with 8 bits, as a spoiled file would be; randomness comes from a generator that is
handed in, so that the same seed and position spoil in the same way.
"""

from __future__ import annotations

import io
import math

import numpy as np
from PIL import Image, ImageFilter


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


def compressed(picture: Image.Image, quality: int, shift: int = 0) -> Image.Image:
    """Through a JPEG file of `quality`, 1 to 95, whose blocks begin `shift` pixels outside of the picture."""
    wide = np.pad(np.asarray(picture), ((shift, 0), (shift, 0), (0, 0)), mode="edge")
    file = io.BytesIO()
    Image.fromarray(wide).save(file, "JPEG", quality=quality)
    file.seek(0)
    with Image.open(file, formats=("JPEG",)) as read:
        return read.convert("RGB").crop((shift, shift, *read.size))


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
