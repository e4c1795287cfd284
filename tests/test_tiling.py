"""Tiles add up to the whole: exactly where the network's reach allows it, and with a known error where it does not."""

import math
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from autoencoder import tiling
from autoencoder.fast import Prepared
from autoencoder.kl import AutoencoderConfig, AutoencoderKL
from autoencoder.norms import GroupNorm
from autoencoder.tile_norms import TileNorms
from ldm.device import to_decode
from pipelines import LatentDiffusion
from pipelines.cli import main as ldm
from tests.tiling_memory import STATUS, measured


class Unchanged(nn.Module):
    """In place of a GroupNorm."""

    def forward(self, x: torch.Tensor, silu: bool = False) -> torch.Tensor:
        return F.silu(x) if silu else x


def make(norm: bool = True, factor: int = 4) -> AutoencoderKL:
    """A small autoencoder without attention; without `norm`, nothing in it looks further than its convolutions."""
    torch.manual_seed(0)
    widths = (8,) * (int(math.log2(factor)) + 1)
    config = AutoencoderConfig(block_out_channels=widths, norm_num_groups=4, mid_block_add_attention=False)
    model = AutoencoderKL(config).eval()
    if not norm:
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, GroupNorm):
                    setattr(parent, name, Unchanged())
                elif isinstance(child, nn.Conv2d):
                    child.weight.data *= 3  # so that what lies far away counts
    return model


def pictures(*size: int) -> torch.Tensor:
    return torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize("grow", [1, 4])
@pytest.mark.parametrize(
    ("length", "tile", "overlap"), [(5, 8, 2), (8, 8, 4), (9, 8, 4), (17, 8, 4), (100, 16, 6), (33, 16, 0)]
)
def test_the_weights_of_all_tiles_add_up_to_one(length: int, tile: int, overlap: int, grow: int) -> None:
    total, end = torch.zeros(grow * length), 0
    for start, weights in tiling.windows(length, tile, overlap, grow):
        assert start % grow == 0 and len(weights) == grow * min(tile, length)
        assert start == 0 or start <= end - grow * overlap
        total[start : start + len(weights)] += weights
        end = start + len(weights)
    assert end == grow * length
    torch.testing.assert_close(total, torch.ones_like(total))


@torch.no_grad()
def test_one_tile_over_all_is_the_untiled_result_bit_for_bit() -> None:
    model, x = make(), pictures(32, 24)
    posterior, tiled = model.encode(x), tiling.encode(model, x, tile=32, overlap=8)
    assert torch.equal(tiled.mean, posterior.mean) and torch.equal(tiled.logvar, posterior.logvar)
    made = tiling.decode(model, posterior.mean, tile=32, overlap=8)
    assert torch.equal(made, model.decode(posterior.mean))


@torch.no_grad()
def test_tiles_are_exact_where_the_networks_reach_is_within_the_overlap() -> None:
    """The decoder reaches 24 pixels far, a quarter of 96; the sides are no multiples of the tile."""
    model, x = make(norm=False, factor=2), pictures(480, 268)
    posterior = model.encode(x)
    atol = 1e-5 * posterior.mean.abs().max().item()
    tiled = tiling.encode(model, x, tile=192, overlap=96)
    torch.testing.assert_close(tiled.mean, posterior.mean, atol=atol, rtol=0)
    torch.testing.assert_close(tiled.logvar, posterior.logvar, atol=atol, rtol=0)
    made, wanted = tiling.decode(model, posterior.mean, tile=192, overlap=96), model.decode(posterior.mean)
    atol = 1e-5 * wanted.abs().max().item()
    torch.testing.assert_close(made, wanted, atol=atol, rtol=0)
    close = tiling.decode(model, posterior.mean, tile=192, overlap=16)
    assert (close - wanted).abs().max() > 1e-3 * wanted.abs().max(), (
        "an overlap within the reach can't be exact"
    )


def test_seam_error_says_what_normalisation_costs() -> None:
    x = pictures(64, 64)
    none = tiling.seam_error(make(), x, tile=64, overlap=16)
    assert none == (math.inf, 0.0, math.inf)
    found = tiling.seam_error(make(), x, tile=32, overlap=16)
    assert found.decode_max > 0 and 5 < found.both_db < 100 and 5 < found.decode_db < 100


@torch.no_grad()
def test_statistics_gathered_over_tiles_are_those_of_the_whole() -> None:
    """Weighted as they are blended, every pixel counts once: whatever the overlaps, and at half the resolution."""
    torch.manual_seed(0)
    x = torch.randn(2, 8, 40, 56) * torch.linspace(0.2, 5, 56) + torch.linspace(-3, 3, 40)[:, None]
    network = nn.Sequential(GroupNorm(4, 8), nn.AvgPool2d(2))
    nn.init.normal_(network[0].weight)
    norms = TileNorms(network.modules())
    tiles = list(product(tiling.windows(40, 16, 8), tiling.windows(56, 24, 8)))
    wanted = network(x)
    for known in (False, True):
        error = 0.0
        with norms.watching():
            for top, left in tiles:
                norms.weight = top.weights[:, None] * left.weights
                part = network(x[:, :, top.span, left.span])
                rows, columns = (slice(s.start // 2, s.stop // 2) for s in (top.span, left.span))
                error = max(error, (part - wanted[:, :, rows, columns]).abs().max().item())
        norms.learn()
        assert error < 1e-5 if known else error > 0.1
    assert not network[0]._forward_hooks


@torch.no_grad()
def test_as_many_passes_as_normalisations_give_the_untiled_result() -> None:
    """Each pass makes the statistics of one more layer exact, where convolutions stay within the overlap."""
    model, x = make(factor=2), pictures(288, 192)[:1] * torch.linspace(0.1, 1, 192)
    z = model.encode(x).mean
    wanted = model.decode(z)
    layers = sum(isinstance(module, GroupNorm) for module in model.decoder.modules())
    made = tiling.decode(model, z, tile=192, overlap=96, passes=layers)
    assert (made - wanted).abs().max() < 1e-4 * wanted.abs().max()
    alone = tiling.decode(model, z, tile=192, overlap=96, passes=0)
    assert (alone - wanted).abs().max() > 1e-2 * wanted.abs().max()


@torch.no_grad()
def test_prepared_decoders_make_the_same_of_tiles() -> None:
    """In their own precision; and nothing stays hooked into them."""
    model, z = make(factor=2), torch.randn(1, 4, 24, 20, generator=torch.Generator().manual_seed(2))
    wanted = tiling.decode(model, z, tile=16, overlap=8)
    largest = wanted.abs().max()
    prepared = Prepared(model)
    assert (tiling.decode(prepared, z, tile=16, overlap=8) - wanted).abs().max() < 1e-5 * largest
    assert not any(norm._forward_hooks for norm in prepared.norms())
    assert len(list(prepared.norms())) == sum(isinstance(m, GroupNorm) for m in model.decoder.modules())
    for decode in (
        to_decode(model, "bf16", tile=16),  # prepared, and as on other devices
        to_decode(model, "bf16", tile=16, prepare=False),
    ):
        made = decode(z)
        assert made.dtype == torch.float32
        assert 1e-4 * largest < (made - to_decode(model, tile=16)(z)).abs().max() < 0.1 * largest


@pytest.mark.parametrize(
    ("tile", "overlap", "message"),
    [
        (30, 8, "tile is 30"),
        (32, 6, "overlap is 6"),
        (32, 20, "at most half of the tile, 16"),
        (0, 0, "tile is 0"),
    ],
)
def test_unfit_tiles_are_refused(tile: int, overlap: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiling.decode(make(), torch.zeros(1, 4, 8, 8), tile=tile, overlap=overlap)


@pytest.mark.skipif(not STATUS.exists(), reason="reads peak memory from /proc, which Linux has")
def test_memory_is_that_of_a_tile() -> None:
    """Peak memory over what the process had before, in a process of its own."""
    at_once, in_tiles = measured(768, None), measured(768, 192)
    assert in_tiles["mb"] < at_once["mb"] / 3


def test_pictures_larger_than_a_tile_are_drawn_in_tiles(chain: Path, tmp_path: Path) -> None:
    """Others are drawn as ever; by the command, an unfit tile is one sentence."""
    model = LatentDiffusion.from_pretrained(chain / "ldm")
    asked = {"prompts": "a large red circle", "steps": 1, "size": (48, 32)}
    whole, fits, tiled = model(**asked), model(**asked, tile=48), model(**asked, tile=16)
    assert whole[0].tobytes() == fits[0].tobytes() != tiled[0].tobytes()
    assert tiled[0].size == (48, 32)
    arguments = [
        "generate",
        str(chain / "ldm"),
        "x",
        "--steps",
        "1",
        "--size",
        "32x32",
        "--out",
        str(tmp_path),
    ]
    ldm([*arguments, "--tile", "16"])
    assert (tmp_path / "0000.png").exists()
    with pytest.raises(SystemExit):
        ldm([*arguments, "--tile", "15"])
