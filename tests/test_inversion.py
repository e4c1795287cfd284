"""Noise from pictures: each step of DDIM is undone, what is between two ends meets both."""

import numpy as np
import pytest
import torch
from PIL import Image

from autoencoder.metrics import psnr
from ldm.samplers import step
from pipelines import LatentDiffusion
from pipelines.inputs import to_pixels
from pipelines.inversion import blended, drawn_again, interpolate, invert, slerp, undone, vary
from tests.test_editing import PROMPT, distance

OTHER = "a small blue star at the center on a black background"


def test_inversion_solves_each_step(model: LatentDiffusion, picture: Image.Image) -> None:
    """All but the last step, which nothing can undo: it leads to the model's x_0, whatever the noise was."""
    _, grid, _ = model.sampler_for("ddim", 10, (4, 8, 8))
    denoise = model.guided(model.read(PROMPT, 1), 1, (4, 8, 8), 1.0)
    z = model.encode(to_pixels(model, picture))
    errors = []
    for iterations in (1, 20):
        with torch.no_grad():
            x = undone(denoise, z, grid, len(grid) - 2, iterations)
            errors.append(
                (step(x, denoise(x, grid[len(grid) - 2]), grid, len(grid) - 2) - z).abs().max().item()
            )
    assert errors[1] < 1e-5 < errors[0]


def test_how_near_inversion_came_is_said(model: LatentDiffusion, picture: Image.Image) -> None:
    noise = invert(model, picture, PROMPT, steps=10)
    assert noise.shape == (1, 4, 8, 8) and noise.isfinite().all()
    again = drawn_again(model, picture, noise, PROMPT, steps=10)
    pixels = to_pixels(model, picture)
    with torch.no_grad():
        coded = model.decode(model.encode(pixels)).clamp(-1, 1)
    assert again.ceiling == psnr(coded, pixels).item()
    assert again.psnr == psnr(to_pixels(model, again.picture), pixels).item()
    lost = drawn_again(model, picture, -noise, PROMPT, steps=10).picture
    assert psnr(to_pixels(model, again.picture), coded) > psnr(to_pixels(model, lost), coded) + 3


def test_variations_move_away_with_their_amount(model: LatentDiffusion, picture: Image.Image) -> None:
    again = vary(model, picture, PROMPT, amount=0, steps=5)[0]
    noise = invert(model, picture, PROMPT, steps=5)
    assert distance(again, drawn_again(model, picture, noise, PROMPT, steps=5).picture) == 0
    near, far = (vary(model, picture, PROMPT, amount=amount, n=3, steps=5, seed=1) for amount in (0.2, 0.9))
    apart = [np.mean([distance(made, again) for made in some]) for some in (near, far)]
    assert 0 < apart[0] < apart[1]
    assert distance(*near[:2]) > 0


def test_interpolation_ends_where_it_should(model: LatentDiffusion) -> None:
    between = interpolate(model, 1, 2, PROMPT, count=3, steps=3)
    ends = [model(PROMPT, seed=seed, sampler="ddim", steps=3, guidance=1.0)[0] for seed in (1, 2)]
    assert distance(between[0], ends[0]) < 1 and distance(between[-1], ends[1]) < 1
    a, b = torch.randn(2, 1, 4, 64, 64, generator=torch.Generator().manual_seed(0))
    assert slerp(a, b, 0.5).norm().item() == pytest.approx(a.norm().item(), rel=0.02)


def test_prompts_have_something_between_them(model: LatentDiffusion, picture: Image.Image) -> None:
    between = interpolate(model, 7, 7, PROMPT, to=OTHER, count=5, steps=4, guidance=3.0)
    told = {"seed": 7, "sampler": "ddim", "steps": 4, "guidance": 3.0}
    ends = [model(prompt, **told)[0] for prompt in (PROMPT, OTHER)]
    assert distance(between[0], ends[0]) < 1 and distance(between[-1], ends[1]) < 1
    states = blended(model, PROMPT, OTHER, [0.0, 0.5, 1.0])["tokens"]
    torch.testing.assert_close(states[1], (states[0] + states[2]) / 2)
    mixed = interpolate(model, 7, picture.resize((24, 16)), PROMPT, count=2, steps=2)
    assert [image.size for image in mixed] == [(24, 16)] * 2


def test_bad_input_is_answered_in_a_sentence(model: LatentDiffusion, picture: Image.Image) -> None:
    for work, words in [
        (lambda: interpolate(model, 1, 2, PROMPT, count=1), "count"),
        (lambda: interpolate(model, -1, 2, PROMPT), "seed is -1"),
        (
            lambda: interpolate(model, picture, picture.resize((24, 16)), PROMPT, steps=2),
            "make them one size",
        ),
        (lambda: invert(model, picture, PROMPT, iterations=0), "iterations"),
        (lambda: invert(model, picture), "prompts is None"),
        (lambda: vary(model, picture, PROMPT, amount=float("nan")), "amount is nan"),
    ]:
        with pytest.raises(ValueError, match=words):
            work()
