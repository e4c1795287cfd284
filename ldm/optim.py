"""Optimizers and learning-rate schedules. Rates are absolute and count optimizer steps, whatever the process count."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ldm.config import UserError
from ldm.sharding import is_sharded, laid_out_like, whole


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """How weights move."""

    name: Literal["muon", "adamw", "adamw8bit", "schedulefree"] = "muon"
    """muon: Muon for weight matrices and convolutions, AdamW for the rest. adamw: AdamW for everything. adamw8bit: its
    means in 8 bits (package bitsandbytes). schedulefree: AdamW without a schedule (Defazio et al. 2024, package
    schedulefree); decay must be none, and the averaged weights are averages of its own average"""
    lr: float = 2e-3
    """Peak learning rate"""
    betas: tuple[float, float] = (0.9, 0.99)
    """AdamW: decay of the running mean and of the running square of the gradient"""
    weight_decay: float = 0.01
    """Share of a weight matrix, times the learning rate, taken away each step; vectors are not decayed"""
    warmup: int = 50
    """Optimizer steps over which the rate rises linearly from zero"""
    decay: Literal["cosine", "linear", "none"] = "cosine"
    """Shape of the fall to zero"""
    decay_from: float = 0.0
    """Share of the run after which the rate falls"""

    def __post_init__(self) -> None:
        if not 0 < self.lr < math.inf:
            raise ValueError(f"optimizer.lr is {self.lr}, but must be a positive number")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optimizer.betas are {[*self.betas]}, but must lie in [0, 1)")
        for name in ("weight_decay", "warmup"):
            if getattr(self, name) < 0:
                raise ValueError(f"optimizer.{name} is {getattr(self, name)}, but must not be negative")
        if not 0 <= self.decay_from < 1:
            raise ValueError(f"optimizer.decay_from is {self.decay_from}, but must lie in [0, 1)")
        if self.decay_from and self.decay == "none":
            raise ValueError(
                "optimizer.decay_from is set, but optimizer.decay is none: remove one of the two"
            )
        if self.name == "schedulefree" and self.decay != "none":
            raise ValueError(
                f"optimizer.decay is {self.decay}, but schedulefree needs no fall of the rate; set it to none"
            )

    def rate(self, step: int, steps: int) -> float:
        """Learning rate of optimizer step `step` (0-based) in a run of `steps`."""
        warm = min(1.0, (step + 1) / max(1, self.warmup))
        start = self.decay_from * steps
        fallen = min(1.0, max(0.0, (step - start) / max(1.0, steps - start)))
        shape = {"none": 1.0, "linear": 1 - fallen, "cosine": (1 + math.cos(math.pi * fallen)) / 2}
        return self.lr * warm * shape[self.decay]


def make_optimizer(config: OptimizerConfig, modules: Iterable[nn.Module]) -> torch.optim.Optimizer:
    """One optimizer over the trainable parameters of `modules`; UserError where its package is not installed."""
    matrices: list[Tensor] = []
    vectors: list[Tensor] = []
    seen: set[int] = set()  # a tied weight belongs to several modules
    for module in modules:
        for parent in module.modules():
            for parameter in parent.parameters(recurse=False):
                if not parameter.requires_grad or id(parameter) in seen:
                    continue
                seen.add(id(parameter))
                # A lookup table has one row a word: its gradient is sparse, and orthogonalising it makes no sense.
                matrix = parameter.ndim >= 2 and not isinstance(parent, nn.Embedding)
                (matrices if matrix else vectors).append(parameter)
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay, "muon": config.name == "muon"},
        {"params": vectors, "weight_decay": 0.0, "muon": False},
    ]
    groups = [group for group in groups if group["params"]]
    if config.name == "adamw8bit":
        return _adamw8bit(groups, config)
    if config.name == "schedulefree":
        library = _package("schedulefree", config.name)
        optimizer = library.AdamWScheduleFree(groups, lr=config.lr, betas=config.betas)
        optimizer.train()
        return optimizer
    return Muon(groups, lr=config.lr, betas=config.betas)


def _package(package: str, optimizer: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError:
        raise UserError(
            f"optimizer.name is {optimizer}, which needs the package {package}; pip install {package}, "
            "or choose muon or adamw."
        ) from None


def _adamw8bit(groups: list[dict[str, Any]], config: OptimizerConfig) -> torch.optim.Optimizer:
    library = _package("bitsandbytes", config.name)
    for group in groups:
        for p in group[
            "params"
        ]:  # its kernels walk memory, whatever the layout: keep one that a checkpoint keeps
            p.data = p.data.contiguous()

    class AdamW8bit(library.optim.AdamW8bit):  # type: ignore[misc, name-defined]
        def state_dict(self) -> dict[str, Any]:
            """Without the sharing of tables between parameters, which safetensors files can't hold."""
            state = super().state_dict()
            state["state"] = {key: cloned(value) for key, value in state["state"].items()}
            return state

    return AdamW8bit(groups, lr=config.lr, betas=config.betas)


def cloned(state: Any) -> Any:
    """A nest of dicts with each tensor in memory of its own."""
    if isinstance(state, dict):
        return {key: cloned(value) for key, value in state.items()}
    return state.clone() if isinstance(state, Tensor) else state


@contextmanager
def as_judged(optimizer: Any) -> Iterator[None]:
    """Around what reads the weights between steps: schedule-free training moves others than those that are the result.

    Going there and back changes weights by float32 rounding, so it is done after every step or not at all.
    """
    switches = hasattr(optimizer, "eval")  # Accelerate's wrapping has it, and passes it on where there is one
    if switches:
        optimizer.eval()
    yield
    if switches:
        optimizer.train()


class Muon(torch.optim.AdamW):
    """Muon (Jordan et al. 2024) for the groups marked `muon`, AdamW for the others.

    A weight of n dimensions is read as a matrix [out, rest]. The step is the momentum's nearest semi-orthogonal
    matrix, scaled so that its root mean square is that of an AdamW step (Liu et al. 2025, arXiv 2502.16982, eq. 4):
    one learning rate serves both. Weights of one shape are orthogonalised together, which is what makes it cheap.
    """

    def __init__(self, params: Any, lr: float, betas: tuple[float, float], momentum: float = 0.95) -> None:
        super().__init__(params, lr=lr, betas=betas, eps=1e-8, fused=True)
        self.momentum = momentum

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As saved, but laid out in memory like the weights: the fused step walks both side by side."""
        super().load_state_dict(state_dict)
        for p, state in self.state.items():
            for key, value in state.items():
                if isinstance(value, Tensor) and value.shape == p.shape:
                    state[key] = laid_out_like(p, value)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        if getattr(self, "found_inf", None):  # set by fp16's scaler: this gradient overflowed
            return None
        for group in self.param_groups:
            if group["muon"]:
                self._orthogonal_step(group)
        return super().step(closure)  # AdamW passes over parameters without a gradient

    def _orthogonal_step(self, group: dict[str, Any]) -> None:
        parameters = [p for p in group["params"] if p.grad is not None]
        if not parameters:
            return
        grads: list[Tensor] = [p.grad for p in parameters]
        for p in parameters:
            if not self.state[p]:
                self.state[p] = {"step": torch.zeros(()), "momentum": torch.zeros_like(p)}
            self.state[p]["step"] += 1  # AdamW looks for it when a state is loaded
        momenta = [self.state[p]["momentum"] for p in parameters]
        torch._foreach_lerp_(momenta, grads, 1 - self.momentum)
        torch._foreach_lerp_(grads, momenta, self.momentum)  # Nesterov's, in place: gradients end here
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        for members in _by_shape(parameters).values():
            steps = orthogonalise(
                torch.stack([whole(grads[i]).reshape(parameters[i].shape[0], -1) for i in members])
            )
            scale = 0.2 * math.sqrt(max(steps.shape[1:]))
            for i, update in zip(members, steps, strict=True):
                step = update.view(parameters[i].shape).to(parameters[i].dtype)
                if is_sharded(parameters[i]):
                    step = laid_out_like(parameters[i], step)
                parameters[i].add_(step, alpha=-group["lr"] * scale)
        for p in parameters:
            p.grad = None


def _by_shape(parameters: Sequence[Tensor]) -> dict[tuple[int, int], list[int]]:
    shapes: dict[tuple[int, int], list[int]] = {}
    for i, p in enumerate(parameters):
        shapes.setdefault((p.shape[0], p[0].numel()), []).append(i)
    return shapes


def orthogonalise(matrices: Tensor, iterations: int = 5) -> Tensor:
    """[N,R,C] -> [N,R,C] with all singular values near 1, by Newton-Schulz in bfloat16 (Jordan et al. 2024)."""
    a, b, c = (
        3.4445,
        -4.7750,
        2.0315,
    )  # the quintic a s + b s^3 + c s^5, tuned to lift small singular values fast
    tall = matrices.shape[1] > matrices.shape[2]
    x = (matrices.mT if tall else matrices).to(torch.bfloat16)
    x = x / x.flatten(1).norm(dim=1).clamp(min=1e-7)[:, None, None]
    for _ in range(iterations):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
