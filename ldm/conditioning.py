"""What the U-Net is told besides the noisy latents: nothing, a class label, a caption, or both of them.

A conditioner turns a batch into a `Cond`. Dropping the condition for classifier-free guidance (Ho & Salimans
2022) happens here, at run time and per sample, with one null: the empty caption, or the extra class at the end.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from ldm.config import UserError
from ldm.encoders import Encoder, TextConfig, make_encoders
from ldm.tokens import encodings

Words = Literal["none", "class", "text", "class+text"]
AT_ONCE = 4096
"""Captions that are read at once to be counted; padded, each takes some kilobytes"""


class Cond(NamedTuple):
    """Conditioning of B samples; None where the model does not use a field."""

    tokens: Tensor | None = None  # [B,L,D] text states, read by cross-attention
    mask: Tensor | None = None  # [B,L] bool, True where a token may be attended to
    label: Tensor | None = None  # [B] int64 class
    pooled: Tensor | None = None  # [B,P] one text vector a caption (SDXL)
    time_ids: Tensor | None = None  # [B,6] original size, crop corner, target size in pixels (SDXL)
    image: Tensor | None = (
        None  # [B,C',h,w] what a task is given of a picture; joins the channels of x (`ldm.tasks`)
    )

    @staticmethod
    def cat(*conds: Cond) -> Cond:
        """Several conditions as one batch, in order."""
        return Cond(*(None if parts[0] is None else torch.cat(parts) for parts in zip(*conds, strict=True)))

    @property
    def words(self) -> Cond:
        """The same without the picture, which is never left out: what guidance is about."""
        return self._replace(image=None)

    def sized(self, height: int, width: int) -> Cond:
        """With `pooled`, the same with the `time_ids` of uncropped pictures of that size in pixels; else itself.

        It is what stock pipelines tell the U-Net unless they are asked for another.
        """
        if self.pooled is None:
            return self
        ids = torch.tensor([height, width, 0, 0, height, width], dtype=torch.float32)
        return self._replace(time_ids=ids.to(self.pooled.device).expand(len(self.pooled), -1))


@dataclass(frozen=True, kw_only=True)
class ConditioningConfig:
    """What the model is told."""

    kind: Words | None = None
    """none, class (labels or folder names), text (captions), or class+text; by default what `task` says, or text"""
    dropout: float = 0.1
    """Share of samples trained without their condition, which guidance needs"""
    text: TextConfig = field(default_factory=TextConfig)

    def __post_init__(self) -> None:
        if not 0 <= self.dropout < 1:
            raise ValueError(f"conditioning.dropout is {self.dropout}, but must lie in [0, 1)")
        if "text" not in self.told and self.text != TextConfig():
            raise ValueError(
                f"conditioning.text is set, but conditioning.kind is {self.kind}: remove one of the two"
            )

    @property
    def told(self) -> Words:
        """The kind, or what it is by default."""
        return self.kind or "text"


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
        """Class names as a batch, "" for the null class; ValueError names an unknown one and the nearest known ones."""
        import difflib

        numbers = {"": len(self.classes)} | {name: i for i, name in enumerate(self.classes)}
        for name in names:
            if name not in numbers:
                near = difflib.get_close_matches(name, self.classes) or self.classes[:5]
                raise ValueError(f"there is no class {name!r:.80}; the nearest are {', '.join(near)}")
        return {"label": torch.tensor([numbers[name] for name in names])}


class Text(nn.Module):
    """Captions through one or two Hugging Face encoders, frozen or trained jointly with the U-Net.

    The U-Net attends to all `max_length` states, padding included, as the stock pipelines do. Without a projection
    they are the encoder's last ones, and it is given the mask only if its config says `use_attention_mask`, which
    is what StableDiffusionPipeline goes by. With a projection, of this encoder or of a second one beside it, they
    are those before the last layer, joined along the width, without a mask; the projection is `pooled`. So says
    StableDiffusionXLPipeline.

    Args:
        encoders: one, or two of which the second projects.
        frozen: the weights do not learn.
        zero_null: null is all zeros instead of the empty caption, as SDXL's own weights have it.
    """

    def __init__(self, *encoders: Encoder, frozen: bool, zero_null: bool = False) -> None:
        super().__init__()
        if len(encoders) == 2 and [encoder.projects for encoder in encoders] != [False, True]:
            raise ValueError(
                "of two text encoders the second must have a projection, and the first must have none"
            )
        self.pools = encoders[-1].projects
        self.tokenizers = [encoder.tokenizer for encoder in encoders]
        self.encoder = encoders[0].model
        self.encoder_2 = encoders[1].model if len(encoders) > 1 else None
        self.frozen, self.zero_null = frozen, zero_null
        self.requires_grad_(not frozen)
        for name, value in self.read([""]).items():
            self.register_buffer(f"null_{name}", value, persistent=False)
        if not frozen:
            self._leave_out_what_no_state_depends_on()

    def _leave_out_what_no_state_depends_on(self) -> None:
        """A pooler, or the last layer of a first encoder beside a second: DDP would wait for a gradient for ever."""
        weights = list(self.eval().parameters())
        with torch.enable_grad():
            total = torch.stack([states.sum() for states in self.encode(self.empty).values()]).sum()
            for weight, gradient in zip(
                weights, torch.autograd.grad(total, weights, allow_unused=True), strict=True
            ):
                weight.requires_grad_(gradient is not None)
        self.train()

    def train(self, mode: bool = True) -> Text:
        return super().train(mode and not self.frozen)  # a frozen encoder has no dropout

    @property
    def encoders(self) -> list[Any]:
        """One or two."""
        return [self.encoder] if self.encoder_2 is None else [self.encoder, self.encoder_2]

    @property
    def max_length(self) -> int:
        """Tokens a caption is padded or cut to."""
        return self.tokenizers[0].model_max_length

    @property
    def empty(self) -> dict[str, Tensor]:
        """The empty caption as a batch of one."""
        return {name.removeprefix("null_"): value for name, value in self.named_buffers(recurse=False)}

    def read(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Captions as a batch: {"ids", "attend": [B,L] int64}, of two encoders also "ids_2", "attend_2"."""
        batch: dict[str, Tensor] = {}
        for i, tokenizer in enumerate(self.tokenizers):
            read, end = encodings(tokenizer, captions), f"_{i + 1}" if i else ""
            batch[f"ids{end}"] = torch.tensor([one.ids for one in read])
            batch[f"attend{end}"] = torch.tensor([one.attention_mask for one in read])
        return batch

    def vocabulary_hash(self) -> str:
        """Names what token ids mean. (A tokenizer's own text form also holds how it was last called.)"""
        words = [(sorted(t.get_vocab().items()), t.model_max_length) for t in self.tokenizers]
        return hashlib.sha256(repr(words[0] if len(words) == 1 else words).encode()).hexdigest()

    def cut(self, captions: Sequence[str]) -> int:
        """How many captions are longer than the tokenizers' limit."""
        count = 0
        for first in range(0, len(captions), AT_ONCE):
            some = captions[first : first + AT_ONCE]
            read = zip(*(encodings(tokenizer, some) for tokenizer in self.tokenizers), strict=True)
            count += sum(any(one.overflowing for one in of_one) for of_one in read)
        return count

    def encode(self, read: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What `read` made => {"tokens": states [B,L,D]}, and "pooled" [B,P] with a projection."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            if not self.pools:
                masked = getattr(self.encoder.config, "use_attention_mask", False)
                mask = read["attend"] if masked else None
                return {"tokens": self.encoder(input_ids=read["ids"], attention_mask=mask)[0]}
            said = [
                encoder(input_ids=ids, output_hidden_states=True)
                for encoder, ids in zip(self.encoders, (read["ids"], read.get("ids_2")), strict=False)
            ]
            states = torch.cat([one.hidden_states[-2] for one in said], dim=-1)
            return {"tokens": states, "pooled": said[-1].text_embeds}

    def forward(self, batch: Mapping[str, Tensor]) -> Cond:
        cached = "tokens" in batch  # states, which only a frozen encoder has
        told = {
            name: batch[name] for name in (("tokens", "pooled") if cached else self.empty) if name in batch
        }
        if "drop" in batch and not cached:
            told = dropped(batch["drop"], self.empty, told)
        told = told if cached else self.encode(told)
        if "drop" in batch and (cached or self.zero_null):
            told = dropped(batch["drop"], self._null(), told)
        return Cond(**told)

    def null(self, n: int) -> Cond:
        return Cond(**{name: value.expand(n, *value.shape[1:]) for name, value in self._null().items()})

    def _null(self) -> dict[str, Tensor]:
        null = self.encode(self.empty)
        return {name: torch.zeros_like(value) for name, value in null.items()} if self.zero_null else null


def dropped(drop: Tensor, null: Mapping[str, Tensor], told: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors [B,...] with the rows where drop [B] is true replaced by those of `null` [1,...]."""
    return {
        name: torch.where(drop.view(-1, *[1] * (value.dim() - 1)), null[name], value)
        for name, value in told.items()
    }


class ClassAndText(nn.Module):
    """A class label, which joins the time embedding, and a caption, which is attended to; dropped together."""

    def __init__(self, labels: ClassLabels, text: Text) -> None:
        super().__init__()
        self.labels, self.text = labels, text

    def forward(self, batch: Mapping[str, Tensor]) -> Cond:
        return self.text(batch)._replace(label=self.labels(batch).label)

    def null(self, n: int) -> Cond:
        return self.text.null(n)._replace(label=self.labels.null(n).label)

    def read(self, captions: Sequence[str], names: Sequence[str]) -> dict[str, Tensor]:
        """Captions and as many class names as a batch; ValueError names an unknown class."""
        return self.text.read(captions) | self.labels.read(names)


Conditioner: TypeAlias = Unconditional | ClassLabels | Text | ClassAndText
"""Turns a batch into a `Cond`, the null one where `batch["drop"]` [B] is true; `null(n)` is that of n samples."""


def text_of(conditioner: nn.Module) -> Text | None:
    """The part of a conditioner that reads captions."""
    if isinstance(conditioner, ClassAndText):
        return conditioner.text
    return conditioner if isinstance(conditioner, Text) else None


def labels_of(conditioner: nn.Module) -> ClassLabels | None:
    """The part of a conditioner that reads names of classes."""
    if isinstance(conditioner, ClassAndText):
        return conditioner.labels
    return conditioner if isinstance(conditioner, ClassLabels) else None


def join(labels: ClassLabels | None, text: Text | None) -> Conditioner:
    """The conditioner of these parts."""
    if labels and text:
        return ClassAndText(labels, text)
    return labels or text or Unconditional()


def make_conditioner(
    config: ConditioningConfig, texts: Sequence[str] | None, classes: Sequence[str]
) -> Conditioner:
    """The conditioner that `config` asks for; captions or classes come from the data."""
    labels = text = None
    if "class" in config.told:
        if not classes:
            raise UserError(
                f"conditioning.kind is {config.told}, but the data has no classes; set data.label, or choose text."
            )
        labels = ClassLabels(classes)
    if "text" in config.told:
        if not texts or not any(texts):
            raise UserError(
                f"conditioning.kind is {config.told}, but the pictures have no captions; put a .txt beside each "
                "picture, or a metadata.csv with the columns file_name and text, or choose class or none."
            )
        frozen = bool(config.text.encoder) and config.text.weights == "pretrained"
        text = Text(*make_encoders(config.text, texts), frozen=frozen)
    return join(labels, text)
