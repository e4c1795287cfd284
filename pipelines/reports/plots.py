"""Pictures that explain a path or a model: each function gives a matplotlib `Figure` or a picture; `ldm plot` saves it.

`Figure` is used without pyplot, so that nothing global is left behind and nothing needs a display.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from ldm.checks import require_int
from ldm.config import UserError
from ldm.paths import EDM, VP, Flow, Level, Path, vp_betas
from ldm.pictures import to_images, to_tensor
from ldm.random import normal
from ldm.samplers import SAMPLERS
from pipelines.inputs import to_pixels
from pipelines.inversion import interpolate
from pipelines.latent_diffusion import LatentDiffusion, noise_of
from pipelines.reports.run_plots import plain_log, tidy
from pipelines.sheets import contact_sheet

PATHS: dict[str, Path] = {
    "VP linear": VP(schedule="linear"),
    "VP scaled-linear": VP(schedule="scaled_linear"),
    "VP cosine": VP(schedule="cosine"),
    "VP sigmoid": VP(schedule="sigmoid"),
    "flow": Flow(),
    "flow, shift 3": Flow(shift=3.0),
    "EDM": EDM(),
}
REFERENCE_STEPS = 200
"""Sampling steps that stand for infinitely many"""


def schedules() -> Figure:
    """Noise of all paths: betas, the share of signal, and the logarithm of the signal-to-noise ratio."""
    figure = Figure(figsize=(13, 4.4), layout="constrained")
    betas, signal, snr = figure.subplots(1, 3)
    for name, path in PATHS.items():
        alpha, sigma, share = levels(path)
        if isinstance(path, VP):
            betas.plot(share, vp_betas(path), label=name)
        signal.plot(share, alpha**2 / (alpha**2 + sigma**2), label=name)
        snr.plot(share, 2 * np.log(np.maximum(alpha, 1e-9) / sigma), label=name)
    betas.set_yscale("log")
    snr.set_ylim(-12, 12)
    tidy(betas, "beta: noise added in one of 1,000 steps (VP alone)")
    tidy(signal, "share of signal: alpha² / (alpha² + sigma²)")
    tidy(snr, "ln SNR: logarithm of signal over noise power")
    for axes in (betas, signal, snr):
        axes.set_xlabel("share of the way to noise")
    figure.legend(
        *signal.get_legend_handles_labels(), loc="outside lower center", ncols=len(PATHS), frameon=False
    )
    return figure


def levels(path: Path, count: int = 1000) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """alpha, sigma and the share of the way to noise of `count` levels, from clean to noise, evenly trained on."""
    share = np.linspace(0, 1, count)
    if isinstance(path, EDM):
        return np.ones(count), np.geomspace(path.sigma_min, path.sigma_max, count), share
    if isinstance(path, Flow):
        sigma = path.shifted(share.clip(0.001, 0.999))
        return 1 - sigma, sigma, share
    signal, noise = path.levels(torch.arange(count, dtype=torch.float64))
    return signal.numpy(), noise.numpy(), share


def noising(path: Path, picture: Image.Image, count: int = 8, seed: int = 0) -> Image.Image:
    """The picture on its way to noise along a path, clean at the left: x_t = alpha x_0 + sigma eps in pixels."""
    x = to_tensor(picture.convert("RGB"))[None]
    eps = normal(seed, "noising", torch.tensor([0]), x.shape[1:])
    alpha, sigma, share = levels(path)
    chosen = np.linspace(0, len(alpha) - 1, count).round().astype(int)
    noised = [(alpha[i] * x + sigma[i] * eps) / max(1.0, float(np.hypot(alpha[i], sigma[i]))) for i in chosen]
    captions = [f"ln SNR {2 * np.log(alpha[i] / sigma[i]):.1f} at {share[i]:.0%}" for i in chosen]
    return contact_sheet(to_images(torch.cat(noised)), captions, columns=count)


def guidance_sweep(
    model: LatentDiffusion, prompts: Sequence[str], scales: Sequence[float], *, steps: int = 30, seed: int = 0
) -> Image.Image:
    """The same noise at several scales of guidance: a row for each prompt, a column for each scale."""
    drawn = [model(prompts, guidance=scale, steps=steps, seed=seed) for scale in scales]
    images = [column[row] for row in range(len(prompts)) for column in drawn]
    captions = [f"guidance {scale:g}" for scale in scales] * len(prompts)
    return contact_sheet(images, captions, columns=len(scales), headings=prompts)


@torch.no_grad()
def trajectory(
    model: LatentDiffusion,
    prompts: Sequence[str] | None = None,
    *,
    count: int = 8,
    steps: int = 30,
    sampler: str | None = None,
    guidance: float = 4.0,
    seed: int = 0,
) -> Image.Image:
    """How pictures come about: for each prompt a row of x_t, and below it the x_0 that the model sees in each.

    `count` of the evaluations are shown, evenly spread, the first and the last among them; both are decoded, x_t
    divided by sqrt(alpha² + sigma²), which captions say as the share of noise in its variance. The last x_0 is the
    picture that is drawn with the same settings. ValueError as for drawing.
    """
    require_int("count", count, 2, 1000)
    read, n = model.read(prompts, 1), len(prompts or ("",))
    shape = model.latent_shape(None)
    sample, grid, start = model.sampler_for(sampler, steps, shape)
    denoise = model.guided(read, n, shape, guidance)
    noise = noise_of(range(seed, seed + n), shape, model.device)
    seen: list[tuple[Tensor, Tensor, float]] = []

    def watched(x: Tensor, level: Level) -> Tensor:
        x0 = denoise(x, level)
        size = math.hypot(level.alpha, level.sigma)
        seen.append((x / size, x0, (level.sigma.item() / size) ** 2))
        return x0

    sample(watched, noise(-1) * start, grid, noise=noise)
    shown = [seen[i] for i in np.linspace(0, len(seen) - 1, min(count, len(seen))).round().astype(int)]
    drawn = [[to_images(model.decode(z)) for z in (x, x0)] for x, x0, _ in shown]
    images = [both[kind][row] for row in range(n) for kind in (0, 1) for both in drawn]
    captions = [f"{share:.1%} noise" for _, _, share in shown] * 2 * n
    kinds = ("x_t: as it is at each level", "x_0: what the model sees in it")
    headings = [f"{prompt} · {kind}" if prompt else kind for prompt in prompts or ("",) for kind in kinds]
    return contact_sheet(images, captions, columns=len(shown), headings=headings)


@torch.no_grad()
def interpolation(
    model: LatentDiffusion,
    first: Image.Image | int,
    second: Image.Image | int,
    prompt: str | None = None,
    *,
    count: int = 8,
    steps: int = 30,
    guidance: float = 1.0,
) -> Image.Image:
    """Two ways between two pictures, or between what two seeds draw: through the noise, and straight.

    Above, the great circle between their noises, each point drawn (`inversion.interpolate`); below, the straight line
    between the latents of the two ends, decoded: what a way that leaves the data looks like.
    """
    above = interpolate(model, first, second, prompt, count=count, steps=steps, guidance=guidance)
    a, b = (model.encode(to_pixels(model, end)) for end in (above[0], above[-1]))
    shares = torch.linspace(0, 1, count).tolist()
    below = to_images(model.decode(torch.cat([torch.lerp(a, b, share) for share in shares])))
    ways = ("through the noise, each point drawn", "straight from latent to latent")
    captions = [f"{share:.0%} of the way" for share in shares] * 2
    return contact_sheet([*above, *below], captions, columns=count, headings=ways)


def prompt_sheet(
    model: LatentDiffusion,
    prompts: Sequence[str] | None = None,
    *,
    n: int = 4,
    steps: int = 30,
    sampler: str | None = None,
    guidance: float = 4.0,
    seed: int = 0,
) -> Image.Image:
    """A contact sheet: a row for each prompt, told above it, with pictures of n seeds, the same for all prompts."""
    told: Sequence[str | None] = prompts or [None]
    settings: dict[str, Any] = {"steps": steps, "sampler": sampler, "guidance": guidance, "seed": seed}
    images = [image for prompt in told for image in model(prompt, n=n, **settings)]
    captions = [f"seed {seed + i}" for i in range(n)] * len(told)
    return contact_sheet(images, captions, columns=n, headings=prompts or ())


def steps_sweep(
    model: LatentDiffusion,
    prompts: Sequence[str],
    samplers: Sequence[str],
    counts: Sequence[int],
    *,
    guidance: float = 4.0,
    seed: int = 0,
) -> Figure:
    """Time a picture, and distance from where the same sampler ends with very many steps, against the steps.

    The distance is the root mean square over pixels in [0, 255]. Samplers that renew noise end elsewhere each time
    and are refused.
    """
    for sampler in samplers:
        if sampler not in SAMPLERS:
            raise UserError(f"There is no sampler {sampler!r}; choose one of {', '.join(SAMPLERS)}.")
        if sampler not in ("ddim", "euler", "heun", "dpmpp_2m", "unipc"):
            raise UserError(f"{sampler} draws anew at each step, so that it converges to no one picture.")
    for count in counts:
        require_int("counts", count, 1, 1000)
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    figure.suptitle(
        f"{len(prompts)} prompts, guidance {guidance:g}, seed {seed}", fontsize=9, color="dimgray"
    )
    error, cost = figure.subplots(1, 2)
    for sampler in samplers:
        told = {"sampler": sampler, "guidance": guidance, "seed": seed}
        goal = pixels(model(prompts, steps=REFERENCE_STEPS, **told))  # type: ignore[arg-type]
        distances, times = [], []
        for count in counts:
            spent = []
            for _ in range(2):  # the quicker one: what else the machine does only ever adds time
                start = time.perf_counter()
                drawn = model(prompts, steps=count, **told)  # type: ignore[arg-type]
                spent.append(time.perf_counter() - start)
            times.append(min(spent) / len(prompts))
            distances.append(np.sqrt(np.square(pixels(drawn) - goal).mean()))
        error.plot(counts, distances, marker="o", label=sampler)
        cost.plot(counts, times, marker="o", label=sampler)
    error.set(xscale="log", yscale="log")
    cost.set_ylim(bottom=0)
    plain_log(error.yaxis)
    tidy(error, f"distance from {REFERENCE_STEPS} steps of the same sampler (RMS over pixels, of 255)")
    tidy(cost, "seconds a picture, all drawn together")
    for axes in (error, cost):
        axes.set_xticks(counts, [str(count) for count in counts])
        axes.minorticks_off()
        axes.set_xlabel("steps")
        axes.legend(fontsize=9, frameon=False)
    return figure


def pixels(images: Sequence[Image.Image]) -> np.ndarray:
    """[N,H,W,3] in [0, 255]."""
    return np.stack([np.asarray(image, dtype=np.float64) for image in images])
