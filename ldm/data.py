"""Pictures, captions and labels from a folder, shards, a hub data set or the drawn scenes, as one `Source`.

What kind of data a path holds is detected, and said. Reading is left to `datasets`; here are only the detection,
the bring-to-size, and the order in which samples are seen.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Sampler

from ldm import random
from ldm.config import UserError
from ldm.scenes import Scenes

PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
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

    path: str = "scenes"
    """scenes (drawn), a folder of pictures or parquet shards, or hub:NAME of a data set on the hub"""
    split: str = "train"
    """Which part of the data is trained on"""
    size: int = 64
    """Side in pixels that pictures are brought to: shorter side resized, centre cropped"""
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
    scenes: ScenesConfig = field(default_factory=ScenesConfig)

    def __post_init__(self) -> None:
        if self.size < 8:
            raise ValueError(f"data.size is {self.size} pixels, but must be at least 8")
        if self.path != "scenes" and self.scenes != ScenesConfig():
            raise ValueError(f"data.scenes is set, but data.path is {self.path}: remove one of the two")


class Source:
    """Pictures with captions and labels, by index.

    Attributes:
        kind: what was detected, in words.
        texts: one caption a picture, or None.
        labels: [N] int64 class of each picture, or None; `classes` names them.
        fingerprint: equal for two sources only if pictures, captions and labels are.
    """

    def __init__(
        self,
        rows: Any,
        image: str,
        *,
        kind: str,
        fingerprint: Callable[[], str],
        texts: list[str] | None = None,
        labels: list[int] | None = None,
        classes: Sequence[str] = (),
        background: str = "white",
    ) -> None:
        self._rows, self._image, self._background = rows, image, background
        self.kind, self._content, self.texts, self.classes = kind, fingerprint, texts, tuple(classes)
        self.labels = None if labels is None else torch.tensor(labels)

    def __len__(self) -> int:
        return len(self._rows)

    @cached_property
    def fingerprint(self) -> str:
        """Reads all the data once, on the first call."""
        return self._content()

    def picture(self, index: int, size: int) -> Image.Image:
        """Picture `index`, RGB, `size` pixels square."""
        return fitted(self._rows[index][self._image], size, self._background)

    def describe(self) -> str:
        """What was found, with three examples."""
        lines = [f"{len(self):,} pictures: {self.kind}"]
        if self.classes:
            lines.append(
                f"{len(self.classes)} classes: {', '.join(self.classes[:5])}{' ...' * (len(self.classes) > 5)}"
            )
        if self.texts and not all(self.texts):
            lines.append(f"{sum(not text for text in self.texts)} pictures have an empty caption")
        lines += [f"  {i}: {text}" for i, text in enumerate((self.texts or [])[:3])]
        return "\n".join(lines)


def fitted(image: Image.Image, size: int, background: str) -> Image.Image:
    """Any PIL image as RGB, `size` pixels square: turned upright, flattened onto `background`, resized, cropped."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):  # 16-bit grey: scaled, not clipped
        grey = np.asarray(image, dtype=np.float64)
        image = Image.fromarray(
            (grey / max(1.0, 65535.0 if grey.max() > 255 else 255.0) * 255).astype(np.uint8)
        )
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, background), image)
    return ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.LANCZOS)


def open_source(config: DataConfig, split: str | None = None) -> Source:
    """The data that `config` names; `split` takes the place of `config.split`.

    Raises:
        UserError: nothing there, nothing readable there, or no such split or column.
    """
    split = split or config.split
    if config.path == "scenes":
        if split not in ("train", "test"):
            raise UserError(
                f"The drawn scenes have the splits train and test, not {split!r}; set data.split."
            )
        scenes = Scenes(config.scenes.count, size=config.size, level=config.scenes.level, split=split)  # type: ignore[arg-type]
        texts, labels = [scenes.scene(i).caption() for i in range(len(scenes))], None
        kind = f"drawn scenes, level {config.scenes.level}, {split}"
        return Source(
            scenes, "image", kind=kind, fingerprint=lambda: scenes.fingerprint, texts=texts, labels=labels
        )
    rows, kind = _rows(config.path, split)
    return _source(rows, kind, config)


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


def _rows(path: str, split: str) -> tuple[Any, str]:
    """A `datasets.Dataset` and what it was made from."""
    import datasets

    datasets.disable_progress_bars()
    folder = Path(path).expanduser()
    if not folder.exists():
        if path.startswith("hub:"):
            return _loaded(path.removeprefix("hub:"), split), f"hub data set, split {split}"
        raise UserError(
            f"There is nothing at {path}; set data.path to a folder of pictures, to hub:NAME/OF-A-SET, or to scenes."
        )
    if not folder.is_dir():
        raise UserError(f"{path} is a file; set data.path to the folder that it lies in.")
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    pictures = [file for file in files if file.suffix.lower() in PICTURES]
    if any(file.name.startswith("metadata.") for file in files):
        return _loaded("imagefolder", split, data_dir=str(folder)), "picture folder with a metadata file"
    if any(file.suffix == ".parquet" for file in files):
        return _loaded(str(folder), split), f"parquet shards, split {split}"
    if any(file.suffix == ".tar" for file in files):
        return _loaded("webdataset", split, data_dir=str(folder)), f"webdataset shards, split {split}"
    if not pictures:
        raise UserError(
            f"{path} holds no pictures ({', '.join(sorted(PICTURES))}) and no parquet or tar shards."
        )
    return _folder(folder, pictures, split)


def _folder(folder: Path, pictures: list[Path], split: str) -> tuple[Any, str]:
    """Plain pictures: captions from same-named .txt files, classes from sub-folders, splits from the top folders."""
    import datasets

    if (folder / split).is_dir():
        folder, pictures = folder / split, [p for p in pictures if (folder / split) in p.parents]
    elif split != "train":
        raise UserError(
            f"{folder} has no sub-folder {split!r}: pictures lie directly in it, which is split train."
        )
    if not pictures:
        raise UserError(f"{folder} holds no pictures.")
    columns: dict[str, list[str]] = {"image": [str(p) for p in pictures]}
    kind = "picture folder"
    texts = [p.with_suffix(".txt") for p in pictures]
    if any(t.exists() for t in texts):
        missing = [p for p, t in zip(pictures, texts, strict=True) if not t.exists()]
        if missing:
            raise UserError(
                f"{missing[0]} and {len(missing) - 1} more have no caption file beside them (.txt)."
            )
        columns["text"] = [t.read_text(encoding="utf-8").strip() for t in texts]
        kind += " with a .txt beside each picture"
    if all(p.parent != folder for p in pictures):
        columns["label"] = [p.relative_to(folder).parts[0] for p in pictures]
        kind += ", a sub-folder for each class"
    return datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image()), kind


def _loaded(name: str, split: str, **options: Any) -> Any:
    import datasets

    try:
        return datasets.load_dataset(name, split=split, **options)
    except (
        ValueError,
        FileNotFoundError,
        ConnectionError,
        OSError,
        datasets.exceptions.DatasetsError,
    ) as problem:
        where = options.get("data_dir", name)
        first = str(problem).strip().splitlines()[0] if str(problem).strip() else type(problem).__name__
        raise UserError(f"Split {split!r} of {where} can't be read: {first}") from None


def _source(rows: Any, kind: str, config: DataConfig) -> Source:
    import datasets

    if not len(rows):
        raise UserError(f"{config.path} holds no rows.")
    images = [name for name, feature in rows.features.items() if isinstance(feature, datasets.Image)]
    if not images:
        raise UserError(f"{config.path} has no column of pictures, only {', '.join(rows.column_names)}.")
    text = _column(rows, config.text, TEXT_COLUMNS, "data.text")
    label = _column(rows, config.label, LABEL_COLUMNS, "data.label")
    texts = None if text is None else [str(value or "") for value in rows[text]]
    labels, classes = (None, ()) if label is None else _classes(rows, label)
    return Source(
        rows,
        images[0],
        kind=kind,
        fingerprint=lambda: _fingerprint(rows, images[0], (texts, labels)),
        texts=texts,
        labels=labels,
        classes=classes,
        background=config.background,
    )


def _column(rows: Any, wanted: str | None, usual: Sequence[str], key: str) -> str | None:
    if wanted is None:
        return next((name for name in usual if name in rows.column_names), None)
    if wanted not in rows.column_names:
        raise UserError(f"{key} is {wanted!r}, but the data has the columns {', '.join(rows.column_names)}.")
    return wanted


def _classes(rows: Any, column: str) -> tuple[list[int], tuple[str, ...]]:
    values = list(rows[column])
    if any(value is None or value == -1 for value in values):
        raise UserError(
            f"Column {column!r} has rows without a class; fill them in, or set data.label to another."
        )
    names = getattr(rows.features[column], "names", None)
    if names:
        return values, tuple(names)
    names = sorted({str(value) for value in values})
    number = {name: i for i, name in enumerate(names)}
    return [number[str(value)] for value in values], tuple(names)


def _fingerprint(rows: Any, image: str, rest: object) -> str:
    """A hash of the pictures' bytes (of name, size and time of change for pictures that lie in files) and the rest."""
    import datasets

    sums = hashlib.sha256(repr(rest).encode())
    for row in rows.select_columns(image).cast_column(image, datasets.Image(decode=False)):
        stored = row[image]
        if stored["bytes"] is not None:
            sums.update(stored["bytes"])
        else:
            status = Path(stored["path"]).stat()
            sums.update(f"{stored['path']} {status.st_size} {status.st_mtime_ns}".encode())
    return sums.hexdigest()[:32]


def order(source: Source, balance: bool) -> np.ndarray:
    """[M] The indices that make up one epoch: each once, or with `balance` every class equally often."""
    if not balance:
        return np.arange(len(source))
    if source.labels is None:
        raise UserError(
            "data.balance needs classes, but the data has none; set data.label, or data.balance to false."
        )
    members = [np.flatnonzero(source.labels.numpy() == c) for c in range(len(source.classes))]
    most = max(map(len, members))
    return np.concatenate([np.resize(m, most) for m in members if len(m)])


class Stream(Sampler[list[tuple[int, int]]]):
    """Batches of (position, index) for one process, endless and the same however it is restarted.

    Position counts samples since the start of the run over all processes. Epoch e is a permutation of `order` that
    depends on (seed, e) alone; batches run across the border of epochs, so that no sample is left out.
    """

    def __init__(
        self, order: np.ndarray, *, seed: int, batch: int, start: int, stop: int, rank: int, ranks: int
    ) -> None:
        self.order, self.seed, self.batch, self.start, self.stop = order, seed, batch, start, stop
        self.rank, self.ranks = rank, ranks

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, shuffled = -1, self.order
        for first in range(self.start, self.stop, self.batch * self.ranks):
            items = []
            for position in range(first + self.rank * self.batch, first + (self.rank + 1) * self.batch):
                if position // len(self.order) != epoch:
                    epoch = position // len(self.order)
                    shuffled = self.order[random.permutation(self.seed, "order", epoch, len(self.order))]
                items.append((position, int(shuffled[position % len(self.order)])))
            yield items


class Pixels:
    """Pictures of a source as tensors, for a DataLoader that asks for lists of (position, index)."""

    def __init__(self, source: Source, config: DataConfig, seed: int) -> None:
        self.source, self.size, self.flip, self.seed = source, config.size, config.flip, seed

    def __getitems__(self, items: list[tuple[int, int]]) -> dict[str, Tensor]:
        """{"position": [B], "index": [B], "pixels": [B,3,S,S] float32 in [-1, 1]}."""
        positions, indices = (torch.tensor(column) for column in zip(*items, strict=True))
        pixels = torch.stack([to_tensor(self.source.picture(i, self.size)) for i in indices.tolist()])
        if self.flip:
            mirrored = random.uniform(self.seed, "flip", positions) < 0.5
            pixels[mirrored] = pixels[mirrored].flip(-1)
        return {"position": positions, "index": indices, "pixels": pixels}


def to_tensor(image: Image.Image) -> Tensor:
    """RGB picture => [3,H,W] float32 in [-1, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div(127.5).sub(1)


def to_images(pixels: Tensor) -> list[Image.Image]:
    """[B,3,H,W] in [-1, 1] => RGB pictures, as stock pipelines round them."""
    bytes_ = (
        (pixels.float() / 2 + 0.5)
        .clamp(0, 1)
        .mul(255)
        .round()
        .to(torch.uint8)
        .permute(0, 2, 3, 1)
        .cpu()
        .numpy()
    )
    return [Image.fromarray(picture) for picture in bytes_]
