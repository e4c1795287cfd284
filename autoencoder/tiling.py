"""Pictures beyond memory: encoded and decoded in overlapping tiles, the seams blended.

What is exact and what is not. A tile is cut off from what lies beside it, so its outer pixels are wrong: the outer
quarter of every overlap is thrown away, and the tiles are blended linearly over the half in the middle. A decoder
whose reach is at most a quarter of the overlap gives the untiled result to rounding. These networks reach further:
GroupNorm, and attention in the middle, look at the whole picture. For GroupNorm the whole is gathered in a pass over
all tiles before (`tile_norms`), so that tiles agree; attention sees its tile alone. `seam_error` says what is left.

Shapes: pixels [B, 3, H, W]; latents [B, C, h, w] with h = H/f, w = W/f. Tiles and overlaps are in pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import pairwise, product
from typing import NamedTuple

import torch
from torch import Tensor, nn

from autoencoder.fast import Prepared
from autoencoder.kl import AutoencoderKL, Posterior
from autoencoder.metrics import psnr
from autoencoder.model import at_least_float32, check_images, check_latents
from autoencoder.tile_norms import TileNorms

TILE = 512


class Window(NamedTuple):
    """Where a tile lies along one side, and how much it counts there."""

    start: int
    weights: Tensor
    """[tile] float32 in 0..1; those of all tiles add up to 1 at every pixel"""

    @property
    def span(self) -> slice:
        """The pixels that it covers."""
        return slice(self.start, self.start + len(self.weights))


def windows(length: int, tile: int, overlap: int, grow: int = 1) -> list[Window]:
    """Tiles of equal length, evenly spread, that cover 0..length; neighbours share at least `overlap`.

    One window of `length` if that is not longer than `tile`.

    Args:
        length, tile, overlap: in latent pixels.
        grow: the windows are `grow` times as large and begin at multiples of it: pixels to a latent pixel.
    """
    if length <= tile:
        return [Window(0, torch.ones(grow * length))]
    count = -(-(length - overlap) // (tile - overlap))
    starts = [grow * (i * (length - tile) // (count - 1)) for i in range(count)]
    ramps = [torch.ones(grow * tile) for _ in starts]
    for before, after in pairwise(range(count)):
        shared = starts[before] + grow * tile - starts[after]
        rise = _rise(shared)
        ramps[after][:shared] *= rise
        ramps[before][grow * tile - shared :] *= 1 - rise
    total = torch.zeros(grow * length)
    spans = [slice(start, start + grow * tile) for start in starts]
    for span, ramp in zip(spans, ramps, strict=True):
        total[span] += ramp
    return [Window(span.start, ramp / total[span]) for span, ramp in zip(spans, ramps, strict=True)]


def _rise(shared: int) -> Tensor:
    """[shared] from 0 to 1: nothing in the first quarter, a line over the middle half, all in the last quarter."""
    place = (torch.arange(shared) + 0.5) / shared
    return ((place - 0.25) * 2).clamp(0, 1)


@torch.no_grad()
def encode(
    autoencoder: AutoencoderKL,
    pixels: Tensor,
    *,
    tile: int = TILE,
    overlap: int | None = None,
    passes: int = 1,
) -> Posterior:
    """What `autoencoder.encode` gives, with memory for one tile of pixels at a time; no gradients.

    Args:
        pixels: [B, 3, H, W] in [-1, 1], on any device: each tile is brought to the autoencoder's.
        tile: side of a tile in pixels, a multiple of the factor f. A picture within it is encoded as it is.
        overlap: pixels that neighbours share at least, a multiple of f and at most half of `tile`; more hides seams
            better. By default a quarter of `tile`.
        passes: over all tiles before the last, to gather what GroupNorm must know; each costs as much as the last.
            With 0 tiles are normalised alone; 1 removes much of the difference to the untiled result of trained
            models; as many as there are normalisations remove what is due to them.

    Raises ValueError for a tile, an overlap or passes that do not fit, and as `autoencoder.encode` does.
    """
    check_images(pixels, autoencoder.config)
    f = autoencoder.config.factor
    overlap = require_tile(tile, overlap, f)
    if passes < 0:
        raise ValueError(f"passes is {passes}, but must be at least 0.")

    def read(rows: slice, columns: slice) -> Tensor:
        part = pixels[:, :, rows.start * f : rows.stop * f, columns.start * f : columns.stop * f]
        return torch.cat(autoencoder.encode(_beside(part, autoencoder)), dim=1)

    down, across = (windows(side // f, tile // f, overlap // f) for side in pixels.shape[2:])
    moments = _blended(autoencoder.encoder.modules(), read, (down, across), 1, passes)
    return Posterior.from_moments(moments.to(pixels.device))


@torch.no_grad()
def decode(
    autoencoder: AutoencoderKL | Prepared,
    z: Tensor,
    *,
    tile: int = TILE,
    overlap: int | None = None,
    passes: int = 1,
) -> Tensor:
    """What `autoencoder.decode` gives, with memory for one tile of pixels and the result; no gradients.

    Args:
        autoencoder: which is hooked into meanwhile; no other thread may use it.
        z: [B, C, h, w] raw latents, on any device; the result is on the same one.
        tile, overlap, passes: see `encode`.

    Raises ValueError for a tile, an overlap or passes that do not fit, and as `autoencoder.decode` does.
    """
    plain = autoencoder.plain if isinstance(autoencoder, Prepared) else autoencoder
    check_latents(z, plain.config.latent_channels)
    f = plain.config.factor
    overlap = require_tile(tile, overlap, f)
    if passes < 0:
        raise ValueError(f"passes is {passes}, but must be at least 0.")

    def read(rows: slice, columns: slice) -> Tensor:
        return autoencoder.decode(_beside(z[:, :, rows, columns], plain))

    modules = autoencoder.norms() if isinstance(autoencoder, Prepared) else plain.decoder.modules()
    down, across = (windows(side, tile // f, overlap // f, f) for side in z.shape[2:])
    return _blended(modules, read, (down, across), f, passes).to(z.device)


def _beside(part: Tensor, autoencoder: AutoencoderKL) -> Tensor:
    return part.to(autoencoder.decoder.conv_in.weight.device)


def _blended(
    modules: Iterable[nn.Module],
    read: Callable[[slice, slice], Tensor],
    windows_of: tuple[list[Window], list[Window]],
    grow: int,
    passes: int,
) -> Tensor:
    """The weighted sum of all tiles, after `passes` that only gather statistics.

    Args:
        modules: of what `read` runs.
        read: rows and columns of latent pixels => their result [B, K, grow * rows, grow * columns].
        windows_of: down and across, in pixels of the result.
        grow: pixels of the result to a latent pixel, along one side.
    """
    down, across = windows_of
    if len(down) * len(across) == 1:
        return read(*(_latent(window.span, grow) for (window,) in windows_of))
    whole: Tensor | None = None
    norms = TileNorms(modules)
    with norms.watching():
        for last in [False] * passes + [True]:
            for top, left in product(down, across):
                norms.weight = top.weights[:, None] * left.weights
                part = at_least_float32(read(_latent(top.span, grow), _latent(left.span, grow)))
                if last:
                    if whole is None:
                        sides = (windows[-1].span.stop for windows in windows_of)
                        whole = part.new_zeros(*part.shape[:2], *sides)
                    whole[:, :, top.span, left.span] += part * norms.weight.to(part)
            norms.learn()
    assert whole is not None  # every picture has a tile
    return whole


def _latent(pixels: slice, grow: int) -> slice:
    return slice(pixels.start // grow, pixels.stop // grow)


def require_tile(tile: int, overlap: int | None, factor: int) -> int:
    """The overlap, by default a quarter of the tile.

    ValueError unless both are multiples of the factor and the overlap is at most half of the tile.
    """
    if overlap is None:
        overlap = tile // (4 * factor) * factor
    for name, value, least in (("tile", tile, factor), ("overlap", overlap, 0)):
        if value < least or value % factor:
            near = max(least, round(value / factor) * factor)
            raise ValueError(
                f"{name} is {value}, but must be a multiple of the factor {factor}; the nearest is {near}."
            )
    if 2 * overlap > tile:
        raise ValueError(f"overlap is {overlap}, but must be at most half of the tile, {tile // 2}.")
    return overlap


class SeamError(NamedTuple):
    """How far tiled coding is from untiled, on pictures that fit untiled."""

    decode_db: float
    """PSNR of tiled decoding of the same latents against untiled decoding; infinite for equal"""
    decode_max: float
    """Largest difference of a value there, of 2 from black to white"""
    both_db: float
    """PSNR of a picture encoded and decoded in tiles against the untiled way there and back"""


@torch.no_grad()
def seam_error(
    autoencoder: AutoencoderKL,
    pixels: Tensor,
    *,
    tile: int = TILE,
    overlap: int | None = None,
    passes: int = 1,
) -> SeamError:
    """Measure on pictures [B, 3, H, W] in [-1, 1] that are larger than the tile, else there is no error."""
    z = autoencoder.encode(_beside(pixels, autoencoder)).mean
    untiled = autoencoder.decode(z).float()
    tiled = decode(autoencoder, z, tile=tile, overlap=overlap, passes=passes)
    code = encode(autoencoder, pixels, tile=tile, overlap=overlap, passes=passes).mean
    both = decode(autoencoder, code, tile=tile, overlap=overlap, passes=passes).to(untiled.device)
    return SeamError(
        decode_db=_mean_db(tiled, untiled),
        decode_max=(tiled - untiled).abs().max().item(),
        both_db=_mean_db(both, untiled),
    )


def _mean_db(made: Tensor, wanted: Tensor) -> float:
    return psnr(made.clamp(-1, 1), wanted.clamp(-1, 1)).mean().item()
