"""Tokenizers and text encoders: published ones, and new ones whose words are those of the captions."""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from torch import nn

from ldm.checks import require_int
from ldm.config import UserError


class Encoder(NamedTuple):
    """A Hugging Face text encoder and the tokenizer that belongs to it."""

    tokenizer: Any
    model: nn.Module

    @property
    def projects(self) -> bool:
        """Whether it makes one vector of a caption besides the states of its tokens."""
        return type(self.model).__name__ == PROJECTION


PROJECTION = "CLIPTextModelWithProjection"
HALVES = {"clip": "CLIPTextModel", "clip_text_model": "CLIPTextModel", "t5": "T5EncoderModel"}


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """The text encoder, or two."""

    encoder: str | None = None
    """A Hugging Face encoder: folder, hub name, or package:NAME/FOLDER inside an installed Python package.
    Without it, a small one with its own tokenizer is trained jointly on the captions"""
    encoder_2: str | None = None
    """A CLIP text encoder with a projection, beside `encoder` as in SDXL: the U-Net reads the states of both, and
    the projection with the time"""
    weights: Literal["pretrained", "random"] = "pretrained"
    """Of `encoder` and `encoder_2`. pretrained: frozen, with their tokenizers. random: only the shape in their
    config.json (a folder with it, or the file) is used; weights are trained jointly, with a tokenizer made from the
    captions"""
    max_length: int = 16
    """Tokens a caption is padded or cut to"""
    width: int = 128
    """Of the small encoder: size of a token's state"""
    layers: int = 2
    """Of the small encoder"""
    heads: int = 4
    """Of the small encoder"""
    vocabulary: int = 4096
    """Of a tokenizer made from the captions: words at most, the most frequent ones; others are spelled out"""

    def __post_init__(self) -> None:
        small = {"width": 128, "layers": 2, "heads": 4}
        given = [name for name, default in small.items() if getattr(self, name) != default]
        if self.encoder and given:
            raise ValueError(
                f"text.{given[0]} is of the small encoder, but text.encoder is set: remove one of the two"
            )
        if self.encoder and self.weights == "pretrained" and self.vocabulary != 4096:
            raise ValueError(
                "text.vocabulary is of a tokenizer made from the captions, but text.encoder brings its own: "
                "remove one of the two, or set text.weights to random"
            )
        for name in ("encoder_2", "weights"):
            value = getattr(self, name)
            if not self.encoder and value not in (None, "pretrained"):
                raise ValueError(
                    f"text.{name} is {value}, but text.encoder is not set: set it, or remove this"
                )
        for name in ("max_length", "width", "layers", "heads", "vocabulary"):
            require_int(f"text.{name}", getattr(self, name), 1, 2**31)
        if self.width % self.heads:
            raise ValueError(
                f"text.width is {self.width}, but must be a multiple of text.heads, {self.heads}"
            )


def make_encoders(config: TextConfig, texts: Sequence[str]) -> list[Encoder]:
    """The encoders that `config` asks for; captions are read only for a tokenizer to be made of them.

    Raises:
        UserError: one can't be loaded, or a second one has no projection.
    """
    texts = sorted(set(texts))
    if not config.encoder:
        return [small(config, texts)]
    named = [(config.encoder, False)] + ([(config.encoder_2, True)] if config.encoder_2 else [])
    if config.weights == "random":
        return [untrained(name, config, texts, projects=projects) for name, projects in named]
    return [pretrained(name, config.max_length, projects=projects) for name, projects in named]


def pretrained(name: str, max_length: int, *, projects: bool = False) -> Encoder:
    """An encoder as it was published.

    Args:
        name: folder, hub name, or `package:NAME/FOLDER`.
        projects: whether it must have a projection; without, it may have one.

    Raises:
        UserError: it can't be loaded from there, does not read captions that long, or its tokenizer is slow.
    """
    from transformers import AutoConfig, AutoTokenizer

    where = location(name)
    try:
        shape = AutoConfig.from_pretrained(where)
        require_room(name, shape, max_length)
        tokenizer = AutoTokenizer.from_pretrained(where, model_max_length=max_length)
        with quietly():
            model, found = encoder_class(shape, projects).from_pretrained(
                where, use_safetensors=True, output_loading_info=True
            )
    except (OSError, ValueError) as problem:
        raise unreadable(name, problem) from None
    if not tokenizer.is_fast:
        raise UserError(
            f"The tokenizer of the text encoder {name}, {type(tokenizer).__name__}, is none of the tokenizers library; "
            "choose another."
        )
    if missing := sorted(key for key in found["missing_keys"] if "pooler" not in key):
        raise UserError(f"The text encoder {name} has no weights for {missing[0]}; choose another.")
    if "clip" not in shape.model_type:  # trained so; the stock pipeline passes the mask on seeing this
        model.config.use_attention_mask = True
    return Encoder(tokenizer, model.float())


def untrained(name: str, config: TextConfig, texts: Sequence[str], *, projects: bool = False) -> Encoder:
    """An encoder of the shape that a config.json describes, random weights, and a tokenizer made from `texts`.

    Args:
        name, projects: as for `pretrained`; a config.json alone is enough.
    """
    from transformers import AutoConfig, AutoModel

    tokenizer = train_tokenizer(texts, config.vocabulary, config.max_length)
    try:
        made = encoder_class(AutoConfig.from_pretrained(location(name)), projects)
        shape = (AutoConfig if made is AutoModel else made.config_class).from_pretrained(location(name))
    except (OSError, ValueError) as problem:
        raise unreadable(name, problem) from None
    require_room(name, shape, config.max_length)
    shape.vocab_size = len(tokenizer)
    shape.pad_token_id = tokenizer.pad_token_id
    shape.bos_token_id, shape.eos_token_id = tokenizer.cls_token_id, tokenizer.sep_token_id
    if "clip" not in shape.model_type:
        shape.use_attention_mask = True
    return Encoder(tokenizer, made.from_config(shape) if made is AutoModel else made(shape))


@contextmanager
def quietly() -> Iterator[None]:
    """While open, `transformers` shows no progress bars of its own; those of downloads stay."""
    from transformers.utils import logging

    if not hasattr(logging, "set_tqdm_hook"):  # before 5.5, which shows them
        yield
        return
    before = logging.set_tqdm_hook(lambda make, words, keys: make(*words, **keys | {"disable": True}))
    try:
        yield
    finally:
        logging.set_tqdm_hook(before)


def location(name: str) -> str | Path:
    """Where Hugging Face libraries find it."""
    return in_package(name.removeprefix("package:")) if name.startswith("package:") else name


def unreadable(name: str, problem: Exception) -> UserError:
    lines = str(problem).strip().splitlines()
    return UserError(
        f"The text encoder {name} can't be loaded: {lines[0] if lines else type(problem).__name__}"
    )


def require_room(name: str, shape: Any, max_length: int) -> None:
    """UserError if the encoder has fewer positions than captions have tokens."""
    most = getattr(getattr(shape, "text_config", shape), "max_position_embeddings", max_length)
    if most < max_length:
        raise UserError(
            f"The text encoder {name} reads at most {most} tokens, but conditioning.text.max_length is "
            f"{max_length}; lower it."
        )


def encoder_class(shape: Any, projects: bool = False) -> Any:
    """The encoder half of what a config describes: stock pipelines know these classes by name.

    Raises:
        ValueError: it must project, and is none that does.
    """
    import transformers

    if projects and HALVES.get(shape.model_type) != "CLIPTextModel":
        raise ValueError(
            f"it is a {shape.model_type} model, but must be a CLIP text encoder with a projection"
        )
    if projects or PROJECTION in (shape.architectures or ()):
        return getattr(transformers, PROJECTION)
    return getattr(transformers, HALVES.get(shape.model_type, "AutoModel"))


def in_package(path: str) -> Path:
    """NAME/FOLDER inside an installed Python package, without importing it."""
    package, _, folder = path.partition("/")
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise UserError(
            f"There is no Python package {package}; install it, or set conditioning.text.encoder."
        )
    return Path(next(iter(found.submodule_search_locations))) / folder


def small(config: TextConfig, texts: Sequence[str]) -> Encoder:
    """A small BERT-like encoder with random weights and a tokenizer made from `texts`."""
    from transformers import DistilBertConfig, DistilBertModel

    tokenizer = train_tokenizer(texts, config.vocabulary, config.max_length)
    model = DistilBertModel(
        DistilBertConfig(
            vocab_size=len(tokenizer),
            max_position_embeddings=config.max_length,
            dim=config.width,
            hidden_dim=4 * config.width,
            n_layers=config.layers,
            n_heads=config.heads,
            dropout=0.0,
            attention_dropout=0.0,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    model.set_attn_implementation("eager")  # of few tokens it trains in half the time on a CPU
    return Encoder(tokenizer, model)


def train_tokenizer(texts: Sequence[str], vocabulary: int, max_length: int) -> Any:
    """A lower-casing tokenizer of the `vocabulary` most frequent words of `texts`, which spells out all others.

    The vocabulary is a function of the texts alone, on every process and at every start: the trainers of the
    `tokenizers` library break ties at random.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    normalizer, pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    words: Counter[str] = Counter()
    for text in texts:
        words.update(word for word, _ in pre_tokenizer.pre_tokenize_str(normalizer.normalize_str(text)))
    frequent = sorted(words, key=lambda word: (-words[word], word))[:vocabulary]
    letters = sorted({letter for word in words for letter in word})
    entries = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        *letters,
        *(f"##{letter}" for letter in letters),
        *frequent,
    ]
    numbers = {entry: i for i, entry in enumerate(dict.fromkeys(entries))}
    tokenizer = Tokenizer(models.WordPiece(vocab=numbers, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, pre_tokenizer
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=max_length, **names)
