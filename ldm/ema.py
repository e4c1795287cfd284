"""Exponential moving average of weights, in float32, with a warm-up."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ldm.sharding import is_sharded, laid_out_like, whole


class EMA:
    """Averaged copies of modules, ready to run: `ema["unet"]` is a module in eval mode.

    Of weights that are shared out among processes, each process averages its part, and `gather` brings the copies,
    which each process has as a whole, up to date.

    The decay at step n is min(decay, (1 + n) / (10 + n)), so that the average forgets its random start
    (Abadi et al., tf.train.ExponentialMovingAverage).
    """

    def __init__(self, decay: float, **modules: nn.Module) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"ema_decay is {decay}, but must lie in [0, 1)")
        self.decay = decay
        self._parts: dict[str, list[Tensor]] = {}
        self.modules = {
            name: copy.deepcopy(m).float().eval().requires_grad_(False) for name, m in modules.items()
        }

    def __getitem__(self, name: str) -> Any:
        return self.modules[name]

    def weight(self, step: int) -> float:
        """What the weights after optimizer step `step` (from 1) count in the average that has just seen them."""
        return 1 - min(self.decay, (1 + step) / (10 + step))

    @torch.no_grad()
    def update(self, step: int, **modules: nn.Module) -> None:
        """Move towards the weights of `modules` after optimizer step `step` (from 1)."""
        weight = self.weight(step)
        for name, module in modules.items():
            averaged = self.modules[name]
            trained = [p.data for p in module.parameters()]
            if name not in self._parts and any(map(is_sharded, trained)):
                self._parts[name] = [
                    laid_out_like(p, mean.data)
                    for p, mean in zip(trained, averaged.parameters(), strict=True)
                ]
            # The parameters themselves: PyTorch does not count changes through `.data`, by which `Kept` goes.
            if parameters := self._parts.get(name) or [*averaged.parameters()]:
                torch._foreach_lerp_(parameters, trained, weight)
            for kept, buffer in zip(averaged.buffers(), module.buffers(), strict=True):
                kept.copy_(buffer)

    @torch.no_grad()
    def gather(self) -> None:
        """Bring the copies up to date with the parts that other processes average; all processes call it together."""
        for name, parts in self._parts.items():
            for mean, part in zip(self.modules[name].parameters(), parts, strict=True):
                mean.copy_(whole(part))

    def state_dict(self) -> dict[str, Tensor]:
        self.gather()
        return {
            f"{name}.{key}": value
            for name, m in self.modules.items()
            for key, value in m.state_dict().items()
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self._parts = {}
        for name, module in self.modules.items():
            prefix = f"{name}."
            module.load_state_dict(
                {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
            )
