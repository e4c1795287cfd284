"""What is done differently on one kind of device than on another, chosen here from measurements (docs/log.md).

Drawing and decoding:
    CPU     networks prepared for oneDNN (`ldm.fast`, `autoencoder.fast`): same results, packed at the first call
    others  the networks as they are; if bf16 is asked for, a U-Net of weights in bf16, which autocast would make anew
            in each step (5 GB to read and write for Stable Diffusion's), and the autoencoder under autocast
Drawing and training on a CPU: 3x3 convolutions (`autoencoder.winograd`) and GroupNorm (`autoencoder.norms`) in C, where
there is a compiler; drawing in bf16, attention too (`autoencoder.attention`). Training there: freed memory kept for the
next step (`ldm.memory.keep_freed`), and attention written out for short sequences in bf16 (`ldm.blocks`); else it is
PyTorch's.
Chosen elsewhere, because one way is the best on all: AdamW in one fused kernel (`ldm.optim`), averages of weights by
multi-tensor operations (`ldm.ema`).
Compiling is left to `run.compile`: it pays on a GPU, and gave 4 % for a minute of compiling on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from autoencoder import fast as autoencoder_fast
from autoencoder import tiling
from autoencoder.kl import AutoencoderKL
from autoencoder.packed import Kept
from ldm import fast
from ldm.conditioning import Cond
from ldm.denoiser import Network
from ldm.unet import UNet

Precision = Literal["f32", "bf16"]
DTYPES: dict[Precision, torch.dtype] = {"f32": torch.float32, "bf16": torch.bfloat16}


def to_draw(
    unet: UNet,
    precision: Precision = "f32",
    *,
    prepare: bool = True,
    reuse: int = 1,
    kept: Kept[Any] | None = None,
) -> Network:
    """What to call in place of the U-Net to draw with the weights it has now; results are float32.

    Args:
        precision: f32 gives what the U-Net gives, to rounding; bf16 is faster, and draws slightly otherwise.
        prepare: false leaves out the preparation for the CPU.
        reuse: see `ldm.fast.Prepared`; above 1, networks are prepared on any device.
        kept: where the preparation of an earlier drawing is sought, and this one's left.
    """
    if reuse > 1 or (prepare and device_of(unet) == "cpu"):
        return fast.Prepared(unet, DTYPES[precision], reuse, kept)
    dtype, kept = DTYPES[precision], Kept() if kept is None else kept
    network = unet if precision == "f32" else kept.of(unet, dtype, lambda: deepcopy(unet).to(dtype))

    def draw(x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        # of the condition the tokens alone: times and sizes would be others in bf16
        tokens = None if cond.tokens is None else cond.tokens.to(dtype)
        with torch.autocast(x.device.type, enabled=False):
            return network(x.to(dtype), t, cond._replace(tokens=tokens)).float()

    return draw


def to_decode(
    autoencoder: AutoencoderKL,
    precision: Precision = "f32",
    *,
    prepare: bool = True,
    tile: int | None = None,
    kept: Kept[autoencoder_fast.Prepared] | None = None,
) -> Callable[[Tensor], Tensor]:
    """What to call in place of the autoencoder's `decode`, likewise.

    Args:
        tile: pictures with a longer side are decoded one by one, in tiles of it (`autoencoder.tiling`).
        kept: likewise, but for tiles.
    """
    prepare = prepare and device_of(autoencoder) == "cpu"
    dtype, factor = DTYPES[precision], autoencoder.config.factor
    pack = partial(autoencoder_fast.Prepared, autoencoder, dtype)
    kept = Kept() if kept is None else kept

    def decode(z: Tensor) -> Tensor:
        half = precision == "bf16" and not prepare
        with torch.autocast(z.device.type, torch.bfloat16, enabled=half):
            if tile is None or max(z.shape[2:]) * factor <= tile:
                network = kept.of(autoencoder, (dtype, z.shape), pack) if prepare else autoencoder
                return network.decode(z).float()
            # Tiling hooks into a network: into one of its own, as other threads decode too.
            own = pack() if prepare else shallow(autoencoder)
            return torch.cat([tiling.decode(own, one, tile=tile) for one in z.split(1)])

    return decode


def shallow(network: AutoencoderKL) -> AutoencoderKL:
    """A copy with the same weights."""
    return deepcopy(network, {id(weight): weight for weight in network.parameters()})


def device_of(module: torch.nn.Module) -> str:
    return next(module.parameters()).device.type
