"""Networks in diffusers' stock folders: `config.json` beside `diffusion_pytorch_model.safetensors`.

A folder is named by a local path or by a name on the Hugging Face hub: `owner/model` or, for a network within
a pipeline, `owner/model/vae`. Only safetensors files are read: a pickle can run code.
"""

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from autoencoder.files import flush, write_tensors
from autoencoder.untrusted import (
    bounded,
    read_header,
    read_json,
    require_finite,
    require_memory,
    weight_files,
)

CONFIG = "config.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
FILES = (CONFIG, WEIGHTS, INDEX, "diffusion_pytorch_model-*-of-*.safetensors")

LARGEST = 1_000_000  # whole number in a config: channels, layers, sizes

# Attention weights in files written before diffusers 0.15, among them Stable Diffusion 1.5's autoencoder.
OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


class StockConfig:
    """Base of the dataclasses whose fields are the keys of a stock `config.json`."""

    def fixed(self) -> dict[str, object]:
        """The stock keys of which one value is supported: written with the others, checked on reading."""
        return {}


C = TypeVar("C", bound=StockConfig)
M = TypeVar("M", bound=nn.Module)


def find_folder(source: str | Path) -> Path:
    """The local folder of a network; what `source` names on the hub is downloaded, `FILES` only.

    Raises FileNotFoundError if `source` is neither a folder here nor a model on the hub.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    hub_name = re.fullmatch(r"(?P<model>[\w-][\w.-]*/[\w.-]+)(?P<inner>(/[\w.-]+)*)", str(source))
    if hub_name is None:
        raise FileNotFoundError(f"There is no folder '{source}'.")
    from huggingface_hub import snapshot_download

    model, inner = hub_name["model"], hub_name["inner"].lstrip("/")
    try:
        snapshot = snapshot_download(model, allow_patterns=[f"{inner}/{file}".lstrip("/") for file in FILES])
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise FileNotFoundError(
            f"'{source}' is neither a folder here nor a model on the Hugging Face hub ({reason})."
        ) from error
    return Path(snapshot, inner)


def _tuples(value: Any) -> Any:
    """JSON has lists where the dataclasses have tuples."""
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def _largest(value: Any) -> int:
    """The largest whole number in a setting."""
    if isinstance(value, tuple):
        return max(map(_largest, value), default=0)
    return abs(value) if isinstance(value, int) else 0


def _check_weights(
    folder: Path, weights: Mapping[str, tuple[int, ...]], wanted: Mapping[str, Tensor]
) -> None:
    problems = {
        "missing": [name for name in wanted if name not in weights],
        "unexpected": [name for name in weights if name not in wanted],
        "of the wrong shape": [
            f"{name} {[*weights[name]]} instead of {[*tensor.shape]}"
            for name, tensor in wanted.items()
            if name in weights and weights[name] != tensor.shape
        ],
    }
    for problem, names in problems.items():
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ValueError(
                f"{folder}: the weights do not fit its {CONFIG}; {problem}: {', '.join(names[:3])}{more}."
            )


def load_config(folder: Path, kind: type[C], class_name: str) -> C:
    """Read `config.json` into the dataclass `kind`; keys that begin with `_` are notes and are skipped.

    Args:
        folder: a local stock folder.
        kind: a frozen dataclass whose fields are the supported keys, with the stock defaults.
        class_name: the stock class that the file must name.

    Raises:
        FileNotFoundError: the folder has no `config.json`.
        ValueError: not JSON, of another class, or a key or value that `kind` does not support.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no {CONFIG}: give a folder that holds a saved {class_name}.")
    content = read_json(path)
    found = content.get("_class_name", class_name)
    if found != class_name:
        raise ValueError(
            f"{path} describes {found}, but {class_name} is wanted: give a folder that holds a saved {class_name}."
        )
    keys = {key: _tuples(value) for key, value in content.items() if not key.startswith("_")}
    if large := [key for key, value in keys.items() if _largest(value) > LARGEST]:
        raise ValueError(f"{path}: {large[0]} has numbers above {LARGEST:,}, which no network has.")
    names = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    try:
        config = kind(**{key: value for key, value in keys.items() if key in names})
    except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
        raise ValueError(f"{path}: {error}") from error
    fixed = config.fixed()
    bad = [
        f"{key} = {keys[key]!r}" + (f" (only {fixed[key]!r})" if key in fixed else "")
        for key in sorted(keys.keys() - names)
        if key not in fixed or keys[key] != fixed[key]
    ]
    if bad:
        raise ValueError(f"{path}: this {class_name} has settings that are not supported: {', '.join(bad)}.")
    return config


def _today(name: str) -> str:
    """Today's name of a tensor."""
    return ".".join(OLD_NAMES.get(part, part) for part in name.split("."))


def load_weights(folder: Path) -> dict[str, Tensor]:
    """Read all tensors of a stock folder, in one file or in shards, old names replaced by today's.

    Raises FileNotFoundError if a file is missing, ValueError if one is damaged or has values that are not finite.
    """
    weights: dict[str, Tensor] = {}
    for file in weight_files(folder, WEIGHTS):
        read_header(file)
        weights.update(load_file(file))
    require_finite(weights, folder)
    return {_today(name): tensor for name, tensor in weights.items()}


def load_folder(source: str | Path, kind: type[C], class_name: str, build: Callable[[C], M]) -> M:
    """The network saved in a stock folder, in float32 on the CPU, in evaluation mode.

    Args:
        source: a local folder or a hub name, see `find_folder`.
        kind, class_name: see `load_config`.
        build: makes the network from its config; called on the meta device, so initial weights cost nothing
            and every parameter and buffer must be in the file.

    Raises:
        FileNotFoundError: folder or file missing.
        ValueError: unsupported config, tensors missing, unexpected, of another shape or not finite, each by name,
            or more of them than there is memory for.
    """
    folder = find_folder(source)
    config = load_config(folder, kind, class_name)
    shapes = {
        _today(n): shape for file in weight_files(folder, WEIGHTS) for n, shape in read_header(file).items()
    }
    with bounded(len(shapes), f"{folder / CONFIG}"):
        network = build(config)
    _check_weights(folder, shapes, dict(network.named_parameters()) | dict(network.named_buffers()))
    require_memory(sum(map(math.prod, shapes.values())), f"{folder}")
    return filled(network, load_weights(folder)).eval()


def filled(network: M, weights: Mapping[str, Tensor]) -> M:
    """A network that was built on the meta device, given all of its weights, of any floating-point type, as copies.

    What a file holds may change under a tensor that is a view of it. (`Module.to_empty` loads sympy, in 0.3 s.)
    """
    own = network.state_dict()
    copies = {name: weights[name].to(tensor.dtype, copy=True) for name, tensor in own.items()}
    network.load_state_dict(copies, assign=True)
    return network


def save_folder(
    folder: str | Path, config: StockConfig, class_name: str, weights: Mapping[str, Tensor]
) -> None:
    """Write a stock folder. Both files are complete on the disk before either replaces an older one.

    Args:
        folder: made if it does not exist; other files in it stay.
        config: the dataclass instance that describes the network.
        class_name: the stock class that reads it.
        weights: name -> tensor, any device and memory format, written with their dtype.

    Raises OSError if the files cannot be written; what was there before is untouched then.
    """
    folder = Path(folder)
    content = {"_class_name": class_name, **dataclasses.asdict(config), **config.fixed()}  # type: ignore[call-overload]
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    beside = {file: folder / f".{file}.writing" for file in (WEIGHTS, CONFIG)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        beside[CONFIG].write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
        write_tensors(beside[WEIGHTS], tensors, {"format": "pt"})
        for written in beside.values():
            flush(written)
        for file, written in beside.items():
            written.replace(folder / file)
    except (OSError, SafetensorError) as error:
        raise OSError(f"{folder}: this {class_name} could not be saved ({error}).") from error
    finally:
        for written in beside.values():
            written.unlink(missing_ok=True)


def weight_hash(weights: Mapping[str, Tensor] | str | Path) -> str:
    """SHA-256 in hexadecimal over names, shapes and values of all tensors, in the order of their names.

    Floating-point values are hashed as float32, so that a half-precision file and the float32 model read from
    it are the same autoencoder; device and memory format do not matter either.

    Args:
        weights: a state dict, or a stock folder, here or on the hub.
    """
    if not isinstance(weights, Mapping):
        weights = load_weights(find_folder(weights))
    digest = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name].detach().cpu()
        tensor = tensor.float() if tensor.is_floating_point() else tensor
        digest.update(f"{name} {tensor.dtype} {[*tensor.shape]}\n".encode())
        digest.update(tensor.flatten().numpy().data)
    return digest.hexdigest()
