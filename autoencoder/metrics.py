"""How near a reconstruction is to its original, a figure for each picture."""

import torch
from torch import Tensor

from autoencoder.perceptual import Perceptual

SMALLEST_FOR_SSIM = 11
"""Pixels along one side of its window."""


def psnr(made: Tensor, originals: Tensor) -> Tensor:
    """Peak signal-to-noise ratio [B] in dB of pictures [B,3,H,W] in [-1, 1]; infinite for equal ones.

    On the CPU, as not every device has the float64 that small errors need.
    """
    errors = (made.cpu().double() - originals.cpu().double()).square().mean(dim=(1, 2, 3))
    return (10 * torch.log10(4 / errors)).float()


def ssim(made: Tensor, originals: Tensor) -> Tensor:
    """Structural similarity [B], 1 for equal pictures [B,3,H,W] in [-1, 1] (Wang et al. 2004; torchmetrics).

    Gaussian window of 11 pixels with a standard deviation of 1.5; pictures have at least 11 pixels a side.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    similarity = structural_similarity_index_measure(
        made.float(), originals.float(), data_range=(-1.0, 1.0), reduction="none"
    )
    assert isinstance(similarity, Tensor)
    return similarity


@torch.no_grad()
def likeness(made: Tensor, originals: Tensor, lpips: Perceptual | None) -> dict[str, float]:
    """Means over pictures [N,3,H,W] in [-1, 1]: psnr_db; ssim, unless they are too small for it; lpips, if given."""
    figures = {"psnr_db": psnr(made, originals).mean().item()}
    if min(made.shape[-2:]) >= SMALLEST_FOR_SSIM:
        figures["ssim"] = ssim(made, originals).mean().item()
    if lpips:
        pairs = zip(made.split(16), originals.split(16), strict=True)
        figures["lpips"] = torch.cat([lpips(x, y) for x, y in pairs]).mean().item()
    return figures
