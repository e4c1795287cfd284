"""What the U-Net is told besides the noisy latents: nothing, a class label, or a caption.

A conditioner turns a batch into a `Cond`. Dropping the condition for classifier-free guidance (Ho & Salimans
2022) happens here, at run time and per sample, with one null: the empty caption, or the extra class at the end.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ldm.config import UserError


class Cond(NamedTuple):
    """Conditioning of B samples; None where the model does not use a field."""

    tokens: Tensor | None = None  # [B,L,D] text states, read by cross-attention
    mask: Tensor | None = None  # [B,L] bool, True where a token may be attended to
    label: Tensor | None = None  # [B] int64 class
    pooled: Tensor | None = None  # [B,P] one text vector a caption (SDXL)
    time_ids: Tensor | None = None  # [B,6] original size, crop corner, target size in pixels (SDXL)

    @staticmethod
    def cat(*conds: Cond) -> Cond:
        """Several conditions as one batch, in order."""
        return Cond(*(None if parts[0] is None else torch.cat(parts) for parts in zip(*conds, strict=True)))


class Conditioner(Protocol):
    """Turns a batch into a `Cond`; also an `nn.Module`."""

    def forward(self, batch: Mapping[str, Tensor]) -> Cond:
        """Condition of a batch; where `batch["drop"]` [B] bool is true, the null condition."""
        ...

    def null(self, n: int) -> Cond:
        """The condition of n samples about which nothing is said."""
        ...


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """The text encoder."""

    encoder: str | None = None
    """A Hugging Face encoder, frozen: folder, hub name, or package:NAME/FOLDER inside an installed Python package.
    Without it, a small one with its own tokenizer is trained jointly on the captions"""
    max_length: int = 16
    """Tokens a caption is padded or cut to"""
    width: int = 128
    """Of the small encoder: size of a token's state"""
    layers: int = 2
    """Of the small encoder"""
    heads: int = 4
    """Of the small encoder"""
    vocabulary: int = 4096
    """Of the small encoder: words at most, the most frequent ones; others are spelled out"""

    def __post_init__(self) -> None:
        small = {"width": 128, "layers": 2, "heads": 4, "vocabulary": 4096}
        given = [name for name, default in small.items() if getattr(self, name) != default]
        if self.encoder and given:
            raise ValueError(
                f"text.{given[0]} is of the small encoder, but text.encoder is set: remove one of the two"
            )


@dataclass(frozen=True, kw_only=True)
class ConditioningConfig:
    """What the model is told."""

    kind: Literal["none", "class", "text"] = "text"
    """none, class (labels or folder names), or text (captions)"""
    dropout: float = 0.1
    """Share of samples trained without their condition, which guidance needs"""
    text: TextConfig = field(default_factory=TextConfig)

    def __post_init__(self) -> None:
        if not 0 <= self.dropout < 1:
            raise ValueError(f"conditioning.dropout is {self.dropout}, but must lie in [0, 1)")
        if self.kind != "text" and self.text != TextConfig():
            raise ValueError(
                f"conditioning.text is set, but conditioning.kind is {self.kind}: remove one of the two"
            )


class Unconditional(nn.Module):
    """Nothing is said about any sample."""

    def forward(self, batch: Mapping[str, Tensor]) -> Cond:
        return Cond()

    def null(self, n: int) -> Cond:
        return Cond()


class ClassLabels(nn.Module):
    """One of `classes`; the U-Net's class embedding has one row more, the null class."""

    null_label: Tensor

    def __init__(self, classes: Sequence[str]) -> None:
        super().__init__()
        self.classes = tuple(classes)
        self.register_buffer("null_label", torch.tensor([len(classes)]), persistent=False)

    def forward(self, batch: Mapping[str, Tensor]) -> Cond:
        label = batch["label"]
        return Cond(label=torch.where(batch["drop"], len(self.classes), label) if "drop" in batch else label)

    def null(self, n: int) -> Cond:
        return Cond(label=self.null_label.expand(n))

    def read(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Class names as a batch; ValueError names an unknown one and the nearest known ones."""
        import difflib

        for name in names:
            if name not in self.classes:
                near = difflib.get_close_matches(name, self.classes) or self.classes[:5]
                raise ValueError(f"there is no class {name!r}; the nearest are {', '.join(near)}")
        return {"label": torch.tensor([self.classes.index(name) for name in names])}


class Text(nn.Module):
    """Captions through a Hugging Face encoder, frozen or trained jointly with the U-Net.

    The U-Net attends to all `max_length` states, padding included, as the stock pipelines do. The encoder itself
    is given the mask only if its config says `use_attention_mask`, which is what stock pipelines go by.
    """

    null_ids: Tensor
    null_mask: Tensor

    def __init__(self, tokenizer: Any, encoder: nn.Module, *, frozen: bool) -> None:
        super().__init__()
        self.tokenizer, self.encoder, self.frozen = tokenizer, encoder, frozen
        self.requires_grad_(not frozen)
        if hasattr(encoder, "pooler"):  # its output is never used; DDP would wait for its gradient
            encoder.pooler.requires_grad_(False)
        empty = self.read([""])
        self.register_buffer("null_ids", empty["ids"], persistent=False)
        self.register_buffer("null_mask", empty["attend"], persistent=False)

    def train(self, mode: bool = True) -> Text:
        return super().train(mode and not self.frozen)  # a frozen encoder has no dropout

    def read(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Captions as a batch: {"ids": [B,L] int64, "attend": [B,L] int64}."""
        read = self.tokenizer(
            list(captions),
            padding="max_length",
            truncation=True,
            max_length=self.tokenizer.model_max_length,
            return_tensors="pt",
        )
        return {"ids": read.input_ids, "attend": read.attention_mask}

    def vocabulary_hash(self) -> str:
        """Names what token ids mean. (The tokenizer's own text form also holds how it was last called.)"""
        words = sorted(self.tokenizer.get_vocab().items()), self.tokenizer.model_max_length
        return hashlib.sha256(repr(words).encode()).hexdigest()

    def cut(self, captions: Sequence[str]) -> int:
        """How many captions are longer than the tokenizer's limit."""
        lengths = self.tokenizer(list(captions), truncation=False, padding=False, verbose=False).input_ids
        return sum(len(ids) > self.tokenizer.model_max_length for ids in lengths)

    def encode(self, ids: Tensor, attend: Tensor) -> Tensor:
        """[B,L], [B,L] => states [B,L,D]."""
        masked = getattr(self.encoder.config, "use_attention_mask", False)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            return self.encoder(input_ids=ids, attention_mask=attend if masked else None)[0]

    def forward(self, batch: Mapping[str, Tensor]) -> Cond:
        if "tokens" in batch:  # states from the cache, which only a frozen encoder has
            tokens = batch["tokens"]
            if "drop" in batch:
                null = self.encode(self.null_ids, self.null_mask)
                tokens = torch.where(batch["drop"][:, None, None], null, tokens)
            return Cond(tokens=tokens)
        ids, attend = batch["ids"], batch["attend"]
        if "drop" in batch:
            drop = batch["drop"][:, None]
            ids, attend = torch.where(drop, self.null_ids, ids), torch.where(drop, self.null_mask, attend)
        return Cond(tokens=self.encode(ids, attend))

    def null(self, n: int) -> Cond:
        return Cond(tokens=self.encode(self.null_ids, self.null_mask).expand(n, -1, -1))


def make_conditioner(
    config: ConditioningConfig, texts: Sequence[str] | None, classes: Sequence[str]
) -> nn.Module:
    """The conditioner that `config` asks for; captions or classes come from the data."""
    if config.kind == "none":
        return Unconditional()
    if config.kind == "class":
        if not classes:
            raise UserError(
                "conditioning.kind is class, but the data has no classes; set data.label, or choose text."
            )
        return ClassLabels(classes)
    if not texts or not any(texts):
        raise UserError(
            "conditioning.kind is text, but the pictures have no captions; put a .txt beside each picture, "
            "or a metadata.csv with the columns file_name and text, or choose class or none."
        )
    if config.text.encoder:
        return pretrained_text(config.text.encoder, config.text.max_length)
    return small_text(config.text, texts)


def pretrained_text(name: str, max_length: int) -> Text:
    """A frozen Hugging Face encoder with its tokenizer, by folder, hub name, or `package:NAME/FOLDER`.

    Raises:
        UserError: it can't be loaded from there.
    """
    from transformers import AutoConfig, AutoTokenizer

    where = in_package(name.removeprefix("package:")) if name.startswith("package:") else name
    try:
        tokenizer = AutoTokenizer.from_pretrained(where, model_max_length=max_length)
        encoder = encoder_class(AutoConfig.from_pretrained(where)).from_pretrained(
            where, use_safetensors=True
        )
    except (OSError, ValueError) as problem:
        first = str(problem).strip().splitlines()[0]
        raise UserError(f"The text encoder {name} can't be loaded: {first}") from None
    if "clip" not in encoder.config.model_type:
        encoder.config.use_attention_mask = (
            True  # trained so; the stock pipeline passes the mask on seeing this
        )
    return Text(tokenizer, encoder.float(), frozen=True)


def encoder_class(config: Any) -> Any:
    """The encoder half of what a config describes: stock pipelines know these classes by name."""
    import transformers

    halves = {"clip": "CLIPTextModel", "clip_text_model": "CLIPTextModel", "t5": "T5EncoderModel"}
    return getattr(transformers, halves.get(config.model_type, "AutoModel"))


def in_package(path: str) -> Path:
    """NAME/FOLDER inside an installed Python package, without importing it."""
    package, _, folder = path.partition("/")
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise UserError(
            f"There is no Python package {package}; install it, or set conditioning.text.encoder."
        )
    return Path(next(iter(found.submodule_search_locations))) / folder


def small_text(config: TextConfig, texts: Sequence[str]) -> Text:
    """A small BERT-like encoder with random weights and a tokenizer made from `texts`."""
    from transformers import DistilBertConfig, DistilBertModel

    tokenizer = train_tokenizer(sorted(set(texts)), config.vocabulary, config.max_length)
    encoder = DistilBertModel(
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
    return Text(tokenizer, encoder, frozen=False)


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
