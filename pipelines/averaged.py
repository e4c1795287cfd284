"""`ldm ema`: the model of a run, with its weights averaged over a length that is chosen after training."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from ldm.config import UserError
from ldm.profiles import reconstruct
from pipelines.latent_diffusion import LatentDiffusion


@torch.no_grad()
def write_averaged(run: Path, sigma_rel: float, out: Path, step: int | None = None) -> None:
    """Write the stock folder `out`: RUN/model with the trained weights that `ldm.profiles.reconstruct` gives.

    Raises:
        UserError: as `reconstruct`, or the snapshots are of another network.
    """
    weights, step, distance = reconstruct(run / "ema", sigma_rel, step)
    model = LatentDiffusion.from_pretrained(run)
    parts: dict[str, nn.Module] = {"unet": model.unet, "conditioner": model.conditioner}
    own = {f"{name}.{key}": p for name, part in parts.items() for key, p in part.named_parameters()}
    if any(key not in own or own[key].shape != value.shape for key, value in weights.items()):
        raise UserError(f"The snapshots in {run / 'ema'} are of another network than {run / 'model'}.")
    for key, value in weights.items():
        own[key].copy_(value)
    model.save_pretrained(out)
    print(
        f"{out}: {len(weights)} tensors averaged over sigma_rel {sigma_rel:g} up to step {step}; "
        f"the profile is met to {distance:.2%}"
    )
