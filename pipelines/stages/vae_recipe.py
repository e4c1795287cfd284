"""The recipe of stage 1: every setting that `train_vae.py` takes."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from autoencoder.equivariance import EquivarianceConfig
from autoencoder.kl import AutoencoderKL
from autoencoder.losses import LossConfig
from autoencoder.perceptual import SMALLEST
from autoencoder.presets import ShapeConfig
from autoencoder.vq import VQModel
from ldm.buckets import sizes_for
from ldm.data import DataConfig
from ldm.optim import OptimizerConfig
from ldm.run_config import RunConfig


@dataclass(frozen=True, kw_only=True)
class ShowConfig:
    """Held-out pictures to look at and measure on while training."""

    split: str | None = None
    """By default the first of test and validation that the data has, else the training split"""
    count: int = 64
    """Pictures measured; 32 of them are shown"""
    every: int = 500
    """Optimizer steps between"""

    def __post_init__(self) -> None:
        if self.every < 1 or self.count < 1:
            raise ValueError(
                f"show.every is {self.every} and show.count {self.count}, but both must be at least 1"
            )


@dataclass(frozen=True, kw_only=True)
class ReadinessConfig:
    """The report at the end on how ready the latents are for stage 2, OUT/readiness.html; of kind vq there is none."""

    pictures: int = 512
    """Training pictures that it looks at; 0: no report"""
    probe_steps: int = 200
    """Training steps of a small denoiser that tries to learn the latents; 0: none"""

    def __post_init__(self) -> None:
        if self.pictures and self.pictures < 2:
            raise ValueError(f"readiness.pictures is {self.pictures}, but must be 0 or at least 2")
        if self.probe_steps < 0:
            raise ValueError(f"readiness.probe_steps is {self.probe_steps}, but must be at least 0")
        if not self.pictures and self.probe_steps not in (0, ReadinessConfig.probe_steps):
            raise ValueError(
                "readiness.probe_steps is set, but readiness.pictures is 0, which leaves the report out: "
                "set it, or remove probe_steps"
            )


NETWORKS: dict[str, Any] = {"kl": AutoencoderKL, "vq": VQModel}
GAN_OPTIMIZER = OptimizerConfig(name="adamw", lr=3e-4, betas=(0.5, 0.99), weight_decay=0.0)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Stage 1 of a latent diffusion model: an autoencoder."""

    run: RunConfig
    data: DataConfig = field(default_factory=DataConfig)
    kind: Literal["kl", "vq"] = "kl"
    """kl: latents are numbers, AutoencoderKL. vq: latents are words of a codebook, VQModel;
    stage 2 here takes kl alone"""
    start: str | None = None
    """Go on from a stock autoencoder of this kind, a folder or a hub name, instead of from random weights"""
    network: ShapeConfig = field(default_factory=ShapeConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    gan_optimizer: OptimizerConfig = field(default_factory=lambda: GAN_OPTIMIZER)
    """Of the discriminator"""
    equivariance: EquivarianceConfig = field(default_factory=EquivarianceConfig)
    ema_decay: float = 0.999
    """Of the averaged weights, which are the ones kept"""
    show: ShowConfig = field(default_factory=ShowConfig)
    readiness: ReadinessConfig = field(default_factory=ReadinessConfig)
    workers: int = 1
    """Processes that read or draw pictures beside each training process; 0: the training process does"""

    def __post_init__(self) -> None:
        self.loss.check_kind(self.kind)
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay is {self.ema_decay}, but must lie in [0, 1)")
        if self.run.shard:
            raise ValueError(
                "run.shard is true, but an autoencoder's memory goes into its activations, not its weights: "
                "leave it out, and raise run.accumulate if memory is short"
            )
        if self.start is None:  # else `main` looks what shape it has
            object.__setattr__(self, "network", self.network.filled(self.kind, self.data.size))
        if self.network.factor and self.data.bucket_step % self.network.factor:
            raise ValueError(
                f"data.bucket_step is {self.data.bucket_step}, which the autoencoder's factor {self.network.factor} "
                "does not divide"
            )
        gan, lpips = self.loss.gan, self.loss.lpips
        if not gan.weight and self.gan_optimizer != GAN_OPTIMIZER:
            raise ValueError(
                "gan_optimizer is set, but loss.gan.weight is 0: set it, or remove gan_optimizer"
            )
        if gan.weight and gan.start >= self.run.steps:
            raise ValueError(f"loss.gan.start is {gan.start}, but the run ends after {self.run.steps} steps")
        if self.kind == "vq" and self.equivariance != EquivarianceConfig():
            raise ValueError("equivariance is set, but kind is vq: set kind to kl, or remove it")
        if self.kind == "vq" and self.readiness.pictures and self.readiness != ReadinessConfig():
            raise ValueError(
                "readiness is set, but kind is vq, of which there is no report: remove it, or set readiness.pictures "
                "to 0"
            )
        if self.workers < 0:
            raise ValueError(f"workers is {self.workers}, but must be at least 0")
        step = self.data.bucket_step
        sides = sizes_for(self.data.size, step) if step else [(self.data.size, self.data.size)]
        least = min(map(min, sides)) * (self.equivariance.smallest if self.equivariance.probability else 1)
        if gan.weight and least < 3 * 2**gan.layers:
            raise ValueError(
                f"loss.gan.layers is {gan.layers}, for which pictures must have {3 * 2**gan.layers} pixels a side, "
                f"but data.size, data.bucket_step and equivariance.smallest leave {least:g}"
            )
        if gan.r1 and self.run.compile != "no":
            raise ValueError(
                "loss.gan.r1 needs second gradients, which run.compile can't give: remove one of the two"
            )
        if lpips.weight and least < SMALLEST[lpips.network]:
            raise ValueError(
                f"loss.lpips.network {lpips.network} needs pictures of {SMALLEST[lpips.network]} pixels a side, "
                f"but data.size, data.bucket_step and equivariance.smallest leave {least:g}"
            )


def hurried(recipe: Recipe) -> Recipe:
    """What a dry run trains: with all that begins later beginning at once, and a short report."""
    loss, readiness = recipe.loss, recipe.readiness
    if loss.gan.weight:
        loss = replace(loss, gan=replace(loss.gan, start=0, head_start=0, ramp=1))
    if loss.codebook.revive_every:
        loss = replace(loss, codebook=replace(loss.codebook, revive_every=1)) if recipe.kind == "vq" else loss
    if readiness.pictures:
        readiness = replace(readiness, pictures=16, probe_steps=min(2, readiness.probe_steps))
    return replace(recipe, loss=loss, readiness=readiness)
