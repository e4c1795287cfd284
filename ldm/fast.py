"""A U-Net prepared to draw on a CPU: the same mathematics with less to do in each step.

`Prepared(unet)` is called like the U-Net and gives the same to rounding (tests/test_fast.py). None of this is needed to
understand the model; it is faster by what follows, most of which is worth little alone (docs/log.md):

    packed      weights lie as oneDNN multiplies them; bias, residual and GELU are part of the product
    rows        maps are channels-last: a 1x1 convolution is a product of pixels, attention needs no transposing
    q, k, v     of the pixels are one product
    prompt      its keys and values are made once a drawing, and where that makes fewer products, what makes queries of
                pixels and takes values back to them is multiplied with them beforehand
    time        is embedded once, not once a sample, and enters as the bias of a convolution
    twins       guidance asks with and without the prompt: until it is first read, both halves of the batch are one
    3x3         convolutions are done with a quarter of the multiplications, in C (`autoencoder.winograd`)
    attention   keeps its scores within a core's cache, in C (`autoencoder.attention`)

Packing costs as much as a pass or two, so it is kept from one drawing to the next (`autoencoder.packed.Kept`).

Shapes: B batch, C channels, H x W latent pixels, N = H*W, L prompt tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoencoder.attention import attend
from autoencoder.fast_blocks import Conv3x3, Norm, Residual
from autoencoder.packed import Conv, Kept, Linear, maps, rows
from ldm.blocks import GEGLU, Attention, Block, Transformer, TransformerBlock
from ldm.checks import require_int
from ldm.conditioning import Cond
from ldm.unet import UNet, mask_bias


class Apart(NamedTuple):
    """What a cross-attention knows of the prompt."""

    k: Tensor
    """[B,heads,L,C/heads]"""
    v: Tensor


class Folded(NamedTuple):
    """The same, for pixels instead of queries and of what is seen: q k^T = x (W_q^T k^T), and out likewise."""

    scores: Tensor
    """[B,C,heads*L], divided by sqrt(C/heads)"""
    seen: Tensor
    """[B,heads*L,C]"""


Words = dict[nn.Module, Apart | Folded]  # of each cross-attention
PROMPTLESS: Words = {}
LARGEST = 2**26
"""Bytes of a layer up to which it is folded: they grow with the samples"""


@dataclass(frozen=True)
class Told:
    """What one call tells every block."""

    times: dict[Residual, Tensor]
    """Of the embedded time and what else belongs to the whole picture: one row if the same for all, else B"""
    alike: bool
    """Whether that is the same for all"""
    words: Words
    bias: Tensor | None
    """[B,1,1,L] added to the scores of the prompt's tokens"""
    samples: int
    """B; the feature maps of twins have half as many until the prompt is read"""


class Layers:
    """What a U-Net is made of, with the weights that it has now. Nothing in it is of one drawing."""

    def __init__(self, unet: UNet, dtype: torch.dtype) -> None:
        reads = not unet.config.promptless
        self.conv_in, self.conv_out = Conv(unet.conv_in, dtype), Conv(unet.conv_out, dtype)
        self.down = [Level(block, dtype, reads) for block in unet.down_blocks]  # type: ignore[arg-type]
        self.middle = Level(unet.mid_block, dtype, reads)
        self.up = [Level(block, dtype, reads) for block in unet.up_blocks]  # type: ignore[arg-type]
        self.norm_out = Norm(unet.conv_norm_out, dtype)
        self.dtype = dtype
        self.timed = [resnet for level in (*self.down, self.middle, *self.up) for resnet in level.resnets]
        weights = [resnet.block.time_emb_proj.weight for resnet in self.timed]  # type: ignore[union-attr]
        biases = [resnet.time_bias for resnet in self.timed]
        self.widths = [len(bias) for bias in biases]
        self.all_times = Linear(torch.cat(weights), torch.cat(biases), torch.float32)

    def times(self, emb: Tensor) -> dict[Residual, Tensor]:
        """SiLU of embedded times [T,D] => what each residual block is told, by one product."""
        told = self.all_times(emb).to(self.dtype).split(self.widths, dim=1)
        return dict(zip(self.timed, told, strict=True))


class Prepared:
    """A network to draw with, with the weights that the U-Net has at the first call. No gradients, no dropout.

    Args:
        unet: in float32 on the CPU.
        dtype: of weights and activations; results are float32. In bfloat16 they are not those of the U-Net.
        reuse: in how many calls in a row the coarser levels are computed once (DeepCache, Ma et al. 2024); between,
            only the finest level is, which changes what is drawn. 1: always.
        kept: where packed layers are sought, and left for the next drawing.

    An object is for one drawing: it remembers the keys and values of the last prompt, known by being the same tensor.
    Without reuse, several threads may call it all the same.

    Raises:
        ValueError: the U-Net is being trained with dropout; reuse is below 1.
    """

    def __init__(
        self, unet: UNet, dtype: torch.dtype = torch.float32, reuse: int = 1, kept: Kept[Layers] | None = None
    ) -> None:
        require_int("reuse", reuse, 1, 2**31)
        if unet.training and unet.config.dropout:
            raise ValueError(
                "the U-Net is being trained, with dropout; call eval() on it, or draw with its average"
            )
        self.unet, self.dtype, self.reuse = unet, dtype, reuse
        self._kept = Kept() if kept is None else kept
        self._layers: Layers | None = None
        self._last: tuple[Tensor, Words] | None = None
        self._came: Came | None = None

    def layers(self, shape: torch.Size) -> Layers:
        """Packed for inputs [B,C,H,W]; at later calls the same, whatever comes."""
        if self._layers is None:
            pack = partial(Layers, self.unet, self.dtype)
            self._layers = self._kept.of(self.unet, (self.dtype, shape), pack)
        return self._layers

    @torch.no_grad()
    def __call__(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """As `UNet.forward`, with the same ValueErrors."""
        self.unet.check(x, t, cond)
        layers = self.layers(x.shape)
        told = self._told(layers, t, cond)
        if told.alike and told.words and twins(x):
            x = x[: len(x) // 2]
        x = layers.conv_in(x.to(self.dtype).contiguous(memory_format=torch.channels_last))
        skips = [x]
        x = layers.down[0].layers(x, skips, told)
        x = layers.up[-1].up(self._within(layers, x, skips, told), skips, told)
        return layers.conv_out(layers.norm_out(x, silu=True)).float()

    def _within(self, layers: Layers, x: Tensor, skips: list[Tensor], told: Told) -> Tensor:
        """What comes up to the finest level, from what goes down from it; or what came up at an earlier call."""
        came = self._came
        if came and came.calls and came.words is told.words and came.fits(x, told.samples):
            self._came = came._replace(calls=came.calls - 1)
            return came.inner
        x = layers.down[0].halved(x, skips)
        for level in layers.down[1:]:
            x = level.halved(level.layers(x, skips, told), skips)
        x = layers.middle.layers(x, [], told)
        for level in layers.up[:-1]:
            x = level.up(x, skips, told)
        if self.reuse > 1:
            self._came = Came(self.reuse - 1, x, told.words)
        return x

    def _told(self, layers: Layers, t: Tensor, cond: Cond) -> Told:
        emb = self.unet.embed(t[:1] if bool((t == t[0]).all()) else t, cond)
        bias = None if cond.mask is None else mask_bias(cond.mask).to(self.dtype)
        return Told(layers.times(F.silu(emb)), len(emb) == 1, self._words(cond), bias, len(t))

    def _words(self, cond: Cond) -> Words:
        """Keys and values of the prompt, computed anew when another condition comes."""
        if cond.tokens is None:
            return PROMPTLESS
        last = self._last
        if last is None or last[0] is not cond.tokens:
            read = [m.attn2 for m in self.unet.modules() if isinstance(m, TransformerBlock)]
            last = self._last = cond.tokens, {layer: self._read(layer, cond.tokens) for layer in read}
        return last[1]

    def _read(self, layer: Attention, tokens: Tensor) -> Apart | Folded:
        k, v = (split(part(tokens), layer.heads) for part in (layer.to_k, layer.to_v))
        samples, heads, length, width = k.shape
        channels = heads * width
        if heads * length > channels or 8 * samples * heads * length * channels > LARGEST:
            return Apart(k.to(self.dtype).contiguous(), v.to(self.dtype).contiguous())
        out = layer.to_out[0]
        assert isinstance(out, nn.Linear)
        queries, back = layer.to_q.weight.unflatten(0, (heads, -1)), out.weight.unflatten(1, (heads, -1))
        scores = torch.einsum("hdc,bhld->bchl", queries, k).flatten(2) * width**-0.5
        seen = torch.einsum("bhld,chd->bhlc", v, back).flatten(1, 2)
        return Folded(scores.to(self.dtype).contiguous(), seen.to(self.dtype).contiguous())


class Came(NamedTuple):
    """What came up to the finest level, for calls to come."""

    calls: int
    inner: Tensor
    words: Words

    def fits(self, x: Tensor, samples: int) -> bool:
        return len(self.inner) == samples and self.inner.shape[2:] == x.shape[2:]


class Level:
    """The blocks at one resolution: residual blocks, some with a transformer, and the way to the next resolution.

    `reads` tells whether there is a prompt, here and below.
    """

    def __init__(self, block: Block, dtype: torch.dtype, reads: bool) -> None:
        self.resnets = [Residual(resnet, dtype) for resnet in block.resnets]  # type: ignore[arg-type]
        self.attentions = [Pixels(layer, dtype, reads) for layer in block.attentions]  # type: ignore[arg-type]
        self.downsamplers = [Conv(layer.conv, dtype) for layer in getattr(block, "downsamplers", ())]
        self.upsamplers = [Conv3x3(layer.conv, dtype) for layer in getattr(block, "upsamplers", ())]

    def layer(self, i: int, x: Tensor, told: Told) -> Tensor:
        x = self.resnets[i](x, told.times[self.resnets[i]])
        return self.attentions[i](x, told) if i < len(self.attentions) else x

    def layers(self, x: Tensor, skips: list[Tensor], told: Told) -> Tensor:
        """[B,*,H,W] => [B,C,H,W]; every map made is added to `skips`."""
        for i in range(len(self.resnets)):
            x = self.layer(i, x, told)
            skips.append(x)
        return x

    def halved(self, x: Tensor, skips: list[Tensor]) -> Tensor:
        """[B,C,H,W] => [B,C,ceil(H/2),ceil(W/2)], likewise; the coarsest level as it is."""
        for downsample in self.downsamplers:
            x = downsample(x)
            skips.append(x)
        return x

    def up(self, x: Tensor, skips: list[Tensor], told: Told) -> Tensor:
        """[B,*,H,W] => [B,C,H',W'], the size of the next skip; its own skips are taken off."""
        for i in range(len(self.resnets)):
            skip = widened(skips.pop(), len(x))
            x = self.layer(i, torch.cat([x, skip], dim=1), told)
        for conv in self.upsamplers:
            size = skips[-1].shape[-2:]
            if size == (2 * x.shape[-2], 2 * x.shape[-1]):
                x = conv.doubled(x)
            else:
                x = conv(F.interpolate(x, size=size, mode="nearest"))
        return x


class Pixels:
    """A `Transformer` over the pixels of a map."""

    def __init__(self, layer: Transformer, dtype: torch.dtype, reads: bool) -> None:
        self.norm = Norm(layer.norm, dtype)
        self.proj_in, self.proj_out = Linear.of(layer.proj_in, dtype), Linear.of(layer.proj_out, dtype)
        self.blocks = [Attending(block, dtype, reads) for block in layer.transformer_blocks]  # type: ignore[arg-type]

    def __call__(self, x: Tensor, told: Told) -> Tensor:
        """[B,C,H,W] => [B,C,H,W]; of twins, [B/2,C,H,W] => [B,C,H,W]."""
        pixels = self.proj_in(rows(self.norm(x)))
        for block in self.blocks:
            pixels = block(pixels, told)
        x = widened(x, len(pixels))
        return maps(self.proj_out.onto(pixels, rows(x)), x)


class Attending:
    """A `TransformerBlock`: [B,N,C] => [B,N,C]; of twins, [B/2,N,C] => [B,N,C]."""

    def __init__(self, block: TransformerBlock, dtype: torch.dtype, reads: bool) -> None:
        norms = (block.norm1, block.norm2, block.norm3)
        self.norm1, self.norm2, self.norm3 = (LayerNorm(norm, dtype) for norm in norms)
        self.first = ToPixels(block.attn1, dtype)
        self.second = (ToPrompt if reads else ToPixels)(block.attn2, dtype)
        expand, _, contract = cast(tuple[GEGLU, nn.Module, nn.Linear], tuple(block.ff.net))
        weights, biases = expand.proj.weight.chunk(2), expand.proj.bias.chunk(2)
        self.value, self.gate = (Linear(w, b, dtype) for w, b in zip(weights, biases, strict=True))
        self.contract = Linear.of(contract, dtype)

    def __call__(self, x: Tensor, told: Told) -> Tensor:
        x = self.first(self.norm1(x), x, told)
        x = self.second(self.norm2(x), x, told)
        y = self.norm3(x)
        return self.contract.onto(self.value.times(y, self.gate.gelu(y)), x)


class ToPixels:
    """Attention of pixels to pixels, added to `rest`."""

    def __init__(self, layer: Attention, dtype: torch.dtype) -> None:
        self.heads = layer.heads
        self.qkv = Linear(torch.cat([layer.to_q.weight, layer.to_k.weight, layer.to_v.weight]), None, dtype)
        self.out = Linear.of(layer.to_out[0], dtype)  # type: ignore[arg-type]

    def __call__(self, x: Tensor, rest: Tensor, told: Told) -> Tensor:
        q, k, v = (split(part, self.heads) for part in self.qkv(x).chunk(3, dim=-1))
        return self.out.onto(joined(attend(q, k, v, None)), rest)


class ToPrompt:
    """Attention of pixels to the tokens of the prompt, added to `rest`; here twins part."""

    def __init__(self, layer: Attention, dtype: torch.dtype) -> None:
        self.layer, self.heads = layer, layer.heads
        self.to_q, self.out = Linear.of(layer.to_q, dtype), Linear.of(layer.to_out[0], dtype)  # type: ignore[arg-type]

    def __call__(self, x: Tensor, rest: Tensor, told: Told) -> Tensor:
        words = told.words[self.layer]
        if isinstance(words, Folded):
            return self._folded(x, rest, words, told)
        q = widened(split(self.to_q(x), self.heads), told.samples)
        seen = attend(q, *words, told.bias)
        return self.out.onto(joined(seen), widened(rest, told.samples))

    def _folded(self, x: Tensor, rest: Tensor, words: Folded, told: Told) -> Tensor:
        scores = torch.bmm(widened(x, told.samples), words.scores).unflatten(-1, (self.heads, -1))
        if told.bias is not None:
            scores += told.bias.transpose(1, 2)
        seen = widened(rest, told.samples).add(self.out.bias)  # type: ignore[arg-type]
        return torch.baddbmm(seen, scores.softmax(-1).flatten(2), words.seen)


class LayerNorm:
    def __init__(self, layer: nn.LayerNorm, dtype: torch.dtype) -> None:
        self.weight, self.bias, self.eps = (
            layer.weight.detach().to(dtype),
            layer.bias.detach().to(dtype),
            layer.eps,
        )

    def __call__(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


def twins(x: Tensor) -> bool:
    """Whether the second half of a batch repeats the first."""
    half = len(x) // 2
    return len(x) == 2 * half and torch.equal(x[:half], x[half:])


def widened(x: Tensor, samples: int) -> Tensor:
    """Twins, which so far are one, as two: [B/2,...] => [B,...]; a whole batch as it is."""
    return x if len(x) == samples else torch.cat([x, x])


def split(x: Tensor, heads: int) -> Tensor:
    """[B,N,C] => [B,heads,N,C/heads]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def joined(x: Tensor) -> Tensor:
    """[B,heads,N,C/heads] => [B,N,C]."""
    return x.transpose(1, 2).flatten(2)
