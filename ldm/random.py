"""Randomness as a function of (seed, purpose, position): never of how often somebody drew before.

`position` counts samples since the start of the run, over all processes. A resumed run therefore repeats the
uninterrupted one, and two processes draw what one would have drawn. Philox is a counter-based generator
(Salmon et al. 2011): any key starts an independent stream at no cost.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def stream(seed: int, purpose: str, position: int) -> np.random.Generator:
    """The random stream that belongs to one sample and one purpose."""
    key = ((seed & 0xFFFFFFFF) << 32) | zlib.crc32(purpose.encode())
    return np.random.Generator(np.random.Philox(key=[key, position & 0xFFFFFFFFFFFFFFFF]))


def normal(seed: int, purpose: str, positions: Tensor, shape: Sequence[int]) -> Tensor:
    """Standard normal noise [B, *shape], float32: row i depends on (seed, purpose, positions[i]) alone."""
    rows = np.empty((len(positions), *shape), dtype=np.float32)
    for row, position in zip(rows, positions.tolist(), strict=True):
        stream(seed, purpose, position).standard_normal(out=row, dtype=np.float32)
    return torch.from_numpy(rows)


def uniform(seed: int, purpose: str, positions: Tensor) -> Tensor:
    """Uniform numbers [B] in (0, 1), float64."""
    drawn = [stream(seed, purpose, position).uniform() for position in positions.tolist()]
    return torch.tensor(drawn, dtype=torch.float64).clamp(1e-12, 1 - 1e-12)


def permutation(seed: int, purpose: str, position: int, n: int) -> np.ndarray:
    """[n] The numbers 0..n-1 in random order."""
    return stream(seed, purpose, position).permutation(n)
