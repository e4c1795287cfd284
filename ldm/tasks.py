"""Tasks that begin with a picture: what the network is given of it, and what it is to make.

    inpaint   given the hole and the latents of the picture without it     made: the whole picture
    upscale   given the small picture, and how noisy it was made           made: the large one
    restore   given the damaged picture                                    made: the sound one
    segment   given the picture                                            made: its masks, a colour for each class

What is given joins the noisy latents as more channels (`Cond.image`). For inpainting these are those of stock U-Nets.
A picture as it is has more pixels than the latents: those that share a place become its channels, so that nothing is
lost and nothing needs encoding.
Shapes: B batch; H x W pixels of what is made; h x w = H/f x W/f latent pixels; C latent channels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageChops, ImageDraw
from torch import Tensor

from ldm import random
from ldm.conditioning import Words
from ldm.config import plain
from ldm.degradations import blurred, compressed, noisy, smaller
from ldm.pictures import to_images, to_tensor

if TYPE_CHECKING:  # drawing needs neither data nor caches
    from ldm.cache import LatentCache
    from ldm.sampling import Pixels

TaskName = Literal["text", "class", "unconditional", "inpaint", "upscale", "restore", "segment"]
WORDS: dict[str, Words] = {"text": "text", "class": "class", "unconditional": "none", "inpaint": "text"}
"""What a task tells in words, if `conditioning.kind` does not say; others nothing"""

Encode: TypeAlias = Callable[[Tensor], Tensor]
"""Pixels [B,3,H,W] in [-1, 1] to latents [B,C,h,w]"""
Given: TypeAlias = Mapping[str, Tensor]
"""What a batch is given besides words: "picture" [B,3,?,?] in [-1, 1], and what the task adds"""


@dataclass(frozen=True, kw_only=True)
class Inpaint:
    """Filling a hole."""

    kind: ClassVar[str] = "inpaint"
    whole: float = 0.1
    """Share of samples of which nothing is known"""

    def __post_init__(self) -> None:
        if not 0 <= self.whole <= 1:
            raise ValueError(f"inpaint.whole is {self.whole}, but must lie in [0, 1]")

    def channels(self, factor: int, latent: int) -> int:
        """Channels of what is given, for an autoencoder with f = `factor` and C = `latent`."""
        return 1 + latent

    def spoiled(self, picture: Image.Image, rng: np.random.Generator) -> dict[str, Tensor]:
        """What the network is given of one picture: the picture itself, and "mask" [1,H,W], 1 in the hole."""
        whole = rng.uniform() < self.whole
        hole = Image.new("L", picture.size, 255) if whole else random_hole(picture.size, rng)
        return {"picture": to_tensor(picture), "mask": torch.from_numpy(np.array(hole))[None] / 255}

    def image(self, given: Given, encode: Encode, factor: int) -> Tensor:
        """[B,1+C,h,w]: the hole, then the latents of the picture with grey in the hole, as stock inpainting has it."""
        known = encode(given["picture"] * (given["mask"] < 0.5))
        hole = F.interpolate((given["mask"] >= 0.5).to(known.dtype), size=known.shape[2:])
        return torch.cat([hole, known], dim=1)


@dataclass(frozen=True, kw_only=True)
class Upscale:
    """Super-resolution, with noise added to the small picture and told (Ho et al. 2022, section 4)."""

    kind: ClassVar[str] = "upscale"
    factor: Literal[2, 4, 8] = 4
    """How many times as wide and high"""
    noise: float = 0.1
    """Largest standard deviation of what is added, of pixels in [-1, 1]; each sample is told how much it was"""

    def __post_init__(self) -> None:
        if self.factor not in (2, 4, 8):
            raise ValueError(f"upscale.factor is {self.factor!r}, but must be 2, 4 or 8")
        if not 0 <= self.noise <= 1:
            raise ValueError(f"upscale.noise is {self.noise}, but must lie in [0, 1]")

    def channels(self, factor: int, latent: int) -> int:
        return 3 * max(1, factor // self.factor) ** 2 + 1

    def spoiled(self, picture: Image.Image, rng: np.random.Generator) -> dict[str, Tensor]:
        """The small picture with noise, and "noise" [], its standard deviation."""
        return noised(to_tensor(smaller(picture, self.factor)), self.noise * rng.uniform(), rng)

    def image(self, given: Given, encode: Encode, factor: int) -> Tensor:
        """[B,C',h,w]: the small picture, then a plane that says its noise, 1 at the largest."""
        small = on_grid(given["picture"], factor / self.factor)
        told = given["noise"].to(small) / (self.noise or 1)
        return torch.cat([small, told.view(-1, 1, 1, 1).expand(-1, 1, *small.shape[2:])], dim=1)


@dataclass(frozen=True, kw_only=True)
class Restore:
    """Undoing damage, whose strengths are drawn evenly from ranges; null: that one never happens."""

    kind: ClassVar[str] = "restore"
    blur: tuple[float, float] | None = (0.3, 1.5)
    """Standard deviation of Gaussian blur in pixels"""
    noise: tuple[float, float] | None = (2.0, 40.0)
    """Standard deviation of Gaussian noise, of 255 levels"""
    jpeg: tuple[float, float] | None = (10.0, 80.0)
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

    def channels(self, factor: int, latent: int) -> int:
        return 3 * factor**2

    def spoiled(self, picture: Image.Image, rng: np.random.Generator) -> dict[str, Tensor]:
        """The damaged picture."""
        return {"picture": to_tensor(self.done(picture, rng))}

    def image(self, given: Given, encode: Encode, factor: int) -> Tensor:
        """[B,3 f^2,h,w]: the damaged picture."""
        return on_grid(given["picture"], factor)


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Naming what each pixel shows."""

    kind: ClassVar[str] = "segment"
    masks: str | None = None
    """Column of the data with a mask for each picture, a PNG whose pixels are numbers of classes; or a folder of such
    files under the names of the pictures, beside theirs if it is no path from here. By default the first of the columns
    mask, masks, annotation, segmentation, or the folder masks. Drawn scenes have theirs"""
    classes: tuple[str, ...] = ("background", "thing")
    """Names of the classes 0, 1, ..., the first for where there is nothing; of two, 1 is any pixel above 0. Drawn
    scenes have theirs"""

    def __post_init__(self) -> None:
        object.__setattr__(self, "classes", tuple(map(str, self.classes)))
        if not 2 <= len(self.classes) <= 256 or len(set(self.classes)) < len(self.classes):
            raise ValueError(
                f"segment.classes names {len(self.classes)} classes, but must name 2 to 256 different ones"
            )

    def channels(self, factor: int, latent: int) -> int:
        return 3 * factor**2

    def spoiled(self, picture: Image.Image, rng: np.random.Generator) -> dict[str, Tensor]:
        """The picture as it is."""
        return {"picture": to_tensor(picture)}

    def image(self, given: Given, encode: Encode, factor: int) -> Tensor:
        """[B,3 f^2,h,w]: the picture."""
        return on_grid(given["picture"], factor)


Task: TypeAlias = Inpaint | Upscale | Restore | Segment
TASKS: dict[str, type[Task]] = {task.kind: task for task in (Inpaint, Upscale, Restore, Segment)}


class Pairs:
    """Latents of what is to be made, and what it is made of, for a DataLoader that asks for lists of (position, index).

    How a picture is spoiled is a function of (seed, position).
    """

    def __init__(self, latents: LatentCache, pictures: Pixels, task: Task) -> None:
        self.latents, self.pictures, self.task = latents, pictures, task

    def __getitems__(self, items: list[tuple[int, int]]) -> dict[str, Tensor]:
        """What the cache has for these, and what `Task.spoiled` gives, [B,...] each."""
        seen = to_images(self.pictures.__getitems__(items)["pixels"])
        seed = self.pictures.seed
        return self.latents.__getitems__(items) | spoiled(self.task, seen, seed, [p for p, _ in items])


def spoiled(
    task: Task, pictures: Sequence[Image.Image], seed: int, positions: Sequence[int]
) -> dict[str, Tensor]:
    """Pictures of one size as a batch of what the task is given, the i-th spoiled as (seed, positions[i]) says."""
    each = [
        task.spoiled(picture, random.stream(seed, "task", position))
        for picture, position in zip(pictures, positions, strict=True)
    ]
    return {name: torch.stack([one[name] for one in each]) for name in each[0]}


def noised(small: Tensor, level: float, rng: np.random.Generator) -> dict[str, Tensor]:
    """A small picture [3,?,?] as `Upscale` is given it."""
    grain = torch.from_numpy(rng.standard_normal(small.shape, dtype=np.float32))
    return {"picture": small + level * grain, "noise": torch.tensor(level, dtype=torch.float32)}


def on_grid(pixels: Tensor, ratio: float) -> Tensor:
    """Pixels [B,3,rh,rw], r = `ratio`, on the grid of the latents: those that share a place become channels.

    [B,3r^2,h,w]; with a ratio below 1 each pixel is repeated, [B,3,h,w].
    """
    if ratio >= 1:
        return F.pixel_unshuffle(pixels, round(ratio))
    return F.interpolate(pixels, scale_factor=round(1 / ratio))


def random_hole(size: tuple[int, int], rng: np.random.Generator) -> Image.Image:
    """L, 255 in the hole: a rectangle, all around one, or the strokes of a thick brush."""
    hole = Image.new("L", size)
    brush = ImageDraw.Draw(hole)
    kind = rng.integers(3)
    if kind < 2:
        sides = [max(1, round(side * rng.uniform(0.25, 0.75))) for side in size]
        left, top = (int(rng.integers(side - own + 1)) for side, own in zip(size, sides, strict=True))
        brush.rectangle((left, top, left + sides[0] - 1, top + sides[1] - 1), fill=255)
        return ImageChops.invert(hole) if kind else hole
    thick = max(1, round(min(size) * rng.uniform(0.1, 0.25)))
    for _ in range(rng.integers(1, 4)):
        corners = [tuple(rng.uniform(0, side) for side in size) for _ in range(rng.integers(2, 5))]
        brush.line(corners, fill=255, width=thick, joint="curve")
    return hole


def task_of(name: TaskName | None, configs: Sequence[Task]) -> Task | None:
    """The task that a recipe chooses, with its settings; None if it begins with no picture.

    Raises:
        ValueError: another one's settings are set.
    """
    chosen = None
    for config in configs:
        if config.kind == name:
            chosen = config
        elif config != type(config)():
            raise ValueError(f"{config.kind} is set, but task is {name}: remove one of the two")
    return chosen


def words_of(name: TaskName | None, kind: Words | None) -> Words:
    """`conditioning.kind`, or by default what the task says; ValueError where the two contradict each other."""
    usual: Words = WORDS.get(name or "text", "none")
    pictures = name in TASKS
    if kind is None or pictures or name is None:
        return kind or usual
    fits = kind == "none" if usual == "none" else usual in kind
    if not fits:
        raise ValueError(
            f"task is {name}, but conditioning.kind is {kind}, which says something else; remove one of the two"
        )
    return kind


def to_json(task: Task) -> dict[str, Any]:
    """A task as a model's index says it, without where masks lay on the machine that trained it."""
    return {"kind": task.kind} | {name: value for name, value in plain(task).items() if name != "masks"}


def from_json(said: Any) -> Task:
    """The inverse of `to_json`; ValueError for anything else."""
    settings: dict[str, Any] = dict(said) if isinstance(said, dict) else {}
    settings.pop("colors", None)  # follow from the classes; they are for other tools
    settings = {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}
    kind = TASKS.get(str(settings.pop("kind", None)))
    if kind is None:
        raise ValueError(f"the task {said!r} is not supported; there are {', '.join(TASKS)}")
    try:
        return kind(**settings)
    except (TypeError, IndexError) as problem:  # other names, or other types than they are compared with
        raise ValueError(f"the task {kind.kind} has settings that are not supported: {problem}") from None
