"""The sentences of a model card that depend on what is published, and what of a recipe may be said."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from ldm.data import DataConfig
from ldm.palette import palette
from ldm.tasks import Inpaint, Restore, Segment, Task, Upscale
from pipelines.evaluation.memorisation import Copies
from pipelines.publishing.gate import Proof
from pipelines.publishing.publication import Candidate, FinishedRun

UNPUBLISHED = ("out", "tracker")
"""Settings of a run that are nobody else's business"""
PLACES = {"path": False, "masks": False, "weights": False} | dict.fromkeys(
    ("autoencoder", "start", "encoder", "encoder_2"), True
)
"""Settings that may name a file or folder of the author -> whether names on the hub are told from those"""


def does(candidate: Candidate) -> str:
    """What the model does, after "A latent diffusion model that"."""
    task, size, classes = candidate.model.task, pixels(candidate.run.data), len(candidate.classes)
    if task is None:
        told = {"text": " from captions", "none": " of one kind"}
        told |= {"class": f" of {classes} classes", "class+text": f" of {classes} classes from captions"}
        return f"draws {size} pictures{told[candidate.words]}"
    told = {"text": ", told by captions", "none": "", "class": ", told by the names of classes"}
    told["class+text"] = ", told by captions and the names of classes"
    if isinstance(task, Inpaint):
        what = "fills holes in pictures"
    elif isinstance(task, Upscale):
        what = f"makes pictures {task.factor} times as wide and high"
    elif isinstance(task, Restore):
        what = f"removes {listed(damage(task))} from pictures"
    else:
        what = f"says what each pixel of a picture shows, by one of {len(task.classes)} colours"
    return f"{what}{told[candidate.words]}; it was trained on {size} pictures"


def pixels(data: DataConfig) -> str:
    """How large pictures of training are."""
    return f"{data.size} x {data.size} pixel" if not data.bucket_step else f"{data.size**2:,} pixel"


def prepared(data: DataConfig) -> str:
    """What was done to the pictures of training."""
    square = f"{data.size} x {data.size} pixels"
    shape = f"the area of {square}, of several shapes" if data.bucket_step else square
    return f"Brought to {shape}{', half of them mirrored' if data.flip else ''}."


def damage(task: Restore) -> list[str]:
    """What the task undoes, in words."""
    names = {"blur": "blur", "noise": "noise", "jpeg": "JPEG artefacts"}
    return [name for key, name in names.items() if getattr(task, key) is not None]


def listed(words: Sequence[str]) -> str:
    """a, b and c"""
    return " and ".join([*([", ".join(words[:-1])] if words[1:] else []), words[-1]])


def beginnings(candidate: Candidate) -> str:
    """What the weights were before training."""
    run, others = candidate.run, []
    if start := run.recipe.get("start"):
        others += [f"of the U-Net and of what it is told, which were trained on from {leaf(start)}"]
    taken = [run.text[key] for key in ("encoder", "encoder_2") if run.text.get(key)]
    if taken and run.text.get("weights", "pretrained") == "pretrained" and "text" in candidate.words:
        others += [f"of the text encoder {listed([leaf(one) for one in taken])}, which was taken as it is"]
    if candidate.stage1 is None:
        others += [f"of the autoencoder {leaf(run.autoencoder)}, which was taken as it is"]
    elif start := candidate.stage1.recipe.get("start"):
        others += [f"of the autoencoder, which was trained on from {leaf(start)}"]
    if others:
        return f"Its weights began as random numbers, except those {listed(others)}."
    return "It was trained from zero: all weights began as random numbers."


def training(candidate: Candidate) -> list[str]:
    """How long each stage was trained, and what its weights are averages of."""
    stages: dict[str, FinishedRun] = {"U-Net": candidate.run} | (
        {"Autoencoder": candidate.stage1} if candidate.stage1 else {}
    )
    return [
        f"{part}: {run.steps:,} optimizer steps of {run.batch} samples in {run.seconds / 60:.1f} minutes (wall clock, "
        f"all restarts included); the weights are averages over them (exponential moving average, decay {run.ema:g})."
        for part, run in stages.items()
    ]


def about_copies(copies: Copies | None, task: Task | None) -> str:
    if isinstance(task, Segment):
        return "Not looked for: the model makes masks."
    if copies is None:
        return "Not looked for: the training pictures were not at hand when the model was published."
    return (
        f"{len(copies.which)} of {copies.total} drawn pictures are copies, in the sense of Carlini et al. 2023 "
        f"(nearer to one of {copies.compared:,} training pictures, or its mirror image, than half the mean distance to "
        "the 50 nearest; pixels at 32 x 32). Near repetitions in the training data hide copies from this test."
    )


def about_half(proof: Proof) -> str:
    """Which precisions are safe."""
    largest = (
        f"The largest magnitude of a weight or an activation was {proof.scan.largest:.4g}, in `{proof.scan.where}`, "
        "over the pictures that were drawn before publishing; float16 ends at 65504."
    )
    if proof.halved is None:
        return f"Use float32 or bfloat16. {largest}"
    return (
        'There are float16 weights too (`variant="fp16"`); computed in float32 they draw the same pictures up to '
        f"{proof.halved} of 255. {largest}"
    )


def limits(candidate: Candidate) -> str:
    """What the model can't do, as far as the recipe tells."""
    data, task, words, classes = candidate.run.data, candidate.model.task, candidate.words, candidate.classes
    known = []
    if "text" in words:
        known += ["It knows the words and things of its training captions and no others."]
    if "class" in words:
        known += [f"It knows {len(classes)} classes: {', '.join(classes)}."]
    if words == "none" and task is None:
        known += ["It can't be told what to draw."]
    if isinstance(task, Segment):
        named = zip(task.classes, palette(len(task.classes)).tolist(), strict=True)
        colours = ", ".join(f"{name} `rgb{tuple(colour)}`" for name, colour in named)
        known += [f"It knows {len(task.classes)} classes, the nearest of these colours each: {colours}."]
        known += ["It names one of these wherever something else is, and may be wrong."]
    elif task:
        known += ["What it adds to a picture is guessed, and no record of what was there."]
    else:
        known += ["What it draws is no record of anything real."]
    others = "" if data.bucket_step else ", or of other proportions,"
    known += [
        f"Pictures much larger or smaller than {data.size} x {data.size} pixels{others} are outside of what it was "
        "trained on. It repeats the prejudices of its data."
    ]
    return " ".join(known)


def published_recipe(recipe: dict[str, Any]) -> str:
    """The resolved recipe as YAML, without where things lay on the author's machine."""

    def cleaned(key: str, value: Any) -> Any:
        if isinstance(value, dict):
            return {name: cleaned(name, one) for name, one in value.items() if name not in UNPUBLISHED}
        named = key in PLACES and isinstance(value, str | list)  # `loss.gan.start` is a step
        return leaf(value, hub=PLACES[key]) if named else value

    return yaml.safe_dump(cleaned("", recipe), sort_keys=False, allow_unicode=True, width=100)


def leaf(name: str | Sequence[str], hub: bool = True) -> str:
    """The last part of a path, or of each; names within packages as they are, and names on the hub: those after hub:,
    and where `hub` says so all of two parts that are nothing here."""
    if not isinstance(name, str):
        return ", ".join(leaf(one, hub) for one in name)
    if name.startswith(("hub:", "package:")):
        return name
    path = Path(name).expanduser()
    local = (
        path.is_absolute() or name.startswith((".", "~")) or path.exists() or len(path.parts) != 2 or not hub
    )
    return PurePosixPath(path.as_posix()).name if local else name
