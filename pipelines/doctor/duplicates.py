"""Pictures that are the same, or nearly, within a set and between splits."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from ldm.inspection import Look

NEAR = 5
"""Bits of 256 in which the fingerprints of nearly equal pictures may differ (`ldm.inspection.fingerprint`)."""
COLOUR = 6
"""Levels of 255 by which their mean colours may differ"""
TOGETHER = 2**20
"""Pairs of pictures compared at a time"""


class Pairs(NamedTuple):
    """Pictures by number, the first of each pair the smaller one."""

    equal: list[tuple[int, int]]  # the same pixels: each later copy with the first
    near: list[
        tuple[int, int]
    ]  # other pixels, nearly the same: each picture with the first that it resembles


def pairs(looks: Sequence[Look]) -> Pairs:
    """All copies and near copies; bad pictures are passed over."""
    groups: dict[bytes, list[int]] = defaultdict(list)
    for i, look in enumerate(looks):
        if not look.reason:
            groups[look.pixels].append(i)
    equal = sorted((group[0], other) for group in groups.values() for other in group[1:])
    return Pairs(equal, _near(looks, sorted(group[0] for group in groups.values())))


def _near(looks: Sequence[Look], different: list[int]) -> list[tuple[int, int]]:
    """Near copies among pictures with `different` pixels.

    Exact, and far fewer comparisons than of each with each: fingerprints that differ in at most `NEAR` of their bits
    are equal in at least one of `NEAR` + 1 bands of them, so only those that share a band are compared.
    """
    if not different:
        return []
    all_prints = np.frombuffer(b"".join(looks[i].print for i in different), np.uint8).reshape(-1, 35)
    prints, first, which = np.unique(all_prints, axis=0, return_index=True, return_inverse=True)
    bits = np.ascontiguousarray(prints[:, :32]).view(np.uint64)  # [N,4]
    colours = prints[:, 32:].astype(np.int16)
    resembled = first.copy()  # by each print: the first picture with it or one like it
    for rows in _sharing_a_band(bits):
        for some in np.array_split(rows, -(-(len(rows) ** 2) // TOGETHER)):
            apart = np.bitwise_count(bits[some, None] ^ bits[rows]).sum(-1)
            alike = (apart <= NEAR) & (abs(colours[some, None] - colours[rows]).max(-1) <= COLOUR)
            earliest = np.where(alike, first[rows], len(different)).min(1)
            resembled[some] = np.minimum(resembled[some], earliest)
    partner = resembled[which.reshape(-1)].tolist()
    return [(different[p], different[i]) for i, p in enumerate(partner) if p < i]


def _sharing_a_band(bits: np.ndarray) -> Iterator[np.ndarray]:
    """Rows [M], M > 1, of those of `bits` [N,4] uint64 that are equal in one of `NEAR` + 1 bands.

    A band is every so manieth bit, not a run of them: the upper rows of many pictures are the same empty background.
    """
    for band in range(NEAR + 1):
        mask = np.zeros(256, np.uint8)
        mask[band :: NEAR + 1] = 1
        _, group, sizes = np.unique(
            bits & np.packbits(mask).view(np.uint64), axis=0, return_inverse=True, return_counts=True
        )
        ordered = np.argsort(group.reshape(-1), kind="stable")
        ends = np.cumsum(sizes)
        for shared in np.flatnonzero(sizes > 1).tolist():
            yield ordered[ends[shared] - sizes[shared] : ends[shared]]
