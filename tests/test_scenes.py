"""Drawn scenes: the same picture for the same index, a fair split, a checker that believes what it sees."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import combinations, product

import numpy as np
import pytest
from PIL import Image, ImageFilter

from ldm.scenes import (
    BACKGROUNDS,
    COLOURS,
    GROWTH,
    PLACES,
    RELATIONS,
    SHAPES,
    SHIFT,
    SIDES,
    SIZES,
    TURN,
    Scene,
    Scenes,
    Split,
    Thing,
    draw,
    every_scene,
    held_out,
    mask,
    parse,
    prompts,
)
from ldm.scenes_check import UNCLEAR, read, satisfied, score

CAPTION = "a large red circle at the top left on a white background"
PAIR_CAPTION = "a small cyan heart to the left of a large blue ring on a gray background"


def drawn(caption: str, size: int = 64, seed: int = 0) -> Image.Image:
    return draw(parse(caption), size, random.Random(seed))


def samples(
    count: int, size: int, level: int = 1, split: Split = "train"
) -> tuple[list[Image.Image], list[str]]:
    pairs = [(sample["image"], sample["text"]) for sample in Scenes(count, size, level, split)]
    return [image for image, _ in pairs], [text for _, text in pairs]


def worn(image: Image.Image, seed: int) -> np.ndarray:
    """A picture like a model's: blurred by 0.7 pixels, with noise of 8/255."""
    soft = np.asarray(image.filter(ImageFilter.GaussianBlur(0.7)), dtype=np.float64)
    noise = np.random.default_rng(seed).normal(0, 8, soft.shape)
    return (soft + noise).round().clip(0, 255).astype(np.uint8)


# The data set


@pytest.mark.parametrize("level", [1, 2])
def test_a_picture_is_a_function_of_seed_split_and_index(level: int) -> None:
    some, same = Scenes(8, 32, level, seed=3), Scenes(5, 32, level, seed=3)
    assert [some[index]["image"].tobytes() for index in (4, 0, 7)] == [
        same[index]["image"].tobytes() for index in (4, 0, 7)
    ]
    assert some[4]["text"] == same[4]["text"]
    others = [Scenes(8, 32, level, seed=4), Scenes(8, 32, level, "test", seed=3)]
    assert all(other[4]["image"].tobytes() != some[4]["image"].tobytes() for other in others)


def test_the_first_picture_stays_what_it_is() -> None:
    """The random numbers must not depend on the version of Python; raise VERSION with any other change."""
    assert [Scenes(9)[index]["text"] for index in (0, 1)] == [
        "a small yellow square at the top right on a gray background",
        "a large orange circle at the top right on a gray background",
    ]


def test_pictures_do_not_run_out_but_an_epoch_ends() -> None:
    scenes = Scenes(3, 32)
    far = {scenes[index]["image"].tobytes() for index in (0, 1, 2, 3, 10**6, 2**31 - 1)}
    assert len(far) == 6
    assert len(list(scenes)) == len(scenes) == 3
    with pytest.raises(IndexError, match="index is -1"):
        scenes[-1]


@pytest.mark.parametrize("size", [32, 64, 128])
def test_samples_have_picture_caption_and_label(size: int) -> None:
    sample = Scenes(1, size)[0]
    assert sample["image"].size == (size, size) and sample["image"].mode == "RGB"
    assert Scenes.classes[sample["label"]] in sample["text"]
    assert Scenes(1, size).scene(0) == parse(sample["text"])


def test_fingerprints_tell_parameters_apart() -> None:
    sets = [
        Scenes(1),
        Scenes(2),
        Scenes(1, 32),
        Scenes(1, level=2),
        Scenes(1, split="test"),
        Scenes(1, seed=1),
    ]
    assert len({scenes.fingerprint for scenes in sets}) == len(sets)
    assert Scenes(1).fingerprint == Scenes(1).fingerprint


def test_bad_parameters_are_named() -> None:
    with pytest.raises(ValueError, match="count is 0"):
        Scenes(0)
    with pytest.raises(ValueError, match="level is 3"):
        Scenes(1, level=3)
    with pytest.raises(ValueError, match="split is 'validation'"):
        Scenes(1, split="validation")  # type: ignore[arg-type]


# The split


def facts(scene: Scene) -> Iterator[tuple[str, ...]]:
    """The attribute values of a scene, each thing's with the scene's background and relation."""
    for thing in scene.things:
        yield thing.colour, thing.shape, thing.size, thing.place, scene.background, scene.relation or "alone"


@pytest.mark.parametrize("level", [1, 2])
def test_training_lacks_the_held_out_triples_and_shows_every_pair(level: int) -> None:
    train, test = every_scene(level, "train"), every_scene(level, "test")
    assert not any(map(held_out, train)) and all(map(held_out, test))
    seen, unseen = ({fact for scene in part for fact in facts(scene)} for part in (train, test))
    for pair in combinations(range(6), 2):
        pairs_seen, pairs_unseen = (
            {tuple(fact[k] for k in pair) for fact in part} for part in (seen, unseen)
        )
        assert pairs_unseen <= pairs_seen
    triples = {fact[:2] + fact[3:4] for fact in seen}
    novel = {fact[:2] + fact[3:4] for fact in unseen} - triples
    assert len(novel) / (len(novel) + len(triples)) == pytest.approx(1 / 8, abs=0.01)


def test_level_one_covers_every_combination_once() -> None:
    scenes = [*every_scene(1, "train"), *every_scene(1, "test")]
    assert len(set(scenes)) == len(scenes)
    assert len(scenes) == len(COLOURS) * len(SHAPES) * len(SIZES) * len(PLACES) * len(BACKGROUNDS)


def test_prompts_are_different_and_held_out() -> None:
    texts = prompts(240)
    assert len(set(texts)) == 240 and all(held_out(parse(text)) for text in texts)
    assert prompts(8) == texts[:8] != prompts(8, seed=1)
    assert all(parse(text).relation in RELATIONS for text in prompts(8, level=2))
    with pytest.raises(ValueError, match="only 240 test captions at level 1"):
        prompts(241)


# Captions


def test_captions_read_as_promised() -> None:
    thing = Thing("red", "circle", "large", "top left")
    assert Scene((thing,), None, "white").caption() == CAPTION
    pair = Thing("cyan", "heart", "small", "left"), Thing("blue", "ring", "large", "right")
    assert Scene(pair, "to the left of", "gray").caption() == PAIR_CAPTION


def test_parse_inverts_caption() -> None:
    scenes = [*every_scene(1, "train"), *every_scene(1, "test"), *every_scene(2, "train")[::97]]
    assert all(parse(scene.caption()) == scene for scene in scenes)


@pytest.mark.parametrize(
    "text", ["", "a red circle", CAPTION + " ", CAPTION.replace("red", "mauve"), "a" + CAPTION]
)
def test_parse_refuses_other_texts(text: str) -> None:
    with pytest.raises(ValueError, match="does not describe a scene"):
        parse(text)


# Drawing


@pytest.mark.parametrize("shape", SHAPES)
def test_edges_are_anti_aliased_and_everything_is_inside(shape: str) -> None:
    silhouette = np.asarray(mask(shape, 64, (0.5, 0.5), 0.2, 0.1))
    assert 0.01 < np.mean((silhouette > 0) & (silhouette < 255)) < 0.05
    for (x, y), turn in product([*PLACES.values(), *SIDES.values()], (-TURN, TURN)):
        centre = x + SHIFT * np.sign(x - 0.5), y + SHIFT * np.sign(y - 0.5)
        outermost = np.asarray(mask(shape, 64, centre, SIZES["large"] * (1 + GROWTH), turn))
        assert (
            outermost[[0, -1]].max() < 255 and outermost[:, [0, -1]].max() < 255
        )  # ends within its last pixel


def test_pictures_mix_colours_at_edges_only() -> None:
    pixels = np.asarray(drawn(CAPTION)).reshape(-1, 3)
    colours, counts = np.unique(pixels, axis=0, return_counts=True)
    assert len(colours) > 10 and np.sort(counts)[-2:].sum() > 0.95 * len(pixels)


def test_silhouettes_have_the_area_and_place_of_their_geometry() -> None:
    circle = np.asarray(mask("circle", 64, (0.4, 0.6), 0.2, 0)) / 255
    assert circle.mean() == pytest.approx(np.pi * 0.2**2, rel=0.01)
    middles = (np.arange(64) + 0.5) / 64
    assert circle.sum(0) @ middles / circle.sum() == pytest.approx(0.4, abs=0.002)
    assert circle.sum(1) @ middles / circle.sum() == pytest.approx(0.6, abs=0.002)


# The checker


@pytest.mark.parametrize("size", [32, 64])
def test_checker_believes_true_pairs(size: int) -> None:
    result = score(*samples(1000, size))
    assert set(result) == {"colour", "shape", "size", "place", "background", "all"}
    assert result["all"] >= 0.98


@pytest.mark.parametrize(("size", "level"), [(32, 1), (64, 1), (64, 2)])
def test_checker_forgives_mild_blur_and_noise(size: int, level: int) -> None:
    images, texts = samples(200, size, level, "test")
    assert score([worn(image, seed) for seed, image in enumerate(images)], texts)["all"] >= 0.95


@pytest.mark.parametrize("size", [32, 64])
def test_checker_believes_pairs_of_things(size: int) -> None:
    result = score(*samples(150, size, level=2))
    assert "relation" in result and "place" not in result
    assert result["all"] >= 0.95


def test_checker_refuses_shuffled_captions() -> None:
    images, texts = samples(200, 32)
    assert score(images, texts[1:] + texts[:1])["all"] < 0.02
    images, texts = samples(50, 32, level=2)
    assert score(images, texts[1:] + texts[:1])["all"] < 0.02


def changed(scene: Scene, attribute: str, rng: random.Random) -> Scene:
    """`scene` with another value of one attribute."""
    choices: dict[str, Sequence[str]] = {
        "colour": list(COLOURS),
        "shape": SHAPES,
        "size": list(SIZES),
        "place": list(PLACES),
        "background": list(BACKGROUNDS),
    }
    thing = scene.things[0]
    now = scene.background if attribute == "background" else getattr(thing, attribute)
    value = rng.choice([choice for choice in choices[attribute] if choice != now])
    if attribute == "background":
        return replace(scene, background=value)
    return replace(scene, things=(replace(thing, **{attribute: value}),))


@pytest.mark.parametrize("attribute", ["colour", "shape", "size", "place", "background"])
def test_checker_refuses_one_changed_attribute_and_names_it(attribute: str) -> None:
    rng = random.Random(0)
    images, texts = samples(50, 32)
    wrong = [changed(parse(text), attribute, rng).caption() for text in texts]
    result = score([worn(image, seed) for seed, image in enumerate(images)], wrong)
    assert result.pop("all") < 0.1 and result.pop(attribute) < 0.1
    assert min(result.values()) >= 0.9


def test_one_picture_satisfies_both_ways_to_tell_a_relation() -> None:
    image = drawn(PAIR_CAPTION)
    assert satisfied(image, PAIR_CAPTION)["all"]
    assert satisfied(image, "a large blue ring to the right of a small cyan heart on a gray background")[
        "all"
    ]
    assert not satisfied(image, PAIR_CAPTION.replace("left", "right"))["relation"]
    above = satisfied(image, PAIR_CAPTION.replace("to the left of", "above"))
    assert above["colour"] and above["shape"] and above["size"] and not above["relation"] and not above["all"]


def test_checker_counts_things() -> None:
    blank = Image.new("RGB", (64, 64), BACKGROUNDS["white"])
    assert read(blank) == Scene((), None, "white")
    assert satisfied(blank, CAPTION) == dict.fromkeys(("colour", "shape", "size", "place", "all"), False) | {
        "background": True
    }
    spoiled = drawn(CAPTION)
    spoiled.paste((0, 0, 255), (40, 40, 46, 46))
    assert len(read(spoiled).things) == 2 and not satisfied(spoiled, CAPTION)["all"]
    speck = drawn(CAPTION)
    speck.paste((0, 0, 255), (40, 40, 42, 42))
    assert satisfied(speck, CAPTION)["all"]


def test_checker_calls_odd_things_unclear() -> None:
    thing = read(
        drawn(CAPTION.replace("circle", "heart")).rotate(180, fillcolor=BACKGROUNDS["white"])
    ).things[0]
    assert thing.shape == UNCLEAR and thing.place == "bottom right"
    between = Image.new("RGB", (64, 64), BACKGROUNDS["white"])
    between.paste((0, 0, 0), mask=mask("circle", 64, (0.5, 0.28), SIZES["large"], 0))
    assert read(between).things[0] == Thing(UNCLEAR, "circle", "large", UNCLEAR)
    two_coloured = drawn("a large red square at the center on a white background")
    two_coloured.paste(COLOURS["blue"], mask=mask("square", 64, (0.5, 0.7), SIZES["large"], 0))
    assert not satisfied(two_coloured, "a large red square at the center on a white background")["all"]


def test_noise_satisfies_nothing() -> None:
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (32, 32, 3), dtype=np.uint8) for _ in range(20)]
    assert score(images, prompts(20))["all"] == 0


def test_checker_refuses_what_it_cannot_read() -> None:
    with pytest.raises(ValueError, match=r"image is float64 \[64, 64, 3\]"):
        read(np.zeros((64, 64, 3)))
    with pytest.raises(ValueError, match="give a square one"):
        read(Image.new("RGB", (64, 32)))
    with pytest.raises(ValueError, match="1 images for 0 captions"):
        score([Image.new("RGB", (64, 64))], [])
