"""Sets too large for the disk: read once as a stream, and kept small.

The order in which a run sees its samples is a function of (seed, epoch) over all of them, which a stream can't serve.
So every picture of the stream is brought to the size of training as it passes, and this small copy is what is trained
on, by both stages. It lies in the cache folder of `datasets`, in whole shards, so that an interrupted pass goes on.
"""

from __future__ import annotations

import hashlib
import io
import warnings
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from autoencoder.files import flush, write_text
from ldm.checkpoint import writing
from ldm.config import UserError
from ldm.formats import Found, holds_pictures, load, stored, table
from ldm.pictures import BadPicture, content, decoded, flattened

VERSION = 1
SHARD = 1000
"""Pictures a file"""
SAMPLE = 512
"""Bytes kept of a bad picture: enough to say again what is wrong with it"""


def small_copy(
    path: str, split: str, size: int, background: str, megapixels: float, limit: int | None
) -> Found:
    """The first `limit` pictures of a hub set or a folder of parquet shards, shorter sides at most `size` pixels.

    Of several processes one makes the copy, and the others wait.
    """
    import datasets
    from filelock import FileLock

    shards = sorted(Path(path).expanduser().rglob("*.parquet"))
    if path.startswith("hub:"):
        name, _, revision = path.removeprefix("hub:").partition("@")
        options: dict[str, Any] = {"path": name, "revision": revision or _newest(name)}
        content_of = ""
    elif shards:
        options = {"path": "parquet", "data_dir": str(Path(path).expanduser().resolve())}
        content_of = repr([(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in shards])
    else:
        raise UserError(
            f"data.streaming reads hub:NAME or a folder of parquet shards, and {path} is neither; leave it out: "
            "pictures and tar shards are read from where they lie."
        )
    about = (VERSION, options, content_of, split, size, background, megapixels, limit)
    key = hashlib.sha256(repr(about).encode()).hexdigest()[:16]
    folder = Path(datasets.config.HF_DATASETS_CACHE) / f"ldm-small-{key}"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if not (folder / "complete").exists():
            rows = load(options.pop("path"), split, path, streaming=True, **options)
            _copy(rows if limit is None else rows.take(limit), folder, path, size, background, megapixels)
    rows = load("parquet", "train", str(folder), data_files=sorted(map(str, folder.glob("*.parquet"))))
    return table(rows, f"stream of {path}, split {split}, kept small in {folder}", path, folder.resolve())


def _newest(name: str) -> str:
    """The newest revision of a hub set: a copy is of one revision, and another makes another copy."""
    from huggingface_hub import HfApi

    try:
        return str(HfApi().dataset_info(name).sha)
    except Exception as problem:  # whatever happens on the way to the hub
        first = str(problem).strip().splitlines()[0] if str(problem).strip() else type(problem).__name__
        raise UserError(
            f"The newest revision of hub:{name} is not known ({first}); without a network, name the one that you "
            f"have, hub:{name}@REVISION."
        ) from None


def _copy(rows: Any, folder: Path, where: str, size: int, background: str, megapixels: float) -> None:
    """Write FOLDER/00000.parquet and so on, then FOLDER/complete."""
    import datasets

    features = rows.features or rows._resolve_features().features
    column = next((name for name, feature in features.items() if holds_pictures(name, feature)), None)
    if column is None:
        raise UserError(f"{where} has no column of pictures, only {', '.join(features)}.")
    kept = {
        name: feature
        for name, feature in features.items()
        if isinstance(feature, datasets.Value | datasets.ClassLabel) and "binary" not in str(feature)
    }
    kept[column] = datasets.Image()
    if isinstance(features[column], datasets.Image):
        rows = rows.cast_column(column, datasets.Image(decode=False))
    done = len(list(folder.glob("*.parquet")))
    passing = iter(rows.skip(done * SHARD))
    with tqdm(unit="img", desc=f"streaming {where}", initial=done * SHARD) as bar:
        while shard := [*islice(passing, SHARD)]:
            for row in shard:
                row[column] = {"bytes": _small(row[column], size, background, megapixels), "path": None}
            file = folder / f"{done:05d}.parquet"
            fresh = file.with_suffix(".writing")
            chosen = [{name: row[name] for name in kept} for row in shard]
            with writing(file):
                datasets.Dataset.from_list(chosen, features=datasets.Features(kept)).to_parquet(fresh)
                flush(fresh)
                fresh.replace(file)
            done += 1
            bar.update(len(shard))
    if not done:
        raise UserError(f"{where} holds no rows.")
    write_text(folder / "complete", "")


def _small(value: Any, size: int, background: str, megapixels: float) -> bytes:
    """A picture as a small PNG; of a bad one the beginning, to be found bad and named like any other."""
    try:
        data = content(stored(value, "a picture", None))
    except BadPicture:
        return b""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = flattened(decoded("", data, megapixels, whole=True).image, background)
    except BadPicture:
        return data[:SAMPLE]
    scale = size / min(image.size)
    if scale < 1:
        width, height = (max(size, round(side * scale)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()
