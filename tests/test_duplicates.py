"""Near copies are found however many pictures there are, and are those that comparing each with each finds."""

import numpy as np

from ldm.inspection import Look
from pipelines.doctor.duplicates import COLOUR, NEAR, pairs


def looks_of(prints: np.ndarray, pixels: np.ndarray | None = None) -> list[Look]:
    """A `Look` for each row [N,35] of `prints`, all of different pixels unless `pixels` [N] says otherwise."""
    pixels = np.arange(len(prints)) if pixels is None else pixels
    return [
        Look(str(i), print=row.tobytes(), pixels=int(pixels[i]).to_bytes(4, "big"))
        for i, row in enumerate(prints)
    ]


def flipped(row: np.ndarray, bits: int, drawn: np.random.Generator) -> np.ndarray:
    """The same print with so many of its 256 bits turned over."""
    some = np.unpackbits(row)
    some[drawn.choice(256, bits, replace=False)] ^= 1
    return np.packbits(some)


def test_near_copies_are_those_of_comparing_each_with_each() -> None:
    drawn = np.random.default_rng(0)
    prints = drawn.integers(0, 256, (60, 35), dtype=np.uint8)
    prints[50:, :32] = 0  # pictures of one colour, which share every band
    prints[50:, 32:] = drawn.integers(100, 112, (10, 3), dtype=np.uint8)
    copies = prints[drawn.integers(0, 60, 140)]
    for row in copies:
        row[:] = flipped(row, int(drawn.integers(0, 9)), drawn) if drawn.random() < 0.9 else row
    prints = np.concatenate([prints, copies])[drawn.permutation(200)]
    expected = []
    for j in range(200):
        for i in range(j):
            apart = np.unpackbits(prints[i, :32] ^ prints[j, :32]).sum()
            colour = abs(prints[i, 32:].astype(int) - prints[j, 32:]).max()
            if apart <= NEAR and colour <= COLOUR:
                expected.append((i, j))
                break
    found = pairs(looks_of(prints))
    assert found.near == expected and len(expected) > 50 and found.equal == []


def test_pictures_far_apart_in_a_large_set_are_compared() -> None:
    drawn = np.random.default_rng(0)
    prints = drawn.integers(0, 256, (30_000, 35), dtype=np.uint8)
    prints[29_998], prints[29_999] = prints[1], prints[0]
    prints[29_999, :32] = flipped(prints[0, :32], NEAR, drawn)
    pixels = np.arange(30_000)
    pixels[29_998] = 1
    found = pairs(looks_of(prints, pixels))
    assert found.equal == [(1, 29_998)] and found.near == [(0, 29_999)]


def test_bad_pictures_are_no_copies_of_each_other() -> None:
    bad = Look("x", reason="is damaged")
    assert pairs([bad, bad]) == ([], [])
