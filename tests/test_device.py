"""What is chosen by device: what a GPU is given, played by the CPU."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from autoencoder.fast_blocks import Conv3x3
from autoencoder.packed import Kept
from ldm import device
from ldm.unet import UNet, UNetConfig
from tests.test_unet import SHAPES, difference, inputs, randomise


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "device_of", lambda module: "cuda")


@pytest.mark.parametrize("name", SHAPES)
def test_bf16_is_of_weights_in_bf16_which_are_kept(name: str, elsewhere: None) -> None:
    """Autocast, which may be on around it, would narrow them anew in each step."""
    torch.manual_seed(0)
    plain = randomise(UNet(UNetConfig(**SHAPES[name]))).requires_grad_(False)
    x, t, cond = inputs(plain.config)
    kept: Kept = Kept()
    with torch.autocast("cpu", torch.bfloat16):
        exact, made = (device.to_draw(plain, way, kept=kept)(x, t, cond) for way in ("f32", "bf16"))
        half = kept._last
        device.to_draw(plain, "bf16", kept=kept)
    assert half is kept._last and {p.dtype for p in half[1].parameters()} == {torch.bfloat16}
    assert exact.dtype == made.dtype == torch.float32 and torch.equal(exact, plain(x, t, cond))
    assert 1e-4 < difference(made, exact) <= 3e-2


def test_one_drawing_is_one_compiled_graph(elsewhere: None) -> None:
    """And so is the next."""
    few = {"block_out_channels": (8, 8), "layers_per_block": 1, "norm_num_groups": 4}
    few |= {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D")}
    few |= {"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}
    plain = UNet(UNetConfig(**SHAPES["sd15"] | few)).requires_grad_(False)
    x, t, cond = inputs(plain.config)
    graphs = CompileCounter()
    kept: Kept = Kept()
    for _ in range(2):
        network = torch.compile(device.to_draw(plain, "bf16", kept=kept), backend=graphs, fullgraph=True)
        network(x, t, cond)
    assert graphs.frame_count == 1


def test_what_reuse_prepares_is_made_wherever_the_weights_are() -> None:
    """`meta` stands for a device that is not the CPU."""
    layer = Conv3x3(torch.nn.Conv2d(4, 6, 3, padding=1, device="meta"), torch.bfloat16)
    made = layer.doubled(torch.empty(2, 4, 5, 3, dtype=torch.bfloat16, device="meta"))
    assert made.shape == (2, 6, 10, 6) and made.device.type == "meta"
