"""The shape of a U-Net, under the keys of diffusers' UNet2DConditionModel, and which shapes are sound."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal, TypeVar

from autoencoder.store import StockConfig
from ldm.blocks import LevelConfig

V = TypeVar("V")
DOWN_BLOCKS = {"DownBlock2D": False, "CrossAttnDownBlock2D": True}  # name -> with attention
UP_BLOCKS = {"UpBlock2D": False, "CrossAttnUpBlock2D": True}


@dataclass(frozen=True, kw_only=True)
class UNetConfig(StockConfig):
    """Shape of a U-Net: the keys and defaults of a stock `config.json`, about Stable Diffusion 1's.

    What is "per level" may be one value for all levels or a tuple from the finest to the coarsest.
    Raises ValueError for values that contradict each other or are not supported.
    """

    sample_size: int | tuple[int, int] | None = None
    """Side, or height and width, in latent pixels that pipelines draw if not told otherwise"""
    in_channels: int = 4
    """Channels of the input: those of the latents, and more if a picture or a mask comes with them"""
    out_channels: int = 4
    """Channels of the prediction"""
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    """Channels of each level; every level halves the resolution of the one before"""
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    """Each level on the way down: CrossAttnDownBlock2D has attention, DownBlock2D has not"""
    up_block_types: tuple[str, ...] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    """Each level on the way up, the coarsest first: CrossAttnUpBlock2D or UpBlock2D"""
    layers_per_block: int | tuple[int, ...] = 2
    """Residual blocks, per level; one more on the way up"""
    transformer_layers_per_block: int | tuple[int, ...] = 1
    """Transformer blocks after each residual block of a level with attention, per level"""
    attention_head_dim: int | tuple[int, ...] = 8
    """Number (despite the stock name) of attention heads, per level"""
    cross_attention_dim: int | tuple[int, ...] | None = 1280
    """D, width of the prompt's tokens. null: there is no prompt, and the attention meant for it goes to the
    pixels too; stock files say so by a list of the `block_out_channels`"""
    use_linear_projection: bool = False
    """Linear layers into and out of the transformers instead of 1x1 convolutions"""
    upcast_attention: bool | None = False
    """Kept for other tools: the attention used here sums scores in float32 anyway"""
    num_class_embeds: int | None = None
    """Number of class labels, the null one included; null for a network without classes"""
    class_embed_type: Literal["timestep"] | None = None
    """timestep: the label is a number, embedded as the time is, instead of one of `num_class_embeds`"""
    addition_embed_type: Literal["text_time"] | None = None
    """text_time: a pooled caption and the picture's sizes join the time (Podell et al. 2023, section 2.2)"""
    addition_time_embed_dim: int | None = None
    """Channels in which each of the six sizes is embedded"""
    projection_class_embeddings_input_dim: int | None = None
    """P + 6 `addition_time_embed_dim`"""
    resnet_time_scale_shift: Literal["default", "scale_shift"] = "default"
    """How time enters a residual block: added, or as scale and shift (Dhariwal and Nichol 2021, section 3)"""
    dropout: float = 0.0
    """Probability of zeroing an activation in the residual blocks"""
    norm_num_groups: int = 32
    """Groups of every GroupNorm"""
    norm_eps: float = 1e-5
    """Added to the variance in every GroupNorm outside the transformers"""
    flip_sin_to_cos: bool = True
    """Embeddings of numbers begin with the cosines"""
    freq_shift: int = 0
    """Subtracted from the number of frequencies in an embedding: 1 lets the slowest be 1/10000 exactly"""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, list):
                object.__setattr__(self, field.name, tuple(value))
        if self.cross_attention_dim is None:
            object.__setattr__(self, "cross_attention_dim", self.block_out_channels)
        self._check_levels()
        self._check_channels()
        self._check_embeddings()

    def fixed(self) -> dict[str, object]:
        """The stock keys of which one value is supported."""
        return {
            "act_fn": "silu",
            "addition_embed_type_num_heads": 64,
            "attention_type": "default",
            "center_input_sample": False,
            "class_embeddings_concat": False,
            "conv_in_kernel": 3,
            "conv_out_kernel": 3,
            "cross_attention_norm": None,
            "downsample_padding": 1,
            "dual_cross_attention": False,
            "encoder_hid_dim": None,
            "encoder_hid_dim_type": None,
            "mid_block_only_cross_attention": None,
            "mid_block_scale_factor": 1,
            "mid_block_type": "UNetMidBlock2DCrossAttn",
            "num_attention_heads": None,
            "only_cross_attention": False,
            "resnet_out_scale_factor": 1.0,
            "resnet_skip_time_act": False,
            "reverse_transformer_layers_per_block": None,
            "time_cond_proj_dim": None,
            "time_embedding_act_fn": None,
            "time_embedding_dim": None,
            "time_embedding_type": "positional",
            "timestep_post_act": None,
        }

    @property
    def levels(self) -> int:
        """Number of resolutions."""
        return len(self.block_out_channels)

    @property
    def time_channels(self) -> int:
        """T, channels of the time embedding."""
        return 4 * self.block_out_channels[0]

    @property
    def promptless(self) -> bool:
        """Whether the network reads no prompt."""
        return self.cross_attention_dim == self.block_out_channels

    def reads(self) -> dict[str, tuple[int | None, ...] | None]:
        """Field of `Cond` -> its shape for one sample, None for a field that the network does not read."""
        sizes = 6
        pooled = -sizes * (self.addition_time_embed_dim or 0)
        pooled += self.projection_class_embeddings_input_dim or 0
        return {
            "tokens": None if self.promptless else (None, self.level(-1).token_channels),  # of any length
            "label": None if self.num_class_embeds is None and self.class_embed_type is None else (),
            "pooled": (pooled,) if self.addition_embed_type else None,
            "time_ids": (sizes,) if self.addition_embed_type else None,
        }

    def attends(self, i: int) -> bool:
        """Whether level `i` (0 is the finest) has attention, be it in the middle block."""
        down, up = DOWN_BLOCKS[self.down_block_types[i]], UP_BLOCKS[self.up_block_types[-1 - i]]
        return down or up or i == self.levels - 1

    def level(self, i: int) -> LevelConfig:
        """What the blocks of level `i` (0 is the finest) are made of."""
        return LevelConfig(
            channels=self.block_out_channels[i],
            resnets=_at(self.layers_per_block, i),
            temb_channels=self.time_channels,
            groups=self.norm_num_groups,
            eps=self.norm_eps,
            dropout=self.dropout,
            scale_shift=self.resnet_time_scale_shift == "scale_shift",
            heads=_at(self.attention_head_dim, i),
            transformer_layers=_at(self.transformer_layers_per_block, i),
            token_channels=_at(self.cross_attention_dim, i),  # type: ignore[arg-type]
            linear=self.use_linear_projection,
        )

    def _check_levels(self) -> None:
        if not self.levels:
            raise ValueError("block_out_channels is empty: give the channels of at least one level.")
        for name in ("down_block_types", "up_block_types"):
            types, known = getattr(self, name), DOWN_BLOCKS if name == "down_block_types" else UP_BLOCKS
            if unknown := [kind for kind in types if kind not in known]:
                raise ValueError(
                    f"{name} has {unknown[0]!r}, which is not supported: use {' or '.join(known)}."
                )
        for name in (
            "down_block_types",
            "up_block_types",
            "layers_per_block",
            "transformer_layers_per_block",
            "attention_head_dim",
            "cross_attention_dim",
        ):
            value = getattr(self, name)
            if isinstance(value, tuple) and len(value) != self.levels:
                raise ValueError(
                    f"{name} = {value} has {len(value)} entries, but block_out_channels = "
                    f"{self.block_out_channels} has {self.levels}: give one for each level."
                )

    def _check_channels(self) -> None:
        for name in (
            "in_channels",
            "out_channels",
            "block_out_channels",
            "norm_num_groups",
            "layers_per_block",
            "transformer_layers_per_block",
            "attention_head_dim",
            "cross_attention_dim",
        ):
            value = getattr(self, name)
            for number in value if isinstance(value, tuple) else (value,):
                if not isinstance(number, int) or number < 1:
                    raise ValueError(f"{name} = {value!r} is not supported: give whole numbers from 1.")
        for i, channels in enumerate(self.block_out_channels):
            if channels % self.norm_num_groups:
                raise ValueError(
                    f"block_out_channels has {channels}, not a multiple of "
                    f"norm_num_groups = {self.norm_num_groups}."
                )
            heads = _at(self.attention_head_dim, i)
            if self.attends(i) and channels % heads:
                raise ValueError(
                    f"block_out_channels has {channels}, not a multiple of its number of heads, "
                    f"attention_head_dim = {heads}."
                )
        dims = self.cross_attention_dim
        if isinstance(dims, tuple) and not self.promptless and len(set(dims)) > 1:
            raise ValueError(
                f"cross_attention_dim = {dims} is not supported: give one width, or null for no prompt."
            )

    def _check_embeddings(self) -> None:
        for name, supported in (
            ("class_embed_type", (None, "timestep")),
            ("addition_embed_type", (None, "text_time")),
            ("resnet_time_scale_shift", ("default", "scale_shift")),
        ):
            if (value := getattr(self, name)) not in supported:
                raise ValueError(
                    f"{name} = {value!r} is not supported, only {supported[0]!r} and {supported[1]!r} are."
                )
        if self.addition_embed_type:
            for name in ("addition_time_embed_dim", "projection_class_embeddings_input_dim"):
                if getattr(self, name) is None:
                    raise ValueError(f"{name} is null, but addition_embed_type = 'text_time' needs it.")
        for name, width in (
            ("block_out_channels[0]", self.block_out_channels[0]),
            ("addition_time_embed_dim", self.addition_time_embed_dim or 2),
        ):
            if width % 2:
                raise ValueError(f"{name} = {width} is odd, but an embedding is half sines, half cosines.")


def _at(value: V | tuple[V, ...], i: int) -> V:
    """What a key that is one for all levels or one per level says of level `i`."""
    return value[i] if isinstance(value, tuple) else value
