"""The networks that both sides run, from one set of random weights."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import Tensor

from autoencoder.kl import AutoencoderConfig, AutoencoderKL
from ldm.conditioning import Cond
from ldm.unet import UNet
from ldm.unet_config import UNetConfig

TEXT, TOKENS = 384, 32


@dataclass(frozen=True)
class Shape:
    """A size of model: SMALL for a processor, SD15 for an accelerator. For real loops EMOJI, as in configs/emoji, and
    STOCK, a small U-Net in the latents of an autoencoder of Stable Diffusion's shape."""

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
EMOJI = Shape(
    unet={
        "block_out_channels": (64, 160),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
        "attention_head_dim": 4,
        "cross_attention_dim": TEXT,
    },
    autoencoder={
        "block_out_channels": (16, 32, 64),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "mid_block_add_attention": False,
    },
    latents=(16,),
    picture=64,
)
STOCK_AUTOENCODER = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2}
STOCK = Shape(
    unet=SMALL.unet | {"cross_attention_dim": 768},
    autoencoder=STOCK_AUTOENCODER,
    latents=(16,),
    picture=128,
)
SD15 = Shape(
    unet={
        "block_out_channels": (320, 640, 1280, 1280),
        "layers_per_block": 2,
        "attention_head_dim": 8,
        "cross_attention_dim": 768,
    },
    autoencoder=STOCK_AUTOENCODER,
    latents=(64,),
    picture=512,
)


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def shape() -> Shape:
    return SD15 if torch.cuda.is_available() else SMALL


def stock() -> Shape:
    """Of the real loop in the latents of a stock autoencoder."""
    return SD15 if torch.cuda.is_available() else STOCK


def unets(size: Shape) -> tuple[UNet, Any]:
    """Ours, channels-last and on a GPU compiled, and diffusers' as it comes; the same weights."""
    torch.manual_seed(0)
    peer: Any = diffusers.UNet2DConditionModel(**size.unet, sample_size=size.latents[0])
    peer = peer.to(device())
    ours = UNet(UNetConfig(**size.unet, sample_size=size.latents[0])).to(device())
    ours.load_state_dict(peer.state_dict())
    if device() == "cuda":
        ours.compile(mode="max-autotune")
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


def hurried(peer: Any, dtype: torch.dtype = torch.float32) -> Any:
    """A copy with what diffusers' guides to speed advise: channels-last, q, k and v as one, a precision; on a GPU
    compiled. On a CPU not: there compiling took 35 to 60 seconds a network and gave 4 % (docs/log.md)."""
    peer = copy.deepcopy(peer).to(dtype).to(memory_format=torch.channels_last)
    peer.fuse_qkv_projections()
    if device() == "cuda":
        peer.compile(mode="max-autotune", fullgraph=True)
    return peer


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device())


def told(size: Shape, batch: int, seed: int = 1) -> Cond:
    return Cond(tokens=normal(batch, TOKENS, size.unet["cross_attention_dim"], seed=seed))
