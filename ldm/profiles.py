"""Averages of weights whose length is chosen after training (Karras et al. 2023, arXiv 2312.02696, section 3.2).

The weights after step tau count tau^gamma in a power-function average: its length is a share of the run so far,
sigma_rel, the standard deviation of that profile over the run's length. Two such averages are tracked and kept as
snapshots along the run; a sum of snapshots comes near the average of any other length (appendix C).
Snapshots are float16, as in the paper: what is drawn from them is rounded more than that anyway.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors import safe_open
from torch import Tensor, nn

from autoencoder.files import flush, write_tensors
from ldm.checkpoint import writing
from ldm.config import UserError
from ldm.ema import EMA

TRACKED = (0.05, 0.10)
"""sigma_rel of the averages that are tracked"""
LONGEST = 12**-0.5
"""sigma_rel of the plain mean over the whole run, gamma = 0"""
WORST = 0.1
"""How far, relative to its own norm, a sum of snapshots may be from the profile that was asked for"""

Point = tuple[float, float]  # (gamma, t): the profile of the average with exponent gamma at step t


def exponent(sigma_rel: float) -> float:
    """gamma >= 0 of the profile with this relative standard deviation (paper, equation 4 inverted)."""
    if not 0 < sigma_rel <= LONGEST:
        raise UserError(f"sigma_rel is {sigma_rel}, but must lie above 0 and up to {LONGEST:.4f}.")
    inverse = sigma_rel**-2  # (gamma + 1) inverse = (gamma + 2)^2 (gamma + 3)
    roots = np.roots([1, 7, 16 - inverse, 12 - inverse])
    return max(0.0, float(roots[np.abs(roots.imag) < 1e-6].real.max()))


def product(one: Point, other: Point) -> float:
    """Integral of the product of two profiles p(tau) = (gamma + 1) tau^gamma / t^(gamma + 1), 0 <= tau <= t."""
    (gamma, t), (delta, s) = one, other
    first = min(t, s)
    ends = (first / t) ** (gamma + 1) * (first / s) ** (delta + 1) / first
    return (gamma + 1) * (delta + 1) / (gamma + delta + 1) * ends


def mixture(points: Sequence[Point], wanted: Point) -> tuple[np.ndarray, float]:
    """Coefficients [N], of sum 1, with which profiles come nearest to the wanted one, and how near.

    The distance is relative: the norm of the difference by that of the wanted profile. Sum 1 is ours, not the paper's:
    what all snapshots have in common then stays as it is.
    """
    length = np.array([product(p, p) ** 0.5 for p in points])
    gram = np.array([[product(p, q) for q in points] for p in points]) / np.outer(length, length)
    inverse = np.linalg.pinv(gram, rcond=1e-12, hermitian=True)
    along = np.array([product(p, wanted) for p in points]) / length
    ones = 1 / length
    free = inverse @ along
    x = free + inverse @ ones * (1 - ones @ free) / (ones @ inverse @ ones)
    square = product(wanted, wanted)
    distance = max(0.0, x @ gram @ x - 2 * x @ along + square) / square
    return x / length, distance**0.5


class PowerEMA(EMA):
    """The average with the profile of `sigma_rel`; exact for weights that stay the same during a step."""

    def __init__(self, sigma_rel: float, **modules: nn.Module) -> None:
        super().__init__(0.0, **modules)
        self.gamma = exponent(sigma_rel)

    def weight(self, step: int) -> float:
        return 1 - (1 - 1 / step) ** (self.gamma + 1)


class Profiles:
    """The tracked averages of a run."""

    def __init__(self, **modules: nn.Module) -> None:
        self.averages = {f"{sigma_rel:g}": PowerEMA(sigma_rel, **modules) for sigma_rel in TRACKED}

    def update(self, step: int, **modules: nn.Module) -> None:
        """See `EMA.update`."""
        for average in self.averages.values():
            average.update(step, **modules)

    def save(self, folder: Path, step: int) -> None:
        """Write the snapshot FOLDER/step-XXXXXXXX.safetensors: SIGMA_REL/MODULE.PARAMETER in float16."""
        tensors = {
            f"{sigma_rel}/{name}.{key}": parameter.detach().half().contiguous()
            for sigma_rel, average in self.averages.items()
            for name, module in average.modules.items()
            for key, parameter in module.named_parameters()
        }
        target = folder / f"step-{step:08d}.safetensors"
        fresh = target.with_suffix(".writing")
        with writing(target):
            folder.mkdir(exist_ok=True)
            write_tensors(fresh, tensors)
            flush(fresh)
            fresh.replace(target)

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        return {sigma_rel: average.state_dict() for sigma_rel, average in self.averages.items()}

    def load_state_dict(self, state: dict[str, dict[str, Tensor]]) -> None:
        for sigma_rel, average in self.averages.items():
            average.load_state_dict(state[sigma_rel])


def reconstruct(
    folder: Path, sigma_rel: float, step: int | None = None
) -> tuple[dict[str, Tensor], int, float]:
    """The average of length `sigma_rel` that ends at `step`, out of a run's snapshots.

    Args:
        folder: RUN/ema.
        step: by default that of the last snapshot.

    Returns:
        MODULE.PARAMETER float32, the step, and the relative distance of its profile from the one asked for.

    Raises:
        UserError: no snapshots, none up to `step`, or too few for this profile.
    """
    files = {int(p.stem.removeprefix("step-")): p for p in sorted(folder.glob("step-*.safetensors"))}
    if not files:
        raise UserError(f"{folder} holds no snapshots; train with --ema_every N to keep some.")
    step = max(files) if step is None else step
    used = [at for at in files if at <= step]
    if not used:
        raise UserError(f"The first snapshot in {folder} is of step {min(files)}, after step {step}.")
    keys = [(at, sigma) for at in used for sigma in TRACKED]
    x, distance = mixture([(exponent(sigma), at) for at, sigma in keys], (exponent(sigma_rel), step))
    if distance > WORST:
        raise UserError(
            f"The {len(used)} snapshots up to step {step} come no nearer to sigma_rel {sigma_rel:g} than "
            f"{distance:.0%}; choose one between {TRACKED[0]} and {TRACKED[1]}, or train with a smaller ema_every."
        )
    weights: dict[str, Tensor] = {}
    share = dict(zip(keys, x.tolist(), strict=True))
    for at in used:
        with safe_open(files[at], framework="pt") as snapshot:
            for key in snapshot.keys():  # noqa: SIM118
                sigma, _, name = key.partition("/")
                part = snapshot.get_tensor(key).float() * share[at, float(sigma)]
                weights[name] = weights[name] + part if name in weights else part
    return weights, step, distance
