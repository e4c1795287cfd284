"""What is measured. Each function makes its networks, gives its cases, and lets go of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import diffusers
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoencoder.kl import AutoencoderKL
from benchmarks.models import Shape, autoencoders, device, normal, told, unets
from benchmarks.timing import Case
from ldm.conditioning import Cond
from ldm.denoiser import Denoiser
from ldm.guidance import guided
from ldm.paths import VP
from ldm.prediction import make_prediction
from ldm.samplers import SAMPLERS
from ldm.unet import UNet
from pipelines.schedulers import sampling_grid, scheduler_config

Precision = Callable[[], AbstractContextManager[Any]]
Step = Callable[[Tensor], Tensor]
PATH = VP(schedule="scaled_linear")
GUIDANCE = 4.0


def bf16() -> AbstractContextManager[Any]:
    return torch.autocast(device(), torch.bfloat16)


PRECISIONS: dict[str, tuple[Precision, torch.dtype]] = {
    "f32": (nullcontext, torch.float32),
    "bf16": (bf16, torch.bfloat16),
}


# --- U-Net ---------------------------------------------------------------------------------------------------------


def unet_forward(size: Shape) -> Iterator[Case]:
    ours, peer = unets(size)
    for batch in (2, 16):
        for side in size.latents:
            x, cond = normal(batch, 4, side, side), told(size, batch)
            t = torch.full((batch,), 500.0, device=device())
            yield Case(
                name=f"U-Net forward, batch {batch}, latents {side}x{side}",
                ours=torch.no_grad()(partial(ours, x, t, cond)),
                peer=torch.no_grad()(partial(stock_forward, peer, x, t, cond)),
                unit=batch,
            )


def stock_forward(peer: Any, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
    return peer(x, t, cond.tokens).sample


def sampling(size: Shape) -> Iterator[Case]:
    """The loop over the steps with guidance, on the same noise: no text encoder, no decoder."""
    ours, peer = unets(size)
    for sampler, steps in (("ddim", 50), ("dpmpp_2m", 20)):
        for batch in (1, 8):
            cond, null = told(size, batch), told(size, batch, seed=9)
            noise = normal(batch, 4, size.latents[0], size.latents[0])
            yield Case(
                name=f"sampling, {sampler} {steps}, guidance, batch {batch}",
                ours=partial(our_loop, ours, sampler, steps, cond, null, noise),
                peer=partial(stock_loop, peer, sampler, steps, cond, null, noise),
                target=1.6,
                unit=batch,
            )


def our_loop(unet: UNet, sampler: str, steps: int, cond: Cond, null: Cond, noise: Tensor) -> Tensor:
    denoiser = Denoiser(unet, PATH, make_prediction("epsilon", PATH))
    grid, start = sampling_grid(PATH, sampler, steps)
    return SAMPLERS[sampler](guided(denoiser, cond, null, GUIDANCE), noise * start, grid)


@torch.no_grad()
def stock_loop(unet: Any, sampler: str, steps: int, cond: Cond, null: Cond, noise: Tensor) -> Tensor:
    """The loop of StableDiffusionPipeline, without its text encoder and decoder."""
    config = scheduler_config(PATH, "epsilon", sampler)
    scheduler = getattr(diffusers, config["_class_name"]).from_config(config)
    scheduler.set_timesteps(steps)
    tokens = Cond.cat(null, cond).tokens
    x = noise * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        both = scheduler.scale_model_input(torch.cat([x, x]), t)
        away, to = unet(both, t, tokens).sample.chunk(2)
        x = scheduler.step(away + GUIDANCE * (to - away), t, x).prev_sample
    return x


def latent_training(size: Shape) -> Iterator[Case]:
    """Forward, loss, backward, AdamW of the U-Net alone, on latents and text states at hand."""
    side, batch = size.latents[0], 16
    x, target, cond = normal(batch, 4, side, side), normal(batch, 4, side, side, seed=3), told(size, batch)
    t = torch.linspace(1, 999, batch, device=device())
    for name, (precision, dtype) in PRECISIONS.items():
        ours, peer = unets(size)
        yield Case(
            name=f"latent training step, network alone, {name}",
            ours=partial(train, partial(ours, x, t, cond), target, stepper(ours), precision),
            peer=partial(train, partial(stock_forward, peer, x, t, cond), target, stepper(peer), precision),
            target=1.3,
            unit=batch,
            precision=dtype,
        )


def train(forward: Callable[[], Tensor], target: Tensor, step: Step, precision: Precision) -> Tensor:
    with precision():
        loss = F.mse_loss(forward().float(), target)
    return step(loss)


def stepper(module: nn.Module) -> Step:
    """Backward and a step of AdamW, at a rate too low to change what is compared; gives the loss."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-9, fused=True)

    def step(loss: Tensor) -> Tensor:
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


# --- Autoencoder ---------------------------------------------------------------------------------------------------


def autoencoder_passes(size: Shape) -> Iterator[Case]:
    """In bf16, ours is compared with the peer in float32: the difference says what it costs."""
    ours, peer = autoencoders(size)
    pixels = normal(8, 3, size.picture, size.picture).clamp(-1, 1)
    with torch.no_grad():
        latents = ours.encode(pixels).mean
    for name, (precision, dtype) in PRECISIONS.items():
        about = name if name == "f32" else f"{name} against f32"
        target = 1.3 if name == "f32" else 2.5
        yield Case(
            name=f"encode, {about}",
            ours=partial(encode, ours, pixels, precision),
            peer=torch.no_grad()(lambda: peer.encode(pixels).latent_dist.mean),
            target=target,
            unit=8,
            precision=dtype,
        )
        yield Case(
            name=f"decode, {about}",
            ours=partial(decode, ours, latents, precision),
            peer=torch.no_grad()(lambda: peer.decode(latents).sample),
            target=target,
            unit=8,
            precision=dtype,
        )


@torch.no_grad()
def encode(model: AutoencoderKL, pixels: Tensor, precision: Precision) -> Tensor:
    with precision():
        return model.encode(pixels.contiguous(memory_format=torch.channels_last)).mean


@torch.no_grad()
def decode(model: AutoencoderKL, latents: Tensor, precision: Precision) -> Tensor:
    with precision():
        return model.decode(latents)


def autoencoder_training(size: Shape) -> Iterator[Case]:
    """Forward, L2 + KL, backward, AdamW, on pixels at hand."""
    pixels = normal(8, 3, size.picture, size.picture).clamp(-1, 1)
    for name, (precision, dtype) in PRECISIONS.items():
        ours, peer = autoencoders(size)
        side = size.picture // ours.config.factor
        noise = normal(8, 4, side, side, seed=2)
        yield Case(
            name=f"autoencoder training step, {name}",
            ours=partial(our_step, ours, pixels, noise, stepper(ours), precision),
            peer=partial(stock_step, peer, pixels, noise, stepper(peer), precision),
            target=1.4,
            unit=8,
            precision=dtype,
        )


def our_step(model: AutoencoderKL, pixels: Tensor, noise: Tensor, step: Step, precision: Precision) -> Tensor:
    with precision():
        made, posterior = model(pixels.contiguous(memory_format=torch.channels_last), noise)
        loss = F.mse_loss(made.float(), pixels) + 1e-6 * posterior.kl().mean() / pixels[0].numel()
    return step(loss)


def stock_step(model: Any, pixels: Tensor, noise: Tensor, step: Step, precision: Precision) -> Tensor:
    with precision():
        posterior = model.encode(pixels).latent_dist
        made = model.decode(posterior.mean + posterior.std * noise).sample
        loss = F.mse_loss(made.float(), pixels) + 1e-6 * posterior.kl().mean() / pixels[0].numel()
    return step(loss)


ROWS = (unet_forward, sampling, autoencoder_passes, autoencoder_training, latent_training)
