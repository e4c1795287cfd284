"""How long a run is, how large its steps, in which precision, and where it lies."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from ldm.config import UserError


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """How long, how large, where."""

    out: Path
    """Folder of the run; an existing run in it is continued"""
    steps: int
    """Optimizer steps"""
    batch_size: int
    """Samples an optimizer step, over all processes and accumulated batches"""
    accumulate: int = 1
    """Batches whose gradients are added up for one optimizer step"""
    seed: int = 0
    """Decides initial weights, data order, noise and dropout"""
    precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    """Of activations; weights and their averages stay float32. auto: bf16 where the processor has it"""
    gradient_checkpointing: bool = False
    """Compute the insides of the networks' layers twice instead of keeping them: less memory, a slower step"""
    compile: Literal["no", "inductor", "aot_eager"] = "no"
    """Compile the trained networks. inductor: into fused kernels. aot_eager: traced only, to look for faults"""
    max_norm: float = 1.0
    """Gradients longer than this are scaled down to it"""
    save_every: int = 1000
    """Optimizer steps between checkpoints"""
    keep: int = 2
    """Checkpoints kept"""
    log_every: int = 50
    """Optimizer steps between lines in metrics.jsonl and the tracker"""
    timeout: float = 1800.0
    """Seconds without a step, or without an answer of another process, after which a run counts as hung and ends"""
    shard: bool = False
    """Give each process a part of weights, gradients and optimizer state (FSDP), for networks too large to repeat;
    stage 2 only"""
    tracker: str = "tensorboard"
    """none, or what Accelerate knows: tensorboard, wandb, trackio, mlflow, aim, comet_ml, clearml, dvclive, swanlab"""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate", "save_every", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"run.{name} is {getattr(self, name)}, but must be at least 1")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"run.seed is {self.seed}, but must lie between 0 and 2^32 - 1")
        if not self.max_norm > 0:
            raise ValueError(
                f"run.max_norm is {self.max_norm}, but must be positive: gradients are scaled to it"
            )
        if not self.timeout > 0:
            raise ValueError(f"run.timeout is {self.timeout}, but must be a positive number of seconds")
        if self.keep < 2:
            raise ValueError(
                f"run.keep is {self.keep}, but must be at least 2: the newest may turn out damaged"
            )


def chosen_precision(precision: str) -> str:
    """What `run.precision` means on this machine; UserError if it can't train in it."""
    if precision == "fp16" and not (torch.cuda.is_available() or torch.backends.mps.is_available()):
        raise UserError(
            "run.precision is fp16, which trains on a GPU alone; set run.precision to bf16 or no."
        )
    return best_precision() if precision == "auto" else precision


def best_precision() -> Literal["no", "bf16"]:
    """bf16 where this machine multiplies it natively, else no."""
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    able = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return "bf16" if able.get("avx512_bf16") or able.get("amx_bf16") or able.get("bf16") else "no"
