"""What a user's hours go to: the real training loops, making the cache, reading pictures.

The peer is what diffusers' train_text_to_image.py does with the same networks and files, written after it: pictures
through torchvision, pixels and captions encoded in each step, AdamW.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision import transforms

from benchmarks.harness import open_run, through_a_run
from benchmarks.models import TOKENS, Shape, autoencoders, device, recipe, unets
from benchmarks.timing import Case, Work
from ldm.cache import LatentCache, build
from ldm.conditioning import Text
from ldm.data import DataConfig, open_source
from ldm.encoders import TextConfig, small
from ldm.optim import OptimizerConfig
from ldm.sampling import Pixels, read
from ldm.scenes import Scenes

PICTURES, BATCH = 192, 32
FOREVER = 10**6
LARGER = 1.5
"""Side of the pictures on disk over that which is trained on"""


class World:
    """Captioned pictures on disk, and both sides' networks with the same weights."""

    def __init__(self, size: Shape, folder: Path) -> None:
        self.size, self.folder = size, folder
        self.captions = draw(folder / "pictures", round(LARGER * size.picture))
        self.data = DataConfig(path=str(folder / "pictures"), size=size.picture)
        self.source = open_source(self.data)
        self.unet, self.stock_unet = unets(size)
        self.autoencoder, self.stock_autoencoder = autoencoders(size)
        for frozen in (self.autoencoder, self.stock_autoencoder):
            frozen.requires_grad_(False)
        torch.manual_seed(0)
        width = size.unet["cross_attention_dim"]
        config = TextConfig(width=width, layers=6, heads=width // 64, max_length=TOKENS)
        self.text = Text(small(config, self.captions), frozen=True).to(device())
        self._caches = 0

    # --- ours --------------------------------------------------------------------------------------------------

    def build(self) -> LatentCache:
        """The cache of all pictures and captions, in a folder that nothing was written to before."""
        self._caches += 1
        place = self.folder / f"run-{self._caches}"
        run = open_run(place, FOREVER, BATCH)
        return build(place / "cache", self.source, self.data, self.autoencoder, self.text, run)

    def steps(self) -> Iterator[Tensor]:
        run = open_run(self.folder / "loop", FOREVER, BATCH)
        return through_a_run(run, self.unet, OptimizerConfig(name="adamw", lr=1e-9), self.build(), self.text)

    def batches(self) -> Iterator[Any]:
        """Pictures as stage 1 reads them."""
        order = [[(i, i) for i in range(first, first + BATCH)] for first in range(0, PICTURES, BATCH)]
        while True:
            yield from read(Pixels(self.source, self.data, 0), order, workers=0)

    # --- the peer ----------------------------------------------------------------------------------------------

    def stock_batches(self) -> Iterator[dict[str, Tensor]]:
        from datasets import load_dataset

        brought = transforms.Compose(
            [
                transforms.Resize(self.size.picture, interpolation=transforms.InterpolationMode.LANCZOS),
                transforms.CenterCrop(self.size.picture),
                transforms.ToTensor(),
                transforms.Normalize([0.5], [0.5]),
            ]
        )

        def prepared(rows: dict[str, list]) -> dict[str, list]:
            ids = self.text.read(rows["text"])["ids"]
            return {"pixels": [brought(image.convert("RGB")) for image in rows["image"]], "ids": list(ids)}

        data = load_dataset(
            "imagefolder",
            data_dir=str(self.folder / "pictures"),
            cache_dir=str(self.folder / "hf"),
            split="train",
        )
        loader: Any = torch.utils.data.DataLoader(
            data.with_transform(prepared), shuffle=True, batch_size=BATCH, drop_last=True
        )
        while True:
            yield from loader

    @torch.no_grad()
    def stock_codes(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Latents and text states of a batch, as the script makes them in each step."""
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
            loss = F.mse_loss(unet(scheduler.add_noise(z, noise, t), t, states).sample, noise)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            yield loss.detach()

    def stock_epoch(self) -> None:
        """What the script computes in each epoch and our cache holds."""
        batches = self.stock_batches()
        for _ in range(PICTURES // BATCH):
            self.stock_codes(next(batches))


def draw(folder: Path, side: int) -> list[str]:
    """Write captioned pictures; gives the captions."""
    folder.mkdir(parents=True)
    scenes, lines = Scenes(PICTURES, side), []
    for i in range(PICTURES):
        sample = scenes[i]
        sample["image"].save(folder / f"{i:04d}.png")
        lines.append({"file_name": f"{i:04d}.png", "text": sample["text"]})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return [line["text"] for line in lines]


def loops(_: Shape) -> Iterator[Case]:
    """Of a shipped recipe's networks. Losses are of other noise and another path: nothing to compare."""
    with ExitStack() as stack:
        world = World(recipe(), Path(stack.enter_context(tempfile.TemporaryDirectory())))
        yield Case(
            name="cache building: pictures and captions encoded, against the peer's every epoch",
            ours=no_result(world.build),
            peer=world.stock_epoch,
            precision=None,
            unit=PICTURES,
        )
        batches, stock_batches = world.batches(), world.stock_batches()
        yield Case(
            name="data loading: pictures of a batch, decoded and resized",
            ours=no_result(partial(next, batches)),
            peer=no_result(partial(next, stock_batches)),
            precision=None,
            unit=BATCH,
        )
        yield Case(
            name="latent training step, real loop, f32",
            ours=no_result(partial(next, world.steps())),
            peer=no_result(partial(next, world.stock_steps())),
            target=4.0,
            precision=None,
            unit=BATCH,
        )


def no_result(work: Work) -> Work:
    """The same, with nothing to compare."""

    def done() -> None:
        work()

    return done
