"""Figures for the model card: what stage 1, `ldm evaluate` and `ldm recover` have measured of the very weights that
are published."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autoencoder.store import weight_hash
from ldm.config import UserError
from pipelines.publishing.card_words import leaf
from pipelines.publishing.publication import Candidate, FinishedRun
from pipelines.stages.vae_recipe import ShowConfig

NAMES = {"psnr_db": "PSNR in dB", "ssim": "SSIM", "lpips": "LPIPS", "mean_iou": "mean IoU"}
NAMES |= {"seam": "step over the edge, of 255 levels,"}
"""How figures are called on a card, by key; others as they are"""
KINDS = {"psnr_db": "psnr", "mean_iou": "mean_iou"}
"""How the hub calls them, by key; others as they are"""


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One figure, with how it was measured."""

    kind: str
    """As the hub calls it: psnr, fid, ..."""
    name: str
    value: float
    data: str
    """Name of the pictures"""
    split: str
    """Of the pictures"""
    protocol: str


def figures_of(candidate: Candidate) -> list[Metric]:
    """All that was measured of these weights and left where the run is.

    Raises:
        UserError: a file in RUN/evaluations can't be read.
    """
    unet = weight_hash(candidate.model.unet.state_dict())
    found = [*reconstructed(candidate.stage1)] if candidate.stage1 else []
    for file in sorted((candidate.run.folder / "evaluations").glob("*.json")):
        found += measured(file, unet)
    return found


def reconstructed(stage1: FinishedRun) -> Iterator[Metric]:
    """What the run that trained the autoencoder measured of it."""
    data, result = stage1.data, stage1.result
    split = result.get("psnr_split") or stage1.show.get("split") or data.split
    count = stage1.show.get("count", ShowConfig().count)
    protocol = f"autoencoder alone; mean over {count} pictures, {data.size} pixels, posterior means"
    for key in ("psnr_db", "ssim", "lpips"):
        if key in result:
            yield metric(key, "of reconstructions", result[key], data.where, split, protocol)


def measured(file: Path, unet: str) -> list[Metric]:
    """The figures in a file that `ldm evaluate` or `ldm recover` wrote, if they are of the U-Net with this hash."""
    try:
        said = json.loads(file.read_text(encoding="utf-8"))
        if said["model"].get("unet_sha256") != unet:
            return []
        return [*(evaluated(said) if "protocol" in said else recovered(said))]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as problem:
        raise UserError(
            f"{file} is no result of ldm evaluate or ldm recover ({problem!r}); measure anew, or remove it."
        ) from None


def evaluated(said: Mapping[str, Any]) -> Iterator[Metric]:
    """Of `ldm evaluate`."""
    protocol, split = in_a_line(said["protocol"]), said["protocol"]["reference"]["split"]
    for key, figure in said["figures"].items():
        error = "" if figure.get("error") is None else f"standard error {figure['error']:.2g}; "
        yield metric(key, "", figure["value"], said["data"], split, error + protocol)


def recovered(said: Mapping[str, Any]) -> Iterator[Metric]:
    """Of `ldm recover`: what the model made good, beside what else there is to compare with."""
    trial, masks = said["trial"], said["task"] == "segment"
    damage = [f"{key} {trial[key]:g}" for key in ("blur", "noise", "jpeg") if key in trial]
    spoiled = f"spoiled by {' and '.join(damage)}" if damage else "spoiled as in training"
    protocol = (
        f"{trial['n']} pictures of {trial['size']} pixels{'' if masks else f' {spoiled}'}, {trial['samples']} samples "
        f"of each, {trial['steps']} steps, guidance {trial['guidance']:g}, {trial['precision']}"
    )
    if masks:
        least = min(said["iou"], key=lambda name: said["iou"][name])
        protocol += f"; the least of a class {said['iou'][least]:.3g} ({least})"
        yield metric("mean_iou", "", said["mean_iou"], trial["data"], trial["split"], protocol)
        return
    where = ", in the hole" if said["task"] == "inpaint" else ""
    compared = {
        name.removesuffix(where): one
        for name, one in said.items()
        if isinstance(one, dict) and name.endswith(where) and name not in ("model", "trial")
    }
    made = compared.pop("made")
    for key, value in made.items():
        beside = [f"{name} {one[key]:.4g}" for name, one in compared.items() if key in one]
        words = f"{protocol}; {', '.join(beside)}"
        yield metric(key, f"of what was made{where}", value, trial["data"], trial["split"], words)


def metric(key: str, of: str, value: float, data: Any, split: str, protocol: str) -> Metric:
    """A figure of pictures `data` of a split, without where they lay on the author's machine."""
    name, where = NAMES.get(key, key.replace("_", " ")), leaf(data, hub=False)
    words = f"{protocol}; split {split} of {where}"
    return Metric(
        kind=KINDS.get(key, key),
        name=f"{name} {of}".strip(),
        value=float(value),
        data=where,
        split=split,
        protocol=words,
    )


def in_a_line(protocol: Mapping[str, Any]) -> str:
    """What a figure depends on; all of it lies in the run's JSON."""
    real = protocol["reference"]
    judges = [f"{name} ({said['weights_sha256'][:12]})" for name, said in protocol["extractors"].items()]
    drawn = ", ".join(f"{key} {protocol[key]}" for key in ("guidance", "sampler", "steps", "seeds"))
    if "interval" in protocol:
        drawn += ", guided where {:g} < sigma / alpha <= {:g}".format(*protocol["interval"])
    drawn += f", reuse {protocol['reuse']}" if protocol.get("reuse", 1) > 1 else ""
    return (
        f"{protocol['n']} pictures of {protocol['size']} against {real['pictures']} (sha256 "
        f"{real['sha256'][:12]}); by {' and '.join(judges) or 'no network'}; {drawn}; "
        f"{protocol['weights']} weights, {protocol['precision']}"
    )
