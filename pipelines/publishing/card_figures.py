"""Figures for the model card: what stage 1 and `ldm evaluate` have measured of the very weights that are published."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from autoencoder.store import weight_hash
from ldm.config import UserError
from pipelines.publishing.card import Metric, leaf

RECONSTRUCTION = {"psnr_db": "psnr", "ssim": "ssim", "lpips": "lpips"}
"""Key of a stage 1 result -> what the hub calls it"""


def reconstructed(stage1: Path | None, autoencoder: str) -> list[Metric]:
    """The figures that stage 1 measured, if its run is there and trained the autoencoder with this hash."""
    if stage1 is None or weight_hash(stage1 / "model") != autoencoder:
        return []
    result = json.loads((stage1 / "result.json").read_text())
    recipe = yaml.safe_load((stage1 / "config.yaml").read_text())
    show, data = recipe["show"], recipe["data"]
    split = result.get("psnr_split") or show.get("split") or data["split"]
    protocol = f"autoencoder alone; mean over {show['count']} pictures of split {split} of "
    protocol += f"{leaf(data['path'], hub=False)}, {data['size']} pixels, posterior means"
    return [
        Metric(kind=kind, name=f"{key} of reconstructions", value=result[key], protocol=protocol)
        for key, kind in RECONSTRUCTION.items()
        if key in result
    ]


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
    drawn += f", reuse {protocol['reuse']}" if protocol.get("reuse", 1) > 1 else ""
    return (
        f"{protocol['n']} pictures of {protocol['size']} against {real['pictures']} of split {real['split']} "
        f"(sha256 {real['sha256'][:12]}); by {' and '.join(judges) or 'no network'}; {drawn}; "
        f"{protocol['weights']} weights, {protocol['precision']}"
    )
