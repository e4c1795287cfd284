"""What the network's output means, and how much each noise level counts in the loss.

Every prediction is linear in (x_0, eps), so a unit error of the output makes a certain error in x_0 and one
in eps. The loss weights are ways to combine their squares:

    uniform        1                                  the mean square of the output's own error
    min_snr        min(eps^2, gamma x_0^2)            Hang et al. 2023: x_0 loss times min(SNR, gamma)
    soft_min_snr   1 / (1/eps^2 + 1/(gamma x_0^2))    Crowson et al. 2024: the same, without a corner
    edm            eps^2 + x_0^2 / sigma_data^2       Karras et al. 2022: 1 for their own prediction
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor

from ldm.checks import require_positive
from ldm.paths import Path


class Prediction(Protocol):
    """Meaning of the network's output. alpha and sigma broadcast against x [B,C,H,W]."""

    name: ClassVar[str]

    def target(self, x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """What the network should have put out."""
        ...

    def to_x0(self, x: Tensor, out: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """The estimate of x_0 that an output at x = alpha x_0 + sigma eps stands for."""
        ...

    def errors(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """Squared errors in x_0 and in eps that a unit error of the output makes; they may be infinite."""
        ...


@dataclass(frozen=True)
class Epsilon:
    """The noise (Ho et al. 2020)."""

    name: ClassVar[str] = "epsilon"

    def target(self, x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return eps

    def to_x0(self, x: Tensor, out: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        if (alpha == 0).any():
            raise ValueError(
                "prediction epsilon says nothing about x_0 at alpha 0, pure noise; start below it, "
                "with spacing leading or trailing, or choose prediction v or flow"
            )
        return (x - sigma * out) / alpha

    def errors(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        return (sigma / alpha) ** 2, torch.ones_like(alpha)


@dataclass(frozen=True)
class Sample:
    """The clean sample."""

    name: ClassVar[str] = "sample"

    def target(self, x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return x0

    def to_x0(self, x: Tensor, out: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return out

    def errors(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(alpha), (alpha / sigma) ** 2


@dataclass(frozen=True)
class Flow:
    """The velocity of the straight line from data to noise, eps - x_0 (Liu et al. 2022)."""

    name: ClassVar[str] = "flow"

    def target(self, x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return eps - x0

    def to_x0(self, x: Tensor, out: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return (x - sigma * out) / (alpha + sigma)

    def errors(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        return (sigma / (alpha + sigma)) ** 2, (alpha / (alpha + sigma)) ** 2


@dataclass(frozen=True)
class Edm:
    """F in x_0 = c_skip x + c_out F, which has variance 1 at every level (Karras et al. 2022, table 1)."""

    name: ClassVar[str] = "edm"
    sign: ClassVar[int] = 1

    sigma_data: float = 1.0
    """Standard deviation of x_0"""

    def norm(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Standard deviation of x."""
        return ((alpha * self.sigma_data) ** 2 + sigma**2).sqrt()

    def target(self, x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        # (x_0 - c_skip x) / c_out with the common factor sigma cancelled: finite at every level
        scale = self.sign / self.norm(alpha, sigma)
        return scale * (sigma / self.sigma_data * x0 - alpha * self.sigma_data * eps)

    def to_x0(self, x: Tensor, out: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        norm = self.norm(alpha, sigma)
        skip = alpha * self.sigma_data**2 / norm**2
        return skip * x + (self.sign * self.sigma_data * sigma / norm) * out

    def errors(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        in_x0 = (self.sigma_data * sigma / self.norm(alpha, sigma)) ** 2
        return in_x0, (self.sigma_data * alpha / self.norm(alpha, sigma)) ** 2


@dataclass(frozen=True)
class V(Edm):
    """alpha eps - sigma x_0 on a VP path (Salimans & Ho 2022, app. D); on others, EDM's times -1."""

    name: ClassVar[str] = "v"
    sign: ClassVar[int] = -1


PredictionName = Literal["epsilon", "sample", "v", "flow", "edm"]
PREDICTIONS: dict[str, type[Epsilon] | type[Sample] | type[Flow] | type[Edm]] = {
    kind.name: kind for kind in (Epsilon, Sample, V, Flow, Edm)
}


def make_prediction(name: str, path: Path) -> Prediction:
    """The prediction of that name, for data of the path's standard deviation."""
    if name not in PREDICTIONS:
        raise ValueError(f"prediction is {name!r}, but must be one of {', '.join(PREDICTIONS)}")
    kind = PREDICTIONS[name]
    return kind(path.sigma_data) if issubclass(kind, Edm) else kind()


@dataclass(frozen=True, kw_only=True)
class Weight:
    """How much each noise level counts in the loss."""

    kind: Literal["uniform", "min_snr", "soft_min_snr", "edm"] = "uniform"
    """uniform: every level alike. min_snr, soft_min_snr: less for low noise. edm: as Karras et al."""
    gamma: float = 5.0
    """Of min_snr and soft_min_snr: signal-to-noise ratio above which levels count less"""

    def __post_init__(self) -> None:
        require_positive("gamma", self.gamma)
        if self.gamma != 5.0 and self.kind not in ("min_snr", "soft_min_snr"):
            raise ValueError(f"gamma is set, but weight is {self.kind}: remove one of the two")

    def __call__(self, prediction: Prediction, alpha: Tensor, sigma: Tensor, sigma_data: float) -> Tensor:
        """Weights of the shape of alpha and sigma, for the squared error of the output."""
        in_x0, in_eps = prediction.errors(alpha, sigma)
        if self.kind == "uniform":
            return torch.ones_like(alpha)
        if self.kind == "min_snr":
            return torch.minimum(in_eps, self.gamma * in_x0)
        if self.kind == "soft_min_snr":
            return 1 / (1 / in_eps + 1 / (self.gamma * in_x0))
        return in_eps + in_x0 / sigma_data**2
