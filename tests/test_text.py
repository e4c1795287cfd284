"""Text encoders of every kind against the stock pipelines: the states that their U-Net is given, and the pictures."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ldm.conditioning import ClassAndText, ConditioningConfig, Text, make_conditioner
from ldm.config import UserError
from ldm.encoders import TextConfig
from pipelines import LatentDiffusion
from pipelines.publishing.shipped.pipeline import LatentDiffusionPipeline
from tests.encoders import CAPTIONS, ENCODERS, PROJECTED, WIDTH, conditioner, config, model_of
from tests.support import ROOT

diffusers = pytest.importorskip("diffusers", reason="diffusers is the oracle")

EVERY_ENCODER = pytest.mark.parametrize("name", ENCODERS)
WEIGHTS = pytest.mark.parametrize("weights", ["pretrained", "random"])


def told(text: Text, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor | None]:
    with torch.no_grad():
        cond = text(text.read(captions))
    return cond.tokens, cond.pooled


@EVERY_ENCODER
@WEIGHTS
def test_stock_pipelines_feed_their_unet_the_same(
    name: str, weights: str, encoders: dict[str, Path], tmp_path: Path
) -> None:
    text = conditioner(config(encoders, name, weights))
    model_of(text).save_pretrained(tmp_path)
    stock = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    xl = "projection" in ENCODERS[name]
    assert type(stock) is (diffusers.StableDiffusionXLPipeline if xl else diffusers.StableDiffusionPipeline)
    asked = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": True}
    with torch.no_grad():
        theirs = stock.encode_prompt(CAPTIONS, **asked)
    tokens, pooled = told(text, CAPTIONS)
    null = text.null(len(CAPTIONS))
    again = LatentDiffusion.from_pretrained(tmp_path).conditioner
    assert torch.equal(tokens, theirs[0])
    torch.testing.assert_close(null.tokens, theirs[1])  # ours is of one caption, theirs of four
    assert torch.equal(told(again, CAPTIONS)[0], tokens)
    assert tokens.shape == (4, 12, WIDTH * len(ENCODERS[name])) and tokens.std() > 0.1
    assert (tokens[0] - tokens[1]).abs().max() > 0.01, "captions differ"
    if xl:
        assert torch.equal(pooled, theirs[2])
        torch.testing.assert_close(null.pooled, theirs[3])
        assert torch.equal(told(again, CAPTIONS)[1], pooled)
        assert pooled.shape == (4, PROJECTED)
    else:
        assert pooled is None


@EVERY_ENCODER
def test_stock_pipelines_draw_the_same(name: str, encoders: dict[str, Path], tmp_path: Path) -> None:
    model = model_of(conditioner(config(encoders, name)))
    with torch.no_grad():
        for weight in model.unet.parameters():
            weight += 0.05 * torch.randn_like(weight)
    model.save_pretrained(tmp_path)
    stock = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    stock.set_progress_bar_config(disable=True)
    for size, negative in (((16, 16), ""), ((24, 16), "a green square")):
        generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
        theirs = stock(
            CAPTIONS[:2],
            negative_prompt=[negative] * 2 if negative else None,
            width=size[0],
            height=size[1],
            num_inference_steps=4,
            guidance_scale=3.0,
            generator=generators,
        ).images
        ours = model(CAPTIONS[:2], negative=negative, size=size, steps=4, guidance=3.0, seed=5)
        for one, other in zip(ours, theirs, strict=True):
            assert one.size == other.size == size
            assert np.abs(np.asarray(one).astype(int) - np.asarray(other)).max() <= 1
        assert np.asarray(ours[0]).std() > 5


@pytest.mark.parametrize("spacing", [None, "karras", "exponential"])
def test_the_spacing_of_steps_is_saved_and_stock_pipelines_follow_it(
    spacing: Any, encoders: dict[str, Path], tmp_path: Path
) -> None:
    model = replace(model_of(conditioner(config(encoders, "clip"))), spacing=spacing)
    model.save_pretrained(tmp_path)
    again = LatentDiffusion.from_pretrained(tmp_path)
    assert again.spacing == (spacing or "trailing")
    stock = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path)
    stock.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    theirs = stock(CAPTIONS[0], num_inference_steps=5, guidance_scale=3.0, generator=generator).images[0]
    ours = [
        np.asarray(one(CAPTIONS[0], steps=5, guidance=3.0, seed=3)[0]).astype(int) for one in (model, again)
    ]
    assert np.array_equal(*ours) and np.abs(ours[0] - np.asarray(theirs)).max() <= 1
    other = again(CAPTIONS[0], steps=5, guidance=3.0, seed=3, spacing="linspace")[0]
    assert not np.array_equal(ours[0], np.asarray(other))
    by_name = again(CAPTIONS[0], steps=5, guidance=3.0, seed=3, spacing=spacing or "trailing")[0]
    assert np.array_equal(ours[0], np.asarray(by_name))
    with pytest.raises(ValueError, match="spacing is 'karas', but path vp has"):
        again(CAPTIONS[0], steps=5, spacing="karas")


def test_zeros_as_null_are_kept_as_sdxl_has_them(encoders: dict[str, Path], tmp_path: Path) -> None:
    text = conditioner(config(encoders, "pair"))
    model_of(text).save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["force_zeros_for_empty_prompt"] is False and text.null(1).tokens.any()
    del index["force_zeros_for_empty_prompt"]  # stock's default is true
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    model = LatentDiffusion.from_pretrained(tmp_path)
    assert not model.conditioner.null(2).tokens.any() and not model.conditioner.null(2).pooled.any()
    drop = {"drop": torch.tensor([True, False])}
    cond = model.conditioner(model.conditioner.read(CAPTIONS[:2]) | drop)
    assert not cond.tokens[0].any() and not cond.pooled[0].any() and cond.tokens[1].any()
    model.save_pretrained(tmp_path / "again")
    stock = diffusers.StableDiffusionXLPipeline.from_pretrained(tmp_path / "again")
    assert stock.config.force_zeros_for_empty_prompt is True


@EVERY_ENCODER
def test_dropping_is_the_same_with_and_without_a_cache(name: str, encoders: dict[str, Path]) -> None:
    text = conditioner(config(encoders, name))
    drop, read = torch.tensor([True, False, False, True]), text.read(CAPTIONS)
    plain, cached = text(read | {"drop": drop}), text(text.encode(read) | {"drop": drop})
    null, kept = text.null(4), text(read)
    for field in ("tokens", "pooled"):
        one, other = getattr(plain, field), getattr(cached, field)
        if one is None:
            assert other is None and "projection" not in ENCODERS[name]
            continue
        torch.testing.assert_close(one, other)
        torch.testing.assert_close(one[drop], getattr(null, field)[drop])
        torch.testing.assert_close(one[~drop], getattr(kept, field)[~drop])


@EVERY_ENCODER
def test_published_weights_are_frozen(name: str, encoders: dict[str, Path]) -> None:
    text = conditioner(config(encoders, name)).train()
    assert not any(weight.requires_grad for weight in text.parameters())
    assert not any(part.training for part in text.modules())
    assert not told(text, CAPTIONS)[0].requires_grad


@EVERY_ENCODER
def test_random_weights_learn_and_read_the_captions_words(name: str, encoders: dict[str, Path]) -> None:
    text = conditioner(config(encoders, name, "random", vocabulary=6)).train()
    assert all("square" in t.get_vocab() and "zebra" not in t.get_vocab() for t in text.tokenizers)
    cond = text(text.read(CAPTIONS))
    (cond.tokens.square().sum() + (0 if cond.pooled is None else cond.pooled.square().sum())).backward()
    without = [key for key, p in text.named_parameters() if p.requires_grad and p.grad is None]
    still = {key for key, p in text.named_parameters() if not p.requires_grad}
    assert not without, "DDP would wait for their gradient"
    assert bool(still) == (name in ("bert", "pair")), "a pooler, and the last layer of the first of two"
    first = torch.cat([p.flatten() for p in text.parameters()])
    torch.manual_seed(0)
    other = make_conditioner(
        ConditioningConfig(text=config(encoders, name, "random", vocabulary=6)), CAPTIONS[::-1], ()
    )
    assert torch.equal(first, torch.cat([p.flatten() for p in other.parameters()])), (
        "not of the order of captions"
    )


def test_class_and_caption_are_dropped_together(encoders: dict[str, Path]) -> None:
    both = conditioner(config(encoders, "pair"), kind="class+text")
    assert isinstance(both, ClassAndText)
    drop = torch.tensor([True, False])
    cond = both(both.read(CAPTIONS[:2], ["lime", "lime"]) | {"drop": drop})
    null = both.null(2)
    assert cond.label.tolist() == [2, 1] and null.label.tolist() == [2, 2]
    for field in ("tokens", "pooled"):
        said, nothing = getattr(cond, field), getattr(null, field)
        torch.testing.assert_close(said[0], nothing[0])
        assert not torch.allclose(said[1], nothing[1])


@pytest.mark.parametrize("name", ["clip", "pair", "projection alone"])
def test_class_and_caption_are_saved_and_drawn_with(
    name: str, encoders: dict[str, Path], tmp_path: Path
) -> None:
    model = model_of(conditioner(config(encoders, name), kind="class+text"), num_class_embeds=3)
    with torch.no_grad():
        model.unet.class_embedding.weight.mul_(3)
    model.save_pretrained(tmp_path)
    again = LatentDiffusion.from_pretrained(tmp_path)
    assert again.conditioner.labels.classes == ("plum", "lime")
    drawn = [np.asarray(image) for image in model(CAPTIONS[:2], classes=["plum", "lime"], steps=3)]
    for one, other in zip(drawn, again(CAPTIONS[:2], classes=["plum", "lime"], steps=3), strict=True):
        assert np.array_equal(one, np.asarray(other))
    assert not np.array_equal(drawn[0], np.asarray(model(CAPTIONS[0], classes="lime", steps=3)[0]))
    stock = LatentDiffusionPipeline.from_pretrained(tmp_path)
    stock.set_progress_bar_config(disable=True)
    size = {"width": 24, "height": 16}
    theirs = stock(
        CAPTIONS[:2],
        class_labels=["plum", "lime"],
        num_inference_steps=3,
        generator=[torch.Generator().manual_seed(seed) for seed in (0, 1)],
        **size,
    ).images
    ours = model(CAPTIONS[:2], classes=["plum", "lime"], steps=3, size=(24, 16))
    for one, other in zip(ours, theirs, strict=True):
        assert np.abs(np.asarray(one).astype(int) - np.asarray(other)).max() <= 1
    for words in ({}, {"prompt": CAPTIONS[0]}, {"class_labels": "plum"}):
        with pytest.raises(ValueError, match="This model is told captions and classes"):
            stock(**words)
    with pytest.raises(ValueError, match="no such class"):
        stock(CAPTIONS[0], class_labels="plam")
    for bad, message in (
        ({"prompts": CAPTIONS[0]}, "classes is None, but this model needs"),
        ({"prompts": CAPTIONS[:3], "classes": ["plum", "lime"]}, "there are 2 classes for 3 prompts"),
        ({"prompts": CAPTIONS[0], "classes": "plam"}, "there is no class 'plam'"),
        ({"classes": "plum"}, "prompts is None, but this model needs a caption"),
    ):
        with pytest.raises(ValueError, match=message):
            again(**bad)


@pytest.fixture
def process_group(tmp_path: Path):
    """A real process group, of this process alone."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@EVERY_ENCODER
def test_every_learning_weight_gets_a_gradient_that_processes_wait_for(
    name: str, encoders: dict[str, Path], process_group: None
) -> None:
    text = conditioner(config(encoders, name, "random")).train()
    parallel = torch.nn.parallel.DistributedDataParallel(text)
    for _ in range(
        2
    ):  # the second forward pass raises if a weight had no gradient in the first backward pass
        cond = parallel(text.read(CAPTIONS) | {"drop": torch.tensor([True, False, False, False])})
        (cond.tokens.sum() + (0 if cond.pooled is None else cond.pooled.sum())).backward()


def test_sizes_are_told_as_stock_pipelines_tell_them(encoders: dict[str, Path]) -> None:
    text = conditioner(config(encoders, "pair"))
    cond = text.null(2).sized(24, 16)
    stock = diffusers.StableDiffusionXLPipeline._get_add_time_ids
    config_, unet = model_of(text).unet.config, diffusers.UNet2DConditionModel
    fake = type("Stock", (), {"unet": unet(**replace(config_).__dict__)})()
    told = stock(fake, (24, 16), (0, 0), (24, 16), torch.float32, PROJECTED)
    assert torch.equal(cond.time_ids, told.repeat(2, 1))
    plain = conditioner(config(encoders, "clip")).null(2)
    assert plain.sized(24, 16) is plain


def test_the_shipped_shapes_are_a_pair() -> None:
    shapes = [str(ROOT / "configs" / "encoders" / f"{name}.json") for name in ("clip", "clip-projection")]
    text = conditioner(TextConfig(encoder=shapes[0], encoder_2=shapes[1], weights="random"))
    cond = text.null(1)
    assert cond.tokens.shape == (1, 16, 128 + 192) and cond.pooled.shape == (1, 192)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"encoder_2": "x"}, "text.encoder_2 is x, but text.encoder is not set"),
        ({"weights": "random"}, "text.weights is random, but text.encoder is not set"),
        ({"encoder": "x", "vocabulary": 9}, "text.vocabulary is of a tokenizer made from the captions"),
        ({"encoder": "x", "layers": 1}, "text.layers is of the small encoder"),
        ({"max_length": 0}, "text.max_length is 0"),
        ({"width": 10, "heads": 4}, "text.width is 10, but must be a multiple of text.heads, 4"),
    ],
)
def test_settings_that_would_be_ignored_are_refused(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TextConfig(**given)


def test_encoders_that_do_not_go_together_are_refused(encoders: dict[str, Path], tmp_path: Path) -> None:
    clip, bert, projection = (str(encoders[kind]) for kind in ("clip", "bert", "projection"))
    for one, two, message in (
        (clip, bert, "it is a bert model, but must be a CLIP text encoder with a projection"),
        (clip, clip, "has no weights for text_.*; choose another"),
        (projection, projection, "the first must have none"),
    ):
        with pytest.raises((UserError, ValueError), match=message):
            conditioner(TextConfig(encoder=one, encoder_2=two))
    for weights in ("pretrained", "random"):
        with pytest.raises(UserError, match=r"reads at most 77 tokens, but .*max_length is 78"):
            conditioner(TextConfig(encoder=clip, max_length=78, weights=weights))
        with pytest.raises(UserError, match=r"can't be loaded"):
            conditioner(TextConfig(encoder=str(tmp_path), weights=weights))
