"""Pictures from pictures by models that were trained for it: inpainting, super-resolution, restoration, segmentation.

model = LatentDiffusion.from_pretrained("runs/scenes/upscale")
upscale(model, Image.open("small.png"))[0].save("large.png")

Pictures are PIL images, turned by their EXIF orientation, alpha laid on white, of any size: where the networks need
other sides, edge pixels are repeated, and what is made is cropped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypedDict, Unpack

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.ops import masks_to_boxes
from torchvision.utils import draw_bounding_boxes

from autoencoder.tiling import require_tile, windows
from ldm import random
from ldm.checks import require_int
from ldm.degradations import compressed, noise_level
from ldm.guidance import Guidance, guided
from ldm.palette import named, palette
from ldm.paths import Grid, Level, Spacing
from ldm.pictures import to_images, to_tensor
from ldm.samplers import Denoise
from ldm.tasks import Given, Restore, Segment, Task, Upscale, noised
from pipelines.inputs import upright
from pipelines.latent_diffusion import LatentDiffusion, noise_of, seeds_of


class Sampling(TypedDict, total=False):
    """How something is drawn, as `LatentDiffusion` is told it; guidance is 1, none, by default."""

    steps: int
    sampler: str | None
    spacing: Spacing | None
    guidance: float | Guidance
    negative: str


@torch.no_grad()
def made(
    model: LatentDiffusion,
    given: Given,
    read: dict[str, Tensor],
    seeds: Sequence[int],
    *,
    steps: int = 30,
    sampler: str | None = None,
    spacing: Spacing | None = None,
    guidance: float | Guidance = 1.0,
    negative: str = "",
    tile: int | None = None,
) -> Tensor:
    """Pixels [B,3,H,W] in about [-1, 1] that the model makes of what it is given.

    Args:
        given: as `ldm.tasks` has it, for B pictures, on the CPU.
        read: their words, as `LatentDiffusion.read` gives them.
        seeds: B; the i-th picture depends on its own alone.
        tile: pixels: the U-Net and the decoder see tiles of this side, blended where they overlap.
    """
    given = {name: value.to(model.device) for name, value in given.items()}
    shape = model.latent_shape(size_of(model.task, given))
    noise = noise_of(seeds, shape, model.device)
    sample, grid, start = model.sampler_for(sampler, steps, shape, spacing)
    x = noise(-1) * start
    image = model.image(given, lambda: noise(-2))

    def told(part: Tensor) -> Denoise:
        return model.guided(read, len(seeds), (shape[0], *part.shape[2:]), guidance, negative, part)

    factor = model.autoencoder.config.factor
    denoise = told(image) if tile is None else in_tiles(told, image, tile // factor)
    return model.decode(sample(denoise, x, grid, noise=noise), tile)


def size_of(task: Task | None, given: Given) -> tuple[int, int]:
    """Width and height in pixels of what is made."""
    height, width = given["picture"].shape[2:]
    grows = task.factor if isinstance(task, Upscale) else 1
    return width * grows, height * grows


def in_tiles(told: Callable[[Tensor], Denoise], image: Tensor, side: int) -> Denoise:
    """x_0 of large latents from tiles of `side`, of which neighbours share a quarter (Bar-Tal et al. 2023).

    Args:
        told: from part of `image` [B,C',h,w] to what makes x_0 there.
    """
    down, across = (windows(length, side, side // 4) for length in image.shape[2:])
    parts = [
        (
            row.span,
            column.span,
            row.weights[:, None] * column.weights,
            told(image[:, :, row.span, column.span]),
        )
        for row in down
        for column in across
    ]

    def denoise(x: Tensor, level: Level) -> Tensor:
        x0 = torch.zeros_like(x)
        for rows, columns, weights, part in parts:
            x0[:, :, rows, columns] += weights.to(x) * part(x[:, :, rows, columns].contiguous(), level)
        return x0

    return denoise


def require_task(model: LatentDiffusion, kind: type[Task]) -> Any:
    """The task of the model; ValueError if it was not trained for this one."""
    if not isinstance(model.task, kind):
        trained = f"to {model.task.kind}" if model.task else "to draw"
        raise ValueError(f"this model was trained {trained} pictures, not to {kind.kind} them")
    return model.task


def padded(pixels: Tensor, multiple: int) -> Tensor:
    """[3,H,W] => the same with edge pixels repeated on the right and below, until `multiple` divides the sides."""
    right, below = (-side % multiple for side in (pixels.shape[2], pixels.shape[1]))
    return F.pad(pixels[None], (0, right, 0, below), mode="replicate")[0]


@torch.no_grad()
def hole_filled(
    model: LatentDiffusion,
    picture: Tensor,
    hole: Tensor,
    read: dict[str, Tensor],
    seeds: Sequence[int],
    **how: Unpack[Sampling],
) -> Tensor:
    """Pixels [B,3,H,W] with something else where hole [1,H,W] is not 0, and around it about the picture [3,H,W].

    What `editing.inpaint` begins with for a model that was trained for it: it is told the hole and what surrounds it.
    The result is that of stock `StableDiffusionInpaintPipeline` for the same seed.
    """
    factor = model.autoencoder.config.factor
    one = {"picture": padded(picture, factor), "mask": padded((hole > 0).float(), factor)}
    pixels = made(model, times(one, len(seeds)), read, seeds, **how)
    return pixels[:, :, : picture.shape[1], : picture.shape[2]].clamp(-1, 1)


@torch.no_grad()
def upscale(
    model: LatentDiffusion,
    picture: Image.Image,
    prompt: str | None = None,
    *,
    classes: str | None = None,
    noise: float = 0.0,
    samples: int = 1,
    seed: int = 0,
    tile: int | None = None,
    **how: Unpack[Sampling],
) -> Image.Image:
    """The picture as many times as large as the model was trained for.

    Args:
        prompt, classes: words for the picture, if the model is told any.
        noise: standard deviation, of pixels in [-1, 1], of noise that is added to the small picture and told: more
            lets the model invent more, and hides JPEG blocks and grain. At most what it was trained with.
        samples: drawn and averaged: more are nearer to the truth, and softer.
        tile: pixels of the result: a side beyond it is made in tiles of that side, for less memory.

    Raises:
        ValueError: the model was not trained for it, or an argument is out of range.
    """
    task = require_task(model, Upscale)
    if not 0 <= noise <= task.noise:
        raise ValueError(
            f"noise is {noise}, but must lie in [0, {task.noise}], which the model was trained with"
        )
    small, read = to_tensor(upright(picture)), model.read(prompt, samples, classes)
    factor = model.autoencoder.config.factor
    if tile is not None:
        require_tile(tile, None, factor)
    one = noised(padded(small, max(1, factor // task.factor)), noise, random.stream(seed, "task", 0))
    pixels = made(model, times(one, samples), read, seeds_of(seed, samples), tile=tile, **how)
    return averaged(pixels, small.shape[2] * task.factor, small.shape[1] * task.factor)


@torch.no_grad()
def restore(
    model: LatentDiffusion,
    picture: Image.Image,
    prompt: str | None = None,
    *,
    classes: str | None = None,
    noise: float | None = None,
    jpeg: int | None = None,
    samples: int = 1,
    seed: int = 0,
    **how: Unpack[Sampling],
) -> Image.Image:
    """The picture without its damage: any that the model was trained to undo.

    A model that was trained to draw takes away what is like noise to it: Gaussian noise and JPEG artefacts, not blur.

    Args:
        prompt, classes: words for the picture, if the model is told any; one that draws does without as well.
        noise, jpeg: for a model that draws, the damage: standard deviation, of 255, and quality, 1 to 95. Without
            either, it is noise, and estimated.
        samples: drawn and averaged: more are nearer to the truth, and softer.

    Raises:
        ValueError: the model was trained for something else, or an argument is out of range or without effect.
    """
    require_int("samples", samples, 1, 2**31)
    whole, seeds = upright(picture), seeds_of(seed, samples)
    told = prompt is not None or classes is not None
    if model.task is None:
        read = model.read(prompt, samples, classes) if told else None
        level = damage_level(model, whole, noise, jpeg, seed)
        pixels = denoised(model, whole, level, read, seeds, **how)
    else:
        require_task(model, Restore)
        if noise is not None or jpeg is not None:
            raise ValueError("noise or jpeg is given, but this model sees for itself; leave it out")
        one = {"picture": padded(to_tensor(whole), model.autoencoder.config.factor)}
        pixels = made(model, times(one, samples), model.read(prompt, samples, classes), seeds, **how)
    return averaged(pixels, whole.width, whole.height)


@torch.no_grad()
def damage_level(
    model: LatentDiffusion, picture: Image.Image, noise: float | None, jpeg: int | None, seed: int
) -> float:
    """How far the damage of a picture moves its latents: as far as the same damage again does, on another JPEG grid."""
    std = noise_level(picture) if noise is None and jpeg is None else noise or 0.0
    if not 0 <= std <= 255:
        raise ValueError(f"noise is {std}, but must lie in [0, 255]")
    again = picture
    if jpeg is not None:
        require_int("jpeg", jpeg, 1, 95)
        again = compressed(picture, jpeg, shift=4)
    factor = model.autoencoder.config.factor
    pixels, spoiled = (padded(to_tensor(one), factor)[None].to(model.device) for one in (picture, again))
    grain = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(seed)).to(pixels)
    z, moved = model.encode(pixels), model.encode(spoiled + std / 127.5 * grain)
    return float((moved - z).square().mean().sqrt())


ANOTHER_EACH_TIME = ("ddpm", "euler_ancestral", "dpmpp_2m_sde")
"""Samplers that renew noise: the others make the same of a picture whatever the seed"""


def denoised(
    model: LatentDiffusion,
    picture: Image.Image,
    level: float,
    read: dict[str, Tensor] | None,
    seeds: Sequence[int],
    *,
    steps: int = 30,
    sampler: str | None = None,
    spacing: Spacing | None = None,
    guidance: float | Guidance = 1.0,
    negative: str = "",
) -> Tensor:
    """Sampling that begins with the picture, as if it were noise of `level`, sigma / alpha, in its latents.

    Args:
        read: words for each sample; None for none in particular.
        sampler: by default the model's, or for several samples ddpm.
    """
    if read is None and (guidance != 1 or negative):
        raise ValueError("guidance or negative is given, but there is no prompt to be guided by; give one")
    if len(seeds) > 1 and (sampler := sampler or "ddpm") not in ANOTHER_EACH_TIME:
        raise ValueError(
            f"samples is {len(seeds)}, but sampler {sampler} makes the same each time; "
            f"choose one of {', '.join(ANOTHER_EACH_TIME)}"
        )
    z = model.encode(padded(to_tensor(picture), model.autoencoder.config.factor)[None].to(model.device))
    sample, grid, _ = model.sampler_for(sampler, steps, z.shape[1:], spacing)
    first = int((grid.sigma / grid.alpha > level).sum())
    if first == len(grid):
        raise ValueError(
            f"the damage is less than the last of {steps} steps removes; raise steps, or say how strong it is (noise, "
            "jpeg). Blur takes a model that was trained to restore"
        )
    rest = Grid(grid.t[first:], grid.alpha[first:], grid.sigma[first:])
    if read is None:
        height, width = (side * model.autoencoder.config.factor for side in z.shape[2:])
        denoise = guided(model.denoiser(), model.null("", len(seeds)).sized(height, width), None)
    else:
        denoise = model.guided(read, len(seeds), z.shape[1:], guidance, negative)
    x = rest.alpha[0] * z.expand(len(seeds), *z.shape[1:])
    return model.decode(sample(denoise, x, rest, noise=noise_of(seeds, z.shape[1:], model.device)))


class Segmentation(NamedTuple):
    """What each pixel shows."""

    classes: tuple[str, ...]
    """Their names; the first is for where there is nothing"""
    numbers: np.ndarray
    """[H,W] uint8, a class each"""
    confidence: np.ndarray
    """[H,W] float32 in (0, 1], the share of samples that say so"""

    def boxes(self) -> dict[str, list[int]]:
        """Left, top, right and bottom pixel of each class that is there, but the first."""
        there = [number for number in np.unique(self.numbers).tolist() if number]
        if not there:
            return {}
        masks = torch.stack([torch.from_numpy(self.numbers == number) for number in there])
        boxes = masks_to_boxes(masks).int().tolist()
        return {self.classes[number]: box for number, box in zip(there, boxes, strict=True)}

    def over(self, picture: Image.Image) -> Image.Image:
        """The boxes drawn over the picture, with names."""
        pixels = torch.from_numpy(np.array(upright(picture))).permute(2, 0, 1)
        boxes = self.boxes()
        if boxes:
            corners = torch.tensor([*boxes.values()])
            pixels = draw_bounding_boxes(pixels, corners, labels=[*boxes], colors="red")
        return Image.fromarray(pixels.permute(1, 2, 0).numpy())

    def picture(self) -> Image.Image:
        """A palette picture whose values are the numbers, as masks are read for training."""
        image = Image.fromarray(self.numbers, "P")
        image.putpalette(palette(len(self.classes)).tobytes())
        return image


@torch.no_grad()
def segment(
    model: LatentDiffusion,
    picture: Image.Image,
    prompt: str | None = None,
    *,
    classes: str | None = None,
    samples: int = 8,
    seed: int = 0,
    **how: Unpack[Sampling],
) -> Segmentation:
    """The class that most of some samples give each pixel; prompt and classes are words, if the model is told any.

    Raises:
        ValueError: the model was not trained for it, or an argument is out of range.
    """
    task = require_task(model, Segment)
    whole, read = to_tensor(upright(picture)), model.read(prompt, samples, classes)
    one = {"picture": padded(whole, model.autoencoder.config.factor)}
    pixels = made(model, times(one, samples), read, seeds_of(seed, samples), **how)
    return voted(pixels[:, :, : whole.shape[1], : whole.shape[2]], task.classes)


def voted(pixels: Tensor, classes: tuple[str, ...]) -> Segmentation:
    """Pictures of masks [B,3,H,W] in [-1, 1], samples of the same one, as the class that most of them say."""
    votes = np.stack([named(np.asarray(image), len(classes)) for image in to_images(pixels)])
    shares = np.stack([(votes == number).mean(0) for number in range(len(classes))])
    return Segmentation(classes, shares.argmax(0).astype(np.uint8), shares.max(0).astype(np.float32))


def averaged(pixels: Tensor, width: int, height: int) -> Image.Image:
    """The mean of pictures [B,3,H,W], cropped to a size."""
    return to_images(pixels[:, :, :height, :width].clamp(-1, 1).mean(0, keepdim=True))[0]


def times(one: dict[str, Tensor], n: int) -> dict[str, Tensor]:
    """What one picture gives as a batch of n."""
    require_int("samples", n, 1, 2**31)
    return {name: value.expand(n, *value.shape) for name, value in one.items()}
