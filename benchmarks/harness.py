"""python -m benchmarks.harness [--steps 30] [--batch 16] [--profile]

What a `Run` costs: a step of stage 2 through it, cache, noise, checks, average, notes and log included, in turns with
one of forward, backward and optimizer alone, of a network as in configs/scenes. Seconds are of this thread's
processor time where there is no GPU, so that other programs on the machine do not count.
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

import numpy as np
import torch

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

SHAPE = (4, 16, 16)
PICTURES = 1024


@dataclass(frozen=True, kw_only=True)
class Recipe:
    run: RunConfig


def network(run: Run) -> UNet:
    config = UNetConfig(
        block_out_channels=(64, 128),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=16,
        attention_head_dim=4,
        cross_attention_dim=128,
    )
    return run.place(UNet(config))


def through_a_run(run: Run, tokens: torch.Tensor) -> Iterator[None]:
    """One step each time it is asked."""
    latents = {"mean": torch.randn(PICTURES, 1, *SHAPE), "std": torch.rand(PICTURES, 1, *SHAPE)}
    places = np.stack([np.zeros(PICTURES, dtype=int), np.arange(PICTURES)], axis=1)
    cache, order = LatentCache([latents], 0, places, SHAPE[1]), np.arange(PICTURES)
    unet, rates = network(run), OptimizerConfig()
    ema = EMA(0.999, unet=unet)
    wrapped, optimizer = run.prepare(unet, make_optimizer(rates, [unet]))
    path = Flow().at(SHAPE[1] ** 2)
    denoiser = Denoiser(wrapped, path, make_prediction("flow", path))
    for batch in run.batches(cache, order):
        with run.accelerator.accumulate(wrapped):
            z = batch["mean"] + batch["std"] * run.normal("posterior", batch, SHAPE)
            t = path.times(run.uniform("time", batch)).float().to(run.device)
            loss = denoiser.loss(z, Cond(tokens=tokens), t=t, noise=run.normal("noise", batch, SHAPE))
            run.update(loss.mean(), optimizer, rates)
        ema.update(run.step, unet=unet)
        if run.due(run.config.log_every):
            run.log()
        yield


def alone(run: Run, tokens: torch.Tensor) -> Iterator[None]:
    """Forward, backward and optimizer, on noise that is there already."""
    unet = network(run)
    optimizer = make_optimizer(OptimizerConfig(), [unet])
    path = Flow().at(SHAPE[1] ** 2)
    denoiser = Denoiser(unet, path, make_prediction("flow", path))
    z, noise = (torch.randn(len(tokens), *SHAPE, device=run.device) for _ in range(2))
    t = path.times(torch.rand(len(tokens), dtype=torch.float64)).float().to(run.device)
    while True:
        denoiser.loss(z, Cond(tokens=tokens), t=t, noise=noise).mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        yield


def clock(run: Run) -> Callable[[], float]:
    if run.device.type != "cuda":
        return time.thread_time

    def now() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return now


def main() -> None:
    reader = argparse.ArgumentParser(prog="python -m benchmarks.harness", description=__doc__)
    reader.add_argument("--steps", type=int, default=30)
    reader.add_argument("--batch", type=int, default=16)
    reader.add_argument("--profile", action="store_true", help="show what a run's steps spend their time on")
    asked = reader.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        config = RunConfig(
            out=Path(folder), steps=asked.steps + 3, batch_size=asked.batch, precision="no", log_every=10
        )
        run = Run(config, Recipe(run=config))
        tokens = torch.randn(asked.batch, 16, 128, device=run.device)
        sides, now = (through_a_run(run, tokens), alone(run, tokens)), clock(run)
        profile = cProfile.Profile()
        seconds: tuple[list[float], list[float]] = ([], [])
        for step in range(asked.steps + 2):
            for side, spent in zip(sides, seconds, strict=True):
                watched = asked.profile and side is sides[0] and step > 1
                if watched:
                    profile.enable()
                start = now()
                next(side)
                spent.append(now() - start)
                profile.disable()
        ours, bare = (statistics.median(spent[2:]) for spent in seconds)
        extra = statistics.median(a / b - 1 for a, b in zip(*(spent[2:] for spent in seconds), strict=True))
        print(f"through a run {ours * 1e3:.1f} ms, alone {bare * 1e3:.1f} ms, harness {extra:.1%} of a step")
        if asked.profile:
            pstats.Stats(profile).sort_stats("cumtime").print_stats(45)


if __name__ == "__main__":
    main()
