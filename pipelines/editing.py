"""Pictures from pictures: image to image, inpainting and outpainting.

Each works with any latent model as it was trained. Pictures are PIL images, turned by their EXIF orientation, alpha
laid on white; sides are multiples of the model's factor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from ldm.checks import require_int
from ldm.guidance import Guidance
from ldm.paths import Grid, Spacing
from ldm.pictures import to_images, to_tensor
from ldm.samplers import Adjust, Denoise, Noise, Sampler
from ldm.tasks import Inpaint
from pipelines.inputs import filled, softened, to_mask, to_pixels, upright
from pipelines.latent_diffusion import LatentDiffusion, noise_of, seeds_of
from pipelines.tasks import hole_filled, require_task

Prompts = str | Sequence[str] | None


class Start(NamedTuple):
    """What drawing B pictures from one begins with."""

    z: Tensor  # [B,C,h,w] a sample of the picture's latents for each
    fresh: Tensor  # [B,C,h,w] standard normal noise to begin with
    noise: Noise  # and that for samplers that renew it
    denoise: Denoise


def begin(
    model: LatentDiffusion,
    pixels: Tensor,
    prompts: Prompts,
    classes: Prompts,
    guidance: float | Guidance,
    negative: str,
    n: int,
    seed: int | Sequence[int],
) -> Start:
    """Encode pixels [1,3,H,W] and read what is told of them; noise is drawn in the order of stock pipelines."""
    read, seeds = told(model, prompts, classes, n, seed)
    shape = model.latent_shape((pixels.shape[3], pixels.shape[2]))
    noise = noise_of(seeds, shape, model.device)
    z = model.encode(pixels, noise(-2))
    denoise = model.guided(read, len(seeds), shape, guidance, negative)
    return Start(z, noise(-1), noise, denoise)


def told(
    model: LatentDiffusion, prompts: Prompts, classes: Prompts, n: int, seed: int | Sequence[int]
) -> tuple[dict[str, Tensor], Sequence[int]]:
    """The words of each picture, n for a prompt, as the conditioner reads them, and its seed."""
    require_int("n", n, 1, 2**31)
    read = model.read(prompts, n, classes)
    return read, seeds_of(seed, len(next(iter(read.values()))) if read else n)


@torch.no_grad()
def image_to_image(
    model: LatentDiffusion,
    picture: Image.Image,
    prompts: Prompts = None,
    *,
    classes: Prompts = None,
    strength: float = 0.6,
    steps: int = 30,
    sampler: str | None = None,
    spacing: Spacing | None = None,
    guidance: float | Guidance = 4.0,
    negative: str = "",
    n: int = 1,
    seed: int | Sequence[int] = 0,
) -> list[Image.Image]:
    """Noise the picture part of the way and denoise it as the prompt says (SDEdit, Meng et al. 2022).

    Args:
        strength: share of the steps that are done, in (0, 1]: low stays near the picture, 1 keeps hardly anything.
        classes and others: as for `LatentDiffusion`; the pictures are drawn together.

    Raises:
        ValueError: names an argument out of range; a side that the factor does not divide, with the nearest that is.
    """
    start = begin(model, to_pixels(model, picture), prompts, classes, guidance, negative, n, seed)
    sample, grid, _ = model.sampler_for(sampler, steps, start.z.shape[1:], spacing)
    grid = grid.from_strength(strength)
    x = grid.alpha[0] * start.z + grid.sigma[0] * start.fresh
    return to_images(model.decode(sample(start.denoise, x, grid, noise=start.noise)))


@torch.no_grad()
def inpaint(
    model: LatentDiffusion,
    picture: Image.Image,
    mask: Image.Image,
    prompts: Prompts = None,
    *,
    classes: Prompts = None,
    soft: int = 0,
    resample: int = 1,
    steps: int = 30,
    sampler: str | None = None,
    spacing: Spacing | None = None,
    guidance: float | Guidance = 4.0,
    negative: str = "",
    n: int = 1,
    seed: int | Sequence[int] = 0,
) -> list[Image.Image]:
    """Draw anew where the mask is white; where it is black, the picture's own pixels come back exactly.

    After each step the known latents are put back, noised to its level (Lugmayr et al. 2022, eq. 8; what stock
    inpainting does with a U-Net of 4 channels); a model that was trained to fill holes is told what is known instead.
    What the picture shows in the hole has no part in it, and the colours of what was drawn are shifted so that it meets
    the known pixels.

    Args:
        mask: of the picture's size; white is the hole, grey mixes.
        soft: pixels by which the edge of the hole is blurred outwards; known pixels further away stay exact.
        resample: how often each step is done, with noise added in between, so that the hole can adapt to its
            surroundings (RePaint, section 4.2); above 1 only for samplers of one evaluation without memory.
        classes and others: as for `LatentDiffusion`; the pictures are drawn together.

    Raises:
        ValueError: as `image_to_image`; a mask of another size, without a hole, or without anything else.
    """
    require_int("resample", resample, 1, 100)
    hole = to_mask(mask, picture).to(model.device)
    edge = softened(hole, soft)
    if model.task:
        require_task(model, Inpaint)
        if resample != 1:
            raise ValueError(f"resample is {resample}, which a model trained to fill holes does without")
        read, seeds = told(model, prompts, classes, n, seed)
        pixels = to_tensor(upright(picture))[None].to(model.device)
        how: dict[str, Any] = {"steps": steps, "sampler": sampler, "spacing": spacing, "guidance": guidance}
        made = hole_filled(model, pixels[0], edge[0], read, seeds, **how, negative=negative)
        return to_images(joined(made, pixels, edge))
    pixels = to_pixels(model, picture)
    covered = filled(pixels, (hole == 0).to(pixels))
    start = begin(model, covered, prompts, classes, guidance, negative, n, seed)
    x = drawn_in(model, hole, start, steps, sampler, spacing, resample)
    return to_images(joined(model.decode(x).clamp(-1, 1), pixels, edge))


def drawn_in(
    model: LatentDiffusion,
    hole: Tensor,
    start: Start,
    steps: int,
    sampler: str | None,
    spacing: Spacing | None,
    resample: int,
) -> Tensor:
    """Latents [B,C,h,w] drawn where hole [1,1,H,W] is not 0, around it those of the picture; settings as `inpaint`."""
    sample, grid, scale = model.sampler_for(sampler, steps, start.z.shape[1:], spacing)
    here = torch.nn.functional.adaptive_max_pool2d(hole, start.z.shape[2:]) > 0

    def keep(i: int, x: Tensor) -> Tensor:
        known = grid.alpha[i + 1] * start.z + grid.sigma[i + 1] * start.fresh
        return torch.where(here, x, known)

    x = start.fresh * scale
    if resample == 1:
        return sample(start.denoise, x, grid, noise=start.noise, adjust=keep)
    require_one_step(sampler or model.sampler, resample)
    return resampled(sample, start, x, grid, keep, resample)


def joined(made: Tensor, pixels: Tensor, edge: Tensor) -> Tensor:
    """What was drawn [B,3,H,W], inside pictures [1 or B,3,H,W]: where edge [1 or B,1,H,W] is 0, exactly these.

    By how much the two differ outside of the hole is taken from what was drawn, going over smoothly into the hole, so
    that no seam shows (Farbman et al. 2009 do so with coordinates instead of `filled`).
    """
    made = made + filled(pixels - made, (edge == 0).to(pixels))
    return made * edge + pixels * (1 - edge)


ONE_STEP = ("ddpm", "ddim", "euler", "euler_ancestral", "heun")


def require_one_step(sampler: str, resample: int) -> None:
    """ValueError for a sampler that looks back on earlier steps."""
    if sampler not in ONE_STEP:
        raise ValueError(
            f"resample is {resample}, which sampler {sampler} can't do, as it looks back on earlier steps; "
            f"choose one of {', '.join(ONE_STEP)}"
        )


def resampled(sample: Sampler, start: Start, x: Tensor, grid: Grid, keep: Adjust, times: int) -> Tensor:
    """Each step of the grid `times` times, noised back to where it began in between (Lugmayr et al., algorithm 1)."""
    for i in range(len(grid)):
        one = Grid(grid.t[i : i + 2], grid.alpha[i : i + 2], grid.sigma[i : i + 2])
        repeats = times if grid.sigma[i + 1] > 0 else 1
        for again in range(repeats):
            x = keep(i, sample(start.denoise, x, one, noise=start.noise))
            if again < repeats - 1:
                x = renoised(x, grid, i, start.noise(i))
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
        ValueError: as `inpaint`; a size that is not larger than the picture.
    """
    picture = upright(picture)
    if size[0] < picture.width or size[1] < picture.height or size == picture.size:
        raise ValueError(
            f"size is {size}, not larger than the picture's {picture.size}; nothing would be added"
        )
    left, top = (size[0] - picture.width) // 2, (size[1] - picture.height) // 2
    canvas, mask = Image.new("RGB", size), Image.new("L", size, 255)
    canvas.paste(picture, (left, top))
    mask.paste(0, (left, top, left + picture.width, top + picture.height))
    return inpaint(model, canvas, mask, prompts, **settings)  # type: ignore[arg-type]
