"""A decoder prepared for a CPU: the same mathematics in the layers of `packed`.

Shapes: images [B,3,H,W] in [-1, 1]; latents [B,C,h,w]. Encoding gains nothing in float32 (docs/log.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from autoencoder.attention import attend
from autoencoder.fast_blocks import Conv3x3, Norm, Residual
from autoencoder.kl import AutoencoderKL
from autoencoder.layers import Attention, ResnetBlock, Upsample
from autoencoder.model import Decoder, MidBlock, check_latents
from autoencoder.packed import Conv, Linear, maps, rows


class Prepared:
    """The decoder of an autoencoder, with the weights it has now. No gradients; its own precision, results in float32.

    Maps of a new shape are packed for once more, so that weights must not change while it is used.
    """

    def __init__(self, autoencoder: AutoencoderKL, dtype: torch.dtype = torch.float32) -> None:
        self.plain, self.dtype, network = autoencoder, dtype, autoencoder.decoder
        self.conv_in, self.conv_out = Conv(network.conv_in, dtype), Conv(network.conv_out, dtype)
        self.layers = [prepared(layer, dtype) for layer in in_order(network)]
        self.norm_out = Norm(network.conv_norm_out, dtype)

    def norms(self) -> Iterator[Norm]:
        """All normalisations, for `tile_norms`."""
        for layer in self.layers:
            if isinstance(layer, Residual):
                yield from (layer.norm1, layer.norm2)
            elif isinstance(layer, Attending):
                yield layer.norm
        yield self.norm_out

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """As `AutoencoderKL.decode`."""
        check_latents(z, self.plain.config.latent_channels)
        z = self.plain.post_quant_conv(z) if self.plain.post_quant_conv else z
        x = self.conv_in(z.to(self.dtype, memory_format=torch.channels_last))
        for layer in self.layers:
            x = layer(x)
        return self.conv_out(self.norm_out(x, silu=True)).float()


class Attending:
    """Attention of one head over all pixels, with a residual connection; one product for q, k and v."""

    def __init__(self, layer: Attention, dtype: torch.dtype) -> None:
        parts = [layer.to_q, layer.to_k, layer.to_v]
        self.norm = Norm(layer.group_norm, dtype)
        self.qkv = Linear(torch.cat([p.weight for p in parts]), torch.cat([p.bias for p in parts]), dtype)
        self.out = Linear.of(layer.to_out[0], dtype)  # type: ignore[arg-type]

    def __call__(self, x: Tensor) -> Tensor:
        q, k, v = (part.unsqueeze(1) for part in self.qkv(rows(self.norm(x))).chunk(3, dim=-1))
        return maps(self.out.onto(attend(q, k, v).squeeze(1), rows(x)), x)


def in_order(network: Decoder) -> Iterator[nn.Module]:
    """The layers between the first and the last convolution, as they are passed through."""
    for block in (network.mid_block, *network.up_blocks):
        if isinstance(block, MidBlock):
            yield from (block.resnets[0], *block.attentions, block.resnets[1])
        else:
            yield from (*block.resnets, *getattr(block, "upsamplers", ()))  # type: ignore[misc, union-attr]


def prepared(layer: nn.Module, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """The prepared twin of a layer."""
    if isinstance(layer, ResnetBlock):
        return Residual(layer, dtype)
    if isinstance(layer, Attention):
        return Attending(layer, dtype)
    assert isinstance(layer, Upsample)
    return Conv3x3(layer.conv, dtype).doubled
