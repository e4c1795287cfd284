"""The U-Net: one call, a whole drawing, a training step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import diffusers
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoencoder.packed import Kept
from benchmarks.models import (
    Shape,
    against,
    as_it_comes,
    compile_parts,
    compiled,
    device,
    hurried,
    normal,
    precisions,
    told,
    training_pairs,
    unets,
    usual,
)
from benchmarks.timing import Case, Giving, Keeping
from ldm.conditioning import Cond
from ldm.denoiser import Denoiser
from ldm.device import DTYPES, Precision, to_draw
from ldm.guidance import Guidance, guided
from ldm.paths import VP
from ldm.prediction import make_prediction
from ldm.samplers import SAMPLERS
from ldm.unet import UNet
from pipelines.schedulers import sampling_grid, scheduler_config

Autocast = Callable[[], AbstractContextManager[Any]]
Step = Callable[[Tensor], Tensor]
PATH = VP(schedule="scaled_linear")
GUIDANCE = Guidance(scale=4.0)
INTERVAL = Guidance(scale=4.0, interval=(0.5, 4.0))  # of sigma / alpha: 11 of 20 steps


def autocast(precision: Precision) -> Autocast:
    if precision == "f32":
        return nullcontext
    return partial(torch.autocast, device(), torch.bfloat16)


def forward(size: Shape) -> Iterator[Case]:
    """Prepared beforehand: preparation is counted where a whole drawing is."""
    ours, peer = unets(size)
    fast, prepared = hurried(peer, DTYPES[usual()]), compiled(to_draw(ours, usual()))
    peer = as_it_comes(peer)
    for batch in (2, 16):
        for side in size.latents:
            x, cond = normal(batch, 4, side, side), told(size, batch)
            t = torch.full((batch,), 500.0, device=device())
            one = torch.tensor(500, device=device())  # as pipelines of the peer tell it
            yield Case(
                name=f"U-Net forward, batch {batch}, latents {side}x{side}",
                ours=torch.no_grad()(partial(prepared, x, t, cond)),
                peer=torch.no_grad()(partial(stock_forward, peer, x, one, cond)),
                fast_peer=torch.no_grad()(partial(stock_forward, fast, x, one, cond)),
                share_target=0.7 if batch == 16 else None,
                unit=batch,
                precision=DTYPES[usual()],
                long=batch * side == 16 * 32,
            )


def stock_forward(peer: Any, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
    assert cond.tokens is not None
    return peer(x.to(peer.dtype), t, cond.tokens.to(peer.dtype)).sample.float()


def sampling(size: Shape) -> Iterator[Case]:
    """The loop over the steps with guidance, on the same noise: no text encoder, no decoder."""
    ours, peer = unets(size)
    usually = as_it_comes(peer)
    for precision, dtype in precisions().items():
        fast = hurried(peer, dtype)
        said = "" if precision == "f32" else f", {against(precision)}"
        for sampler, steps in (("ddim", 50), ("dpmpp_2m", 20)):
            for batch in (1, 8):
                side = size.latents[0]
                told_ = told(size, batch), told(size, batch, seed=9), normal(batch, 4, side, side)
                yield Case(
                    name=f"sampling, {sampler} {steps}, guidance, batch {batch}{said}",
                    ours=partial(our_loop, ours, precision, sampler, steps, *told_, Kept()),
                    peer=partial(stock_loop, usually, sampler, steps, *told_),
                    fast_peer=partial(stock_loop, fast, sampler, steps, *told_),
                    target=1.6 if precision == "f32" else 2.0,
                    unit=batch,
                    precision=dtype,
                    long=batch > 1,
                )


def hasty(size: Shape) -> Iterator[Case]:
    """Guided in an interval only, the coarser levels computed every third step: another picture, as `difference` says.

    What it does to the pictures of a trained model is in docs/log.md.
    """
    ours, peer = unets(size)
    usually, side = as_it_comes(peer), size.latents[0]
    for precision, dtype in precisions().items():
        fast = hurried(peer, dtype)
        said = "" if precision == "f32" else f", {against(precision)}"
        for batch in (1, 8):
            told_ = told(size, batch), told(size, batch, seed=9), normal(batch, 4, side, side)
            yield Case(
                name=f"sampling, dpmpp_2m 20, interval, reuse 3, batch {batch}{said} (another result)",
                ours=partial(our_loop, ours, precision, "dpmpp_2m", 20, *told_, Kept(), INTERVAL, 3),
                peer=partial(stock_loop, usually, "dpmpp_2m", 20, *told_),
                fast_peer=partial(stock_loop, fast, "dpmpp_2m", 20, *told_),
                target=3.0,
                unit=batch,
                precision=None,
                long=batch > 1,
            )


def our_loop(
    unet: UNet,
    precision: Precision,
    sampler: str,
    steps: int,
    cond: Cond,
    null: Cond,
    noise: Tensor,
    kept: Kept[Any],
    guidance: Guidance = GUIDANCE,
    reuse: int = 1,
) -> Tensor:
    """As `LatentDiffusion` draws from the second drawing of a size on: the network's layers are packed. On a GPU
    compiled, but where levels are reused, since no graph holds what changes from call to call."""
    network = to_draw(unet, precision, reuse=reuse, kept=kept)
    denoiser = Denoiser(compiled(network) if reuse == 1 else network, PATH, make_prediction("epsilon", PATH))
    grid, start = sampling_grid(PATH, sampler, steps)
    return SAMPLERS[sampler](guided(denoiser, cond, null, guidance), noise * start, grid)


@torch.no_grad()
def stock_loop(unet: Any, sampler: str, steps: int, cond: Cond, null: Cond, noise: Tensor) -> Tensor:
    """The loop of StableDiffusionPipeline, without its text encoder and decoder."""
    config = scheduler_config(PATH, "epsilon", sampler)
    scheduler = getattr(diffusers, config["_class_name"]).from_config(config)
    scheduler.set_timesteps(steps, device=noise.device)
    tokens = Cond.cat(null, cond).tokens
    assert tokens is not None
    x, tokens = noise * scheduler.init_noise_sigma, tokens.to(unet.dtype)
    for t in scheduler.timesteps:
        both = scheduler.scale_model_input(torch.cat([x, x]), t)
        away, to = unet(both.to(unet.dtype), t, tokens).sample.float().chunk(2)
        x = scheduler.step(away + GUIDANCE.scale * (to - away), t, x).prev_sample
    return x


def training(size: Shape) -> Iterator[Case]:
    """Forward, loss, backward, AdamW of the U-Net alone, on latents and text states at hand.

    What is freed is kept for the next step on our side, as our runs have it, and on that of the peer with its fast
    settings; the peer as it comes has the C library as it comes."""
    side, batch = size.latents[0], 16
    x, target, cond = normal(batch, 4, side, side), normal(batch, 4, side, side, seed=3), told(size, batch)
    t = torch.linspace(1, 999, batch, device=device())
    for precision, theirs in training_pairs():
        ours, peer = unets(size)
        fast, cast = hurried(peer, trains=True), autocast(precision)
        compile_parts(ours, graphs=False)
        stock, quick = (partial(stock_forward, network, x, t, cond) for network in (peer, fast))
        said = precision if precision == theirs else against(precision)
        yield Case(
            name=f"latent training step, network alone, {said}",
            ours=Keeping(partial(train, partial(ours, x, t, cond), target, stepper(ours), cast)),
            peer=Giving(partial(train, stock, target, stepper(peer), autocast(theirs))),
            fast_peer=Keeping(partial(train, quick, target, stepper(fast), cast)),
            target=1.3,
            unit=batch,
            precision=DTYPES[precision],
        )


def train(forward: Callable[[], Tensor], target: Tensor, step: Step, cast: Autocast) -> Tensor:
    with cast():
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
