"""All pictures are read once before the first step, so that a bad one is found now and not at hour nine.

Bad pictures are left out and named in bad_pictures.jsonl. What remains is fixed for the whole run: the order in which
samples are seen is a function of (seed, epoch) over the sound pictures, and their hashes are part of what a run may
not change under way. A picture that goes bad later is therefore an error that names it, never a sample less. The
result is kept in the run folder and used again as long as no file has changed.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from tqdm import tqdm

from autoencoder.files import flush, write_text
from ldm.buckets import assign, described, sizes_for
from ldm.checkpoint import writing
from ldm.config import UserError
from ldm.data import SceneSource, Source, content_sum
from ldm.pictures import FORMATS, BadPicture, content, decoded
from ldm.sampling import cores, read, slices

VERSION = 3
BATCH = 64
"""Pictures that a worker reads at a time"""


class Look(NamedTuple):
    """What one look at a picture told."""

    name: str
    sum: bytes = bytes(16)  # of its bytes as stored
    size: tuple[int, int] = (0, 0)  # upright, in pixels
    format: str = ""
    mode: str = ""
    remark: str = ""
    reason: str = ""  # why it is bad; empty if it is sound
    pixels: bytes = b""  # hash of what is shown
    print: bytes = b""  # 35 bytes that change little when the picture does: `fingerprint`


class Looks:
    """Looks at the pictures of a source, for `read`: lists of indices to lists of `Look`.

    Args:
        thorough: also tell `pixels` and `print`.
    """

    def __init__(self, source: Source, thorough: bool = False) -> None:
        self.source, self.thorough = source, thorough

    def __getitems__(self, indices: Sequence[int]) -> list[Look]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd but harmless metadata
            return [self._look(index) for index in indices]

    def _look(self, index: int) -> Look:
        stored = self.source.pictures[index]
        try:
            data = content(stored)
            image, kind, mode, remark = decoded(
                stored.name, data, self.source.config.max_megapixels, whole=True
            )
        except BadPicture as problem:
            return Look(stored.name, reason=problem.reason)
        seen = Look(stored.name, content_sum(data), image.size, kind, mode, remark)
        if not self.thorough:
            return seen
        return seen._replace(
            pixels=content_sum(repr((image.size, image.mode)).encode() + image.tobytes()),
            print=fingerprint(image),
        )


def fingerprint(image: Image.Image) -> bytes:
    """256 bits that say where a picture gets brighter from left to right, and three bytes of mean colour."""
    grey = np.asarray(image.convert("L").resize((17, 16), Image.Resampling.BOX), dtype=np.int16)
    mean = np.asarray(image.convert("RGB").resize((1, 1), Image.Resampling.BOX))
    return np.packbits(grey[:, 1:] > grey[:, :-1] + 2).tobytes() + mean.tobytes()  # 2: noise of compression


def look(
    source: Source, indices: Sequence[int] | None = None, *, thorough: bool = False, show: bool = True
) -> Iterator[Look]:
    """The pictures `indices`, by default all, read by as many workers as there are cores, with a progress bar."""
    indices = range(len(source)) if indices is None else indices
    batches = [indices[some.start : some.stop] for some in slices(0, len(indices), BATCH)]
    with tqdm(total=len(indices), unit="img", desc="looking at all pictures", disable=not show) as bar:
        for looks in read(Looks(source, thorough), batches, cores(len(indices))):
            yield from looks
            bar.update(len(looks))


def inspected(source: Source, run: Any, split: str = "") -> Source:
    """The sound pictures of `source`; the others are named in OUT/bad_pictures.jsonl. Called by all processes of `run`.

    With `data.bucket_step`, those trained on have been given their `sizes`.

    Args:
        split: goes into the name of that file, if it is not the one trained on.

    Raises:
        UserError: all are bad, or more than `data.bad_share`.
    """
    if isinstance(source, SceneSource):
        return source
    kept = run.out / "cache" / f"inspected-{_state(source)}.safetensors"
    _inspect(source, kept, run)
    source.sums, sizes, bad, remarks = _require(kept)
    names = run.out / f"bad_pictures{'-' * bool(split)}{split}.jsonl"
    if run.main:
        _name(bad, names)
    if remarks:
        run.say(f"{len(remarks):,} pictures: {remarks[0][1]} {remarks[0][2]}")
    sound = np.setdiff1d(np.arange(len(source)), [index for index, _, _ in bad])
    if bad:
        _judge(source, bad, names)
        run.say(
            f"{len(bad):,} of {len(source):,} pictures are bad, left out and named in {names}: {_first(bad)}"
        )
    left = source.chosen(sound.tolist())
    step = source.config.bucket_step
    if step and not split:
        left.sizes = assign(sizes[sound], sizes_for(source.config.size, step), run.config.batch_size)
        run.say(described(left.sizes))
    return left


def sound(source: Source) -> Source:
    """The pictures of `source` that can be read, for what has no run folder; says which are left out.

    Raises:
        UserError: none can be.
    """
    if isinstance(source, SceneSource):
        return source
    bad = [(i, seen.name, seen.reason) for i, seen in enumerate(look(source)) if seen.reason]
    if len(bad) == len(source):
        raise UserError(
            f"None of the {len(bad):,} pictures in {source.config.where} can be used: {_first(bad)}."
        )
    if bad:
        print(
            f"{len(bad):,} of {len(source):,} pictures are bad and left out: {_first(bad)}", file=sys.stderr
        )
    unfit = {i for i, _, _ in bad}
    return source.chosen([i for i in range(len(source)) if i not in unfit])


def _judge(source: Source, bad: Sequence[Sequence[Any]], names: Path) -> None:
    share, where = len(bad) / len(source), source.config.where
    if len(bad) == len(source):
        raise UserError(
            f"None of the {len(bad):,} pictures in {where} can be used; see {names}: {_first(bad)}."
        )
    if share > source.config.bad_share:
        raise UserError(
            f"{len(bad):,} of the {len(source):,} pictures in {where} are bad ({share:.1%}, and data.bad_share allows "
            f"{source.config.bad_share:.1%}); see {names}: {_first(bad)}. Mend or remove them, or raise data.bad_share."
        )


def _first(bad: Sequence[Sequence[Any]]) -> str:
    _, name, reason = bad[0]
    return f"{name} {reason}" + f", and {len(bad) - 1:,} more" * (len(bad) > 1)


def _name(bad: Sequence[Sequence[Any]], file: Path) -> None:
    if bad:
        with writing(file):
            lines = [json.dumps({"picture": name, "reason": reason}) for _, name, reason in bad]
            write_text(file, "\n".join(lines) + "\n")
    else:
        file.unlink(missing_ok=True)


def _inspect(source: Source, file: Path, run: Any) -> None:
    """Have `file` say what is to be seen in every picture: each process looks at its share, the first joins them."""
    rank, ranks = run.accelerator.process_index, run.accelerator.num_processes
    there = _read(file) is not None
    run.accelerator.wait_for_everyone()  # nobody writes while others still look
    if there:
        return
    parts = [file.with_stem(f"{file.stem}-{i}-of-{ranks}") for i in range(ranks)]
    if _read(parts[rank]) is None:
        _write(parts[rank], _seen(source, range(len(source))[rank::ranks], show=run.main))
    run.accelerator.wait_for_everyone()
    if run.main:
        _write(file, _joined([_require(part) for part in parts]))
        for part in parts:
            part.unlink()
    run.accelerator.wait_for_everyone()


class Seen(NamedTuple):
    """What looking at pictures told."""

    sums: np.ndarray  # [N,16] uint8
    sizes: np.ndarray  # [N,2] int32
    bad: list[Any]  # [index, name, reason]
    remarks: list[Any]  # [index, name, remark]


def _seen(source: Source, indices: Sequence[int], show: bool) -> Seen:
    sums = np.zeros((len(indices), 16), dtype=np.uint8)
    sizes = np.zeros((len(indices), 2), dtype=np.int32)
    bad, remarks = [], []
    for i, (index, seen) in enumerate(zip(indices, look(source, indices, show=show), strict=True)):
        sums[i], sizes[i] = np.frombuffer(seen.sum, dtype=np.uint8), seen.size
        if seen.reason:
            bad.append([index, seen.name, seen.reason])
        elif seen.remark:
            remarks.append([index, seen.name, seen.remark])
    return Seen(sums, sizes, bad, remarks)


def _joined(parts: Sequence[Seen]) -> Seen:
    """Of all pictures, from every so manieth each."""
    total = sum(len(part.sums) for part in parts)
    sums, sizes = np.zeros((total, 16), dtype=np.uint8), np.zeros((total, 2), dtype=np.int32)
    for i, part in enumerate(parts):
        sums[i :: len(parts)], sizes[i :: len(parts)] = part.sums, part.sizes
    bad, remarks = (sorted(line for part in parts for line in part[field]) for field in (2, 3))
    return Seen(sums, sizes, bad, remarks)


def _write(file: Path, seen: Seen) -> None:
    """Whole or not at all."""
    fresh = file.with_suffix(".writing")
    with writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        about = {"bad": json.dumps(seen.bad), "remarks": json.dumps(seen.remarks)}
        save_file({"sums": seen.sums, "sizes": seen.sizes}, fresh, metadata=about)
        flush(fresh)
        fresh.replace(file)


def _require(file: Path) -> Seen:
    seen = _read(file)
    if seen is None:
        raise UserError(f"{file} has vanished or is damaged; run the same command again.")
    return seen


def _read(file: Path) -> Seen | None:
    try:
        with safe_open(file, framework="numpy") as kept:
            bad, remarks = (json.loads(kept.metadata()[name]) for name in ("bad", "remarks"))
            return Seen(kept.get_tensor("sums"), kept.get_tensor("sizes"), bad, remarks)
    except (OSError, SafetensorError, ValueError, KeyError):
        return None


def _state(source: Source) -> str:
    """Another one whenever a file of the data has changed, by name, size and times, without reading any."""
    sums = hashlib.sha256(repr((VERSION, PIL.__version__, FORMATS, len(source))).encode())
    sums.update(repr(source.config.max_megapixels).encode())
    for file in source.files:
        try:
            status = os.stat(file)  # noqa: PTH116
            about: object = (status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_mode)
        except OSError as problem:
            about = problem.errno
        sums.update(f"{file} {about}\n".encode(errors="surrogateescape"))  # a name may be any bytes
    return sums.hexdigest()[:16]
