"""`ldm doctor`: looks at what training needs before it is spent on."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add(verbs: Any) -> None:
    """The verb `doctor` and what it looks at, to the subparsers of `ldm`."""
    doctor = verbs.add_parser("doctor", help="look at data and latents before training on them")
    things = doctor.add_subparsers(dest="thing", required=True, metavar="THING")
    add_latents(things)


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
    from pipelines.readiness import doctor_latents

    doctor_latents(
        options.autoencoders, options.data, options.size, options.out, options.pictures, options.probe_steps
    )
