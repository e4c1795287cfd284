"""Figures of likeness against their definitions."""

import math

import torch

from autoencoder.metrics import psnr, ssim


def test_psnr_is_a_figure_for_each_picture() -> None:
    originals = torch.zeros(2, 3, 16, 16)
    made = torch.stack([originals[0] + 0.2, originals[1]])
    first, second = psnr(made, originals).tolist()
    assert math.isclose(first, 20.0, abs_tol=1e-4)  # an error of a tenth of the range
    assert second == math.inf


def test_ssim_is_one_for_equal_pictures_and_falls_with_noise() -> None:
    originals = torch.rand(3, 3, 24, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1
    noise = torch.randn(originals.shape, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(ssim(originals, originals), torch.ones(3))
    little, much = ssim(originals + 0.1 * noise, originals), ssim(originals + 0.5 * noise, originals)
    assert little.shape == (3,) and (much < little).all() and (little < 1).all()
