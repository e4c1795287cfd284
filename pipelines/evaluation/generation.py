"""A set of pictures made by many processes, the same set however many they are.

Picture i is drawn from seed + i and told what belongs to i, so that it depends on neither its batch nor its process.
Whole batches go to the processes in turn: their number does not even change what a batch consists of.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import reduce
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ldm.checks import require_int
from ldm.conditioning import Unconditional, labels_of, text_of
from ldm.config import UserError
from ldm.data import Source
from ldm.device import Precision
from ldm.guidance import Guidance
from ldm.sampling import slices
from pipelines.latent_diffusion import LatentDiffusion


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """How pictures are drawn."""

    steps: int = 30
    """Sampling steps"""
    sampler: str | None = None
    """By default the model's"""
    guidance: float | None = None
    """Scale of classifier-free guidance; 1 is none. By default 4, or 1 for a model that is told nothing"""
    interval: tuple[float, float] | None = None
    """Guide where interval[0] < sigma / alpha <= interval[1]; by default everywhere"""
    seed: int = 0
    """Picture i is drawn from seed + i"""
    precision: Precision = "f32"
    """Of drawing; likewise reuse, as `LatentDiffusion` has them"""
    reuse: int = 1

    def by(self, model: LatentDiffusion) -> LatentDiffusion:
        """The model, told to draw in this precision and with this reuse; ValueError if it can't draw so."""
        drawer = replace(model, precision=self.precision, reuse=self.reuse)
        if self.interval and self.scale(model) == 1:
            raise ValueError("--interval says how to guide, but the scale of guidance is 1, which is none")
        self.guided(model)
        drawer.sampler_for(self.sampler, self.steps, model.latent_shape(None))
        return drawer

    def scale(self, model: LatentDiffusion) -> float:
        """Of guidance; ValueError if there is nothing to be guided by."""
        if not isinstance(model.conditioner, Unconditional):
            return 4.0 if self.guidance is None else self.guidance
        if self.guidance is not None or self.interval:
            raise ValueError(
                "this model is told nothing to be guided by; leave out --guidance and --interval"
            )
        return 1.0

    def guided(self, model: LatentDiffusion) -> Guidance:
        plain = Guidance(scale=self.scale(model))
        return replace(plain, interval=self.interval) if self.interval else plain


class Share:
    """Which of `count` things this process makes, in batches that go to the processes in turn."""

    def __init__(self, state: PartialState, count: int, batch: int) -> None:
        """ValueError if there is not one thing for each process."""
        require_int("batch", batch, 1, 2**31)
        require_int("the number of pictures", count, state.num_processes, 2**31)
        self.state, self.count = state, count
        batch = min(batch, count // state.num_processes)  # each process has one at least
        self.batches = [*slices(0, count, batch)][state.process_index :: state.num_processes]
        self.rows = torch.tensor([i for one in self.batches for i in one])

    def made(self, make: Callable[[range], Sequence[Tensor]], what: str) -> list[Tensor]:
        """What `make` gives for each batch, joined, [own,...] each, with a progress bar in the first process."""
        several = f" (process 1 of {self.state.num_processes})" if self.state.num_processes > 1 else ""
        hidden = not self.state.is_main_process
        parts = []
        with tqdm(total=len(self.rows), unit="img", desc=f"{what}{several}", disable=hidden) as bar:
            for one in self.batches:
                parts.append(make(one))
                bar.update(len(one))
        return [torch.cat(column) for column in zip(*parts, strict=True)]

    def whole(self, own: Tensor, wanted: Sequence[int] | None = None) -> Tensor:
        """What each process has made [own,...] => all of it, or what is `wanted`, [count,...] on the CPU of each."""
        places = torch.tensor(range(self.count) if wanted is None else wanted)
        full = torch.zeros(len(places), *own.shape[1:], dtype=own.dtype)
        mine = torch.isin(places, self.rows)
        full[mine] = own[torch.searchsorted(self.rows, places[mine])]
        return reduce(full.to(self.state.device), "sum").cpu()


def told(model: LatentDiffusion, source: Source, indices: Sequence[int]) -> dict[str, list[str]]:
    """What belongs to pictures of a source, as arguments of the model: captions, names of classes, both or nothing.

    Raises:
        UserError: the source lacks what the model must be told, or has a class that the model does not know.
    """
    text, labels = text_of(model.conditioner), labels_of(model.conditioner)
    if text and source.texts is None:
        raise UserError("The model draws from captions, but the data has none; set the column with --text.")
    if labels and source.labels is None:
        raise UserError("The model draws classes, but the data has none; set the column with --label.")
    captions = [source.texts[i] for i in indices] if text and source.texts else []
    names = class_names(source, indices) if labels else []
    if labels and (strange := sorted(set(names) - set(labels.classes))):
        raise UserError(f"The data has a class {strange[0]!r}, which the model does not know.")
    if text and labels:
        return {"prompts": captions, "classes": names}
    return {"prompts": captions or names} if text or labels else {}


def class_names(source: Source, indices: Sequence[int]) -> list[str]:
    """The class of each of some pictures."""
    assert source.labels is not None
    return [source.classes[int(source.labels[i])] for i in indices]


def spread_out(count: int, of: int) -> list[int]:
    """`count` numbers below `of`: evenly spaced, or all in turn again and again if there are not so many."""
    return [i * of // count for i in range(count)] if count <= of else [i % of for i in range(count)]


def draw(model: LatentDiffusion, say: dict[str, list[str]], share: Share, how: Drawing) -> Tensor:
    """The pictures of this process, uint8 [own,3,H,W]; picture i is told what `say` has in place i."""
    settings: dict[str, Any] = {"steps": how.steps, "sampler": how.sampler, "guidance": how.guided(model)}
    drawer = how.by(model)

    def make(rows: range) -> list[Tensor]:
        some = {name: [values[i] for i in rows] for name, values in say.items()}
        n = 1 if say else len(rows)
        seed = how.seed + rows.start
        return [bytes_of(drawer(**some, n=n, seed=seed, batch=len(rows), **settings))]  # type: ignore[arg-type]

    (pixels,) = share.made(make, "drawing")
    return pixels


def bytes_of(images: Sequence[Image.Image]) -> Tensor:
    """RGB pictures of one size => uint8 [N,3,H,W]."""
    return torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images])


def images_of(pixels: Tensor) -> list[Image.Image]:
    """uint8 [N,3,H,W] => RGB pictures."""
    return [Image.fromarray(one) for one in pixels.permute(0, 2, 3, 1).numpy()]
