"""`ldm recover`: pictures of a set are spoiled, made good by a model, and compared with the truth."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from autoencoder.files import write_text
from autoencoder.metrics import likeness, psnr
from autoencoder.store import weight_hash
from ldm.checks import require_int
from ldm.conditioning import Unconditional
from ldm.config import UserError
from ldm.data import open_source
from ldm.device import Precision
from ldm.inspection import sound
from ldm.masks import Masks
from ldm.pictures import to_images, to_tensor
from ldm.tasks import Inpaint, Restore, Segment, Task, Upscale
from pipelines.examples import Examples
from pipelines.latent_diffusion import LatentDiffusion, best_device
from pipelines.safety import provenance
from pipelines.sheets import sheet_beside
from pipelines.stages.stage_one import data_at
from pipelines.tasks import restore, voted

SHOWN = 16
"""Pictures on the sheet"""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What a model is tried on."""

    model: str
    """A run folder, a stock folder, or a hub name"""
    data: str | None = None
    """The pictures; by default those that the run was trained on"""
    split: str = "test"
    """Of the pictures"""
    n: int = 64
    """How many"""
    samples: int = 1
    """Drawn of each picture and averaged, or for masks put to the vote"""
    steps: int = 30
    """Sampling steps"""
    guidance: float = 1.0
    """Scale of guidance; 1 is none"""
    masks: str | None = None
    """For segmentation: where the true masks are, as `segment.masks` of a recipe"""
    seed: int = 0
    """Of what is spoiled, and of what is drawn"""
    precision: Precision = "f32"
    """Of drawing; likewise reuse, as `LatentDiffusion` has them"""
    reuse: int = 1
    blur: float | None = None
    """For restoration: this damage alone, of this strength, instead of all that the model was
    trained on; likewise noise and jpeg"""
    noise: float | None = None
    jpeg: float | None = None

    def __post_init__(self) -> None:
        require_int("n", self.n, 1, 2**31)
        require_int("samples", self.samples, 1, 1000)
        require_int("seed", self.seed, 0, 2**62)

    def task(self, trained: Task | None) -> Task:
        """What pictures are spoiled by, for a model that was trained for a task; UserError if nothing says how."""
        if isinstance(trained, Upscale):
            trained = replace(trained, noise=0.0)  # of which there is none in a small picture
        if isinstance(trained, Segment):
            trained = replace(trained, masks=self.masks)
        chosen = {name: getattr(self, name) for name in ("blur", "noise", "jpeg")}
        if isinstance(trained, Inpaint):
            trained = replace(trained, whole=0.0)  # with nothing known there is nothing to compare
        if all(strength is None for strength in chosen.values()):
            if trained is None:
                raise UserError(
                    f"{self.model} was trained to draw; give --noise or --jpeg, which it can remove."
                )
            return replace(trained, share=1.0) if isinstance(trained, Restore) else trained
        if trained is None and self.blur is not None:
            raise UserError(
                f"{self.model} was trained to draw, by which no blur is undone; leave out --blur."
            )
        if trained is not None and not isinstance(trained, Restore):
            raise UserError(
                f"{self.model} was trained to {trained.kind} pictures; leave out the damage to others."
            )
        ranges = {name: None if s is None else (s, s) for name, s in chosen.items()}
        return Restore(**ranges, share=1.0)


def recover(trial: Trial, out: Path) -> dict[str, Any]:
    """Figures of the first pictures of a split, written to `out`, with a sheet of some beside it."""
    sheet = sheet_beside(out)
    model = LatentDiffusion.from_pretrained(trial.model).to(best_device())
    model = replace(model, precision=trial.precision, reuse=trial.reuse)
    if trial.guidance != 1 and isinstance(model.conditioner, Unconditional):
        raise UserError(
            f"--guidance is {trial.guidance:g}, but this model is told nothing to be guided by; leave it out."
        )
    task = trial.task(model.task)
    config = data_at(trial.data, trial.model)
    source = sound(open_source(config, trial.split))
    wanted: Any = Masks(source, task) if isinstance(task, Segment) else source
    examples = Examples.of(model, task, source, wanted, range(min(trial.n, len(source))), trial.seed)
    drawn = drawn_of(trial, model, examples)
    if isinstance(task, Segment):
        figures, shown = segmented(task, drawn, wanted)
    else:
        figures, shown = compared(examples, drawn.mean(0), model), drawn.mean(0)
    about = {name: value for name, value in vars(trial).items() if value is not None and name != "model"}
    about |= {"data": config.where, "n": len(drawn[0]), "size": config.size}
    tried = {"name": Path(trial.model).name, "unet_sha256": weight_hash(model.unet.state_dict())}
    said = {"task": task.kind, **figures, "trial": about, "model": tried}
    write_text(out, json.dumps(said, indent=1) + "\n")
    note = provenance(made_by="ldm recover", model=tried["name"])
    examples.sheet(shown, SHOWN).save(sheet, pnginfo=note)
    return figures


def drawn_of(trial: Trial, model: LatentDiffusion, examples: Examples) -> Tensor:
    """What the model makes of the examples, [samples,N,3,H,W]; of a model that draws, the mean of its samples."""
    settings: dict[str, Any] = {"steps": trial.steps, "guidance": trial.guidance}
    if model.task:
        seeds = [trial.seed + i * len(examples.wanted) for i in range(trial.samples)]
        return torch.stack([examples.made(model, seed, **settings) for seed in seeds])
    damage: dict[str, Any] = {"noise": trial.noise, "jpeg": trial.jpeg and round(trial.jpeg)}
    settings |= {"samples": trial.samples, "seed": trial.seed}
    pictures = to_images(examples.given["picture"])
    return torch.stack([to_tensor(restore(model, one, **damage, **settings)) for one in pictures])[None]


def compared(examples: Examples, made: Tensor, model: LatentDiffusion) -> dict[str, Any]:
    """What was made, what was given, and what the autoencoder alone leaves of the truth, each against the truth."""
    truth = examples.wanted
    left = [model.decode(model.encode(some.to(model.device))).cpu() for some in truth.split(32)]
    figures: dict[str, Any] = {"made": likeness(made, truth, None)}
    if isinstance(examples.task, Inpaint):
        hole = examples.given["mask"]
        filled = mean_filled(truth, hole)
        figures["made, in the hole"] = {"psnr_db": inside(made, truth, hole), "seam": seam(made, hole)}
        figures["the mean, in the hole"] = {
            "psnr_db": inside(filled, truth, hole),
            "seam": seam(filled, hole),
        }
        figures["the truth, in the hole"] = {"seam": seam(truth, hole)}
    else:
        name = "bicubic" if isinstance(examples.task, Upscale) else "given"
        figures[name] = likeness(examples.seen().clamp(-1, 1), truth, None)
    return figures | {"autoencoder alone": likeness(torch.cat(left).clamp(-1, 1), truth, None)}


def mean_filled(truth: Tensor, hole: Tensor) -> Tensor:
    """Pictures [N,3,H,W] with the mean colour of what is known where `hole` [N,1,H,W] is 1."""
    known = 1 - hole
    mean = (truth * known).sum((2, 3), keepdim=True) / known.sum((2, 3), keepdim=True)
    return truth * known + mean * hole


def inside(made: Tensor, truth: Tensor, hole: Tensor) -> float:
    """Mean PSNR in dB over the pixels in the holes alone."""
    share = hole.mean((1, 2, 3))
    whole = psnr(made * hole, truth * hole)  # no error outside
    return float((whole + 10 * torch.log10(share)).mean())


def seam(pixels: Tensor, hole: Tensor) -> float:
    """Mean difference, of 255, between neighbouring pixels on the two sides of a hole's edge."""
    steps = []
    for axis in (2, 3):
        edge = hole.diff(dim=axis).abs().expand(-1, 3, -1, -1) > 0
        steps.append(pixels.diff(dim=axis).abs()[edge])
    return round(float(torch.cat(steps).mean()) * 127.5, 2)


def segmented(task: Segment, drawn: Tensor, wanted: Masks) -> tuple[dict[str, Any], Tensor]:
    """Intersection over union of each class over all pictures, and the masks voted for, as colours [N,3,H,W].

    Args:
        drawn: [samples,N,3,H,W].
    """
    size, classes = drawn.shape[-1], task.classes
    found = [voted(drawn[:, i], classes) for i in range(drawn.shape[1])]
    numbers = np.stack([one.numbers for one in found])
    truth = np.stack([wanted.mask(i, size) for i in range(len(found))])
    overlap = {}
    for number, name in enumerate(classes):
        either = (numbers == number) | (truth == number)
        if either.any():
            both = (numbers == number) & (truth == number)
            overlap[name] = round(float(both.sum() / either.sum()), 4)
    confidence = np.stack([one.confidence for one in found])
    right = numbers == truth
    figures = {
        "mean_iou": round(float(np.mean([*overlap.values()])), 4),
        "iou": overlap,
        "pixels_right": round(float(right.mean()), 4),
        "confidence_where_right": round(float(confidence[right].mean()), 4),
        "confidence_where_wrong": round(float(confidence[~right].mean()), 4) if not right.all() else None,
    }
    shown = torch.stack([to_tensor(one.picture().convert("RGB")) for one in found])
    return figures, shown
