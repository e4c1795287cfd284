"""A latent diffusion model, ready to draw.

from pipelines import LatentDiffusion
model = LatentDiffusion.from_pretrained("runs/scenes/ldm")
model("a large red circle at the top left on a white background", seed=1)[0].show()
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from autoencoder import tiling
from autoencoder.fast import Prepared as Decoder
from autoencoder.kl import AutoencoderKL
from autoencoder.packed import Kept
from autoencoder.store import weight_hash
from ldm.checks import require_int
from ldm.conditioning import ClassAndText, ClassLabels, Cond, Conditioner, Unconditional, labels_of, text_of
from ldm.denoiser import Denoiser
from ldm.device import DTYPES, Precision, to_decode, to_draw
from ldm.guidance import Guidance, guided
from ldm.paths import Flow, Grid, Spacing
from ldm.paths import Path as NoisePath
from ldm.pictures import to_images
from ldm.prediction import Prediction
from ldm.samplers import SAMPLERS, WITH_ETA, Denoise, Noise, Sampler
from ldm.tasks import Given, Task
from ldm.unet import UNet
from pipelines.prompts import READING, as_text, as_texts, warn_of_unread
from pipelines.schedulers import sampling_grid


@dataclass(kw_only=True)
class LatentDiffusion:
    """Everything that drawing needs. All parts live on one device; weights are not changed.

    Nothing of a call is kept for the next, so that threads may draw with one object at once.
    `sampler` is the one that is used unless a call names another, and the one that a saved folder names, with the
    `spacing` of its steps; without, the sampler's usual one.
    In `precision` bf16 drawing is faster, and pictures differ slightly. With `fast`, networks are prepared for a CPU
    (`ldm.fast`), which changes results by rounding, and stay so while the same sizes are drawn, which takes as much
    memory again as they do, or some times as much; without, they are run as they are. Weights may change between
    drawings (`autoencoder.packed.Kept`).
    `reuse` above 1 computes the coarser levels of the U-Net once in so many steps (DeepCache, Ma et al. 2024): faster,
    and other pictures.
    """

    autoencoder: AutoencoderKL
    unet: UNet
    conditioner: Conditioner
    path: NoisePath
    prediction: Prediction
    sampler: str = "dpmpp_2m"
    spacing: Spacing | None = None
    task: Task | None = None
    """If it begins with a picture: `pipelines.tasks` is what such a model is for."""
    precision: Precision = "f32"
    fast: bool = True
    reuse: int = 1
    _layers: Kept[Any] = field(default_factory=Kept, init=False, repr=False, compare=False)
    _decoder: Kept[Decoder] = field(default_factory=Kept, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        require_int("reuse", self.reuse, 1, 2**31)
        if self.precision not in DTYPES:
            raise ValueError(f"precision is {self.precision!r}; choose one of {', '.join(DTYPES)}")

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels of what it draws unless asked for another."""
        _, height, width = self.latent_shape(None)
        return width * self.autoencoder.config.factor, height * self.autoencoder.config.factor

    @property
    def device(self) -> torch.device:
        return next(self.unet.parameters()).device

    def to(self, device: str | torch.device) -> Self:
        """Move all parts to a device."""
        for part in (self.autoencoder, self.unet, self.conditioner):
            part.to(device)
        return self

    @torch.no_grad()
    def __call__(
        self,
        prompts: str | Sequence[str] | None = None,
        *,
        classes: str | Sequence[str] | None = None,
        steps: int = 30,
        sampler: str | None = None,
        spacing: Spacing | None = None,
        guidance: float | Guidance = 4.0,
        negative: str = "",
        n: int = 1,
        seed: int | Sequence[int] = 0,
        size: tuple[int, int] | None = None,
        batch: int = 16,
        tile: int | None = None,
        eta: float | None = None,
        weak: LatentDiffusion | None = None,
        progress: bool = False,
    ) -> list[Image.Image]:
        """Draw `n` pictures for each prompt, in the order of the prompts.

        Args:
            prompts: captions, or names of classes, "" for none in particular; None for a model that is told nothing.
            classes: for a model of both, the name of a class, or one for each caption.
            steps: sampling steps, from 1 to the number of training levels.
            sampler: one of `ldm.samplers.SAMPLERS`; by default the model's.
            spacing: of the steps, one of the path's; by default the model's, or that usual for another sampler.
            guidance: scale of classifier-free guidance; 1 is none, and costs half as much. Or a `Guidance`.
            negative: caption to be guided away from; only for models of captions.
            seed: picture i is drawn from seed + i, whatever is drawn beside it; or a list, a seed for each picture.
            size: (width, height) in pixels; by default that of training.
            batch: pictures drawn together.
            tile: larger pictures are decoded in tiles of this side: less memory, faint seams (`autoencoder.tiling`).
            eta: share of the noise that is renewed in each step, of samplers that leave it open; by default 0.
            weak: a weaker model, such as an earlier checkpoint, to be guided away from instead of the null condition.

        Raises:
            ValueError: names what is out of range or unknown, or seeds that are not as many as the pictures.
            TypeError: names an argument of another type, such as a prompt that is no text.
        """
        require_int("n", n, 1, 2**31)
        require_int("batch", batch, 1, 2**31)
        if tile is not None:
            tiling.require_tile(tile, None, self.autoencoder.config.factor)
        if weak:
            self.require_weak(weak, negative)
        read = self.read(prompts, n, classes)
        count = len(next(iter(read.values()))) if read else n
        seeds = seeds_of(seed, count)
        shape = self.latent_shape(size)
        sample, grid, start = self.sampler_for(sampler, steps, shape, spacing, eta)
        images: list[Image.Image] = []
        with tqdm(total=count, unit="img", disable=not progress) as bar:
            for part in (slice(first, min(count, first + batch)) for first in range(0, count, batch)):
                some = {key: value[part] for key, value in read.items()}
                noise = noise_of(seeds[part], shape, self.device)
                denoise = self.guided(some, len(seeds[part]), shape, guidance, negative, weak=weak)
                images += to_images(self.decode(sample(denoise, noise(-1) * start, grid, noise=noise), tile))
                bar.update(len(seeds[part]))
        return images

    def sampler_for(
        self,
        sampler: str | None,
        steps: int,
        shape: Sequence[int],
        spacing: Spacing | None = None,
        eta: float | None = None,
    ) -> tuple[Sampler, Grid, float]:
        """A sampler, by default the model's, its levels for latents of (C, h, w), and what the first noise is times."""
        spacing = spacing or (self.spacing if sampler in (None, self.sampler) else None)
        sampler = sampler or self.sampler
        if sampler not in SAMPLERS:
            raise ValueError(f"sampler is {sampler!r}; choose one of {', '.join(SAMPLERS)}")
        if eta is not None and sampler not in WITH_ETA:
            raise ValueError(
                f"eta is {eta}, but sampler {sampler} has none to choose; {', '.join(WITH_ETA)} have"
            )
        chosen = SAMPLERS[sampler] if eta is None else partial(WITH_ETA[sampler], eta=eta)
        path = self.path.at(shape[1] * shape[2]) if isinstance(self.path, Flow) else self.path
        return chosen, *sampling_grid(path, sampler, steps, spacing)

    def guided(
        self,
        read: dict[str, Tensor],
        n: int,
        shape: Sequence[int],
        guidance: float | Guidance,
        negative: str = "",
        image: Tensor | None = None,
        weak: LatentDiffusion | None = None,
    ) -> Denoise:
        """What a sampler takes, for n samples with latents of (C, h, w), told what `read` gave.

        Args:
            image: what the model's task is given of pictures, [n,C',h,w]; it is the same with and without the words.
            weak: told the same by its own conditioner, and guided away from; `require_weak` says whether it fits.

        Raises:
            ValueError: the image is missing, as something is asked of the model that it was not trained for.
        """
        if self.task is not None and image is None:
            raise ValueError(f"this model was trained to {self.task.kind} pictures, and can do nothing else")
        if negative and (guidance.scale if isinstance(guidance, Guidance) else guidance) == 1:
            raise ValueError(
                f"negative is {negative!r:.60}, but guidance is 1: none; raise it, or leave this out"
            )
        height, width = (side * self.autoencoder.config.factor for side in shape[1:])
        cond = self.conditioner({key: value.to(self.device) for key, value in read.items()})
        null = (
            weak.conditioner({k: v.to(self.device) for k, v in read.items()})
            if weak
            else self.null(negative, n)
        )
        to, away = (c.sized(height, width)._replace(image=image) for c in (cond, null))
        return guided(self.denoiser(), to, away, guidance, weak=weak.denoiser() if weak else None)

    def require_weak(self, weak: LatentDiffusion, negative: str) -> None:
        """ValueError if a model can't be what this one is guided away from."""
        if negative:
            raise ValueError(f"negative is {negative!r}, but weak is what is guided away from; leave one out")
        if weight_hash(weak.autoencoder.state_dict()) != weight_hash(self.autoencoder.state_dict()):
            raise ValueError("weak has another autoencoder than the model that it should guide")
        words, own = text_of(self.conditioner), text_of(weak.conditioner)
        if (words and words.vocabulary_hash()) != (own and own.vocabulary_hash()):
            raise ValueError("weak has another vocabulary than the model that it should guide")
        classes, named = labels_of(self.conditioner), labels_of(weak.conditioner)
        if (classes and classes.classes) != (named and named.classes):
            raise ValueError("weak has other classes than the model that it should guide")

    def read(
        self, prompts: str | Sequence[str] | None, n: int, classes: str | Sequence[str] | None = None
    ) -> dict[str, Tensor]:
        """Prompts, each n times, as the conditioner's batch; `Unread` warns of what is too long, or strange to it."""
        if classes is not None and not isinstance(self.conditioner, ClassAndText):
            raise ValueError("classes are given, but this model is not told both captions and classes")
        if isinstance(self.conditioner, Unconditional):
            if prompts is not None:
                raise ValueError("prompts are given, but this model draws without; leave them out")
            return {}
        if prompts is None:
            raise ValueError(f"prompts is None, but this model needs {self.needs}")
        names = as_texts("prompts", prompts)
        repeated = [name for name in names for _ in range(n)]
        with READING:
            if text := text_of(self.conditioner):
                warn_of_unread(text, names)
            if not isinstance(self.conditioner, ClassAndText):
                return self.conditioner.read(repeated)
            return self.conditioner.read(repeated, self._classes(classes, len(names), n))

    @staticmethod
    def _classes(classes: str | Sequence[str] | None, prompts: int, n: int) -> list[str]:
        """The class of each picture of so many prompts."""
        if classes is None:
            raise ValueError("classes is None, but this model needs the name of a class with each caption")
        given = as_texts("classes", classes)
        given = given * prompts if len(given) == 1 else given
        if len(given) != prompts:
            raise ValueError(
                f"there are {len(given)} classes for {prompts} prompts; give one, or one a prompt"
            )
        return [name for name in given for _ in range(n)]

    @property
    def needs(self) -> str:
        """What a prompt is to this model."""
        return "the name of a class" if isinstance(self.conditioner, ClassLabels) else "a caption"

    def null(self, negative: str, n: int) -> Cond:
        """The condition to be guided away from, for n samples."""
        if not as_text("negative", negative):
            return self.conditioner.null(n)
        text = text_of(self.conditioner)
        if text is None:
            raise ValueError(
                f"negative is {negative!r}, but only a model of captions can be told what to avoid"
            )
        with READING:
            warn_of_unread(text, [negative])
            read = text.read([negative] * n)
        avoid = text({key: value.to(self.device) for key, value in read.items()})
        return self.conditioner.null(n)._replace(tokens=avoid.tokens, pooled=avoid.pooled)

    def latent_shape(self, size: tuple[int, int] | None) -> tuple[int, int, int]:
        """(C, h, w) for a picture of (width, height) pixels."""
        factor = self.autoencoder.config.factor
        side = self.unet.config.sample_size
        height, width = (side, side) if isinstance(side, int) else side or (None, None)
        if size is not None:
            if len(size) != 2:
                raise ValueError(f"size is {size!r:.60}, but must be (width, height)")
            for name, value in zip(("width", "height"), size, strict=True):
                require_int(name, value, 1, 65_536)
                if value < factor or value % factor:
                    near = max(factor, round(value / factor) * factor)
                    raise ValueError(
                        f"{name} is {value}, which the factor {factor} does not divide; try {near}"
                    )
            width, height = size[0] // factor, size[1] // factor
        if height is None or width is None:
            raise ValueError("size is None, and the model does not say its own; give (width, height)")
        return self.autoencoder.config.latent_channels, height, width

    def denoiser(self) -> Denoiser:
        """To draw with: no gradients, and the weights that the U-Net has now."""
        network = to_draw(self.unet, self.precision, prepare=self.fast, reuse=self.reuse, kept=self._layers)
        return Denoiser(network, self.path, self.prediction)

    def image(self, given: Given, noise: Callable[[], Tensor]) -> Tensor:
        """What the task gives the U-Net of a batch of pictures, [B,C',h,w].

        Args:
            noise: called for standard normal noise like their latents, if they are encoded.
        """
        assert self.task is not None
        factor = self.autoencoder.config.factor
        with torch.no_grad():
            return self.task.image(given, lambda pixels: self.encode(pixels, noise()), factor)

    def encode(self, pixels: Tensor, noise: Tensor | None = None) -> Tensor:
        """Pixels [B,3,H,W] in [-1, 1] => latents [B,C,h,w]: the posterior's mean, or the sample `noise` stands for."""
        config, posterior = self.autoencoder.config, self.autoencoder.encode(pixels)
        z = posterior.mean if noise is None else posterior.sample(noise)
        return (z - (config.shift_factor or 0.0)) * config.scaling_factor

    def decode(self, z: Tensor, tile: int | None = None) -> Tensor:
        """Latents [B,C,h,w] => pixels [B,3,H,W] in about [-1, 1]; those larger than `tile` one by one, in tiles."""
        config = self.autoencoder.config
        raw = z / config.scaling_factor + (config.shift_factor or 0.0)
        decode = to_decode(self.autoencoder, self.precision, prepare=self.fast, tile=tile, kept=self._decoder)
        return decode(raw)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a stock diffusers folder; see `diffusers_format.save`."""
        from pipelines import diffusers_format

        diffusers_format.save(self, Path(folder))

    @classmethod
    def from_pretrained(cls, model: str | Path) -> Self:
        """Read a run folder, a stock folder or a hub name; see `diffusers_format.load`."""
        from pipelines import diffusers_format

        return cls(**diffusers_format.load(model))


def best_device() -> str:
    """cuda or mps where there is one, else cpu."""
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def seeds_of(seed: int | Sequence[int], count: int) -> Sequence[int]:
    """The seed of each of `count` pictures: seed, seed + 1 and so on, or those that are given."""
    for one in seed if isinstance(seed, Sequence) else [seed]:
        require_int("seed", one, 0, 2**62)
    seeds = seed if isinstance(seed, Sequence) else range(seed, seed + count)
    if len(seeds) != count:
        raise ValueError(f"there are {len(seeds)} seeds for {count} pictures; give one, or one a picture")
    return seeds


def noise_of(seeds: Sequence[int], shape: Sequence[int], device: torch.device) -> Noise:
    """Noise [B, *shape], float32, fresh at each call: row i from its own seed, as stock pipelines draw it."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return lambda step: torch.cat([torch.randn((1, *shape), generator=g) for g in generators]).to(device)
