"""What stage 1 minimises: how far pictures are from their originals, and the price of information in the latents."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Literal

from torch import Tensor

from autoencoder.adversarial import AdversarialConfig, Adversary
from autoencoder.kl import Posterior
from autoencoder.perceptual import Perceptual, PerceptualConfig
from autoencoder.vq import CodebookConfig, Quantized

Kind = Literal["l1", "l2", "charbonnier"]

CHARBONNIER_EPS = 1e-3  # in units of [-1, 1]: an eighth of the step between two values of an 8-bit image


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Terms of the autoencoder's loss and their weights."""

    reconstruction: Kind = "l1"
    """Difference of pixels: l1, l2 or charbonnier, averaged over pixels and channels"""
    lpips: PerceptualConfig = field(default_factory=PerceptualConfig)
    gan: AdversarialConfig = field(default_factory=AdversarialConfig)
    kl: float = 1e-6
    """Of kind kl: weight of the KL divergence in nats, divided by the numbers in an image: beside the averaged
    difference it means the same at every resolution, and what it means to Rombach et al. 2022, who sum both terms"""
    kl_warmup: int = 0
    """Of kind kl: optimizer steps over which that weight rises linearly from zero"""
    codebook: CodebookConfig = field(default_factory=CodebookConfig)

    def __post_init__(self) -> None:
        for name in ("kl", "kl_warmup"):
            if getattr(self, name) < 0:
                raise ValueError(f"loss.{name} is {getattr(self, name)}, but must not be negative")
        if self.kl_warmup and not self.kl:
            raise ValueError("loss.kl_warmup is set, but loss.kl is 0: set the weight, or remove kl_warmup")
        for name in ("lpips", "gan"):
            group = getattr(self, name)
            if not group.weight and (extra := _changed(group)):
                raise ValueError(
                    f"loss.{name}.{extra[0]} is set, but loss.{name}.weight is 0, which switches it off: "
                    "set the weight, or remove the other"
                )

    def check_kind(self, kind: Literal["kl", "vq"]) -> None:
        """ValueError if something is set that only the other kind of autoencoder has."""
        if kind == "kl" and (extra := _changed(self.codebook)):
            raise ValueError(f"loss.codebook.{extra[0]} is set, but kind is kl: set kind to vq, or remove it")
        if kind == "vq" and (extra := [name for name in _changed(self) if name.startswith("kl")]):
            raise ValueError(f"loss.{extra[0]} is set, but kind is vq: set kind to kl, or remove it")


def _changed(group: object) -> list[str]:
    """Names of the fields of a dataclass instance that are not at their defaults."""
    defaults = type(group)()
    return [f.name for f in fields(group) if getattr(group, f.name) != getattr(defaults, f.name)]  # type: ignore[arg-type]


def reconstruction(x: Tensor, y: Tensor, kind: Kind) -> Tensor:
    """Difference of images x and y [B, 3, H, W] in [-1, 1], averaged over channels and pixels: [B].

    "charbonnier" is sqrt(d^2 + eps^2), an l1 that is smooth at 0 (Charbonnier et al. 1994).
    Raises ValueError for another kind.
    """
    d = x - y
    if kind == "l1":
        each = d.abs()
    elif kind == "l2":
        each = d.square()
    elif kind == "charbonnier":
        each = (d.square() + CHARBONNIER_EPS**2).sqrt()
    else:
        raise ValueError(f"kind = {kind!r} must be 'l1', 'l2' or 'charbonnier'.")
    return each.mean(dim=(1, 2, 3))


class Objective:
    """The autoencoder's loss, from what it makes of pictures.

    Args:
        config: which terms, and their weights.
        lpips: None if that term is off.
        adversary: None if that term is off.
        last: weights of the decoder's last layer, at which the adaptive weight is measured.
    """

    def __init__(
        self, config: LossConfig, lpips: Perceptual | None, adversary: Adversary | None, last: Tensor
    ) -> None:
        self.config, self.lpips, self.adversary, self.last = config, lpips, adversary, last

    def __call__(
        self, pixels: Tensor, made: Tensor, latent: Posterior | Quantized, step: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of optimizer step `step` (from 0), and each of its terms before its weight, for the logs.

        Args:
            pixels: originals [B,3,H,W] in [-1, 1].
            made: their reconstructions.
            latent: what came with them out of the autoencoder.
        """
        config = self.config
        loss = reconstruction(made, pixels, config.reconstruction).mean()
        terms = {"reconstruction": loss}
        if self.lpips:
            terms["lpips"] = self.lpips(made, pixels).mean()
            loss = loss + config.lpips.weight * terms["lpips"]
        if self.adversary and (weight := self.adversary.weight(step)):
            terms["adversarial"] = fooled = self.adversary.autoencoder_loss(made)
            if config.gan.adaptive:
                terms["adaptive"] = self.adversary.factor(loss, fooled, self.last, made.numel())
            loss = loss + weight * terms.get("adaptive", 1.0) * fooled
        if isinstance(latent, Posterior):
            terms["kl"] = latent.kl().mean() / pixels[0].numel()
            loss = loss + config.kl * min(1.0, (step + 1) / max(1, config.kl_warmup)) * terms["kl"]
        else:
            terms["commitment"] = latent.commitment.mean()
            loss = loss + config.codebook.weight * latent.loss(config.codebook.commitment).mean()
        return loss, {name: term.detach() for name, term in terms.items()}
