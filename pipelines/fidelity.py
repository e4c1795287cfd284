"""Figures of merit with their uncertainty, from features of two sets of pictures or from a number for each picture.

The figures of two sets are torch-fidelity's own functions, with its defaults: Fréchet distance (Heusel et al. 2017),
kernel distance (Bińkowski et al. 2018: cubic kernel, mean over 100 subsets of at most 1000), Inception Score (Salimans
et al. 2016, 10 splits), precision and recall (Kynkäänniemi et al. 2019, 3 neighbours).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor
from tqdm import tqdm

from ldm.config import UserError
from pipelines.extractors import Seen, package
from pipelines.latent_diffusion import best_device

LEAST = 8
"""Pictures in a set, so that its halves have the four that precision and recall need"""
FEW = 10_000
"""Pictures below which the Fréchet distance is biased upwards so much that the kernel distance is to be preferred"""
SUBSETS, SUBSET = 100, 1000
"""Of the kernel distance"""
SPLITS = 10
"""Of the Inception Score"""
HALVES = 100
"""Times that each set is halved at random to see how figures scatter"""
LARGEST = 512
"""Numbers in a feature vector above which the Fréchet distance is not computed again for each half: it takes minutes"""
SETTINGS = {
    "kid_subsets": SUBSETS,
    "kid_subset_size": SUBSET,
    "inception_score_splits": SPLITS,
    "neighbours": 3,
}
"""What of the above a stamp should say"""


@dataclass(frozen=True)
class Figure:
    """One figure of merit."""

    value: float
    error: float | None = None
    """Standard error"""
    interval: tuple[float, float] | None = None
    """Where 95 % of repetitions would lie"""

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return {"value": self.value, "error": self.error, "interval": self.interval and list(self.interval)}


def of_sets(made: Seen, real: Seen, *, paired: bool = False, seed: int = 0) -> dict[str, Figure]:
    """Made pictures against real ones: frechet, kid, precision, recall and, of a classifier, inception_score.

    How far a figure scatters is seen on random halves of both sets, drawn without replacement: of n/2 among n, the
    spread is that of n among infinitely many (the delete-d jackknife, Shao and Wu 1989). Drawing with replacement
    would put copies of a picture into a set, which neither kernel distance nor precision and recall survive. Halves
    give other means than the whole, so that the interval is their scatter around the value of the whole. Of pictures
    that are `paired`, made from the real one in the same place, both are in a half or neither.
    """
    require_enough(len(made.features), len(real.features))
    whole = measured(made, real, SUBSETS, frechet=True)
    scatter: dict[str, list[float]] = {}
    rng = np.random.default_rng(seed)
    again = made.features.shape[1] <= LARGEST
    for _ in tqdm(range(HALVES), desc="scatter of the figures", unit="half", leave=False):
        rows = [rng.permutation(len(seen.features))[: len(seen.features) // 2] for seen in (made, real)]
        parts = [made.rows(rows[0]), real.rows(rows[0] if paired else rows[1])]
        for name, value in measured(parts[0], parts[1], 10, frechet=again).items():
            scatter.setdefault(name, []).append(value)
    figures = {name: scattered(value, scatter.get(name, [])) for name, value in whole.items()}
    for name in ("precision", "recall"):  # which are shares
        low, high = figures[name].interval or (0.0, 1.0)
        figures[name] = replace(figures[name], interval=(max(0.0, low), min(1.0, high)))
    return figures


def require_enough(made: int, real: int) -> None:
    """UserError if one of two sets is too small to be compared."""
    if min(made, real) < LEAST:
        raise UserError(
            f"{made} pictures can't be compared with {real} real ones: at least {LEAST} of each are needed."
        )


def scattered(value: float, again: Sequence[float]) -> Figure:
    """A figure of the whole with how it scattered; without, if that is not known."""
    if not again:
        return Figure(value)
    around = np.asarray(again) - np.mean(again)
    low, high = (value + float(np.quantile(around, share)) for share in (0.025, 0.975))
    return Figure(value, float(np.std(around, ddof=1)), (low, high))


def measured(made: Seen, real: Seen, subsets: int, *, frechet: bool) -> dict[str, float]:
    """The figures alone; the costly Fréchet distance only if wanted, the Inception Score only of a classifier."""
    package("torch_fidelity")
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    one, other = made.features.double(), real.features.double()
    found: dict[str, float] = {}
    if frechet:
        statistics = [fid_features_to_statistics(features) for features in (one, other)]
        distance = fid_statistics_to_metric(*statistics, verbose=False)
        found["frechet"] = distance["frechet_inception_distance"]
    size = min(SUBSET, len(one), len(other))
    kernel = kid_features_to_metric(one, other, kid_subsets=subsets, kid_subset_size=size, verbose=False)
    found["kid"] = kernel["kernel_inception_distance_mean"]
    device = best_device()
    near = prc_features_to_metric(
        made.features.to(device), real.features.to(device), save_cpu_ram=True, verbose=False
    )
    found |= {"precision": near["precision"], "recall": near["recall"]}
    if made.logits is not None:
        score = isc_features_to_metric(made.logits, splits=min(SPLITS, len(one)))
        found["inception_score"] = score["inception_score_mean"]
    return found


def of_pictures(values: Tensor, seed: int = 0, times: int = 1000) -> Figure:
    """The mean of a figure [N] that each picture has of its own, by the bootstrap over pictures."""
    numbers = values.double().numpy()
    rng = np.random.default_rng(seed)
    means = [numbers[rng.integers(len(numbers), size=len(numbers))].mean() for _ in range(times)]
    low, high = (float(np.quantile(means, share)) for share in (0.025, 0.975))
    return Figure(float(numbers.mean()), float(np.std(means, ddof=1)), (low, high))
