"""Samplers for any Gaussian path  x_t = alpha_t x_0 + sigma_t eps.

All of them are one update, `step`, which is exact while the estimate of x_0 stays constant:

    x' = alpha' x0 + sigma' (sqrt(1 - eta^2 r) eps + eta sqrt(r) z),  r = 1 - exp(-2h),  h = lambda' - lambda

with lambda = ln(alpha / sigma). They differ only in how x_0 is estimated (once, extrapolated from the last
step, corrected afterwards) and in eta, the share of the noise that is renewed.

    eta = 0   DDIM = Euler = flow-matching Euler = DPM-Solver++(1)
    eta = 1   DDPM = Euler ancestral = SDE-DPM-Solver++(1)
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from ldm.paths import Grid, Level

Denoise = Callable[[Tensor, Level], Tensor]  # x_t [B,C,H,W] and its level => estimate of x_0 [B,C,H,W]
Noise = Callable[[int], Tensor]  # step i => standard normal [B,C,H,W]
Watch = Callable[[int, Tensor, Tensor], None]  # step i, x after it, the x_0 it aimed at
Adjust = Callable[
    [int, Tensor], Tensor
]  # step i, x after it => x to go on with, such as with known parts restored


class Sampler(Protocol):
    """x at grid[0] => a sample at grid[N]. Noise is asked for only by samplers that renew it."""

    def __call__(
        self,
        denoise: Denoise,
        x: Tensor,
        grid: Grid,
        *,
        noise: Noise | None = None,
        watch: Watch | None = None,
        adjust: Adjust | None = None,
    ) -> Tensor: ...


def step(x: Tensor, x0: Tensor, grid: Grid, i: int, eta: float = 0.0, noise: Noise | None = None) -> Tensor:
    """Move x from level i to level i + 1, believing that the clean sample is x0."""
    eps = (x - grid.alpha[i] * x0) / grid.sigma[i]
    renewed = -torch.expm1(-2 * grid.h[i])
    kept = (1 - eta**2 * renewed).sqrt()
    x = grid.alpha[i + 1] * x0 + grid.sigma[i + 1] * kept * eps
    if eta and grid.sigma[i + 1] > 0:
        assert noise is not None  # `check` has seen to it
        x = x + grid.sigma[i + 1] * eta * renewed.sqrt() * noise(i)
    return x


def check(eta: float, noise: Noise | None) -> None:
    """ValueError unless eta lies in [0, 1] and has the noise that it needs."""
    if not 0 <= eta <= 1:  # also refuses NaN
        raise ValueError(f"eta is {eta}, but must lie in [0, 1]")
    if eta and noise is None:
        raise ValueError(f"eta is {eta}, which renews noise, but noise is None; pass a function of the step")


@torch.no_grad()
def ddim(
    denoise: Denoise,
    x: Tensor,
    grid: Grid,
    *,
    eta: float = 0.0,
    noise: Noise | None = None,
    watch: Watch | None = None,
    adjust: Adjust | None = None,
) -> Tensor:
    """DDIM (Song et al. 2021, eq. 12): the estimate of x_0 is used as it comes."""
    check(eta, noise)
    for i in range(len(grid)):
        x0 = denoise(x, grid[i])
        x = step(x, x0, grid, i, eta, noise)
        if adjust:
            x = adjust(i, x)
        if watch:
            watch(i, x, x0)
    return x


@torch.no_grad()
def dpmpp_2m(
    denoise: Denoise,
    x: Tensor,
    grid: Grid,
    *,
    eta: float = 0.0,
    noise: Noise | None = None,
    watch: Watch | None = None,
    adjust: Adjust | None = None,
) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2): x_0 half a step ahead in lambda. eta = 1 is its SDE."""
    check(eta, noise)
    last = None
    for i in range(len(grid)):
        x0 = denoise(x, grid[i])
        x = step(x, extrapolated(x0, last, grid, i), grid, i, eta, noise)
        last = x0
        if adjust:
            x = adjust(i, x)
        if watch:
            watch(i, x, x0)
    return x


@torch.no_grad()
def unipc(
    denoise: Denoise,
    x: Tensor,
    grid: Grid,
    *,
    noise: Noise | None = None,
    watch: Watch | None = None,
    adjust: Adjust | None = None,
) -> Tensor:
    """UniPC-2 (Zhao et al. 2023), B(h) = e^h - 1: 2M predicts a step; it is redone knowing where it led."""
    before, x0, last = x, None, None
    for i in range(len(grid)):
        new = denoise(x, grid[i])
        if x0 is not None:  # correct the step that brought us here
            x = step(before, corrected(new, x0, last, grid, i - 1), grid, i - 1)
            if adjust:
                x = adjust(i - 1, x)
        before, last, x0 = x, x0, new
        x = step(x, extrapolated(x0, last, grid, i), grid, i)
        if adjust:
            x = adjust(i, x)
        if watch:
            watch(i, x, x0)
    return x


def extrapolated(x0: Tensor, last: Tensor | None, grid: Grid, i: int) -> Tensor:
    """x_0 in the middle of step i, from its values where this step and the last began; x0 on the last."""
    if last is None or grid.sigma[i + 1] == 0:
        return x0
    return x0 + grid.h[i] / (2 * grid.h[i - 1]) * (x0 - last)


def corrected(new: Tensor, x0: Tensor, last: Tensor | None, grid: Grid, i: int) -> Tensor:
    """UniC: the mean of x_0 over step i, from its values at both ends and one step earlier."""
    if last is None:
        return x0 + 0.5 * (new - x0)
    h, h_last = grid.h[i], grid.h[i - 1]
    b_h = torch.expm1(-h)
    b1 = (b_h / -h - 1) / b_h
    b2 = 2 * ((b_h / -h - 1) / -h - 0.5) / b_h
    rho = (b1 - b2) / (1 + h_last / h)
    return x0 + rho * (h / h_last) * (x0 - last) + (b1 - rho) * (new - x0)


@torch.no_grad()
def heun(
    denoise: Denoise,
    x: Tensor,
    grid: Grid,
    *,
    noise: Noise | None = None,
    watch: Watch | None = None,
    adjust: Adjust | None = None,
) -> Tensor:
    """Heun (Karras et al. 2022, algorithm 1): average the slope at both ends of the step; 2N - 1 evaluations.

    Works on y = x / c. c = alpha makes a VP path variance exploding, as in EDM; a flow keeps c = 1, since its
    lines are straight as they are, and alpha reaches 0.
    """
    straight = torch.allclose(grid.alpha + grid.sigma, torch.ones_like(grid.sigma))
    c = torch.ones_like(grid.alpha) if straight else grid.alpha
    a, s = grid.alpha / c, grid.sigma / c

    def change(y: Tensor, i: int, at: int) -> tuple[Tensor, Tensor]:
        """Of y over step i, with the slope found at a level; and x_0 there."""
        x0 = denoise(c[at] * y, grid[at])
        return (a[i + 1] - a[i]) * x0 + (s[i + 1] - s[i]) * (y - a[at] * x0) / s[at], x0

    y = x / c[0]
    for i in range(len(grid)):
        d, x0 = change(y, i, at=i)
        if s[i + 1] > 0:
            ahead, x0 = change(y + d, i, at=i + 1)
            d = (d + ahead) / 2
        y = y + d
        if adjust:
            y = adjust(i, c[i + 1] * y) / c[i + 1]
        if watch:
            watch(i, c[i + 1] * y, x0)
    return c[-1] * y


SAMPLERS: dict[str, Sampler] = {
    "ddpm": partial(ddim, eta=1.0),
    "ddim": ddim,
    "euler": ddim,
    "euler_ancestral": partial(ddim, eta=1.0),
    "heun": heun,
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_2m_sde": partial(dpmpp_2m, eta=1.0),
    "unipc": unipc,
}
WITH_ETA = {"ddim": ddim, "euler": ddim, "dpmpp_2m": dpmpp_2m}
"""Those whose share of renewed noise is open"""
