"""Network + path + prediction: from x_t to x_0, and the loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ldm.conditioning import Cond
from ldm.paths import Level, Path
from ldm.prediction import Prediction, Weight

Network = Callable[[Tensor, Tensor, Cond], Tensor]  # (x [B,C,H,W], t [B], cond) -> out [B,C,H,W]


@dataclass
class Denoiser:
    """Wraps around a network as it is at hand: prepared, compiled or EMA. It owns no weights."""

    network: Network
    path: Path
    prediction: Prediction
    weight: Weight = field(default_factory=Weight)

    def __post_init__(self) -> None:
        """Raises ValueError where path, prediction and weight can't work together."""
        ends = self.path.times(torch.tensor([0.0, 1.0], dtype=torch.float64))
        alpha, sigma = self.path.levels(ends)
        if self.prediction.name == "epsilon" and self.path.kind == "vp" and (alpha == 0).any():
            raise ValueError(
                "prediction epsilon says nothing about x_0 at pure noise, which zero_terminal_snr trains on; "
                "choose prediction v, or zero_terminal_snr false"
            )
        weights = self.weight(self.prediction, alpha, sigma, self.path.sigma_data)
        if not weights.isfinite().all():
            at = sigma[~weights.isfinite()][0].item()
            raise ValueError(
                f"weight {self.weight.kind} of prediction {self.prediction.name} is infinite at noise level "
                f"{at:g} of path {self.path.kind}; choose another weight, or prediction v or flow"
            )

    def __call__(self, x: Tensor, level: Level, cond: Cond) -> Tensor:
        """x_t [B,C,H,W] at one level ([] or [B]) => estimate of x_0 [B,C,H,W]."""
        return self.to_x0(x, self.output(x, level, cond), level)

    def output(self, x: Tensor, level: Level, cond: Cond) -> Tensor:
        """x_t [B,C,H,W] => the network's output [B,C,H,W], whatever it predicts, in the dtype of x."""
        _, sigma = spread(level, x)
        if level.t.dim():
            t = level.t.to(x.device, torch.float32)
        else:  # filled in there: to copy it, the CPU would wait for the GPU in each step
            t = torch.full(x.shape[:1], float(level.t), device=x.device)
        shown = self.path.scale_input(x, sigma)
        if cond.image is not None:  # after the scaling, as stock pipelines do
            shown = torch.cat([shown, cond.image.to(x.dtype)], dim=1)
        return self.network(shown, t, cond.words).to(x.dtype)

    def to_x0(self, x: Tensor, out: Tensor, level: Level) -> Tensor:
        """x_t and the network's output there => the estimate of x_0 that it stands for."""
        return self.prediction.to_x0(x, out, *spread(level, x))

    def loss(self, x0: Tensor, cond: Cond, *, t: Tensor, noise: Tensor) -> Tensor:
        """[B] Weighted squared error at times t [B], mean over channels and pixels, not over the batch.

        Args:
            x0, noise: [B,C,H,W] latents and standard normal noise, float32.
        """
        level = Level(t, *self.path.levels(t))
        alpha, sigma = spread(level, x0)
        out = self.output(alpha * x0 + sigma * noise, level, cond)
        error = out - self.prediction.target(x0, noise, alpha, sigma)
        weight = self.weight(self.prediction, level.alpha, level.sigma, self.path.sigma_data)
        return weight * error.square().flatten(1).mean(1)


def spread(level: Level, x: Tensor) -> tuple[Tensor, Tensor]:
    """alpha, sigma shaped to multiply x [B,C,H,W]; those of a single level stay scalars on the CPU."""
    shape = (-1,) + (1,) * (x.dim() - 1)
    alpha, sigma = (a.to(x.device).view(shape) if a.dim() else a for a in (level.alpha, level.sigma))
    return alpha, sigma
