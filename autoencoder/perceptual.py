"""LPIPS (Zhang et al. 2018): how different two pictures look, by the features of a classifier.

The network and its five or seven linear layers are those of the `lpips` package. The classifier's own weights are
not in it: they are looked for, and a file that is not found is an error, never a random classifier.
"""

from __future__ import annotations

import hashlib
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from autoencoder import winograd

Classifier = Literal["alex", "vgg", "squeeze"]

SMALLEST = {"alex": 31, "vgg": 16, "squeeze": 17}
"""Sides in pixels below which a classifier's feature maps vanish."""

NAMES = {"alex": "alexnet", "vgg": "vgg16", "squeeze": "squeezenet1_1"}
"""What torchvision calls them."""

HUB = {"vgg": "timm/vgg16.tv_in1k"}
"""Repositories whose model.safetensors holds torchvision's weights, under torchvision's names."""


@dataclass(frozen=True, kw_only=True)
class PerceptualConfig:
    """Difference of how pictures look."""

    weight: float = 0.0
    """Weight of the LPIPS distance; 0: off"""
    network: Classifier = "vgg"
    """Whose features: vgg (the usual one for training), alex or squeeze"""
    weights: str | None = None
    """Its weights: a safetensors file, or a hub repository that holds a model.safetensors, under torchvision's
    names. By default the file in torch hub's cache; for vgg, else timm/vgg16.tv_in1k on the hub"""

    def __post_init__(self) -> None:
        if self.weight < 0:
            raise ValueError(f"loss.lpips.weight is {self.weight}, but must not be negative")


class Perceptual:
    """The LPIPS distance, frozen: its gradient goes to the pictures and nowhere else.

    Not a Module, so that nobody trains, averages, wraps or saves it.

    Raises:
        FileNotFoundError: the classifier's weights are nowhere; says where they were looked for and what to do.
        ValueError: the file is not sound or is of another network.
    """

    def __init__(self, config: PerceptualConfig, device: torch.device) -> None:
        weights = classifier_weights(config.network, config.weights)
        from lpips import LPIPS

        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")  # it asks torchvision in yesterday's words
            network = LPIPS(net=config.network, pnet_rand=True, verbose=False)
        _fill(network.net, weights, config)
        winograd.put_into(network.net)
        self.network: nn.Module = network.requires_grad_(False).eval().to(device)

    def __call__(self, made: Tensor, originals: Tensor) -> Tensor:
        """[B,3,H,W] in [-1, 1], twice => [B]. In float32, whatever the run's precision."""
        with torch.autocast(made.device.type, enabled=False):
            pictures = (
                part.float().contiguous(memory_format=torch.channels_last) for part in (made, originals)
            )
            return self.network(*pictures).flatten()


def classifier_weights(network: Classifier, place: str | None) -> dict[str, Tensor]:
    """torchvision's weights of a classifier by torchvision's names, from `place` or from where they usually are."""
    if place is not None:
        return _read(_found(place, network))
    cached = cached_file(network)
    if cached.is_file():
        return _from_cache(network, cached)
    if network in HUB:
        try:
            return _read(_downloaded(HUB[network]))
        except (OSError, ValueError) as problem:
            raise FileNotFoundError(f"{_missing(network)} ({_first_line(problem)}).") from None
    raise FileNotFoundError(f"{_missing(network)}.")


def cached_file(network: Classifier) -> Path:
    """Where torch hub keeps torchvision's weights of a classifier."""
    return Path(torch.hub.get_dir(), "checkpoints", _stock_weights(network).url.rsplit("/", 1)[-1])


def fetching(network: Classifier) -> str:
    """The command that puts those weights there, where there is internet."""
    return f"python -c \"import torchvision as t; t.models.{NAMES[network]}(weights='DEFAULT')\""


def _stock_weights(network: Classifier) -> Any:
    from torchvision.models import get_model_weights

    return get_model_weights(NAMES[network])["IMAGENET1K_V1"]


def _from_cache(network: Classifier, file: Path) -> dict[str, Tensor]:
    """Through torchvision, without running anything that the file says; its name carries its SHA-256."""
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    if not digest.startswith(file.stem.rsplit("-", 1)[-1]):
        raise ValueError(f"{file} is damaged: its SHA-256 is not the one in its name; remove it.")
    return _stock_weights(network).get_state_dict(weights_only=True, map_location="cpu")


def _missing(network: Classifier) -> str:
    name = NAMES[network]
    also = f" and {HUB[network]} on the Hugging Face hub can't be had" if network in HUB else ""
    return (
        f"loss.lpips needs torchvision's weights of {name}, but {cached_file(network)} is not there{also}; where "
        f"there is internet, {fetching(network)} fetches it, or set loss.lpips.weights to a safetensors file, or "
        "loss.lpips.weight to 0"
    )


def _downloaded(repository: str) -> Path:
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(repository, "model.safetensors"))


def _found(place: str, network: Classifier) -> Path:
    file = Path(place).expanduser()
    if file.is_file():
        return file
    if file.exists() or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", place) or place.endswith(".safetensors"):
        raise FileNotFoundError(
            f"loss.lpips.weights is {place}, but there is no such file; "
            f"give a safetensors file or a hub repository with torchvision's weights of {NAMES[network]}."
        )
    try:
        return _downloaded(place)
    except (OSError, ValueError) as problem:
        raise FileNotFoundError(
            f"loss.lpips.weights is {place}, which is neither a file here nor a repository on the Hugging Face hub "
            f"with a model.safetensors ({_first_line(problem)})."
        ) from None


def _read(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except SafetensorError as problem:
        raise ValueError(f"{file} is not a sound safetensors file ({problem}).") from None


def _first_line(problem: Exception) -> str:
    return (str(problem).strip() or type(problem).__name__).split("\n")[0].rstrip(".")


def _fill(slices: nn.Module, weights: dict[str, Tensor], config: PerceptualConfig) -> None:
    """`lpips` cuts torchvision's `features` into slices, whose members keep their numbers: slice2.3 is features.3."""
    wanted = {name: re.sub(r"^slice\d+", "features", name) for name in slices.state_dict()}
    unfit = [
        stock
        for name, stock in wanted.items()
        if stock not in weights or weights[stock].shape != slices.state_dict()[name].shape
    ]
    if unfit:
        raise ValueError(
            f"loss.lpips.weights holds no {NAMES[config.network]} of torchvision: {unfit[0]} and "
            f"{len(unfit) - 1} more are missing or of another shape; set loss.lpips.network to what it holds."
        )
    slices.load_state_dict({name: weights[stock] for name, stock in wanted.items()})
