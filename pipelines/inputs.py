"""Pictures and masks as people give them, made into what a model reads."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from ldm.checks import require_int
from ldm.pictures import Stored, content, decoded, fitted, to_tensor
from pipelines.latent_diffusion import LatentDiffusion

MEGAPIXELS = 100
"""A picture file with more is not decoded"""


def read_picture(file: Path, size: tuple[int, int] | None = None) -> Image.Image:
    """The picture in a file; with a size, (width, height), scaled and cropped to it.

    Raises:
        BadPicture: it is not there, in no known format, damaged or too large.
    """
    picture = decoded(str(file), content(Stored(str(file), path=str(file))), MEGAPIXELS).image
    return fitted(picture, size, "white") if size else picture


def upright(picture: Image.Image) -> Image.Image:
    """RGB, turned by its EXIF orientation, transparency on white, 16 bits scaled to 8; TypeError for no PIL image."""
    if not isinstance(picture, Image.Image):
        raise TypeError(
            f"{picture!r:.60} is no picture; give a PIL image, such as PIL.Image.open reads from a file"
        )
    turned = ImageOps.exif_transpose(picture)
    return fitted(turned, turned.size, "white")


def to_pixels(model: LatentDiffusion, picture: Image.Image) -> Tensor:
    """[1,3,H,W] in [-1, 1] on the model's device; ValueError for a side that its factor does not divide."""
    picture, factor = upright(picture), model.autoencoder.config.factor
    near = [max(factor, round(side / factor) * factor) for side in picture.size]
    if near != [*picture.size]:
        raise ValueError(
            "the picture is {}x{}, but sides must be multiples of {}; scale and crop it to {}x{} (--size does)".format(
                *picture.size, factor, *near
            )
        )
    model.latent_shape(picture.size)
    return to_tensor(picture)[None].to(model.device)


def to_mask(mask: Image.Image, picture: Image.Image) -> Tensor:
    """[1,1,H,W] in [0, 1], 1 in the hole: where the mask is white or transparent; 0 where it is black.

    Raises:
        ValueError: another size than the picture's; no hole, or nothing else.
    """
    size, grey = upright(picture).size, upright(mask).convert("L")
    if grey.size != size:
        raise ValueError(f"mask has the size {grey.size}, but the picture {size}; make them one size")
    darkest, brightest = grey.getextrema()
    if not brightest:
        raise ValueError(
            "mask is black everywhere, so that nothing would be drawn; white marks what to draw anew"
        )
    if darkest == 255:
        raise ValueError("mask is white everywhere, so that nothing would be kept; black marks what to keep")
    return to_tensor(grey.convert("RGB"))[None, :1].add(1).div(2)


def softened(hole: Tensor, soft: int) -> Tensor:
    """A hole [1,1,H,W] whose edge falls to 0 over `soft` pixels outside of it."""
    require_int("soft", soft, 0, 1000)
    grown, blur = -(-soft // 2), soft // 2
    wide = F.max_pool2d(hole, 2 * grown + 1, stride=1, padding=grown)
    return F.avg_pool2d(wide, 2 * blur + 1, stride=1, padding=blur, count_include_pad=False)


def filled(pixels: Tensor, known: Tensor) -> Tensor:
    """Where known [B,1,H,W] is 0, colours that go smoothly over from what surrounds it; elsewhere pixels [B,3,H,W].

    Means over ever larger blocks, of known pixels alone, until every block has some (pull-push, Gortler et al. 1996); 0
    where nothing is known of a picture.
    """
    if known.all() or pixels.shape[2:] == (1, 1):
        return pixels
    share = F.avg_pool2d(known, 2, ceil_mode=True)
    means = F.avg_pool2d(pixels * known, 2, ceil_mode=True) / share.clamp(min=1e-6)
    coarse = filled(means, (share > 0).to(share))
    smooth = F.interpolate(coarse, size=pixels.shape[2:], mode="bilinear")
    return torch.where(known > 0, pixels, smooth)
