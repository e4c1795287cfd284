"""Samplers against diffusers, and against closed forms that need no oracle."""

import math

import pytest
import torch

from ldm.paths import EDM, VP, Flow, Grid
from ldm.samplers import SAMPLERS, ddim, dpmpp_2m, heun, step, unipc
from tests import parity

MEAN, STD = 0.7, 0.6  # of the Gaussian data of the closed forms
PATHS = {"flow": Flow(), "vp": VP(), "edm": EDM()}


@pytest.mark.parametrize("path", parity.PATHS)
def test_parity_with_diffusers(path):
    """All steps on the paths that differ most; the variants of these with one small odd number of steps."""
    steps = parity.STEPS if path in ("flow", "vp scaled_linear", "edm") else (7,)
    rows = list(parity.rows({path: parity.PATHS[path]}, steps))
    assert len(rows) >= 28 * len(steps)
    assert not [row for row in rows if not row.difference <= parity.BOUND]


def gaussian(x, level):
    """The perfect denoiser of data N(MEAN, STD^2)."""
    gain = level.alpha * STD**2 / ((level.alpha * STD) ** 2 + level.sigma**2)
    return MEAN + gain * (x - level.alpha * MEAN)


def exact(x, start, end):
    """Where the probability flow takes x: it keeps the distance from the mean in standard deviations."""
    spread = [((level.alpha * STD) ** 2 + level.sigma**2).sqrt() for level in (start, end)]
    return end.alpha * MEAN + (x - start.alpha * MEAN) * spread[1] / spread[0]


def smooth(kind, steps):
    """A grid that gets finer evenly, without the rounding to trained levels and the last leap to no noise."""
    u = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    if kind == "vp":
        angle = 1.5 + u * (0.05 - 1.5)
        return Grid(u, angle.cos(), angle.sin())
    if kind == "flow":
        sigma = 0.99 + u * (0.02 - 0.99)
        return Grid(u, 1 - sigma, sigma)
    sigma = (10 ** (1 / 7) + u * (0.02 ** (1 / 7) - 10 ** (1 / 7))) ** 7
    return Grid(u, torch.ones_like(sigma), sigma)


@pytest.mark.parametrize("kind", PATHS)
@pytest.mark.parametrize(("sampler", "order"), [(ddim, 1), (heun, 2), (dpmpp_2m, 2), (unipc, 2)])
def test_deterministic_samplers_converge_with_their_order(kind, sampler, order):
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)
    steps, errors = (80, 160, 320), []
    for n in steps:
        grid = smooth(kind, n)
        errors.append((sampler(gaussian, x, grid) - exact(x, grid[0], grid[n])).abs().max().item())
    slope = math.log(errors[0] / errors[-1]) / math.log(steps[-1] / steps[0])
    low, high = (
        (2.8, 3.2) if sampler is unipc else (order - 0.1, order + 0.15)
    )  # UniC raises the order by one
    assert low < slope < high, (slope, errors)


@pytest.mark.parametrize("kind", PATHS)
@pytest.mark.parametrize("name", ["ddim", "euler", "heun", "dpmpp_2m", "unipc"])
def test_deterministic_samplers_reach_the_exact_marginal_on_real_grids(kind, name):
    """VP ends with a leap from its first trained level, which is first order whatever the sampler."""
    z = torch.linspace(-2, 2, 9, dtype=torch.float64)
    first_order = name in ("ddim", "euler") or kind == "vp"
    for n in (50, 200):
        found = SAMPLERS[name](gaussian, start(PATHS[kind].grid(n), z), PATHS[kind].grid(n))
        worst = (found - (MEAN + STD * z)).abs().max().item()
        assert worst < (6 / n if first_order else 40 / n**2)


def start(grid, z):
    """Where the marginal at the first level has its mean + z standard deviations."""
    spread = ((grid.alpha[0] * STD) ** 2 + grid.sigma[0] ** 2).sqrt()
    return grid.alpha[0] * MEAN + spread * z


@pytest.mark.parametrize("kind", PATHS)
@pytest.mark.parametrize("name", ["ddpm", "euler_ancestral", "dpmpp_2m_sde"])
def test_stochastic_samplers_have_the_right_mean_and_variance(kind, name):
    n, grid = 10_000, PATHS[kind].grid(1000)
    generator = torch.Generator().manual_seed(0)

    def noise(i=0):
        return torch.randn(n, generator=generator, dtype=torch.float64)

    found = SAMPLERS[name](gaussian, start(grid, noise()), grid, noise=noise)
    assert abs(found.mean() - MEAN) < 4 * STD / n**0.5
    assert abs(found.std() / STD - 1) < 4 / (2 * n) ** 0.5


@pytest.mark.parametrize("t", [1, 2, 500, 999])
def test_ddpm_posterior_is_equations_6_and_7_of_ho_et_al(t):
    """t counts from 0 here, so that x_t has been noised t + 1 times."""
    path = VP(schedule="linear")
    grid, i = path.grid(1000), 999 - t
    signal = path.levels(torch.arange(1000, dtype=torch.float64))[0].square()
    beta = 1 - signal[t] / signal[t - 1]
    x_t, x_0, z = (
        torch.randn(4, generator=torch.Generator().manual_seed(s), dtype=torch.float64) for s in range(3)
    )
    mean = (signal[t - 1].sqrt() * beta * x_0 + (1 - beta).sqrt() * (1 - signal[t - 1]) * x_t) / (
        1 - signal[t]
    )
    variance = (1 - signal[t - 1]) / (1 - signal[t]) * beta
    found = step(x_t, x_0, grid, i, eta=1.0, noise=lambda _: z)
    assert torch.allclose(step(x_t, x_0, grid, i, eta=1.0, noise=lambda _: 0 * z), mean, rtol=1e-5, atol=1e-6)
    assert torch.allclose(found - mean, variance.sqrt() * z, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", PATHS)
@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 2, 3, 1000])
def test_any_number_of_steps_and_any_spacing_is_finite(kind, name, steps):
    x = torch.linspace(-2, 2, 4)
    for spacing in PATHS[kind].spacings:
        grid = PATHS[kind].grid(steps, spacing)
        found = SAMPLERS[name](gaussian, x * grid.start, grid, noise=lambda i: x.flip(0))
        assert found.isfinite().all() and found.dtype == torch.float32


def test_a_perfect_estimate_is_reached_in_one_step():
    x, goal = torch.randn(8), torch.randn(8)
    for name, sampler in SAMPLERS.items():
        for path in PATHS.values():
            found = sampler(lambda x, level: goal, x, path.grid(1), noise=lambda i: x)
            assert torch.allclose(found, goal, atol=1e-5), name


def test_the_same_sampler_by_two_names():
    x, grid = torch.randn(8), Flow().grid(5)
    draw = [sampler(gaussian, x, grid, noise=lambda i: x.flip(0)) for sampler in SAMPLERS.values()]
    by_name = dict(zip(SAMPLERS, draw, strict=True))
    assert torch.equal(by_name["ddim"], by_name["euler"])
    assert torch.equal(by_name["ddpm"], by_name["euler_ancestral"])


@pytest.mark.parametrize("name", SAMPLERS)
def test_network_calls_noise_and_watch_come_once_a_step(name):
    calls, drawn, seen = [], [], []
    x, grid = torch.randn(3), Flow().grid(6)
    found = SAMPLERS[name](
        lambda x, level: calls.append(level.t.item()) or gaussian(x, level),
        x,
        grid,
        noise=lambda i: drawn.append(i) or torch.zeros(3),
        watch=lambda i, x, x0: seen.append((i, x, x0)),
    )
    assert len(calls) == (11 if name == "heun" else 6)
    assert calls == sorted(calls, reverse=True)
    assert drawn == ([0, 1, 2, 3, 4] if name in ("ddpm", "euler_ancestral", "dpmpp_2m_sde") else [])
    assert [i for i, *_ in seen] == list(range(6)) and torch.equal(seen[-1][1], found)


@pytest.mark.parametrize("eta", [float("nan"), -0.1, 1.5, float("inf")])
@pytest.mark.parametrize("sampler", [ddim, dpmpp_2m])
def test_bad_eta_is_refused(sampler, eta):
    with pytest.raises(ValueError, match=f"^eta is {eta}, but must lie in \\[0, 1\\]$"):
        sampler(gaussian, torch.zeros(2), Flow().grid(2), eta=eta, noise=lambda i: torch.zeros(2))


def test_renewing_noise_needs_noise():
    with pytest.raises(ValueError, match=r"^eta is 1.0, which renews noise, but noise is None"):
        SAMPLERS["ddpm"](gaussian, torch.zeros(2), Flow().grid(2))
