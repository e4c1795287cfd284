"""Would somebody name what was drawn? `ldm recognise`: drawn pictures before a classifier of the real ones."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import torch

from autoencoder.files import require_writable, write_text
from ldm.checks import require_int
from ldm.conditioning import ClassAndText, ClassLabels
from ldm.config import UserError
from ldm.data import DataConfig, Source, open_source
from ldm.inspection import sound
from ldm.pictures import to_tensor
from pipelines.evaluation.classifier import train_recogniser
from pipelines.evaluation.generation import Drawing
from pipelines.latent_diffusion import LatentDiffusion, best_device
from pipelines.safety import provenance
from pipelines.sheets import contact_sheet, sheet_beside


def recognise(model: str, path: str, out: Path, each: int, drawing: Drawing) -> None:
    """Draw `each` pictures for every class, and write what share of them a classifier names rightly to `out`.

    Raises:
        UserError: the data has no classes, or a class has no single caption to draw it from.
        ValueError: the model can't draw so.
    """
    sheet = sheet_beside(out)
    require_int("each", each, 1, 2**31)
    drawer = drawing.by(LatentDiffusion.from_pretrained(model).to(best_device()))
    side = drawer.latent_shape(None)[1] * drawer.autoencoder.config.factor
    data = DataConfig(path=path, size=side)
    source = sound(open_source(data))
    prompts = (
        list(source.classes) if isinstance(drawer.conditioner, ClassLabels) else captions_of_classes(source)
    )
    require_writable(out.parent)
    recogniser = train_recogniser(data)
    classes = source.classes if isinstance(drawer.conditioner, ClassAndText) else None
    images = drawer(
        prompts,
        classes=classes,
        n=each,
        batch=32,
        progress=True,
        steps=drawing.steps,
        sampler=drawing.sampler,
        guidance=drawing.guided(drawer),
        seed=drawing.seed,
    )
    truth = [name for name in recogniser.classes for _ in range(each)]
    named = recogniser.names(torch.stack([to_tensor(image) for image in images]))
    right = [name == true for name, true in zip(named, truth, strict=True)]
    missed = sorted(
        {f"{true} taken for {name}" for name, true in zip(named, truth, strict=True) if name != true}
    )
    result = {
        "recognised": sum(right) / len(right),
        "pictures": len(right),
        "classes": len(recogniser.classes),
        "classifier_accuracy": recogniser.accuracy,
        "missed": missed,
        "drawing": asdict(drawing) | {"sampler": drawing.sampler or drawer.sampler},
    }
    write_text(out, json.dumps(result, indent=1) + "\n")
    shown = contact_sheet(
        images[::each], prompts, columns=10, tile=96, wrong=[not ok for ok in right[::each]]
    )
    shown.save(sheet, pnginfo=provenance(made_by="ldm recognise", model=Path(model).name))
    print(
        f"{result['recognised']:.1%} of {len(right)} pictures are recognised; the classifier names "
        f"{', '.join(f'{share:.1%} of {split}' for split, share in recogniser.accuracy.items())} rightly. See {sheet}"
    )


def captions_of_classes(source: Source) -> list[str]:
    """The caption of each class; UserError if the pictures of a class have several."""
    if source.texts is None or source.labels is None:
        raise UserError("The data has no captions and classes to go by; set data.text and data.label.")
    captions: list[str] = []
    for number, name in enumerate(source.classes):
        found = {source.texts[i] for i in torch.nonzero(source.labels == number).flatten().tolist()}
        if len(found) != 1:
            raise UserError(
                f"Class {name!r} has {len(found)} different captions: which one stands for it is not clear."
            )
        captions += found
    return captions
