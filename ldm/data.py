"""Pictures, captions and labels from folders, shards, hub data sets or the drawn scenes, as one `Source`.

What kind of data a path holds is detected (`ldm.formats`), and said. Several paths are one source, one after the
other: what all of them have is kept, captions or classes or both.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image

from ldm.config import UserError
from ldm.formats import Found, find
from ldm.pictures import Joined, Some, Stored, content, decoded, fitted
from ldm.scenes import Scenes
from ldm.streaming import small_copy

TEXT_COLUMNS = ("text", "caption", "prompt")
LABEL_COLUMNS = ("label", "class", "category")


@dataclass(frozen=True, kw_only=True)
class ScenesConfig:
    """The drawn pictures, `data.path: scenes`."""

    count: int = 8192
    """Different pictures an epoch"""
    level: Literal[1, 2] = 1
    """1: one thing and its place. 2: two things and their relation"""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What to train on."""

    path: tuple[str, ...] | str = "scenes"
    """scenes (drawn), a folder of pictures or shards, hub:NAME or hub:NAME@REVISION of a data set on the hub, or a list
    of these, [one, two], which are used together"""
    split: str = "train"
    """Which part of the data is trained on"""
    size: int = 64
    """Side in pixels that pictures are brought to: shorter side resized, longer side cropped"""
    crop: Literal["center", "random"] = "center"
    """What is kept of the longer side; random: another part each time (stage 1 only: latents are made once)"""
    bucket_step: int = 0
    """Keep shapes: bring pictures to sizes whose sides are multiples of this many pixels and whose areas are at most
    size x size, each batch of one size (aspect-ratio buckets); 0: squares alone"""
    flip: bool = False
    """Mirror half of the pictures; not for things with a left and a right, or with writing"""
    text: str | None = None
    """Column with captions; by default the first of text, caption, prompt"""
    label: str | None = None
    """Column with classes; by default the first of label, class, category"""
    balance: bool = False
    """See every class equally often, small ones more than once an epoch"""
    background: str = "white"
    """Colour behind transparent pixels"""
    max_megapixels: float = 64.0
    """Larger pictures are not decoded, and count as bad"""
    bad_share: float = 0.01
    """Share of pictures that may be bad (skipped, and named in bad_pictures.jsonl); with more, nothing is trained"""
    streaming: bool = False
    """For sets larger than the disk (hub:NAME, parquet): read them once as a stream, and keep the pictures at `size`"""
    limit: int | None = None
    """With streaming: use the first so many pictures alone"""
    scenes: ScenesConfig = field(default_factory=ScenesConfig)

    def __post_init__(self) -> None:
        if self.size < 8:
            raise ValueError(f"data.size is {self.size} pixels, but must be at least 8")
        if self.path != "scenes" and self.scenes != ScenesConfig():
            raise ValueError(f"data.scenes is set, but data.path is {self.where}: remove one of the two")
        if not self.paths or ("scenes" in self.paths and len(self.paths) > 1):
            raise ValueError(
                f"data.path is {self.where or 'an empty list'}, but must be scenes alone, or one or more of the others"
            )
        if (self.limit is not None and not self.streaming) or (self.limit or 1) < 1:
            raise ValueError(
                f"data.limit is {self.limit}, but must be at least 1, and is for data.streaming alone"
            )
        if self.streaming and self.path == "scenes":
            raise ValueError("data.streaming is set, but data.path is scenes: remove one of the two")
        if self.bucket_step and (self.bucket_step < 0 or self.size % self.bucket_step):
            raise ValueError(
                f"data.bucket_step is {self.bucket_step}, but must divide data.size {self.size}, or be 0"
            )
        if self.bucket_step and self.path == "scenes":
            raise ValueError("data.bucket_step is set, but data.path is scenes, which are square: remove one")
        if not 0 <= self.bad_share < 1:
            raise ValueError(f"data.bad_share is {self.bad_share}, but must lie in [0, 1)")
        if not 0 < self.max_megapixels <= 178:
            raise ValueError(
                f"data.max_megapixels is {self.max_megapixels:g}, but must lie in (0, 178], the most that Pillow opens"
            )

    @property
    def paths(self) -> tuple[str, ...]:
        return (self.path,) if isinstance(self.path, str) else self.path

    @property
    def where(self) -> str:
        """The paths in a sentence."""
        return ", ".join(self.paths)


class Source:
    """Pictures with captions and labels, by index.

    Attributes:
        kind: what was detected, in words; `notes` are sentences about it.
        texts: one caption a picture, or None.
        labels: [N] int64 class of each picture, or None; `classes` names them.
        others: further pictures of each row by column, such as masks.
        sums: one hash for the bytes of each picture, once `ldm.inspection` has read them all.
        sizes: [N,2] width and height that each is brought to, if that is not a square (`ldm.buckets`).
    """

    def __init__(
        self,
        pictures: Sequence[Stored],
        config: DataConfig,
        *,
        kind: str,
        texts: list[str] | None = None,
        labels: list[int] | None = None,
        classes: Sequence[str] = (),
        notes: Sequence[str] = (),
        files: Sequence[Path | str] = (),
        others: Mapping[str, Sequence[Stored]] | None = None,
    ) -> None:
        self.pictures, self.config, self.kind, self.notes = pictures, config, kind, tuple(notes)
        self.others = others or {}
        self.texts, self.classes, self.files = texts, tuple(classes), tuple(files)
        self.labels = None if labels is None else torch.tensor(labels, dtype=torch.int64)
        self.sums: np.ndarray | None = None
        self.sizes: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.pictures)

    @cached_property
    def fingerprint(self) -> str:
        """Equal for two sources only if pictures, captions and labels are; reads all pictures once, if need be."""
        sums = hashlib.sha256(repr((self.texts, self.classes)).encode())
        sums.update(b"" if self.labels is None else self.labels.numpy().tobytes())
        if self.sums is not None:
            sums.update(self.sums.tobytes())
        else:
            for stored in self.pictures:
                sums.update(content_sum(content(stored)))
        return sums.hexdigest()[:32]

    def picture(
        self, index: int, size: int | tuple[int, int], place: tuple[float, float] = (0.5, 0.5)
    ) -> Image.Image:
        """Picture `index`, RGB, of `size` (a side, or width and height) with its crop at `place` (`fitted`).

        Raises:
            BadPicture: it can't be read.
        """
        stored = self.pictures[index]
        whole = decoded(stored.name, content(stored), self.config.max_megapixels).image
        return fitted(whole, size, self.config.background, place)

    def size(self, index: int) -> tuple[int, int]:
        """Width and height that picture `index` is brought to in training."""
        if self.sizes is None:
            return self.config.size, self.config.size
        width, height = self.sizes[index].tolist()
        return width, height

    def chosen(self, indices: Sequence[int]) -> Source:
        """The pictures `indices` alone."""
        labels = None if self.labels is None else self.labels[list(indices)].tolist()
        texts = None if self.texts is None else [self.texts[i] for i in indices]
        pictures = Some(self.pictures, indices)
        one = Source(
            pictures,
            self.config,
            kind=self.kind,
            texts=texts,
            labels=labels,
            classes=self.classes,
            notes=self.notes,
            files=self.files,
            others={name: Some(column, indices) for name, column in self.others.items()},
        )
        one.sums = None if self.sums is None else self.sums[list(indices)]
        one.sizes = None if self.sizes is None else self.sizes[list(indices)]
        return one

    def describe(self) -> str:
        """What was found, with three examples."""
        lines = [f"{len(self):,} pictures: {self.kind}", *self.notes]
        if self.classes:
            lines.append(
                f"{len(self.classes)} classes: {', '.join(self.classes[:5])}{' ...' * (len(self.classes) > 5)}"
            )
        if self.texts and not all(self.texts):
            lines.append(f"{sum(not text for text in self.texts):,} pictures have an empty caption")
        return "\n".join(lines + [f"  {self.example(i)}" for i in range(min(3, len(self)))])

    def example(self, index: int) -> str:
        """A picture with what is known of it, in words."""
        parts = [self.pictures[index].name]
        if self.labels is not None:
            parts.append(self.classes[self.labels[index]])
        if self.texts is not None:
            parts.append(repr(self.texts[index]))
        return ": ".join(parts)


class SceneSource(Source):
    """The drawn scenes."""

    def __init__(self, config: DataConfig, split: str) -> None:
        if split not in ("train", "test"):
            raise UserError(
                f"The drawn scenes have the splits train and test, not {split!r}; choose one of those."
            )
        count, level = config.scenes.count, config.scenes.level
        self.scenes = Scenes(count, size=config.size, level=level, split=split)  # type: ignore[arg-type]
        super().__init__(
            [Stored(str(i)) for i in range(count)],
            config,
            kind=f"drawn scenes, level {level}, {split}",
            texts=[self.scenes.scene(i).caption() for i in range(count)],
        )

    @cached_property
    def fingerprint(self) -> str:
        return self.scenes.fingerprint

    def picture(
        self, index: int, size: int | tuple[int, int], place: tuple[float, float] = (0.5, 0.5)
    ) -> Image.Image:
        return fitted(self.scenes[index]["image"], size, self.config.background, place)

    def mask(self, index: int) -> Image.Image:
        """What each pixel of picture `index` shows (`scenes.draw_with_mask`), at the size of the recipe."""
        return self.scenes.mask(index)


def content_sum(data: bytes) -> bytes:
    """16 bytes that stand for the bytes of a picture."""
    return hashlib.blake2b(data, digest_size=16).digest()


def open_source(config: DataConfig, split: str | None = None) -> Source:
    """The data that `config` names; `split` takes the place of `config.split`.

    Raises:
        UserError: nothing there, nothing readable there, or no such split or column.
    """
    split = split or config.split
    if config.path == "scenes":
        return SceneSource(config, split)
    parts = [_source(path, _found(path, split, config), config) for path in config.paths]
    return parts[0] if len(parts) == 1 else _joined(parts, config)


def shown_source(config: DataConfig, split: str | None) -> tuple[Source, str]:
    """Pictures to judge by, and their split: `split`, or the first of test, validation and the training split."""
    candidates = [split] if split else [s for s in ("test", "validation", config.split) if s != config.split]
    for candidate in candidates:
        try:
            return open_source(config, candidate), candidate
        except UserError:
            if split:
                raise
    return open_source(config), config.split


def _found(path: str, split: str, config: DataConfig) -> Found:
    if not config.streaming:
        return find(path, split)
    return small_copy(path, split, config.size, config.background, config.max_megapixels, config.limit)


def _source(path: str, found: Found, config: DataConfig) -> Source:
    text = _column(path, found, config.text, TEXT_COLUMNS, "data.text")
    label = _column(path, found, config.label, LABEL_COLUMNS, "data.label")
    labels, classes = (None, ()) if label is None else _classes(path, found, label)
    return Source(
        found.pictures,
        config,
        kind=found.kind,
        texts=None if text is None else _texts(path, found, text),
        labels=labels,
        classes=classes,
        notes=found.notes,
        files=found.files,
        others=found.others,
    )


def _column(path: str, found: Found, wanted: str | None, usual: Sequence[str], key: str) -> str | None:
    if wanted is None:
        return next((name for name in usual if name in found.columns), None)
    if wanted not in found.columns:
        has = f"the columns {', '.join(found.columns)}" if found.columns else "no columns"
        raise UserError(f"{key} is {wanted!r}, but {path} has {has}.")
    return wanted


def _texts(path: str, found: Found, column: str) -> list[str]:
    texts = list(found.columns[column])
    other = next((value for value in texts if not isinstance(value, str | None)), None)
    if other is not None:
        raise UserError(
            f"Column {column!r} of {path} holds {type(other).__name__}, not text; set data.text to another."
        )
    return [text or "" for text in texts]


def _classes(path: str, found: Found, column: str) -> tuple[list[int], tuple[str, ...]]:
    values = list(found.columns[column])
    if any(value is None or value == -1 or value == "" for value in values):
        raise UserError(
            f"Column {column!r} of {path} has rows without a class; fill them in, or set data.label to another."
        )
    if column in found.names:
        return values, found.names[column]
    names = sorted({str(value) for value in values})
    number = {name: i for i, name in enumerate(names)}
    return [number[str(value)] for value in values], tuple(names)


def _joined(parts: Sequence[Source], config: DataConfig) -> Source:
    """Several sources as one; captions or classes that some lack are left out, which a note says."""
    notes = [note for part in parts for note in part.notes]
    texts: list[str] | None = None
    labels: list[int] | None = None
    classes: list[str] = []
    for what, has in (
        ("captions", [part.texts is not None for part in parts]),
        ("classes", [part.labels is not None for part in parts]),
    ):
        if any(has) and not all(has):
            lacking = config.paths[has.index(False)]
            notes.append(f"the {what} are left out: {lacking} has none, so not all pictures have one")
        elif all(has) and what == "captions":
            texts = [text for part in parts for text in part.texts or ()]
        elif all(has):
            classes = sorted({name for part in parts for name in part.classes})
            number = {name: i for i, name in enumerate(classes)}
            labels = [
                number[part.classes[label]]
                for part in parts
                for label in part.labels.tolist()  # type: ignore[union-attr]
            ]
    kind = "; ".join(
        f"{len(part):,} from {path} ({part.kind})" for path, part in zip(config.paths, parts, strict=True)
    )
    return Source(
        Joined([part.pictures for part in parts]),
        config,
        kind=kind,
        texts=texts,
        labels=labels,
        classes=classes,
        notes=notes,
        files=[file for part in parts for file in part.files],
        others={
            name: Joined([part.others[name] for part in parts])
            for name in parts[0].others
            if all(name in part.others for part in parts)
        },
    )
