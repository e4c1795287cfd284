"""Stage 2 that goes on from a trained model: its U-Net, with more channels if a task needs them, and its words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F

from autoencoder.kl import AutoencoderKL
from autoencoder.store import weight_hash
from ldm.conditioning import Words, labels_of, text_of
from ldm.config import UserError
from ldm.tasks import Task
from ldm.unet import UNet
from ldm.unet_config import UNetConfig
from pipelines.latent_diffusion import LatentDiffusion


def starting_model(name: str, autoencoder: AutoencoderKL, task: Task | None) -> LatentDiffusion:
    """The model that training goes on from: a run folder, a stock folder, or a hub name.

    Raises:
        UserError: it draws in other latents, or was trained for another task.
    """
    model = LatentDiffusion.from_pretrained(name)
    if weight_hash(model.autoencoder.state_dict()) != weight_hash(autoencoder.state_dict()):
        raise UserError(f"start is {name}, which draws in the latents of another autoencoder; set its own.")
    factor, latent = autoencoder.config.factor, autoencoder.config.latent_channels
    if model.task is not None and (
        type(model.task) is not type(task)
        or model.task.channels(factor, latent) != task.channels(factor, latent)
    ):
        raise UserError(
            f"start is {name}, which was trained to {model.task.kind} pictures; choose a model that draws, or one that "
            "is given the same."
        )
    return model


def require_words(model: LatentDiffusion, told: Words, classes: Sequence[str]) -> None:
    """UserError unless a model to go on from is told what the recipe says, of the same classes."""
    labels = labels_of(model.conditioner)
    parts = {"class": labels, "text": text_of(model.conditioner)}
    its_own = "+".join(kind for kind, part in parts.items() if part) or "none"
    if its_own != told:
        raise UserError(f"start is told {its_own}; set conditioning.kind to that, instead of {told}.")
    if labels and labels.classes != tuple(classes):
        raise UserError("start was trained on other classes than those of the data; choose another, or none.")


def require_noise(model: LatentDiffusion, kind: str, prediction: str) -> None:
    """UserError unless a model to go on from says the same of the same noise path as the recipe."""
    its_own = model.path.kind, model.prediction.name
    if its_own != (kind, prediction):
        raise UserError(
            "start has path.kind {} and prediction {}; set these, instead of {} and {}.".format(
                *its_own, kind, prediction
            )
        )


def shape_of(model: LatentDiffusion) -> UNetConfig:
    """The shape of the U-Net to be trained, but for what the data and the task decide."""
    usual = UNetConfig()
    return replace(model.unet.config, in_channels=usual.in_channels, sample_size=usual.sample_size)


@torch.no_grad()
def take_over(unet: UNet, begun: UNet) -> None:
    """Give a U-Net the weights of another, which may read fewer channels: the first ones; the others begin at 0."""
    weights = begun.state_dict()
    more = unet.config.in_channels - begun.config.in_channels
    weights["conv_in.weight"] = F.pad(weights["conv_in.weight"], (0, 0, 0, 0, 0, more))
    unet.load_state_dict(weights)
