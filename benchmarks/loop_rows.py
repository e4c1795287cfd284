"""What a user's hours go to: the real training loops, making the cache, reading pictures.

The peer is what diffusers' train_text_to_image.py does with the same networks and files, written after it: pictures
through torchvision, pixels and captions encoded in each step, AdamW. Ours reads a cache, which is made before.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import diffusers
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision import transforms

from benchmarks.harness import open_run, through_a_run
from benchmarks.models import (
    EMOJI,
    TEXT,
    TOKENS,
    Shape,
    autoencoders,
    device,
    normal,
    stock,
    told,
    unets,
    usual,
)
from benchmarks.timing import Case, Work
from benchmarks.unet_rows import autocast, stock_forward
from ldm.cache import LatentCache, build
from ldm.conditioning import Text
from ldm.data import DataConfig, open_source
from ldm.encoders import TextConfig, make_encoders
from ldm.optim import OptimizerConfig
from ldm.sampling import Pixels, read, slices
from ldm.scenes import Scenes

CLIP_L: dict[str, Any] = {
    "model_type": "clip_text_model",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
}
"""The text encoder of Stable Diffusion 1.5"""
FOREVER = 10**6
LARGER = 1.5
"""Side of the pictures on disk over that which is trained on"""


class World:
    """Captioned pictures on disk, and both sides' networks with the same, random weights.

    Args:
        pictures: how many, a multiple of `batch`, which a step takes.
        text: the encoder of the captions, which is frozen.
    """

    def __init__(self, size: Shape, folder: Path, pictures: int, batch: int, text: TextConfig) -> None:
        self.size, self.folder, self.pictures, self.batch = size, folder, pictures, batch
        captions = draw(folder / "pictures", pictures, round(LARGER * size.picture))
        self.data = DataConfig(path=str(folder / "pictures"), size=size.picture)
        self.source = open_source(self.data)
        self.unet, self.stock_unet = unets(size)
        self.autoencoder, self.stock_autoencoder = autoencoders(size)
        for frozen in (self.autoencoder, self.stock_autoencoder):
            frozen.requires_grad_(False)
        torch.manual_seed(0)
        self.text = Text(*make_encoders(text, captions), frozen=True).to(device())
        self._caches = 0

    # --- ours --------------------------------------------------------------------------------------------------

    def build(self) -> LatentCache:
        """The cache of all pictures and captions, in a folder that nothing was written to before."""
        self._caches += 1
        place = self.folder / f"run-{self._caches}"
        run = open_run(place, FOREVER, self.batch)
        return build(place / "cache", self.source, self.data, self.autoencoder, self.text, run)

    def steps(self) -> Iterator[Tensor]:
        run = open_run(self.folder / "loop", FOREVER, self.batch)
        rates = OptimizerConfig(name="adamw", lr=1e-9)
        yield from through_a_run(run, self.unet, rates, self.build(), self.text)

    def batches(self) -> Iterator[Any]:
        """Pictures as stage 1 reads them, in their order."""
        order = [[(i, i) for i in some] for some in slices(0, self.pictures, self.batch)]
        while True:
            yield from read(Pixels(self.source, self.data, 0), order, workers=0)

    # --- both, of the same -------------------------------------------------------------------------------------

    def pictures_of_both(self) -> tuple[Tensor, Tensor]:
        files = sorted((self.folder / "pictures").glob("*.png"))[: self.batch]
        theirs = [self.brought(Image.open(file).convert("RGB")) for file in files]
        return next(self.batches())["pixels"], torch.stack(theirs)

    @torch.no_grad()
    def latents_of_both(self) -> tuple[Tensor, Tensor]:
        """Means; the peer's before the script scales them, as ours have their scale in the weights."""
        ours = self.build().__getitems__([(i, i) for i in range(self.batch)])["mean"]
        pixels = next(self.batches())["pixels"].to(device())
        return ours.cpu(), self.stock_autoencoder.encode(pixels).latent_dist.mean.cpu()

    @torch.no_grad()
    def answers_of_both(self) -> tuple[Tensor, Tensor]:
        """The networks' to the same noisy latents, times and captions."""
        side, cond = self.size.latents[0], told(self.size, self.batch)
        x, t = normal(self.batch, 4, side, side), torch.linspace(1, 999, self.batch, device=device())
        return self.unet(x, t, cond), stock_forward(self.stock_unet, x, t, cond)

    # --- the peer ----------------------------------------------------------------------------------------------

    @cached_property
    def brought(self) -> Any:
        """How the script brings a picture to its size."""
        return transforms.Compose(
            [
                transforms.Resize(self.size.picture, interpolation=transforms.InterpolationMode.LANCZOS),
                transforms.CenterCrop(self.size.picture),
                transforms.ToTensor(),
                transforms.Normalize([0.5], [0.5]),
            ]
        )

    def stock_batches(self) -> Iterator[dict[str, Tensor]]:
        from datasets import load_dataset

        def prepared(rows: dict[str, list]) -> dict[str, list]:
            ids = self.text.read(rows["text"])["ids"]
            return {
                "pixels": [self.brought(image.convert("RGB")) for image in rows["image"]],
                "ids": list(ids),
            }

        data = load_dataset(
            "imagefolder",
            data_dir=str(self.folder / "pictures"),
            cache_dir=str(self.folder / "hf"),
            split="train",
        )
        loader: Any = torch.utils.data.DataLoader(
            data.with_transform(prepared), shuffle=True, batch_size=self.batch, drop_last=True
        )
        while True:
            yield from loader

    @torch.no_grad()
    def stock_codes(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Latents and text states of a batch, as the script makes them in each step."""
        with autocast(usual())():
            coded = self.stock_autoencoder.encode(batch["pixels"].to(device())).latent_dist.sample()
            states = self.text.encoder(batch["ids"].to(device()))[0]
        return coded * self.stock_autoencoder.config.scaling_factor, states

    def stock_steps(self) -> Iterator[Tensor]:
        unet = self.stock_unet
        optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-9)
        scheduler: Any = diffusers.DDPMScheduler(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012
        )
        for batch in self.stock_batches():
            z, states = self.stock_codes(batch)
            noise, t = torch.randn_like(z), torch.randint(0, 1000, (len(z),), device=z.device)
            with autocast(usual())():
                made = unet(scheduler.add_noise(z, noise, t), t, states).sample
            loss = F.mse_loss(made.float(), noise.float())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            yield loss.detach()

    def stock_epoch(self) -> None:
        """What the script computes in each epoch and our cache holds."""
        batches = self.stock_batches()
        for _ in range(self.pictures // self.batch):
            self.stock_codes(next(batches))


def draw(folder: Path, pictures: int, side: int) -> list[str]:
    """Write captioned pictures; gives the captions."""
    folder.mkdir(parents=True)
    scenes, lines = Scenes(pictures, side), []
    for i in range(pictures):
        sample = scenes[i]
        sample["image"].save(folder / f"{i:04d}.png")
        lines.append({"file_name": f"{i:04d}.png", "text": sample["text"]})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return [line["text"] for line in lines]


def loops(_: Shape) -> Iterator[Case]:
    """Of networks as in configs/emoji, an autoencoder trained here and six layers of text encoder: all that the peer
    does more than we is small. Losses are of other noise and another path: what is compared is answers to the same."""
    with opened(EMOJI, 192, 32, TextConfig(width=TEXT, layers=6, heads=6, max_length=TOKENS)) as world:
        yield Case(
            name="cache building: pictures and captions encoded, against the peer's every epoch",
            ours=no_result(world.build),
            peer=world.stock_epoch,
            precision=None,
            unit=world.pictures,
            compared=world.latents_of_both,
        )
        batches, stock_batches = world.batches(), world.stock_batches()
        yield Case(
            name="data loading: pictures of a batch, decoded and resized",
            ours=no_result(partial(next, batches)),
            peer=no_result(partial(next, stock_batches)),
            precision=None,
            unit=world.batch,
            compared=world.pictures_of_both,
        )
        yield real_loop(world, "networks of configs/emoji")


def stock_loops(_: Shape) -> Iterator[Case]:
    """Stage 2 in a stock autoencoder's latents and a published text encoder's states, as who skips stage 1 trains it;
    what the peer's script is written for. Random weights of those shapes."""
    with tempfile.TemporaryDirectory() as folder:
        shape = Path(folder) / "config.json"
        shape.write_text(json.dumps(CLIP_L))
        text = TextConfig(encoder=str(shape), weights="random", max_length=CLIP_L["max_position_embeddings"])
        with opened(stock(), 8, 4, text) as world:
            yield real_loop(world, "AutoencoderKL of SD's shape, CLIP-L", target=4.0)


@contextmanager
def opened(size: Shape, pictures: int, batch: int, text: TextConfig) -> Iterator[World]:
    with tempfile.TemporaryDirectory() as folder:
        yield World(size, Path(folder), pictures, batch, text)


def real_loop(world: World, networks: str, target: float | None = None) -> Case:
    return Case(
        name=f"latent training step, real loop, {usual()}, {networks}",
        ours=no_result(partial(next, world.steps())),
        peer=no_result(partial(next, world.stock_steps())),
        target=target,
        precision=None,
        unit=world.batch,
        compared=world.answers_of_both,
    )


def no_result(work: Work) -> Work:
    """The same, with nothing to compare."""

    def done() -> None:
        work()

    return done
