"""Weights, gradients and optimizer states in parts, one a process: PyTorch's `fully_shard` (FSDP, Zhao et al. 2023)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


def shard(modules: Iterable[nn.Module], optimizers: Iterable[torch.optim.Optimizer]) -> None:
    """Leave each process its part of the weights of `modules`; `optimizers` go on with the parts.

    A forward pass gathers a module's weights layer by layer, and the rest at once.
    """
    from torch.distributed.fsdp import fully_shard

    parts: dict[int, nn.Parameter] = {}
    for module in modules:
        module.to(memory_format=torch.contiguous_format)  # a part of channels-last weights isn't supported
        before = dict(module.named_parameters())
        for block in _blocks(module):
            if any(p.requires_grad for p in block.parameters()):
                fully_shard(block)
        fully_shard(module)
        parts |= {id(before[name]): p for name, p in module.named_parameters()}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["params"] = [parts.get(id(p), p) for p in group["params"]]


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """What is gathered by itself: layers that are given tensors, not lists, which `fully_shard` would copy."""
    for name, child in module.named_children():
        if isinstance(child, nn.ModuleList) and name in ("resnets", "attentions", "layers"):
            yield from child
        else:
            yield from _blocks(child)


def is_sharded(tensor: Tensor) -> bool:
    return isinstance(tensor, DTensor)


def whole(tensor: Tensor) -> Tensor:
    """The full tensor, which all processes ask for together; itself, if it is not sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def laid_out_like(pattern: Tensor, value: Tensor) -> Tensor:
    """The full tensor `value` as `pattern` is kept: its part of it on this process, its device and memory format."""
    if isinstance(pattern, DTensor):
        value = value.to(pattern.device)
        return distribute_tensor(value, pattern.device_mesh, pattern.placements, src_data_rank=None)
    return torch.empty_like(pattern, dtype=value.dtype).copy_(value)


def load(module: nn.Module, state: Mapping[str, Tensor]) -> Any:
    """`module.load_state_dict` of full tensors, whether the module is sharded or not."""
    own = module.state_dict()
    parts = {
        key: laid_out_like(own[key], value) if key in own and is_sharded(own[key]) else value
        for key, value in state.items()
    }
    return module.load_state_dict(parts)
