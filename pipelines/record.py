"""What a picture was drawn from, written inside its PNG file; and the same picture again from that.

Nothing that is written names a folder, a person or a machine.
"""

from __future__ import annotations

import hashlib
import io
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from autoencoder.store import weight_hash
from ldm.conditioning import labels_of, text_of
from ldm.config import UserError
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
    guidance: float
    """Scale of classifier-free guidance"""
    tile: int | None = None
    """Side of the tiles it was decoded in"""
    batch: int = 1
    """Pictures that were drawn together with it, itself included: sums over more are rounded differently"""
    place: int = 0
    """Its place among them, from 0"""
    drawn_on: str
    """Version and kind of device, on which the last bits of a picture depend"""

    def notes(self) -> dict[str, object]:
        """What to write into the file, by key."""
        told = {f.name: getattr(self, f.name) for f in fields(self)}
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
    """On what pictures are drawn now, such as "2.15.0 cpu"."""
    return f"{torch.__version__} {model.device.type}"


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
    numbers = {"seed": int, "steps": int, "guidance": float, "tile": int, "batch": int, "place": int}
    try:
        told: dict[str, Any] = {
            f.name: notes[f.name] for f in fields(Record) if f.name in notes or f.default is MISSING
        }
        record = Record(**told | {key: kind(told[key]) for key, kind in numbers.items() if key in told})
    except KeyError as problem:
        raise UserError(f"{file} does not say from what it was drawn: it has no note {problem}.") from None
    except ValueError as problem:
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
        for name in ("steps", "sampler", "spacing", "guidance", "negative", "tile")
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
