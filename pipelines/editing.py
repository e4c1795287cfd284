"""Pictures from pictures: image to image, inpainting and outpainting, inversion and interpolation.

Each works with any latent model as it was trained, but one of captions and classes together. Pictures are PIL images,
turned by their EXIF orientation, alpha laid on white; sides are multiples of the model's factor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor

from ldm.checks import require_int
from ldm.conditioning import ClassAndText
from ldm.paths import Grid
from ldm.pictures import to_images, to_tensor
from ldm.samplers import Adjust, Denoise, Noise, Sampler
from pipelines.latent_diffusion import LatentDiffusion, noise_of

Prompts = str | Sequence[str] | None


@torch.no_grad()
def image_to_image(
    model: LatentDiffusion,
    picture: Image.Image,
    prompts: Prompts = None,
    *,
    strength: float = 0.6,
    steps: int = 30,
    sampler: str | None = None,
    guidance: float = 4.0,
    negative: str = "",
    n: int = 1,
    seed: int = 0,
) -> list[Image.Image]:
    """Noise the picture part of the way and denoise it as the prompt says (SDEdit, Meng et al. 2022).

    Args:
        strength: share of the steps that are done, in (0, 1]: low stays near the picture, 1 keeps hardly anything.
        n, seed: n pictures for each prompt; picture i is drawn from seed + i.

    Raises:
        ValueError: names an argument out of range; a side that the factor does not divide, with the nearest that is.
    """
    read, count = reading(model, prompts, n)
    pixels = to_pixels(model, picture).expand(count, -1, -1, -1)
    noise = noise_of(range(seed, seed + count), latent_shape(model, pixels), model.device)
    z = model.encode(pixels, noise(-2))
    sample, grid, _ = model.sampler_for(sampler, steps, z.shape[1:])
    grid = grid.from_strength(strength)
    x = grid.alpha[0] * z + grid.sigma[0] * noise(-1)
    denoise = model.guided(read, count, z.shape[1:], guidance, negative)
    return to_images(model.decode(sample(denoise, x, grid, noise=noise)))


@torch.no_grad()
def inpaint(
    model: LatentDiffusion,
    picture: Image.Image,
    mask: Image.Image,
    prompts: Prompts = None,
    *,
    soft: int = 0,
    resample: int = 1,
    steps: int = 30,
    sampler: str | None = None,
    guidance: float = 4.0,
    negative: str = "",
    n: int = 1,
    seed: int = 0,
) -> list[Image.Image]:
    """Draw anew where the mask is white; where it is black, the picture's own pixels come back exactly.

    After each step the known latents are put back, noised to its level (Lugmayr et al. 2022, eq. 8; what stock
    inpainting does with a U-Net of 4 channels).

    Args:
        mask: of the picture's size; white is the hole, grey mixes.
        soft: pixels by which the edge of the hole is blurred outwards; known pixels further away stay exact.
        resample: how often each step is done, with noise added in between, so that the hole can adapt to its
            surroundings (RePaint, section 4.2); above 1 only for samplers of one evaluation without memory.

    Raises:
        ValueError: as `image_to_image`; a mask of another size, or without a hole.
    """
    require_int("resample", resample, 1, 100)
    if model.task:
        from pipelines import tasks

        if resample != 1:
            raise ValueError(f"resample is {resample}, which a model trained to fill holes does without")
        how: Any = {"sampler": sampler, "guidance": guidance, "negative": negative, "n": n, "seed": seed}
        return tasks.inpaint(model, picture, mask, prompts, soft=soft, steps=steps, **how)
    hole = to_mask(mask, picture, soft)
    read, count = reading(model, prompts, n)
    pixels = to_pixels(model, picture).expand(count, -1, -1, -1)
    noise = noise_of(range(seed, seed + count), latent_shape(model, pixels), model.device)
    z = model.encode(pixels, noise(-2))
    sample, grid, start = model.sampler_for(sampler, steps, z.shape[1:])
    fresh = noise(-1)
    here = torch.nn.functional.interpolate((hole > 0).float(), size=z.shape[2:], mode="area").to(z.device) > 0

    def keep(i: int, x: Tensor) -> Tensor:
        known = grid.alpha[i + 1] * z + grid.sigma[i + 1] * fresh
        return torch.where(here, x, known)

    denoise = model.guided(read, count, z.shape[1:], guidance, negative)
    if resample == 1:
        x = sample(denoise, fresh * start, grid, noise=noise, adjust=keep)
    else:
        x = resampled(model, sampler, sample, denoise, fresh * start, grid, noise, keep, resample)
    made = model.decode(x).clamp(-1, 1)
    hole = hole.to(made.device)
    return to_images(made * hole + pixels * (1 - hole))


ONE_STEP = ("ddpm", "ddim", "euler", "euler_ancestral", "heun")


def resampled(
    model: LatentDiffusion,
    name: str | None,
    sample: Sampler,
    denoise: Denoise,
    x: Tensor,
    grid: Grid,
    noise: Noise,
    keep: Adjust,
    times: int,
) -> Tensor:
    """Each step of the grid `times` times, noised back to where it began in between (Lugmayr et al., algorithm 1)."""
    if (name or model.sampler) not in ONE_STEP:
        raise ValueError(
            f"resample is {times}, which sampler {name or model.sampler} can't do, as it looks back on earlier steps; "
            f"choose one of {', '.join(ONE_STEP)}"
        )
    for i in range(len(grid)):
        one = Grid(grid.t[i : i + 2], grid.alpha[i : i + 2], grid.sigma[i : i + 2])
        repeats = times if grid.sigma[i + 1] > 0 else 1
        for again in range(repeats):
            x = keep(i, sample(denoise, x, one, noise=noise))
            if again < repeats - 1:
                x = renoised(x, grid, i, noise(i))
    return x


def renoised(x: Tensor, grid: Grid, i: int, noise: Tensor) -> Tensor:
    """x at level i + 1 => at the noisier level i: scaled by the ratio of signals, the missing variance added."""
    ratio = grid.alpha[i] / grid.alpha[i + 1]
    missing = grid.sigma[i] ** 2 - (ratio * grid.sigma[i + 1]) ** 2
    return ratio * x + missing.clamp(min=0).sqrt() * noise


def outpaint(
    model: LatentDiffusion,
    picture: Image.Image,
    size: tuple[int, int],
    prompts: Prompts = None,
    **settings: object,
) -> list[Image.Image]:
    """The picture in the middle of a larger one of (width, height), the surroundings drawn; settings as `inpaint`.

    Raises:
        ValueError: as `inpaint`; a size smaller than the picture.
    """
    picture = upright(picture)
    if size[0] < picture.width or size[1] < picture.height:
        raise ValueError(f"size is {size}, smaller than the picture's {picture.size}; nothing would be added")
    left, top = (size[0] - picture.width) // 2, (size[1] - picture.height) // 2
    average = picture.resize((1, 1), Image.Resampling.BOX)
    canvas, mask = average.resize(size), Image.new("L", size, 255)
    canvas.paste(picture, (left, top))
    mask.paste(0, (left, top, left + picture.width, top + picture.height))
    return inpaint(model, canvas, mask, prompts, **settings)  # type: ignore[arg-type]


@torch.no_grad()
def invert(
    model: LatentDiffusion,
    picture: Image.Image,
    prompt: str | None = None,
    *,
    steps: int = 30,
    guidance: float = 1.0,
    iterations: int = 5,
) -> Tensor:
    """The noise [1,C,h,w] from which DDIM with the same prompt, steps and guidance draws this picture.

    Each DDIM step x' = f(x) is solved for x by fixed-point iteration from x = x' (Pan et al. 2023); one iteration is
    plain DDIM inversion (Song et al. 2021, section 4.3). It converges slowly or not at all at high guidance.
    """
    require_int("iterations", iterations, 1, 100)
    read, _ = reading(model, prompt, 1)
    z = model.encode(to_pixels(model, picture))
    _, grid, _ = model.sampler_for("ddim", steps, z.shape[1:])
    denoise = model.guided(read, 1, z.shape[1:], guidance)
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
    model: LatentDiffusion, x: Tensor, prompts: Prompts = None, *, steps: int = 30, guidance: float = 1.0
) -> list[Image.Image]:
    """Draw with DDIM from noise [B,C,h,w], such as `invert` gives; the prompts are as many, or one for all."""
    if isinstance(prompts, str):
        prompts = [prompts] * len(x)
    read, _ = reading(model, prompts, 1)
    sample, grid, _ = model.sampler_for("ddim", steps, x.shape[1:])
    return to_images(model.decode(sample(model.guided(read, len(x), x.shape[1:], guidance), x, grid)))


def interpolate(
    model: LatentDiffusion,
    first: Image.Image | int,
    second: Image.Image | int,
    prompt: str | None = None,
    *,
    count: int = 8,
    steps: int = 30,
    guidance: float = 1.0,
) -> list[Image.Image]:
    """`count` pictures on the way between two pictures, or between what two seeds draw: slerp between their noises."""
    require_int("count", count, 2, 1000)
    ends = [
        start_noise(model, end)
        if isinstance(end, int)
        else invert(model, end, prompt, steps=steps, guidance=guidance)
        for end in (first, second)
    ]
    one, other = ends
    if one.shape != other.shape:
        raise ValueError(
            f"first and second have latents of {[*one.shape]} and {[*other.shape]}; make them one size"
        )
    between = torch.cat([slerp(one, other, share) for share in torch.linspace(0, 1, count).tolist()])
    return from_noise(model, between, prompt, steps=steps, guidance=guidance)


def start_noise(model: LatentDiffusion, seed: int) -> Tensor:
    require_int("seed", seed, 0, 2**62)
    shape = model.latent_shape(None)
    return noise_of([seed], shape, model.device)(-1)


def slerp(a: Tensor, b: Tensor, share: float) -> Tensor:
    """Along the great circle from a to b, which keeps the length that noise has (Shoemake 1985)."""
    cosine = (a * b).sum() / (a.norm() * b.norm())
    angle = torch.acos(cosine.clamp(-1, 1))
    if angle < 1e-4:
        return torch.lerp(a, b, share)
    return (torch.sin((1 - share) * angle) * a + torch.sin(share * angle) * b) / torch.sin(angle)


def reading(model: LatentDiffusion, prompts: Prompts, n: int) -> tuple[dict[str, Tensor], int]:
    """What the conditioner reads, and how many samples that makes."""
    require_int("n", n, 1, 2**31)
    if isinstance(model.conditioner, ClassAndText):
        raise ValueError(
            "this model is told captions and classes together, with which pictures can only be drawn"
        )
    read = model.read(prompts, n)
    return read, len(next(iter(read.values()))) if read else n


def upright(picture: Image.Image) -> Image.Image:
    """RGB, turned by its EXIF orientation, transparency on white."""
    turned = ImageOps.exif_transpose(picture)
    if turned.mode in ("RGBA", "LA", "PA") or "transparency" in turned.info:
        layer = turned.convert("RGBA")
        ground = Image.new("RGBA", layer.size, "white")
        turned = Image.alpha_composite(ground, layer)
    return turned.convert("RGB")


def to_pixels(model: LatentDiffusion, picture: Image.Image) -> Tensor:
    """[1,3,H,W] in [-1, 1] on the model's device; ValueError for a side that its factor does not divide."""
    picture = upright(picture)
    model.latent_shape(picture.size)
    return to_tensor(picture)[None].to(model.device)


def latent_shape(model: LatentDiffusion, pixels: Tensor) -> tuple[int, int, int]:
    return model.latent_shape((pixels.shape[3], pixels.shape[2]))


def to_mask(mask: Image.Image, picture: Image.Image, soft: int) -> Tensor:
    """[1,1,H,W] in [0, 1], 1 in the hole; ValueError for another size than the picture's, or no hole."""
    require_int("soft", soft, 0, 1000)
    size = ImageOps.exif_transpose(picture).size
    if mask.size != size:
        raise ValueError(f"mask has the size {mask.size}, but the picture {size}; make them one size")
    grey = mask.convert("L")
    if not grey.getextrema()[1]:
        raise ValueError(
            "mask is black everywhere, so that nothing would be drawn; white marks what to draw anew"
        )
    if soft:
        wide = grey.filter(ImageFilter.MaxFilter(2 * math.ceil(soft / 2) + 1))
        grey = wide.filter(ImageFilter.BoxBlur(soft / 2))
    return to_tensor(grey.convert("RGB"))[None, :1].add(1).div(2)
