"""The networks that both sides run, from one set of random weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import Tensor

from autoencoder.kl import AutoencoderConfig, AutoencoderKL
from ldm.conditioning import Cond
from ldm.denoiser import Network
from ldm.device import DTYPES, Precision
from ldm.unet import UNet
from ldm.unet_config import UNetConfig

diffusers.utils.logging.set_verbosity_error()  # it warns of each `to` of a dtype
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


def on_gpu() -> bool:
    return torch.cuda.is_available()


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def shape() -> Shape:
    return SD15 if on_gpu() else SMALL


def stock() -> Shape:
    """Of the real loop in the latents of a stock autoencoder."""
    return SD15 if on_gpu() else STOCK


def usual() -> Precision:
    """On a GPU nobody trains or draws in another precision than bf16, both sides with bf16 products."""
    return "bf16" if on_gpu() else "f32"


def precisions() -> dict[Precision, torch.dtype]:
    """Those that are measured: on a CPU ours in bf16 is compared with the peer in float32, as rows say."""
    return {"bf16": torch.bfloat16} if on_gpu() else DTYPES


def training_pairs() -> list[tuple[Precision, Precision]]:
    """In which ours and the peer train: alike, and on a CPU ours in bf16 against float32, in which its scripts train if
    they are not told otherwise."""
    alike = [(precision, precision) for precision in precisions()]
    return alike if on_gpu() else [*alike, ("bf16", usual())]


def against(precision: Precision) -> str:
    """What a row's name says of it."""
    return precision if precision == usual() else f"{precision} against {usual()}"


def unets(size: Shape) -> tuple[UNet, Any]:
    """Ours, channels-last, and diffusers' as it comes; the same weights."""
    torch.manual_seed(0)
    with torch.device(device()):
        peer: Any = diffusers.UNet2DConditionModel(**size.unet, sample_size=size.latents[0])
        ours = UNet(UNetConfig(**size.unet, sample_size=size.latents[0]))
    ours.load_state_dict(peer.state_dict())
    return ours.to(memory_format=torch.channels_last), peer  # type: ignore[call-overload]


def autoencoders(size: Shape) -> tuple[AutoencoderKL, Any]:
    """Likewise."""
    torch.manual_seed(0)
    blocks = len(size.autoencoder["block_out_channels"])
    with torch.device(device()):
        peer: Any = diffusers.AutoencoderKL(
            **size.autoencoder,
            down_block_types=("DownEncoderBlock2D",) * blocks,
            up_block_types=("UpDecoderBlock2D",) * blocks,
        )
        ours = AutoencoderKL(AutoencoderConfig(**size.autoencoder))
    ours.load_state_dict(peer.state_dict())
    return ours.to(memory_format=torch.channels_last), peer  # type: ignore[call-overload]


def as_it_comes(peer: Any) -> Any:
    """The peer, to draw, encode and decode, in the usual precision; on a GPU a copy."""
    return peer if usual() == "f32" else copy.deepcopy(peer).to(DTYPES[usual()])


def hurried(peer: Any, dtype: torch.dtype = torch.float32, *, trains: bool = False) -> Any:
    """A copy with what diffusers' guides to speed advise: channels-last, q, k and v as one, a precision; on a GPU
    compiled. On a CPU not: there compiling took 35 to 60 seconds a network and gave 4 % (docs/log.md)."""
    peer = copy.deepcopy(peer).to(dtype).to(memory_format=torch.channels_last)
    peer.fuse_qkv_projections()
    compile_parts(peer, graphs=not trains)
    return peer


def compile_parts(network: Any, *, graphs: bool) -> None:
    """On a GPU, both sides alike: a U-Net, or an autoencoder's encoder and decoder, which are called one by one."""
    parts = [network.encoder, network.decoder] if hasattr(network, "decoder") else [network]
    for part in parts if on_gpu() else []:
        part.compile(**compiling(graphs))


def compiled(network: Network) -> Network:
    """What draws, on a GPU compiled."""
    if not on_gpu():
        return network
    graph: Callable[..., Tensor] = torch.compile(network, **compiling(graphs=True))
    return lambda x, t, cond: graph(x, t, cond).clone()  # the next replay writes over what this one gave


def compiling(graphs: bool) -> dict[str, Any]:
    """How networks are compiled: into CUDA graphs, which save launching thousands of kernels, where nothing trains (a
    step keeps the GPU busy, and graphs would keep its memory). Each batch size is compiled for itself, since kernels of
    any size are slower. TORCHINDUCTOR_MAX_AUTOTUNE=1 adds a search among kernels: minutes a network, on both sides."""
    return {"mode": "reduce-overhead" if graphs else "default", "dynamic": False, "fullgraph": True}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device())


def told(size: Shape, batch: int, seed: int = 1) -> Cond:
    return Cond(tokens=normal(batch, TOKENS, size.unet["cross_attention_dim"], seed=seed))
