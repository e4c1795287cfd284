"""`ldm evaluate`: how good drawn pictures are, or what an autoencoder gives back, as figures with their protocol.

Called by all processes of a launch; the first one measures and writes.
"""

from __future__ import annotations

import json
import sys
from datetime import UTC, datetime
from pathlib import Path

from autoencoder.files import require_writable, write_text
from ldm.config import UserError
from pipelines.evaluation.bench import Bench, Evaluation, Result
from pipelines.evaluation.coder import of_reconstructions
from pipelines.evaluation.drawn import of_drawn
from pipelines.evaluation.fidelity import FEW
from pipelines.latent_diffusion import LatentDiffusion
from pipelines.safety import provenance


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
    if out and (out.is_dir() or out.suffix != ".json"):
        raise UserError(f"--out is {out}, but must name a file .json; its pictures lie beside it.")
    return measure(Bench(model, what), out)


def measure(bench: Bench, out: Path | None = None) -> Path | None:
    """`evaluate` on a bench that is open already."""
    file = out or usual_name(bench)
    if bench.state.is_main_process:
        require_writable(file.parent)
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
            f"guidance{drawing.scale(subject.model):g}",
            *(["interval{:g}to{:g}".format(*drawing.interval)] if drawing.interval else []),
            *([f"seed{drawing.seed}"] if drawing.seed else []),
            *([drawing.precision] if drawing.precision != "f32" else []),
            *([f"reuse{drawing.reuse}"] if drawing.reuse > 1 else []),
        ]
    elif what.size is not None:
        parts.append(f"size{what.size}")
    name = "-".join(part.replace(":", "-").replace("/", "-") for part in parts)
    return subject.run / "evaluations" / f"{name}.json"


def write(file: Path, bench: Bench, result: Result) -> None:
    """The result as JSON with its pictures beside it, and as lines on the screen."""
    names = {name: f"{file.stem}-{name}.png" for name in result.pictures}
    file.parent.mkdir(parents=True, exist_ok=True)
    for name, picture in result.pictures.items():
        picture.save(file.parent / names[name], pnginfo=provenance(made_by="ldm evaluate"))
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
