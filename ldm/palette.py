"""The colours that stand for classes where masks are diffused as pictures, and back."""

from __future__ import annotations

from functools import cache
from itertools import product

import numpy as np
from PIL import Image


@cache
def palette(count: int) -> np.ndarray:
    """[count,3] uint8 colours far from each other: white, then what is farthest from all before, black last.

    Neither is quite so: at the ends of the range autoencoders are least exact. All callers share the array.
    """
    levels = next(n for n in range(2, 8) if n**3 >= count)
    grid = np.array([*product(np.linspace(40, 215, levels), repeat=3)])[::-1]  # white first, black last
    chosen = [0]
    while len(chosen) < min(count, len(grid) - 1):
        nearest = np.square(grid[:-1, None] - grid[chosen]).sum(2).min(1)
        chosen.append(int(nearest.argmax()))
    chosen += [len(grid) - 1] * (count == len(grid))
    colours = grid[chosen].round().astype(np.uint8)
    colours.flags.writeable = False
    return colours


def coloured(mask: np.ndarray, count: int) -> Image.Image:
    """[H,W] numbers of `count` classes as RGB."""
    return Image.fromarray(palette(count)[mask])


def named(pixels: np.ndarray, count: int) -> np.ndarray:
    """[...,3] colours of 255 => [...] uint8, the class of the nearest colour of the palette."""
    distance = np.square(pixels[..., None, :].astype(np.float32) - palette(count).astype(np.float32)).sum(-1)
    return distance.argmin(-1).astype(np.uint8)
