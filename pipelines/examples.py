"""Pictures of a set as a task is given them, and what is to be made of each: to look at, and to measure by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ldm.conditioning import ClassAndText, Unconditional, text_of
from ldm.data import Source
from ldm.pictures import to_images, to_tensor
from ldm.tasks import Inpaint, Task, Upscale, spoiled
from pipelines.editing import joined
from pipelines.latent_diffusion import LatentDiffusion
from pipelines.sheets import side_by_side
from pipelines.tasks import made


@dataclass(frozen=True, kw_only=True)
class Examples:
    """Pictures of a source as a task is given them, and what is to be made of each."""

    task: Task
    given: dict[str, Tensor]
    read: dict[str, Tensor]
    """Their words"""
    wanted: Tensor
    """[N,3,H,W] in [-1, 1]"""

    @classmethod
    def of(
        cls,
        model: LatentDiffusion,
        task: Task,
        source: Source,
        wanted: Any,
        indices: Sequence[int],
        seed: int = 0,
    ) -> Examples:
        """Pictures of a source as squares of its size; the i-th of `indices` is spoiled as (seed, i) says."""
        size = source.config.size
        pictures = [source.picture(i, size) for i in indices]
        truth = torch.stack([to_tensor(wanted.picture(i, size)) for i in indices])
        texts = [source.texts[i] for i in indices] if source.texts else []
        labels = [source.classes[source.labels[i]] for i in indices] if source.labels is not None else []
        both = isinstance(model.conditioner, ClassAndText)
        silent = isinstance(model.conditioner, Unconditional)
        words = None if silent else texts if text_of(model.conditioner) else labels
        read = model.read(words, 1, labels if both else None)
        given = spoiled(task, pictures, seed, range(len(pictures)))
        return cls(task=task, given=given, read=read, wanted=truth)

    def made(
        self, model: LatentDiffusion, seed: int = 0, batch: int = 32, shifted: bool = True, **settings: Any
    ) -> Tensor:
        """What the model makes of them, [N,3,H,W] in [-1, 1]; example i from seed + i. Settings as those of `made`.

        Of inpainting all known pixels are as they were; if `shifted`, what was drawn meets them (`editing.joined`),
        else it is as stock pipelines leave it.
        """
        parts = []
        for first in range(0, len(self.wanted), batch):
            rows = slice(first, first + batch)
            given, read = (
                {name: value[rows] for name, value in group.items()} for group in (self.given, self.read)
            )
            seeds = range(seed + first, seed + first + len(self.wanted[rows]))
            pixels = made(model, given, read, seeds, **settings).cpu().clamp(-1, 1)
            parts.append(self.kept(pixels, rows, shifted))
        return torch.cat(parts)

    def kept(self, pixels: Tensor, rows: slice, shifted: bool) -> Tensor:
        """Of inpainting, the known pixels put back."""
        if not isinstance(self.task, Inpaint):
            return pixels
        picture, hole = self.given["picture"][rows], self.given["mask"][rows]
        if shifted:
            return joined(pixels, picture, hole).clamp(-1, 1)
        return pixels * hole + picture * (1 - hole)

    def seen(self) -> Tensor:
        """What is given as pictures of full size, [N,3,H,W]: small ones enlarged (bicubic), holes grey."""
        picture = self.given["picture"]
        if isinstance(self.task, Inpaint):
            return picture * (1 - self.given["mask"])
        if isinstance(self.task, Upscale):
            size = self.wanted.shape[-1], self.wanted.shape[-2]
            large = [one.resize(size, Image.Resampling.BICUBIC) for one in to_images(picture)]
            return torch.stack([to_tensor(one) for one in large])
        return picture

    def sheet(self, pixels: Tensor, most: int = 64) -> Image.Image:
        """What was given, what was made of it, and what was wanted, below each other, of at most so many."""
        rows = [to_images(part[:most]) for part in (self.seen(), pixels, self.wanted)]
        return side_by_side(*rows, labels=("given", "made", "wanted"))
