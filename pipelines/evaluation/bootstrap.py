"""How figures of two sets of pictures scatter: the bootstrap over the pictures of both (Efron 1979).

To draw n of n pictures anew, with replacement, is to count each some times: 0, 1, 2 or more. Copies laid into a set
would spoil it, as they lie at no distance from each other and lower the rank of its covariance. So counts are weights
here, in one of two ways. Fréchet distance, kernel distance and Inception Score change smoothly with the weight of a
picture, and their linear part is drawn anew (the infinitesimal jackknife, Jaeckel 1972). That takes one decomposition
whatever the number of features, where 2,048 of them would take hours to be decomposed for each repetition; with few
pictures it overstated the scatter by a tenth to a fifth in trials, where decomposing again overstated it by a third to
a half. Precision and recall have no such part, and are counted anew.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pipelines.evaluation.extractors import Seen

NEIGHBOURS = 3
"""Of precision and recall"""
REACH = 32
"""Nearest pictures that are known: of so many, fewer than `NEIGHBOURS` are drawn anew once in 10^10 times"""
ROWS = 1000
"""Pictures that are compared with all others at once"""


def drawn_anew(n: int, times: int, rng: np.random.Generator) -> Tensor:
    """[times,n] How often each of n pictures is among n drawn with replacement."""
    return torch.from_numpy(rng.multinomial(n, np.full(n, 1 / n), size=times)).float()


def anew(made: Seen, real: Seen, w: Tensor, v: Tensor) -> dict[str, Tensor]:
    """Each figure of two sets, but for a constant, [times] if pictures count w [times,N] and v [times,M] times."""
    x, y = made.features.double(), real.features.double()
    parts = {"frechet": of_frechet(x, y), "kid": of_kernel(x, y)}
    if made.logits is not None:
        parts["inception_score"] = of_score(made.logits.double()), torch.zeros(len(y))
    found = {
        name: (w.double() * mine).mean(1) + (v.double() * theirs).mean(1)
        for name, (mine, theirs) in parts.items()
    }
    found["precision"] = within(made.features, real.features, w, v)
    found["recall"] = within(real.features, made.features, v, w)
    return found


def of_frechet(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """[N] and [M]: how the Fréchet distance of x [N,D] and y [M,D] changes with the share of each row, times that.

    With A and B the centred rows over the root of their number, the trace of (AᵀA BᵀB)^½ is the sum of the singular
    values s of ABᵀ = U s Vᵀ; row i of A weighs in it as the sum of U_ik² s_k.
    """
    apart = x.mean(0) - y.mean(0)
    a, b = (rows - rows.mean(0) for rows in (x, y))
    (p, r), (q, s) = (torch.linalg.qr(rows / len(rows) ** 0.5) for rows in (a, b))
    u, values, vt = torch.linalg.svd(r @ s.T, full_matrices=False)
    changes = [
        rows.square().sum(1) - len(rows) * (left @ turned).square() @ values
        for rows, left, turned in ((a, p, u), (b, q, vt.T))
    ]
    return changes[0] + 2 * a @ apart, changes[1] - 2 * b @ apart


def of_kernel(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The same of the kernel distance."""
    changes = []
    for rows, others in ((x, y), (y, x)):
        itself = (rows.square().sum(1) / rows.shape[1] + 1) ** 3
        among = (mean_kernel(rows, rows) * len(rows) - itself) / (len(rows) - 1)
        changes.append(2 * (among - mean_kernel(rows, others)))
    return changes[0], changes[1]


def mean_kernel(x: Tensor, y: Tensor) -> Tensor:
    """[N] The cubic kernel of each row of x [N,D] with those of y [M,D], on average."""
    return torch.cat([((part @ y.T / x.shape[1] + 1) ** 3).mean(1) for part in x.split(ROWS)])


def of_score(logits: Tensor) -> Tensor:
    """[N] The same of the Inception Score, from logits [N,K]."""
    p = logits.softmax(1)
    divergence = (p * (logits.log_softmax(1) - p.mean(0).log())).sum(1)
    return divergence.mean().exp() * divergence


def within(some: Tensor, others: Tensor, w: Tensor, v: Tensor) -> Tensor:
    """[times] The share of `some` [N,D], counted w times, that lie in the neighbourhoods of `others`, counted v times.

    A neighbourhood reaches to the third nearest of the others; a picture counted twice is no neighbour of itself.
    """
    near = [nearest(others, rows) for rows in torch.arange(len(others)).split(ROWS)]
    distances, names = (torch.cat(column) for column in zip(*near, strict=True))
    radii = []
    for times in v:
        third = (times[names].cumsum(1) < NEIGHBOURS).sum(1).clamp(max=names.shape[1] - 1)
        radii.append(distances.gather(1, third[:, None])[:, 0].where(times > 0, -1.0))
    found = torch.zeros(len(w), dtype=torch.float64)
    for rows in torch.arange(len(some)).split(ROWS):
        table = torch.cdist(some[rows], others)
        for i, radius in enumerate(radii):
            found[i] += w[i, rows][(table <= radius).any(1)].sum()
    return found / len(some)


def nearest(features: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Distances and numbers of the nearest to some rows of features [N,D], but for themselves."""
    table = torch.cdist(features[rows], features)
    table[torch.arange(len(rows)), rows] = torch.inf
    return table.topk(min(REACH, len(features) - 1), largest=False)
