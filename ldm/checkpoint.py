"""Checkpoints: safetensors and JSON in a folder that is either whole or not there.

`save` takes named parts, anything with `state_dict`; `newest` finds the last sound one; `restore` puts it back.
Nothing is pickled: a nested state becomes one file of tensors and one of plain values.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from autoencoder.files import written_beside
from ldm.config import UserError


class Stateful(Protocol):
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any], /) -> Any: ...


def save(folder: Path, parts: Mapping[str, Stateful], extra: Mapping[str, str], keep: int) -> None:
    """Write `folder` (.../step-00001000), then remove all but the newest `keep` beside it.

    Args:
        parts: each becomes NAME.safetensors and NAME.json.
        extra: text files by name, such as the recipe.
        keep: checkpoints to leave in the parent folder, this one counted.
    """
    with writing(folder), written_beside(folder) as fresh:
        for name, part in parts.items():
            tensors, values = split(part.state_dict())
            save_file(tensors, fresh / f"{name}.safetensors")
            (fresh / f"{name}.json").write_text(json.dumps(values))
        for name, text in extra.items():
            (fresh / name).write_text(text, encoding="utf-8")
        sums = {path.name: digest(path) for path in sorted(fresh.iterdir())}
        (fresh / "manifest.json").write_text(json.dumps(sums, indent=1))
    problem = damage(folder)
    if problem:
        raise UserError(f"The checkpoint {folder} did not survive writing: {problem}; check the disk.")
    before = [old for old in sorted(folder.parent.glob("step-*")) if old.name <= folder.name]
    for old in before[:-keep]:
        shutil.rmtree(old)


@contextmanager
def writing(target: Path) -> Iterator[None]:
    """Around whatever writes `target`: a full or read-only disk becomes one sentence that names it."""
    try:
        yield
    except (OSError, SafetensorError) as problem:
        there = next(folder for folder in (target, *target.parents) if folder.exists())
        room = f"{shutil.disk_usage(there).free / 1e6:,.0f} MB are free there"
        raise UserError(
            f"{target} can't be written ({problem}; {room}); what was saved before is intact. "
            "Make room, then run the same command again."
        ) from None


def newest(folder: Path) -> Path | None:
    """The newest sound checkpoint in `folder`, or None; damaged ones are named in a warning and passed over."""
    for candidate in sorted(folder.glob("step-*"), reverse=True):
        problem = damage(candidate)
        if not problem:
            return candidate
        warnings.warn(f"Passing over the damaged checkpoint {candidate}: {problem}.", stacklevel=2)
    return None


def restore(folder: Path, parts: Mapping[str, Stateful]) -> None:
    """Load every part of `parts` from the checkpoint `folder`."""
    for name, part in parts.items():
        values = json.loads((folder / f"{name}.json").read_text())
        part.load_state_dict(join(load_file(folder / f"{name}.safetensors"), values))


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None."""
    try:
        sums = json.loads((folder / "manifest.json").read_text())
        if not isinstance(sums, dict) or not sums:
            return "manifest.json lists no files"
        for name, expected in sums.items():
            if digest(folder / name) != expected:
                return f"{name} has changed since it was written"
    except (OSError, ValueError) as problem:
        return f"{type(problem).__name__}: {problem}"
    return None


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def split(state: Any) -> tuple[dict[str, Tensor], Any]:
    """A nested state as tensors by path, and the same nest with each tensor replaced by {"tensor": its path}.

    A tensor that stands in several places, such as a tied weight, is kept once.
    """
    tensors: dict[str, Tensor] = {}
    first: dict[Any, str] = {}

    def walk(value: Any, path: str) -> Any:
        if isinstance(value, Tensor):
            same = (value.data_ptr(), value.shape, value.stride(), value.dtype) if value.numel() else path
            if same not in first:
                first[same], tensors[path] = path, value.detach().contiguous()
            return {"tensor": first[same]}
        if isinstance(value, Mapping):
            # JSON keys are strings, while optimizers number their parameters.
            return {"items": [[key, walk(item, f"{path}.{key}")] for key, item in value.items()]}
        if isinstance(value, list | tuple):
            return [walk(item, f"{path}.{i}") for i, item in enumerate(value)]
        return value

    return tensors, walk(state, "state")


def join(tensors: Mapping[str, Tensor], values: Any) -> Any:
    """The inverse of `split`."""
    if isinstance(values, list):
        return [join(tensors, item) for item in values]
    if not isinstance(values, dict):
        return values
    if "tensor" in values:
        return tensors[values["tensor"]]
    return {key: join(tensors, item) for key, item in values["items"]}
