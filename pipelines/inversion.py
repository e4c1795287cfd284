"""Noise from pictures, and what lies around and between: DDIM inversion, variation, interpolation.

The noise from which a deterministic sampler draws a picture is a place for it; places are varied and travelled.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from autoencoder.metrics import psnr
from ldm.checks import require_int
from ldm.conditioning import text_of
from ldm.guidance import Guidance
from ldm.paths import Grid
from ldm.pictures import to_images
from ldm.samplers import Denoise
from pipelines.inputs import to_pixels, upright
from pipelines.latent_diffusion import LatentDiffusion, noise_of, seeds_of


@torch.no_grad()
def invert(
    model: LatentDiffusion,
    picture: Image.Image,
    prompt: str | None = None,
    *,
    classes: str | None = None,
    steps: int = 30,
    guidance: float | Guidance = 1.0,
    iterations: int = 5,
) -> Tensor:
    """The noise [1,C,h,w] from which DDIM with the same words, steps and guidance draws this picture.

    Each DDIM step x' = f(x) is solved for x by fixed-point iteration from x = x' (Pan et al. 2023); one iteration is
    plain DDIM inversion (Song et al. 2021, section 4.3). It converges slowly or not at all at high guidance.
    `drawn_again` says how near it came.
    """
    require_int("iterations", iterations, 1, 100)
    z = model.encode(to_pixels(model, picture))
    _, grid, _ = model.sampler_for("ddim", steps, z.shape[1:])
    denoise = model.guided(model.read(prompt, 1, classes), 1, z.shape[1:], guidance)
    for i in reversed(range(len(grid))):
        z = undone(denoise, z, grid, i, iterations)
    return z


def undone(denoise: Denoise, target: Tensor, grid: Grid, i: int, iterations: int) -> Tensor:
    """The x at level i that DDIM's step i brings to `target`."""
    x = target
    for _ in range(iterations):
        eps = (x - grid.alpha[i] * denoise(x, grid[i])) / grid.sigma[i]
        x0 = (target - grid.sigma[i + 1] * eps) / grid.alpha[i + 1]
        x = grid.alpha[i] * x0 + grid.sigma[i] * eps
    return x


@torch.no_grad()
def from_noise(
    model: LatentDiffusion,
    x: Tensor,
    prompts: str | Sequence[str] | None = None,
    *,
    classes: str | Sequence[str] | None = None,
    steps: int = 30,
    guidance: float | Guidance = 1.0,
) -> list[Image.Image]:
    """Draw with DDIM from noise [B,C,h,w], such as `invert` gives; the prompts are as many, or one for all."""
    if isinstance(prompts, str):
        prompts = [prompts] * len(x)
    return drawn_from(model, x, model.read(prompts, 1, classes), steps, guidance)


@torch.no_grad()
def drawn_from(
    model: LatentDiffusion, x: Tensor, read: dict[str, Tensor], steps: int, guidance: float | Guidance
) -> list[Image.Image]:
    """`from_noise`, for what the conditioner reads."""
    sample, grid, _ = model.sampler_for("ddim", steps, x.shape[1:])
    return to_images(model.decode(sample(model.guided(read, len(x), x.shape[1:], guidance), x, grid)))


class Again(NamedTuple):
    """A picture that was inverted, and drawn from that noise."""

    picture: Image.Image
    psnr: float
    """Against the original, in dB"""
    ceiling: float
    """That of the autoencoder alone, which nothing drawn from latents can much exceed"""


@torch.no_grad()
def drawn_again(
    model: LatentDiffusion,
    picture: Image.Image,
    noise: Tensor,
    prompt: str | None = None,
    *,
    classes: str | None = None,
    steps: int = 30,
    guidance: float | Guidance = 1.0,
) -> Again:
    """How well `noise`, which `invert` gave with the same settings, stands for the picture."""
    pixels = to_pixels(model, picture)
    again = from_noise(model, noise, prompt, classes=classes, steps=steps, guidance=guidance)[0]
    coded = model.decode(model.encode(pixels)).clamp(-1, 1)
    errors = [psnr(made, pixels).item() for made in (to_pixels(model, again), coded)]
    return Again(again, *errors)


def vary(
    model: LatentDiffusion,
    picture: Image.Image,
    prompt: str | None = None,
    *,
    classes: str | None = None,
    amount: float = 0.4,
    n: int = 1,
    seed: int | Sequence[int] = 0,
    steps: int = 30,
    guidance: float | Guidance = 1.0,
) -> list[Image.Image]:
    """n pictures like this one: its noise, turned towards other noise by a share `amount` of the way.

    Raises:
        ValueError: amount lies outside [0, 1]; others as `invert`.
    """
    if not 0 <= amount <= 1:
        raise ValueError(f"amount is {amount}, but must lie in [0, 1]: 0 is the picture, 1 any other")
    require_int("n", n, 1, 2**31)
    noise = invert(model, picture, prompt, classes=classes, steps=steps, guidance=guidance)
    fresh = noise_of(seeds_of(seed, n), noise.shape[1:], model.device)(-1)
    near = torch.cat([slerp(noise, other, amount) for other in fresh.split(1)])
    return drawn_from(model, near, model.read(prompt, n, classes), steps, guidance)


@torch.no_grad()
def interpolate(
    model: LatentDiffusion,
    first: Image.Image | int,
    second: Image.Image | int,
    prompt: str | None = None,
    *,
    classes: str | None = None,
    to: str | None = None,
    count: int = 8,
    steps: int = 30,
    guidance: float | Guidance = 1.0,
) -> list[Image.Image]:
    """`count` pictures on the way between two pictures, or between what two seeds draw: slerp between their noises.

    Args:
        first, second: pictures of one size, or seeds.
        prompt: what is drawn; with `to`, at the first picture, and from there in a straight line to `to` at the
            second, through the states of the text encoder. Of one seed twice, only the prompt changes.
        classes: for a model of both, the class of all the pictures.

    Raises:
        ValueError: names what does not go together.
    """
    require_int("count", count, 2, 1000)
    size = next((upright(end).size for end in (first, second) if isinstance(end, Image.Image)), None)
    ends = [
        start_noise(model, end, size)
        if isinstance(end, int)
        else invert(model, end, told, classes=classes, steps=steps, guidance=guidance)
        for end, told in ((first, prompt), (second, prompt if to is None else to))
    ]
    one, other = ends
    if one.shape != other.shape:
        raise ValueError(
            f"first and second have latents of {[*one.shape]} and {[*other.shape]}; make them one size (--size does)"
        )
    shares = torch.linspace(0, 1, count).tolist()
    between = torch.cat([slerp(one, other, share) for share in shares])
    read = model.read(prompt, count, classes) if to is None else blended(model, prompt, to, shares, classes)
    return drawn_from(model, between, read, steps, guidance)


def start_noise(model: LatentDiffusion, seed: int, size: tuple[int, int] | None) -> Tensor:
    """What `LatentDiffusion` begins with for a seed: [1,C,h,w]."""
    return noise_of(seeds_of(seed, 1), model.latent_shape(size), model.device)(-1)


def slerp(a: Tensor, b: Tensor, share: float) -> Tensor:
    """Along the great circle from a to b, which keeps the length that noise has (Shoemake 1985)."""
    cosine = (a * b).sum() / (a.norm() * b.norm())
    angle = torch.acos(cosine.clamp(-1, 1))
    if angle < 1e-4:
        return torch.lerp(a, b, share)
    return (torch.sin((1 - share) * angle) * a + torch.sin(share * angle) * b) / torch.sin(angle)


def blended(
    model: LatentDiffusion,
    first: str | None,
    second: str,
    shares: Sequence[float],
    classes: str | None = None,
) -> dict[str, Tensor]:
    """What the encoder says of two captions, and between them at each of the shares: a batch as a cache has it."""
    text = text_of(model.conditioner)
    if text is None:
        raise ValueError(f"to is {second!r:.60}, but only captions have something between them; leave it out")
    read = {
        key: value.to(model.device) for key, value in model.read([first or "", second], 1, classes).items()
    }
    ends = text.encode(read)
    between = {
        name: torch.stack([torch.lerp(value[0], value[1], share) for share in shares])
        for name, value in ends.items()
    }
    return between | ({"label": read["label"][:1].expand(len(shares))} if "label" in read else {})
