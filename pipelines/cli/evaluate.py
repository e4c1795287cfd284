"""`ldm evaluate | sweep | compare | classifier | recognise`: figures of merit, and what they are measured with."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autoencoder.files import require_replaceable, require_writable
from ldm.config import UserError
from pipelines.cli.draw import MODEL, interval_option
from pipelines.cli.out import FIGURES, require_picture, speed_options

if TYPE_CHECKING:
    from pipelines.evaluation.bench import Evaluation
    from pipelines.evaluation.generation import Drawing


def add_evaluate(verbs: Any) -> None:
    """Add the verbs to the command's sub-parsers."""
    judge = verbs.add_parser(
        "evaluate", help="how good a model's pictures are, or what an autoencoder gives back"
    )
    evaluation_options(judge)
    drawing_options(judge)
    judge.add_argument("--out", type=Path, metavar="FILE.json", help="of a run by default in RUN/evaluations")
    judge.set_defaults(run=run_evaluate)

    vary = verbs.add_parser("sweep", help="evaluate with several values of a setting, as a plot")
    vary.add_argument("setting", choices=("guidance", "steps", "sampler"))
    vary.add_argument("values", nargs="+", metavar="VALUE")
    vary.add_argument("--model", required=True, metavar="MODEL", help=MODEL)
    evaluation_options(vary, model=False)
    drawing_options(vary)
    vary.add_argument(
        "--out", type=Path, required=True, metavar="FILE.png", help="results lie beside it, in FILE/"
    )
    vary.set_defaults(run=run_sweep)

    both = verbs.add_parser("compare", help="two results of evaluate, if they were measured in the same way")
    both.add_argument("first", type=Path, metavar="A.json")
    both.add_argument("second", type=Path, metavar="B.json")
    both.add_argument(
        "--but", nargs="+", default=[], metavar="FIELD", help="fields of the protocol that may differ"
    )
    both.set_defaults(run=run_compare)

    learn = verbs.add_parser("classifier", help="train a classifier of a set's classes, for --extractor")
    learn.add_argument("--data", required=True, metavar="P", help="pictures with classes")
    learn.add_argument("--size", type=int, default=64, help="side in pixels (default 64)")
    learn.add_argument("--epochs", type=int, default=6, help="times that all pictures are seen (default 6)")
    learn.add_argument("--out", type=Path, required=True, metavar="DIR")
    learn.set_defaults(run=run_classifier)

    help = "how many drawn pictures a classifier of the real ones names rightly"
    name = verbs.add_parser("recognise", help=help, description=help)
    name.add_argument("model", metavar="MODEL", help=MODEL)
    help = "the pictures, with classes, that it was trained on"
    name.add_argument("--data", required=True, metavar="P", help=help)
    name.add_argument("--each", type=int, default=4, help="pictures drawn for each class (default 4)")
    drawing_options(name)
    help = "the result; a sheet lies beside it"
    name.add_argument("--out", type=Path, required=True, metavar="FILE.json", help=help)
    name.set_defaults(run=run_recognise)


def evaluation_options(reader: argparse.ArgumentParser, model: bool = True) -> None:
    if model:
        reader.add_argument("model", metavar="MODEL", help=f"{MODEL}; also of an autoencoder alone")
    reader.add_argument("--data", required=True, metavar="P", help="the real pictures, as in training")
    reader.add_argument(
        "--split", metavar="S", help="by default test, validation or train, the first that there is"
    )
    reader.add_argument(
        "--training-split", default="train", metavar="S", help="searched for copies; none: no search"
    )
    reader.add_argument("--text", metavar="COLUMN", help="with captions")
    reader.add_argument("--label", metavar="COLUMN", help="with classes")
    reader.add_argument(
        "--n",
        "--count",  # launchers take --n for an abbreviation of their own options
        dest="n",
        type=int,
        help="pictures made; by default as many as are real, 10,000 at most",
    )
    reader.add_argument(
        "--size",
        type=int,
        help="side in pixels at which an autoencoder is measured (default that of its training)",
    )
    reader.add_argument(
        "--extractor",
        action="append",
        metavar="NAME",
        help="inception (default), torchvision:NAME, timm:NAME, transformers:NAME, a classifier's folder, each also "
        "with @FILE for its weights; or none; several if given again",
    )
    reader.add_argument("--clip", metavar="NAME", help="CLIP model, folder or hub name, for the CLIP score")
    reader.add_argument("--lpips", choices=("vgg", "alex", "squeeze"), default="vgg", help="default vgg")
    reader.add_argument("--lpips-weights", metavar="FILE", help="its classifier's weights, safetensors")
    reader.add_argument(
        "--raw", action="store_true", help="of a run: the weights of the last step, not their average"
    )
    reader.add_argument("--batch", type=int, default=16, help="pictures made together (default 16)")
    reader.add_argument(
        "--cache", type=Path, metavar="DIR", help="features of real pictures (default ~/.cache/ldm)"
    )


def drawing_options(reader: argparse.ArgumentParser) -> None:
    reader.add_argument("--steps", type=int, default=30, help="sampling steps (default 30)")
    reader.add_argument("--sampler", help="by default the one the model names")
    help = "scale of guidance, 1 is none (default 4); for models that are told something"
    reader.add_argument("--guidance", type=float, help=help)
    interval_option(reader)
    reader.add_argument("--seed", type=int, default=0, help="picture i is drawn from seed + i (default 0)")
    speed_options(reader)


def drawing(options: argparse.Namespace) -> Drawing:
    """How the options ask to draw."""
    from pipelines.evaluation.generation import Drawing

    asked = ("steps", "sampler", "guidance", "seed", "precision", "reuse")
    interval = options.interval and tuple(options.interval)
    return Drawing(**{name: getattr(options, name) for name in asked}, interval=interval)


def evaluation(options: argparse.Namespace) -> Evaluation:
    """What the options ask for."""
    from autoencoder.perceptual import PerceptualConfig
    from pipelines.evaluation.bench import Evaluation
    from pipelines.evaluation.references import usual_cache
    from pipelines.stages.stage_one import data_at

    asked = tuple(options.extractor or ["inception"])
    if "none" in asked and len(asked) > 1:
        raise UserError("--extractor none is given beside another; remove one of the two.")
    if options.n is not None and options.n < 1:
        raise UserError(f"--n is {options.n}, but must be at least 1.")
    data = data_at(options.data, options.model)
    return Evaluation(
        data=replace(data, text=options.text or data.text, label=options.label or data.label),
        split=options.split,
        training_split=None if options.training_split == "none" else options.training_split,
        n=options.n,
        size=options.size,
        extractors=() if asked == ("none",) else asked,
        clip=options.clip,
        lpips=PerceptualConfig(network=options.lpips, weights=options.lpips_weights),
        weights="raw" if options.raw else "averaged",
        drawing=drawing(options),
        batch=options.batch,
        cache=options.cache or usual_cache(),
    )


def run_evaluate(options: argparse.Namespace) -> None:
    from pipelines.evaluation.evaluate import evaluate

    evaluate(options.model, evaluation(options), options.out)


def run_sweep(options: argparse.Namespace) -> None:
    from accelerate import PartialState

    from pipelines.evaluation.sweeps import plot, sweep

    kind = {"guidance": float, "steps": int, "sampler": str}[options.setting]
    try:
        values = [kind(value) for value in options.values]
    except ValueError:
        raise UserError(
            f"{options.setting} is a {kind.__name__}, but the values are {options.values}."
        ) from None
    require_picture(options.out, FIGURES)
    folder = options.out.with_suffix("")
    files = sweep(options.model, evaluation(options), options.setting, values, folder)
    if PartialState().is_main_process:
        plot(files, options.setting).savefig(options.out, dpi=110)
        print(options.out)


def run_compare(options: argparse.Namespace) -> None:
    from pipelines.evaluation.compare import report

    print(report(options.first, options.second, options.but))


def run_classifier(options: argparse.Namespace) -> None:
    from ldm.data import DataConfig
    from pipelines.evaluation.classifier import WEIGHTS, save_recogniser, train_recogniser

    require_replaceable(options.out, WEIGHTS)
    require_writable(options.out.parent)
    found = train_recogniser(DataConfig(path=options.data, size=options.size), epochs=options.epochs)
    save_recogniser(found, options.out)
    named = (
        ", ".join(f"{share:.1%} of {split}" for split, share in found.accuracy.items()) or "no held-out split"
    )
    print(f"{options.out}: {len(found.classes)} classes, names {named} rightly")


def run_recognise(options: argparse.Namespace) -> None:
    from pipelines.evaluation.recognise import recognise

    recognise(options.model, options.data, options.out, options.each, drawing(options))
