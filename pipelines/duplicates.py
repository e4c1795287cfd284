"""Pictures that are the same, or nearly, within a set and between splits."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ldm.inspection import Look

NEAR = 5
"""Bits of 256 in which the fingerprints of nearly equal pictures may differ (`ldm.inspection.fingerprint`)."""
COLOUR = 6
"""Levels of 255 by which their mean colours may differ"""
LIMIT = 20_000
"""Pictures compared each with each; of a larger set only the first so many"""


class Pairs(NamedTuple):
    """Pictures by number, the first of each pair the smaller one."""

    equal: list[tuple[int, int]]  # the same pixels: each later copy with the first
    near: list[tuple[int, int]]  # nearly the same: each picture with the first that it resembles


def pairs(looks: Sequence[Look]) -> Pairs:
    """All copies, and near copies among the first `LIMIT`; bad pictures are passed over."""
    return Pairs(_equal(looks), _near(looks[:LIMIT]))


def _equal(looks: Sequence[Look]) -> list[tuple[int, int]]:
    groups: dict[bytes, list[int]] = defaultdict(list)
    for i, look in enumerate(looks):
        if not look.reason:
            groups[look.pixels].append(i)
    return sorted((group[0], other) for group in groups.values() for other in group[1:])


def _near(looks: Sequence[Look]) -> list[tuple[int, int]]:
    sound = [i for i, look in enumerate(looks) if not look.reason]
    prints = np.frombuffer(b"".join(looks[i].print for i in sound), np.uint8).reshape(-1, 35)
    bits = np.ascontiguousarray(prints[:, :32]).view(np.uint64)  # [N,4]
    colours = prints[:, 32:].astype(np.int16)
    found = []
    for j in range(1, len(sound)):
        apart = np.bitwise_count(bits[:j] ^ bits[j]).sum(1)
        alike = np.flatnonzero((apart <= NEAR) & (abs(colours[:j] - colours[j]).max(1) <= COLOUR))
        others = [sound[i] for i in alike if looks[sound[i]].pixels != looks[sound[j]].pixels]
        if others:
            found.append((others[0], sound[j]))
    return found
