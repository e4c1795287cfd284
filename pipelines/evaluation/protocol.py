"""How figures were measured: what has to be equal before two of them may be compared."""

from __future__ import annotations

import importlib.metadata
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from ldm.config import flat
from ldm.device import Precision

OURS = "ldm-from-scratch"
PACKAGES = (OURS, "torch", "torchvision", "torchmetrics", "torch-fidelity", "transformers", "pillow")
RESIZE = "Lanczos with antialiasing, cropped in the middle"
"""How `Source.picture` brings real pictures to the size of drawn ones"""


def versions(device: torch.device) -> dict[str, str]:
    """Of the packages that figures depend on, our own with its commit, and the kind of device."""
    found = {name: importlib.metadata.version(name) for name in PACKAGES if installed(name)}
    if known := commit(Path(__file__).parents[2]):
        found[OURS] = f"{found.get(OURS, 'not installed')}, commit {known}"
    return found | {"device": device.type}


@cache
def commit(folder: Path) -> str:
    """The commit of a git checkout, with "-dirty" if files differ from it; "" if the folder is none.

    Asked once a process, as what runs is what was read then.
    """
    if not (folder / ".git").exists():  # a checkout of something else may lie around an installed package
        return ""
    words = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git here, or a checkout that it refuses to read
        return ""


def installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def precision(device: torch.device, drawn: Precision = "f32") -> str:
    """What is computed in, where that is less than float32 too; pictures may be drawn in another."""
    said, fast = "float32", torch.get_float32_matmul_precision()
    if fast != "highest":
        said += f", products of matrices in {fast} precision"
    if device.type == "cuda" and torch.backends.cudnn.allow_tf32:
        said += ", convolutions in TF32"
    return said if drawn == "f32" else f"drawn in {drawn}, measured in {said}"


def differing(one: dict[str, Any], other: dict[str, Any], but: Sequence[str] = ()) -> list[str]:
    """Fields in which two protocols differ, each as "guidance: 4.0 and 2.0"; without `but` and what lies below them."""
    mine, theirs = flat(one), flat(other)
    return [
        f"{name}: {mine.get(name)} and {theirs.get(name)}"
        for name in sorted(mine.keys() | theirs.keys())
        if mine.get(name) != theirs.get(name)
        and not any(name == field or name.startswith(f"{field}.") for field in but)
    ]
