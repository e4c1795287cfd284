"""Editing: equal to stock where stock does the same, known pixels exact, inversion that comes back."""

from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from ldm.data import DataConfig, open_source
from ldm.samplers import step
from pipelines import LatentDiffusion
from pipelines.cli import main as ldm
from pipelines.editing import (
    image_to_image,
    inpaint,
    interpolate,
    invert,
    outpaint,
    renoised,
    slerp,
    to_mask,
    to_pixels,
    undone,
)

PROMPT = "a large red circle at the top left on a white background"


@pytest.fixture(scope="module")
def model(chain: Path) -> LatentDiffusion:
    return LatentDiffusion.from_pretrained(chain / "ldm")


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    return open_source(DataConfig(size=16)).picture(3, 16)


def array(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def hole(size: tuple[int, int], box: tuple[int, int, int, int]) -> Image.Image:
    mask = Image.new("L", size, 0)
    mask.paste(255, box)
    return mask


def distance(a: Image.Image, b: Image.Image) -> float:
    return float(np.sqrt(np.square(array(a) - array(b)).mean()))


@pytest.mark.parametrize("strength", [0.3, 0.75])
def test_image_to_image_is_stock(
    chain: Path, model: LatentDiffusion, picture: Image.Image, strength: float
) -> None:
    stock = diffusers.StableDiffusionImg2ImgPipeline.from_pretrained(chain / "ldm" / "model")
    stock.set_progress_bar_config(disable=True)
    theirs = stock(
        PROMPT,
        image=picture,
        strength=strength,
        num_inference_steps=8,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(5),
    ).images[0]
    ours = image_to_image(model, picture, PROMPT, strength=strength, steps=8, guidance=3.0, seed=5)[0]
    assert abs(array(ours) - array(theirs)).max() <= 1


def test_inpainting_is_stock(chain: Path, model: LatentDiffusion, picture: Image.Image) -> None:
    mask = hole((16, 16), (4, 4, 12, 16))
    stock = diffusers.StableDiffusionInpaintPipeline.from_pretrained(chain / "ldm" / "model")
    stock.set_progress_bar_config(disable=True)
    theirs = stock(
        PROMPT,
        image=picture,
        mask_image=mask,
        height=16,
        width=16,
        strength=1.0,
        num_inference_steps=6,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(5),
    ).images[0]
    ours = inpaint(model, picture, mask, PROMPT, steps=6, guidance=3.0, seed=5)[0]
    inside = np.asarray(mask) > 0
    assert abs(array(ours) - array(theirs))[inside].max() <= 1
    assert (array(ours) == array(picture))[~inside].all()


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "heun", "dpmpp_2m", "unipc"])
def test_known_pixels_come_back_exactly(model: LatentDiffusion, picture: Image.Image, sampler: str) -> None:
    if sampler == "heun":
        assert model.path.kind == "flow"
    mask = hole((16, 16), (0, 0, 7, 9))  # not aligned with latent pixels
    drawn = inpaint(model, picture, mask, PROMPT, steps=3, sampler=sampler, n=2)
    known = np.asarray(mask) == 0
    for image in drawn:
        assert (array(image) == array(picture))[known].all()
        assert (array(image) != array(picture))[~known].any()
    assert distance(*drawn) > 0


def test_soft_edges_stay_within_their_width(model: LatentDiffusion) -> None:
    picture, mask = Image.new("RGB", (32, 32), "blue"), hole((32, 32), (16, 0, 32, 32))
    blend = to_mask(mask, picture, soft=4)[0, 0]
    assert (blend[:, 16:] == 1).all() and (blend[:, :12] == 0).all()
    edge = blend[0, 11:17]
    assert (edge.diff() >= 0).all() and ((edge > 0) & (edge < 1)).sum() >= 2


def test_resampling_keeps_the_variance_of_its_level(model: LatentDiffusion, picture: Image.Image) -> None:
    _, grid, _ = model.sampler_for("ddpm", 10, (4, 8, 8))
    clean = torch.zeros(1, 1, 300, 300, dtype=torch.float64)
    made = torch.Generator().manual_seed(0)
    first, second = (torch.randn(clean.shape, generator=made, dtype=torch.float64) for _ in range(2))
    for i in range(len(grid) - 1):
        x = grid.alpha[i + 1] * clean + grid.sigma[i + 1] * first
        assert renoised(x, grid, i, second).std() == pytest.approx(grid.sigma[i].item(), rel=0.02)
    mask = hole((16, 16), (0, 0, 8, 8))
    plain = inpaint(model, picture, mask, PROMPT, steps=3, sampler="ddpm")[0]
    twice = inpaint(model, picture, mask, PROMPT, steps=3, sampler="ddpm", resample=2)[0]
    assert distance(plain, twice) > 0
    with pytest.raises(ValueError, match="looks back"):
        inpaint(model, picture, mask, PROMPT, steps=3, sampler="dpmpp_2m", resample=2)


def test_outpainting_keeps_the_picture_in_the_middle(model: LatentDiffusion, picture: Image.Image) -> None:
    wide = outpaint(model, picture, (32, 24), PROMPT, steps=2)[0]
    assert wide.size == (32, 24)
    assert (array(wide)[4:20, 8:24] == array(picture)).all()
    with pytest.raises(ValueError, match="smaller than the picture"):
        outpaint(model, picture, (8, 32), PROMPT)


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
    latents = invert(model, picture, PROMPT, steps=10)
    assert latents.shape == z.shape and latents.isfinite().all()


def test_interpolation_ends_where_it_should(model: LatentDiffusion) -> None:
    between = interpolate(model, 1, 2, PROMPT, count=3, steps=3)
    ends = [model(PROMPT, seed=seed, sampler="ddim", steps=3, guidance=1.0)[0] for seed in (1, 2)]
    assert distance(between[0], ends[0]) < 1 and distance(between[-1], ends[1]) < 1
    a, b = torch.randn(2, 1, 4, 64, 64, generator=torch.Generator().manual_seed(0))
    assert slerp(a, b, 0.5).norm().item() == pytest.approx(a.norm().item(), rel=0.02)


def test_bad_input_is_answered_in_a_sentence(model: LatentDiffusion, picture: Image.Image) -> None:
    mask = hole((16, 16), (0, 0, 8, 8))
    odd = Image.new("RGB", (17, 16))
    for work, words in [
        (lambda: image_to_image(model, odd, PROMPT), "width is 17"),
        (lambda: image_to_image(model, picture, PROMPT, strength=0), "strength is 0"),
        (lambda: image_to_image(model, picture, PROMPT, strength=float("nan")), "strength is nan"),
        (lambda: image_to_image(model, picture, None), "prompts is None"),
        (lambda: inpaint(model, picture, mask.resize((8, 8)), PROMPT), "mask has the size"),
        (lambda: inpaint(model, picture, Image.new("L", (16, 16)), PROMPT), "black everywhere"),
        (lambda: inpaint(model, picture, mask, PROMPT, resample=0), "resample"),
        (lambda: interpolate(model, 1, 2, PROMPT, count=1), "count"),
        (lambda: invert(model, picture, PROMPT, iterations=0), "iterations"),
    ]:
        with pytest.raises(ValueError, match=words):
            work()


def test_transparency_and_orientation_are_honoured(model: LatentDiffusion) -> None:
    from pipelines.editing import upright

    clear = Image.new("RGBA", (4, 8), (255, 0, 0, 0))
    assert upright(clear).getpixel((0, 0)) == (255, 255, 255)
    turned = Image.new("RGB", (4, 8))
    turned.getexif()[0x0112] = 6
    assert upright(turned).size == (8, 4)


def test_editing_from_the_command_line(chain: Path, tmp_path: Path, picture: Image.Image) -> None:
    picture.save(tmp_path / "picture.png")
    hole((16, 16), (0, 0, 8, 8)).save(tmp_path / "mask.png")
    (tmp_path / "text.png").write_text("no picture")
    model, drawn, few = str(chain / "ldm"), str(tmp_path / "picture.png"), ["--steps", "2"]
    out = tmp_path / "out"
    ldm(["edit", model, drawn, PROMPT, "--strength", "0.5", "--out", str(out / "edit"), *few])
    ldm(
        [
            "inpaint",
            model,
            drawn,
            PROMPT,
            "--mask",
            str(tmp_path / "mask.png"),
            "--out",
            str(out / "in"),
            *few,
        ]
    )
    ldm(["inpaint", model, drawn, PROMPT, "--canvas", "24x16", "--out", str(out / "around"), *few])
    ldm(["interpolate", model, "1", drawn, PROMPT, "--count", "3", "--out", str(out / "between"), *few])
    assert Image.open(out / "edit" / "0000.png").text["strength"] == "0.5"
    assert Image.open(out / "around" / "0000.png").size == (24, 16)
    assert len([*(out / "between").glob("0*.png")]) == 3
    for words, code in [
        (["edit", model, str(tmp_path / "text.png"), PROMPT], 1),
        (["edit", model, str(tmp_path / "missing.png"), PROMPT], 1),
        (["edit", model, drawn, PROMPT, "--strength", "2"], 1),
        (["inpaint", model, drawn, PROMPT], 2),
    ]:
        with pytest.raises(SystemExit) as ended:
            ldm([*words, "--out", str(out / "bad")])
        assert ended.value.code == code
