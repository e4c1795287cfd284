"""What `ldm evaluate` is given: a latent diffusion model or an autoencoder, and which of its weights."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from autoencoder.kl import AutoencoderKL
from autoencoder.store import weight_hash
from autoencoder.untrusted import read_json
from autoencoder.vq import VQModel
from ldm.checkpoint import damage, restore
from ldm.config import UserError
from pipelines.diffusers_format import INDEX
from pipelines.evaluation.extractors import first_line
from pipelines.latent_diffusion import LatentDiffusion

Weights = Literal["averaged", "raw"]
"""Which weights of a run: the moving average, as its model/ has them, or those of the last optimizer step"""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What is evaluated."""

    model: LatentDiffusion | AutoencoderKL | VQModel
    weights: str
    """averaged, raw, or as saved for what is no run of ours"""
    run: Path | None
    """The run folder, if it is one"""
    about: dict[str, Any]
    """Name, kind, hashes of the weights, and training step if known"""


def open_subject(name: str, weights: Weights, device: torch.device) -> Subject:
    """A run of either stage, a stock folder of a pipeline or an autoencoder, or the name of one on the hub.

    Raises:
        UserError: it is none of these, or its raw weights are asked for and not there.
    """
    folder = Path(name).expanduser()
    run = folder if (folder / "config.yaml").is_file() and (folder / "model").is_dir() else None
    if weights == "raw" and run is None:
        raise UserError(
            f"{name} is no run folder, so that there are no weights but those saved in it; leave out --raw."
        )
    kind = kind_of(name)
    raw = last_sound(run) if weights == "raw" and run else None
    step = int(raw.name.removeprefix("step-")) if raw else last_step(run) if run else None
    about = {"name": folder.resolve().name if folder.exists() else name, "kind": kind, "step": step}
    said = weights if run else "as saved"
    if kind != "latent diffusion":
        coder = (VQModel if kind == "VQModel" else AutoencoderKL).from_pretrained(inner(folder) or name)
        if raw:
            restore(raw, {"autoencoder": coder})
        coder.eval().requires_grad_(False).to(device)
        hashes = {"autoencoder_sha256": weight_hash(coder.state_dict())}
        return Subject(model=coder, weights=said, run=run, about=about | hashes)
    model = LatentDiffusion.from_pretrained(name)
    if raw:
        parts = {"unet": model.unet, "conditioner": model.conditioner}
        restore(raw, {part: module for part, module in parts.items() if (raw / f"{part}.json").is_file()})
    named: dict[str, nn.Module] = {"unet": model.unet, "autoencoder": model.autoencoder}
    hashes = {f"{part}_sha256": weight_hash(module.state_dict()) for part, module in named.items()}
    return Subject(model=model.to(device), weights=said, run=run, about=about | hashes)


def kind_of(name: str) -> str:
    """latent diffusion, AutoencoderKL or VQModel."""
    folder = Path(name).expanduser()
    if not folder.exists():
        return "latent diffusion" if _on_hub(name, INDEX) else "AutoencoderKL"
    if any((place / INDEX).is_file() for place in (folder, folder / "model")):
        return "latent diffusion"
    network = inner(folder)
    if network is None:
        raise UserError(
            f"{name} holds neither a latent diffusion model nor an autoencoder; give a run folder that has one."
        )
    kind = read_json(network / "config.json").get("_class_name")
    if kind not in ("AutoencoderKL", "VQModel"):
        raise UserError(
            f"{network} holds a {kind}, which can't be evaluated; give a pipeline or an autoencoder."
        )
    return kind


def inner(folder: Path) -> Path | None:
    """The folder of the autoencoder in a run or stock folder, if there is one."""
    return next((place for place in (folder / "model", folder) if (place / "config.json").is_file()), None)


def _on_hub(name: str, file: str) -> bool:
    """Whether a hub model has a file; UserError if the model can't be had."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        hf_hub_download(name, file)
    except LocalEntryNotFoundError as problem:
        raise UserError(
            f"{name} is neither a folder here nor a model on the hub: {first_line(problem)}"
        ) from None
    except EntryNotFoundError:
        return False
    except (OSError, ValueError) as problem:
        raise UserError(
            f"{name} is neither a folder here nor a model on the hub: {first_line(problem)}"
        ) from None
    return True


def last_sound(run: Path) -> Path:
    """The newest sound checkpoint of a run; nothing is set aside, as the run may be going on."""
    for folder in sorted((run / "checkpoints").glob("step-*"), reverse=True):
        if not damage(folder):
            return folder
    raise UserError(f"{run} has no sound checkpoint, so that its raw weights are not known; leave out --raw.")


def last_step(run: Path) -> int | None:
    """The step of the newest checkpoint, whose average model/ is."""
    steps = [re.fullmatch(r"step-(\d+)", folder.name) for folder in (run / "checkpoints").glob("step-*")]
    return max((int(step[1]) for step in steps if step), default=None)


@torch.no_grad()
def reconstructed(coder: AutoencoderKL | VQModel, pixels: Tensor) -> Tensor:
    """Pixels [B,3,H,W] in [-1, 1] => what comes back, within [-1, 1]; of a Gaussian posterior the mean is decoded."""
    z = coder.encode(pixels)
    return coder.decode(z if isinstance(z, Tensor) else z.mean).clamp(-1, 1)
