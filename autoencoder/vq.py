"""VQModel: images to vectors of a learned codebook and back (van den Oord et al. 2017; Esser et al. 2021).

Shapes: images [B, 3, H, W] in [-1, 1]; latents [B, D, h, w] with h = H/f, w = W/f; K codes of D numbers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor, nn

from autoencoder.model import Decoder, Encoder, NetworkConfig, at_least_float32, check_images, check_latents
from autoencoder.store import load_folder, save_folder


@dataclass(frozen=True, kw_only=True)
class VQConfig(NetworkConfig):
    """Keys and defaults of diffusers' VQModel."""

    latent_channels: int = 3
    """Channels between the networks and the 1x1 convolutions around the codebook"""
    num_vq_embeddings: int = 256
    """Codes in the codebook, K"""
    vq_embed_dim: int | None = None
    """Numbers in a code, D; None: as many as latent_channels"""
    lookup_from_codebook: bool = False
    """Tells stock pipelines to decode indices instead of latents; here that is `decode_indices`"""
    force_upcast: bool = False
    """Tells stock pipelines to decode in float32 because float16 overflows"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_vq_embeddings < 1 or self.code_size < 1:
            raise ValueError(
                f"num_vq_embeddings = {self.num_vq_embeddings} and vq_embed_dim = {self.vq_embed_dim} "
                "must be at least 1."
            )

    @property
    def code_size(self) -> int:
        """D, the numbers in a code and the channels of the latents."""
        return self.latent_channels if self.vq_embed_dim is None else self.vq_embed_dim

    def fixed(self) -> dict[str, object]:
        """See `StockConfig.fixed`."""
        return {**super().fixed(), "norm_type": "group"}


@dataclass(frozen=True, kw_only=True)
class CodebookConfig:
    """Of kind vq: how codes and latents find each other."""

    weight: float = 1.0
    """Weight of the codebook's loss, van den Oord et al. 2017, equation 3, averaged over the latents' numbers"""
    commitment: float = 0.25
    """Weight within it of the term that moves latents towards codes"""
    revive_every: int = 100
    """Optimizer steps after which codes that no latent has chosen since the last time start again as latents of the
    batch (as in Dhariwal et al. 2020, section 3); 0: never"""

    def __post_init__(self) -> None:
        for key in ("weight", "commitment"):
            if not getattr(self, key) > 0:
                raise ValueError(f"loss.codebook.{key} is {getattr(self, key)}, but must be positive")
        if self.revive_every < 0:
            raise ValueError(f"loss.codebook.revive_every is {self.revive_every}, but must not be negative")


class Quantized(NamedTuple):
    """Latents replaced by their nearest codes."""

    latents: Tensor
    """[B, D, h, w]: the codes; their gradient goes to the encoder as if nothing had been replaced."""
    indices: Tensor
    """[B, h, w] int64 in 0..K-1."""
    codebook: Tensor
    """[B]: mean squared distance, whose gradient moves codes towards latents."""
    commitment: Tensor
    """[B]: the same number, whose gradient moves latents towards codes."""
    unquantized: Tensor
    """[B, D, h, w]: the latents before, without gradient."""

    def loss(self, beta: float = 0.25) -> Tensor:
        """[B]: codebook + beta * commitment, van den Oord et al. 2017, equation 3.

        The `commit_loss` of diffusers has beta on the other term: commitment + 0.25 * codebook.
        """
        return self.codebook + beta * self.commitment


class VectorQuantizer(nn.Module):
    """A codebook and the nearest-code rule.

    Args:
        codes: K.
        code_size: D.
    """

    def __init__(self, codes: int, code_size: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(codes, code_size)
        nn.init.uniform_(self.embedding.weight, -1 / codes, 1 / codes)

    def forward(self, z: Tensor) -> Quantized:
        """Latents [B, D, h, w] => their nearest codes, in at least float32."""
        z = at_least_float32(z)
        vectors = z.detach().permute(0, 2, 3, 1).flatten(0, 2)  # [B*h*w, D]
        distances = torch.cdist(vectors, at_least_float32(self.embedding.weight.detach()))
        indices = distances.argmin(dim=1).view(z.shape[0], *z.shape[2:])
        codes = at_least_float32(self.lookup(indices))
        return Quantized(
            latents=z + (codes - z).detach(),
            indices=indices,
            codebook=(codes - z.detach()).square().mean(dim=(1, 2, 3)),
            commitment=(codes.detach() - z).square().mean(dim=(1, 2, 3)),
            unquantized=z.detach(),
        )

    def lookup(self, indices: Tensor) -> Tensor:
        """Indices [B, h, w] => codes [B, D, h, w]."""
        return self.embedding(indices).permute(0, 3, 1, 2).contiguous()


class VQModel(nn.Module):
    """The autoencoder with a codebook; weights and config are diffusers' VQModel."""

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config, config.latent_channels)
        self.quant_conv = nn.Conv2d(config.latent_channels, config.code_size, 1)
        self.quantize = VectorQuantizer(config.num_vq_embeddings, config.code_size)
        self.post_quant_conv = nn.Conv2d(config.code_size, config.latent_channels, 1)
        self.decoder = Decoder(config)

    def encode(self, x: Tensor) -> Tensor:
        """Images [B, in_channels, H, W] in [-1, 1] => latents [B, D, H/f, W/f], not yet quantized.

        Raises ValueError for another number of channels or sides that f does not divide.
        """
        check_images(x, self.config)
        return self.quant_conv(self.encoder(x.to(self.dtype)))

    def decode(self, z: Tensor) -> Tensor:
        """Latents [B, D, h, w], quantized first => images [B, out_channels, f*h, f*w], about [-1, 1].

        Raises ValueError for another number of channels.
        """
        check_latents(z, self.config.code_size)
        return self._decode_codes(self.quantize(z).latents)

    def decode_indices(self, indices: Tensor) -> Tensor:
        """Indices [B, h, w] in 0..K-1 => images [B, out_channels, f*h, f*w], about [-1, 1]."""
        return self._decode_codes(self.quantize.lookup(indices))

    def forward(self, x: Tensor) -> tuple[Tensor, Quantized]:
        """Reconstruct images [B, in_channels, H, W] in [-1, 1]; the one call that training makes.

        Returns:
            Reconstruction like x, and the quantized latents with their losses.
        """
        quantized: Quantized = self.quantize(self.encode(x))
        return self._decode_codes(quantized.latents), quantized

    def _decode_codes(self, codes: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(codes.to(self.dtype)))

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights; inputs are brought to it."""
        return self.decoder.conv_in.weight.dtype

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the stock folder that diffusers reads; see `store.save_folder`."""
        save_folder(folder, self.config, "VQModel", self.state_dict())

    @classmethod
    def from_pretrained(cls, source: str | Path) -> Self:
        """Read a stock folder, here or on the hub; see `store.load_folder`."""
        return load_folder(source, VQConfig, "VQModel", cls)


class CodebookUsage(NamedTuple):
    """How much of a codebook is in use."""

    fraction: float
    """Codes that occur at all, 0..1."""
    perplexity: float
    """Codes that would be as varied if all occurred equally often, 1..K."""


def count_codes(indices: Tensor, codes: int) -> Tensor:
    """How often each of K = `codes` codes occurs in `indices` of any shape: [K] int64. Batches add up."""
    return torch.bincount(indices.flatten(), minlength=codes)


def codebook_usage(counts: Tensor) -> CodebookUsage:
    """Usage from the counts [K] of `count_codes`. Raises ValueError if nothing has been counted."""
    if counts.sum() == 0:
        raise ValueError("counts are all 0: count the codes of at least one batch first.")
    p = counts.double() / counts.sum()
    entropy = -torch.special.xlogy(p, p).sum()
    return CodebookUsage((counts > 0).double().mean().item(), entropy.exp().item())


class CodeUse:
    """How often each code has been chosen since codes were last revived, over all processes.

    Args:
        codes: K.
        device: of the indices.
        total: adds a tensor up over all processes; so the counts are the same on each, and in a checkpoint.
    """

    def __init__(self, codes: int, device: torch.device, total: Callable[[Tensor], Tensor]) -> None:
        self.counts, self.total = torch.zeros(codes, dtype=torch.long, device=device), total

    def count(self, indices: Tensor) -> None:
        """Add this process's indices [B, h, w]; all processes call it together."""
        self.counts += self.total(count_codes(indices, len(self.counts)))

    def revive(self, codebooks: list[nn.Embedding], latents: Tensor, random: np.random.Generator) -> int:
        """Set codes that were never chosen to latents drawn at random, start counting anew, return how many.

        Args:
            codebooks: the one that is trained, and the averaged one, which would take long to follow.
            latents: [B, D, h, w] before quantization, of all processes.
            random: draws the latents; the same on all processes.
        """
        dead = (self.counts == 0).nonzero().flatten()
        self.counts.zero_()
        vectors = latents.movedim(1, -1).flatten(0, -2)
        chosen = random.choice(len(vectors), size=len(dead), replace=len(dead) > len(vectors))
        fresh = vectors[torch.from_numpy(chosen).to(vectors.device)]
        for codebook in codebooks:
            codebook.weight.data[dead] = fresh.to(codebook.weight.dtype)
        return len(dead)

    def state_dict(self) -> dict[str, Any]:
        return {"counts": self.counts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.counts.copy_(state["counts"])
