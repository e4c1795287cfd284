"""The conditional U-Net: noisy latents, time and condition in, the prediction out.

It is the network of Rombach et al. 2022 (section 3.3) and Podell et al. 2023 (SDXL) with diffusers' names: a
folder written by one library is read by the other.
Shapes: B batch, C channels, H x W latent pixels, L prompt tokens, D width of a token, P width of a pooled
caption, T channels of the time embedding.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoencoder.norms import GroupNorm
from autoencoder.store import load_folder, save_folder
from ldm.blocks import DownBlock, MidBlock, Prompt, UpBlock
from ldm.conditioning import Cond
from ldm.unet_config import DOWN_BLOCKS, UP_BLOCKS, UNetConfig

STOCK_CLASS = "UNet2DConditionModel"
MASKED = -10_000.0  # stock's score for a masked token; finite, so that masking every token gives no NaN


def sinusoids(x: Tensor, channels: int, *, cos_first: bool, freq_shift: float) -> Tensor:
    """Embed numbers [N] as cosines and sines, float32 [N,channels] (Vaswani et al. 2017, section 3.5).

    The angular frequencies fall geometrically from 1 to about 1/10000.
    """
    half = channels // 2
    order = torch.arange(half, dtype=torch.float32, device=x.device)
    angles = x.float()[:, None] * torch.exp(-math.log(10_000) * order / (half - freq_shift))
    parts = (angles.cos(), angles.sin()) if cos_first else (angles.sin(), angles.cos())
    return torch.cat(parts, dim=1)


def mask_bias(mask: Tensor) -> Tensor:
    """Which tokens count [B,L] => what is added to their scores [B,1,1,L]."""
    return (~mask)[:, None, None, :] * MASKED


class EmbeddingMLP(nn.Module):
    """Two linear layers that take embedded numbers to the channels of the time embedding."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_channels, channels)
        self.linear_2 = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """[B,in_channels] => [B,T]."""
        return self.linear_2(F.silu(self.linear_1(x.to(self.linear_1.weight.dtype))))


class UNet(nn.Module):
    """Conditional U-Net, weight for weight diffusers' UNet2DConditionModel.

    Args:
        config: the shape of the network.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        channels, time_channels = config.block_out_channels, config.time_channels
        self.conv_in = nn.Conv2d(config.in_channels, channels[0], 3, padding=1)
        self.time_embedding = EmbeddingMLP(channels[0], time_channels)
        self.class_embedding: nn.Module | None = None
        if config.class_embed_type == "timestep":
            self.class_embedding = EmbeddingMLP(channels[0], time_channels)
        elif config.num_class_embeds is not None:
            self.class_embedding = nn.Embedding(config.num_class_embeds, time_channels)
        self.add_embedding: EmbeddingMLP | None = None
        if config.addition_embed_type == "text_time":
            self.add_embedding = EmbeddingMLP(
                config.projection_class_embeddings_input_dim or 0, time_channels
            )
        self._add_blocks()
        self.conv_norm_out = GroupNorm(config.norm_num_groups, channels[0], config.norm_eps)
        self.conv_out = nn.Conv2d(channels[0], config.out_channels, 3, padding=1)
        self._reads = config.reads()

    def _add_blocks(self) -> None:
        config = self.config
        levels = [config.level(i) for i in range(config.levels)]
        self.down_blocks, self.up_blocks = nn.ModuleList(), nn.ModuleList()
        channels = levels[0].channels
        skips = [channels]  # channels of every feature map that the way up reads, in the order they are made
        for level, kind in zip(levels, config.down_block_types, strict=True):
            last = level is levels[-1]
            self.down_blocks.append(DownBlock(level, channels, attention=DOWN_BLOCKS[kind], last=last))
            channels = level.channels
            skips += [channels] * (level.resnets + (not last))
        self.mid_block = MidBlock(levels[-1])
        for level, kind in zip(reversed(levels), config.up_block_types, strict=True):
            read = [skips.pop() for _ in range(level.resnets + 1)]
            last = level is levels[0]
            self.up_blocks.append(UpBlock(level, channels, read, attention=UP_BLOCKS[kind], last=last))
            channels = level.channels

    def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """Predict from noisy latents.

        Args:
            x: [B,in_channels,H,W], any H and W; fastest where 2^(levels-1) divides both.
            t: [B] times as the path counts them, fractions allowed.
            cond: what the config asks for and nothing else: tokens [B,L,D], with or without a mask [B,L];
                label [B]; pooled [B,P] and time_ids [B,6].

        Returns [B,out_channels,H,W]. Raises ValueError where x, t or cond do not fit the config.
        """
        self.check(x, t, cond)
        emb = self.embed(t, cond)
        prompt = None
        if cond.tokens is not None:
            prompt = Prompt(cond.tokens, None if cond.mask is None else mask_bias(cond.mask))
        x = self.conv_in(x)
        skips = [x]
        for block in self.down_blocks:
            x = block(x, skips, emb, prompt)
        x = self.mid_block(x, emb, prompt)
        for block in self.up_blocks:
            x = block(x, skips, emb, prompt)
        return self.conv_out(self.conv_norm_out(x, silu=True))

    def embed(self, t: Tensor, cond: Cond) -> Tensor:
        """Embed the times [B] and whatever of the condition belongs to the whole picture => [B,T]."""
        emb = self.time_embedding(self._sinusoids(t, self.config.block_out_channels[0]))
        if self.class_embedding is not None and cond.label is not None:
            numbers = self.config.class_embed_type == "timestep"
            label = self._sinusoids(cond.label, self.config.block_out_channels[0]) if numbers else cond.label
            emb = emb + self.class_embedding(label)
        if self.add_embedding is not None and cond.pooled is not None and cond.time_ids is not None:
            sizes = self._sinusoids(cond.time_ids.flatten(), self.config.addition_time_embed_dim or 0)
            emb = emb + self.add_embedding(torch.cat([cond.pooled, sizes.view(len(cond.pooled), -1)], dim=1))
        return emb

    def _sinusoids(self, x: Tensor, channels: int) -> Tensor:
        config = self.config
        return sinusoids(x, channels, cos_first=config.flip_sin_to_cos, freq_shift=config.freq_shift)

    def check(self, x: Tensor, t: Tensor, cond: Cond) -> None:
        """Raise ValueError where x, t or cond do not fit the config."""
        if x.ndim != 4 or x.shape[1] != self.config.in_channels:
            raise ValueError(
                f"x has shape {list(x.shape)}, but this U-Net reads [B, {self.config.in_channels}, H, W]."
            )
        if t.shape != x.shape[:1]:
            raise ValueError(
                f"t has shape {list(t.shape)}, but must hold a time for each of {len(x)} samples."
            )
        length = cond.tokens.shape[1] if cond.tokens is not None and cond.tokens.ndim == 3 else "L"
        for name, shape in self._reads.items():
            value: Tensor | None = getattr(cond, name)
            given = None if value is None else list(value.shape)
            wanted = None if shape is None else [len(x), *(length if n is None else n for n in shape)]
            if given != wanted:
                wanted_here = str(wanted).replace("'", "")
                raise ValueError(f"cond.{name} has shape {given}, but this U-Net reads {wanted_here} here.")
        if cond.mask is not None and (cond.tokens is None or cond.mask.shape != cond.tokens.shape[:2]):
            raise ValueError(f"cond.mask has shape {list(cond.mask.shape)}, but must have one entry a token.")

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and the weights, as diffusers has them; raises OSError if that fails."""
        save_folder(folder, self.config, STOCK_CLASS, self.state_dict())

    @classmethod
    def from_pretrained(cls, source: str | Path) -> UNet:
        """The U-Net in a stock folder or on the hub, in float32 and evaluation mode.

        Raises FileNotFoundError or ValueError as `autoencoder.store.load_folder` does.
        """
        return load_folder(source, UNetConfig, STOCK_CLASS, cls)
