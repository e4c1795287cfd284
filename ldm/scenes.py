"""The embedded default data set: captioned pictures of simple things, drawn on the fly.

Level 1 shows one thing, "a large red circle at the top left on a white background"; level 2 shows two and how
they stand to each other, "a large red circle above a small blue star on a white background". Pictures never
run out, each is a function of (seed, index) alone, and every eighth combination of colour, shape and place is
kept out of training, so that what a model draws from a test caption cannot be remembered.

Lengths are fractions of the picture's side; x points right and y down, as in an image.
"""

import math
import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Literal, TypedDict

from PIL import Image, ImageDraw

VERSION = 1
"""Raised whenever the pictures or captions of an index change; part of every fingerprint."""

Colour = tuple[int, int, int]
Point = tuple[float, float]
Split = Literal["train", "test"]

COLOURS: dict[str, Colour] = {
    "red": (217, 43, 50),
    "orange": (246, 137, 31),
    "yellow": (250, 214, 48),
    "green": (46, 164, 79),
    "cyan": (52, 196, 214),
    "blue": (42, 88, 214),
    "purple": (121, 58, 171),
    "pink": (244, 122, 180),
}
BACKGROUNDS: dict[str, Colour] = {
    "white": (252, 252, 250),
    "beige": (235, 220, 190),
    "gray": (146, 149, 156),
    "black": (27, 27, 33),
}
SHAPES = ("circle", "square", "triangle", "star", "heart", "ring")
SIZES: dict[str, float] = {"small": 0.13, "large": 0.2}
"""Radius of a thing's circle; the other shapes are as big as that circle looks."""

PLACES: dict[str, Point] = {
    "center": (0.5, 0.5),
    "top left": (0.28, 0.28),
    "top right": (0.72, 0.28),
    "bottom left": (0.28, 0.72),
    "bottom right": (0.72, 0.72),
}
"""Centre of the thing at level 1."""

SIDES: dict[str, Point] = {
    "left": (0.25, 0.5),
    "right": (0.75, 0.5),
    "top": (0.5, 0.25),
    "bottom": (0.5, 0.75),
}
"""Centres of the things at level 2."""

RELATIONS: dict[str, tuple[str, str]] = {
    "to the left of": ("left", "right"),
    "to the right of": ("right", "left"),
    "above": ("top", "bottom"),
    "below": ("bottom", "top"),
}
"""What a relation says about the places of the first and of the second thing."""

SUPERSAMPLING = 4
TURN, SHIFT, GROWTH = math.radians(8), 0.02, 0.06
"""How far pictures of one caption may differ: rotation, place, and radius as a fraction of itself."""

TINT, BACKGROUND_TINT = 6, 3
"""How far the colours may differ in each channel, of 255."""


@dataclass(frozen=True, slots=True)
class Thing:
    """One drawn object; `place` is one of PLACES at level 1 and one of SIDES at level 2."""

    colour: str
    shape: str
    size: str
    place: str

    def __str__(self) -> str:
        return f"a {self.size} {self.colour} {self.shape}"


@dataclass(frozen=True, slots=True)
class Scene:
    """What a picture shows: one thing and no relation, or two things and one of RELATIONS."""

    things: tuple[Thing, ...]
    relation: str | None
    background: str

    def caption(self) -> str:
        """The scene in words, from which `parse` gets it back."""
        first, *second = self.things
        where = f"{self.relation} {second[0]}" if second else f"at the {first.place}"
        return f"{first} {where} on a {self.background} background"


def _one_of(words: Iterable[str]) -> str:
    return f"({'|'.join(words)})"


_THING = f"a {_one_of(SIZES)} {_one_of(COLOURS)} {_one_of(SHAPES)}"
_CAPTIONS = (
    re.compile(f"{_THING} at the {_one_of(PLACES)} on a {_one_of(BACKGROUNDS)} background"),
    re.compile(f"{_THING} {_one_of(RELATIONS)} {_THING} on a {_one_of(BACKGROUNDS)} background"),
)


def parse(caption: str) -> Scene:
    """The scene that `caption` describes, the inverse of `Scene.caption`; ValueError for any other text."""
    if match := _CAPTIONS[0].fullmatch(caption):
        size, colour, shape, place, background = match.groups()
        return Scene((Thing(colour, shape, size, place),), None, background)
    if match := _CAPTIONS[1].fullmatch(caption):
        size, colour, shape, relation, other_size, other_colour, other_shape, background = match.groups()
        places = RELATIONS[relation]
        first, second = (
            Thing(colour, shape, size, places[0]),
            Thing(other_colour, other_shape, other_size, places[1]),
        )
        return Scene((first, second), relation, background)
    raise ValueError(
        f"caption {caption!r} does not describe a scene; write it like "
        "'a large red circle at the top left on a white background'."
    )


def held_out(scene: Scene) -> bool:
    """Whether `scene` is kept out of training: whether one of its things belongs to the test split.

    As in a Latin square, every (shape, place) loses exactly one colour of eight, and every other pair loses
    at most one place or shape, so that training still shows every pair of attributes.
    """
    colours, places = list(COLOURS), [*PLACES, *SIDES]
    return any(
        (colours.index(thing.colour) + 3 * SHAPES.index(thing.shape) + 5 * places.index(thing.place)) % 8 == 0
        for thing in scene.things
    )


@lru_cache
def every_scene(level: int = 1, split: Split = "train") -> tuple[Scene, ...]:
    """All scenes of a level (1 or 2) that belong to a split, in a fixed order."""
    looks = list(product(COLOURS, SHAPES, SIZES))
    if level == 1:
        things = [(Thing(*look, place),) for look in looks for place in PLACES]
        scenes = [Scene(thing, None, background) for thing in things for background in BACKGROUNDS]
    elif level == 2:
        thing = {(look, side): Thing(*look, side) for look in looks for side in SIDES}
        scenes = [
            Scene((thing[a, places[0]], thing[b, places[1]]), relation, background)
            for a, b in product(looks, looks)
            if a[:2] != b[:2]  # "a small red star above a large red star" says too little
            for relation, places in RELATIONS.items()
            for background in BACKGROUNDS
        ]
    else:
        raise ValueError(f"level is {level!r}; set it to 1 (one thing) or 2 (two things and a relation).")
    if split not in ("train", "test"):
        raise ValueError(f"split is {split!r}; set it to 'train' or 'test'.")
    return tuple(scene for scene in scenes if held_out(scene) == (split == "test"))


def _ray(radius: float, angle: float) -> Point:
    """The point at `radius` and `angle`, clockwise from straight up."""
    return radius * math.sin(angle), -radius * math.cos(angle)


def _heart(t: float) -> Point:
    """The heart curve of https://mathworld.wolfram.com/HeartCurve.html, as big as the unit circle."""
    y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
    return math.sin(t) ** 3, -(y + 2.5) / 15.5


_TURNS = [math.tau * step / 48 for step in range(48)]
_CIRCLE = [_ray(1, angle) for angle in _TURNS]
_OUTLINES: dict[str, list[Point]] = {
    "circle": _CIRCLE,
    "square": [(-0.87, -0.87), (0.87, -0.87), (0.87, 0.87), (-0.87, 0.87)],
    "triangle": [(0, -0.95), (0.98, 0.78), (-0.98, 0.78)],
    "star": [
        (x, y + 0.06) for x, y in (_ray(0.52 if tip % 2 else 1.08, math.pi * tip / 5) for tip in range(10))
    ],
    "heart": [_heart(angle) for angle in _TURNS],
    "ring": [(1.05 * x, 1.05 * y) for x, y in _CIRCLE],
}
_HOLE = 0.5


def mask(shape: str, size: int, centre: Point, radius: float, turn: float) -> Image.Image:
    """The anti-aliased silhouette of a shape, 0..255, `size` pixels square; `turn` in radians, clockwise."""
    scale = size * SUPERSAMPLING
    cos, sin = radius * scale * math.cos(turn), radius * scale * math.sin(turn)
    middle_x, middle_y = centre[0] * scale, centre[1] * scale

    def placed(outline: list[Point]) -> list[Point]:
        return [(middle_x + cos * x - sin * y, middle_y + sin * x + cos * y) for x, y in outline]

    image = Image.new("L", (scale, scale))
    brush = ImageDraw.Draw(image)
    brush.polygon(placed(_OUTLINES[shape]), fill=255)
    if shape == "ring":
        brush.polygon(placed([(_HOLE * x, _HOLE * y) for x, y in _CIRCLE]), fill=0)
    return image.reduce(SUPERSAMPLING)


def draw(scene: Scene, size: int, rng: random.Random) -> Image.Image:
    """One picture of `scene`, RGB, `size` pixels square; `rng` decides its small differences from others."""
    return draw_with_mask(scene, size, rng)[0]


def draw_with_mask(scene: Scene, size: int, rng: random.Random) -> tuple[Image.Image, Image.Image]:
    """The picture, and its mask (L): 0 for the background, else one more than the place of the shape in SHAPES.

    Only `rng.random` is used, whose sequence Python promises to keep.
    """

    def about(value: float, spread: float) -> float:
        return value + spread * (2 * rng.random() - 1)

    def tinted(colour: Colour, spread: float) -> Colour:
        red, green, blue = (min(255, max(0, round(about(channel, spread)))) for channel in colour)
        return red, green, blue

    image = Image.new("RGB", (size, size), tinted(BACKGROUNDS[scene.background], BACKGROUND_TINT))
    numbers = Image.new("L", (size, size))
    for thing in scene.things:
        x, y = PLACES[thing.place] if scene.relation is None else SIDES[thing.place]
        centre = about(x, SHIFT), about(y, SHIFT)
        radius = SIZES[thing.size] * about(1, GROWTH)
        silhouette = mask(thing.shape, size, centre, radius, about(0, TURN))
        image.paste(tinted(COLOURS[thing.colour], TINT), mask=silhouette)
        numbers.paste(1 + SHAPES.index(thing.shape), mask=silhouette.point(lambda cover: 255 * (cover > 127)))
    return image, numbers


class Sample(TypedDict):
    """One picture (RGB), its caption, and the index of its (first) shape in `Scenes.classes`."""

    image: Image.Image
    text: str
    label: int


class Scenes:
    """`count` captioned pictures, `size` pixels square; an index always gives the same one.

    Any index up to 2**31 draws something new, also beyond `count`, which only says where an epoch ends.
    """

    classes = SHAPES

    def __init__(
        self, count: int, size: int = 64, level: int = 1, split: Split = "train", seed: int = 0
    ) -> None:
        self.count, self.size, self.level, self.split, self.seed = count, size, level, split, seed
        if count < 1 or size < 16:
            raise ValueError(f"count is {count} and size is {size}; ask for at least 1 picture of 16 pixels.")
        every_scene(level, split)  # refuses what is no level or no split

    @property
    def fingerprint(self) -> str:
        """Names this data set's content: sets with equal fingerprints show the same pictures and captions."""
        parameters = (
            f"count={self.count} size={self.size} level={self.level} split={self.split} seed={self.seed}"
        )
        return f"scenes version={VERSION} {parameters}"

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(self.count))

    def scene(self, index: int) -> Scene:
        """What picture `index` shows, without drawing it."""
        return self._scene(index)[0]

    def _scene(self, index: int) -> tuple[Scene, random.Random]:
        """What picture `index` shows, and the randomness that is left to draw it with."""
        if not 0 <= index < 2**31:
            raise IndexError(f"index is {index}; scenes are numbered from 0 to 2**31 - 1.")
        rng = random.Random(f"{self.seed}/{self.split}/{index}")
        scenes = every_scene(self.level, self.split)
        return scenes[int(rng.random() * len(scenes))], rng

    def mask(self, index: int) -> Image.Image:
        """What each pixel of picture `index` shows, as `draw_with_mask` says."""
        scene, rng = self._scene(index)
        return draw_with_mask(scene, self.size, rng)[1]

    def __getitem__(self, index: int) -> Sample:
        scene, rng = self._scene(index)
        return {
            "image": draw(scene, self.size, rng),
            "text": scene.caption(),
            "label": SHAPES.index(scene.things[0].shape),
        }


def prompts(n: int, split: Split = "test", level: int = 1, seed: int = 0) -> list[str]:
    """`n` different captions of a split; ValueError where there are not that many."""
    scenes = every_scene(level, split)
    if n > len(scenes):
        raise ValueError(
            f"n is {n}, but there are only {len(scenes)} {split} captions at level {level}; ask for fewer."
        )
    rng = random.Random(seed)
    return [scene.caption() for scene in sorted(scenes, key=lambda _: rng.random())[:n]]
