"""Stage 1: train an autoencoder that turns pictures into latents and back.

    python train_vae.py --config configs/scenes/vae.yaml [--data.path FOLDER] [--run.out DIR] [--run.steps N]

Run the same command again to go on with a run that was stopped. The result lies in OUT/model, a stock
`AutoencoderKL` folder whose latents have mean 0 and standard deviation 1 per channel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from autoencoder.files import written_beside
from autoencoder.kl import AutoencoderConfig, AutoencoderKL
from autoencoder.latents import LatentStatistics, fold
from autoencoder.losses import LossConfig, reconstruction
from autoencoder.metrics import psnr
from ldm.checkpoint import writing
from ldm.config import command, load
from ldm.data import DataConfig, Pixels, Source, open_source, order, shown_source, to_images, to_tensor
from ldm.ema import EMA
from ldm.faults import explain
from ldm.optim import OptimizerConfig, make_optimizer
from ldm.training import Run, RunConfig
from pipelines.sheets import side_by_side


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
class Recipe:
    """Stage 1 of a latent diffusion model: an autoencoder."""

    run: RunConfig
    data: DataConfig = field(default_factory=DataConfig)
    network: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    ema_decay: float = 0.999
    """Of the averaged weights, which are the ones kept"""
    show: ShowConfig = field(default_factory=ShowConfig)
    workers: int = 1
    """Processes that read or draw pictures beside each training process; 0: the training process does"""

    def __post_init__(self) -> None:
        if self.data.size % self.network.factor:
            raise ValueError(
                f"data.size is {self.data.size}, which the autoencoder's factor {self.network.factor} does not divide"
            )


@command("train_vae.py", explain)
def main(argv: Sequence[str]) -> None:
    recipe = load(Recipe, argv, prog="train_vae.py")
    run = Run(recipe.run, recipe)
    if run.finished():
        return
    source = open_source(recipe.data)
    run.say(source.describe())
    originals, split = pixels_to_show(recipe)
    originals = originals.to(run.device)

    network = run.place(AutoencoderKL(replace(recipe.network, sample_size=recipe.data.size)))
    ema = EMA(recipe.ema_decay, autoencoder=network)
    autoencoder, optimizer = run.prepare(network, make_optimizer(recipe.optimizer, [network]))
    run.resume(ema["autoencoder"], autoencoder=autoencoder, ema=ema, optimizer=optimizer)
    run.say(
        f"autoencoder: {sum(p.numel() for p in network.parameters()):,} weights, factor {recipe.network.factor}"
    )

    side = recipe.data.size // recipe.network.factor
    latents = (recipe.network.latent_channels, side, side)
    pictures = Pixels(source, recipe.data, recipe.run.seed)
    for batch in run.batches(pictures, order(source, recipe.data.balance), recipe.workers):
        with run.accelerator.accumulate(autoencoder):
            pixels = batch["pixels"].contiguous(memory_format=torch.channels_last)
            made, posterior = autoencoder(pixels, run.normal("posterior", batch, latents))
            distance = reconstruction(made, pixels, recipe.loss.reconstruction).mean()
            kl = posterior.kl().mean() / pixels[0].numel()
            run.update(distance + recipe.loss.kl * kl, optimizer, recipe.optimizer)
            run.note(reconstruction=distance.detach(), kl=kl.detach())
        if run.accelerator.sync_gradients:
            ema.update(run.step, autoencoder=network)
        if run.due(recipe.show.every):
            ema.gather()
            show(run, ema["autoencoder"], originals)
        if run.due(recipe.run.log_every):
            run.log()
        if run.due(recipe.run.save_every):
            run.save()
    ema.gather()
    made = finish(run, ema["autoencoder"], source, recipe, originals)
    quality = psnr(made, originals).mean().item()
    run.say(
        f"PSNR {quality:.2f} dB on {len(originals)} pictures of split {split}; the model is in {run.out}/model"
    )
    run.end(psnr_db=round(quality, 3), psnr_split=split)


def pixels_to_show(recipe: Recipe) -> tuple[Tensor, str]:
    """[N,3,S,S] pictures that reconstructions are judged on, and the split that they are from."""
    source, split = shown_source(recipe.data, recipe.show.split)
    count = min(recipe.show.count, len(source))
    chosen = [i * len(source) // count for i in range(count)]
    return torch.stack([to_tensor(source.picture(i, recipe.data.size)) for i in chosen]), split


@torch.no_grad()
def reconstruct(autoencoder: nn.Module, originals: Tensor) -> Tensor:
    """[N,3,S,S] => the same, through the posterior's mean, clipped to [-1, 1]."""
    made = [autoencoder(x.contiguous(memory_format=torch.channels_last))[0] for x in originals.split(16)]
    return torch.cat(made).float().clamp(-1, 1)


def show(run: Run, autoencoder: nn.Module, originals: Tensor) -> None:
    """Note the PSNR, and save originals above their reconstructions."""
    if not run.main:
        return
    made = reconstruct(autoencoder, originals)
    run.remark(psnr_db=psnr(made, originals).mean().item())
    sheet = side_by_side(to_images(originals[:32]), to_images(made[:32]))
    run.picture(sheet, "reconstructions")


@torch.no_grad()
def finish(run: Run, autoencoder: AutoencoderKL, source: Source, recipe: Recipe, originals: Tensor) -> Tensor:
    """Measure the latents of the whole training set, fold the statistics in, write OUT/model.

    Returns what the folded autoencoder makes of the originals.
    """
    statistics = LatentStatistics(recipe.network.latent_channels)
    for pixels in run.shares(source, recipe.data.size, "latent statistics"):
        statistics.update(autoencoder.encode(pixels))
    if run.accelerator.num_processes > 1:
        statistics.sums = run.accelerator.reduce(statistics.sums.to(run.device)).cpu()
    folded = fold(autoencoder, statistics)
    made = reconstruct(folded, originals)
    if run.main:
        with writing(run.out / "model"), written_beside(run.out / "model") as fresh:
            folded.save_pretrained(fresh)
        side_by_side(to_images(originals[:32]), to_images(made[:32])).save(run.out / "reconstructions.png")
    return made


if __name__ == "__main__":
    main()
