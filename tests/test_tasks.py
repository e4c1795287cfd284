"""What a task is given of pictures: exactly that, for the same sample always the same, and beside x_t."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import train_ldm
from ldm import random
from ldm.conditioning import Cond
from ldm.config import load
from ldm.data import DataConfig, ScenesConfig, open_source
from ldm.denoiser import Denoiser
from ldm.guidance import guided
from ldm.paths import EDM, Level
from ldm.prediction import make_prediction
from ldm.tasks import (
    Inpaint,
    Restore,
    Segment,
    Upscale,
    from_json,
    on_grid,
    random_hole,
    spoiled,
    task_of,
    to_json,
    words_of,
)
from tests.support import TOY, newest_weights
from tests.test_chain import _main_until

TASKS = (Inpaint(), Upscale(factor=2), Upscale(factor=4), Restore(), Segment())


@pytest.fixture(scope="module")
def scenes() -> list[Image.Image]:
    source = open_source(DataConfig(size=16, scenes=ScenesConfig(count=24)))
    return [source.picture(i, 16) for i in range(6)]


# --- the contract ----------------------------------------------------------------------------------------------


def test_the_picture_joins_the_scaled_noise_and_is_the_same_with_and_without_words() -> None:
    seen = []

    def network(x: torch.Tensor, t: torch.Tensor, cond: Cond) -> torch.Tensor:
        assert cond.image is None
        seen.append((x, cond.label))
        return x[:, :4] * (1 + cond.label.view(-1, 1, 1, 1))

    path = EDM()
    denoiser = Denoiser(network, path, make_prediction("edm", path))
    x, image = 30 * torch.randn(2, 4, 8, 8), torch.randn(2, 3, 8, 8)
    to, away = (Cond(label=torch.full((2,), label), image=image) for label in (1, 2))
    level = Level(*(torch.tensor(v) for v in (0.0, 1.0, 30.0)))
    guided(denoiser, to, away, 3.0)(x, level)
    ((shown, labels),) = seen
    assert labels.tolist() == [2, 2, 1, 1] and shown.shape == (4, 7, 8, 8)
    torch.testing.assert_close(shown[:2, :4], path.scale_input(x, level.sigma))
    assert torch.equal(shown[:2, 4:], image) and torch.equal(shown[2:, 4:], image)


def test_a_picture_alone_is_nothing_to_be_guided_away_from() -> None:
    calls = []

    def network(x: torch.Tensor, t: torch.Tensor, cond: Cond) -> torch.Tensor:
        calls.append(len(x))
        return x[:, :4]

    path = EDM()
    denoise = guided(
        Denoiser(network, path, make_prediction("edm", path)), Cond(image=torch.zeros(2, 1, 8, 8)), None, 4.0
    )
    denoise(torch.randn(2, 4, 8, 8), Level(*(torch.tensor(v) for v in (0.0, 1.0, 2.0))))
    assert calls == [2]


@pytest.mark.parametrize("task", TASKS, ids=lambda task: f"{task.kind}{getattr(task, 'factor', '')}")
@pytest.mark.parametrize("factor", [2, 4])
def test_what_is_given_has_the_channels_that_the_network_is_built_for(task, factor: int, scenes) -> None:
    given = spoiled(task, scenes, 0, range(6))
    image = task.image(given, lambda x: F.avg_pool2d(x, factor)[:, [0, 1, 2, 0]], factor)
    assert image.shape == (6, task.channels(factor, 4), 16 // factor, 16 // factor)


@pytest.mark.parametrize("task", TASKS, ids=lambda task: f"{task.kind}{getattr(task, 'factor', '')}")
def test_what_is_given_depends_on_seed_and_position_alone(task, scenes) -> None:
    whole = spoiled(task, scenes, 5, range(10, 16))
    part = spoiled(task, scenes[2:4], 5, [12, 13])
    assert all(torch.equal(whole[name][2:4], part[name]) for name in whole)
    other = spoiled(task, scenes, 6, range(10, 16))
    assert isinstance(task, Segment) or any((whole[name] != other[name]).any() for name in whole)


def test_no_pixel_is_lost_on_the_grid() -> None:
    pixels = torch.randn(2, 3, 16, 24)
    assert torch.equal(F.pixel_shuffle(on_grid(pixels, 4), 4), pixels)
    assert torch.equal(on_grid(pixels, 0.5)[:, :, ::2, ::2], pixels)


def test_an_inpainting_model_is_not_told_what_is_in_the_hole(scenes) -> None:
    given = spoiled(Inpaint(), scenes, 0, range(6))
    other = given | {"picture": torch.where(given["mask"] > 0.5, torch.randn(6, 3, 16, 16), given["picture"])}
    encode = lambda x: F.avg_pool2d(x, 2)  # noqa: E731
    one, two = (Inpaint().image(g, encode, 2) for g in (given, other))
    assert torch.equal(one, two)
    assert torch.equal(one[:, :1], given["mask"][:, :, ::2, ::2])


def test_holes_are_neither_empty_nor_everything() -> None:
    shares = [np.mean(np.asarray(random_hole((32, 24), random.stream(0, "t", p))) > 0) for p in range(300)]
    assert min(shares) > 0 and max(shares) < 1 and 0.3 < np.mean(shares) < 0.7
    whole = spoiled(Inpaint(whole=1.0), [Image.new("RGB", (8, 8))], 0, [0])
    assert (whole["mask"] == 1).all()


def test_the_noise_of_a_small_picture_is_as_told() -> None:
    task, grey = Upscale(factor=2, noise=0.5), [Image.new("RGB", (64, 64), (128, 128, 128))] * 40
    given = spoiled(task, grey, 0, range(40))
    stds = given["picture"].std((1, 2, 3))
    torch.testing.assert_close(stds, given["noise"], rtol=0.1, atol=0.01)
    assert given["noise"].min() >= 0 and 0.4 < given["noise"].max() <= 0.5
    told = task.image(given, lambda x: x, 2)[:, -1]
    torch.testing.assert_close(told.mean((1, 2)), given["noise"] / 0.5)


# --- recipes -----------------------------------------------------------------------------------------------------


def recipe(*more: str) -> train_ldm.Recipe:
    return load(train_ldm.Recipe, ["--config", str(TOY / "ldm-plain.yaml"), *more], prog="test")


def test_a_task_says_what_words_are_told_unless_the_recipe_does() -> None:
    kinds = {"text": "text", "class": "class", "unconditional": "none", "inpaint": "text", "upscale": "none"}
    assert {task: recipe("--task", task).conditioning.kind for task in kinds} == kinds
    assert recipe().conditioning.kind == "text" and recipe().begins_with() is None
    assert recipe("--task", "upscale", "--conditioning.kind", "class").conditioning.kind == "class"
    assert recipe("--task", "text", "--conditioning.kind", "class+text").conditioning.kind == "class+text"
    both = recipe("--task", "upscale", "--upscale.factor", "2")
    assert both.begins_with() == Upscale(factor=2)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--task", "text", "--conditioning.kind", "class"], "task is text, but conditioning.kind is class"),
        (["--task", "unconditional", "--conditioning.kind", "text"], "task is unconditional, but"),
        (["--task", "restore", "--upscale.factor", "2"], "upscale is set, but task is restore"),
        (["--upscale.factor", "2"], "upscale is set, but task is None"),
        (["--task", "upscale", "--upscale.factor", "3"], "factor"),
        (["--task", "upscale", "--conditioning.text.width", "64"], "conditioning.text is set, but"),
        (["--task", "paint"], "task"),
    ],
)
def test_contradictions_are_refused(flags: list[str], sentence: str, capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        recipe(*flags)
    assert stopped.value.code == 2 and sentence in capsys.readouterr().err


def test_a_task_is_read_back_as_it_was_saved() -> None:
    for task in (*TASKS, Restore(blur=None), Segment(classes=("nothing", "cat", "dog"))):
        assert from_json(to_json(task)) == task
    assert "masks" not in to_json(Segment(masks="/home/somebody/masks"))
    assert words_of(None, None) == "text" and task_of(None, TASKS[:1]) is None
    for bad in (
        None,
        "upscale",
        {"kind": "draw"},
        {"kind": "upscale", "factor": "4"},
        {"kind": "upscale", "noise": []},
        {"kind": "restore", "blur": [1]},
        {"kind": "inpaint", "whole": "x"},
        {"kind": "inpaint", "other": 1},
        {"kind": "segment", "classes": ["a", "a"]},
        {"kind": "segment", "classes": [{}]},
    ):
        with pytest.raises(ValueError, match=r"task|segment|upscale|restore|inpaint"):
            from_json(bad)


# --- training -----------------------------------------------------------------------------------------------------


def test_a_resumed_run_spoils_the_same_pictures_in_the_same_way(chain: Path, tmp_path: Path) -> None:
    def arguments(out: str) -> list[str]:
        return (
            f"--config {TOY}/ldm-plain.yaml --task inpaint --conditioning.kind none --data.path scenes "
            f"--data.scenes.count 24 --data.flip true --autoencoder {chain}/vae --workers 0 --run.out {tmp_path}/{out}"
        ).split()

    train_ldm.main(arguments("one"))
    with pytest.raises(SystemExit):
        _main_until(train_ldm, arguments("two"), step=3)
    train_ldm.main([*arguments("two"), "--workers", "1"])
    one, two = newest_weights(tmp_path / "one"), newest_weights(tmp_path / "two")
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
