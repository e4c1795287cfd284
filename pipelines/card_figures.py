"""Figures for the model card: what `ldm evaluate` has measured of the very weights that are published."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm.config import UserError
from pipelines.card import Metric


def evaluated(run: Path, unet_sha256: str) -> list[Metric]:
    """The figures in RUN/evaluations of the U-Net with this hash, each with its protocol in a line.

    Raises:
        UserError: a file there can't be read.
    """
    found = []
    for file in sorted((run / "evaluations").glob("*.json")):
        try:
            said = json.loads(file.read_text(encoding="utf-8"))
            if said["model"].get("unet_sha256") == unet_sha256:
                protocol = in_a_line(said["protocol"])
                found += [metric(name, figure, protocol) for name, figure in said["figures"].items()]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as problem:
            raise UserError(f"{file} is no result of ldm evaluate ({problem!r}); remove it.") from None
    return found


def metric(name: str, figure: Mapping[str, Any], protocol: str) -> Metric:
    error = "" if figure.get("error") is None else f"standard error {figure['error']:.2g}; "
    return Metric(
        kind=name, name=name.replace("_", " "), value=float(figure["value"]), protocol=error + protocol
    )


def in_a_line(protocol: Mapping[str, Any]) -> str:
    """What a figure depends on; all of it lies in the run's JSON."""
    real = protocol["reference"]
    judges = [f"{name} ({said['weights_sha256'][:12]})" for name, said in protocol["extractors"].items()]
    drawn = ", ".join(f"{key} {protocol[key]}" for key in ("guidance", "sampler", "steps", "seeds"))
    return (
        f"{protocol['n']} pictures of {protocol['size']} against {real['pictures']} of split {real['split']} "
        f"(sha256 {real['sha256'][:12]}); by {' and '.join(judges) or 'no network'}; {drawn}; "
        f"{protocol['weights']} weights, {protocol['precision']}"
    )
