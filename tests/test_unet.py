"""The U-Net against diffusers' UNet2DConditionModel: same weights, numbers, gradients, files and configs."""

from __future__ import annotations

import dataclasses
import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from autoencoder.layers import enable_checkpointing
from ldm.conditioning import Cond
from ldm.unet import UNet, UNetConfig

diffusers = pytest.importorskip("diffusers")

TINY = {"block_out_channels": (16, 32), "norm_num_groups": 8, "layers_per_block": 1, "attention_head_dim": 2}
ONE_DOWN = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}
TEXT = {**TINY, **ONE_DOWN, "cross_attention_dim": 24}
NO_TEXT = {**TINY, **ONE_DOWN, "cross_attention_dim": None}

SHAPES: dict[str, dict[str, Any]] = {
    "sd15": {
        **TINY,
        "block_out_channels": (16, 24, 32),
        "layers_per_block": 2,
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 24,
    },
    "sd21": {
        **TINY,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "attention_head_dim": (2, 4),
        "use_linear_projection": True,
        "upcast_attention": True,
        "cross_attention_dim": 24,
    },
    "sdxl": {
        **TINY,
        "block_out_channels": (16, 24, 32),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 3),
        "attention_head_dim": (2, 3, 4),
        "use_linear_projection": True,
        "cross_attention_dim": 24,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 20,
        "upcast_attention": None,
    },
    "classes": {**NO_TEXT, "num_class_embeds": 5},
    "classes and text": {**TEXT, "num_class_embeds": 5},
    "numbers as classes": {**TEXT, "class_embed_type": "timestep"},
    "unconditional": {**NO_TEXT, "sample_size": (8, 12)},
    "no attention but in the middle": {
        **TINY,
        "down_block_types": ("DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 24,
    },
    "inpainting": {**TEXT, "in_channels": 9},
    "scale and shift": {**TEXT, "resnet_time_scale_shift": "scale_shift"},
    "layers per level": {**TEXT, "layers_per_block": (1, 3)},
    "sines first": {**TEXT, "flip_sin_to_cos": False, "freq_shift": 1},
    "dropout and eps": {**TEXT, "dropout": 0.3, "norm_eps": 1e-3},
}
FULL: dict[str, dict[str, Any]] = {
    "SD 1.5": {"sample_size": 64, "cross_attention_dim": 768},
    "SD 2.1": {
        "sample_size": 96,
        "cross_attention_dim": 1024,
        "attention_head_dim": (5, 10, 20, 20),
        "use_linear_projection": True,
        "upcast_attention": True,
    },
    "SDXL": {
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "use_linear_projection": True,
        "cross_attention_dim": 2048,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
        "upcast_attention": None,
    },
}


def randomise(network: torch.nn.Module) -> torch.nn.Module:
    """Weights away from what a fresh network has, so that no bias or scale can hide."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in network.parameters():
            p += 0.1 * torch.randn(p.shape, generator=generator)
    return network.eval()


def inputs(config: UNetConfig, size: tuple[int, int] = (8, 8), n: int = 2) -> tuple[Tensor, Tensor, Cond]:
    """Random latents, times and whatever condition the config reads."""
    generator = torch.Generator().manual_seed(2)
    drawn = {
        name: None if shape is None else torch.randn(n, *(s or 7 for s in shape), generator=generator)
        for name, shape in config.reads().items()
    }
    if drawn["label"] is not None:
        drawn["label"] = torch.tensor([4, 1])
    if drawn["time_ids"] is not None:
        drawn["time_ids"] = 512 * drawn["time_ids"].abs().round(decimals=2)
    x = torch.randn(n, config.in_channels, *size, generator=generator)
    return x, torch.tensor([3.0, 871.25]), Cond(**drawn)


def stock(network: torch.nn.Module, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
    """The same call in diffusers' words."""
    added = None if cond.pooled is None else {"text_embeds": cond.pooled, "time_ids": cond.time_ids}
    return network(
        x,
        t,
        cond.tokens,
        class_labels=cond.label,
        added_cond_kwargs=added,
        encoder_attention_mask=cond.mask,
    ).sample


def difference(a: Tensor, b: Tensor) -> float:
    """Largest difference, relative to the largest value."""
    return float((a - b).detach().abs().max() / b.detach().abs().max())


def gradients(network: torch.nn.Module, out: Tensor) -> dict[str, Tensor]:
    """Gradients of a fixed random projection of `out` by every parameter."""
    network.zero_grad()
    (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(3))).sum().backward()
    return {name: p.grad for name, p in network.named_parameters() if p.grad is not None}


def pair(shape: dict[str, Any]) -> tuple[UNet, torch.nn.Module]:
    """One network in both libraries."""
    ours = UNet(UNetConfig(**shape))
    theirs = diffusers.UNet2DConditionModel(**dataclasses.asdict(ours.config)).eval()
    theirs.load_state_dict(randomise(ours).state_dict())
    return ours, theirs


def parity(name: str, folder: Path) -> tuple[float, float]:
    """Forward and gradient difference to diffusers; weights travel ours -> theirs -> ours by files."""
    config = UNetConfig(**SHAPES[name])
    randomise(UNet(config)).save_pretrained(folder / "ours")
    theirs = diffusers.UNet2DConditionModel.from_pretrained(folder / "ours").eval()
    theirs.save_pretrained(folder / "theirs")
    ours = UNet.from_pretrained(folder / "theirs")
    assert ours.config == config
    x, t, cond = inputs(config)
    a, b = ours(x, t, cond), stock(theirs, x, t, cond)
    forward = difference(a, b)
    mine, reference = gradients(ours, a), gradients(theirs, b)
    assert mine.keys() == reference.keys() == dict(ours.named_parameters()).keys()
    # A gradient that is zero in exact arithmetic (a bias before a normalisation) is rounding noise in both.
    scale = max(float(g.abs().max()) for g in reference.values())
    worst = max(
        float((mine[k] - reference[k]).abs().max()) / max(float(reference[k].abs().max()), 1e-3 * scale)
        for k in reference
    )
    return forward, worst


@pytest.mark.parametrize("name", SHAPES)
def test_parity(name: str, tmp_path: Path) -> None:
    forward, gradient = parity(name, tmp_path)
    assert forward <= 1e-5
    assert gradient <= 1e-4


@pytest.mark.parametrize("name", FULL)
def test_full_size_weights_have_stock_names_and_shapes(name: str) -> None:
    with torch.device("meta"):
        ours = UNet(UNetConfig(**FULL[name])).state_dict()
        theirs = diffusers.UNet2DConditionModel(**FULL[name]).state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}


def test_config_has_every_stock_key_and_its_default() -> None:
    config = UNetConfig()
    ours = {**dataclasses.asdict(config), **config.fixed()}
    stock_keys = inspect.signature(diffusers.UNet2DConditionModel.__init__).parameters
    assert ours == {key: p.default for key, p in stock_keys.items() if key != "self"}


@pytest.mark.parametrize("size", [(10, 14), (7, 8), (9, 13), (3, 5)])
def test_sizes_that_do_not_halve_evenly(size: tuple[int, int]) -> None:
    """Three levels, linear projections as in stock: the same to rounding."""
    ours, theirs = pair(SHAPES["sdxl"])
    x, t, cond = inputs(ours.config, size)
    out, wanted = ours(x, t, cond), stock(theirs, x, t, cond)
    assert out.shape == x.shape and difference(out, wanted) <= 1e-5
    mine, reference = gradients(ours, out), gradients(theirs, wanted)
    scale = max(float(g.abs().max()) for g in reference.values())
    assert max(float((mine[k] - reference[k]).abs().max()) for k in reference) <= 1e-5 * scale


def test_masked_tokens_are_not_seen() -> None:
    ours, theirs = pair(TEXT)
    x, t, cond = inputs(ours.config)
    mask = torch.tensor([[True] * 4 + [False] * 3, [False] * 7])
    masked = cond._replace(mask=mask)
    out = ours(x, t, masked)
    assert difference(out, stock(theirs, x, t, masked)) <= 1e-5
    other = masked._replace(tokens=torch.where(mask[..., None], masked.tokens, 99.0))
    torch.testing.assert_close(ours(x, t, other)[0], out[0])
    shorter = Cond(tokens=cond.tokens[:1, :4])
    torch.testing.assert_close(ours(x[:1], t[:1], shorter), out[:1], rtol=1e-5, atol=1e-5)


def test_checkpointing_keeps_gradients() -> None:
    network = randomise(UNet(UNetConfig(**SHAPES["sdxl"], dropout=0.2))).train()
    call = inputs(network.config)
    torch.manual_seed(0)
    plain = gradients(network, network(*call))
    enable_checkpointing(network)
    torch.manual_seed(0)
    again = gradients(network, network(*call))
    assert plain.keys() == again.keys()
    assert all(torch.equal(again[name], plain[name]) for name in plain)


def test_channels_last_and_bfloat16() -> None:
    network = randomise(UNet(UNetConfig(**SHAPES["sdxl"])))
    x, t, cond = inputs(network.config)
    cond = cond._replace(mask=torch.ones(2, 7, dtype=torch.bool))
    reference = network(x, t, cond)
    network = network.to(memory_format=torch.channels_last)
    x = x.to(memory_format=torch.channels_last)
    assert difference(network(x, t, cond), reference) <= 1e-5
    with torch.autocast("cpu", torch.bfloat16):
        out = network(x, t, cond)
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert difference(out.float(), reference) <= 0.1
    assert all(g.isfinite().all() for g in gradients(network, out.float()).values())
    half = {name: None if value is None else value.bfloat16() for name, value in cond._asdict().items()}
    out = network.bfloat16()(x.bfloat16(), t, Cond(**half)._replace(mask=cond.mask, time_ids=cond.time_ids))
    assert out.dtype == torch.bfloat16
    assert difference(out.float(), reference) <= 0.1


def test_the_last_prediction_can_be_repeated_from_a_file(tmp_path: Path) -> None:
    network = randomise(UNet(UNetConfig(**SHAPES["unconditional"])))
    call = inputs(network.config)
    network.save_pretrained(tmp_path)
    again = UNet.from_pretrained(tmp_path)
    assert again.config == network.config
    assert not again.training
    assert torch.equal(again(*call), network(*call))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("only_cross_attention", True),
        ("class_embed_type", "projection"),
        ("addition_embed_type", "text"),
        ("mid_block_type", "UNetMidBlock2D"),
        ("down_block_types", ["AttnDownBlock2D", "DownBlock2D"]),
        ("resnet_time_scale_shift", "spatial"),
        ("a_key_from_the_future", 1),
    ],
)
def test_unsupported_keys_are_refused_by_name(key: str, value: Any, tmp_path: Path) -> None:
    UNet(UNetConfig(**TEXT)).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "_note": "ignored"}))
    UNet.from_pretrained(tmp_path)
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(ValueError, match=key):
        UNet.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ({"norm_num_groups": 5}, "norm_num_groups = 5"),
        ({"attention_head_dim": 5}, "attention_head_dim = 5"),
        ({"layers_per_block": (1, 1, 1)}, "layers_per_block"),
        ({"up_block_types": ("UpBlock2D",)}, "up_block_types"),
        ({"cross_attention_dim": (24, 32)}, "cross_attention_dim"),
        ({"cross_attention_dim": (None, None)}, "cross_attention_dim"),
        ({"in_channels": 0}, "in_channels = 0"),
        ({"layers_per_block": (0, 1)}, r"layers_per_block = \(0, 1\)"),
        ({"addition_embed_type": "text_time"}, "addition_time_embed_dim"),
        ({"block_out_channels": ()}, "block_out_channels"),
    ],
)
def test_contradictory_configs_are_refused(shape: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        UNetConfig(**{**TEXT, **shape})


def test_wrong_inputs_are_refused() -> None:
    network = UNet(UNetConfig(**TEXT))
    x, t, cond = inputs(network.config)
    tokens = cond.tokens
    for call, words in (
        ((x[:, :3], t, cond), r"\[2, 3, 8, 8\].*\[B, 4, H, W\]"),
        ((x[0], t, cond), r"\[4, 8, 8\].*\[B, 4, H, W\]"),
        ((x, t[:1], cond), "t has shape"),
        ((x, t, Cond()), r"cond.tokens has shape None.*\[2, L, 24\]"),
        ((x, t, Cond(tokens=tokens[:1])), r"cond.tokens has shape \[1, 7, 24\].*\[2, 7, 24\]"),
        ((x, t, Cond(tokens=tokens[..., :5])), r"cond.tokens has shape \[2, 7, 5\].*\[2, 7, 24\]"),
        ((x, t, cond._replace(label=torch.tensor([0, 1]))), r"cond.label has shape \[2\].*None"),
        ((x, t, cond._replace(mask=torch.ones(2, 3).bool())), "cond.mask"),
    ):
        with pytest.raises(ValueError, match=words):
            network(*call)
