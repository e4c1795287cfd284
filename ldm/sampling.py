"""In which order pictures are seen, and how they reach the training loop."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from ldm import random
from ldm.buckets import Buckets
from ldm.config import UserError
from ldm.data import DataConfig, Source
from ldm.faults import explain
from ldm.pictures import to_tensor


def order(source: Source, balance: bool) -> np.ndarray:
    """[M] The indices that make up one epoch: each once, or with `balance` every class equally often."""
    if not balance:
        return np.arange(len(source))
    if source.labels is None:
        raise UserError(
            "data.balance needs classes, but the data has none; set data.label, or data.balance to false."
        )
    members = [np.flatnonzero(source.labels.numpy() == c) for c in range(len(source.classes))]
    most = max(map(len, members))
    return np.concatenate([np.resize(m, most) for m in members if len(m)])


def epochs(source: Source, config: DataConfig, batch: int) -> np.ndarray | Buckets:
    """What a `Stream` goes through: `order`, or for pictures of many sizes `Buckets` for batches of `batch`."""
    indices = order(source, config.balance)
    return indices if source.sizes is None else Buckets(indices, source.sizes, batch)


class Stream(Sampler[list[tuple[int, int]]]):
    """Batches of (position, index) for one process, endless and the same however it is restarted.

    Position counts samples since the start of the run over all processes. Epoch e is a permutation of `order` that
    depends on (seed, e) alone; batches run across the border of epochs, so that no sample is left out. (Of `Buckets`
    some are: see there.)
    """

    def __init__(
        self,
        order: np.ndarray | Buckets,
        *,
        seed: int,
        batch: int,
        start: int,
        stop: int,
        rank: int,
        ranks: int,
    ) -> None:
        self.order, self.seed, self.batch, self.start, self.stop = order, seed, batch, start, stop
        self.rank, self.ranks = rank, ranks

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, shuffled = -1, np.arange(0)
        for first in range(self.start, self.stop, self.batch * self.ranks):
            items = []
            for position in range(first + self.rank * self.batch, first + (self.rank + 1) * self.batch):
                if position // len(self.order) != epoch:
                    epoch = position // len(self.order)
                    shuffled = self._epoch(epoch)
                items.append((position, int(shuffled[position % len(self.order)])))
            yield items

    def _epoch(self, number: int) -> np.ndarray:
        if isinstance(self.order, Buckets):
            return self.order.epoch(self.seed, number)
        return self.order[random.permutation(self.seed, "order", number, len(self.order))]


class Pixels:
    """Pictures of a source as tensors, for a DataLoader that asks for lists of (position, index).

    Where a picture is cropped and whether it is mirrored are functions of (seed, position).
    """

    def __init__(self, source: Source, config: DataConfig, seed: int) -> None:
        self.source, self.config, self.seed = source, config, seed

    def __getitems__(self, items: list[tuple[int, int]]) -> dict[str, Tensor]:
        """{"position": [B], "index": [B], "pixels": [B,3,H,W] float32 in [-1, 1]}."""
        positions, indices = (torch.tensor(column) for column in zip(*items, strict=True))
        places = torch.full((len(items),), 0.5, dtype=torch.float64)
        if self.config.crop == "random":
            places = random.uniform(self.seed, "crop", positions)
        pixels = torch.stack(
            [
                to_tensor(
                    self.source.picture(i, self.source.size(i), (place, place))
                )  # only one side is too long
                for i, place in zip(indices.tolist(), places.tolist(), strict=True)
            ]
        )
        if self.config.flip:
            mirrored = random.uniform(self.seed, "flip", positions) < 0.5
            pixels[mirrored] = pixels[mirrored].flip(-1)
        return {"position": positions, "index": indices, "pixels": pixels}


class Stills:
    """Pictures cropped in the middle and never mirrored, for `read`: indices of one size to [B,3,H,W] in [-1, 1]."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def __getitems__(self, indices: Sequence[int]) -> Tensor:
        return torch.stack([to_tensor(self.source.picture(i, self.source.size(i))) for i in indices])


def groups(source: Source, size: int, share: slice = slice(None)) -> list[list[int]]:
    """All indices in lists of at most `size`, each of pictures of one size; of a `share` of all, if given."""
    indices = np.arange(len(source))[share]
    bucket = np.zeros(len(indices), dtype=np.int64)
    if source.sizes is not None:
        bucket = np.unique(source.sizes[indices], axis=0, return_inverse=True)[1]
    some = [indices[bucket == b].tolist() for b in np.unique(bucket)]
    return [one[part.start : part.stop] for one in some for part in slices(0, len(one), size)]


def slices(first: int, last: int, size: int) -> Iterator[range]:
    """The numbers from `first` up to `last` in ranges of `size`, the last one shorter."""
    for start in range(first, last, size):
        yield range(start, min(last, start + size))


def processors() -> int:
    """Cores that this process may use; all there are, where the system does not tell."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cores(pictures: int) -> int:
    """Workers that reading so many pictures is worth, while this process does nothing else; 0: none."""
    if pictures < 256:
        return 0
    sharing = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return max(1, min(16, processors() // sharing))


def read(dataset: Any, batches: Iterable[Sequence[Any]], workers: int, timeout: float = 0) -> Iterator[Any]:
    """`dataset.__getitems__(batch)` of each batch, in order, prepared by worker processes; 0: by this one.

    A worker that gives nothing for `timeout` seconds is taken for hung; 0 waits for ever.

    Raises:
        UserError: what went wrong in a worker, in the sentence that it raised there; or that one has died.
    """
    loader: DataLoader[Any] = DataLoader(
        Guarded(dataset),  # type: ignore[arg-type]
        batch_sampler=batches,  # type: ignore[arg-type]
        num_workers=workers,
        collate_fn=as_is,
        timeout=timeout if workers else 0,
    )
    try:
        for batch in loader:
            if isinstance(batch, UserError):
                raise batch
            yield batch
    except RuntimeError as problem:
        if said := explain(problem):
            raise UserError(said) from None
        raise


class Guarded:
    """A data set whose UserErrors are handed over as they are: a worker would wrap them in its traceback."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __getitems__(self, items: Sequence[Any]) -> Any:
        try:
            return self.dataset.__getitems__(items)
        except UserError as problem:
            return problem


def as_is(batch: Any) -> Any:
    """Data sets make whole batches: nothing is left to collate."""
    return batch
