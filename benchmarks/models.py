"""The networks that both sides run, from one set of random weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import diffusers
import torch

from autoencoder.kl import AutoencoderConfig, AutoencoderKL
from ldm.conditioning import Cond
from ldm.unet import UNet
from ldm.unet_config import UNetConfig

TEXT, TOKENS = 384, 32


@dataclass(frozen=True)
class Shape:
    """A size of model; `small` for a processor, `sd15` for an accelerator."""

    unet: dict[str, Any]
    autoencoder: dict[str, Any]
    latents: tuple[int, ...]
    """Sides of latents in pixels"""
    picture: int
    """Side of pictures in pixels"""


SMALL = Shape(
    unet={
        "block_out_channels": (128, 256, 256),
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
        "attention_head_dim": 4,
        "cross_attention_dim": TEXT,
    },
    autoencoder={
        "block_out_channels": (32, 64, 128),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "mid_block_add_attention": False,
    },
    latents=(16, 32),
    picture=64,
)
SD15 = Shape(
    unet={
        "block_out_channels": (320, 640, 1280, 1280),
        "layers_per_block": 2,
        "attention_head_dim": 8,
        "cross_attention_dim": 768,
    },
    autoencoder={"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2},
    latents=(64,),
    picture=512,
)


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def shape() -> Shape:
    return SD15 if torch.cuda.is_available() else SMALL


def unets(size: Shape) -> tuple[UNet, Any]:
    """Ours as it is used here, channels-last, and diffusers' as it comes; the same weights."""
    torch.manual_seed(0)
    peer: Any = diffusers.UNet2DConditionModel(**size.unet, sample_size=size.latents[0])
    peer = peer.to(device())
    ours = UNet(UNetConfig(**size.unet, sample_size=size.latents[0])).to(device())
    ours.load_state_dict(peer.state_dict())
    return ours.to(memory_format=torch.channels_last), peer  # type: ignore[call-overload]


def autoencoders(size: Shape) -> tuple[AutoencoderKL, Any]:
    """Likewise."""
    torch.manual_seed(0)
    blocks = len(size.autoencoder["block_out_channels"])
    peer: Any = diffusers.AutoencoderKL(
        **size.autoencoder,
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
    )
    peer = peer.to(device())
    ours = AutoencoderKL(AutoencoderConfig(**size.autoencoder)).to(device())
    ours.load_state_dict(peer.state_dict())
    return ours.to(memory_format=torch.channels_last), peer  # type: ignore[call-overload]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device())


def told(size: Shape, batch: int, seed: int = 1) -> Cond:
    return Cond(tokens=normal(batch, TOKENS, size.unet["cross_attention_dim"], seed=seed))
