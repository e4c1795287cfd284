"""Convolutions with fewer multiplications: the same to rounding, and chosen where they pay."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from autoencoder import packed, winograd
from autoencoder.winograd import Conv3x3, Winograd, pays


@torch.no_grad()
@pytest.mark.parametrize("size", [(16, 16), (9, 13), (4, 8), (1, 3)])
@pytest.mark.parametrize("at_once", [1, 1000])
def test_the_convolution_to_rounding(
    size: tuple[int, int], at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most four times as far from the exact result as PyTorch's own is; sides need be no multiples of a tile's."""
    monkeypatch.setattr(winograd, "AT_ONCE", at_once)
    torch.manual_seed(0)
    x, layer = torch.randn(3, 128, *size), nn.Conv2d(128, 48, 3, padding=1)
    weight, bias = layer.weight, layer.bias
    assert bias is not None
    exact = F.conv2d(x.double(), weight.double(), bias.double(), padding=1)
    made = Winograd(layer)(x.contiguous(memory_format=torch.channels_last))
    assert made.is_contiguous(memory_format=torch.channels_last)
    usual = F.conv2d(x, weight, bias, padding=1)
    error, usually = ((part - exact).norm() / exact.norm() for part in (made, usual))
    assert error < max(4 * usually, 2e-6)


@torch.no_grad()
@pytest.mark.parametrize(
    ("shape", "dtype", "chosen"),
    [
        ((1, 256, 16), torch.float32, True),
        ((1, 256, 12), torch.float32, False),  # too few tiles for weights four times as many
        ((1, 128, 16), torch.float32, False),  # too few products for what is beside them
        (
            (4, 256, 5),
            torch.float32,
            False,
        ),  # tiles reach over the map, of which a direct way leaves out zeros
        ((1, 32, 40), torch.float32, False),  # the way to points and back is as much as the products
        ((1, 256, 16), torch.bfloat16, False),
    ],
)
def test_where_it_is_chosen(shape: tuple[int, int, int], dtype: torch.dtype, chosen: bool) -> None:
    """The convolution is then made of tiles, not packed for the whole map; bias and residual are the same."""
    if not packed.packs(dtype):
        pytest.skip("oneDNN's fused operators are missing here")
    torch.manual_seed(0)
    samples, channels, side = shape
    layer, x = nn.Conv2d(channels, channels, 3, padding=1), torch.randn(samples, channels, side, side)
    conv, map_ = Conv3x3(layer, dtype), x.to(dtype, memory_format=torch.channels_last)
    rest = torch.randn_like(map_)
    wanted = layer(x) + rest
    made = conv.onto(map_, rest.clone()).float()
    assert pays(conv, map_) == chosen == (conv._winograd is not None) == (not conv._for)
    assert (made - wanted).abs().max() < (1e-5 if dtype == torch.float32 else 0.1) * wanted.abs().max()
