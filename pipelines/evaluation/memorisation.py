"""Has a model learned its pictures by heart? Drawn pictures beside their nearest training pictures."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from ldm.data import Source
from ldm.pictures import to_tensor
from pipelines.sheets import side_by_side

SIDE = 32
"""Pixels along a side at which pictures are compared"""
NEIGHBOURS = 50
BATCH = 256


class Near(NamedTuple):
    """The nearest real pictures of each of N others, the nearest first."""

    distances: Tensor  # [N,K]
    indices: Tensor  # [N,K]

    @property
    def copied(self) -> Tensor:
        """[N] Whether each is a copy: nearer to one real picture than half its mean distance to its 50 nearest
        (Carlini et al. 2023, section 5.1)."""
        return self.distances[:, 0] < 0.5 * self.distances.mean(1)

    def rows(self, part: slice) -> Near:
        """Of some of the N."""
        return Near(self.distances[part], self.indices[part])


def nearest(others: Tensor, real: Iterable[Sequence[Tensor]]) -> Near:
    """The 50 nearest of each of `others` [N,D] by Euclidean distance.

    Args:
        real: batches; each is one [B,D], or several that stand for the same B pictures, of which the nearest counts.
    """
    distances, indices, first = torch.empty(len(others), 0), torch.empty(len(others), 0, dtype=torch.int64), 0
    for views in real:
        table = torch.stack([torch.cdist(others, view) for view in views]).amin(0)
        numbers = torch.arange(first, first + table.shape[1]).expand(len(others), -1)
        both, names = torch.cat([distances, table], 1), torch.cat([indices, numbers], 1)
        distances, chosen = both.topk(min(NEIGHBOURS, both.shape[1]), largest=False)
        indices, first = names.gather(1, chosen), first + table.shape[1]
    return Near(distances, indices)


def thumbnails(images: Iterable[Image.Image]) -> Tensor:
    """[N, 3 * 32 * 32] in [-1, 1]."""
    small = [to_tensor(image.resize((SIDE, SIDE), Image.Resampling.BOX)) for image in images]
    return torch.stack(small).flatten(1)


def mirrored(source: Source) -> Iterator[list[Tensor]]:
    """Thumbnails of all pictures of a source, each batch also mirrored, for `nearest`."""
    for first in range(0, len(source), BATCH):
        indices = range(first, min(first + BATCH, len(source)))
        real = torch.stack([to_tensor(source.picture(i, SIDE)) for i in indices])
        yield [real.flatten(1), real.flip(-1).flatten(1)]


@dataclass(frozen=True, kw_only=True)
class Copies:
    """Which drawn pictures are copies of training pictures, at 32 x 32 pixels (`Near.copied`)."""

    which: tuple[int, ...]
    """Numbers of the drawn pictures that are"""
    total: int
    """Drawn pictures"""
    compared: int
    """Training pictures"""
    nearest: tuple[int, ...]
    """The nearest training picture of each drawn one"""


def find_copies(images: Sequence[Image.Image], source: Source) -> Copies:
    """Compare drawn pictures with all training pictures and their mirror images."""
    near = nearest(thumbnails(images), mirrored(source))
    return Copies(
        which=tuple(near.copied.nonzero().flatten().tolist()),
        total=len(images),
        compared=len(source),
        nearest=tuple(near.indices[:, 0].tolist()),
    )


def nearer(made: Near, held_out: Near) -> Tensor:
    """[N] For each made picture the share of held-out ones that are further from the training pictures than it is.

    On average 0.5 if drawn pictures are as new as held-out ones, 1 if all are nearer to what was trained on.
    """
    ordered = held_out.distances[:, 0].sort().values
    passed = torch.searchsorted(ordered, made.distances[:, 0].contiguous(), right=True)
    return 1 - passed / len(ordered)


def beside(
    images: Sequence[Image.Image], near: dict[str, Near], training: Source, count: int = 16
) -> Image.Image:
    """The pictures that come nearest to a training picture, above their nearest by each measure in `near`."""
    closest = torch.stack([one.distances[:, 0] / one.distances.mean(1) for one in near.values()]).amin(0)
    rows = closest.argsort()[:count].tolist()
    size = images[0].size
    found = [[training.picture(int(one.indices[i, 0]), size) for i in rows] for one in near.values()]
    labels = ["drawn", *(f"nearest in {name}" for name in near)]
    return side_by_side([images[i] for i in rows], *found, labels=labels, columns=8)
