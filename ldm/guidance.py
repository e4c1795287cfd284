"""Guidance: draw what the condition says more clearly, by moving away from a worse prediction.

    classifier-free   away from the prediction without the condition     Ho & Salimans 2022
    negative prompt   away from the prediction with another condition
    autoguidance      away from the prediction of a weaker network       Karras et al. 2024
    interval          only where the noise is neither high nor low       Kynkäänniemi et al. 2024
    rescale           keep the standard deviation of the output          Lin et al. 2023, section 3.4
    APG               mostly drop the part that only raises contrast     Sadat et al. 2024
    threshold         pull values back into a range                      Saharia et al. 2022, section 2.3

As in stock pipelines, it is the network's outputs that are combined; for plain guidance, combining estimates
of x_0 would be the same. One batched network call a step, except with a weaker network.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.conditioning import Cond
from ldm.denoiser import Denoiser
from ldm.paths import Level
from ldm.samplers import Denoise


@dataclass(frozen=True, kw_only=True)
class Projection:
    """Adaptive projected guidance (Sadat et al. 2024, algorithm 1)."""

    parallel: float = 0.0
    """Share kept of the part along the conditional x_0, which raises contrast and saturation; 1 keeps all"""
    norm: float = math.inf
    """Largest Euclidean norm of the difference of a sample's two estimates of x_0"""
    momentum: float = 0.0
    """Weight of the last steps' differences; negative, such as -0.5, moves on from them"""

    def __post_init__(self) -> None:
        if not 0 <= self.parallel <= 1:
            raise ValueError(f"parallel is {self.parallel}, but must lie in [0, 1]")
        if not self.norm > 0:
            raise ValueError(f"norm is {self.norm}, but must be positive")
        if not -1 < self.momentum < 1:
            raise ValueError(f"momentum is {self.momentum}, but must lie between -1 and 1")

    def __call__(
        self, to: Tensor, away: Tensor, scale: float, before: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Two estimates of x_0 [B,C,H,W], the last step's difference => guided x_0, this step's."""
        difference = to - away + (0 if before is None else self.momentum * before)
        length = difference.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        update = difference * (self.norm / length).clamp(max=1)
        along = (update * to).sum((1, 2, 3), keepdim=True) / to.square().sum((1, 2, 3), keepdim=True) * to
        return to + (scale - 1) * (update - along + self.parallel * along), difference


@dataclass(frozen=True, kw_only=True)
class Threshold:
    """Dynamic thresholding: a sample that exceeds `limit` is clipped at a quantile and scaled to `limit`."""

    quantile: float = 0.995
    """Of the absolute values of a sample's x_0"""
    limit: float = 1.0
    """Largest absolute value that is left alone; 1 for pixels, about 4 for latents of standard deviation 1"""

    def __post_init__(self) -> None:
        if not 0 < self.quantile <= 1:
            raise ValueError(f"quantile is {self.quantile}, but must lie in (0, 1]")
        if not 0 < self.limit < math.inf:
            raise ValueError(f"limit is {self.limit}, but must be positive and finite")

    def __call__(self, x0: Tensor) -> Tensor:
        """[B,C,H,W] => [B,C,H,W] within [-limit, limit]."""
        top = x0.abs().flatten(1).quantile(self.quantile, dim=1).clamp(min=self.limit).view(-1, 1, 1, 1)
        return x0.clamp(-top, top) * (self.limit / top)


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """How a drawing is guided; the defaults are plain classifier-free guidance at `scale`."""

    scale: float = 1.0
    """out = out(null) + scale (out(cond) - out(null)); 1 is no guidance, and costs one pass"""
    interval: tuple[float, float] = (0.0, math.inf)
    """Guide where interval[0] < sigma / alpha <= interval[1]; elsewhere one pass"""
    rescale: float = 0.0
    """Share in [0, 1] of the guided output that gets the standard deviation of the conditional one"""
    projection: Projection | None = None
    """Adaptive projected guidance"""
    threshold: Threshold | None = None
    """Dynamic thresholding of x_0"""

    def __post_init__(self) -> None:
        if not math.isfinite(self.scale):
            raise ValueError(f"guidance scale is {self.scale}, but must be finite")
        if not 0 <= self.interval[0] < self.interval[1]:
            raise ValueError(f"interval is {self.interval}, but must be two levels, 0 <= low < high")
        if not 0 <= self.rescale <= 1:
            raise ValueError(f"rescale is {self.rescale}, but must lie in [0, 1]")
        if self.rescale and self.projection:
            raise ValueError(
                f"rescale is {self.rescale}, which projection makes pointless; set one of the two"
            )

    def at(self, level: Level) -> bool:
        """Whether the interval holds this level."""
        return bool(self.interval[0] < level.sigma / level.alpha <= self.interval[1])


def guided(
    denoiser: Denoiser,
    cond: Cond,
    null: Cond | None,
    guidance: float | Guidance = 1.0,
    *,
    weak: Denoiser | None = None,
) -> Denoise:
    """What a sampler takes, for one drawing.

    Args:
        cond: what to draw.
        null: what to move away from, in the same shapes: the null condition, or a negative prompt's; with
            `weak`, what that is told, by default cond. Not needed at scale 1.
        guidance: a plain scale, or more. A model that is told nothing is not guided but by `weak`.
        weak: a weaker model of the same path and prediction to move away from; one more call a step.

    Raises:
        ValueError: names what is out of range or missing.
    """
    by = guidance if isinstance(guidance, Guidance) else Guidance(scale=guidance)
    if weak and (weak.path, weak.prediction) != (denoiser.path, denoiser.prediction):
        raise ValueError("weak has another path or prediction than the model that it should guide")
    told = any(part is not None for part in cond.words)
    if by.scale != 1 and told and null is None and weak is None:
        raise ValueError(
            f"guidance scale is {by.scale}, but null is None; pass the condition to move away from"
        )
    plain = by.scale == 1 or (weak is None and not told)
    both = None if plain or weak or null is None else Cond.cat(null, cond)
    before: Tensor | None = None

    def denoise(x: Tensor, level: Level) -> Tensor:
        nonlocal before
        if plain or not by.at(level):
            x0 = denoiser(x, level, cond)
            return by.threshold(x0) if by.threshold else x0
        if weak:
            to, away = denoiser.output(x, level, cond), weak.output(x, level, cond if null is None else null)
        else:
            assert both is not None
            away, to = denoiser.output(torch.cat([x, x]), level, both).chunk(2)
        if by.projection:
            estimates = denoiser.to_x0(x, to, level), denoiser.to_x0(x, away, level)
            x0, before = by.projection(*estimates, by.scale, before)
        else:
            x0 = denoiser.to_x0(x, rescaled(away + by.scale * (to - away), to, by.rescale), level)
        return by.threshold(x0) if by.threshold else x0

    return denoise


def rescaled(out: Tensor, to: Tensor, share: float) -> Tensor:
    """`share` of out [B,C,H,W] brought to the standard deviation of each sample of `to`."""
    if not share:
        return out
    std = [a.std((1, 2, 3), keepdim=True) for a in (to, out)]
    return share * (out * (std[0] / std[1])) + (1 - share) * out
