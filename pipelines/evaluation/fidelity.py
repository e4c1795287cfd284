"""Figures of merit with their uncertainty, from features of two sets of pictures or from a number for each picture.

The figures of two sets are torch-fidelity's own functions, with its defaults: Fréchet distance (Heusel et al. 2017),
kernel distance (Bińkowski et al. 2018: cubic kernel, mean over 100 subsets of at most 1000), Inception Score (Salimans
et al. 2016, 10 splits), precision and recall (Kynkäänniemi et al. 2019, 3 neighbours).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm.config import UserError
from pipelines.evaluation.bootstrap import NEIGHBOURS, anew, drawn_anew
from pipelines.evaluation.extractors import Seen, package
from pipelines.latent_diffusion import best_device

LEAST = 8
"""Pictures in a set: fewer can't show how figures scatter"""
FEW = 10_000
"""Pictures below which the Fréchet distance is biased upwards so much that the kernel distance is to be preferred"""
SUBSETS, SUBSET = 100, 1000
"""Of the kernel distance"""
SPLITS = 10
"""Of the Inception Score"""
TIMES = 400
"""Times that pictures are drawn anew to see how figures scatter"""
SURE = 1.96
"""Standard errors on either side of a figure that take in 95 % of repetitions"""
SETTINGS = {
    "kid_subsets": SUBSETS,
    "kid_subset_size": SUBSET,
    "inception_score_splits": SPLITS,
    "neighbours": NEIGHBOURS,
    "bootstrap_times": TIMES,
}
"""What of the above a stamp should say"""
BOUNDS = {
    "frechet": (0.0, np.inf),
    "inception_score": (1.0, np.inf),
    "precision": (0.0, 1.0),
    "recall": (0.0, 1.0),
}
"""Beyond which a figure can't lie"""


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

    Errors and intervals are of the bootstrap over the pictures of both sets (`bootstrap.py`), laid around the value
    of the whole. They say how it would differ if as many other pictures were made, and other real ones taken; not
    how far it is biased, as the Fréchet distance of few pictures is. Where both sets are alike they are too wide rather
    than too narrow. Of pictures that are `paired`, made from the real one in the same place, both are drawn or neither.
    """
    require_enough(len(made.features), len(real.features))
    rng = np.random.default_rng(seed)
    w = drawn_anew(len(made.features), TIMES, rng)
    v = w if paired else drawn_anew(len(real.features), TIMES, rng)
    again = anew(made, real, w, v)
    found = {
        name: around(value, again[name], BOUNDS.get(name)) for name, value in measured(made, real).items()
    }
    for name, n in (("precision", len(made.features)), ("recall", len(real.features))):
        if not found[name].error:  # all or none lie within, however often they are drawn anew
            found[name] = share_of(round(found[name].value * n), n)
    return found


def require_enough(made: int, real: int) -> None:
    """UserError if one of two sets is too small to be compared."""
    if min(made, real) < LEAST:
        raise UserError(
            f"{made} pictures can't be compared with {real} real ones: at least {LEAST} of each are needed."
        )


def around(value: float, again: Tensor, bounds: tuple[float, float] | None = None) -> Figure:
    """A figure of the whole with the scatter of its repetitions [times] around their own mean."""
    off = (again - again.mean()).numpy()
    low, high = (value + float(np.quantile(off, share)) for share in (0.025, 0.975))
    least, most = bounds or (-np.inf, np.inf)
    return Figure(value, float(off.std(ddof=1)), (max(least, low), min(most, high)))


def measured(made: Seen, real: Seen) -> dict[str, float]:
    """The figures alone; the Inception Score only of a classifier."""
    package("torch_fidelity")
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    one, other = made.features.double(), real.features.double()
    statistics = [fid_features_to_statistics(features) for features in (one, other)]
    distance = fid_statistics_to_metric(*statistics, verbose=False)
    found = {"frechet": distance["frechet_inception_distance"]}
    size = min(SUBSET, len(one), len(other))
    subsets = SUBSETS if size < max(len(one), len(other)) else 1  # all of both, the same each time
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


def of_pictures(values: Tensor, seed: int = 0) -> Figure:
    """The mean of a figure [N] that each picture has of its own, by the bootstrap over pictures; of bool, the share."""
    if values.dtype == torch.bool:
        return share_of(int(values.sum()), len(values))
    numbers = values.double()
    rng = np.random.default_rng(seed)
    again = [numbers[rng.integers(len(numbers), size=len(numbers))].mean() for _ in range(1000)]
    return around(numbers.mean().item(), torch.stack(again))


def share_of(k: int, n: int) -> Figure:
    """k of n pictures, with the score interval (Wilson 1927).

    The bootstrap can't say how sure 0 of n or n of n are: it would draw the same each time. The error is what the
    interval is wide by, so that two shares can be compared at these ends too.
    """
    z = SURE
    middle = (k + z**2 / 2) / (n + z**2)
    half = z / (n + z**2) * math.sqrt(k * (n - k) / n + z**2 / 4)
    return Figure(k / n, half / z, (max(0.0, middle - half), min(1.0, middle + half)))
