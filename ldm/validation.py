"""What held-out pictures tell while training: the loss at each noise level, always on the same noise.

Pictures, levels and noise are the same at every look, in every run and on any number of processes: two figures
differ only because the weights do.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ldm import random
from ldm.checks import require_int
from ldm.conditioning import Cond, labels_of, text_of
from ldm.config import UserError
from ldm.data import DataConfig, SceneSource, Source, shown_source
from ldm.denoiser import Denoiser
from ldm.inspection import inspected
from ldm.masks import Masks
from ldm.paths import Path
from ldm.pictures import to_tensor
from ldm.tasks import Segment, spoiled

SEED = 0
"""Not the run's: runs of different seeds are measured alike"""
BATCH = 16
"""Samples measured together, whatever the number of processes"""


@dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """Held-out pictures that are measured on while training; what is learned does not depend on them."""

    split: str | None = None
    """By default the first of test and validation that the data has, else the training split"""
    count: int = 64
    """Pictures"""
    bins: int = 8
    """Noise levels at which each is measured, evenly spread over those trained on"""
    every: int = 1000
    """Optimizer steps between; 0: never"""
    steps: int = 10
    """Sampling steps of the pictures that are drawn for their captions"""

    def __post_init__(self) -> None:
        for name, least, most in (
            ("count", 2, 2**31),
            ("bins", 1, 100),
            ("every", 0, 2**62),
            ("steps", 1, 2**31),
        ):
            require_int(f"validation.{name}", getattr(self, name), least, most)


@dataclass(frozen=True)
class HeldOut:
    """Pictures of one split as the latent model sees them, on the run's device."""

    split: str
    z: Tensor
    """[N,C,h,w] latents"""
    batch: dict[str, Tensor]
    """What a conditioner reads, [N,...] each"""
    scenes: tuple[str, ...] = ()
    """The captions, if drawn scenes are drawn"""
    image: Tensor | None = None
    """[N,C',h,w] what the model's task is given of the pictures"""


@torch.no_grad()
def hold_out(
    config: ValidationConfig, data: DataConfig, trained: Source, model: Any, run: Any
) -> HeldOut | None:
    """`config.count` pictures evenly spread over the split, in squares; None if they are never looked at.

    Called by all processes of `run`.

    Args:
        trained: what is trained on, which is measured if there is nothing else.
        model: encodes pixels, and has the conditioner (`pipelines.LatentDiffusion`).

    Raises:
        UserError: `config.split` is not there, or lacks the captions or classes that the model is told.
    """
    if not config.every:
        return None
    found, split = shown_source(data, config.split)
    source = trained if split == data.split else inspected(found, run, split)
    usable = told(source, model.conditioner)
    if not usable and config.split:
        raise UserError(
            f"Split {split} has no pictures with the captions or classes that are trained on; set validation.split."
        )
    if not usable:
        source, split = trained, data.split
        usable = told(source, model.conditioner)
    count = min(config.count, len(usable))
    chosen = [usable[i * len(usable) // count] for i in range(count)]
    same = ", which is trained on: the figures can't show what is only remembered"
    run.say(f"validation on {count} pictures of split {split}{same * (split == data.split)}")

    task = model.task
    wanted: Any = Masks(source, task) if isinstance(task, Segment) else source
    encoded, images = [], []
    for rows in torch.arange(count).split(BATCH):
        pixels = torch.stack([to_tensor(wanted.picture(chosen[i], data.size)) for i in rows.tolist()])
        side = data.size // model.autoencoder.config.factor
        shape = (model.autoencoder.config.latent_channels, side, side)
        noise = random.normal(SEED, "validation posterior", rows, shape)
        encoded.append(model.encode(pixels.to(run.device), noise.to(run.device)))
        if task:
            seen = [source.picture(chosen[i], data.size) for i in rows.tolist()]
            given = {k: v.to(run.device) for k, v in spoiled(task, seen, SEED, rows.tolist()).items()}
            images.append(model.image(given, lambda noise=noise: noise.to(run.device)))
    drawn = isinstance(source, SceneSource) and source.texts and task is None
    scenes = [source.texts[i] for i in chosen] if drawn and source.texts else []
    batch = read(source, chosen, model.conditioner)
    on_device = {name: value.to(run.device) for name, value in batch.items()}
    image = torch.cat(images) if images else None
    return HeldOut(split, torch.cat(encoded), on_device, tuple(scenes), image)


def told(source: Source, conditioner: nn.Module) -> list[int]:
    """The pictures of a source that have what the conditioner is told."""
    if text_of(conditioner) and source.texts is None:
        return []
    labels = labels_of(conditioner)
    if labels is None:
        return [*range(len(source))]
    if source.labels is None:
        return []
    known = [name in labels.classes for name in source.classes]
    return [i for i, label in enumerate(source.labels.tolist()) if known[label]]


def read(source: Source, indices: Sequence[int], conditioner: nn.Module) -> dict[str, Tensor]:
    """Captions and classes of some pictures as a batch; classes by name, as splits may number them differently."""
    text, labels = text_of(conditioner), labels_of(conditioner)
    batch: dict[str, Tensor] = {}
    if text and source.texts is not None:
        batch |= text.read([source.texts[i] for i in indices])
    if labels and source.labels is not None:
        batch |= labels.read([source.classes[source.labels[i]] for i in indices])
    return batch


@torch.no_grad()
def losses(
    run: Any, held_out: HeldOut, denoiser: Denoiser, conditioner: nn.Module, factor: int, bins: int
) -> Tensor:
    """[bins] float64: the mean loss at each noise level, from clean to noise. Called by all processes of `run`.

    Picture i of n is measured at the place (i + 1/2) / n of each bin, so that the mean of all is what training on
    these pictures would note. The batches are shared out, each the same on any number of processes.

    Args:
        denoiser: its network is the module itself, not one that Accelerate has wrapped.
        factor: of the autoencoder.
    """
    n, shape = len(held_out.z), held_out.z.shape[1:]
    batches = [(level, rows) for level in range(bins) for rows in torch.arange(n).split(BATCH)]
    rank, ranks = run.accelerator.process_index, run.accelerator.num_processes
    turns = -(-len(batches) // ranks)  # as many on each: weights that are shared out are gathered together
    found = torch.zeros(bins, n, device=run.device)
    with in_eval_mode(denoiser.network, conditioner), run.accelerator.autocast():
        cond = conditioner(held_out.batch).sized(*(side * factor for side in shape[1:]))
        cond = cond._replace(image=held_out.image)
        for turn in range(rank, turns * ranks, ranks):
            level, rows = batches[turn % len(batches)]
            here = rows.to(run.device)
            u = (level + (rows.double() + 0.5) / n) / bins
            t = denoiser.path.times(u).float().to(run.device)
            noise = random.normal(SEED, "validation noise", level * n + rows, shape).to(run.device)
            some = Cond(*(None if part is None else part[here] for part in cond))
            loss = denoiser.loss(held_out.z[here], some, t=t, noise=noise)
            if turn < len(batches):
                found[level, here] = loss.float()
    return run.accelerator.reduce(found, "sum").cpu().double().mean(1)


def named(split: str, weights: str, path: Path, found: Tensor) -> dict[str, float]:
    """Losses [bins] by the names that are logged: {"test_loss_ema": mean, "test_loss_ema/ln_snr_3.06": ...}.

    ln_snr is ln(alpha² / sigma²) in the middle of the bin.
    """
    middles = (torch.arange(len(found), dtype=torch.float64) + 0.5) / len(found)
    alpha, sigma = path.levels(path.times(middles))
    snr = 2 * (alpha / sigma).log()
    name = f"{split}_loss_{weights}"
    by_level = {
        f"{name}/ln_snr_{at:.2f}": loss for at, loss in zip(snr.tolist(), found.tolist(), strict=True)
    }
    return {name: found.mean().item()} | by_level


@contextmanager
def in_eval_mode(*modules: Any) -> Iterator[None]:
    """While open, modules have no dropout."""
    modes = [module.training for module in modules]
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.train(mode)
