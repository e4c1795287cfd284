"""How figures were measured: what has to be equal before two of them may be compared."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from typing import Any

import torch

from ldm.config import flat

PACKAGES = ("torch", "torchvision", "torchmetrics", "torch-fidelity", "transformers", "pillow")
RESIZE = "Lanczos with antialiasing, cropped in the middle"
"""How `Source.picture` brings real pictures to the size of drawn ones"""


def versions(device: torch.device) -> dict[str, str]:
    """Of the packages that figures depend on, and the kind of device."""
    found = {name: importlib.metadata.version(name) for name in PACKAGES if installed(name)}
    return found | {"device": device.type}


def installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def precision() -> str:
    """What products of float32 matrices are computed in."""
    fast = torch.get_float32_matmul_precision()
    return "float32" if fast == "highest" else f"float32, products of matrices in {fast} precision"


def differing(one: dict[str, Any], other: dict[str, Any], but: Sequence[str] = ()) -> list[str]:
    """Fields in which two protocols differ, each as "guidance: 4.0 and 2.0"; without `but` and what lies below them."""
    mine, theirs = flat(one), flat(other)
    return [
        f"{name}: {mine.get(name)} and {theirs.get(name)}"
        for name in sorted(mine.keys() | theirs.keys())
        if mine.get(name) != theirs.get(name)
        and not any(name == field or name.startswith(f"{field}.") for field in but)
    ]
