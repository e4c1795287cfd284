"""Pictures drawn for what belongs to real ones, compared with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ldm.conditioning import text_of
from ldm.config import UserError
from ldm.data import SceneSource, Source, open_source
from ldm.inspection import sound
from pipelines.evaluation.bench import SHOWN, Bench, Result
from pipelines.evaluation.extractors import Extractor, Seen
from pipelines.evaluation.fidelity import Figure, of_pictures, of_sets
from pipelines.evaluation.generation import class_names, draw, images_of, spread_out, told
from pipelines.evaluation.memorisation import BATCH, beside, mirrored, nearer, nearest, thumbnails
from pipelines.evaluation.references import features_of, seen_of
from pipelines.evaluation.scores import ATTRIBUTES, of_scenes
from pipelines.latent_diffusion import LatentDiffusion
from pipelines.sheets import contact_sheet

LOOKED = 2000
"""Drawn and held-out pictures at most that are looked for among the training pictures"""


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """What the processes have made together; figures are then the first one's work, and no other waits for it."""

    looks: list[tuple[Seen, Seen]]
    """What each extractor says of drawn and of real pictures"""
    scores: dict[str, Tensor]
    """Figures that each drawn picture has of its own, [n]"""
    rows: list[int]
    """Drawn pictures that are kept, `LOOKED` at most"""
    images: list[Image.Image]
    """These"""
    learned: Seen | None
    """What the first extractor says of the training pictures, if they are searched"""


def of_drawn(bench: Bench) -> Result:
    """Draw, and compare with the real pictures as sets, with captions and classes, and with what was trained on."""
    result = Result()
    training = training_pictures(bench, result.left_out)
    result.protocol = how_drawn(bench, training)
    say = told(drawer(bench), bench.source, bench.indices)
    drawn = made(bench, say, training, result.left_out)
    if not bench.state.is_main_process:
        return result
    for extractor, (seen, real) in zip(bench.extractors, drawn.looks, strict=True):
        found = of_sets(seen, real)
        found["fid" if extractor.name == "inception" else "fd"] = found.pop("frechet")
        found |= accuracy(bench, extractor, seen, real, result.left_out) if say else {}
        result.figures |= {bench.named(name, extractor): figure for name, figure in found.items()}
    result.figures |= {name: of_pictures(values) for name, values in drawn.scores.items()}
    if training:
        memorised(bench, drawn, training, result)
    shown = spread_out(min(SHOWN, len(drawn.rows)), len(drawn.rows))
    captions = [say["prompts"][drawn.rows[i]] for i in shown] if say else None
    result.pictures["drawn"] = contact_sheet([drawn.images[i] for i in shown], captions, columns=8)
    return result


def drawer(bench: Bench) -> LatentDiffusion:
    """The model of a bench, which draws."""
    assert isinstance(bench.subject.model, LatentDiffusion)
    return bench.subject.model


def how_drawn(bench: Bench, training: Source | None) -> dict[str, Any]:
    """The protocol, known before anything is drawn."""
    model, drawing = drawer(bench), bench.what.drawing
    say = told(model, bench.source, bench.indices)
    looked = training and {
        "sha256": training.fingerprint,
        "pictures": len(training),
        "looked_for": min(LOOKED, bench.count),
    }
    return bench.protocol(
        "drawn",
        model.size,
        told=f"{' and '.join(say) or 'nothing'} of the real pictures, evenly spaced",
        guidance=drawing.scale(model),
        **({"interval": list(drawing.interval)} if drawing.interval else {}),
        sampler=drawing.sampler or model.sampler,
        spacing="usual" if drawing.sampler or model.spacing is None else model.spacing,
        steps=drawing.steps,
        reuse=drawing.reuse,
        seeds=f"{drawing.seed} to {drawing.seed + bench.count - 1}",
        clip=bench.clip.stamp if bench.clip else None,
        training=looked,
    )


def made(bench: Bench, say: dict[str, list[str]], training: Source | None, left_out: dict[str, str]) -> Drawn:
    """What needs all processes: drawing, features, figures of single pictures."""
    share, what, state, model = bench.share, bench.what, bench.state, drawer(bench)
    pixels = draw(model, say, share, what.drawing)
    looks = [
        (seen_of(pixels, one, share), features_of(bench.source, model.size, one, state, what.cache))
        for one in bench.extractors
    ]
    captions = say["prompts"] if text_of(model.conditioner) else []
    learned = None
    if training and bench.extractors:
        learned = features_of(training, model.size, bench.extractors[0], state, what.cache)
    rows = spread_out(min(LOOKED, bench.count), bench.count)
    return Drawn(
        looks=looks,
        scores=of_captions(bench, pixels, captions, left_out),
        rows=rows,
        images=images_of(share.whole(pixels, rows)),
        learned=learned,
    )


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
    bench: Bench, pixels: Tensor, captions: Sequence[str], left_out: dict[str, str]
) -> dict[str, Tensor]:
    """CLIP score, if a model is given, and for drawn scenes whether captions are satisfied, of each picture."""
    share = bench.share
    if bench.clip and not captions:
        left_out["clip_score"] = "the model is told no captions"
    if not captions:
        return {}
    own = [captions[i] for i in share.rows.tolist()]
    scores = {"clip_score": share.whole(bench.clip(pixels, own))} if bench.clip else {}
    if isinstance(bench.source, SceneSource):
        for name, column in zip(ATTRIBUTES, share.whole(of_scenes(pixels, own)).unbind(1), strict=True):
            said = column[~column.isnan()].bool()
            if len(said):
                scores["prompts_satisfied" if name == "all" else f"satisfied_{name}"] = said
    return scores


def training_pictures(bench: Bench, left_out: dict[str, str]) -> Source | None:
    """Among what drawn pictures are looked for; None if it is not named, or not there."""
    if bench.what.training_split is None:
        left_out["memorisation"] = "the training pictures are not named"
        return None
    try:
        return sound(open_source(bench.what.data, bench.what.training_split))
    except UserError as problem:
        left_out["memorisation"] = str(problem)
        return None


def memorised(bench: Bench, drawn: Drawn, training: Source, result: Result) -> None:
    """Look for drawn pictures among the training pictures, in pixels and by the first extractor's features.

    Held-out pictures are looked for too, to know how near new ones come.
    """
    source, count = bench.source, len(drawn.rows)
    alike = bench.what.training_split == bench.split
    held = [] if alike else spread_out(min(LOOKED, len(source)), len(source))
    real = [source.picture(i, drawer(bench).size) for i in held]
    near = {"pixels": nearest(thumbnails([*drawn.images, *real]), mirrored(training))}
    if drawn.learned:
        seen, known = drawn.looks[0]
        both = torch.cat([seen.features[drawn.rows], known.features[held]])
        near["features"] = nearest(both, ([part] for part in drawn.learned.features.split(BATCH)))
    own = {name: one.rows(slice(count)) for name, one in near.items()}
    for name, mine in own.items():
        result.figures[f"copies_{name}"] = of_pictures(mine.copied)
        if held:
            theirs = near[name].rows(slice(count, None))
            result.figures[f"nearer_{name}"] = of_pictures(nearer(mine, theirs))
    result.pictures["nearest"] = beside(drawn.images, own, training)
