"""The adversarial loss: what the discriminator and the autoencoder tell each other (Esser et al. 2021, section 3.1)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WON, LOST = 0.95, 0.55
"""Shares of right answers above which the discriminator has won, and below which it guesses."""

MEMORY = 0.99
"""Decay a step of the running averages (Tseng et al. 2021 use the same)."""


@dataclass(frozen=True, kw_only=True)
class AdversarialConfig:
    """A discriminator that learns to tell reconstructions from originals, and is to be fooled."""

    weight: float = 0.0
    """Weight of the adversarial loss; 0: off"""
    kind: Literal["hinge", "non-saturating"] = "hinge"
    """hinge (Lim and Ye 2017) or non-saturating (Goodfellow et al. 2014)"""
    adaptive: bool = True
    """Multiply the weight by the ratio of the gradients at the decoder's last layer (Esser et al. 2021, eq. 7), of each
    batch by itself where run.accumulate adds up several"""
    adaptive_max: float = 1e4
    """The ratio's upper limit"""
    start: int = 1000
    """Optimizer steps before the autoencoder hears the discriminator"""
    head_start: int = 200
    """Steps before that in which the discriminator learns already"""
    ramp: int = 500
    """Steps over which the weight then rises from zero"""
    channels: int = 64
    """Channels of the discriminator's first layer"""
    layers: int = 3
    """Its layers that halve the resolution: 3 see patches of 70 pixels, 2 of 34, 1 of 16"""
    r1: float = 0.0
    """Weight of R1, half the squared gradient of an original's mean logit (Mescheder et al. 2018); 0: off"""
    r1_every: int = 16
    """Steps between R1 terms, which are weighted by it (Karras et al. 2020, appendix B)"""
    lecam: float = 0.0
    """Weight of LeCam (Tseng et al. 2021, eq. 5), which helps with few pictures; 0: off"""

    def __post_init__(self) -> None:
        for key in ("weight", "start", "head_start", "r1", "lecam"):
            if getattr(self, key) < 0:
                raise ValueError(f"loss.gan.{key} is {getattr(self, key)}, but must not be negative")
        for key in ("ramp", "channels", "layers", "r1_every"):
            if getattr(self, key) < 1:
                raise ValueError(f"loss.gan.{key} is {getattr(self, key)}, but must be at least 1")
        if not self.adaptive_max > 0:
            raise ValueError(f"loss.gan.adaptive_max is {self.adaptive_max}, but must be positive")
        if self.head_start > self.start:
            raise ValueError(
                f"loss.gan.head_start is {self.head_start}, but only {self.start} steps come before loss.gan.start"
            )
        if not self.r1 and self.r1_every != AdversarialConfig.r1_every:
            raise ValueError("loss.gan.r1_every is set, but loss.gan.r1 is 0: set it, or remove r1_every")
        if not self.adaptive and self.adaptive_max != AdversarialConfig.adaptive_max:
            raise ValueError(
                "loss.gan.adaptive_max is set, but loss.gan.adaptive is false: remove one of them"
            )


class Adversary:
    """A discriminator, its losses, and a running judgement of who is winning.

    Args:
        config: of the loss.
        wrapped: the discriminator as Accelerate has wrapped it, for its own steps.
        optimizer: the discriminator's, as Accelerate has wrapped it.
        module: the discriminator itself, for the autoencoder's steps, in which it is a fixed function: through the
            wrapper, DDP would wait for gradients that never come.
        mean: averages a tensor over all processes.

    Attributes:
        averages: [3] running means over all processes: logit of originals, logit of reconstructions, share of right
            answers.
        seen: batches in them.
        winner: discriminator, autoencoder or neither (empty), at the last verdict.
    """

    def __init__(
        self,
        config: AdversarialConfig,
        wrapped: nn.Module,
        optimizer: Any,
        module: nn.Module,
        mean: Callable[[Tensor], Tensor],
    ) -> None:
        self.config, self.wrapped, self.optimizer, self.module = config, wrapped, optimizer, module
        self.mean = mean
        self.averages = torch.zeros(3, device=next(module.parameters()).device)
        self.seen, self.winner = 0, ""

    def learns(self, step: int) -> bool:
        """Whether the discriminator takes optimizer step `step` (from 0)."""
        return step >= self.config.start - self.config.head_start

    def weight(self, step: int) -> float:
        """Of the adversarial loss in the autoencoder's step, before the adaptive factor."""
        return self.config.weight * min(1.0, max(0, step - self.config.start + 1) / self.config.ramp)

    def discriminator_loss(
        self, originals: Tensor, made: Tensor, step: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What the discriminator minimises on pictures [B,3,H,W] twice, and figures; nothing reaches the autoencoder.

        Both kinds go through in one batch, because DDP wants one forward pass for each backward pass.
        """
        config = self.config
        penalised = config.r1 > 0 and step % config.r1_every == 0
        originals = originals.detach().requires_grad_(penalised)
        real, fake = self.wrapped(torch.cat([originals, made.detach()])).chunk(2)
        if config.kind == "hinge":
            loss = (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2
        else:
            loss = (F.softplus(-real).mean() + F.softplus(fake).mean()) / 2
        self._judge(real, fake)
        if penalised:
            scores = real.mean(dim=(1, 2, 3)).sum()
            (gradient,) = torch.autograd.grad(scores, originals, create_graph=True)
            penalty = gradient.square().sum(dim=(1, 2, 3)).mean()
            loss = loss + config.r1 / 2 * config.r1_every * penalty
        if config.lecam:
            loss = loss + config.lecam * lecam(real, fake, *self.averages[:2])
        return loss, {"logits_real": real.detach().mean(), "logits_fake": fake.detach().mean()}

    def autoencoder_loss(self, made: Tensor) -> Tensor:
        """How far reconstructions [B,3,H,W] are from passing for originals; nothing reaches the discriminator."""
        self.module.requires_grad_(False)
        fake = self.module(made)
        self.module.requires_grad_(True)
        return -fake.mean() if self.config.kind == "hinge" else F.softplus(-fake).mean()

    def factor(self, distance: Tensor, adversarial: Tensor, last: Tensor, numbers: int) -> Tensor:
        """The adaptive weight: |gradient of distance| / |gradient of adversarial| at the weights `last`.

        Of the gradients averaged over all processes, so it is the same on each, and that of one with the whole
        batch. `numbers` lifts gradients of averages over so many numbers out of half precision's depths.
        """
        gradients = [
            torch.autograd.grad(loss * numbers, last, retain_graph=True)[0]
            for loss in (distance, adversarial)
        ]
        of_distance, of_adversarial = self.mean(torch.stack(gradients) / numbers).flatten(1).norm(dim=1)
        return (of_distance / (of_adversarial + 1e-6)).clamp(max=self.config.adaptive_max).detach()

    @torch.no_grad()
    def logits(self, originals: Tensor, made: Tensor) -> dict[str, float]:
        """Mean logits of pictures [N,3,H,W] twice, for the person to see."""
        sides = {"logits_real": originals, "logits_fake": made}
        return {
            name: torch.cat([self.module(x) for x in side.split(16)]).mean().item()
            for name, side in sides.items()
        }

    @torch.no_grad()
    def _judge(self, real: Tensor, fake: Tensor) -> None:
        right = ((real > 0).float().mean() + (fake < 0).float().mean()) / 2
        now = self.mean(torch.stack([real.mean(), fake.mean(), right]).float())
        self.averages.lerp_(now, max(1 - MEMORY, 1 / (self.seen + 1)))
        self.seen += 1

    def verdict(self, step: int) -> str | None:
        """A warning in a sentence when one side has won by step `step`, and had not at the last call.

        While the discriminator learns alone it may guess.
        """
        right, before = float(self.averages[2]), self.winner
        self.winner = ""
        if self.seen >= 1 / (1 - MEMORY):
            if right > WON:
                self.winner = "discriminator"
            elif right < LOST and self.weight(step):
                self.winner = "autoencoder"
        if self.winner == before:
            return None
        if self.winner == "discriminator":
            return (
                f"warning: the discriminator has won: {right:.0%} of its answers are right, and reconstructions may "
                "collapse; lower gan_optimizer.lr or loss.gan.weight, or set loss.gan.r1 or loss.gan.lecam"
            )
        if self.winner == "autoencoder":
            return (
                f"warning: the discriminator guesses: {right:.0%} of its answers are right, so it has nothing to "
                "teach; raise gan_optimizer.lr, loss.gan.channels or loss.gan.head_start"
            )
        return None

    def parts(self) -> dict[str, Any]:
        """What a checkpoint holds of it."""
        return {
            "discriminator": self.module,
            "discriminator_optimizer": self.optimizer,
            "judgement": self,
        }

    def state_dict(self) -> dict[str, Any]:
        return {"averages": self.averages, "seen": self.seen, "winner": self.winner}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.averages.copy_(state["averages"])
        self.seen, self.winner = state["seen"], state["winner"]


def lecam(real: Tensor, fake: Tensor, usual_real: Tensor, usual_fake: Tensor) -> Tensor:
    """Mean squared distance of each side's logits from the other side's running mean (Tseng et al. 2021, eq. 5)."""
    return (real - usual_fake).square().mean() + (fake - usual_real).square().mean()
