"""Pictures of many shapes, each brought to one of a few sizes of about the same area; a batch is of one size.

Every epoch consists of whole batches. What is left of a size after them waits for the next epoch, in which others are
left: each picture is seen at most once an epoch, and all are but fewer than a batch of each size. Sizes that too few
pictures have for a batch are joined with the next in shape, so no picture waits for ever.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

from ldm import random
from ldm.config import UserError

LONGEST = 2.0
"""Of the longer side to the shorter: pictures that are longer still are cropped to this"""

Size = tuple[int, int]
"""Width and height in pixels"""


def sizes_for(side: int, step: int) -> list[Size]:
    """Widths and heights that are multiples of `step`, with the largest areas up to side x side."""
    widths = range(step, round(side * LONGEST) + 1, step)
    sizes = [(width, side * side // width // step * step) for width in widths]
    return [(w, h) for w, h in sizes if h and max(w / h, h / w) <= LONGEST]


def assign(pictures: np.ndarray, sizes: Sequence[Size], least: int) -> np.ndarray:
    """[N,2] The size that each picture is brought to: the nearest in shape of those that at least `least` have.

    Args:
        pictures: [N,2] widths and heights as they are.
        least: pictures in a batch.

    Raises:
        UserError: there are fewer than `least` pictures.
    """
    if len(pictures) < least:
        raise UserError(
            f"{len(pictures)} pictures don't fill a batch of run.batch_size {least}, which data.bucket_step needs; "
            "lower run.batch_size, or set data.bucket_step to 0."
        )
    shapes = np.log(pictures[:, 0] / pictures[:, 1])
    left = [*sizes]
    while True:
        ratios = np.array([math.log(w / h) for w, h in left])
        nearest = abs(shapes[:, None] - ratios).argmin(1)
        members = np.bincount(nearest, minlength=len(left))
        left = [size for size, count in zip(left, members, strict=True) if count]
        counts = members[members > 0]
        if counts.min() >= least:
            return np.array(sizes_of(left, nearest, members), dtype=np.int64)
        left.pop(int(counts.argmin()))


def sizes_of(left: Sequence[Size], nearest: np.ndarray, members: np.ndarray) -> list[Size]:
    """The size of each picture, where `left` are those of the original numbers that have members."""
    number = np.cumsum(members > 0) - 1
    return [left[number[n]] for n in nearest]


def described(sizes: np.ndarray) -> str:
    """ "64x64: 100 pictures, 48x80: 20" """
    counts = Counter(map(tuple, sizes.tolist()))
    return ", ".join(f"{w}x{h}: {count:,} pictures" for (w, h), count in counts.most_common())


class Buckets:
    """The order of epochs in batches of one size each, a function of (seed, epoch).

    Args:
        order: [M] indices of an epoch, as for any other stream.
        sizes: [N,2] the size of each picture.
        batch: samples an optimizer step, over all processes: these are of one size together.
    """

    def __init__(self, order: np.ndarray, sizes: np.ndarray, batch: int) -> None:
        _, bucket = np.unique(sizes, axis=0, return_inverse=True)
        self.batch = batch
        self.groups = [order[bucket[order] == b] for b in range(bucket.max() + 1)]

    def __len__(self) -> int:
        return sum(len(group) // self.batch * self.batch for group in self.groups)

    def epoch(self, seed: int, number: int) -> np.ndarray:
        """[len(self)] The indices of an epoch."""
        batches = []
        for b, group in enumerate(self.groups):
            shuffled = group[random.permutation(seed, f"bucket {b}", number, len(group))]
            whole = len(group) // self.batch * self.batch
            batches.append(shuffled[:whole].reshape(-1, self.batch))
        together = np.concatenate(batches)
        return together[random.permutation(seed, "batches", number, len(together))].ravel()
