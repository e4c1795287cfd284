"""Stage 2: train a U-Net that diffuses in the latents of an autoencoder, told by captions, classes or nothing.

    python train_ldm.py --config configs/scenes/ldm.yaml [--autoencoder DIR_OR_HUB] [--data.path FOLDER] [...]
        [--dry-run]

Run the same command again to go on with a run that was stopped. OUT/model is the newest model, averaged weights,
as a stock diffusers folder.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from autoencoder.kl import AutoencoderKL
from autoencoder.store import weight_hash
from ldm.cache import LatentCache, build
from ldm.conditioning import Conditioner, ConditioningConfig, labels_of, make_conditioner, text_of
from ldm.config import DRY_RUN, UserError, command, load, without
from ldm.contract import Contract
from ldm.data import DataConfig, Source, open_source
from ldm.denoiser import Denoiser
from ldm.dry_run import rehearse
from ldm.ema import EMA
from ldm.estimate import undertake
from ldm.faults import explain
from ldm.inspection import inspected
from ldm.masks import Masks, with_classes
from ldm.optim import OptimizerConfig, as_judged, make_optimizer
from ldm.paths import Flow, PathConfig, Spacing, make_path, stratify
from ldm.prediction import PredictionName, Weight, make_prediction
from ldm.profiles import Profiles
from ldm.sampling import Pixels, epochs
from ldm.tasks import Inpaint, Pairs, Restore, Segment, Task, TaskName, Upscale, task_of, words_of
from ldm.training import Run, RunConfig
from ldm.unet import UNet
from ldm.unet_config import UNetConfig
from ldm.validation import ValidationConfig, hold_out
from pipelines import LatentDiffusion
from pipelines.schedulers import scheduler_config
from pipelines.stages.looking import Look
from pipelines.stages.showing import ShowConfig, things_to_show
from pipelines.stages.stage_one import open_autoencoder
from pipelines.stages.starting import require_noise, require_words, shape_of, starting_model, take_over


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Stage 2 of a latent diffusion model: the U-Net."""

    run: RunConfig
    autoencoder: str
    """A stage 1 run, a stock AutoencoderKL folder, or the name of one on the hub"""
    start: str | None = None
    """Go on from a model in the same latents, a run, a stock folder or a hub name, instead of from random weights:
    network and conditioning.text are its own, its text encoder learns no further, and channels that a task adds begin
    at 0"""
    task: TaskName | None = None
    """text, class, unconditional: draw, told that. inpaint, upscale, restore, segment: make that of a picture. By
    default what conditioning.kind says"""
    data: DataConfig = field(default_factory=DataConfig)
    conditioning: ConditioningConfig = field(default_factory=ConditioningConfig)
    inpaint: Inpaint = field(default_factory=Inpaint)
    upscale: Upscale = field(default_factory=Upscale)
    restore: Restore = field(default_factory=Restore)
    segment: Segment = field(default_factory=Segment)
    network: UNetConfig = field(default_factory=UNetConfig)
    path: PathConfig = field(default_factory=PathConfig)
    prediction: PredictionName = "flow"
    """What the network puts out"""
    weight: Weight = field(default_factory=Weight)
    stratified: bool = False
    """Spread the noise levels of a batch evenly over their distribution: the loss varies less from step to step"""
    sampler: str = "dpmpp_2m"
    """The sampler that the saved model names"""
    spacing: Spacing | None = None
    """Of its steps: trailing, leading, linspace, karras, exponential; by default the one usual for sampler and path"""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    ema_decay: float = 0.999
    """Of the averaged weights, which are the ones drawn with and kept"""
    ema_every: int = 0
    """Optimizer steps between snapshots in OUT/ema, of which `ldm ema` makes averages of any length; 0: none"""
    show: ShowConfig = field(default_factory=ShowConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    workers: int = 1
    """Processes that read pictures beside training, for tasks that begin with one; 0: the training itself"""

    def __post_init__(self) -> None:
        kind = words_of(self.task, self.conditioning.kind)
        object.__setattr__(self, "conditioning", replace(self.conditioning, kind=kind))
        self.begins_with()
        for name, value in (("network", self.network), ("conditioning.text", self.conditioning.text)):
            if self.start and value != type(value)():
                raise ValueError(f"{name} is set, but start brings its own: remove one of the two")
        if self.data.crop == "random":
            raise ValueError("data.crop is random, but latents are made once, of one crop; leave it out")
        if self.run.shard and self.optimizer.name == "adamw8bit":
            raise ValueError(
                "optimizer.name adamw8bit can't take weights in parts: set run.shard to false, or another"
            )
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay is {self.ema_decay}, but must lie in [0, 1)")
        if self.ema_every < 0:
            raise ValueError(f"ema_every is {self.ema_every}, but must be at least 0")
        if self.ema_every and self.run.shard:
            raise ValueError(
                "ema_every keeps whole weights, which run.shard takes apart: remove one of the two"
            )

    def begins_with(self) -> Task | None:
        """The task with its settings, if it begins with a picture; ValueError where settings are another's."""
        return task_of(self.task, (self.inpaint, self.upscale, self.restore, self.segment))


@command("train_ldm.py", explain)
def main(argv: Sequence[str]) -> None:
    argv, dry = without(DRY_RUN, argv)
    recipe = load(Recipe, argv, prog="train_ldm.py")
    if dry:
        rehearse(recipe, train)
    else:
        undertake(recipe, train, rehearsed=train)


def train(recipe: Recipe, run: Run) -> None:
    """From the data to OUT/model, from wherever `run` stands."""
    if run.finished():
        return
    source = sound_source(recipe.data, run)
    autoencoder = run.place(open_autoencoder(recipe.autoencoder))
    task, wanted = task_and_wanted(recipe, source)
    begun = begun_with(recipe, run, source, autoencoder, task)
    conditioner = conditioner_for(recipe.conditioning, run, source, begun)
    contract = contract_of(wanted, autoencoder, conditioner)
    contract.keep(run)
    latents = build(run.out / "cache", run.part_of(wanted), recipe.data, autoencoder, conditioner, run)
    learned = Pairs(latents, Pixels(source, recipe.data, recipe.run.seed), task) if task else latents

    run.seed("unet")
    unet = run.place(new_unet(recipe.network, begun, autoencoder, latents, conditioner, task))
    del begun  # its networks, but for what reads, are no longer needed
    trained = {"unet": unet} | ({"conditioner": conditioner} if learns(conditioner) else {})
    ema = EMA(recipe.ema_decay, **trained)
    profiles = Profiles(**trained) if recipe.ema_every else None
    model = averaged_model(recipe, autoencoder, ema, conditioner, task)
    shown = things_to_show(model, recipe.show, source, wanted)
    held_out = hold_out(recipe.validation, recipe.data, source, model, run)
    optimizer = make_optimizer(recipe.optimizer, trained.values())
    network, told, optimizer = prepare(run, unet, conditioner, optimizer)
    denoiser = Denoiser(network, model.path, model.prediction, recipe.weight)
    look = Look(recipe.show, recipe.validation, model, shown, held_out, denoiser, ema, trained)
    averages = {"ema": ema} | ({"profiles": profiles} if profiles else {})
    run.resume(model, publish=True, contract=contract, **trained, **averages, optimizer=optimizer)
    run.say(f"U-Net: {count(unet):,} weights, conditioner: {count(conditioner):,}; latents {latents.shape}")

    if run.fresh:  # what would fail at hour nine fails now
        look(run)
        run.save()

    order = epochs(source, recipe.data, recipe.run.batch_size)
    for batch in run.batches(learned, order, recipe.workers if task else 0):
        with run.accelerator.accumulate(network, told):
            shape = batch["mean"].shape[1:]
            z = scaled_latents(batch, run.normal("posterior", batch, shape), autoencoder)
            batch["drop"] = (run.uniform("drop", batch) < recipe.conditioning.dropout).to(run.device)
            t = model.path.times(levels(run, batch, recipe.stratified)).float().to(run.device)
            cond = told(batch).sized(*(side * autoencoder.config.factor for side in shape[1:]))
            cond = cond._replace(image=given(run, model, batch, shape))
            loss = denoiser.loss(z, cond, t=t, noise=run.normal("noise", batch, shape))
            run.update(loss.mean(), optimizer, recipe.optimizer)
            run.note(dropped=batch["drop"].float().mean())
        if run.accelerator.sync_gradients:
            with as_judged(optimizer):
                for average in averages.values():
                    average.update(run.step, **trained)
        if profiles and run.due(recipe.ema_every) and run.main:
            profiles.save(run.out / "ema", run.step)
        look(run)
        if run.due(recipe.run.log_every):
            run.log()
        if run.due(recipe.run.save_every):
            run.save()
    run.tell(f"the model is in {run.out}/model")
    run.end()


def begun_with(
    recipe: Recipe, run: Run, source: Source, autoencoder: AutoencoderKL, task: Task | None
) -> LatentDiffusion | None:
    """The model that the recipe goes on from, if there is one; UserError if it does not fit what is to be trained."""
    if recipe.start is None:
        return None
    model = starting_model(recipe.start, autoencoder, task)
    require_words(model, recipe.conditioning.told, source.classes)
    require_noise(model, recipe.path.kind, recipe.prediction)
    run.say(f"going on from {recipe.start}")
    return model


def averaged_model(
    recipe: Recipe, autoencoder: AutoencoderKL, ema: EMA, conditioner: nn.Module, task: Task | None
) -> LatentDiffusion:
    """What is drawn with and saved; ValueError now, not at the first save, if stock tools could not draw with it."""
    path = make_path(recipe.path)
    if isinstance(path, Flow):
        side = recipe.data.size // autoencoder.config.factor
        path = path.at(side * side)
    prediction = make_prediction(recipe.prediction, path)
    scheduler_config(path, prediction.name, recipe.sampler, recipe.spacing)  # type: ignore[arg-type]
    return LatentDiffusion(
        autoencoder=autoencoder,
        unet=ema["unet"],
        conditioner=ema["conditioner"] if learns(conditioner) else conditioner,  # type: ignore[arg-type]
        path=path,
        prediction=prediction,
        sampler=recipe.sampler,
        spacing=recipe.spacing,
        task=task,
    )


def sound_source(config: DataConfig, run: Run) -> Source:
    """The data, without the bad pictures in it; says what was found."""
    source = open_source(config)
    run.say(source.describe())
    return inspected(source, run)


def task_and_wanted(recipe: Recipe, source: Source) -> tuple[Task | None, Any]:
    """The task, if it begins with a picture, and the pictures that are to be made; UserError if it can't be."""
    task = recipe.begins_with()
    if isinstance(task, Upscale) and (recipe.data.bucket_step or recipe.data.size) % task.factor:
        raise UserError(
            f"upscale.factor {task.factor} does not divide data.size {recipe.data.size}, or data.bucket_step; "
            "choose another."
        )
    if isinstance(task, Segment):
        task = with_classes(task, source)
        return task, Masks(source, task)
    return task, source


def given(run: Run, model: LatentDiffusion, batch: dict[str, Tensor], shape: Sequence[int]) -> Tensor | None:
    """What the task of the model is given of the pictures of a batch, for latents of `shape`; None without one."""
    if model.task is None:
        return None
    return model.image(batch, lambda: run.normal("given", batch, shape))


def scaled_latents(batch: dict[str, Tensor], noise: Tensor, autoencoder: AutoencoderKL) -> Tensor:
    """Samples of the cached posteriors, scaled as the autoencoder's config says: not at all if it is one of ours."""
    config = autoencoder.config
    z = batch["mean"] + batch["std"] * noise
    return (z - (config.shift_factor or 0.0)) * config.scaling_factor


def levels(run: Run, batch: dict[str, Tensor], stratified: bool) -> Tensor:
    """[B] Uniform in (0, 1), what noise levels are drawn from; stratified over the global batch, or independent."""
    u = run.uniform("time", batch)
    return stratify(u, batch["position"], run.config.batch_size) if stratified else u


def contract_of(source: Source, autoencoder: AutoencoderKL, conditioner: nn.Module) -> Contract:
    """What this run may not change under way; a frozen text encoder is read from elsewhere at each start."""
    text, labels = text_of(conditioner), labels_of(conditioner)
    words = (text.vocabulary_hash() if text else "") + (repr(labels.classes) if labels else "")
    terms = {
        "autoencoder": weight_hash(autoencoder.state_dict()),
        "vocabulary or set of classes": hashlib.sha256(words.encode()).hexdigest(),
        "set of pictures": source.fingerprint,
    }
    encoder = {"text encoder": weight_hash(text.state_dict())} if text and text.frozen else {}
    return Contract(terms | encoder)


def new_unet(
    config: UNetConfig,
    begun: LatentDiffusion | None,
    autoencoder: AutoencoderKL,
    latents: LatentCache,
    conditioner: nn.Module,
    task: Task | None,
) -> UNet:
    """A U-Net with random weights, or with the shape and weights of the model to go on from; see `fit_network`."""
    config = shape_of(begun) if begun else config
    unet = UNet(fit_network(config, autoencoder, latents, conditioner, task))
    if begun:
        take_over(unet, begun.unet)
    return unet


def fit_network(
    config: UNetConfig,
    autoencoder: AutoencoderKL,
    latents: LatentCache,
    conditioner: nn.Module,
    task: Task | None = None,
) -> UNetConfig:
    """The U-Net's config with what the latents and the condition decide; UserError where the recipe says otherwise."""
    channels, height, width = latents.shape
    decided: dict[str, Any] = {
        "in_channels": channels + (task.channels(autoencoder.config.factor, channels) if task else 0),
        "out_channels": channels,
        "sample_size": height if height == width else (height, width),
        "cross_attention_dim": None,
        "num_class_embeds": None,
        "addition_embed_type": None,
        "addition_time_embed_dim": None,
        "projection_class_embeddings_input_dim": None,
    }
    cond, labels = conditioner.null(1), labels_of(conditioner)  # type: ignore[operator]
    if cond.tokens is not None:
        decided["cross_attention_dim"] = cond.tokens.shape[-1]
    if labels:
        decided["num_class_embeds"] = len(labels.classes) + 1
    if cond.pooled is not None:
        each = config.addition_time_embed_dim or 256  # as SDXL
        decided |= {"addition_embed_type": "text_time", "addition_time_embed_dim": each}
        decided["projection_class_embeddings_input_dim"] = cond.pooled.shape[-1] + 6 * each
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


def conditioner_for(
    config: ConditioningConfig, run: Run, source: Source, begun: LatentDiffusion | None
) -> Conditioner:
    """What reads the words of the data, with its first weights, or that of the model to go on from.

    Says how many captions are too long for it.
    """
    run.seed("conditioner")
    fresh = begun.conditioner if begun else make_conditioner(config, source.texts, source.classes)
    conditioner = run.place(fresh)
    text = text_of(conditioner)
    cut = text.cut(source.texts or []) if text else 0
    if text and cut:
        run.say(
            f"{cut} of {len(source)} captions are longer than {text.max_length} tokens and are cut; "
            "see conditioning.text.max_length"
        )
    return conditioner


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


if __name__ == "__main__":
    main()
