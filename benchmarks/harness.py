"""python -m benchmarks.harness [--steps 30] [--batch 16] [--profile]

What a `Run` costs: a step of stage 2 through it, in turns with the same mathematics written down by hand: forward and
loss, backward, clipping, optimizer, average of the weights. The harness is what is left: batches read from a cache,
noise that each sample has for itself, dropped conditions, checks that all is finite, signals, notes, log, progress
bar, Accelerate. The network is as in configs/scenes; on a GPU the benchmark takes Stable Diffusion's, in bf16. Seconds
are of this thread's processor time where there is no GPU, so that other programs on the machine do not count.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.timing import Effort, Row
from ldm.cache import LatentCache
from ldm.conditioning import Cond
from ldm.denoiser import Denoiser
from ldm.ema import EMA
from ldm.optim import OptimizerConfig, make_optimizer
from ldm.paths import Flow
from ldm.prediction import make_prediction
from ldm.training import Run, RunConfig
from ldm.unet import UNet
from ldm.unet_config import UNetConfig

SCENES = UNetConfig(
    sample_size=16,
    block_out_channels=(64, 128),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    layers_per_block=1,
    norm_num_groups=16,
    attention_head_dim=4,
    cross_attention_dim=128,
)
PICTURES, TOKENS, DECAY = 1024, 16, 0.999
WARM = 2
"""First steps that are not counted"""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    run: RunConfig


def open_run(folder: Path, steps: int, batch: int) -> Run:
    config = RunConfig(
        out=folder,
        steps=steps,
        batch_size=batch,
        precision="bf16" if torch.cuda.is_available() else "no",
        log_every=10,
        tracker="none",
    )
    return Run(config, Recipe(run=config))


def through_a_run(
    run: Run, unet: UNet, rates: OptimizerConfig, cache: LatentCache, tell: Callable[[dict], Cond]
) -> Iterator[Tensor]:
    """One step of the loop of train_ldm.py each time it is asked; gives the losses."""
    ema = EMA(DECAY, unet=unet)
    wrapped, optimizer = run.prepare(unet, make_optimizer(rates, [unet]))
    shape = cache.shape
    path = Flow().at(shape[1] ** 2)
    denoiser = Denoiser(wrapped, path, make_prediction("flow", path))
    for batch in run.batches(cache, np.arange(len(cache.places))):
        with run.accelerator.accumulate(wrapped):
            z = batch["mean"] + batch["std"] * run.normal("posterior", batch, shape)
            batch["drop"] = (run.uniform("drop", batch) < 0.1).to(run.device)
            t = path.times(run.uniform("time", batch)).float().to(run.device)
            loss = denoiser.loss(z, tell(batch), t=t, noise=run.normal("noise", batch, shape))
            run.update(loss.mean(), optimizer, rates)
        ema.update(run.step, unet=unet)
        if run.due(run.config.log_every):
            run.log()
        yield loss.detach()


def cached(side: int) -> LatentCache:
    shape = PICTURES, 1, 4, side, side
    latents = {"mean": torch.randn(shape), "std": torch.rand(shape)}
    places = np.stack([np.zeros(PICTURES, dtype=int), np.arange(PICTURES)], axis=1)
    return LatentCache([latents], 0, places, side)


def alone(run: Run, unet: UNet, side: int, tokens: Tensor) -> Iterator[None]:
    """The mathematics of a step, on noise that is there already."""
    optimizer = make_optimizer(OptimizerConfig(), [unet])
    weights: list[Tensor] = [*unet.parameters()]
    means = [p.detach().clone() for p in weights]
    path = Flow().at(side**2)
    denoiser = Denoiser(unet, path, make_prediction("flow", path))
    z, noise = (torch.randn(len(tokens), 4, side, side, device=run.device) for _ in range(2))
    t = path.times(torch.rand(len(tokens), dtype=torch.float64)).float().to(run.device)
    while True:
        with run.accelerator.autocast():
            loss = denoiser.loss(z, Cond(tokens=tokens), t=t, noise=noise).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(weights, run.config.max_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_lerp_(means, weights, 1 - DECAY)
        yield


def clock(run: Run) -> Callable[[], float]:
    if run.device.type != "cuda":
        return time.thread_time

    def now() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return now


@dataclass(frozen=True)
class Overhead:
    """The row of the benchmark: the ratio is that of the bare step to one through a run."""

    name: str = "harness: a bare step against one through a run"
    long: bool = False
    steps: int = 30
    batch: int = 16
    network: UNetConfig = SCENES

    def measure(self, effort: Effort, profile: cProfile.Profile | None = None) -> Row:
        steps = min(self.steps, 3 * effort.most) if effort.least > 1 else 8
        with tempfile.TemporaryDirectory() as folder:
            run = open_run(Path(folder), steps + WARM + 1, self.batch)
            side, width = self.network.sample_size, self.network.cross_attention_dim
            assert isinstance(side, int) and isinstance(width, int)
            tokens = torch.randn(self.batch, TOKENS, width, device=run.device)
            ours, bare = (run.place(UNet(self.network)) for _ in range(2))
            through = through_a_run(run, ours, OptimizerConfig(), cached(side), lambda _: Cond(tokens=tokens))
            seconds = timed(through, alone(run, bare, side, tokens), clock(run), steps, profile)
        ratios = [bare / ours for ours, bare in seconds]
        low, middle, high = statistics.quantiles(ratios, n=4)
        spent, least = (statistics.median(one) for one in zip(*seconds, strict=True))
        return Row(name=self.name, ratio=middle, spread=(low, high), target=0.97, ours=spent, peer=least)


def timed(
    through: Iterator[Any],
    bare: Iterator[Any],
    now: Callable[[], float],
    steps: int,
    profile: cProfile.Profile | None,
) -> list[tuple[float, float]]:
    """Seconds of each step through the run and of a bare one, in turns."""
    found = []
    for step in range(steps + WARM):
        spent = []
        for side in (through, bare):
            watched = profile if side is through and step >= WARM else None
            start = now()
            if watched:
                watched.enable()
            next(side)
            if watched:
                watched.disable()
            spent.append(now() - start)
        found.append((spent[0], spent[1]))
    return found[WARM:]


def main() -> None:
    reader = argparse.ArgumentParser(prog="python -m benchmarks.harness", description=__doc__)
    reader.add_argument("--steps", type=int, default=30)
    reader.add_argument("--batch", type=int, default=16)
    reader.add_argument("--profile", action="store_true", help="show what a run's steps spend their time on")
    asked = reader.parse_args()
    profile = cProfile.Profile() if asked.profile else None
    effort = Effort(seconds=0, least=asked.steps, most=asked.steps)
    row = Overhead(steps=asked.steps, batch=asked.batch).measure(effort, profile)
    print(
        f"through a run {row.ours * 1e3:.1f} ms, alone {row.peer * 1e3:.1f} ms, "
        f"harness {1 / row.ratio - 1:.1%} of a step"
    )
    if profile:
        pstats.Stats(profile).sort_stats("cumtime").print_stats(45)


if __name__ == "__main__":
    main()
