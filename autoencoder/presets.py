"""The shape of an autoencoder in a recipe: a size preset or a stock autoencoder, and keys on top."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields, replace
from typing import Any, Literal, Self

from autoencoder.kl import AutoencoderConfig
from autoencoder.vq import VQConfig

KINDS = {"kl": AutoencoderConfig, "vq": VQConfig}

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {"width": 16, "layers_per_block": 1, "norm_num_groups": 8, "mid_block_add_attention": False},
    "small": {"width": 64, "layers_per_block": 2, "norm_num_groups": 32, "mid_block_add_attention": True},
    "base": {"width": 128, "layers_per_block": 2, "norm_num_groups": 32, "mid_block_add_attention": True},
}
"""base at factor 8 is the autoencoder of Stable Diffusion."""

GROWTH = (1, 2, 4, 4, 4, 4)
"""Widths of a preset's blocks, as multiples of the first."""


@dataclass(frozen=True, kw_only=True)
class ShapeConfig:
    """The autoencoder's shape: a preset, with the keys given here on top. What is not given is filled in."""

    preset: Literal["tiny", "small", "base"] | None = None
    """tiny: 16 channels, one layer a block, no attention. small: 64, two layers. base: as Stable Diffusion"""
    factor: int | None = None
    """Pixels that a latent pixel stands for, along one side: 2, 4, 8, 16 or 32. By default 8 with a preset"""
    block_out_channels: tuple[int, ...] | None = None
    """Channels of each block, from the image's resolution down; each block after the first halves it"""
    layers_per_block: int | None = None
    """Residual blocks in each block of the encoder; the decoder has one more"""
    norm_num_groups: int | None = None
    """Groups of every GroupNorm; must divide each of block_out_channels"""
    mid_block_add_attention: bool | None = None
    """Whether the middle of encoder and decoder attends over all pixels"""
    latent_channels: int | None = None
    """Channels of the latents"""
    sample_size: int | None = None
    """Side of the training images in pixels, which is data.size; stock pipelines read it"""
    force_upcast: bool | None = None
    """Tells stock pipelines to decode in float32 because float16 overflows"""
    use_quant_conv: bool | None = None
    """Of kind kl: whether a 1x1 convolution follows the encoder"""
    use_post_quant_conv: bool | None = None
    """Of kind kl: whether a 1x1 convolution precedes the decoder; the end of training adds one if not"""
    num_vq_embeddings: int | None = None
    """Of kind vq: codes in the codebook"""
    vq_embed_dim: int | None = None
    """Of kind vq: numbers in a code; by default as many as latent_channels"""

    def filled(
        self, kind: Literal["kl", "vq"], size: int, start: AutoencoderConfig | VQConfig | None = None
    ) -> Self:
        """With every key that this kind has set.

        Args:
            kind: of autoencoder.
            size: of the training images.
            start: the stock autoencoder to go on from, whose shape it is.

        Raises ValueError if keys contradict each other, the size or `start`, are of another kind, or say too little.
        """
        given = {f.name: value for f in fields(self) if (value := getattr(self, f.name)) is not None}
        own = {f.name for f in fields(KINDS[kind])}
        for key in given.keys() - own - {"preset", "factor"}:
            raise ValueError(f"network.{key} is set, but an autoencoder of kind {kind} has none: remove it")
        if start is not None:
            base = {key: value for key, value in vars(start).items() if hasattr(self, key)}
            base |= {"sample_size": size, "factor": start.factor}
            if (start.in_channels, start.out_channels) != (3, 3):
                raise ValueError("the autoencoder to start from is not for pictures of three channels")
            for key in given.keys() - {"sample_size"}:
                if base.get(key) != given[key]:
                    there = base.get(key, "a shape of its own")
                    raise ValueError(
                        f"network.{key} is {given[key]}, but the autoencoder to start from has {there}: "
                        f"remove network.{key}, or start"
                    )
        elif self.preset:
            base = _preset(self.preset, self.factor or 8)
        elif self.block_out_channels is None:
            raise ValueError(
                "network says too little: set network.preset to tiny, small or base, or block_out_channels"
            )
        else:
            base = {}
        stock = {f.name: f.default for f in fields(KINDS[kind]) if f.default is not MISSING}
        keys = {key: value for key, value in stock.items() if hasattr(self, key)}
        keys |= {"sample_size": size} | base | given
        shape = replace(self, **keys)._checked(size)
        shape.config(kind)  # which refuses what no network can have
        return shape

    def _checked(self, size: int) -> Self:
        assert self.block_out_channels is not None  # filled in by now; the type does not say so
        factor = 2 ** (len(self.block_out_channels) - 1)
        if self.factor not in (None, factor):
            raise ValueError(
                f"network.factor is {self.factor}, but {len(self.block_out_channels)} block_out_channels make {factor}"
            )
        if self.sample_size != size:
            raise ValueError(
                f"network.sample_size is {self.sample_size}, but data.size {size}: remove the first"
            )
        if size % factor:
            raise ValueError(f"data.size is {size}, which the autoencoder's factor {factor} does not divide")
        return replace(self, factor=factor)

    def config(self, kind: Literal["kl", "vq"]) -> AutoencoderConfig | VQConfig:
        """The stock config of filled keys; latents need no factor, because their statistics are folded in."""
        own = {f.name for f in fields(KINDS[kind])}
        keys = {key: value for key, value in vars(self).items() if key in own}
        return KINDS[kind](**keys, scaling_factor=1.0)


def _preset(name: str, factor: int) -> dict[str, Any]:
    blocks = factor.bit_length()
    if factor != 2 ** (blocks - 1) or not 2 <= factor <= 32:
        raise ValueError(f"network.factor is {factor}, but must be 2, 4, 8, 16 or 32")
    keys = dict(PRESETS[name])
    width = keys.pop("width")
    return keys | {"block_out_channels": tuple(width * times for times in GROWTH[:blocks])}
