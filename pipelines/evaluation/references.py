"""Features of the pictures of a source, computed once and kept under a hash of everything that they depend on."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from autoencoder.files import flush, user_cache, write_tensors
from ldm.data import Source
from pipelines.evaluation.extractors import Extractor, Seen
from pipelines.evaluation.generation import Share, bytes_of

BATCH = 64
"""Pictures that an extractor reads together"""


def usual_cache() -> Path:
    """Where features are kept."""
    return user_cache("features")


def features_of(
    source: Source, size: tuple[int, int], extractor: Extractor, state: PartialState, cache: Path
) -> Seen:
    """What an extractor says of all pictures of a source, brought to (width, height). Called by all processes.

    The first process, which alone may use the result, reads it from `cache` where it is there.
    """
    about = json.dumps([source.fingerprint, source.config.background, size, extractor.stamp()])
    file = cache / f"{hashlib.sha256(about.encode()).hexdigest()[:32]}.safetensors"
    known = _read(file) if state.is_main_process else None
    (there,) = broadcast_object_list([known is not None])
    if there:
        return known or Seen(torch.empty(0), None)
    share = Share(state, len(source), BATCH)
    columns = share.made(
        lambda rows: tensors(extractor(pixels_of(source, list(rows), size))),
        f"{extractor.name}, real pictures",
    )
    whole = [share.whole(column) for column in columns]
    if state.is_main_process:
        _write(file, whole)
    return seen(whole)


def seen_of(pixels: Tensor, extractor: Extractor, share: Share) -> Seen:
    """What an extractor says of pictures uint8 [own,3,H,W] that the processes have made, in order."""
    parts = [tensors(extractor(part)) for part in pixels.split(BATCH)]
    return seen([share.whole(torch.cat(column)) for column in zip(*parts, strict=True)])


def pixels_of(source: Source, indices: list[int], size: tuple[int, int]) -> Tensor:
    """Pictures of a source, brought to (width, height), uint8 [B,3,H,W]."""
    return bytes_of([source.picture(i, size) for i in indices])


def tensors(one: Seen) -> list[Tensor]:
    """Features, and logits if there are any."""
    return [tensor for tensor in one if tensor is not None]


def seen(columns: list[Tensor]) -> Seen:
    """The inverse of `tensors`."""
    return Seen(columns[0], columns[1] if len(columns) > 1 else None)


def _read(file: Path) -> Seen | None:
    try:
        kept = load_file(file)
        return Seen(kept["features"], kept.get("logits"))
    except (OSError, SafetensorError, KeyError):
        return None


def _write(file: Path, columns: list[Tensor]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    fresh = file.with_name(
        f".{file.name}.{os.getpid()}.writing"
    )  # others may compute the same at the same time
    write_tensors(fresh, dict(zip(("features", "logits"), columns, strict=False)))
    flush(fresh)
    fresh.replace(file)
