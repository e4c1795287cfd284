"""Pictures that explain a model: each function gives a matplotlib `Figure` or a picture; `ldm plot` saves it.

`Figure` is used without pyplot, so that nothing global is left behind and nothing needs a display.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path as File

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image

from ldm.config import UserError
from ldm.paths import EDM, VP, Flow, Path, vp_betas
from ldm.pictures import to_images, to_tensor
from ldm.random import normal
from ldm.samplers import SAMPLERS
from pipelines.latent_diffusion import LatentDiffusion
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
    figure = Figure(figsize=(13, 4), layout="constrained")
    betas, signal, snr = figure.subplots(1, 3)
    for name, path in PATHS.items():
        alpha, sigma, share = levels(path)
        if isinstance(path, VP):
            betas.plot(share, vp_betas(path), label=name)
        signal.plot(share, alpha**2 / (alpha**2 + sigma**2), label=name)
        snr.plot(share, 2 * np.log(np.maximum(alpha, 1e-9) / sigma), label=name)
    betas.set(title="beta", xlabel="share of the way to noise", yscale="log")
    signal.set(title="alpha² / (alpha² + sigma²)", xlabel="share of the way to noise")
    snr.set(title="ln SNR", xlabel="share of the way to noise", ylim=(-12, 12))
    for axes in (betas, signal, snr):
        axes.legend(fontsize=8)
        axes.grid(alpha=0.3)
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
    captions = [f"{share[i]:.0%} of the way, SNR {(alpha[i] / sigma[i]) ** 2:.2g}" for i in chosen]
    return contact_sheet(to_images(torch.cat(noised)), captions, columns=count)


def guidance_sweep(
    model: LatentDiffusion, prompts: Sequence[str], scales: Sequence[float], *, steps: int = 30, seed: int = 0
) -> Image.Image:
    """The same noise at several scales of guidance: a row for each prompt, a column for each scale."""
    drawn = [model(prompts, guidance=scale, steps=steps, seed=seed) for scale in scales]
    images = [column[row] for row in range(len(prompts)) for column in drawn]
    captions = [f"{prompt} · guidance {scale:g}" for prompt in prompts for scale in scales]
    return contact_sheet(images, captions, columns=len(scales))


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
    figure = Figure(figsize=(11, 4), layout="constrained")
    error, cost = figure.subplots(1, 2)
    for sampler in samplers:
        told = {"sampler": sampler, "guidance": guidance, "seed": seed}
        goal = pixels(model(prompts, steps=REFERENCE_STEPS, **told))  # type: ignore[arg-type]
        distances, times = [], []
        for count in counts:
            start = time.perf_counter()
            drawn = model(prompts, steps=count, **told)  # type: ignore[arg-type]
            times.append((time.perf_counter() - start) / len(prompts))
            distances.append(np.sqrt(np.square(pixels(drawn) - goal).mean()))
        error.plot(counts, distances, marker="o", label=sampler)
        cost.plot(counts, times, marker="o", label=sampler)
    error.set(title=f"RMS distance from {REFERENCE_STEPS} steps", xlabel="steps", xscale="log", yscale="log")
    cost.set(title="seconds a picture", xlabel="steps")
    for axes in (error, cost):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    return figure


def pixels(images: Sequence[Image.Image]) -> np.ndarray:
    """[N,H,W,3] in [0, 255]."""
    return np.stack([np.asarray(image, dtype=np.float64) for image in images])


def curves(run: File) -> Figure:
    """Everything in a run's metrics.jsonl against its steps, one panel a name."""
    try:
        written = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    except OSError:
        raise UserError(f"{run} holds no metrics.jsonl; give the folder of a training run.") from None
    lines = [json.loads(line) for line in written if line.endswith("\n")]  # the last may be being written
    names = sorted({name for line in lines for name in line} - {"step", "time"})
    if not names:
        raise UserError(f"{run}/metrics.jsonl has no lines yet.")
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(4.5 * columns, 3 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, name in zip(panels, names, strict=False):
        points = [(line["step"], line[name]) for line in lines if name in line]
        axes.plot(*zip(*points, strict=True))
        axes.set_title(name.replace("_", " "), fontsize=10)
        axes.grid(alpha=0.3)
    for axes in panels[len(names) :]:
        axes.remove()
    return figure
