"""`ldm evaluate`: how good drawn pictures are, or what an autoencoder gives back, as figures with their protocol.

Called by all processes of a launch; the first one measures and writes.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from PIL import Image
from torch import Tensor

from autoencoder.files import write_text
from autoencoder.perceptual import PerceptualConfig
from ldm.config import UserError
from ldm.data import DataConfig, SceneSource, open_source, shown_source
from ldm.inspection import sound
from ldm.pictures import to_images
from pipelines import memorisation, protocol
from pipelines.extractors import Extractor, Seen, open_extractor
from pipelines.fidelity import FEW, SETTINGS, Figure, of_pictures, of_sets
from pipelines.generation import Drawing, Share, bytes_of, class_names, draw, images_of, spread_out, told
from pipelines.latent_diffusion import LatentDiffusion, best_device
from pipelines.references import features_of, pixels_of, seen_of, usual_cache
from pipelines.scores import ATTRIBUTES, Clip, likeness, of_scenes, perceptual
from pipelines.sheets import contact_sheet, side_by_side
from pipelines.subjects import Subject, Weights, open_subject, reconstructed

LOOKED = 2000
"""Drawn and held-out pictures at most that are looked for among the training pictures"""
SHOWN = 32


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What is measured, on what, and how."""

    data: DataConfig
    """The real pictures; its size is of no account but for an autoencoder"""
    split: str | None = None
    """Of the real pictures: by default the first of test, validation and training that there is"""
    training_split: str | None = "train"
    """Among whose pictures drawn ones are looked for; None: they are not"""
    n: int | None = None
    """Pictures drawn or given back; by default as many as are real, 10,000 at most"""
    extractors: tuple[str, ...] = ("inception",)
    """Whose features the sets are compared by (`pipelines.extractors`)"""
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


class Bench:
    """What an evaluation works with, opened before anything is drawn."""

    def __init__(self, model: str, what: Evaluation) -> None:
        self.what, self.state = what, PartialState(cpu=best_device() == "cpu")
        device = self.state.device
        with self.state.main_process_first():  # who fetches weights, if they have to be
            self.extractors = [open_extractor(name, device) for name in what.extractors]
            self.clip = Clip(what.clip, device) if what.clip else None
        self.subject: Subject = open_subject(model, what.weights, device)
        source, self.split = shown_source(what.data, what.split)
        self.source = sound(source)
        self.count = what.n or min(len(self.source), FEW)
        self.indices = spread_out(self.count, len(self.source))
        self.share = Share(self.state, self.count, what.batch)
        self.stamps = {extractor.name: extractor.stamp() for extractor in self.extractors}

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
            },
            "extractors": self.stamps,
            "estimators": SETTINGS,
            "weights": self.subject.weights,
            "precision": protocol.precision(),
            "versions": protocol.versions(self.state.device),
            **more,
        }


def evaluate(model: str, what: Evaluation, out: Path | None = None) -> Path | None:
    """Measure a model and write the result as JSON, its pictures beside it.

    Args:
        model: a run of either stage, a stock folder, or a hub name.
        out: by default in RUN/evaluations, named after what was measured.

    Returns:
        The file; None in all processes but the first.

    Raises:
        UserError: model, data, weights or a package are not there; says which, and what to do.
    """
    bench = Bench(model, what)
    file = out or usual_name(bench)
    draws = isinstance(bench.subject.model, LatentDiffusion)
    result = of_drawn(bench) if draws else of_reconstructions(bench)
    if not bench.state.is_main_process:
        return None
    write(file, bench, result)
    return file


def usual_name(bench: Bench) -> Path:
    """RUN/evaluations/NAME.json, the name made of what tells evaluations of a run apart."""
    subject, what = bench.subject, bench.what
    if subject.run is None:
        raise UserError(
            f"{subject.about['name']} is no run folder: say with --out FILE.json where the result should go."
        )
    parts = [
        f"step-{subject.about['step'] or 0:08d}",
        bench.split,
        f"n{bench.count}",
        *bench.stamps,
        subject.weights,
    ]
    if isinstance(subject.model, LatentDiffusion):
        drawing = what.drawing
        parts += [
            drawing.sampler or subject.model.sampler,
            f"steps{drawing.steps}",
            f"guidance{drawing.guidance:g}",
        ]
    name = "-".join(part.replace(":", "-").replace("/", "-") for part in parts)
    return subject.run / "evaluations" / f"{name}.json"


def of_drawn(bench: Bench) -> Result:
    """Pictures drawn for what belongs to the real ones, compared with the real ones."""
    model, share, source = bench.subject.model, bench.share, bench.source
    assert isinstance(model, LatentDiffusion)
    say = told(model, source, bench.indices)
    pixels = draw(model, say, share, bench.what.drawing)
    size = (pixels.shape[3], pixels.shape[2])
    result, looks = Result(), []
    for extractor in bench.extractors:
        made = seen_of(pixels, extractor, share)
        real = features_of(source, size, extractor, bench.state, bench.what.cache)
        looks.append((made, real))
        if bench.state.is_main_process:
            found = of_sets(made, real)
            found["fid" if extractor.name == "inception" else "fd"] = found.pop("frechet")
            found |= accuracy(bench, extractor, made, real, result.left_out) if say else {}
            result.figures |= {bench.named(name, extractor): figure for name, figure in found.items()}
    result.figures |= of_captions(bench, pixels, say, result.left_out)
    memorised(bench, pixels, looks, result)
    drawn = images_of(share.whole(pixels, range(min(SHOWN, bench.count))))
    result.pictures["drawn"] = contact_sheet(drawn, (say.get("prompts") or [])[:SHOWN] or None, columns=8)
    drawing = bench.what.drawing
    more: dict[str, Any] = {
        "told": f"{' and '.join(say) or 'nothing'} of the real pictures, evenly spaced",
        "guidance": drawing.guidance,
        "sampler": drawing.sampler or model.sampler,
        "spacing": "usual" if drawing.sampler or model.spacing is None else model.spacing,
        "steps": drawing.steps,
        "seeds": f"{drawing.seed} to {drawing.seed + bench.count - 1}",
        "clip": bench.clip.stamp if bench.clip else None,
    }
    result.protocol = bench.protocol("drawn", size, **more) | result.protocol
    return result


def accuracy(
    bench: Bench, extractor: Extractor, made: Seen, real: Seen, left_out: dict[str, str]
) -> dict[str, Figure]:
    """The share of drawn, and of real, pictures that a classifier takes for what they should show."""
    source = bench.source
    if not extractor.classes or source.labels is None or made.logits is None or real.logits is None:
        return {}
    if strange := sorted(set(source.classes) - set(extractor.classes)):
        left_out["class_accuracy"] = f"{extractor.name} does not know the class {strange[0]}"
        return {}
    found = {}
    for name, logits, rows in (
        ("class_accuracy", made.logits, bench.indices),
        ("class_accuracy_real", real.logits, range(len(source))),
    ):
        truth = torch.tensor([extractor.classes.index(word) for word in class_names(source, rows)])
        found[name] = of_pictures(logits.argmax(1) == truth)
    return found


def of_captions(
    bench: Bench, pixels: Tensor, say: dict[str, list[str]], left_out: dict[str, str]
) -> dict[str, Figure]:
    """CLIP score, if a model is given, and for drawn scenes how many captions are satisfied."""
    share = bench.share
    captions = say.get("prompts") if bench.source.texts is not None else None
    figures: dict[str, Figure] = {}
    if bench.clip and not captions:
        left_out["clip_score"] = "the model is told no captions"
    if not captions:
        return figures
    own = [captions[i] for i in share.rows.tolist()]
    if bench.clip:
        figures["clip_score"] = of_pictures(share.whole(bench.clip(pixels, own)))
    if isinstance(bench.source, SceneSource):
        for name, column in zip(ATTRIBUTES, share.whole(of_scenes(pixels, own)).unbind(1), strict=True):
            said = column[~column.isnan()]
            if len(said):
                figures["prompts_satisfied" if name == "all" else f"satisfied_{name}"] = of_pictures(said)
    return figures


def memorised(bench: Bench, pixels: Tensor, looks: Sequence[tuple[Seen, Seen]], result: Result) -> None:
    """Look for drawn pictures among the training pictures, in pixels and by the first extractor's features."""
    what, state, split = bench.what, bench.state, bench.what.training_split
    if split is None:
        result.left_out["memorisation"] = "the training pictures are not named"
        return
    try:
        training = sound(open_source(what.data, split))
    except UserError as problem:
        result.left_out["memorisation"] = str(problem)
        return
    size = (pixels.shape[3], pixels.shape[2])
    learned = [features_of(training, size, bench.extractors[0], state, what.cache)] if looks else []
    rows = spread_out(min(LOOKED, bench.count), bench.count)
    drawn = images_of(bench.share.whole(pixels, rows))
    result.protocol["training"] = {
        "sha256": training.fingerprint,
        "pictures": len(training),
        "looked_for": len(rows),
    }
    if not state.is_main_process:
        return
    held = [] if split == bench.split else spread_out(min(LOOKED, len(bench.source)), len(bench.source))
    real = [bench.source.picture(i, size) for i in held]
    near = {
        "pixels": memorisation.nearest(
            memorisation.thumbnails([*drawn, *real]), memorisation.mirrored(training)
        )
    }
    for known, (made, seen) in zip(learned, looks, strict=False):
        both = torch.cat([made.features[rows], seen.features[held]])
        near["features"] = memorisation.nearest(
            both, ([part] for part in known.features.split(memorisation.BATCH))
        )
    of_drawn = {name: one.rows(slice(len(rows))) for name, one in near.items()}
    for name, mine in of_drawn.items():
        result.figures[f"copies_{name}"] = of_pictures(mine.copied)
        if held:
            of_held = near[name].rows(slice(len(rows), None))
            result.figures[f"nearer_{name}"] = of_pictures(memorisation.nearer(mine, of_held))
    result.pictures["nearest"] = memorisation.beside(drawn, of_drawn, training)


def of_reconstructions(bench: Bench) -> Result:
    """What an autoencoder gives back of real pictures, compared with them one by one, and as a set."""
    coder, share, state = bench.subject.model, bench.share, bench.state
    assert not isinstance(coder, LatentDiffusion)
    side = bench.what.data.size
    result = Result()
    lpips, reason = perceptual(bench.what.lpips, side, state.device)
    if reason:
        result.left_out["lpips"] = reason
    names: list[str] = []

    def make(rows: range) -> list[Tensor]:
        originals = pixels_of(bench.source, [bench.indices[i] for i in rows], (side, side)).to(state.device)
        x = originals.float() / 127.5 - 1
        made = reconstructed(coder, x)
        found = likeness(made, x, lpips)
        names[:] = found
        return [bytes_of(to_images(made)), *found.values()]

    pixels, *columns = share.made(make, "giving back")
    result.figures = {name: of_pictures(share.whole(own)) for name, own in zip(names, columns, strict=True)}
    if "ssim" not in names:
        result.left_out["ssim"] = f"SSIM needs 11 pixels, and the pictures have {side}"
    for extractor in bench.extractors:
        made = seen_of(pixels, extractor, share)
        real = features_of(bench.source, (side, side), extractor, state, bench.what.cache)
        if state.is_main_process:
            found = of_sets(made, real)
            name = "rfid" if extractor.name == "inception" else "rfd"
            result.figures |= {
                bench.named(name, extractor): found["frechet"],
                bench.named("rkid", extractor): found["kid"],
            }
    shown = range(min(SHOWN, bench.count))
    originals = [bench.source.picture(bench.indices[i], side) for i in shown]
    back = images_of(share.whole(pixels, shown))
    result.pictures["reconstructions"] = side_by_side(originals, back, labels=("original", "given back"))
    more = {
        "latent": "mean of the posterior"
        if bench.subject.about["kind"] == "AutoencoderKL"
        else "nearest codes"
    }
    lpips_by = bench.what.lpips.network if lpips else None
    result.protocol = bench.protocol("reconstructed", (side, side), lpips=lpips_by, **more)
    return result


def write(file: Path, bench: Bench, result: Result) -> None:
    """The result as JSON with its pictures beside it, and as lines on the screen."""
    names = {name: f"{file.stem}-{name}.png" for name in result.pictures}
    file.parent.mkdir(parents=True, exist_ok=True)
    for name, picture in result.pictures.items():
        picture.save(file.parent / names[name])
    content = {
        "figures": {name: figure.plain() for name, figure in result.figures.items()},
        "protocol": result.protocol,
        "pictures": names,
        "left_out": result.left_out,
        "model": bench.subject.about,
        "data": bench.what.data.where,
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    write_text(file, json.dumps(content, indent=1, allow_nan=False) + "\n")
    for name, figure in result.figures.items():
        interval = f"  [{figure.interval[0]:.4g}, {figure.interval[1]:.4g}]" if figure.interval else ""
        print(f"{name:28} {figure.value:10.4g}{interval}")
    for name, reason in result.left_out.items():
        print(f"{name} is left out: {reason}", file=sys.stderr)
    if bench.extractors and bench.count < FEW:
        print(
            f"{bench.count:,} pictures are few: Fréchet distances are biased upwards, so judge by kid.",
            file=sys.stderr,
        )
    print(file)
