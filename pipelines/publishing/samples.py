"""What is drawn of a model before it is published: told which words, and for a task of which pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldm import random
from ldm.config import UserError
from ldm.data import DataConfig, open_source
from ldm.degradations import smaller
from ldm.pictures import to_images, to_tensor
from ldm.tasks import Inpaint, Restore, Task, Upscale, random_hole
from pipelines.examples import Examples
from pipelines.inputs import read_picture
from pipelines.latent_diffusion import LatentDiffusion
from pipelines.publishing.publication import Candidate, Publication
from pipelines.safety import provenance
from pipelines.stages.showing import ShowConfig, prompts_to_show

COUNT = 4
"""Pictures, if nobody says how many"""
MANY = 8
"""Captions or classes, if nobody says which"""
MOST = 100
"""Pictures: their names have two digits"""


class Given(NamedTuple):
    """What a task is given of a picture."""

    picture: Image.Image
    hole: Image.Image | None = None
    """Of inpainting, white where to draw"""


@dataclass(frozen=True, kw_only=True)
class Request:
    """Pictures to be drawn, or to be made of pictures."""

    prompts: tuple[str, ...] | None
    """Captions or names of classes, a picture each; None for a model that is told nothing"""
    classes: tuple[str, ...] | None = None
    """For a model of both, the class of each caption"""
    given: tuple[Given, ...] = ()
    """For a task that begins with a picture: one for each that is made"""
    count: int
    """Pictures"""
    steps: int = 30
    """Sampling steps"""
    guidance: float = 4.0
    """Scale of classifier-free guidance"""
    seed: int = 0
    """Picture i is drawn from seed + i"""

    def drawn_by(self, model: LatentDiffusion, progress: bool = False) -> list[Image.Image]:
        """The pictures; of inpainting all known pixels are as they were."""
        prompts, classes = (list(words) if words else None for words in (self.prompts, self.classes))
        how: dict[str, Any] = {"steps": self.steps, "guidance": self.guidance, "seed": self.seed}
        if not self.given:
            n = 1 if prompts else self.count
            return model(prompts, classes=classes, n=n, progress=progress, **how)
        assert model.task is not None
        given = {"picture": torch.stack([to_tensor(one.picture) for one in self.given])}
        holes = [to_tensor(one.hole.convert("RGB"))[:1] for one in self.given if one.hole]
        given |= {"mask": (torch.stack(holes) > 0).float()} if holes else {}
        given |= {"noise": torch.zeros(self.count)} if isinstance(model.task, Upscale) else {}
        read: dict[str, Tensor] = model.read(prompts, 1, classes)
        examples = Examples(task=model.task, given=given, read=read, wanted=given["picture"])
        return to_images(examples.made(model, shifted=False, **how))

    def told(self, i: int) -> str:
        """What picture i is told, in words."""
        caption, name = ((words or [""] * self.count)[i] for words in (self.prompts, self.classes))
        return f"{caption} ({name})" if name else caption


class Sample(NamedTuple):
    """A picture of the model card."""

    told: str
    seed: int
    file: str
    given: tuple[str, ...] = ()
    """Files of what a task was given"""


def request_for(candidate: Candidate) -> Request:
    """What is drawn for the gate and the card; UserError if nobody says which captions."""
    given, captions = given_for(candidate)
    prompts, classes = words_for(candidate, captions)
    if given and prompts:
        if candidate.what.prompts and len(prompts) not in (1, len(given)):
            raise UserError(
                f"There are {len(prompts)} prompts for {len(given)} pictures; give one, or one a picture."
            )
        prompts, classes = (words and tuple(islice(cycle(words), len(given))) for words in (prompts, classes))
    count = len(given) or len(prompts or ()) or COUNT
    if count > MOST:
        raise UserError(f"There would be {count} samples; give at most {MOST}, with --prompt or --picture.")
    guidance = candidate.run.shown.guidance
    return Request(prompts=prompts, classes=classes, given=given, count=count, guidance=guidance)


def given_for(candidate: Candidate) -> tuple[tuple[Given, ...], list[str]]:
    """What a task is given of the person's pictures, or of drawn scenes, and the captions of the latter."""
    what, task, data = candidate.what, candidate.model.task, candidate.run.data
    if task is None:
        if what.pictures:
            raise UserError("--picture is given, but this model begins with none; leave it out.")
        return (), []
    if what.pictures:
        pictures, captions = [read_picture(file, (data.size, data.size)) for file in what.pictures], []
    else:
        drawn = open_source(DataConfig(size=data.size, scenes=data.scenes), "test")
        indices = range(len(what.prompts) or COUNT)
        pictures = [drawn.picture(i, data.size) for i in indices]
        captions = [drawn.texts[i] for i in indices]  # type: ignore[index]
        print("samples will be of drawn scenes; give --picture FILE for such as the model is for", flush=True)
    each = enumerate(pictures)
    return tuple(given(task, picture, random.stream(0, "task", i)) for i, picture in each), captions


def given(task: Task, picture: Image.Image, rng: np.random.Generator) -> Given:
    """What a task is given of a sound picture, as people would hand it in."""
    if isinstance(task, Inpaint):
        return Given(picture, random_hole(picture.size, rng))
    if isinstance(task, Upscale):
        return Given(smaller(picture, task.factor))
    return Given(task.done(picture, rng) if isinstance(task, Restore) else picture)


Names: TypeAlias = tuple[str, ...] | None


def words_for(candidate: Candidate, captions: Sequence[str]) -> tuple[Names, Names]:
    """Prompts, and classes for a model of both: the person's, those of the pictures, those that training showed, or
    the first of the data; None for what the model is not told."""
    what, shown, words = candidate.what, candidate.run.shown, candidate.words
    if what.classes and words != "class+text":
        raise UserError(
            "--class is given, but this model is not told both captions and classes; leave it out."
        )
    if words == "none":
        if what.prompts:
            raise UserError("--prompt is given, but this model draws without; leave it out.")
        return None, None
    if words == "class":
        prompts = what.prompts or tuple(shown.prompts) or candidate.classes[:MANY]
    else:
        prompts = what.prompts or tuple(captions) or tuple(shown.prompts)
    classes = what.classes or (() if what.prompts else tuple(shown.classes))
    if not prompts:
        prompts, classes = words_of_data(candidate, classes)
    if words == "class+text" and not classes:
        raise UserError(
            "Of which classes the samples are is not said; give --class NAME, one or one a prompt."
        )
    classes = classes * len(prompts) if len(classes) == 1 else classes
    candidate.model.read(prompts, 1, classes or None)
    return prompts, classes or None


def words_of_data(candidate: Candidate, classes: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The first different captions of the training pictures, as many as classes if these are said, else with theirs."""
    source = candidate.source
    if source is None or not source.texts:
        raise UserError("Which captions to draw samples of is not said; give --prompt CAPTION, or --data.")
    print(
        "samples will be of the first captions of the training pictures; give --prompt CAPTION for others",
        flush=True,
    )
    if classes:
        count = MANY if len(classes) == 1 else len(classes)
        return tuple(dict.fromkeys(source.texts))[:count], classes
    told = prompts_to_show(candidate.model, ShowConfig(count=MANY), source)
    return tuple(told["prompts"]), tuple(told.get("classes", ()))


def save_samples(
    images: Sequence[Image.Image], request: Request, release: Path, what: Publication
) -> list[Sample]:
    """samples/NN.png with notes of their origin, signed or not, and beside them what they were made of."""
    (release / "samples").mkdir()
    saved = []
    for i, image in enumerate(images):
        file, told, seed = f"samples/{i:02d}.png", request.told(i), request.seed + i
        about = {"prompt": told, "seed": seed, "steps": request.steps, "guidance": request.guidance}
        image.save(release / file, pnginfo=provenance(model=what.name, **about))
        if what.credentials:
            what.credentials.sign(release / file)
        beside = {}
        if request.given:
            beside = dict(zip(("given", "hole"), request.given[i], strict=True))
        names = {f"samples/{i:02d}-{name}.png": one for name, one in beside.items() if one}
        for name, one in names.items():
            Image.fromarray(np.array(one)).save(release / name)  # without what a camera wrote into it
        saved.append(Sample(told, seed, file, tuple(names)))
    return saved
