"""How good editing is on pictures that a model has not seen: python -m tests.editing_quality RUN DATA

Inpainting: PSNR inside a hole, and the mean difference of the pixels on both sides of its edge, of 255; the same for a
hole filled with the mean of the known pixels, and what the original has there. Image to image: RMS distance to the
picture, of 255, at rising strength. Inversion: PSNR of the picture drawn again from its noise, and
of the autoencoder.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image

from ldm.data import DataConfig, open_source
from ldm.random import permutation
from pipelines import LatentDiffusion
from pipelines.editing import image_to_image, inpaint
from pipelines.inversion import drawn_again, invert

BOXES = ((21, 19, 45, 43), (5, 9, 30, 50))
"""Holes in pictures of 64 pixels, by turns; neither lies on the grid of the latents"""
STRENGTHS = (0.1, 0.3, 0.5, 0.7, 0.9)


def chosen(path: str, split: str, count: int) -> Iterator[tuple[Image.Image, str]]:
    """Pictures of 64 pixels and their captions, the same at each call."""
    source = open_source(DataConfig(path=path, split=split, size=64))
    for i in permutation(0, "editing", 0, len(source))[:count]:
        yield source.picture(int(i), 64), source.texts[i]


def array(image: Image.Image) -> np.ndarray:
    return np.asarray(image, dtype=np.float64)


def inside(made: np.ndarray, original: np.ndarray, hole: np.ndarray) -> float:
    """PSNR in dB where hole [H,W] is true."""
    return float(10 * np.log10(255**2 / np.square(made - original)[hole].mean()))


def over_edge(made: np.ndarray, box: tuple[int, int, int, int]) -> float:
    """Mean difference of the pixels on both sides of a box's edge."""
    left, top, right, bottom = box
    rows, columns = slice(top, bottom), slice(left, right)
    across = [made[rows, x - 1] - made[rows, x] for x in (left, right)]
    down = [made[y - 1, columns] - made[y, columns] for y in (top, bottom)]
    return float(np.abs(np.concatenate([*across, *down])).mean())


def inpainting(model: LatentDiffusion, pairs: Iterator[tuple[Image.Image, str]], steps: int) -> None:
    results = []
    for i, (picture, caption) in enumerate(pairs):
        box, original = BOXES[i % 2], array(picture)
        mask, hurt = Image.new("L", picture.size), picture.copy()
        mask.paste(255, box)
        hurt.paste((128, 128, 128), box)
        drawn = array(inpaint(model, hurt, mask, caption, steps=steps, guidance=2.0, seed=i)[0])
        hole = np.asarray(mask) > 0
        mean = np.where(hole[..., None], original[~hole].mean(0), original)
        edges = [over_edge(one, box) for one in (drawn, mean, original)]
        results.append((inside(drawn, original, hole), inside(mean, original, hole), *edges))
    figures = np.mean(results, axis=0)
    print("inpainting: {:.2f} dB in the hole, the mean {:.2f} dB; ".format(*figures), end="")
    print("over its edge {2:.2f}, the mean {3:.2f}, the original {4:.2f}".format(*figures), flush=True)


def strengths(model: LatentDiffusion, pairs: Iterator[tuple[Image.Image, str]], steps: int) -> None:
    distances = []
    for picture, caption in pairs:
        made = [image_to_image(model, picture, caption, strength=s, steps=steps)[0] for s in STRENGTHS]
        distances.append([np.sqrt(np.square(array(one) - array(picture)).mean()) for one in made])
    rising = sum(bool((np.diff(row) > 0).all()) for row in distances)
    means = ", ".join(f"{mean:.1f}" for mean in np.mean(distances, axis=0))
    print(f"image to image, strength {STRENGTHS}: distance {means}", end="")
    print(f"; rising for {rising} of {len(distances)}", flush=True)


def inversion(model: LatentDiffusion, pairs: Iterator[tuple[Image.Image, str]], steps: int) -> None:
    results = []
    for picture, caption in pairs:
        again = drawn_again(
            model, picture, invert(model, picture, caption, steps=steps), caption, steps=steps
        )
        results.append((again.psnr, again.ceiling))
    psnr, ceiling = np.mean(results, axis=0)
    print(f"inversion, {steps} steps: {psnr:.2f} dB; the autoencoder alone: {ceiling:.2f} dB", flush=True)


if __name__ == "__main__":
    reader = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    reader.add_argument("model")
    reader.add_argument("data")
    reader.add_argument("--split", default="test")
    reader.add_argument("--count", type=int, default=24)
    reader.add_argument("--steps", type=int, default=30)
    options = reader.parse_args()
    torch.set_num_threads(1)
    drawer = LatentDiffusion.from_pretrained(options.model)
    for measure in (inpainting, strengths, inversion):
        measure(drawer, chosen(options.data, options.split, options.count), options.steps)
