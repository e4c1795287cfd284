"""What a picture was drawn from, written inside its PNG file; and the same picture again from that.

Nothing that is written names a folder, a person or a machine.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from autoencoder.store import weight_hash
from ldm.conditioning import labels_of, text_of
from ldm.config import UserError
from ldm.guidance import Guidance, Projection, Threshold
from ldm.pictures import Stored, content, decoded
from pipelines.inputs import MEGAPIXELS
from pipelines.latent_diffusion import LatentDiffusion

VERB = "ldm generate"
LARGEST_BATCH = 4096
"""Pictures drawn together: a file that says more is not believed"""


@dataclass(frozen=True, kw_only=True)
class Record:
    """All that drawing a picture takes, besides the model and the size, which is the picture's."""

    model: str
    """Name of the model's folder, or on the hub"""
    model_sha256: str
    """`fingerprint` of the model"""
    prompt: str | None = None
    """Caption or name of a class; None for a model that is told nothing"""
    class_name: str | None = None
    """For a model of both"""
    negative: str = ""
    """Caption to be guided away from"""
    seed: int
    """Of this picture"""
    steps: int
    """Sampling steps"""
    sampler: str
    """One of `ldm.samplers.SAMPLERS`"""
    spacing: str | None = None
    """Of the steps; None for the usual one"""
    guidance: float | Guidance
    """Of classifier-free guidance"""
    eta: float | None = None
    """Share of the noise that was renewed, where the sampler leaves it open"""
    tile: int | None = None
    """Side of the tiles it was decoded in"""
    batch: int = 1
    """Pictures that were drawn together with it, itself included: sums over more are rounded differently"""
    place: int = 0
    """Its place among them, from 0"""
    drawn_on: str
    """Version and kind of device, on which the last bits of a picture depend"""
    watermark: str | None = None
    """What was put into its pixels after it was drawn"""

    def notes(self) -> dict[str, object]:
        """What to write into the file, by key."""
        told = {f.name: getattr(self, f.name) for f in fields(self)}
        told["guidance"] = guidance_note(self.guidance)
        return {"made_by": VERB} | {key: value for key, value in told.items() if value is not None}


def fingerprint(model: LatentDiffusion) -> str:
    """SHA-256 over everything that drawing depends on: weights, vocabulary, classes, path, prediction, sampler."""
    parts = (model.unet, model.autoencoder, model.conditioner)
    text, labels, grid = text_of(model.conditioner), labels_of(model.conditioner), model.path.grid(10)
    said = [
        *(weight_hash(part.state_dict()) for part in parts),
        text.vocabulary_hash() if text else None,
        labels.classes if labels else None,
        (model.path.kind, grid.t.tolist(), grid.sigma.tolist()),
        (model.prediction.name, model.sampler, model.spacing),
    ]
    return hashlib.sha256(repr(said).encode()).hexdigest()


def arithmetic(model: LatentDiffusion) -> str:
    """On what pictures are drawn now, and how if not exactly, such as "2.15.0 cpu" or "2.15.0 cpu bf16 reuse 2"."""
    words = [torch.__version__, model.device.type]
    words += [model.precision] if model.precision != "f32" else []
    return " ".join([*words, *(["reuse", str(model.reuse)] if model.reuse > 1 else [])])


def guidance_note(guidance: float | Guidance) -> str:
    """A scale as a number, more as JSON: what differs from plain guidance."""
    if not isinstance(guidance, Guidance):
        return json.dumps(guidance)
    usual = asdict(Guidance())
    return json.dumps({name: value for name, value in asdict(guidance).items() if value != usual[name]})


def guidance_of(note: str) -> float | Guidance:
    """The inverse of `guidance_note`; ValueError or TypeError for anything else."""
    said = json.loads(note)
    if not isinstance(said, dict):
        return float(said)
    groups = {"projection": Projection, "threshold": Threshold}
    told = {name: groups[name](**value) if name in groups else value for name, value in said.items()}
    return Guidance(**told | ({"interval": tuple(said["interval"])} if "interval" in said else {}))


def read_record(file: Path) -> tuple[Record, Image.Image]:
    """What is written inside a picture that `ldm generate` made, and the picture.

    Raises:
        UserError: the file is no picture, or does not say what it was drawn from.
    """
    data = content(Stored(str(file), path=str(file)))
    picture = decoded(str(file), data, MEGAPIXELS).image
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        notes = {key: str(value) for key, value in getattr(image, "text", {}).items()}
    if (made_by := notes.get("made_by", VERB)) != VERB:
        raise UserError(
            f"{file} was made by {made_by}; only what {VERB} made is drawn again from its file alone."
        )
    kinds: dict[str, Callable[[Any], Any]] = {
        "seed": int,
        "steps": int,
        "tile": int,
        "batch": int,
        "place": int,
    }
    kinds |= {"guidance": guidance_of, "eta": float}
    try:
        told: dict[str, Any] = {
            f.name: notes[f.name] for f in fields(Record) if f.name in notes or f.default is MISSING
        }
        record = Record(**told | {key: kind(told[key]) for key, kind in kinds.items() if key in told})
    except KeyError as problem:
        raise UserError(f"{file} does not say from what it was drawn: it has no note {problem}.") from None
    except (ValueError, TypeError) as problem:
        raise UserError(f"{file} says nonsense about how it was drawn: {problem}.") from None
    if not 0 <= record.place < record.batch <= LARGEST_BATCH:
        raise UserError(f"{file} says that it was number {record.place} of {record.batch} pictures.")
    return record, picture


def recreate(model: LatentDiffusion, record: Record, size: tuple[int, int]) -> Image.Image:
    """The picture again: bit for bit, on the same machine and versions.

    It is drawn among as many as it was, all of them itself.
    """
    told = {
        name: getattr(record, name)
        for name in ("steps", "sampler", "spacing", "guidance", "negative", "tile", "eta")
    }
    prompts = None if record.prompt is None else [record.prompt]
    images = model(
        prompts,
        classes=record.class_name,
        n=record.batch,
        seed=[record.seed] * record.batch,
        size=size,
        batch=record.batch,
        **told,
    )
    return images[record.place]
