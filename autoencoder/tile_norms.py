"""GroupNorm over a picture that is seen in tiles: all tiles are normalised by what the whole picture is.

A pass over all tiles gathers mean and variance of every normalisation's input; in the next pass every tile is
normalised by them, so that neighbours agree. The first normalisation's statistics are then those of the untiled
picture, and those of later ones nearly, as what goes into them was normalised tile by tile in the pass before.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TileNorms:
    """Statistics of every GroupNorm among the modules of a network, over weighted tiles."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self.norms = [module for module in modules if isinstance(module, nn.GroupNorm)]
        self.weight = torch.ones(1, 1)
        self._known: dict[nn.GroupNorm, tuple[Tensor, Tensor]] = {}
        self._sums: dict[nn.GroupNorm, Tensor] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While open, the network's normalisations count what they see, and use what is known.

        Set `weight` before each tile: [H, W], how much each of its pixels counts; those of all tiles add up to 1.
        """
        hooks = [norm.register_forward_hook(self._normalise, with_kwargs=True) for norm in self.norms]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def learn(self) -> None:
        """End a pass: what has been counted is known from now on."""
        for norm, (number, total, squares) in self._sums.items():
            mean = total / number
            self._known[norm] = (mean, (squares / number - mean.square()).clamp(min=0))
        self._sums = {}

    @torch.no_grad()
    def _normalise(
        self, norm: nn.GroupNorm, inputs: tuple[Tensor], options: dict[str, bool], out: Tensor
    ) -> Tensor:
        x = inputs[0]  # [B, C, H, W]
        sums = self._moments(x, norm.num_groups)
        self._sums[norm] = self._sums[norm] + sums if norm in self._sums else sums
        if norm not in self._known:
            return out
        mean, variance = self._known[norm]  # [B, G]
        per_group = x.shape[1] // norm.num_groups
        scale = (variance + norm.eps).rsqrt().repeat_interleave(per_group, 1) * norm.weight  # [B, C]
        shift = norm.bias - mean.repeat_interleave(per_group, 1) * scale
        scale, shift = (part[:, :, None, None].to(x.dtype) for part in (scale, shift))
        made = torch.mul(x, scale, out=out).add_(shift)
        return F.silu(made, inplace=True) if options.get("silu") else made

    def _moments(self, x: Tensor, groups: int) -> Tensor:
        """[3, B, G] float64: weighted number, sum and sum of squares of x [B, C, H, W], a group at a time."""
        weight = F.interpolate(self.weight[None, None].to(x.device), size=x.shape[2:], mode="area")[0]
        weight = weight * (
            self.weight.numel() / weight.numel()
        )  # so that a pixel counts as many as it stands for
        columns = []
        for group in x.chunk(groups, dim=1):
            weighted = group.float() * weight
            columns.append(
                torch.stack(
                    [
                        (weight.sum() * group.shape[1]).expand(len(x)),
                        weighted.sum(dim=(1, 2, 3)),
                        weighted.mul_(group).sum(dim=(1, 2, 3)),
                    ]
                )
            )
        return torch.stack(columns, dim=2).double()
