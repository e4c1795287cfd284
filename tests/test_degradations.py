"""What spoils pictures does so by as much as it says, and in the same way for the same seed."""

import numpy as np
import pytest
import torch
from PIL import Image

from autoencoder.metrics import psnr
from ldm import random
from ldm.degradations import blurred, compressed, noise_level, noisy, smaller
from ldm.pictures import to_tensor
from ldm.tasks import Restore


def stream(position: int = 0) -> np.random.Generator:
    return random.stream(0, "test", position)


@pytest.fixture
def picture() -> Image.Image:
    """Smooth, with an edge, and nowhere near black or white."""
    x, y = np.meshgrid(np.arange(96), np.arange(80))
    grey = 110 + 30 * np.sin(x / 9) * np.cos(y / 11) + 20 * (x > 50)
    return Image.fromarray(np.stack([grey, grey + 10, grey - 10], -1).astype(np.uint8))


def distance(one: Image.Image, other: Image.Image) -> float:
    return psnr(to_tensor(one)[None], to_tensor(other)[None]).item()


@pytest.mark.parametrize("std", [5.0, 15.0, 40.0])
def test_noise_is_as_strong_as_said_and_is_found_again(picture: Image.Image, std: float) -> None:
    spoiled = noisy(picture, std, stream())
    error = np.asarray(spoiled).astype(float) - np.asarray(picture)
    assert error.std() == pytest.approx(std, rel=0.05) and abs(error.mean()) < std / 20
    assert noise_level(spoiled) == pytest.approx(std, rel=0.1)
    assert noise_level(picture) < 2


def test_stronger_damage_is_further_from_the_picture(picture: Image.Image) -> None:
    for damage, strengths in ((blurred, (0.5, 1, 2, 4)), (compressed, (90, 60, 30, 5))):
        distances = [distance(damage(picture, strength), picture) for strength in strengths]
        assert distances == sorted(distances, reverse=True) and len(set(distances)) == len(distances)
    assert smaller(picture, 4).size == (24, 20)


def test_on_another_grid_jpeg_does_as_much_damage_again(picture: Image.Image) -> None:
    """Which is how its strength is measured when the sound picture is not at hand."""
    noise = noisy(picture, 8, stream())
    once = compressed(noise, 15)
    first, same, shifted = (
        float(np.square(np.asarray(a, float) - np.asarray(once, float)).mean())
        for a in (noise, compressed(once, 15), compressed(once, 15, shift=4))
    )
    assert compressed(once, 15, shift=4).size == once.size
    assert same < 0.1 * first and 0.3 * first < shifted < 3 * first


def test_damage_is_a_function_of_seed_and_position(picture: Image.Image) -> None:
    every = Restore(share=1.0)
    one, again, other = (np.asarray(every.done(picture, stream(p))) for p in (3, 3, 4))
    assert (one == again).all() and (one != other).any()


def test_each_damage_happens_as_often_as_said(picture: Image.Image) -> None:
    tiny = picture.resize((8, 8))
    rare = Restore(blur=None, jpeg=None, noise=(20.0, 20.0), share=0.25)
    spoiled = sum((np.asarray(rare.done(tiny, stream(p))) != np.asarray(tiny)).any() for p in range(400))
    assert 70 < spoiled < 130
    never = Restore(blur=None, jpeg=None, noise=None)
    assert all((np.asarray(never.done(tiny, stream(p))) == np.asarray(tiny)).all() for p in range(20))


@pytest.mark.parametrize(
    "setting", [{"noise": (5.0, 2.0)}, {"jpeg": (0.0, 50.0)}, {"blur": (-1.0, 1.0)}, {"share": 0.0}]
)
def test_ranges_that_mean_nothing_are_refused(setting: dict) -> None:
    with pytest.raises(ValueError, match=f"restore.{next(iter(setting))} is"):
        Restore(**setting)


def test_a_picture_too_small_for_an_estimate_says_so() -> None:
    with pytest.raises(ValueError, match="too small to estimate its noise"):
        noise_level(Image.new("RGB", (2, 2)))
    assert torch.isfinite(to_tensor(smaller(Image.new("RGB", (3, 3)), 8))).all()
