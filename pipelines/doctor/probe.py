"""How easily latents are learned: a small denoiser, always the same, trained on them for a fixed budget.

Its error on held-out latents is compared with what no learning would reach, so that autoencoders can be compared.
At noise level sigma of the flow path x_t = (1 - sigma) x_0 + sigma eps there are two such marks: predicting the mean
explains 0 of the variance v of x_0; the best linear estimate from each number alone, as if latents were white noise,
explains (1 - sigma)^2 v / ((1 - sigma)^2 v + sigma^2).
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from ldm import random
from ldm.conditioning import Cond
from ldm.denoiser import Denoiser, spread
from ldm.optim import OptimizerConfig, make_optimizer
from ldm.paths import Flow, Level, stratify
from ldm.prediction import Flow as FlowPrediction
from ldm.run_config import best_precision
from ldm.unet import UNet
from ldm.unet_config import UNetConfig
from pipelines.doctor.latent_measures import BATCH, Latents

LEVELS = tuple((2 * i + 1) / 16 for i in range(8))
"""Noise levels sigma at which the denoiser is judged: the middles of eight equal bins"""
SHOWN = (0.3, 0.5, 0.8)
"""Noise levels whose estimates are decoded"""
BATCH_SIZE = 16


@dataclass(frozen=True)
class Probe:
    """What the small denoiser has learned."""

    steps: int
    batch_size: int
    seconds: float
    pictures: int
    """Whose latents it was trained on"""
    weights: int
    sigma: list[float]
    """Noise levels, each the middle of a bin"""
    loss: list[float]
    """Held-out flow loss at each level, the mean squared error of eps - x_0"""
    explained: list[float]
    """Share of the held-out variance of x_0 that is predicted at each level; 0 is what the mean does, 1 is all"""
    pointwise: list[float]
    """The same of the best linear estimate from each number alone"""

    @property
    def score(self) -> float:
        """Mean explained share over the levels."""
        return sum(self.explained) / len(self.explained)

    @property
    def gain(self) -> float:
        """Share of the error of the estimate from each number alone that the denoiser takes away, above sigma 0.5.

        0: it found no structure in the latents; 1: it predicts them all.
        """
        pairs = [
            (e, p) for s, e, p in zip(self.sigma, self.explained, self.pointwise, strict=True) if s > 0.5
        ]
        return 1 - sum(1 - e for e, _ in pairs) / sum(1 - p for _, p in pairs)

    def figures(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self) | {"score": self.score, "gain": self.gain}


def network(channels: int) -> UNet:
    """The small denoiser, initialised alike for alike channels."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return UNet(
            UNetConfig(
                in_channels=channels,
                out_channels=channels,
                block_out_channels=(32, 64),
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
                layers_per_block=1,
                attention_head_dim=4,
                norm_num_groups=8,
                cross_attention_dim=None,
            )
        )


def train_probe(latents: Latents, held: Latents, steps: int, device: torch.device) -> tuple[Probe, Denoiser]:
    """Train on `latents` for `steps` batches of 16, judge on `held`. The same input gives the same result."""
    began = time.time()
    unet = network(latents.mean.shape[1]).to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    denoiser = Denoiser(unet, Flow(), FlowPrediction())
    rates = OptimizerConfig(lr=2e-3, warmup=20, decay="linear", decay_from=0.3)
    optimizer = make_optimizer(rates, [unet])
    for step in tqdm(range(steps), desc="probe", unit="step", leave=False, disable=None):
        positions = torch.arange(step * BATCH_SIZE, (step + 1) * BATCH_SIZE)
        x0 = batch_of(latents, positions).to(device)
        u = stratify(random.uniform(0, "time", positions), positions, BATCH_SIZE)
        noise = random.normal(0, "noise", positions, x0.shape[1:]).to(device)
        t = denoiser.path.times(u).float().to(device)
        with autocast(device):
            loss = denoiser.loss(x0, Cond(), t=t, noise=noise).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rates.rate(step, steps)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    losses, explained, variance = judged(denoiser, held, latents.mean.mean(dim=(0, 2, 3)), device)
    pointwise = [(1 - s) ** 2 * variance / ((1 - s) ** 2 * variance + s**2) for s in LEVELS]
    count = sum(p.numel() for p in unet.parameters())
    seconds = round(time.time() - began, 1)
    found = Probe(
        steps, BATCH_SIZE, seconds, len(latents.mean), count, list(LEVELS), losses, explained, pointwise
    )
    return found, denoiser


def autocast(device: torch.device) -> torch.autocast:
    """bf16 where this machine multiplies it natively, as in training."""
    return torch.autocast(device.type, torch.bfloat16, enabled=best_precision() == "bf16")


def batch_of(latents: Latents, positions: Tensor) -> Tensor:
    """Samples at positions of an endless shuffled stream, [B,C,h,w]."""
    count = len(latents.mean)
    rows = [
        int(random.permutation(0, "order", epoch, count)[place])
        for epoch, place in ((p // count, p % count) for p in positions.tolist())
    ]
    noise = random.normal(0, "posterior", positions, latents.mean.shape[1:])
    return Latents(latents.mean[rows], latents.std[rows]).sample(noise)


@torch.no_grad()
def judged(
    denoiser: Denoiser, held: Latents, mean: Tensor, device: torch.device
) -> tuple[list[float], list[float], float]:
    """Flow loss and explained share of the held-out latents at each of LEVELS, and their variance around `mean` [C]."""
    positions = torch.arange(len(held.mean))
    x0 = held.sample(random.normal(0, "held-out posterior", positions, held.mean.shape[1:]))
    noise = random.normal(0, "held-out noise", positions, held.mean.shape[1:])
    variance = (x0 - mean[:, None, None]).square().mean().item()
    losses, explained = [], []
    for sigma in LEVELS:
        error = (estimates(denoiser, x0, noise, sigma, device) - x0).square().mean().item()
        losses.append(error / sigma**2)  # eps - x_0 is off by what x_0 is, divided by sigma
        explained.append(1 - error / variance)
    return losses, explained, variance


@torch.no_grad()
def estimates(denoiser: Denoiser, x0: Tensor, noise: Tensor, sigma: float, device: torch.device) -> Tensor:
    """x_0 [N,C,h,w] as the denoiser sees it through noise of level sigma."""
    t = torch.tensor(1000.0 * sigma)
    level = Level(t, *denoiser.path.levels(t))
    alpha, noisy = spread(level, x0)
    with autocast(device):
        made = [
            denoiser(part.to(device), level, Cond()).cpu()
            for part in (alpha * x0 + noisy * noise).split(BATCH)
        ]
    return torch.cat(made)
