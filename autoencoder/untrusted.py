"""Reading what strangers wrote: nothing outside of the folder, nothing larger than it can be, nothing run."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.modules import module as registration
from torch.overrides import TorchFunctionMode

JSON_BYTES = 1_000_000  # of a configuration
HEADER_BYTES = 25_000_000  # of a safetensors file, as the hub allows
TENSORS = 50_000  # in a file
DTYPES = {"F64", "F32", "F16", "BF16", "I64", "I32", "BOOL"}


def inside(folder: Path, name: str) -> Path:
    """The file or folder `name` in `folder`.

    Links may lead to other places in the folder, and from a snapshot of the hub's cache to its blobs.

    Raises ValueError if it is not inside.
    """
    root = folder.resolve()
    for parent in (folder.absolute(), *folder.absolute().parents):
        if parent.parent.name == "snapshots" and (parent.parents[1] / "blobs").is_dir():
            root = parent.parents[1].resolve()
    path = folder / name
    real = path.resolve()
    if Path(name).is_absolute() or ".." in Path(name).parts or not real.is_relative_to(root):
        raise ValueError(f"{name} of {folder} leads out of that folder, where nothing is read.")
    if real.exists() and not (real.is_file() or real.is_dir()):
        raise ValueError(f"{path} is neither a file nor a folder.")
    return path


def read_json(path: Path, limit: int = JSON_BYTES) -> dict[str, Any]:
    """A JSON object; ValueError if it is none, is longer than `limit` bytes, or has numbers that are not finite."""

    def finite(text: str) -> float:
        if not math.isfinite(float(text)):
            raise ValueError(f"{text} is not finite")
        return float(text)

    inside(path.parent, path.name)
    if path.stat().st_size > limit:
        raise ValueError(f"{path} is {path.stat().st_size:,} bytes long; at most {limit:,} are read.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"), parse_float=finite, parse_constant=finite)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}).") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, not {type(content).__name__}.")
    return content


def read_header(path: Path) -> dict[str, tuple[int, ...]]:
    """Tensor -> shape, of a safetensors file, without reading the tensors.

    Raises:
        FileNotFoundError: there is none.
        ValueError: damaged, a header or a number of tensors beyond all measure, or a type of number not read here.
    """
    inside(path.parent, path.name)
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
    if size > HEADER_BYTES:
        raise ValueError(f"{path} is not a sound safetensors file (a header of {size:,} bytes).")
    try:
        with safe_open(path, "pt") as opened:
            names = list(opened.keys())
            if len(names) > TENSORS:
                raise ValueError(f"{path} has {len(names):,} tensors; at most {TENSORS:,} are read.")
            slices = {name: opened.get_slice(name) for name in names}
            if odd := [name for name, part in slices.items() if part.get_dtype() not in DTYPES]:
                raise ValueError(
                    f"{path}: {odd[0]} is of type {slices[odd[0]].get_dtype()}, which is not read."
                )
            return {name: tuple(part.get_shape()) for name, part in slices.items()}
    except SafetensorError as error:
        raise ValueError(f"{path} is not a sound safetensors file ({error}).") from error


def weight_files(folder: Path, name: str) -> list[Path]:
    """The file `name` of a stock folder, or the shards that stand for it: its stem and a number.

    Raises FileNotFoundError if one is missing, ValueError if the index of the shards names anything else.
    """
    index, names = folder / f"{name}.index.json", [name]
    if not (folder / name).is_file() and index.is_file():
        shard = re.compile(re.escape(Path(name).stem) + r"-\d{5}-of-\d{5}\.safetensors")
        listed = read_json(index, HEADER_BYTES).get("weight_map")
        if not isinstance(listed, dict) or not all(shard.fullmatch(str(one)) for one in listed.values()):
            raise ValueError(f"{index} names files that are no shards of {name}.")
        names = sorted(set(listed.values()))
    for one in names:
        if not inside(folder, one).is_file():
            raise FileNotFoundError(f"{folder} has no {one}; other weight formats are not read.")
    return [folder / one for one in names]


class Unset(TorchFunctionMode):
    """While on, `torch.nn.init` does nothing: for tensors without values, it loads half a second of libraries."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(function, "__module__", None) == nn.init.__name__:
            return None
        return function(*args, **kwargs or {})


@contextmanager
def bounded(tensors: int, what: str) -> Iterator[None]:
    """While open, building modules on the meta device ends in a ValueError after many more than `tensors` tensors."""
    most, count = 4 * tensors + 1000, 0

    def registered(module: nn.Module, name: str, value: Tensor | None) -> None:
        nonlocal count
        count += 1
        if count > most:
            raise ValueError(
                f"{what} describes a network of more than {most:,} tensors, but has weights for {tensors:,}."
            )

    handles = [
        registration.register_module_parameter_registration_hook(registered),
        registration.register_module_buffer_registration_hook(registered),
    ]
    try:
        with torch.device("meta"), Unset():
            yield
    except (RuntimeError, TypeError, ArithmeticError, LookupError, AttributeError, MemoryError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"{what} describes a network that can't be built ({reason[0][:200]}).") from error
    finally:
        for handle in handles:
            handle.remove()


def require_memory(elements: int, what: str) -> None:
    """ValueError unless `elements` numbers in float32, and as many while reading, fit into the free memory."""
    needed, free = 8 * elements, psutil.virtual_memory().available
    if needed > free:
        raise ValueError(f"{what} needs {needed / 1e9:.1f} GB of memory, but {free / 1e9:.1f} are free.")


def require_finite(weights: dict[str, Tensor], what: object) -> None:
    """ValueError that names the first tensor with NaN or infinity."""
    for name, tensor in weights.items():
        if not tensor.is_floating_point() or tensor.sum().isfinite():
            continue  # a sum is fast, and never finite where a value is not; where all are, it may be too large
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{what}: {name} holds values that are not finite (NaN or infinity).")
