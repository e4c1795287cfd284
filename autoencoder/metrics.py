"""How near a reconstruction is to its original, a figure for each picture."""

import torch
from torch import Tensor


def psnr(made: Tensor, originals: Tensor) -> Tensor:
    """Peak signal-to-noise ratio [B] in dB of pictures [B,3,H,W] in [-1, 1]; infinite for equal ones."""
    errors = (made.double() - originals.double()).square().mean(dim=(1, 2, 3))
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
