"""What an evaluation is asked for, works with and finds."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import PartialState
from PIL import Image

from autoencoder.kl import AutoencoderKL
from autoencoder.perceptual import PerceptualConfig
from autoencoder.vq import VQModel
from ldm.config import UserError
from ldm.data import DataConfig, shown_source
from ldm.faults import let_exchanges_end
from ldm.inspection import sound
from pipelines.evaluation import protocol
from pipelines.evaluation.extractors import Extractor, open_extractor
from pipelines.evaluation.fidelity import FEW, SETTINGS, Figure, require_enough
from pipelines.evaluation.generation import Drawing, Share, spread_out
from pipelines.evaluation.references import usual_cache
from pipelines.evaluation.scores import Clip
from pipelines.evaluation.subjects import Subject, Weights, open_subject
from pipelines.latent_diffusion import LatentDiffusion, best_device

SHOWN = 32
"""Pictures on the sheet beside a result"""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What is measured, on what, and how."""

    data: DataConfig
    """The real pictures"""
    split: str | None = None
    """Of the real pictures: by default the first of test, validation and training that there is"""
    training_split: str | None = "train"
    """Among whose pictures drawn ones are looked for; None: they are not"""
    n: int | None = None
    """Pictures drawn or given back; by default as many as are real, 10,000 at most"""
    size: int | None = None
    """Side in pixels at which an autoencoder is measured; by default that of its training"""
    extractors: tuple[str, ...] = ("inception",)
    """Whose features the sets are compared by (`pipelines.evaluation.extractors`)"""
    clip: str | None = None
    """A CLIP model, folder or hub name, for the likeness of pictures and captions"""
    lpips: PerceptualConfig = field(default_factory=PerceptualConfig)
    """Whose features LPIPS compares, and its weights"""
    weights: Weights = "averaged"
    """Of a run"""
    drawing: Drawing = field(default_factory=Drawing)
    """How pictures are drawn"""
    batch: int = 16
    """Pictures drawn together by a process"""
    cache: Path = field(default_factory=usual_cache)
    """Folder for features of real pictures"""


@dataclass
class Result:
    """What was found, and how."""

    figures: dict[str, Figure] = field(default_factory=dict)
    protocol: dict[str, Any] = field(default_factory=dict)
    pictures: dict[str, Image.Image] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    """Figures that could not be measured, and why"""


def require_fitting(what: Evaluation, model: LatentDiffusion | AutoencoderKL | VQModel) -> None:
    """UserError if something is asked that is of no use to the kind of model, or if it begins with a picture."""
    draws = isinstance(model, LatentDiffusion)
    if isinstance(model, LatentDiffusion) and model.task:
        raise UserError(
            f"The model was trained to {model.task.kind} pictures, not to draw; measure it with `ldm recover`."
        )
    if draws and (what.size is not None or what.lpips.weights):
        raise UserError(
            "The model draws; leave out --size and --lpips-weights, which are for autoencoders alone."
        )
    if not draws and (what.clip or what.drawing != Drawing()):
        raise UserError(
            "The model is an autoencoder, which draws nothing; leave out --clip, --steps, --sampler, --guidance, "
            "--interval, --seed, --precision and --reuse."
        )
    if what.size is not None and what.size < 1:
        raise UserError(f"--size is {what.size}, but must be at least 1.")


class Bench:
    """What an evaluation works with, opened before anything is drawn."""

    def __init__(self, model: str, what: Evaluation) -> None:
        self.what, self.state = what, PartialState(cpu=best_device() == "cpu")
        if self.state.num_processes > 1:
            let_exchanges_end()
        device = self.state.device
        with self.state.main_process_first():  # who fetches weights, if they have to be
            self.subject: Subject = open_subject(model, what.weights, device)
            self.extractors = [open_extractor(name, device) for name in what.extractors]
            self.clip = Clip(what.clip, device) if what.clip else None
        require_fitting(what, self.subject.model)
        source, self.split = shown_source(what.data, what.split)
        self.source = sound(source)
        self.count = what.n or min(len(self.source), FEW)
        if self.extractors:
            require_enough(self.count, len(self.source))
        self.indices = spread_out(self.count, len(self.source))
        self.share = Share(self.state, self.count, what.batch)
        self.stamps = {extractor.name: extractor.stamp() for extractor in self.extractors}
        if len(self.stamps) < len(self.extractors):
            raise UserError(
                f"Two extractors have one name, {', '.join(self.stamps)}; leave one out or rename it."
            )

    def named(self, name: str, extractor: Extractor) -> str:
        """A figure's name, which says the extractor where there are several."""
        return name if len(self.extractors) == 1 else f"{name} ({extractor.name})"

    def protocol(self, kind: str, size: tuple[int, int], **more: Any) -> dict[str, Any]:
        """What the figures of either kind depend on."""
        return {
            "kind": kind,
            "n": self.count,
            "size": f"{size[0]}x{size[1]}",
            "reference": {
                "sha256": self.source.fingerprint,
                "pictures": len(self.source),
                "split": self.split,
                "resize": protocol.RESIZE,
                "background": self.source.config.background,
            },
            "extractors": self.stamps,
            "estimators": SETTINGS,
            "weights": self.subject.weights,
            "precision": protocol.precision(self.state.device, self.what.drawing.precision),
            "versions": protocol.versions(self.state.device),
            **more,
        }
