"""Noise paths  x_t = alpha_t x_0 + sigma_t eps:  which levels there are, which to train on, which to visit.

    VP    alpha^2 + sigma^2 = 1   DDPM, Stable Diffusion       t = 0 .. 999, an index into a table
    Flow  alpha + sigma = 1       rectified flow, SD3, FLUX    t = 1000 sigma
    EDM   alpha = 1               Karras et al. 2022           t = ln(sigma) / 4

t is always the number that the network is told. Tables and grids repeat diffusers' float32 roundings, which
show where alpha is small, so that both libraries draw the same picture.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import ClassVar, Literal, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from ldm.checks import require_int, require_positive

Spacing = Literal["trailing", "leading", "linspace", "karras", "exponential"]
Array = np.ndarray
Values = TypeVar("Values", Tensor, Array)


class Level(NamedTuple):
    """One noise level, or one for each sample of a batch: shapes [] or [B]."""

    t: Tensor  # what the network is told
    alpha: Tensor  # signal
    sigma: Tensor  # noise


@dataclass(frozen=True)
class Grid:
    """Noise levels to visit, from noisiest to clean: N steps need N + 1 levels. CPU float64."""

    t: Tensor  # [N+1] what the network is told; the last is never told
    alpha: Tensor  # [N+1] signal
    sigma: Tensor  # [N+1] noise, falling to 0

    def __len__(self) -> int:
        return len(self.t) - 1

    def __getitem__(self, i: int) -> Level:
        return Level(self.t[i], self.alpha[i], self.sigma[i])

    @cached_property
    def h(self) -> Tensor:
        """[N] Gain in lambda = ln(alpha / sigma) over each step; infinite from pure noise, and to the end."""
        return (self.alpha.log() - self.sigma.log()).diff()

    @property
    def start(self) -> float:
        """Standard deviation of the noise to start from, for data of variance 1."""
        return max(1.0, math.hypot(self.alpha[0].item(), self.sigma[0].item()))

    def from_strength(self, strength: float) -> Grid:
        """The last int(N strength) steps, to begin from a noised picture, as stock img2img does.

        Raises:
            ValueError: strength lies outside (0, 1], or leaves no step.
        """
        if not 0 < strength <= 1:
            raise ValueError(f"strength is {strength}, but must lie in (0, 1]")
        kept = int(len(self) * strength)
        if kept == 0:
            raise ValueError(f"strength {strength} of {len(self)} steps leaves none; raise strength or steps")
        first = len(self) - kept
        return Grid(self.t[first:], self.alpha[first:], self.sigma[first:])


class Path(Protocol):
    """A Gaussian path from data to noise."""

    kind: ClassVar[str]
    spacings: ClassVar[tuple[Spacing, ...]]  # the first is the default

    @property
    def sigma_data(self) -> float:
        """Standard deviation of x_0."""
        ...

    @property
    def train_steps(self) -> int:
        """Number of levels distinguished in training, and the largest number of sampling steps."""
        ...

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Times of any shape => alpha, sigma of that shape and dtype."""
        ...

    def times(self, u: Tensor) -> Tensor:
        """Uniform numbers in (0, 1), any shape => times to train on. A pure function, so that runs repeat."""
        ...

    def grid(self, steps: int, spacing: Spacing | None = None) -> Grid:
        """Levels for `steps` sampling steps; ValueError or TypeError names a bad argument."""
        ...

    def scale_input(self, x: Tensor, sigma: Tensor) -> Tensor:
        """x_t as the network is shown it."""
        ...


def stratify(u: Tensor, index: Tensor | int, n: int) -> Tensor:
    """Give each of n samples its own n-th of (0, 1): lower variance of the loss, same distribution.

    Args:
        u: [B] uniform in (0, 1).
        index: [B] or one, the sample's place in the (global) batch of n; taken modulo n.
    """
    return (index % n + u) / n


def normal_quantile(u: Tensor) -> Tensor:
    """Inverse distribution function of the standard normal, finite for every u in [0, 1]."""
    tiny = torch.finfo(u.dtype).eps
    return torch.special.ndtri(u.clamp(tiny, 1 - tiny))


@dataclass(frozen=True, kw_only=True)
class VP:
    """Variance preserving: alpha^2 + sigma^2 = 1, in `train_steps` discrete levels (Ho et al. 2020)."""

    kind: ClassVar[str] = "vp"
    spacings: ClassVar[tuple[Spacing, ...]] = ("trailing", "leading", "linspace", "karras", "exponential")
    sigma_data: ClassVar[float] = 1.0

    schedule: Literal["linear", "scaled_linear", "cosine", "sigmoid"] = "scaled_linear"
    """Growth of the noise of a step: linear (DDPM), scaled_linear (Stable Diffusion), cosine or sigmoid"""
    beta_start: float | None = None
    """Variance added in the first step; by default 0.00085 for scaled_linear, else 0.0001; none for cosine"""
    beta_end: float | None = None
    """Variance added in the last step; by default 0.012 for scaled_linear, else 0.02; none for cosine"""
    zero_terminal_snr: bool = False
    """Rescale so that the last level is pure noise (Lin et al. 2023, algorithm 1)"""
    train_steps: int = 1000
    """Number of levels"""

    def __post_init__(self) -> None:
        require_int("train_steps", self.train_steps, 2, 1_000_000)
        if self.schedule == "cosine":
            if (self.beta_start, self.beta_end) != (None, None):
                raise ValueError("beta_start and beta_end mean nothing for schedule cosine; remove them")
        elif not 0 < self.betas[0] <= self.betas[1] < 1:
            raise ValueError(f"beta_start, beta_end are {self.betas}, but must satisfy 0 < start <= end < 1")

    @property
    def betas(self) -> tuple[float, float]:
        """Variance added in the first and the last step; not used by cosine."""
        start, end = (0.00085, 0.012) if self.schedule == "scaled_linear" else (0.0001, 0.02)
        given = (self.beta_start, self.beta_end)
        return (start if given[0] is None else given[0], end if given[1] is None else given[1])

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        signal = vp_table(self, t.device)[t.long()]
        return signal.sqrt().to(t.dtype), (1 - signal).sqrt().to(t.dtype)

    def times(self, u: Tensor) -> Tensor:
        return (u * self.train_steps).floor().clamp(max=self.train_steps - 1)

    def grid(self, steps: int, spacing: Spacing | None = None) -> Grid:
        require_int("steps", steps, 1, self.train_steps)
        spacing = require_spacing(self, spacing)
        ratios = vp_ratios(self)
        if spacing in ("karras", "exponential"):
            ratio = SPACINGS[spacing](ratios[-1].item(), ratios[0].item(), steps)
            rising = np.maximum.accumulate(ratios)
            t = np.interp(np.log(ratio), np.log(rising), np.arange(len(ratios)))
            t = t.round() if spacing == "karras" and self.schedule != "cosine" else t  # as DPM-Solver does
        else:
            t = self.spaced(steps, spacing)
            ratio = np.interp(t, np.arange(len(ratios)), ratios)
        ratio = np.append(ratio, 0).astype(np.float32).astype(np.float64)
        if ratio[0] <= ratio[1]:  # 4096 may be below the next level, which stock overlooks
            ratio[0] = 2 * ratio[1]
        alpha = 1 / np.sqrt(1 + ratio**2)
        return make_grid(np.trunc(t), alpha, ratio * alpha)

    def spaced(self, steps: int, spacing: Spacing) -> Array:
        """Whole times, falling (Lin et al. 2023, table 2)."""
        n = self.train_steps
        if spacing == "trailing":
            return np.arange(n, 0, -n / steps)[:steps].round() - 1  # rounding may give arange one too many
        if spacing == "leading":
            return np.arange(steps)[::-1] * (n // steps)
        return np.linspace(0, n - 1, steps).round()[::-1]

    def scale_input(self, x: Tensor, sigma: Tensor) -> Tensor:
        return x


def vp_betas(path: VP) -> Tensor:
    """[train_steps] float32 variance added in each step."""
    n = path.train_steps
    start, end = path.betas
    if path.schedule == "linear":
        return torch.linspace(start, end, n)
    if path.schedule == "scaled_linear":
        return torch.linspace(start**0.5, end**0.5, n) ** 2
    if path.schedule == "sigmoid":
        return torch.linspace(-6, 6, n).sigmoid() * (end - start) + start
    # Nichol & Dhariwal 2021, eq. 17
    signal = [math.cos((i / n + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(n + 1)]
    return torch.tensor([min(1 - after / before, 0.999) for before, after in pairwise(signal)])


@lru_cache(maxsize=32)
def vp_table(path: VP, device: torch.device) -> Tensor:
    """[train_steps] alpha^2 of each level, float64 but accumulated in float32, as every stock tool does."""
    signal = (1 - vp_betas(path)).cumprod(0)
    if path.zero_terminal_snr:
        root = signal.sqrt()
        root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
        steps = torch.cat([root[:1] ** 2, root[1:] ** 2 / root[:-1] ** 2])
        signal = (1 - (1 - steps)).cumprod(0)
    return signal.double().to(device)


def vp_ratios(path: VP) -> Array:
    """[train_steps] float32 sigma / alpha, with pure noise kept finite at 4096, as stock samplers do."""
    signal = vp_table(path, torch.device("cpu")).float()
    signal[-1] = 2**-24 if path.zero_terminal_snr else signal[-1]
    return ((1 - signal) / signal).sqrt().numpy()


@dataclass(frozen=True, kw_only=True)
class Flow:
    """Rectified flow: alpha = 1 - sigma (Liu et al. 2022), as in SD3 (Esser et al. 2024)."""

    kind: ClassVar[str] = "flow"
    spacings: ClassVar[tuple[Spacing, ...]] = ("leading", "trailing", "linspace", "karras", "exponential")
    train_steps: ClassVar[int] = 1000
    sigma_data: ClassVar[float] = 1.0

    shift: float = 1.0
    """Above 1, training and sampling move to noise: sigma becomes shift sigma / (1 + (shift - 1) sigma)"""
    shift_tokens: int | None = None
    """Latent pixels at which `shift` holds; n times as many multiply it by sqrt(n) (SD3, eq. 23)"""
    times_by: Literal["logit_normal", "uniform"] = "logit_normal"
    """Distribution of sigma in training, before the shift"""
    logit_mean: float = 0.0
    """Mean of ln(sigma / (1 - sigma)); above 0 trains more on noise"""
    logit_std: float = 1.0
    """Standard deviation of ln(sigma / (1 - sigma))"""

    def __post_init__(self) -> None:
        require_positive("shift", self.shift)
        require_positive("logit_std", self.logit_std)
        if self.shift_tokens is not None:
            require_int("shift_tokens", self.shift_tokens, 1, 2**40)
        if self.times_by == "uniform" and (self.logit_mean, self.logit_std) != (0.0, 1.0):
            raise ValueError("logit_mean and logit_std mean nothing for times_by uniform; remove them")

    def at(self, tokens: int) -> Flow:
        """This path at a size of `tokens` latent pixels: the shift is then fixed."""
        if self.shift_tokens is None:
            return self
        require_int("tokens", tokens, 1, 2**40)
        return replace(self, shift=self.shift * math.sqrt(tokens / self.shift_tokens), shift_tokens=None)

    def shifted(self, sigma: Values) -> Values:
        """sigma in [0, 1] => shifted sigma in [0, 1]."""
        return self.shift * sigma / (1 + (self.shift - 1) * sigma)

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        sigma = t / self.train_steps
        return 1 - sigma, sigma

    def times(self, u: Tensor) -> Tensor:
        if self.times_by == "logit_normal":
            u = torch.sigmoid(self.logit_mean + self.logit_std * normal_quantile(u))
        return self.shifted(u) * self.train_steps

    def grid(self, steps: int, spacing: Spacing | None = None) -> Grid:
        """`leading` (DPM-Solver) leaves out pure noise, `trailing` (UniPC) starts a millionth below it; both
        tell whole times. The others (FlowMatchEuler) start at pure noise, and shift twice at the low end."""
        require_int("steps", steps, 1, self.train_steps)
        spacing = require_spacing(self, spacing)
        least = 1 / self.train_steps
        if spacing == "leading":
            sigma = self.shifted(1 - np.linspace(1, least, steps + 1))[:0:-1]
        elif spacing == "trailing":
            sigma = self.shifted(np.linspace(1, least, steps + 1)[:-1])
            sigma[0] -= 1e-6 if 1 - sigma[0] < 1e-6 else 0.0
        else:
            low, high = self.shifted(np.array([least, 1], np.float32)).astype(np.float64)
            sigma = self.shifted(np.linspace(high, low, steps))
            sigma = SPACINGS[spacing](sigma[0], sigma[-1], steps) if spacing != "linspace" else sigma
        rounded = np.append(sigma, 0).astype(np.float32)
        t = np.trunc(sigma * self.train_steps) if spacing in ("leading", "trailing") else rounded[:-1] * 1000
        return make_grid(t, 1 - rounded.astype(np.float64), rounded)

    def scale_input(self, x: Tensor, sigma: Tensor) -> Tensor:
        return x


@dataclass(frozen=True, kw_only=True)
class EDM:
    """Variance exploding, alpha = 1, with the levels and input scaling of Karras et al. 2022, table 1."""

    kind: ClassVar[str] = "edm"
    spacings: ClassVar[tuple[Spacing, ...]] = ("karras", "exponential")
    train_steps: ClassVar[int] = 1000

    sigma_min: float = 0.002
    """Lowest noise level of a sampling grid, in units of the latents"""
    sigma_max: float = 80.0
    """Highest noise level of a sampling grid"""
    sigma_data: float = 1.0
    """Standard deviation of the latents"""
    rho: float = 7.0
    """Above 1, `karras` sampling steps are denser at low noise (eq. 5)"""
    log_mean: float = -0.5
    """Mean of ln(sigma) in training; the paper has -1.2 for sigma_data 0.5, which is -0.5 for 1"""
    log_std: float = 1.2
    """Standard deviation of ln(sigma) in training"""

    def __post_init__(self) -> None:
        for name in ("sigma_min", "sigma_max", "sigma_data", "rho", "log_std"):
            require_positive(name, getattr(self, name))
        if self.sigma_min >= self.sigma_max:
            raise ValueError(f"sigma_min is {self.sigma_min}, but must lie below sigma_max {self.sigma_max}")

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(t), (4 * t).exp()

    def times(self, u: Tensor) -> Tensor:
        return (self.log_mean + self.log_std * normal_quantile(u)) / 4

    def grid(self, steps: int, spacing: Spacing | None = None) -> Grid:
        require_int("steps", steps, 1, self.train_steps)
        spacing = require_spacing(self, spacing)
        if spacing == "karras":
            sigma = karras(self.sigma_max, self.sigma_min, steps, self.rho)
        else:
            sigma = exponential(self.sigma_max, self.sigma_min, steps)
        sigma = sigma.astype(np.float32).astype(np.float64)
        return make_grid(np.log(sigma) / 4, np.ones(steps + 1), np.append(sigma, 0))

    def scale_input(self, x: Tensor, sigma: Tensor) -> Tensor:
        return x / (sigma**2 + self.sigma_data**2).sqrt()


def karras(high: float, low: float, steps: int, rho: float = 7.0) -> Array:
    """[steps] from high to low, evenly spaced in the rho-th root (Karras et al. 2022, eq. 5)."""
    return np.linspace(high ** (1 / rho), low ** (1 / rho), steps) ** rho


def exponential(high: float, low: float, steps: int) -> Array:
    """[steps] from high to low, evenly spaced in the logarithm."""
    return np.exp(np.linspace(math.log(high), math.log(low), steps))


SPACINGS: dict[str, Callable[[float, float, int], Array]] = {"karras": karras, "exponential": exponential}


def make_grid(t: Array, alpha: Array, sigma: Array) -> Grid:
    """[N], [N+1], [N+1] => Grid."""
    return Grid(*(torch.tensor(a, dtype=torch.float64) for a in (np.append(t, 0), alpha, sigma)))


def require_spacing(path: Path, spacing: Spacing | None) -> Spacing:
    """The spacing, or the path's default; ValueError names those there are."""
    if spacing is None:
        return path.spacings[0]
    if spacing not in path.spacings:
        raise ValueError(f"spacing is {spacing!r}, but path {path.kind} has {', '.join(path.spacings)}")
    return spacing


@dataclass(frozen=True, kw_only=True)
class PathConfig:
    """Which noise path; only the group of the chosen kind may be set."""

    kind: Literal["flow", "vp", "edm"] = "flow"
    """flow: rectified flow. vp: variance preserving, as DDPM and Stable Diffusion. edm: Karras et al."""
    flow: Flow = Flow()
    vp: VP = VP()
    edm: EDM = EDM()

    def __post_init__(self) -> None:
        for field in fields(self):
            if field.name not in ("kind", self.kind) and getattr(self, field.name) != field.default:
                raise ValueError(f"{field.name} is set, but kind is {self.kind}: remove one of the two")


def make_path(config: PathConfig) -> Path:
    """The path that config chooses."""
    paths: dict[str, Path] = {"flow": config.flow, "vp": config.vp, "edm": config.edm}
    return paths[config.kind]
