"""What kind of data a path holds: plain pictures in folders, parquet shards, webdataset tars, or a set on the hub.

Detection looks at names alone; pictures stay where they are until one is asked for, and are not trusted even then
(`ldm.pictures`). Hidden files are left out.
"""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ldm import tars
from ldm.config import UserError
from ldm.pictures import MASK_COLUMNS, OTHER_PICTURES, PICTURES, Stored

SPLITS = {
    "train": "train|training",
    "validation": "validation|valid|val|dev",
    "test": "test|testing",
}


@dataclass(frozen=True, kw_only=True)
class Found:
    """What lies at one path."""

    pictures: Sequence[Stored]
    columns: Mapping[str, Sequence[Any]]
    """Everything else that is known of each picture"""
    kind: str
    """What was detected, in words"""
    names: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Of columns with numbered classes: what the numbers mean"""
    notes: tuple[str, ...] = ()
    """Sentences for the person"""
    files: Sequence[Path | str] = ()
    """All files that pictures lie in, or that are pictures"""
    others: Mapping[str, Sequence[Stored]] = field(default_factory=dict)
    """Further pictures of each row by column, such as masks"""


def find(path: str, split: str) -> Found:
    """What `path` holds in `split`.

    Raises:
        UserError: nothing is there, or nothing that can be read, or no such split.
    """
    folder = Path(path).expanduser()
    if not folder.exists():
        if path.startswith("hub:"):
            name, _, revision = path.removeprefix("hub:").partition("@")
            if not name:
                raise UserError(f"data.path is {path!r}, which names no data set; make it hub:NAME/OF-A-SET.")
            rows = load(name, split, name, revision=revision or None)
            return table(rows, f"hub data set {name}, split {split}", name, None)
        raise UserError(
            f"There is nothing at {path}; set data.path to a folder of pictures, to hub:NAME/OF-A-SET, or to scenes."
        )
    if not folder.is_dir():
        raise UserError(f"{path} is a file; set data.path to the folder that it lies in.")
    files = [*_files(folder)]
    metadata = [file for file in files if file.stem == "metadata"]
    pictures = [file for file in files if file.suffix.lower() in PICTURES | OTHER_PICTURES]
    if metadata:
        return _with_metadata(folder, metadata, pictures, split)
    if any(file.suffix == ".parquet" for file in files):
        rows = load("parquet", split, path, data_dir=str(folder))
        return table(rows, f"parquet shards, split {split}", path, folder.resolve())
    shards = [file for file in files if file.suffix == ".tar"]
    if shards:
        return _tars(folder, shards, split)
    if not any(file.suffix.lower() in PICTURES for file in pictures):
        raise UserError(
            f"{path} holds no pictures ({', '.join(sorted(PICTURES))}) and no parquet or tar shards."
        )
    return _folder(folder, pictures, split)


def _files(folder: Path) -> Iterator[Path]:
    """Everything in a folder and below that is no folder, sorted; links to folders are given, not followed."""
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if entry.name.startswith(".") or entry.name == "__MACOSX":
                continue
            if entry.is_dir(follow_symlinks=False):
                yield from _files(Path(entry.path))
            else:
                yield Path(entry.path)


def _stored(files: Sequence[Path], root: Path) -> list[Stored]:
    return [Stored(str(file), path=str(file), root=root) for file in files]


def _within(folder: Path, split: str) -> Path:
    """The folder of a split: a sub-folder of that name, or for train all of it."""
    if (folder / split).is_dir():
        return folder / split
    if split != "train":
        raise UserError(
            f"{folder} has no sub-folder {split!r}: pictures lie directly in it, which is split train."
        )
    return folder


def _folder(folder: Path, pictures: list[Path], split: str) -> Found:
    """Plain pictures: captions from same-named .txt files, classes from sub-folders, splits from the top folders."""
    root, folder = folder.resolve(), _within(folder, split)
    pictures = [p for p in pictures if folder in p.parents]
    if not pictures:
        raise UserError(f"{folder} holds no pictures.")
    columns: dict[str, list[Any]] = {}
    kind = "picture folder"
    texts = [p.with_suffix(".txt") for p in pictures]
    there = [t.is_file() for t in texts]
    if any(there):
        missing = [p for p, is_there in zip(pictures, there, strict=True) if not is_there]
        if missing:
            raise UserError(
                f"{len(missing)} of {len(pictures)} pictures have no caption file beside them, {missing[0]} first; "
                "write one (.txt; an empty one is an empty caption), or take the others away to train without."
            )
        columns["text"] = [_text(t).strip() for t in texts]
        kind += " with a .txt beside each picture"
    notes: tuple[str, ...] = ()
    loose = [p for p in pictures if p.parent == folder]
    if not loose:
        columns["label"] = [p.relative_to(folder).parts[0] for p in pictures]
        kind += ", a sub-folder for each class"
    elif len(loose) < len(pictures):
        notes = (f"sub-folders are not taken for classes, as {len(loose)} pictures lie in none: {loose[0]}",)
    return Found(pictures=_stored(pictures, root), columns=columns, kind=kind, notes=notes, files=pictures)


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as problem:
        raise UserError(f"{file} is not UTF-8 text: {problem.reason} at byte {problem.start}.") from None


def _with_metadata(folder: Path, metadata: list[Path], pictures: list[Path], split: str) -> Found:
    """Pictures that metadata files name, each relative to the folder of its file."""
    root, base = folder.resolve(), _within(folder, split)
    rows: list[dict[str, Any]] = []
    named: list[str] = []
    homes: list[Path] = []
    for file in metadata:
        for row in _metadata(file):
            name = row.pop("file_name", None)
            if not name:
                raise UserError(
                    f"{file} has a row without file_name, which names the picture; its columns are {', '.join(row)}."
                )
            where = _place(file.parent, name)
            if base in file.parents or base in Path(where).parents:
                rows.append(row)
                named.append(where)
                homes.append(file.parent)
    if not rows:
        raise UserError(f"{_names(metadata)} in {folder} names no picture of split {split!r}.")
    columns = _columns(rows)
    others = _others(columns, homes, root)
    used = {stored.path for column in others.values() for stored in column}
    left = {str(p) for p in pictures if base in p.parents} - set(named) - used
    notes: tuple[str, ...] = ()
    if left:
        notes = (f"{len(left)} pictures are not named in the metadata and left out: {min(left)}",)
    if again := len(named) - len(set(named)):
        notes += (f"{again} rows of {_names(metadata)} name a picture that another row names too",)
    return Found(
        pictures=[Stored(name, path=name, root=root) for name in named],
        columns=columns,
        kind=f"picture folder with {metadata[0].name}",
        notes=notes,
        files=named,
        others=others,
    )


def _names(files: Sequence[Path]) -> str:
    return ", ".join(dict.fromkeys(file.name for file in files))


def _place(home: Path, name: Any) -> str:
    """Where the file is that a row of metadata in the folder `home` names."""
    return str(name) if "://" in str(name) else os.path.normpath(home / str(name))


def _others(columns: Mapping[str, list[Any]], homes: list[Path], root: Path) -> dict[str, list[Stored]]:
    """The columns that name further picture files, such as mask or mask_file_name; None and "" name none."""
    others = {}
    for column, values in columns.items():
        said = {Path(str(value)).suffix.lower() for value in values if value}
        if said and said <= PICTURES:
            others[column.removesuffix("_file_name")] = [
                Stored(place, path=place, root=root) if value else Stored(f"row {i} of column {column}")
                for i, (home, value) in enumerate(zip(homes, values, strict=True))
                for place in [_place(home, value)]
            ]
    return others


def _columns(rows: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def _metadata(file: Path) -> list[dict[str, Any]]:
    """The rows of metadata.csv, .jsonl or .parquet."""
    import pyarrow

    try:
        if file.suffix == ".csv":
            return [*_csv(_text(file))]
        if file.suffix == ".jsonl":
            return [_object(line) for line in _text(file).splitlines() if line.strip()]
        if file.suffix == ".parquet":
            import pyarrow.parquet

            return pyarrow.parquet.read_table(file).to_pylist()
    except (csv.Error, ValueError, pyarrow.ArrowException) as problem:
        raise UserError(f"{file} can't be read: {problem}") from None
    raise UserError(
        f"{file} is in no form that is read; make it metadata.csv, .parquet, or .jsonl with one object a line."
    )


def _csv(text: str) -> Iterator[dict[str, Any]]:
    reader = csv.DictReader(text.splitlines(keepends=True), strict=True)
    for row in reader:
        if None in row:  # what is beyond the last column: of a caption with a comma, its rest
            raise ValueError(
                f"line {reader.line_num} has more fields than there are columns; put a text with commas into quotes"
            )
        yield row


def _object(line: str) -> dict[str, Any]:
    read = json.loads(line)
    if not isinstance(read, dict):
        raise ValueError(f"{line[:40]!r} is no object with file_name and text")
    return read


def _of_split(folder: Path, files: list[Path], split: str) -> list[Path]:
    """The shards whose name or folder says `split`; all of them are train if none says anything."""

    def says(file: Path, words: str) -> bool:
        return bool(re.search(rf"(^|[^a-z])({words})([^a-z]|$)", str(file.relative_to(folder)).lower()))

    chosen = [file for file in files if says(file, SPLITS.get(split, re.escape(split.lower())))]
    if not chosen and split == "train" and not any(says(f, w) for f in files for w in SPLITS.values()):
        return files
    if not chosen:
        raise UserError(f"No shard in {folder} has split {split!r} in its name.")
    return chosen


def _tars(folder: Path, files: list[Path], split: str) -> Found:
    """Webdataset shards."""
    files = _of_split(folder, files, split)
    pictures, others, rows = tars.contents(files)
    if not pictures:
        raise UserError(f"{folder} holds tar shards, but no pictures are in them.")
    return Found(
        pictures=pictures,
        columns=_columns(rows),
        kind=f"{len(files)} webdataset shards, split {split}",
        files=tuple(files),
        others=others,
    )


class Rows(Sequence[Stored]):
    """The pictures of a `datasets.Dataset`: bytes, or files in `root`."""

    def __init__(self, rows: Any, column: str, where: str, root: Path | None) -> None:
        self.rows, self.column, self.where, self.root = rows, column, where, root

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        return stored(self.rows[index][self.column], f"row {index} of {self.where}", self.root)


def stored(value: Any, name: str, root: Path | None) -> Stored:
    """A cell as a picture: bytes, or {"bytes", "path"} as `datasets` keeps them."""
    if not isinstance(value, dict):
        return Stored(name, data=value or b"")
    path = value.get("path")
    if path:
        name = f"{name} ({path})"
    if value.get("bytes") is not None:
        return Stored(name, data=value["bytes"])
    if path and root and "://" not in path:
        path = os.path.normpath(root / path)
    return Stored(name, path=path, root=root)


def table(rows: Any, kind: str, where: str, root: Path | None) -> Found:
    """A `datasets.Dataset`, whose own way of opening pictures is not used: it fetches URLs and opens any format."""
    import datasets

    if not len(rows):
        raise UserError(f"{where} holds no rows.")
    images = [name for name, feature in rows.features.items() if holds_pictures(name, feature)]
    if not images:
        raise UserError(f"{where} has no column of pictures, only {', '.join(rows.column_names)}.")
    for name in images:
        if isinstance(rows.features[name], datasets.Image):
            rows = rows.cast_column(name, datasets.Image(decode=False))
    told = [
        name
        for name, feature in rows.features.items()
        if isinstance(feature, datasets.Value | datasets.ClassLabel) and name not in images
    ]
    root = root or Path(datasets.config.HF_CACHE_HOME).resolve()
    images.sort(key=lambda name: name in MASK_COLUMNS)
    first, *others = images
    return Found(
        pictures=Rows(rows.select_columns(first), first, where, root),
        columns={name: rows[name] for name in told if "binary" not in str(rows.features[name])},
        kind=kind,
        names={name: tuple(f.names) for name, f in rows.features.items() if getattr(f, "names", None)},
        notes=(f"pictures are taken from {first}, not from {', '.join(others)}",) if others else (),
        files=tuple(Path(file["filename"]) for file in rows.cache_files),
        others={
            name: Rows(rows.select_columns(name), name, f"column {name} of {where}", root) for name in others
        },
    )


def holds_pictures(name: str, feature: Any) -> bool:
    """Whether a column is one of pictures: by its type, or of bytes and named so."""
    import datasets

    if isinstance(feature, datasets.Image):
        return True
    if name not in ("image", "img", "picture", "jpg", "png", "webp", *MASK_COLUMNS):
        return False
    return (isinstance(feature, dict) and "bytes" in feature) or "binary" in getattr(feature, "dtype", "")


def load(name: str, split: str, where: str, **options: Any) -> Any:
    import datasets

    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(name, split=split, **options)
    except (
        ValueError,
        FileNotFoundError,
        ConnectionError,
        OSError,
        datasets.exceptions.DatasetsError,
    ) as problem:
        first = str(problem).strip().splitlines()[0] if str(problem).strip() else type(problem).__name__
        raise UserError(f"Split {split!r} of {where} can't be read: {first}") from None
