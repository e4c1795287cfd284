"""Prompts as people give them: that they are text, and what of them a model is not told."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from pathlib import Path
from threading import Lock

from ldm.conditioning import Text
from ldm.config import UserError

LONGEST = 100_000
"""Characters of a prompt; no encoder here reads as many"""
READING = Lock()
"""Held while a tokenizer is called: the `tokenizers` library changes a tokenizer to read with it"""


class CutPrompt(UserWarning):
    """A prompt is longer than the tokenizer's limit."""


def as_texts(name: str, given: object) -> list[str]:
    """One text, or several, as a list; `name` is the argument's. Raises as `as_text`; ValueError if there are none."""
    if isinstance(given, str | bytes) or not isinstance(given, Iterable):
        return [as_text(name, given)]
    texts = [as_text(f"{name}[{i}]", text) for i, text in enumerate(given)]
    if not texts:
        raise ValueError(f"{name} is empty; give at least one, or None")
    return texts


def as_text(name: str, given: object) -> str:
    """The text that was given for the argument `name`.

    Raises:
        TypeError: it is something else, such as bytes or None.
        ValueError: it is no Unicode, or longer than `LONGEST`.
    """
    if not isinstance(given, str):
        raise TypeError(f"{name} is {given!r:.40}, but must be text (str)")
    if len(given) > LONGEST:
        raise ValueError(f"{name} has {len(given):,} characters, but at most {LONGEST:,} are read")
    try:
        given.encode()
    except UnicodeEncodeError as problem:
        raise ValueError(
            f"{name} is no text: character {problem.start} is half of one (a lone surrogate); was it read as UTF-8?"
        ) from None
    return given


def warn_of_cut(text: Text, captions: Iterable[str]) -> None:
    """A `CutPrompt` that says the rest of each caption that is longer than the limit. Call it holding `READING`."""
    for caption in dict.fromkeys(captions):
        if rest := unread(text, caption):
            warnings.warn(
                f"of the prompt {caption!r:.60} the end is not read, as the model's limit is {text.max_length} "
                f"tokens: {rest!r:.200}",
                CutPrompt,
                stacklevel=4,
            )


def unread(text: Text, caption: str) -> str:
    """The end of a caption that the encoder, or one of two, is not told; mostly ""."""
    rests = [""]
    for tokenizer in text.tokenizers:
        limit = tokenizer.model_max_length
        told = tokenizer([caption], padding="max_length", truncation=True, max_length=limit)
        for over in told.encodings[0].overflowing[:1]:
            words = zip(over.offsets, over.special_tokens_mask, strict=True)
            rests.append(caption[min(start for (start, _), special in words if not special) :])
    return max(rests, key=len)


def read_lines(file: Path) -> list[str]:
    """The prompts in a file, one a line, empty lines left out; UserError if it is no text in UTF-8, or has none."""
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as problem:
        raise UserError(f"{file} is no text in UTF-8 (byte {problem.start}); save it as UTF-8.") from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"{file} has no prompts; write one a line.")
    return prompts
