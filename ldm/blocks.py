"""The parts of the U-Net: attention to pixels and to the prompt, and the down, middle and up blocks.

Attribute names are those of diffusers' UNet2DConditionModel, so that one weight file serves both libraries.
Shapes: B batch, C channels, H x W latent pixels, N = H*W, L prompt tokens, D width of a token, T channels of
the time embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoencoder.attention import attend
from autoencoder.gates import gated
from autoencoder.layers import Checkpointed, Downsample, ResnetBlock, Upsample
from autoencoder.norms import GroupNorm


class Prompt(NamedTuple):
    """What cross-attention reads."""

    tokens: Tensor
    """[B,L,D]"""
    bias: Tensor | None
    """[B,1,1,L] added to the attention scores: 0 where a token counts, very negative elsewhere"""


class Attention(nn.Module):
    """Scaled dot-product attention of several heads (Vaswani et al. 2017, section 3.2).

    Args:
        channels: C of queries and output, divisible by `heads`.
        heads: number of heads, each C / heads wide.
        context_channels: width of what keys and values are made of.
    """

    def __init__(self, channels: int, heads: int, *, context_channels: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(context_channels, channels, bias=False)
        self.to_v = nn.Linear(context_channels, channels, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor, context: Tensor, bias: Tensor | None = None) -> Tensor:
        """Queries [B,N,C], context [B,L,context_channels], bias on the scores [B,1,1,L] => [B,N,C]."""
        q, k, v = self.to_q(x), self.to_k(context), self.to_v(context)
        # [B,heads,*,C/heads]
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (q, k, v))
        out = attend(q, k, v, bias)
        return self.to_out[0](out.transpose(1, 2).flatten(2))


class GEGLU(nn.Module):
    """Linear layer gated by the GELU of a second one (Shazeer 2020, equation 6)."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.proj = nn.Linear(channels, 2 * out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """[..., channels] => [..., out_channels]."""
        return gated(self.proj(x))


class FeedForward(nn.Module):
    """Two-layer perceptron, four times as wide inside."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        # Index 1 stands where diffusers has a dropout that its U-Net leaves at zero: names stay the same.
        self.net = nn.Sequential(
            GEGLU(channels, 4 * channels), nn.Identity(), nn.Linear(4 * channels, channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] => [..., C]."""
        return self.net(x)


class TransformerBlock(nn.Module):
    """Attention to all pixels, attention to the prompt, perceptron; each normalised and residual.

    Without a prompt the second attention goes to the pixels as well, as in diffusers.

    Args:
        channels: C, divisible by `heads`.
        heads: attention heads.
        token_channels: D of the prompt's tokens; C for a block that will read no prompt.
    """

    def __init__(self, channels: int, heads: int, token_channels: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attn1 = Attention(channels, heads, context_channels=channels)
        self.norm2 = nn.LayerNorm(channels)
        self.attn2 = Attention(channels, heads, context_channels=token_channels)
        self.norm3 = nn.LayerNorm(channels)
        self.ff = FeedForward(channels)

    def forward(self, x: Tensor, prompt: Prompt | None) -> Tensor:
        """Pixels [B,N,C] => [B,N,C]."""
        y = self.norm1(x)
        x = x + self.attn1(y, y)
        y = self.norm2(x)
        x = x + (self.attn2(y, y) if prompt is None else self.attn2(y, prompt.tokens, prompt.bias))
        return x + self.ff(self.norm3(x))


class PointwiseConv(nn.Conv2d):
    """A linear layer whose weight has the shape of a 1x1 convolution's, as weight files want it."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[B,N,C] => [B,N,C]."""
        return F.linear(x, self.weight.flatten(1), self.bias)


class Transformer(nn.Module):
    """Transformer blocks over the pixels of a feature map, with a residual connection around them all.

    Args:
        channels: C, divisible by `heads` and `groups`.
        heads: attention heads.
        layers: number of transformer blocks.
        token_channels: D of the prompt's tokens; C where no prompt will be read.
        groups: groups of the normalisation at the entrance.
        linear: project in and out by linear layers, else by 1x1 convolutions.
    """

    def __init__(
        self, channels: int, *, heads: int, layers: int, token_channels: int, groups: int, linear: bool
    ) -> None:
        super().__init__()
        self.norm = GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels) if linear else PointwiseConv(channels)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(channels, heads, token_channels) for _ in range(layers)
        )
        self.proj_out = nn.Linear(channels, channels) if linear else PointwiseConv(channels)

    def forward(self, x: Tensor, prompt: Prompt | None) -> Tensor:
        """[B,C,H,W] => [B,C,H,W]."""
        pixels = self.norm(x).permute(0, 2, 3, 1).flatten(1, 2)  # [B,N,C]; a view under channels_last
        pixels = self.proj_in(pixels)
        for block in self.transformer_blocks:
            pixels = block(pixels, prompt)
        pixels = self.proj_out(pixels)
        return x + pixels.unflatten(1, x.shape[-2:]).permute(0, 3, 1, 2)


@dataclass(frozen=True, kw_only=True)
class LevelConfig:
    """What the blocks at one resolution are made of."""

    channels: int
    """C, channels inside the level."""
    resnets: int
    """Residual blocks on the way down; the way up has one more."""
    temb_channels: int
    """T, channels of the time embedding."""
    groups: int
    """Groups of every GroupNorm."""
    eps: float
    """Added to the variance in the GroupNorms of the residual blocks."""
    dropout: float
    """Probability of zeroing an activation in the residual blocks."""
    scale_shift: bool
    """Time scales and shifts the activations instead of being added to them."""
    heads: int
    """Attention heads."""
    transformer_layers: int
    """Transformer blocks in each transformer."""
    token_channels: int
    """D of the prompt's tokens; C where no prompt is read."""
    linear: bool
    """Linear layers into and out of the transformers instead of 1x1 convolutions."""

    def resnet(self, in_channels: int) -> ResnetBlock:
        """A residual block that brings `in_channels` to those of the level."""
        return ResnetBlock(
            in_channels,
            self.channels,
            temb_channels=self.temb_channels,
            groups=self.groups,
            eps=self.eps,
            dropout=self.dropout,
            scale_shift=self.scale_shift,
        )

    def transformer(self) -> Transformer:
        """A transformer over the pixels of the level."""
        return Transformer(
            self.channels,
            heads=self.heads,
            layers=self.transformer_layers,
            token_channels=self.token_channels,
            groups=self.groups,
            linear=self.linear,
        )


class Block(Checkpointed):
    """What the down, middle and up blocks share: residual blocks, some followed by a transformer.

    Args:
        level: what the parts are made of.
        in_channels: channels that come into each of the residual blocks.
        transformers: how many of the residual blocks, from the first, have a transformer after them.
    """

    def __init__(self, level: LevelConfig, in_channels: Sequence[int], transformers: int) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(level.resnet(channels) for channels in in_channels)
        self.attentions = nn.ModuleList(level.transformer() for _ in range(transformers))

    def layer(self, i: int, x: Tensor, emb: Tensor, prompt: Prompt | None) -> Tensor:
        """Residual block `i` and its transformer: [B,*,H,W], time embedding [B,T] => [B,C,H,W]."""
        return self.through(self._layer, i, x, emb, prompt)

    def _layer(self, i: int, x: Tensor, emb: Tensor, prompt: Prompt | None) -> Tensor:
        x = self.resnets[i](x, emb)
        return self.attentions[i](x, prompt) if i < len(self.attentions) else x


class DownBlock(Block):
    """One level on the way down: its layers, then half the resolution unless it is `last`, the coarsest."""

    def __init__(self, level: LevelConfig, in_channels: int, *, attention: bool, last: bool) -> None:
        come_in = [in_channels] + [level.channels] * (level.resnets - 1)
        super().__init__(level, come_in, transformers=level.resnets if attention else 0)
        self.downsamplers = nn.ModuleList([] if last else [Downsample(level.channels, padding=1)])

    def forward(self, x: Tensor, skips: list[Tensor], emb: Tensor, prompt: Prompt | None) -> Tensor:
        """[B,in_channels,H,W] => [B,C,ceil(H/2),ceil(W/2)]; every feature map made is added to `skips`."""
        for i in range(len(self.resnets)):
            x = self.layer(i, x, emb, prompt)
            skips.append(x)
        for downsample in self.downsamplers:
            x = downsample(x)
            skips.append(x)
        return x


class MidBlock(Block):
    """The coarsest resolution: a residual block, a transformer, a residual block."""

    def __init__(self, level: LevelConfig) -> None:
        super().__init__(level, [level.channels] * 2, transformers=1)

    def forward(self, x: Tensor, emb: Tensor, prompt: Prompt | None) -> Tensor:
        """[B,C,H,W] => [B,C,H,W]."""
        return self.layer(1, self.layer(0, x, emb, prompt), emb, prompt)


class UpBlock(Block):
    """One level on the way up: layers that each read a skip, then the next resolution unless it is `last`.

    Args:
        level: what the parts are made of; there is one layer more than on the way down.
        in_channels: channels that come from below.
        skip_channels: channels of the skips, in the order in which they are read.
        attention: whether the layers have transformers.
        last: whether this is the finest level.
    """

    def __init__(
        self,
        level: LevelConfig,
        in_channels: int,
        skip_channels: Sequence[int],
        *,
        attention: bool,
        last: bool,
    ) -> None:
        from_below = [in_channels] + [level.channels] * level.resnets
        come_in = [below + skip for below, skip in zip(from_below, skip_channels, strict=True)]
        super().__init__(level, come_in, transformers=len(come_in) if attention else 0)
        self.upsamplers = nn.ModuleList([] if last else [Upsample(level.channels)])

    def forward(self, x: Tensor, skips: list[Tensor], emb: Tensor, prompt: Prompt | None) -> Tensor:
        """[B,in_channels,H,W] => [B,C,H',W'], the size of the next skip; its own skips are taken off."""
        for i in range(len(self.resnets)):
            x = self.layer(i, torch.cat([x, skips.pop()], dim=1), emb, prompt)
        for upsample in self.upsamplers:
            # On the way down odd sizes were rounded up, so that doubling would overshoot.
            x = upsample.resized(x, tuple(skips[-1].shape[-2:]))  # type: ignore[operator]
        return x
