"""Prompts as people give them: that they are text, and what of them means nothing to a model."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from string import punctuation
from threading import Lock
from typing import TYPE_CHECKING

from autoencoder.notices import Notice
from ldm.conditioning import Text
from ldm.config import UserError
from ldm.tokens import encodings

if TYPE_CHECKING:
    from tokenizers import Encoding

LONGEST = 100_000
"""Characters of a prompt; no encoder here reads as many"""
MOST = 8
"""Words that a warning names"""
READING = Lock()
"""Held while a tokenizer is called: the `tokenizers` library changes a tokenizer to read with it"""


class Unread(Notice):
    """Part of a prompt means nothing to the model: what is beyond the tokenizer's limit, or a word that it has not."""


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


def warn_of_unread(text: Text, captions: Iterable[str]) -> None:
    """`Unread` for the end of each caption that is too long, and for all strange words. Call it holding `READING`."""
    strange: dict[str, None] = {}
    for caption in dict.fromkeys(captions):
        rest, words = unread(text, caption)
        strange |= dict.fromkeys(words)
        if rest:
            warnings.warn(
                f"of the prompt {brief(caption, 60)} the end is not read, as the model's limit is {text.max_length} "
                f"tokens: {brief(rest, 200)}",
                Unread,
                stacklevel=4,
            )
    if strange:
        known = [word for tokenizer in text.tokenizers for word in tokenizer.get_vocab()]
        more = f" and {len(strange) - MOST} more" if len(strange) > MOST else ""
        warnings.warn(
            f"the model's vocabulary has no {', '.join(suggested(word, known) for word in [*strange][:MOST])}{more}: "
            "it reads letters instead, and hardly knows what is meant",
            Unread,
            stacklevel=4,
        )


def brief(text: str, most: int) -> str:
    """A text in quotes, or so many characters of it."""
    return repr(text if len(text) <= most else f"{text[:most]}...")


def suggested(word: str, known: Iterable[str]) -> str:
    """A word, and the nearest known one, if there is one nearby."""
    near = get_close_matches(word.lower(), known, 1, cutoff=0.75)
    return brief(word, 40) + (f" ({near[0]}?)" if near else "")


def unread(text: Text, caption: str) -> tuple[str, list[str]]:
    """The end of a caption that the encoder, or one of two, is not told, mostly ""; and the `strange_words` before."""
    rests, strange = [""], []
    for tokenizer in text.tokenizers:
        told = encodings(tokenizer, [caption])[0]
        strange += strange_words(told, caption, tokenizer.unk_token_id)
        for over in told.overflowing[:1]:
            words = zip(over.offsets, over.special_tokens_mask, strict=True)
            rests.append(caption[min(start for (start, _), special in words if not special) :])
    return max(rests, key=len), strange


def strange_words(told: Encoding, caption: str, unknown: int | None) -> list[str]:
    """Words of a caption that a tokenizer has not: it reads them letter by letter, or as the token `unknown`."""
    pieces: dict[int, set[tuple[int, int]]] = {}
    missing = set()
    for word, span, token in zip(told.word_ids, told.offsets, told.ids, strict=True):
        if word is not None and span[0] < span[1]:
            pieces.setdefault(word, set()).add(span)
            missing |= {word} if token == unknown else set()
    strange = []
    for word, spans in pieces.items():
        whole = caption[min(spans)[0] : max(spans)[1]].strip()
        spelled = len(spans) > 1 and all(end - start == 1 for start, end in spans) and whole.isalpha()
        if spelled or (word in missing and whole not in punctuation):
            strange.append(whole)
    return strange


def read_lines(file: Path) -> list[str]:
    """The prompts in a file, one a line, empty lines left out.

    Raises:
        UserError: it can't be read, is no text in UTF-8, or has none.
    """
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except OSError as problem:
        raise UserError(f"The prompts in {file} can't be read: {problem.strerror}.") from None
    except UnicodeDecodeError as problem:
        raise UserError(f"{file} is no text in UTF-8 (byte {problem.start}); save it as UTF-8.") from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"{file} has no prompts; write one a line.")
    return prompts
