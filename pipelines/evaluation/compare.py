"""`ldm compare`: two evaluations side by side, if they were measured in the same way."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from autoencoder.untrusted import read_json
from ldm.config import UserError, flat
from pipelines.evaluation.fidelity import FEW, SURE
from pipelines.evaluation.protocol import differing

LOWER = ("fid", "fd", "kid", "rfid", "rfd", "rkid", "lpips", "copies", "nearer")
"""Beginnings of the names of figures of which less is better; of all others more is"""
WORDS = {
    "fid": "FID",
    "fd": "FD",
    "kid": "KID",
    "rfid": "rFID",
    "rfd": "rFD",
    "rkid": "rKID",
    "psnr": "PSNR (dB)",
    "ssim": "SSIM",
    "lpips": "LPIPS",
    "clip_score": "CLIP score",
    "inception_score": "Inception Score",
    "class_accuracy_real": "class accuracy of real pictures",
    "copies_pixels": "copies of training pictures, by pixels",
    "copies_features": "copies of training pictures, by features",
    "nearer_pixels": "held-out pictures further from training ones, by pixels",
    "nearer_features": "held-out pictures further from training ones, by features",
}
"""Names of figures that people write otherwise"""


class Row(NamedTuple):
    """One figure of two evaluations."""

    name: str
    one: dict[str, Any]
    other: dict[str, Any]

    @property
    def verdict(self) -> str:
        """Which is better, and by how much."""
        difference = self.other["value"] - self.one["value"]
        if self.one["error"] is None or self.other["error"] is None:
            return f"{difference:+.4g}, and how much is chance is not known"
        error = (self.one["error"] ** 2 + self.other["error"] ** 2) ** 0.5
        if abs(difference) <= SURE * error:
            return f"{difference:+.4g} ± {SURE * error:.2g}: within chance"
        better = "second" if (difference < 0) == less_is_better(self.name) else "first"
        return f"{difference:+.4g} ± {SURE * error:.2g}: the {better} is better"


def less_is_better(name: str) -> bool:
    """Of a figure by its name."""
    return name.split("_")[0].split(" ")[0] in LOWER


def in_words(name: str) -> str:
    """A figure's name as people write it."""
    short, space, extractor = name.partition(" ")
    return WORDS.get(short, short.replace("_", " ")) + space + extractor


def read_result(file: Path) -> dict[str, Any]:
    """What `ldm evaluate` wrote; UserError if it is something else."""
    try:
        content = read_json(file)
    except OSError as problem:
        raise UserError(f"{file} can't be read: {problem.strerror}.") from None
    figures, how = content.get("figures"), content.get("protocol")
    wanted = {"value", "error", "interval"}
    if not isinstance(how, dict) or not isinstance(figures, dict):
        raise UserError(f"{file} is no result of `ldm evaluate`: it has no figures with their protocol.")
    if not all(isinstance(figure, dict) and wanted <= figure.keys() for figure in figures.values()):
        raise UserError(
            f"{file} is no result of `ldm evaluate`: a figure lacks its value, error or interval."
        )
    if not all(isinstance(figure["value"], int | float) for figure in figures.values()):
        raise UserError(f"{file} is no result of `ldm evaluate`: a figure's value is no number.")
    return content


def compare(one: Path, other: Path, but: Sequence[str] = ()) -> list[Row]:
    """The figures that two results share.

    The errors are added as those of independent figures. The real pictures are the same, so that in truth they differ
    by less: a difference that is called one is one.

    Args:
        but: fields of the protocol in which they are meant to differ, such as guidance.

    Raises:
        UserError: the protocols differ elsewhere; names the fields. Or nothing is shared, or a file is no result.
    """
    first, second = read_result(one), read_result(other)
    there = [*flat(first["protocol"]), *flat(second["protocol"])]
    for field in but:
        if not any(f"{name}.".startswith(f"{field}.") for name in there):
            raise UserError(f"--but names {field!r}, but the protocols have no such field.")
    if unlike := differing(first["protocol"], second["protocol"], but):
        raise UserError(
            f"{one} and {other} were not measured in the same way: {'; '.join(unlike)}. "
            "If a field is what you compare, name it with --but FIELD."
        )
    mine, theirs = first["figures"], second["figures"]
    rows = [Row(name, mine[name], theirs[name]) for name in mine if name in theirs]
    if not rows:
        raise UserError(f"{one} and {other} have no figure in common.")
    return rows


def report(one: Path, other: Path, but: Sequence[str] = ()) -> str:
    """A table with intervals, and what to go by."""
    rows = compare(one, other, but)
    names = [*dict.fromkeys((*read_result(one)["figures"], *read_result(other)["figures"]))]
    lines = [f"{'':26}{'first':>28}{'second':>28}   difference"]
    lines += [f"{row.name:26}{_shown(row.one):>28}{_shown(row.other):>28}   {row.verdict}" for row in rows]
    if alone := [name for name in names if name not in {row.name for row in rows}]:
        lines.append(f"only in one of the two: {', '.join(alone)}")
    n = read_result(one)["protocol"].get("n")
    if isinstance(n, int) and n < FEW and any(row.name.startswith("kid") for row in rows):
        lines.append(f"{n:,} pictures are few: Fréchet distances are biased upwards, so judge by kid.")
    return "\n".join(lines)


def _shown(figure: dict[str, Any]) -> str:
    interval = figure["interval"]
    return f"{figure['value']:.4g}" + (f" [{interval[0]:.4g}, {interval[1]:.4g}]" if interval else "")
