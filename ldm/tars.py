"""Webdataset shards: tar files in which the files of one sample share their name up to the first dot."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, TypeAlias

from ldm.config import UserError
from ldm.pictures import MASK_COLUMNS, OTHER_PICTURES, PICTURES, Stored

Place: TypeAlias = tuple[Path, str, int, int]
"""Tar, member, offset, bytes"""


class Members(Sequence[Stored]):
    """Pictures inside tar files, read from where they lie: nothing is unpacked. None: the sample has none."""

    def __init__(self, places: Sequence[Place | None], what: str = "picture") -> None:
        self.places, self.what = places, what

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: Any) -> Any:
        place = self.places[index]
        if place is None:
            return Stored(f"the {self.what} of sample {index}")
        tar, member, offset, size = place
        with tar.open("rb") as file:
            file.seek(offset)
            return Stored(f"{tar}/{member}", data=file.read(size))


@dataclass
class Sample:
    """What is known of the files that share a name."""

    pictures: dict[str, Place] = field(default_factory=dict)
    """By what follows the first dot of their names, such as jpg or mask.png"""
    said: dict[str, Any] = field(default_factory=dict)

    def parts(self) -> tuple[Place, dict[str, Place]]:
        """The picture, and the others by column: `mask` if they are called so, else their ending."""
        columns = {end: end.rpartition(".")[0] or end for end in self.pictures}
        first = min(self.pictures, key=lambda end: (columns[end] in MASK_COLUMNS, columns[end] != end))
        others = {columns[end]: place for end, place in self.pictures.items() if end != first}
        return self.pictures[first], others


def contents(files: Sequence[Path]) -> tuple[Members, dict[str, Members], list[dict[str, Any]]]:
    """The pictures of all samples that have one, further pictures of theirs by column, and what is said about each.

    Raises:
        UserError: a file is no sound tar.
    """
    samples = [sample for file in files for sample in _samples(file) if sample.pictures]
    parts = [sample.parts() for sample in samples]
    columns = dict.fromkeys(name for _, others in parts for name in others)
    others = {name: Members([others.get(name) for _, others in parts], name) for name in columns}
    return Members([picture for picture, _ in parts]), others, [sample.said for sample in samples]


def _samples(file: Path) -> list[Sample]:
    samples: dict[str, Sample] = {}
    try:
        with tarfile.open(file, "r:") as tar:
            for member in tar:
                _add(samples, file, tar, member)
    except (tarfile.TarError, OSError, ValueError, TypeError) as problem:
        raise UserError(f"{file} can't be read: {problem}") from None
    return [*samples.values()]


def _add(samples: dict[str, Sample], file: Path, tar: tarfile.TarFile, member: tarfile.TarInfo) -> None:
    """Note a picture's place, or read what is said about it: .txt or .caption, .cls, .json."""
    place = PurePosixPath(member.name)
    key, _, extension = place.name.partition(".")
    if not member.isfile() or not key:
        return
    sample = samples.setdefault(str(place.parent / key), Sample())
    if place.suffix.lower() in PICTURES | OTHER_PICTURES:
        sample.pictures[extension.lower()] = (file, member.name, member.offset_data, member.size)
    elif extension in ("txt", "caption", "cls", "json"):
        text = tar.extractfile(member).read().decode("utf-8-sig").strip()  # type: ignore[union-attr]
        column = {"cls": "label"}.get(extension, "text")
        sample.said |= json.loads(text) if extension == "json" else {column: text}
