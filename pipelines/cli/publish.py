"""`ldm publish`: the command line of `pipelines.publishing.publish`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from pipelines.credentials import credentials_of, credentials_option


def add_publish(verbs: Any) -> None:
    """`ldm publish`, for the command line."""
    verb = verbs.add_parser("publish", help="prove that stock tools draw with a run's model, and upload it")
    verb.add_argument("model", type=Path, metavar="RUN", help="the folder of a finished run")
    verb.add_argument("name", metavar="NAMESPACE/NAME", help="where on the hub")
    verb.add_argument("--license", required=True, metavar="ID", help="yours to choose, such as apache-2.0")
    verb.add_argument(
        "--license-file", type=Path, metavar="FILE", help="the licence's text, where none is here"
    )
    verb.add_argument("--private", action="store_true", help="for members of the namespace only")
    verb.add_argument("--dry-run", action="store_true", help="do and show everything, upload nothing")
    help = "leave what is published there, to look at, and all samples on DIR-samples.png (replaces earlier ones)"
    verb.add_argument("--out", type=Path, metavar="DIR", help=help)
    verb.add_argument(
        "--about", default="", metavar="TEXT", help="what the training pictures are, on which terms"
    )
    verb.add_argument("--data", metavar="P", help="the training pictures, to look for copies of them")
    verb.add_argument("--accept-copies", action="store_true", help="publish although there are copies")
    verb.add_argument(
        "--checker", metavar="DIR", help="a stock safety checker for the samples: folder or hub name"
    )
    verb.add_argument("--looked-at", action="store_true", help="you have looked at the samples yourself")
    credentials_option(verb)
    verb.add_argument("--no-half", dest="half", action="store_false", help="without float16 weights")
    verb.add_argument(
        "--shard", default=argparse.SUPPRESS, metavar="SIZE", help="largest weight file (default 5GB)"
    )
    verb.add_argument(
        "--prompt",
        dest="prompts",
        action="append",
        default=[],
        metavar="TEXT",
        help="of a sample; may be repeated",
    )
    verb.add_argument(
        "--class",
        dest="classes",
        action="append",
        default=[],
        metavar="NAME",
        help="of a sample, for a model of classes and captions: one, or one a prompt",
    )
    help = "to make a sample of, for a task that begins with one; may be repeated (default drawn scenes)"
    verb.add_argument(
        "--picture", dest="pictures", type=Path, action="append", default=[], metavar="FILE", help=help
    )
    verb.set_defaults(run=run_publish)


def run_publish(options: argparse.Namespace) -> None:
    from pipelines.publishing.publish import Publication, publish

    said = {key: value for key, value in vars(options).items() if key not in ("run", "verb")}
    said |= {name: tuple(said[name]) for name in ("prompts", "classes", "pictures")}
    said |= {"credentials": credentials_of(options)}
    publish(Publication(**said))
