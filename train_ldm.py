"""Stage 2: train a U-Net that diffuses in the latents of an autoencoder, told by captions, classes or nothing.

    python train_ldm.py --config configs/scenes/ldm.yaml [--autoencoder DIR_OR_HUB] [--data.path FOLDER] [...]

Run the same command again to go on with a run that was stopped. OUT/model is the newest model, averaged weights,
as a stock diffusers folder.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autoencoder.kl import AutoencoderKL
from autoencoder.store import weight_hash
from ldm.cache import LatentCache, build
from ldm.conditioning import ClassLabels, ConditioningConfig, Text, make_conditioner
from ldm.config import UserError, command, load
from ldm.data import DataConfig, Source, open_source, order
from ldm.denoiser import Denoiser
from ldm.ema import EMA
from ldm.faults import explain
from ldm.optim import OptimizerConfig, make_optimizer
from ldm.paths import Flow, PathConfig, make_path
from ldm.prediction import PredictionName, Weight, make_prediction
from ldm.training import Run, RunConfig
from ldm.unet import UNet
from ldm.unet_config import UNetConfig
from pipelines import LatentDiffusion
from pipelines.schedulers import scheduler_config
from pipelines.sheets import contact_sheet


@dataclass(frozen=True, kw_only=True)
class ShowConfig:
    """Pictures drawn from fixed prompts and fixed noise while training."""

    prompts: tuple[str, ...] = ()
    """Captions or class names; by default the first distinct ones of the data"""
    count: int = 16
    """Pictures, if no prompts are given"""
    every: int = 1000
    """Optimizer steps between"""
    steps: int = 20
    """Sampling steps"""
    guidance: float = 4.0
    """Scale of classifier-free guidance"""

    def __post_init__(self) -> None:
        if self.every < 1 or self.count < 1:
            raise ValueError(
                f"show.every is {self.every} and show.count {self.count}, but both must be at least 1"
            )


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Stage 2 of a latent diffusion model: the U-Net."""

    run: RunConfig
    autoencoder: str
    """A stage 1 run, a stock AutoencoderKL folder, or the name of one on the hub"""
    data: DataConfig = field(default_factory=DataConfig)
    conditioning: ConditioningConfig = field(default_factory=ConditioningConfig)
    network: UNetConfig = field(default_factory=UNetConfig)
    path: PathConfig = field(default_factory=PathConfig)
    prediction: PredictionName = "flow"
    """What the network puts out"""
    weight: Weight = field(default_factory=Weight)
    sampler: str = "dpmpp_2m"
    """The sampler that the saved model names"""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    ema_decay: float = 0.999
    """Of the averaged weights, which are the ones drawn with and kept"""
    show: ShowConfig = field(default_factory=ShowConfig)


@command("train_ldm.py", explain)
def main(argv: Sequence[str]) -> None:
    recipe = load(Recipe, argv, prog="train_ldm.py")
    run = Run(recipe.run, recipe)
    if run.finished():
        return
    source = open_source(recipe.data)
    run.say(source.describe())
    autoencoder = run.place(open_autoencoder(recipe.autoencoder))
    conditioner = run.place(make_conditioner(recipe.conditioning, source.texts, source.classes))
    report_cut_captions(run, conditioner, source)
    latents = build(run.out / "cache", source, recipe.data, autoencoder, conditioner, run)

    unet = run.place(UNet(fit_network(recipe.network, autoencoder, latents, conditioner)))
    trained = {"unet": unet} | ({"conditioner": conditioner} if learns(conditioner) else {})
    ema = EMA(recipe.ema_decay, **trained)
    model = averaged_model(recipe, autoencoder, ema, conditioner)
    prompts = prompts_to_show(model, recipe.show, source)
    optimizer = make_optimizer(recipe.optimizer, trained.values())
    network, told, optimizer = prepare(run, unet, conditioner, optimizer)
    denoiser = Denoiser(network, model.path, model.prediction, recipe.weight)
    contract = Contract(autoencoder, conditioner)
    run.resume(model, publish=True, contract=contract, **trained, ema=ema, optimizer=optimizer)
    run.say(f"U-Net: {count(unet):,} weights, conditioner: {count(conditioner):,}; latents {latents.shape}")

    for batch in run.batches(latents, order(source, recipe.data.balance)):
        with run.accelerator.accumulate(network, told):
            z = scaled_latents(batch, run.normal("posterior", batch, latents.shape), autoencoder)
            batch["drop"] = (run.uniform("drop", batch) < recipe.conditioning.dropout).to(run.device)
            t = model.path.times(run.uniform("time", batch)).float().to(run.device)
            loss = denoiser.loss(z, told(batch), t=t, noise=run.normal("noise", batch, latents.shape))
            run.update(loss.mean(), optimizer, recipe.optimizer)
            run.note(dropped=batch["drop"].float().mean())
        if run.accelerator.sync_gradients:
            ema.update(run.step, **trained)
        if run.due(recipe.show.every):
            ema.gather()
            show(run, model, recipe.show, prompts)
        if run.due(recipe.run.log_every):
            run.log()
        if run.due(recipe.run.save_every):
            run.save()
    run.say(f"the model is in {run.out}/model")
    run.end()


def averaged_model(
    recipe: Recipe, autoencoder: AutoencoderKL, ema: EMA, conditioner: nn.Module
) -> LatentDiffusion:
    """What is drawn with and saved; ValueError now, not at the first save, if stock tools could not draw with it."""
    path = make_path(recipe.path)
    if isinstance(path, Flow):
        side = recipe.data.size // autoencoder.config.factor
        path = path.at(side * side)
    prediction = make_prediction(recipe.prediction, path)
    scheduler_config(path, prediction.name, recipe.sampler)  # type: ignore[arg-type]
    return LatentDiffusion(
        autoencoder=autoencoder,
        unet=ema["unet"],
        conditioner=ema["conditioner"] if learns(conditioner) else conditioner,
        path=path,
        prediction=prediction,
        sampler=recipe.sampler,
    )


def scaled_latents(batch: dict[str, Tensor], noise: Tensor, autoencoder: AutoencoderKL) -> Tensor:
    """Samples of the cached posteriors, scaled as the autoencoder's config says: not at all if it is one of ours."""
    config = autoencoder.config
    z = batch["mean"] + batch["std"] * noise
    return (z - (config.shift_factor or 0.0)) * config.scaling_factor


class Contract:
    """What a run may not change under way: with other latents, words or classes, its weights mean something else."""

    def __init__(self, autoencoder: AutoencoderKL, conditioner: nn.Module) -> None:
        words = ""
        if isinstance(conditioner, Text):
            words = conditioner.vocabulary_hash()
        elif isinstance(conditioner, ClassLabels):
            words = repr(conditioner.classes)
        self.terms = {
            "autoencoder": weight_hash(autoencoder.state_dict()),
            "vocabulary or set of classes": hashlib.sha256(words.encode()).hexdigest(),
        }

    def state_dict(self) -> dict[str, Any]:
        return self.terms

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for term, begun_with in state.items():
            if begun_with != self.terms[term]:
                raise UserError(
                    f"This run was begun with another {term} (sha256 {begun_with[:12]}, now "
                    f"{self.terms[term][:12]}); bring that one back, or choose another run.out."
                )


def open_autoencoder(name: str) -> AutoencoderKL:
    """A stage 1 run, a stock folder (also of a whole pipeline), or a hub name."""
    folder = Path(name).expanduser()
    inner = next(
        (folder / part for part in ("model", "vae") if (folder / part / "config.json").is_file()), None
    )
    if inner is None and folder.is_dir() and not (folder / "config.json").is_file():
        raise UserError(
            f"{name} holds no finished autoencoder; train one with train_vae.py --run.out {name}, or set autoencoder."
        )
    autoencoder = AutoencoderKL.from_pretrained(inner or name).requires_grad_(False)
    if autoencoder.config.latents_mean or autoencoder.config.latents_std:
        raise UserError(f"{name} has latents_mean and latents_std, which stock pipelines of a U-Net ignore.")
    return autoencoder


def fit_network(
    config: UNetConfig, autoencoder: AutoencoderKL, latents: LatentCache, conditioner: nn.Module
) -> UNetConfig:
    """The U-Net's config with what the latents and the condition decide; UserError where the recipe says otherwise."""
    channels, height, width = latents.shape
    decided: dict[str, Any] = {
        "in_channels": channels,
        "out_channels": channels,
        "sample_size": height if height == width else (height, width),
        "cross_attention_dim": None,
        "num_class_embeds": None,
    }
    if isinstance(conditioner, Text):
        decided["cross_attention_dim"] = conditioner.null(1).tokens.shape[-1]  # type: ignore[union-attr]
    elif isinstance(conditioner, ClassLabels):
        decided["num_class_embeds"] = len(conditioner.classes) + 1
    if config.promptless and decided["cross_attention_dim"] is None:
        config = replace(config, cross_attention_dim=UNetConfig.cross_attention_dim)
    for key in fields(config):
        said = getattr(config, key.name)
        if (
            key.name in decided
            and said not in (key.default, decided[key.name])
            and key.default is not MISSING
        ):
            raise UserError(
                f"network.{key.name} is {said}, but the autoencoder and the condition make it {decided[key.name]}; "
                "leave it out."
            )
    return replace(config, **decided)


def prepare(
    run: Run, unet: UNet, conditioner: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[Any, Any, Any]:
    """U-Net, conditioner and optimizer for this process; a conditioner without trained weights stays as it is."""
    if learns(conditioner):
        return run.prepare(unet, conditioner, optimizer)
    network, optimizer = run.prepare(unet, optimizer)
    return network, conditioner, optimizer


def learns(module: nn.Module) -> bool:
    """Whether it has weights to train."""
    return any(p.requires_grad for p in module.parameters())


def report_cut_captions(run: Run, conditioner: nn.Module, source: Source) -> None:
    if isinstance(conditioner, Text):
        cut = conditioner.cut(source.texts or [])
        if cut:
            longest = conditioner.tokenizer.model_max_length
            run.say(
                f"{cut} of {len(source)} captions are longer than {longest} tokens and are cut; see text.max_length"
            )


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def prompts_to_show(model: LatentDiffusion, config: ShowConfig, source: Source) -> list[str] | None:
    """The fixed prompts, or the first distinct ones of the data; ValueError if the model can't read one."""
    if not isinstance(model.conditioner, ClassLabels | Text):
        return None
    names = source.classes if isinstance(model.conditioner, ClassLabels) else source.texts or ()
    prompts = list(config.prompts) or list(dict.fromkeys(names))[: config.count]
    model.read(prompts, 1)
    return prompts


def show(run: Run, model: LatentDiffusion, config: ShowConfig, prompts: list[str] | None) -> None:
    """Draw the fixed prompts with the averaged weights."""
    if run.main:
        n = 1 if prompts else config.count
        images = model(prompts, n=n, steps=config.steps, guidance=config.guidance)
        run.picture(contact_sheet(images, prompts), "drawn")


if __name__ == "__main__":
    main()
