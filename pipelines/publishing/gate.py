"""What a model has to pass before it is published: drawn by stock tools, fit for half precision, no copies."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ldm.config import UserError
from pipelines.latent_diffusion import LatentDiffusion
from pipelines.publishing.samples import Given, Request

TOLERANCE = 2  # of 255, between our picture and that of stock diffusers
HALF = 65504.0  # the largest float16
SECONDS = 3600
DRAW = Path(__file__).parent / "shipped" / "draw.py"


def require_diffusers() -> None:
    """UserError if stock diffusers is not there."""
    if importlib.util.find_spec("diffusers") is None:
        raise UserError(
            "Publishing opens the model in stock diffusers first, which is not installed; run: pip install diffusers"
        )


@dataclass(frozen=True, kw_only=True)
class Built:
    """The files of a model as they will be published."""

    folder: Path
    pipeline: str
    """The class in model_index.json"""
    half: bool
    """Whether there are float16 weights too"""


class Drawn(NamedTuple):
    """What stock diffusers has drawn."""

    images: list[Image.Image]
    halved: list[Image.Image] | None
    """The same with float16 weights, if there are such"""
    version: str
    """That of diffusers"""


def drawn_by_stock(built: Built, request: Request) -> Drawn:
    """Pictures of what was built, drawn in a process without our packages, the token or the network.

    Raises:
        UserError: it could not; says why.
    """
    unsaid = ("TOKEN", "SECRET", "PASSWORD", "KEY")
    environment = {k: v for k, v in os.environ.items() if not any(word in k.upper() for word in unsaid)}
    environment |= {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    environment.pop("PYTHONPATH", None)
    with tempfile.TemporaryDirectory(prefix="ldm-stock-") as scratch:
        out = Path(scratch)
        (out / "request.json").write_text(json.dumps(asked(built, request, out)))
        command = [sys.executable, "-s", str(DRAW), str(out / "request.json")]
        try:
            child = subprocess.run(
                command, cwd=out, env=environment, capture_output=True, text=True, timeout=SECONDS
            )
        except subprocess.TimeoutExpired:
            raise UserError(
                f"Stock diffusers did not draw {request.count} pictures within {SECONDS:,} seconds, so nothing was "
                "published; draw fewer, with --prompt, or on a faster machine."
            ) from None
        if child.returncode:
            lines = child.stderr.strip().splitlines() or [f"exit code {child.returncode}"]
            raise UserError(
                f"Stock diffusers can't draw with this model, so nothing was published: {lines[-1]}"
            )
        drawn = {
            name: [Image.open(out / name / f"{i}.png").convert("RGB") for i in range(request.count)]
            for name in variants(built)
        }
        return Drawn(drawn["full"], drawn.get("fp16"), (out / "version").read_text())


def variants(built: Built) -> dict[str, str | None]:
    """Which weights there are, by the name of a folder for what is drawn with them."""
    return {"full": None} | ({"fp16": "fp16"} if built.half else {})


def asked(built: Built, request: Request, out: Path) -> dict[str, Any]:
    """What the process is told."""
    words = {"prompt": request.prompts, "class_labels": request.classes}
    return {
        "folder": str(built.folder.resolve()),
        "kind": built.pipeline,
        "variants": variants(built),
        "words": {name: said for name, said in words.items() if said},
        "given": [handed(one, out / f"given-{i}") for i, one in enumerate(request.given)],
        "seeds": [request.seed + i for i in range(request.count)],
        "steps": request.steps,
        "guidance": request.guidance,
        "out": str(out),
        "threads": torch.get_num_threads(),
    }


def handed(given: Given, stem: Path) -> list[str]:
    """Write what a task is given into files; their names."""
    files = {f"{stem}-{i}.png": image for i, image in enumerate(given) if image}
    for file, image in files.items():
        image.save(file)
    return [*files]


def furthest(ours: Sequence[Image.Image], theirs: Sequence[Image.Image]) -> int:
    """The largest difference of two lists of pictures in any channel of any pixel, of 255."""
    pairs = zip(ours, theirs, strict=True)
    return max(int(np.abs(np.asarray(a).astype(int) - np.asarray(b).astype(int)).max()) for a, b in pairs)


def require_same(ours: Sequence[Image.Image], theirs: Sequence[Image.Image]) -> int:
    """The largest difference; UserError if it is above the tolerance."""
    difference = furthest(ours, theirs)
    if difference > TOLERANCE:
        raise UserError(
            f"Stock diffusers draws other pictures than the trainer (they differ by {difference} of 255, at most "
            f"{TOLERANCE} is allowed), so nothing was published; check the versions of diffusers and transformers."
        )
    return difference


@contextmanager
def largest_activations(**networks: nn.Module) -> Iterator[dict[str, float]]:
    """While open, the largest magnitude that each module has put out, by name."""
    seen: dict[str, float] = {}
    handles = []

    def watch(name: str) -> Any:
        def note(module: nn.Module, inputs: Any, output: Any) -> None:
            for value in output if isinstance(output, tuple | list) else (output,):
                if isinstance(value, Tensor) and value.is_floating_point() and value.numel():
                    top = float(value.detach().abs().max())
                    seen[name] = max(seen.get(name, 0.0), top if math.isfinite(top) else math.inf)

        return note

    for part, network in networks.items():
        for name, module in network.named_modules():
            handles.append(module.register_forward_hook(watch(f"{part}.{name}".rstrip("."))))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True, kw_only=True)
class HalfScan:
    """How near a model comes to the largest float16, in weights and in what its modules put out."""

    largest: float
    where: str

    @property
    def safe(self) -> bool:
        return self.largest < HALF


def scan_half(
    model: LatentDiffusion, draw: Callable[[LatentDiffusion], list[Image.Image]]
) -> tuple[HalfScan, list[Image.Image]]:
    """Draw in float32 and watch every module; also gives the pictures."""
    plain = replace(
        model, precision="f32", fast=False, reuse=1
    )  # prepared networks call few of their modules
    networks = {"unet": model.unet, "vae": model.autoencoder, "text_encoder": model.conditioner}
    with largest_activations(**networks) as seen:
        images = draw(plain)
    for part, network in networks.items():
        for name, weight in network.named_parameters():
            top = float(weight.detach().abs().max())
            seen[f"{part}.{name}"] = max(
                top if math.isfinite(top) else math.inf, seen.get(f"{part}.{name}", 0.0)
            )
    where = max(seen, key=lambda name: seen[name])
    return HalfScan(largest=seen[where], where=where), images


def require_half(scan: HalfScan) -> None:
    """UserError if float16 can't hold a model."""
    if not scan.safe:
        raise UserError(
            f"{scan.where} reaches {scan.largest:.3g}, more than float16 can hold (65504), so nothing was "
            "published; give --no-half to publish float32 alone."
        )


@dataclass(frozen=True, kw_only=True)
class Proof:
    """What was found before a model was published."""

    request: Request
    """What was drawn"""
    scan: HalfScan
    difference: int
    """Largest, of 255, between our pictures and those of stock diffusers"""
    halved: int | None
    """The same with float16 weights, which are computed with in float32; None if there are none"""
    diffusers: str
    """Its version"""


def prove(built: Built, request: Request, images: Sequence[Image.Image], scan: HalfScan) -> Proof:
    """Have stock diffusers draw what we drew as `images`; UserError if it draws something else."""
    theirs = drawn_by_stock(built, request)
    difference = require_same(images, theirs.images)
    print(f"     largest difference from the trainer's pictures: {difference} of 255")
    halved = furthest(images, theirs.halved) if theirs.halved else None
    if halved is not None:
        print(f"     with float16 weights: {halved} of 255")
    return Proof(request=request, scan=scan, difference=difference, halved=halved, diffusers=theirs.version)
