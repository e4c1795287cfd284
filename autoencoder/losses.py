"""What stage 1 minimises: the pixels' difference, and the price of information in the latents."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Kind = Literal["l1", "l2", "charbonnier"]

CHARBONNIER_EPS = 1e-3  # in units of [-1, 1]: an eighth of the step between two values of an 8-bit image


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Terms of the autoencoder's loss and their weights."""

    reconstruction: Kind = "l1"
    """Difference of pixels: l1, l2 or charbonnier, averaged over pixels and channels"""
    kl: float = 1e-6
    """Weight of the KL divergence in nats, divided by the numbers in an image: beside the averaged difference
    it means the same at every resolution, and what it means to Rombach et al. 2022, who sum both terms"""


def reconstruction(x: Tensor, y: Tensor, kind: Kind) -> Tensor:
    """Difference of images x and y [B, 3, H, W] in [-1, 1], averaged over channels and pixels: [B].

    "charbonnier" is sqrt(d^2 + eps^2), an l1 that is smooth at 0 (Charbonnier et al. 1994).
    Raises ValueError for another kind.
    """
    d = x - y
    if kind == "l1":
        each = d.abs()
    elif kind == "l2":
        each = d.square()
    elif kind == "charbonnier":
        each = (d.square() + CHARBONNIER_EPS**2).sqrt()
    else:
        raise ValueError(f"kind = {kind!r} must be 'l1', 'l2' or 'charbonnier'.")
    return each.mean(dim=(1, 2, 3))
