"""Networks that turn pictures into features, by which sets of pictures are compared.

    inception                 the one that published FID figures are measured with (torch-fidelity's port)
    torchvision:resnet50      a classifier of torchvision: what its last linear layer reads
    timm:NAME                 a model of timm
    transformers:NAME         a Hugging Face vision model, such as facebook/dinov2-base, or a folder with one
    FOLDER                    a classifier of ours, as `ldm classifier` writes it

NAME@FILE reads the weights from a file. Nothing is unpickled: weights are safetensors, or tensors alone.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from autoencoder.store import weight_hash
from ldm.config import UserError

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Mean and standard deviation of each channel in [0, 1], which most networks take off"""


class Seen(NamedTuple):
    """What a network says of pictures."""

    features: Tensor  # [B,D] float32
    logits: Tensor | None  # [B,K] of a classifier

    def rows(self, numbers: Any) -> Seen:
        """Of some of the pictures."""
        return Seen(self.features[numbers], None if self.logits is None else self.logits[numbers])


@dataclass(frozen=True, kw_only=True)
class Extractor:
    """A network that reads pictures of any size."""

    name: str
    """As it was asked for, without the file"""
    network: nn.Module
    read: Callable[[Tensor], Seen]
    """Pixels uint8 [B,3,H,W], on the network's device"""
    resize: str
    """How pictures are brought to the size that the network reads, in words"""
    layer: str
    """What the features are, in words"""
    classes: tuple[str, ...] = ()
    """Names of the logits, where they are known"""

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Seen:
        """uint8 [B,3,H,W] => features and logits, float32 on the CPU."""
        features, logits = self.read(pixels.to(next(self.network.parameters()).device))
        return Seen(features.float().cpu(), None if logits is None else logits.float().cpu())

    def stamp(self) -> dict[str, str]:
        """Which network, and what it reads: two figures can be compared only if these are equal."""
        return {
            "name": self.name,
            "weights_sha256": weight_hash(self.network.state_dict()),
            "resize": self.resize,
            "layer": self.layer,
        }


def open_extractor(asked: str, device: torch.device) -> Extractor:
    """The extractor of a name, ready on a device; the names are above.

    Raises:
        UserError: no such name, a package or weights that are missing, with the file and where it belongs.
    """
    name, _, file = asked.partition("@")
    kind, _, model = name.partition(":")
    if file and not Path(file).expanduser().is_file():
        raise UserError(f"The weights {file} of the extractor {name} are not there.")
    weights = Path(file).expanduser() if file else None
    if name == "inception":
        found = _inception(weights)
    elif kind in FAMILIES and model:
        found = FAMILIES[kind](model, weights)
    elif Path(name).expanduser().is_dir() and not file:
        found = _ours(Path(name).expanduser())
    else:
        raise UserError(
            f"There is no extractor {asked!r}: choose inception, torchvision:NAME, timm:NAME, transformers:NAME, "
            "or the folder of a classifier that `ldm classifier` has trained."
        )
    found.network.eval().requires_grad_(False).to(device)
    return found


def package(name: str) -> Any:
    """An optional package; UserError if it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(
            f"Evaluation needs {name.replace('_', '-')}, which is not installed; run: pip install -e '.[eval]'"
        ) from None


def resized(side: int, mean: Sequence[float], std: Sequence[float]) -> Callable[[Tensor], Tensor]:
    """Pixels uint8 [B,3,H,W] => [B,3,side,side], the whole picture, with mean and deviation taken off."""
    shift, scale = (torch.tensor(values).view(3, 1, 1) for values in (mean, std))

    def prepare(pixels: Tensor) -> Tensor:
        x = pixels.float() / 255
        if x.shape[2:] != (side, side):
            x = F.interpolate(x, (side, side), mode="bicubic", antialias=True).clamp(0, 1)
        return (x - shift.to(x.device)) / scale.to(x.device)

    return prepare


def in_words(side: int) -> str:
    """What `resized` does to the size, for the stamp."""
    return f"bicubic with antialiasing to {side}x{side}"


def before_last_linear(network: nn.Module, name: str) -> Callable[[Tensor], Seen]:
    """What the last linear layer of a classifier reads, and the logits that it makes of it."""
    linear = [module for module in network.modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise UserError(
            f"{name} does not end in a linear layer, so that its features are not known; choose another."
        )

    def read(x: Tensor) -> Seen:
        seen: list[Tensor] = []
        with linear[-1].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0])):
            logits = network(x)
        return Seen(seen[0].flatten(1), logits)

    return read


def _inception(file: Path | None) -> Extractor:
    package("torch_fidelity")
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3

    if file is None:
        file = _stock_inception(URL_INCEPTION_V3)
    try:
        with tensors_alone():
            network = FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048", "logits_unbiased"], str(file)
            )
    except pickle.UnpicklingError:  # torch advises to unpickle all the same
        raise UserError(
            f"{file} does not hold the weights of Inception as tensors alone, so that it is not read."
        ) from None
    except (RuntimeError, EOFError, ValueError, TypeError) as problem:
        raise UserError(f"{file} does not hold the weights of Inception: {first_line(problem)}") from None
    return Extractor(
        name="inception",
        network=network,
        read=lambda pixels: Seen(*network(pixels)),
        resize="bilinear as in TensorFlow 1, without antialiasing, to 299x299",
        layer="2048 numbers of the last pooling",
    )


def _stock_inception(url: str) -> Path:
    """torch-fidelity's file in torch hub's cache, fetched if need be; its name carries its SHA-256."""
    file = Path(torch.hub.get_dir(), "checkpoints", url.rsplit("/", 1)[-1])
    digest = file.stem.rsplit("-", 1)[-1]
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(file), hash_prefix=digest)
        except (OSError, RuntimeError) as problem:
            raise UserError(
                f"The Inception weights {file} are not there and can't be fetched ({first_line(problem)}): download "
                f"{url} where there is internet and put it there, or name it with --extractor inception@FILE, or "
                "choose another extractor."
            ) from None
    with file.open("rb") as opened:
        if not hashlib.file_digest(opened, "sha256").hexdigest().startswith(digest):
            raise UserError(f"{file} is damaged: its SHA-256 is not the one in its name; remove it.")
    return file


@contextmanager
def tensors_alone() -> Iterator[None]:
    """While open, torch.load refuses everything but tensors, whatever the caller says (torch-fidelity unpickles)."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        os.environ.pop(name) if before is None else os.environ.update({name: before})


def _torchvision(model: str, file: Path | None) -> Extractor:
    from torchvision.models import get_model, get_model_weights, list_models

    if model not in list_models():
        raise UserError(f"torchvision has no model {model!r}; see torchvision.models.list_models().")
    stock = next(iter(get_model_weights(model)))
    name = f"torchvision:{model}"
    try:
        weights = load_file(file) if file else stock.get_state_dict(weights_only=True, check_hash=True)
        network = get_model(model, weights=None)
        network.load_state_dict(weights)
    except (OSError, RuntimeError, SafetensorError, pickle.UnpicklingError) as problem:
        cached = Path(torch.hub.get_dir(), "checkpoints", stock.url.rsplit("/", 1)[-1])
        raise UserError(
            f"The weights of {name} can't be had ({first_line(problem)}): put {stock.url} at {cached}, or name a "
            f"safetensors file, {name}@FILE."
        ) from None
    preset = stock.transforms()
    side = preset.crop_size[0]
    prepare, classify = resized(side, preset.mean, preset.std), before_last_linear(network, name)
    return Extractor(
        name=name,
        network=network,
        read=lambda pixels: classify(prepare(pixels)),
        resize=in_words(side),
        layer="input of the last linear layer",
    )


def _timm(model: str, file: Path | None) -> Extractor:
    timm = package("timm")
    from huggingface_hub import hf_hub_download

    told = timm.get_pretrained_cfg(model)
    if told is None:
        raise UserError(f"timm has no model {model!r} with weights; see timm.list_pretrained().")
    try:
        place = file or Path(hf_hub_download(told.hf_hub_id, "model.safetensors"))
        if place.suffix != ".safetensors":
            raise OSError(f"{place} is no safetensors file")
        network = timm.create_model(
            model, pretrained=True, num_classes=0, pretrained_cfg_overlay={"file": str(place)}
        )
    except (OSError, RuntimeError, ValueError, SafetensorError) as problem:
        raise UserError(
            f"The weights of timm:{model} can't be had ({first_line(problem)}): name a safetensors file, "
            f"timm:{model}@FILE, or {where_on_the_hub(told.hf_hub_id)}."
        ) from None
    side = told.input_size[-1]
    prepare = resized(side, told.mean, told.std)
    return Extractor(
        name=f"timm:{model}",
        network=network,
        read=lambda pixels: Seen(network(prepare(pixels)), None),
        resize=in_words(side),
        layer="pooled features",
    )


def _transformers(model: str, file: Path | None) -> Extractor:
    from transformers import AutoImageProcessor, AutoModel

    if file:
        raise UserError(
            "transformers:NAME takes no @FILE; name a folder with config.json and model.safetensors."
        )
    try:
        network, found = AutoModel.from_pretrained(model, use_safetensors=True, output_loading_info=True)
        processor: Any = AutoImageProcessor.from_pretrained(model)
    except (OSError, ValueError) as problem:
        raise UserError(
            f"The extractor transformers:{model} can't be had ({first_line(problem)}): name a folder with "
            f"config.json, model.safetensors and preprocessor_config.json, or {where_on_the_hub(model)}."
        ) from None
    missing = sorted(found["missing_keys"])
    if any("pooler" not in key for key in missing):
        raise UserError(f"transformers:{model} has no weights for {missing[0]}; choose another.")
    side = _side(processor)
    mean, std = (
        getattr(processor, f"image_{name}", None) or IMAGENET[i] for i, name in enumerate(("mean", "std"))
    )
    prepare = resized(side, mean, std)
    look = getattr(network, "get_image_features", network)  # of models of pictures and texts

    def read(pixels: Tensor) -> Seen:
        out = look(pixel_values=prepare(pixels))
        if isinstance(out, Tensor):
            return Seen(out, None)
        pooled = None if missing else out.pooler_output  # without its weights it would be a random projection
        return Seen((out.last_hidden_state[:, 0] if pooled is None else pooled).flatten(1), None)

    return Extractor(
        name=f"transformers:{model}",
        network=network,
        read=read,
        resize=in_words(side),
        layer="first token of the last layer" if missing else "pooled output",
    )


def _side(processor: Any) -> int:
    """Pixels along a side of what a Hugging Face image processor makes."""
    size = (processor.crop_size if getattr(processor, "do_center_crop", False) else None) or processor.size
    sides = [size[key] for key in ("height", "shortest_edge") if size.get(key)]
    if not sides:
        raise UserError(
            f"How large the pictures are that this model reads is not said in its processor: {size}."
        )
    return int(sides[0])


def _ours(folder: Path) -> Extractor:
    from pipelines.evaluation.classifier import load_recogniser

    recogniser = load_recogniser(folder)
    prepare = resized(recogniser.size, (0.5,) * 3, (0.5,) * 3)
    classify = before_last_linear(recogniser.network, str(folder))
    return Extractor(
        name=folder.resolve().name,
        network=recogniser.network,
        read=lambda pixels: classify(prepare(pixels)),
        resize=in_words(recogniser.size),
        layer="input of the last linear layer",
        classes=recogniser.classes,
    )


FAMILIES: dict[str, Callable[[str, Path | None], Extractor]] = {
    "torchvision": _torchvision,
    "timm": _timm,
    "transformers": _transformers,
}


def where_on_the_hub(name: str) -> str:
    """How to get a model of the hub to a machine that does not reach it, for a sentence of ours."""
    from huggingface_hub.constants import HF_HUB_CACHE

    place = Path(HF_HUB_CACHE, f"models--{name.replace('/', '--')}")
    return f"run `hf download {name}` where there is internet, and copy the folder that it makes to {place}"


def first_line(problem: BaseException) -> str:
    """What a library says went wrong, for a sentence of ours."""
    return (str(problem).strip() or type(problem).__name__).splitlines()[0].rstrip(".")
