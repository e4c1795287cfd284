"""Captions as tokens, by the `tokenizers` library alone where a tokenizer's two files leave no more to be said.

To import `transformers` for it takes most of a second.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import Encoding

WORDS, SETTINGS = FILES = ["tokenizer.json", "tokenizer_config.json"]
BACKEND = ("TokenizersBackend", "PreTrainedTokenizerFast")
"""Stock classes that are what tokenizer.json says; of it, `CLIP` takes the words alone, and has its own for the rest"""
CLIP = "CLIPTokenizer"
CLIP_NORMALIZERS = [
    {"type": "NFC"},
    {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "},
    {"type": "Lowercase"},
]
CLIP_SPLIT = {
    "Regex": r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
}
CLIP_PARTS = [
    {"type": "Split", "pattern": CLIP_SPLIT, "behavior": "Removed", "invert": True},
    {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
]
CLIP_ENDS: dict[str, Any] = {"type": "RobertaProcessing", "trim_offsets": False, "add_prefix_space": False}
CLIP_PAIRS: dict[str, Any] = {
    "type": "BPE",
    "dropout": None,
    "continuing_subword_prefix": "",
    "end_of_word_suffix": "</w>",
}
CLIP_PAIRS |= {"fuse_unk": False, "byte_fallback": False, "ignore_merges": False}
PLAIN = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
"""How tokens are found in captions that stand for no word"""
NAMED = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token", "bos_token", "eos_token")
USUAL = {"backend": "tokenizers", "padding_side": "right", "truncation_side": "right", "stride": 0}
USUAL |= {"truncation_strategy": "longest_first", "pad_to_multiple_of": None, "pad_token_type_id": 0}
UNREAD = ("tokenizer_class", "model_max_length", "max_length", "is_local", "local_files_only")
MOST = 100_000
"""Words; where there are more, `transformers` looks whether they need mending"""


class Tokenizer:
    """What `transformers` makes of the same two files, as far as captions are concerned; reading does not change it.

    `stock_class` is what stock pipelines know it as.
    """

    def __init__(
        self, files: Mapping[str, bytes], told: Mapping[str, Any], backend: tokenizers.Tokenizer
    ) -> None:
        self.files, self.backend, self.stock_class = files, backend, told["tokenizer_class"]
        self.model_max_length = told["model_max_length"]
        self.unk_token_id = backend.token_to_id(told["unk_token"]) if "unk_token" in told else None
        pad = told["pad_token"]
        backend.enable_padding(pad_token=pad, pad_id=backend.token_to_id(pad), length=self.model_max_length)
        backend.enable_truncation(self.model_max_length)

    def get_vocab(self) -> dict[str, int]:
        return self.backend.get_vocab()

    def save_pretrained(self, folder: Path) -> None:
        """Write both files as they were read."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in self.files.items():
            (folder / name).write_bytes(content)


def encodings(tokenizer: Any, captions: Sequence[str]) -> list[Encoding]:
    """Captions by a tokenizer of either library, padded or cut to its limit; what is cut is under `overflowing`."""
    if isinstance(tokenizer, Tokenizer):
        return tokenizer.backend.encode_batch(list(captions))
    limit = {"padding": "max_length", "truncation": True, "max_length": tokenizer.model_max_length}
    return tokenizer(list(captions), **limit).encodings


def fitting(folder: Path, told: Mapping[str, Any]) -> Tokenizer | None:
    """The tokenizer in a folder; None if the library and the two files are not all that it takes.

    Args:
        told: its tokenizer_config.json, in which `model_max_length` is a whole number.
    """
    named = {name: told[name] for name in NAMED if name in told}
    more = {key: value for key, value in told.items() if key not in named and key not in UNREAD}
    if "pad_token" not in named or not all(isinstance(token, str) for token in named.values()):
        return None
    if sorted(path.name for path in folder.iterdir()) != FILES or not more.items() <= USUAL.items():
        return None
    files = {name: (folder / name).read_bytes() for name in FILES}
    backend = tokenizers.Tokenizer.from_buffer(files[WORDS])
    # not `backend.to_str()`, which goes through all numbers up to the largest
    content = json.loads(files[WORDS])
    known = told["tokenizer_class"] in BACKEND or is_clip(content, told)
    return Tokenizer(files, told, backend) if known and is_simple(content, named.values()) else None


def is_simple(content: Mapping[str, Any], named: Iterable[str]) -> bool:
    """Whether a tokenizer.json leaves `transformers` nothing to add for the tokens that are `named`."""
    tokens = {token["content"]: token for token in content.get("added_tokens", ())}
    sides = [told["direction"] for way in ("padding", "truncation") if (told := content.get(way))]
    return (
        tokens.keys() >= set(named)
        and all(PLAIN.items() <= token.items() for token in tokens.values())
        and all(side == "Right" for side in sides)
        and content.get("post_processor") is not None
        and len(content["model"]["vocab"]) <= MOST
    )


def is_clip(content: Mapping[str, Any], told: Mapping[str, Any]) -> bool:
    """Whether a tokenizer.json is one of CLIP's, with nothing in it that `transformers` would leave out."""
    words = content["model"].get("vocab")
    if told["tokenizer_class"] != CLIP or not isinstance(words, dict):
        return False
    first, last = told.get("bos_token"), told.get("eos_token")
    wanted = {
        "normalizer": {"type": "Sequence", "normalizers": CLIP_NORMALIZERS},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": CLIP_PARTS},
        "post_processor": CLIP_ENDS | {"cls": [first, words.get(first)], "sep": [last, words.get(last)]},
        "model": content["model"] | CLIP_PAIRS | {"unk_token": told.get("unk_token")},
    }
    return all(content.get(key) == part for key, part in wanted.items()) and all(
        words.get(token["content"]) == token["id"] for token in content.get("added_tokens", ())
    )
