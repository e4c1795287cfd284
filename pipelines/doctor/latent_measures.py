"""What can be measured of an autoencoder before a latent model is trained on it.

Latents are meant as a latent model sees them: scaled as the autoencoder's config says, which for those of this
project is not at all. Shapes: pixels [N,3,S,S] in [-1, 1]; latents [N,C,h,w] with h = w = S/f.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoencoder import tiling
from autoencoder.equivariance import Transform
from autoencoder.kl import AutoencoderKL
from autoencoder.metrics import psnr

FP16_MAX = 65504.0
BATCH = 16
NOISES = (0.05, 0.1, 0.2)


@dataclass(frozen=True)
class Latents:
    """Posteriors of pictures, scaled."""

    mean: Tensor
    """[N,C,h,w] float32 on the CPU"""
    std: Tensor
    """[N,C,h,w] likewise"""

    def sample(self, noise: Tensor) -> Tensor:
        """What standard normal noise [N,C,h,w] stands for."""
        return self.mean + self.std * noise


class Coder:
    """An autoencoder as the latent model knows it, on its device, in batches, without gradients."""

    def __init__(self, autoencoder: AutoencoderKL) -> None:
        self.autoencoder = autoencoder
        config = autoencoder.config
        self.scale, self.shift = config.scaling_factor, config.shift_factor or 0.0
        self.device = next(autoencoder.parameters()).device

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Latents:
        """[N,3,S,S] => latents."""
        posteriors = [self.autoencoder.encode(part.to(self.device)) for part in pixels.split(BATCH)]
        mean = torch.cat([posterior.mean.cpu() for posterior in posteriors])
        std = torch.cat([posterior.std.cpu() for posterior in posteriors])
        return Latents((mean - self.shift) * self.scale, std * self.scale)

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """[N,C,h,w] => [N,3,S,S] float32 on the CPU, clipped to [-1, 1]."""
        raw = z / self.scale + self.shift
        made = [self.autoencoder.decode(part.to(self.device)).float().cpu() for part in raw.split(BATCH)]
        return torch.cat(made).clamp(-1, 1)


def _db(made: Tensor, wanted: Tensor) -> float:
    """PSNR in dB of the mean squared error over all pictures: finite unless all are equal."""
    return psnr(made.flatten(0, 1)[None], wanted.flatten(0, 1)[None]).item()


def channel_statistics(latents: Latents) -> dict[str, list[float]]:
    """For each channel, over all pictures and pixels.

    `mean` and `std` are those of sampled latents, `mean_error` and `std_error` their standard errors, as these pictures
    are a sample; `noise_share` is the part of the variance that is the posterior's noise and says nothing, 0..1;
    `kurtosis` (0 for a Gaussian) and `largest` (in deviations) are of posterior means.
    """
    m, v = latents.mean.double(), latents.std.double().square()
    mean, noise = m.mean(dim=(0, 2, 3)), v.mean(dim=(0, 2, 3))
    spread = m.var(dim=(0, 2, 3), correction=0)
    std = (spread + noise).sqrt()
    each_mean = m.mean(dim=(2, 3))  # [N,C]: pixels of one picture are alike, so pictures are what is counted
    each_square = ((m - mean[:, None, None]).square() + v).mean(dim=(2, 3))
    error_of_mean, error_of_square = (  # of a single picture nothing can be said
        (each.std(dim=0, correction=0) / (len(m) - 1) ** 0.5).nan_to_num(float("inf"))
        for each in (each_mean, each_square)
    )
    z = (m - mean[:, None, None]) / spread.sqrt().clamp(min=1e-12)[:, None, None]
    return {
        "mean": mean.tolist(),
        "std": std.tolist(),
        "mean_error": error_of_mean.tolist(),
        "std_error": (error_of_square / (2 * std.clamp(min=1e-12))).tolist(),
        "noise_share": (noise / (spread + noise).clamp(min=1e-24)).tolist(),
        "kurtosis": (z.pow(4).mean(dim=(0, 2, 3)) - 3).tolist(),
        "largest": z.abs().amax(dim=(0, 2, 3)).tolist(),
    }


def correlation(latents: Latents) -> list[list[float]]:
    """[C][C] correlation of the posterior means of two channels at one latent pixel."""
    rows = latents.mean.double().transpose(0, 1).flatten(1)
    return torch.corrcoef(rows).view(len(rows), len(rows)).nan_to_num().tolist()


# --- spectra ---------------------------------------------------------------------------------------------------


class Spectrum(NamedTuple):
    """Radially averaged power of pictures or latents, each channel with its mean taken off."""

    frequency: list[float]
    """In cycles per pixel, up to 0.5"""
    power: list[float]
    """Share of the variance at a frequency of that length, mean over directions: 1 at each for white noise"""
    high_share: float
    """Share of the variance above 0.25 cycles per pixel; about 0.8 for white noise"""
    flatness: float
    """Geometric by arithmetic mean of the power at all frequencies: 1 for white noise, near 0 for smooth pictures"""


def spectrum(x: Tensor) -> Spectrum:
    """Of [N,K,h,w]; windowed, so that the borders' jumps do not count as detail."""
    height, width = x.shape[2:]
    window = torch.outer(  # without its zeros, which would throw away half of the smallest maps
        *(torch.hann_window(n + 2, periodic=False, dtype=torch.float64)[1:-1] for n in (height, width))
    )
    centred = x.double() - x.double().mean(dim=(0, 2, 3), keepdim=True)
    power = torch.fft.fft2(centred * window).abs().square().mean(dim=(0, 1))
    radius = torch.hypot(*torch.meshgrid(torch.fft.fftfreq(height), torch.fft.fftfreq(width), indexing="ij"))
    keep = radius > 0
    power, radius = power[keep] / power[keep].mean(), radius[keep]
    rings = max(2, min(height, width) // 2)
    which = (radius * 2 * rings).round().long()
    inside = (which >= 1) & (which <= rings)
    sums = torch.zeros(rings + 1, dtype=torch.float64).index_add(0, which[inside], power[inside])
    counts = torch.bincount(which[inside], minlength=rings + 1).clamp(min=1)
    return Spectrum(
        frequency=[i / (2 * rings) for i in range(1, rings + 1)],
        power=(sums / counts)[1:].tolist(),
        high_share=(power[radius > 0.25].sum() / power.sum()).item(),
        flatness=(power.clamp(min=1e-12).log().mean().exp() / power.mean()).item(),
    )


def spectra(latents: Latents, pixels: Tensor) -> dict[str, dict[str, object]]:
    """Of latents, of the pictures, and of the pictures shrunk to the latents' size, for comparison on one grid.

    Nothing where latents have fewer than 4 pixels a side, which have no frequencies to compare.
    """
    if min(latents.mean.shape[2:]) < 4:
        return {}
    shrunk = F.interpolate(pixels, size=latents.mean.shape[2:], mode="area")
    of = {"latents": latents.mean, "pictures": pixels, "shrunk pictures": shrunk}
    return {name: spectrum(x)._asdict() for name, x in of.items()}


# --- precision -------------------------------------------------------------------------------------------------


@torch.no_grad()
def activation_maxima(autoencoder: AutoencoderKL, pixels: Tensor) -> dict[str, float]:
    """Largest absolute output of every layer in float32, in the order in which layers run, encoder first."""
    maxima: dict[str, float] = {}

    def note(name: str, out: object) -> None:
        if isinstance(out, Tensor):
            maxima[name] = max(maxima.get(name, 0.0), out.abs().max().item())

    layers = [(name, layer) for name, layer in autoencoder.named_modules() if name]
    hooks = [
        layer.register_forward_hook(lambda _, __, out, name=name: note(name, out)) for name, layer in layers
    ]
    try:
        device = next(autoencoder.parameters()).device
        for part in pixels.split(BATCH):
            autoencoder(part.to(device))
    finally:
        for hook in hooks:
            hook.remove()
    return maxima


def half_precision(coder: Coder, z: Tensor, exact: Tensor) -> dict[str, dict[str, object]]:
    """PSNR in dB of decoding in half precision against float32, and how each was computed.

    float16 convolutions on a CPU are too slow to run: there, weights and every layer's result are rounded to
    float16 and sums are kept in float32, as the matrix units of a GPU do.
    """
    found: dict[str, dict[str, object]] = {}
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        native = dtype == torch.bfloat16 or coder.device.type != "cpu"
        model = deepcopy(coder.autoencoder).to(dtype)
        if native:
            made = Coder(model).decode(z)
        else:
            with rounding(model.float(), dtype):
                made = Coder(model).decode(z)
        how = (
            f"run in {name} on {coder.device.type}" if native else "float32 with every layer rounded to fp16"
        )
        finite = bool(made.isfinite().all())
        found[name] = {"psnr_db": _db(made, exact) if finite else 0.0, "finite": finite, "how": how}
    return found


@contextmanager
def rounding(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """While open, what every layer gives is rounded to `dtype`: beyond its range to infinity, as there."""
    hooks = [
        layer.register_forward_hook(
            lambda _, __, out: out.to(dtype).to(out.dtype) if isinstance(out, Tensor) else None
        )
        for layer in model.modules()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


# --- robustness ------------------------------------------------------------------------------------------------


def noise_sensitivity(
    coder: Coder, z: Tensor, exact: Tensor, originals: Tensor
) -> tuple[dict[str, dict[str, float]], list[Tensor]]:
    """PSNR in dB after noise on the latents, against their decoding without it and against the originals.

    Returns {noise: {against decoding, against originals}} and the pictures of each noise.
    """
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(0))
    made = [coder.decode(z + sigma * noise) for sigma in NOISES]
    figures = {
        f"{sigma:g}": {"against_decoding_db": _db(y, exact), "against_originals_db": _db(y, originals)}
        for sigma, y in zip(NOISES, made, strict=True)
    }
    return figures, made


def equivariance(coder: Coder, z: Tensor, originals: Tensor) -> dict[str, float]:
    """PSNR in dB of decoded transformed latents against transformed pictures: how far latents turn with the picture."""
    f = coder.autoencoder.config.factor
    moves = {
        "quarter turn": Transform(scale=1.0, quarter_turns=1),
        "half the size": Transform(scale=0.5, quarter_turns=0),
    }
    return {name: _db(coder.decode(move(z)), move(originals, f)) for name, move in moves.items()}


def seams(coder: Coder, originals: Tensor) -> dict[str, Any]:
    """`tiling.seam_error` by passes, with tiles of half the side; nothing where that can't be a tile."""
    f = coder.autoencoder.config.factor
    tile = originals.shape[-1] // 2 // f * f
    if tile < 4 * f:
        return {}
    by_passes = {
        str(passes): tiling.seam_error(
            coder.autoencoder, originals[:BATCH], tile=tile, passes=passes
        )._asdict()
        for passes in (0, 1)
    }
    return {"tile": tile, "passes": by_passes}
