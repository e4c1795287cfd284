"""Latents that turn and shrink with the picture: EQ-VAE, Kouzelis et al. 2025 (arXiv 2502.09509).

Some of the training steps decode latents that have been shrunk and turned, and compare the result with the picture
shrunk and turned alike: D(tau(E(x))) against tau(x). A latent space in which that works changes with the picture as
pixels do, and is found easier to diffuse. Steps with a transformation decode fewer pixels, so they cost less.

    transform = draw(config, uniforms)              # the same for all samples of a step; None: an ordinary step
    made, posterior = autoencoder(pixels, noise, transform)
    wanted = pixels if transform is None else transform(pixels, factor)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

SCALES = 32
"""Scales are multiples of 1/32, as published"""


@dataclass(frozen=True, kw_only=True)
class EquivarianceConfig:
    """How often, and how far, latents are shrunk and turned in training."""

    probability: float = 0.0
    """Share of the steps that are taken on shrunk and turned latents; 0 is off, the paper has 0.5"""
    smallest: float = 0.25
    """Lower end of the scales drawn, in (0, 1]; 1 turns only. The paper has 0.25"""
    turn: bool = True
    """Also turn by 90, 180 or 270 degrees, as the paper does; not for pictures that have an up and a down to learn"""

    def __post_init__(self) -> None:
        if not 0 <= self.probability <= 1:
            raise ValueError(f"equivariance.probability is {self.probability}, but must lie in [0, 1]")
        if not 1 / SCALES <= self.smallest <= 1:
            raise ValueError(f"equivariance.smallest is {self.smallest}, but must lie in [1/{SCALES}, 1]")
        for name in ("smallest", "turn"):
            if not self.probability and getattr(self, name) != getattr(EquivarianceConfig, name):
                raise ValueError(
                    f"equivariance.{name} is set, but equivariance.probability is 0: set it, or remove {name}"
                )
        if self.probability and self.smallest == 1 and not self.turn:
            raise ValueError(
                "equivariance.probability is set, but smallest 1 without turn changes nothing: set one of them"
            )


@dataclass(frozen=True, kw_only=True)
class Transform:
    """Shrinks and turns latents or pictures."""

    scale: float
    """Of both sides, in (0, 1]"""
    quarter_turns: int
    """Anticlockwise, 0 to 3"""

    def __call__(self, x: Tensor, factor: int = 1) -> Tensor:
        """[B, K, H, W] => [B, K, H', W'], or [B, K, W', H'] after an odd number of quarter turns.

        Args:
            factor: pixels to a latent pixel, for pictures; H' is f times what it is for their latents.
        """
        small = [max(1, round(side // factor * self.scale)) * factor for side in x.shape[2:]]
        if small != [*x.shape[2:]]:
            x = F.interpolate(x, size=small, mode="bilinear", align_corners=False)
        return torch.rot90(x, self.quarter_turns, dims=(2, 3))


def draw(config: EquivarianceConfig, uniforms: Sequence[float]) -> Transform | None:
    """The transformation of a step, None for an ordinary one.

    Args:
        uniforms: three numbers in [0, 1) that belong to the step: all processes and accumulated batches of it
            must be given the same ones, or their gradients would be of different sizes of picture.
    """
    whether, how_large, which_way = uniforms
    if whether >= config.probability:
        return None
    least = round(config.smallest * SCALES)
    scale = (least + int(how_large * max(1, SCALES - least))) / SCALES
    return Transform(scale=scale, quarter_turns=1 + int(which_way * 3) if config.turn else 0)
