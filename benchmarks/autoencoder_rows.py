"""The autoencoder: pixels to latents, latents to pixels, a training step."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from autoencoder.kl import AutoencoderKL
from benchmarks.models import (
    Shape,
    against,
    as_it_comes,
    autoencoders,
    compile_parts,
    hurried,
    normal,
    precisions,
    training_pairs,
)
from benchmarks.timing import Case, Giving, Keeping
from benchmarks.unet_rows import Autocast, Step, autocast, stepper
from ldm.device import DTYPES, Precision, to_decode


def passes(size: Shape) -> Iterator[Case]:
    """In bf16 on a CPU, ours is compared with the peer in float32: the difference says what it costs."""
    ours, peer = autoencoders(size)
    usually = as_it_comes(peer)
    pixels = normal(8, 3, size.picture, size.picture).clamp(-1, 1)
    side = size.picture // ours.config.factor
    latents = normal(8, 4, side, side)
    compile_parts(ours, graphs=True)
    for precision, dtype in precisions().items():
        fast = hurried(peer, dtype)
        yield Case(
            name=f"encode, {against(precision)}",
            ours=partial(encode, ours, pixels, precision),
            peer=partial(stock_encode, usually, pixels),
            fast_peer=partial(stock_encode, fast, pixels),
            unit=8,
            precision=dtype,
        )
        yield Case(
            name=f"decode, {against(precision)}",
            ours=partial(to_decode(ours, precision), latents),
            peer=partial(stock_decode, usually, latents),
            fast_peer=partial(stock_decode, fast, latents),
            target=1.3 if precision == "f32" else 2.5,
            unit=8,
            precision=dtype,
        )


def encode(model: AutoencoderKL, pixels: Tensor, precision: Precision) -> Tensor:
    """As caches are built."""
    with torch.no_grad(), autocast(precision)():
        return model.encode(pixels.contiguous(memory_format=torch.channels_last)).mean.float()


@torch.no_grad()
def stock_encode(model: Any, pixels: Tensor) -> Tensor:
    return model.encode(pixels.to(model.dtype)).latent_dist.mean.float()


@torch.no_grad()
def stock_decode(model: Any, latents: Tensor) -> Tensor:
    return model.decode(latents.to(model.dtype)).sample.float()


def training(size: Shape) -> Iterator[Case]:
    """Forward, L2 + KL, backward, AdamW, on pixels at hand; memory as for the U-Net."""
    pixels = normal(8, 3, size.picture, size.picture).clamp(-1, 1)
    for precision, theirs in training_pairs():
        ours, peer = autoencoders(size)
        side = size.picture // ours.config.factor
        noise = normal(8, 4, side, side, seed=2)
        fast, cast = hurried(peer, trains=True), autocast(precision)
        compile_parts(ours, graphs=False)
        yield Case(
            name=f"autoencoder training step, {precision if precision == theirs else against(precision)}",
            ours=Keeping(partial(our_step, ours, pixels, noise, stepper(ours), cast)),
            peer=Giving(partial(stock_step, peer, pixels, noise, stepper(peer), autocast(theirs))),
            fast_peer=Keeping(partial(stock_step, fast, pixels, noise, stepper(fast), cast)),
            target=1.4,
            unit=8,
            precision=DTYPES[precision],
        )


def our_step(model: AutoencoderKL, pixels: Tensor, noise: Tensor, step: Step, cast: Autocast) -> Tensor:
    with cast():
        made, posterior = model(pixels.contiguous(memory_format=torch.channels_last), noise)
        loss = F.mse_loss(made.float(), pixels) + 1e-6 * posterior.kl().mean() / pixels[0].numel()
    return step(loss)


def stock_step(model: Any, pixels: Tensor, noise: Tensor, step: Step, cast: Autocast) -> Tensor:
    with cast():
        posterior = model.encode(pixels).latent_dist
        made = model.decode(posterior.mean + posterior.std * noise).sample
        loss = F.mse_loss(made.float(), pixels) + 1e-6 * posterior.kl().mean() / pixels[0].numel()
    return step(loss)
