"""What is drawn while stage 2 trains: fixed prompts, or fixed pictures for a task that begins with one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, TypeAlias

from ldm.conditioning import labels_of, text_of
from ldm.data import Source
from ldm.training import Run
from pipelines.examples import Examples
from pipelines.latent_diffusion import LatentDiffusion
from pipelines.safety import ORIGIN
from pipelines.sheets import contact_sheet

Shown: TypeAlias = dict[str, list[str]] | Examples
"""Arguments of a model, or pictures for a task that begins with one"""


@dataclass(frozen=True, kw_only=True)
class ShowConfig:
    """Pictures drawn from fixed prompts and fixed noise while training."""

    prompts: tuple[str, ...] = ()
    """Captions or class names; by default the first distinct ones of the data"""
    classes: tuple[str, ...] = ()
    """With class+text: the class of each of the prompts"""
    count: int = 16
    """Pictures, if no prompts are given"""
    every: int = 1000
    """Optimizer steps between"""
    steps: int = 20
    """Sampling steps"""
    guidance: float = 4.0
    """Scale of classifier-free guidance"""

    def __post_init__(self) -> None:
        if self.every < 1 or self.count < 1:
            raise ValueError(
                f"show.every is {self.every} and show.count {self.count}, but both must be at least 1"
            )
        if self.steps < 1:
            raise ValueError(f"show.steps is {self.steps}, but must be at least 1")
        if not math.isfinite(self.guidance):
            raise ValueError(f"show.guidance is {self.guidance}, but must be finite")


def things_to_show(model: LatentDiffusion, config: ShowConfig, source: Source, wanted: Any) -> Shown:
    """Prompts, or pictures for a task that begins with one; ValueError where prompts are given for one that does."""
    if model.task is None:
        return prompts_to_show(model, config, source)
    if config.prompts or config.classes:
        raise ValueError(
            f"show.prompts is set, but task is {model.task.kind}, which shows pictures: leave it out"
        )
    return Examples.of(model, model.task, source, wanted, range(min(config.count, len(source))))


def prompts_to_show(model: LatentDiffusion, config: ShowConfig, source: Source) -> dict[str, list[str]]:
    """The fixed prompts, or the first distinct ones of the data, as arguments of the model; ValueError if it can't
    read one."""
    text, labels = text_of(model.conditioner), labels_of(model.conditioner)
    given = {"prompts": config.prompts, "classes": config.classes}
    told = {name: list(names) for name, names in given.items() if names}
    if text and labels and source.labels is not None and not told:
        named = (source.classes[i] for i in source.labels.tolist())
        pairs = list(dict.fromkeys(zip(source.texts or (), named, strict=True)))[: config.count]
        told = {"prompts": [caption for caption, _ in pairs], "classes": [name for _, name in pairs]}
    elif (text or labels) and not config.prompts:
        names = source.texts or () if text else source.classes
        told["prompts"] = list(dict.fromkeys(names))[: config.count]
    model.read(told.get("prompts"), 1, told.get("classes"))
    return told


def show(run: Run, model: LatentDiffusion, config: ShowConfig, told: Shown) -> None:
    """Draw the fixed prompts, or make what is wanted of the fixed pictures, with the averaged weights."""
    if not run.main:
        return
    if isinstance(told, Examples):
        sheet = told.sheet(told.made(model, steps=config.steps, guidance=config.guidance))
    else:
        n = 1 if told else config.count
        images = model(**told, n=n, steps=config.steps, guidance=config.guidance)  # type: ignore[arg-type]
        sheet = contact_sheet(images, told.get("prompts"))
    sheet.info.update(ORIGIN)
    run.picture(sheet, "drawn")
