"""Reads drawn scenes off pixels: does a picture show what its caption says?

The background is the usual colour of the border; things are the blobs that differ from it; a blob's shape is
the silhouette, drawn by the same code with the same centroid and area, that overlaps it best. The pictures of
a model are a little blurred and off-colour, which is forgiven; what is too far from every named value is
called unclear, and unclear satisfies no caption.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import product

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch.nn import functional as F

from ldm.scenes import (
    BACKGROUNDS,
    COLOURS,
    PLACES,
    RELATIONS,
    SHAPES,
    SIDES,
    SIZES,
    TURN,
    Point,
    Scene,
    Thing,
    mask,
    parse,
)

UNCLEAR = "unclear"
"""Stands for an attribute that is too far from every value it can have."""

Array = np.ndarray[tuple[int, ...], np.dtype[np.float64]]

COLOUR_TOLERANCE = 70.0
"""How far a colour may be from every named one, Euclidean in RGB of 0..255. Like the next two, it lies beyond
half the distance of the closest two names, and so refuses only what is far from all of them."""

PLACE_TOLERANCE = 0.12
"""How far a thing's centre may be from every named place, in the picture's side."""

SIZE_TOLERANCE = math.log(1.35)
"""How far the logarithm of a thing's radius may be from that of every named size."""

OVERLAP_NEEDED = 0.8
"""Intersection over union of a thing and its silhouette. Drawn pictures keep this under a blur of 0.7 pixels
and noise of 8/255; a heart upside down reaches 0.78, a cross 0.7."""

CONTRAST = 40.0
"""RGB distance from the background at which a pixel belongs to a thing; the drawn colours keep 95 or more."""

BLUR = ImageFilter.Kernel((3, 3), (1, 2, 1, 2, 4, 2, 1, 2, 1))
"""What the decoder of a model may do to an edge: a standard deviation of 0.7 pixels."""

FADINGS = (1.0, 0.8)
"""Blurred, a thin thing has but a part of its colour everywhere, and seems to cover more than it does."""

SPECK = 0.0025
"""Blobs smaller than this fraction of the picture are not things; the smallest drawn thing covers 0.025."""


def read(image: Image.Image | np.ndarray) -> Scene:
    """What a square picture shows; an array is uint8 [H,W,3], anything else a ValueError.

    `things` holds one thing for each blob, and is empty for an empty picture; a pair is told from the left or
    from the top. Attributes that cannot be told are UNCLEAR.
    """
    raw = np.asarray(image.convert("RGB") if isinstance(image, Image.Image) else image)
    if raw.dtype != np.uint8 or raw.shape != (len(raw), len(raw), 3):
        raise ValueError(f"image is {raw.dtype} {list(raw.shape)}; give a square one, RGB or uint8 [H,W,3].")
    pixels = raw.astype(np.float64)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    ground: Array = np.median(border, axis=0)
    contrast = np.linalg.norm(pixels - ground, axis=-1)
    regions = _blobs(contrast > CONTRAST)
    background = _nearest(ground, BACKGROUNDS, COLOUR_TOLERANCE)
    places = SIDES if len(regions) == 2 else PLACES
    things = sorted((_thing(pixels, ground, region, places) for region in regions), key=_reading_order)
    return Scene(tuple(things), _relation(things), background)


def satisfied(image: Image.Image | np.ndarray, caption: str) -> dict[str, bool]:
    """Whether a picture shows its caption: for each attribute, and "all" of them.

    The attributes are colour, shape, size, background, and place or, where the caption tells of two things,
    relation; an attribute of two things holds if it does for both. With another number of things than the
    caption's only the background can hold. ValueError for a caption that describes no scene.
    """
    seen, told = read(image), parse(caption)
    where = "place" if told.relation is None else "relation"
    holds = dict.fromkeys(("colour", "shape", "size", where), False)
    if len(seen.things) == len(told.things):
        orders = (
            seen.things,
            seen.things[::-1],
        )  # "above" says of two things what "below" says the other way
        holds = max(
            (_matches(order, told.things, where) for order in orders), key=lambda match: sum(match.values())
        )
    holds["background"] = seen.background == told.background
    return holds | {"all": all(holds.values())}


def score(images: Sequence[Image.Image | np.ndarray], captions: Sequence[str]) -> dict[str, float]:
    """The fraction of pictures, 0..1, that satisfy their captions: for each attribute and for "all"."""
    if len(images) != len(captions) or not images:
        raise ValueError(
            f"There are {len(images)} images for {len(captions)} captions; give one caption for each image."
        )
    results = [satisfied(image, caption) for image, caption in zip(images, captions, strict=True)]
    names = dict.fromkeys(name for result in results for name in result)
    return {name: float(np.mean([result[name] for result in results if name in result])) for name in names}


def _matches(seen: Sequence[Thing], told: Sequence[Thing], where: str) -> dict[str, bool]:
    pairs = list(zip(seen, told, strict=True))
    return {
        "colour": all(a.colour == b.colour for a, b in pairs),
        "shape": all(a.shape == b.shape for a, b in pairs),
        "size": all(a.size == b.size for a, b in pairs),
        where: all(a.place == b.place for a, b in pairs),
    }


def _reading_order(thing: Thing) -> int:
    return [*PLACES, *SIDES, UNCLEAR].index(thing.place)


def _relation(things: Sequence[Thing]) -> str | None:
    if len(things) < 2:
        return None
    sides = tuple(thing.place for thing in things)
    return next((relation for relation, places in RELATIONS.items() if places == sides), UNCLEAR)


def _nearest(value: Iterable[float], named: Mapping[str, Sequence[float]], tolerance: float) -> str:
    distances = {name: math.dist(value, reference) for name, reference in named.items()}
    name = min(distances, key=lambda name: distances[name])
    return name if distances[name] <= tolerance else UNCLEAR


def _grown(region: torch.Tensor) -> torch.Tensor:
    """Each pixel [H,W] becomes the greatest of itself and its eight neighbours."""
    return F.max_pool2d(region[None], 3, stride=1, padding=1)[0]


def _blobs(foreground: np.ndarray) -> list[torch.Tensor]:
    """The connected regions of a bool [H,W] that are no specks, each a float [H,W] of 0 and 1."""
    inside = torch.from_numpy(foreground).float()
    labels, last = inside * torch.arange(1.0, inside.numel() + 1).view_as(inside), torch.empty(0)
    while not torch.equal(labels, last):  # every region takes on the greatest of its pixels' numbers
        labels, last = _grown(labels) * inside, labels
    names, areas = torch.unique(labels[labels > 0], return_counts=True)
    return [(labels == name).float() for name in names[areas >= SPECK * inside.numel()]]


def _thing(pixels: Array, ground: Array, region: torch.Tensor, places: Mapping[str, Point]) -> Thing:
    own = pixels[region.bool().numpy()]
    strength = np.linalg.norm(own - ground, axis=-1)
    pure = strength > 0.85 * np.quantile(strength, 0.9)  # the edge mixes the colour with the background's
    colour: Array = np.median(own[pure], axis=0)

    # A pixel of coverage c is ground + c (colour - ground); what is far off that line is of another colour.
    direction = colour - ground
    coverage = ((pixels - ground) @ direction / (direction @ direction)).clip(0, 1)
    off_line = np.linalg.norm(pixels - ground - coverage[..., None] * direction, axis=-1)
    coverage = coverage * (off_line < COLOUR_TOLERANCE) * _grown(region).numpy()

    shape, centre, radius, overlap = _fit(coverage)
    return Thing(
        _nearest(colour, COLOURS, COLOUR_TOLERANCE),
        shape if overlap >= OVERLAP_NEEDED else UNCLEAR,
        _nearest(
            [math.log(radius)], {name: [math.log(size)] for name, size in SIZES.items()}, SIZE_TOLERANCE
        ),
        _nearest(centre, places, PLACE_TOLERANCE),
    )


def _fit(coverage: Array) -> tuple[str, Point, float, float]:
    """The shape that overlaps `coverage` [H,W] of 0..1 best: its name, centre, radius, and overlap 0..1."""
    fits = []
    for shape, fading in product(SHAPES, FADINGS):
        faded = fading * coverage
        area, (x, y) = _moments(faded)
        unit_area, (unit_x, unit_y) = _unit_moments(shape)
        radius = math.sqrt(area / unit_area)
        centre = x - radius * unit_x, y - radius * unit_y
        for turn in (0,) if shape in ("circle", "ring") else (-2 / 3 * TURN, 0, 2 / 3 * TURN):
            silhouette = mask(shape, len(coverage), centre, radius, turn)
            for candidate in (silhouette, silhouette.filter(BLUR)):
                covered = np.asarray(candidate) / 255
                overlap = np.minimum(faded, covered).sum() / np.maximum(faded, covered).sum()
                fits.append((shape, centre, radius, float(overlap)))
    return max(fits, key=lambda fit: fit[-1])


def _moments(coverage: Array) -> tuple[float, Point]:
    """Area and centroid of a silhouette [H,W], in the picture's side."""
    side = len(coverage)
    middles = (np.arange(side) + 0.5) / side
    total = coverage.sum()
    return total / side**2, (coverage.sum(0) @ middles / total, coverage.sum(1) @ middles / total)


@lru_cache
def _unit_moments(shape: str) -> tuple[float, Point]:
    """Area and centroid, from its centre, of a shape of radius 1."""
    area, (x, y) = _moments(np.asarray(mask(shape, 256, (0.5, 0.5), 0.25, 0)) / 255)
    return area * 16, ((x - 0.5) * 4, (y - 0.5) * 4)
