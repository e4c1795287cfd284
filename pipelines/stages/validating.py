"""What stage 2 is judged by while it trains: held-out loss, and a cheap figure of what is drawn.

Both are there to follow one run; models are compared by `ldm evaluate`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from autoencoder.metrics import psnr
from ldm.denoiser import Denoiser
from ldm.pictures import to_images
from ldm.scenes_check import score
from ldm.validation import BATCH, HeldOut, ValidationConfig, losses, named
from pipelines.latent_diffusion import LatentDiffusion, noise_of


def validate(
    run: Any,
    config: ValidationConfig,
    guidance: float,
    model: LatentDiffusion,
    held_out: HeldOut,
    denoiser: Denoiser,
    trained: Mapping[str, Any],
) -> None:
    """Log the loss on held-out pictures by noise level, and how near drawn ones come. Called by all processes.

    Args:
        guidance: of the pictures that are drawn to be read.
        model: with the averaged weights, up to date.
        denoiser: of the training, for its path, prediction and weight.
        trained: modules with the raw weights, "unet" and perhaps "conditioner".
    """
    averaged = {"unet": model.unet, "conditioner": model.conditioner}
    for weights, parts in (("ema", averaged), ("raw", averaged | dict(trained))):
        of_these, factor = replace(denoiser, network=parts["unet"]), model.autoencoder.config.factor
        found = losses(run, held_out, of_these, parts["conditioner"], factor, config.bins)
        run.remark(**named(held_out.split, weights, model.path, found))
    if run.main:
        run.remark(**quick_figures(model, held_out, steps=config.steps, guidance=guidance))


@torch.no_grad()
def quick_figures(
    model: LatentDiffusion, held_out: HeldOut, *, steps: int, guidance: float
) -> dict[str, float]:
    """Draw one picture for what is known of each held-out one, from fixed noise, and say how near they come.

    What a task makes of a picture is compared with what it should, as the autoencoder has it (PSNR).
    Drawn scenes are read: the share that satisfies its caption in every attribute, with `guidance`. Of other pictures
    it is the `energy_distance` between the `texture` of latents drawn without guidance, which would narrow them, and
    of the held-out ones: it notices blur, noise, faint colours and sameness, not whether a thing is drawn rightly.
    """
    split = held_out.split
    if held_out.scenes:
        images = to_images(model.decode(drawn(model, held_out, steps, guidance)))
        return {f"{split}_prompts_satisfied": score(images, held_out.scenes)["all"]}
    if held_out.image is not None:
        made, wanted = (model.decode(z).cpu() for z in (drawn(model, held_out, steps, guidance), held_out.z))
        return {f"{split}_made_psnr_db": psnr(made.clamp(-1, 1), wanted.clamp(-1, 1)).mean().item()}
    if len(held_out.z) < 2:  # which have no distance between them
        return {}
    found, there = texture(drawn(model, held_out, steps, 1.0)), texture(held_out.z)
    scale = there.std(0).clamp(min=1e-3)
    return {f"{split}_texture_distance": energy_distance(found / scale, there / scale)}


def drawn(model: LatentDiffusion, held_out: HeldOut, steps: int, guidance: float) -> Tensor:
    """[N,C,h,w] Latents drawn with the held-out pictures' captions or classes; number i from seed i."""
    shape = held_out.z.shape[1:]
    sample, grid, start = model.sampler_for(None, steps, shape)
    parts = []
    for rows in torch.arange(len(held_out.z)).split(BATCH):
        told = {name: value[rows] for name, value in held_out.batch.items()}
        image = None if held_out.image is None else held_out.image[rows]
        denoise = model.guided(told, len(rows), shape, guidance, image=image)
        noise = noise_of(rows.tolist(), shape, model.device)
        parts.append(sample(denoise, noise(-1) * start, grid, noise=noise))
    return torch.cat(parts)


def texture(z: Tensor) -> Tensor:
    """[N,F] For each quarter of latents [N,C,h,w] and each channel: its mean, and the logarithm of the power in up to
    three octaves of detail."""
    found = []
    for _ in range(3):
        if min(z.shape[2:]) < 4:
            break
        coarse = F.avg_pool2d(z, 2)
        detail = z - F.interpolate(coarse, z.shape[2:])
        found.append(F.adaptive_avg_pool2d(detail.square(), 2).add(1e-6).log().flatten(1) / 2)
        z = coarse
    return torch.cat([*found, F.adaptive_avg_pool2d(z, 2).flatten(1)], dim=1)


def energy_distance(x: Tensor, y: Tensor) -> float:
    """Between two sets of samples [N,F]: about 0 if they are alike, 1 if they lie far apart.

    2 E|X - Y| - E|X - X'| - E|Y - Y'|, as a share of 2 E|X - Y| (Szekely & Rizzo 2013), without bias, so that it may
    fall a little below 0. Row i of both may belong together; these pairs are left out, as a row's with itself is.
    """
    x, y = x.cpu().double(), y.cpu().double()  # not every device has float64
    others = ~torch.eye(len(x), dtype=torch.bool)
    across = 2 * torch.cdist(x, y)[others].mean()
    within = torch.pdist(x).mean() + torch.pdist(y).mean()
    return ((across - within) / across).item()
