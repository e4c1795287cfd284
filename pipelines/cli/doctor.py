"""`ldm doctor`: looks at what training needs before it is spent on."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_doctor(verbs: Any) -> None:
    """The verb `doctor` and what it looks at, to the subparsers of `ldm`."""
    doctor = verbs.add_parser("doctor", help="look at data, latents, a model or a picture")
    things = doctor.add_subparsers(dest="thing", required=True, metavar="THING")
    add_data(things)
    add_latents(things)
    add_model(things)
    add_picture(things)


def add_latents(things: Any) -> None:
    reader = things.add_parser("latents", help="are an autoencoder's latents ready for stage 2?")
    reader.add_argument(
        "autoencoders",
        metavar="RUN",
        nargs="+",
        help="a stage 1 run, a stock AutoencoderKL folder or a hub name; several are compared on the same data",
    )
    reader.add_argument(
        "--data", metavar="P", help="pictures; by default those that the first RUN was trained on"
    )
    reader.add_argument("--size", type=int, metavar="N", help="side in pixels; by default that of training")
    reader.add_argument(
        "--pictures", type=int, default=1024, metavar="N", help="training pictures looked at (default 1024)"
    )
    reader.add_argument(
        "--probe-steps",
        type=int,
        default=400,
        metavar="N",
        help="training steps of the small denoiser; 0: none (default 400)",
    )
    reader.add_argument(
        "--out",
        type=Path,
        metavar="FILE.html",
        help="the page; figures lie beside it as JSON (default RUN/readiness.html)",
    )
    reader.set_defaults(run=run_latents)


def run_latents(options: argparse.Namespace) -> None:
    from pipelines.doctor.readiness import doctor_latents

    doctor_latents(
        options.autoencoders, options.data, options.size, options.out, options.pictures, options.probe_steps
    )


def add_data(things: Any) -> None:
    reader = things.add_parser("data", help="is a set of pictures fit to be trained on?")
    reader.add_argument("paths", metavar="PATH", nargs="+", help="as data.path: folders, or hub:NAME")
    reader.add_argument("--split", help="look at this one alone (default: train, validation and test)")
    reader.add_argument("--text", metavar="COLUMN", help="as data.text")
    reader.add_argument("--label", metavar="COLUMN", help="as data.label")
    reader.add_argument("--size", type=int, default=64, help="side in pixels to train at (default 64)")
    reader.add_argument(
        "--encoder", metavar="NAME", help="as conditioning.text.encoder; by default the small one"
    )
    reader.add_argument(
        "--max-length", type=int, default=16, metavar="N", help="tokens a caption is cut to (default 16)"
    )
    reader.add_argument(
        "--out", type=Path, default=Path("data.html"), metavar="FILE.html", help="default data.html"
    )
    reader.set_defaults(run=run_data)


def run_data(options: argparse.Namespace) -> None:
    from ldm.conditioning import TextConfig
    from ldm.data import DataConfig
    from pipelines.doctor.data import doctor_data

    data = DataConfig(path=tuple(options.paths), size=options.size, text=options.text, label=options.label)
    doctor_data(
        data, options.split, TextConfig(encoder=options.encoder, max_length=options.max_length), options.out
    )


def add_model(things: Any) -> None:
    reader = things.add_parser("model", help="what a model consists of, and whether it is sound")
    reader.add_argument(
        "model", metavar="MODEL", help="a run folder, a stock diffusers folder, or a hub name"
    )
    reader.add_argument("--prompt", help='what is drawn to see it at work, by default the first class, or ""')
    reader.set_defaults(run=run_model)


def run_model(options: argparse.Namespace) -> None:
    from pipelines.doctor.model import doctor_model

    doctor_model(options.model, options.prompt)


def add_picture(things: Any) -> None:
    reader = things.add_parser("picture", help="what picture files say of where they are from")
    reader.add_argument("files", metavar="PICTURE", type=Path, nargs="+")
    reader.set_defaults(run=run_picture)


def run_picture(options: argparse.Namespace) -> None:
    from pipelines.doctor.picture import doctor_picture

    doctor_picture(options.files)
