"""An autoencoder prepared to code pictures on a CPU: the same mathematics in the layers of `packed`.

Shapes: images [B,3,H,W] in [-1, 1]; latents [B,C,h,w].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoencoder.kl import AutoencoderKL, Posterior
from autoencoder.layers import Attention, Downsample, ResnetBlock, Upsample
from autoencoder.model import Decoder, Encoder, MidBlock, check_images, check_latents
from autoencoder.packed import Conv, Doubling, Linear, Norm, Residual, maps, rows


class Prepared:
    """What an autoencoder does, with the weights it has now. No gradients; its own precision, results in float32.

    Packing pays from the second call on; maps of a new shape are packed for once more.
    """

    def __init__(self, autoencoder: AutoencoderKL, dtype: torch.dtype = torch.float32) -> None:
        self.plain = autoencoder
        self.encoder, self.decoder = Coder(autoencoder.encoder, dtype), Coder(autoencoder.decoder, dtype)

    @torch.no_grad()
    def encode(self, x: Tensor) -> Posterior:
        """As `AutoencoderKL.encode`."""
        check_images(x, self.plain.config)
        moments = self.encoder(x)
        return Posterior.from_moments(self.plain.quant_conv(moments) if self.plain.quant_conv else moments)

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """As `AutoencoderKL.decode`."""
        check_latents(z, self.plain.config.latent_channels)
        return self.decoder(self.plain.post_quant_conv(z) if self.plain.post_quant_conv else z)


class Coder:
    """An encoder or a decoder."""

    def __init__(self, network: Encoder | Decoder, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.conv_in, self.conv_out = Conv(network.conv_in, dtype), Conv(network.conv_out, dtype)
        self.layers = [prepared(layer, dtype) for layer in in_order(network)]
        self.norm_out = Norm(network.conv_norm_out, dtype)

    def __call__(self, x: Tensor) -> Tensor:
        x = self.conv_in(x.to(self.dtype, memory_format=torch.channels_last))
        for layer in self.layers:
            x = layer(x)
        return self.conv_out(self.norm_out.silu(x)).float()


class Attending:
    """Attention of one head over all pixels, with a residual connection; one product for q, k and v."""

    def __init__(self, layer: Attention, dtype: torch.dtype) -> None:
        parts = [layer.to_q, layer.to_k, layer.to_v]
        self.norm = Norm(layer.group_norm, dtype)
        self.qkv = Linear(torch.cat([p.weight for p in parts]), torch.cat([p.bias for p in parts]), dtype)
        self.out = Linear.of(layer.to_out[0], dtype)  # type: ignore[arg-type]

    def __call__(self, x: Tensor) -> Tensor:
        q, k, v = (part.unsqueeze(1) for part in self.qkv(rows(self.norm(x))).chunk(3, dim=-1))
        seen = F.scaled_dot_product_attention(q, k, v).squeeze(1)
        return maps(self.out.onto(seen, rows(x)), x)


class Halving:
    """Half the resolution by a convolution that pads the right and the bottom by one pixel."""

    def __init__(self, layer: nn.Conv2d, dtype: torch.dtype) -> None:
        self.conv = Conv(layer, dtype)

    def __call__(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)).contiguous(memory_format=torch.channels_last))


def in_order(network: Encoder | Decoder) -> Iterator[nn.Module]:
    """The layers between the first and the last convolution, as they are passed through."""
    blocks = network.down_blocks if isinstance(network, Encoder) else network.up_blocks
    for block in (
        [*blocks, network.mid_block] if isinstance(network, Encoder) else [network.mid_block, *blocks]
    ):
        if isinstance(block, MidBlock):
            yield from (block.resnets[0], *block.attentions, block.resnets[1])
        else:
            yield from block.resnets  # type: ignore[misc, union-attr]
            yield from getattr(block, "downsamplers", ()) or getattr(block, "upsamplers", ())


def prepared(layer: nn.Module, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """The prepared twin of a layer."""
    if isinstance(layer, ResnetBlock):
        return Residual(layer, dtype)
    if isinstance(layer, Attention):
        return Attending(layer, dtype)
    if isinstance(layer, Downsample):
        return Halving(layer.conv, dtype)
    assert isinstance(layer, Upsample)
    return Doubling(layer.conv, dtype)
