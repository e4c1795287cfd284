"""Editing: equal to stock where stock does the same, nearer with less strength, known pixels exact."""

import shutil
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from ldm.pictures import BadPicture
from pipelines import LatentDiffusion
from pipelines.cli import main as ldm
from pipelines.editing import image_to_image, inpaint, joined, outpaint, renoised
from pipelines.inputs import filled, read_picture, softened, to_mask, to_pixels, upright
from pipelines.latent_diffusion import noise_of

PROMPT = "a large red circle at the top left on a white background"


def array(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def hole(size: tuple[int, int], box: tuple[int, int, int, int]) -> Image.Image:
    mask = Image.new("L", size, 0)
    mask.paste(255, box)
    return mask


def distance(a: Image.Image, b: Image.Image) -> float:
    return float(np.sqrt(np.square(array(a) - array(b)).mean()))


@pytest.fixture
def latents(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """What our pipeline decodes, which stock hands out when asked for latents."""
    seen: list[torch.Tensor] = []
    decode = LatentDiffusion.decode

    def spy(self: LatentDiffusion, z: torch.Tensor, tile: int | None = None) -> torch.Tensor:
        seen.append(z)
        return decode(self, z, tile)

    monkeypatch.setattr(LatentDiffusion, "decode", spy)
    return seen


def drawn_by_stock(kind: type, chain: Path, **asked: object) -> torch.Tensor:
    """Latents, with the same noise as ours has at seed 5."""
    stock = kind.from_pretrained(chain / "ldm" / "model")
    stock.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(5)
    return stock(PROMPT, **asked, guidance_scale=3.0, generator=generator, output_type="latent").images


@pytest.mark.parametrize("strength", [0.3, 0.75, 1.0])
def test_image_to_image_is_stock(
    chain: Path,
    model: LatentDiffusion,
    picture: Image.Image,
    latents: list[torch.Tensor],
    strength: float,
) -> None:
    asked = {"image": picture, "strength": strength, "num_inference_steps": 8}
    theirs = drawn_by_stock(diffusers.StableDiffusionImg2ImgPipeline, chain, **asked)
    image_to_image(model, picture, PROMPT, strength=strength, steps=8, guidance=3.0, seed=5)
    torch.testing.assert_close(latents[0], theirs, atol=1e-4, rtol=1e-4)


def test_inpainting_is_stock(
    chain: Path, model: LatentDiffusion, picture: Image.Image, latents: list[torch.Tensor]
) -> None:
    mask = hole((16, 16), (4, 4, 12, 16))
    covered = filled(to_pixels(model, picture), 1 - to_mask(mask, picture))
    asked = {"image": covered / 2 + 0.5, "mask_image": mask, "height": 16, "width": 16}
    asked |= {"strength": 1.0, "num_inference_steps": 6}
    theirs = drawn_by_stock(diffusers.StableDiffusionInpaintPipeline, chain, **asked)
    ours = inpaint(model, picture, mask, PROMPT, steps=6, guidance=3.0, seed=5)[0]
    torch.testing.assert_close(latents[0], theirs, atol=1e-4, rtol=1e-4)
    known = np.asarray(mask) == 0
    assert (array(ours) == array(picture))[known].all()


def test_less_strength_stays_nearer_to_the_picture(
    model: LatentDiffusion, picture: Image.Image, latents: list[torch.Tensor]
) -> None:
    z = model.encode(to_pixels(model, picture), noise_of(range(4), (4, 8, 8), model.device)(-2))
    for strength in (0.1, 0.3, 0.5, 0.7, 0.9):
        image_to_image(model, picture, PROMPT, strength=strength, n=4)
    distances = [(made - z).square().mean().item() for made in latents]
    assert distances == sorted(distances) and distances[-1] > 2 * distances[0]


def test_what_the_hole_shows_has_no_part_in_the_picture(model: LatentDiffusion, picture: Image.Image) -> None:
    mask = hole((16, 16), (5, 3, 12, 11))
    other = picture.copy()
    other.paste((255, 0, 255), (5, 3, 12, 11))
    drawn = [inpaint(model, one, mask, PROMPT, steps=3)[0] for one in (picture, other)]
    assert (array(drawn[0]) == array(drawn[1])).all()


def test_a_hole_is_filled_with_the_colours_around_it(picture: Image.Image) -> None:
    known = torch.ones(1, 1, 13, 17)
    known[:, :, 2:11, 4:14] = 0
    slope = torch.linspace(-1, 1, 17).expand(1, 3, 13, 17)
    covered = filled(slope.clone(), known)
    assert torch.equal(covered[known.expand_as(covered) > 0], slope[known.expand_as(slope) > 0])
    assert (covered - slope).abs().max() < 0.6 and covered[0, 0, 6, 5] < covered[0, 0, 6, 12]
    garbage = slope + 100 * (1 - known)
    assert torch.equal(filled(garbage, known), covered)


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


def test_soft_edges_stay_within_their_width() -> None:
    picture, mask = Image.new("RGB", (32, 32), "blue"), hole((32, 32), (16, 0, 32, 32))
    sharp = to_mask(mask, picture)
    assert torch.equal(softened(sharp, 0), sharp)
    for soft in (1, 4, 5):
        blend = softened(sharp, soft)[0, 0]
        assert (blend[:, 16:] == 1).all() and (blend[:, : 16 - soft] == 0).all()
        edge = blend[0, 15 - soft : 17]
        assert (edge.diff() >= 0).all() and ((edge > 0) & (edge < 1)).sum() >= soft // 2


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
    with pytest.raises(ValueError, match="not larger than the picture"):
        outpaint(model, picture, (8, 32), PROMPT)


def test_bad_input_is_answered_in_a_sentence(model: LatentDiffusion, picture: Image.Image) -> None:
    mask = hole((16, 16), (0, 0, 8, 8))
    odd = Image.new("RGB", (17, 16))
    for work, words in [
        (lambda: image_to_image(model, odd, PROMPT), "the picture is 17x16, .* crop it to 16x16"),
        (lambda: image_to_image(model, picture, PROMPT, strength=0), "strength is 0"),
        (lambda: image_to_image(model, picture, PROMPT, strength=float("nan")), "strength is nan"),
        (lambda: image_to_image(model, picture, None), "prompts is None"),
        (lambda: inpaint(model, picture, mask.resize((8, 8)), PROMPT), "mask has the size"),
        (lambda: inpaint(model, picture, Image.new("L", (16, 16)), PROMPT), "black everywhere"),
        (lambda: inpaint(model, picture, Image.new("L", (16, 16), 255), PROMPT), "white everywhere"),
        (lambda: inpaint(model, picture, mask, PROMPT, resample=0), "resample"),
        (lambda: inpaint(model, picture, mask, PROMPT, soft=-1), "soft is -1"),
        (lambda: inpaint(model, picture, mask, PROMPT, n=3, seed=[1, 2]), "2 seeds for 3 pictures"),
        (lambda: image_to_image(model, Image.new("RGB", (1, 1)), PROMPT), "the picture is 1x1, .* to 2x2"),
        (lambda: outpaint(model, picture, picture.size, PROMPT), "nothing would be added"),
    ]:
        with pytest.raises(ValueError, match=words):
            work()


def test_what_is_no_picture_is_said(model: LatentDiffusion, picture: Image.Image) -> None:
    for work in (
        lambda: image_to_image(model, "picture.png", PROMPT),  # type: ignore[arg-type]
        lambda: inpaint(model, picture, None, PROMPT),  # type: ignore[arg-type]
    ):
        with pytest.raises(TypeError, match="is no picture; give a PIL image"):
            work()
    with pytest.raises(ValueError, match=r"must be \(width, height\)"):
        model(PROMPT, size=(16,))  # type: ignore[arg-type]


def test_what_was_drawn_meets_the_known_pixels() -> None:
    made = torch.Generator().manual_seed(0)
    pixels = torch.rand(1, 3, 17, 24, generator=made)
    edge = torch.zeros(1, 1, 17, 24)
    edge[:, :, 3:11, 5:20] = 1
    edge[:, :, 11:13, 5:20] = 0.5
    tint = torch.tensor([0.3, -0.2, 0.1]).view(1, 3, 1, 1)
    torch.testing.assert_close(joined(pixels + tint, pixels, edge), pixels)
    other = torch.rand(2, 3, 17, 24, generator=made)
    known = (edge == 0).expand_as(other)
    assert torch.equal(joined(other, pixels, edge)[known], pixels.expand_as(other)[known])


def test_transparency_orientation_and_depth_are_honoured() -> None:
    clear = Image.new("RGBA", (4, 8), (255, 0, 0, 0))
    assert upright(clear).getpixel((0, 0)) == (255, 255, 255)
    turned = Image.new("RGB", (4, 8))
    turned.getexif()[0x0112] = 6
    assert upright(turned).size == (8, 4)
    deep = Image.fromarray(np.full((4, 4), 40_000, np.uint16))
    assert upright(deep).getpixel((0, 0)) == (156, 156, 156)


def test_pictures_are_read_and_fitted(tmp_path: Path) -> None:
    clear = Image.new("RGBA", (40, 20), (255, 0, 0, 0))
    clear.save(tmp_path / "clear.png")
    fitted = read_picture(tmp_path / "clear.png", (16, 16))
    assert fitted.size == (16, 16) and fitted.getpixel((3, 3)) == (255, 255, 255)
    with pytest.raises(BadPicture, match="can't be opened"):
        read_picture(tmp_path / "missing.png")


def test_editing_from_the_command_line(
    chain: Path, tmp_path: Path, picture: Image.Image, capsys: pytest.CaptureFixture[str]
) -> None:
    model, drawn, mask, out = (
        str(p) for p in (chain / "ldm", tmp_path / "p.png", tmp_path / "m.png", tmp_path)
    )
    picture.save(drawn)
    hole((16, 16), (0, 0, 8, 8)).save(mask)
    Path(out, "text.png").write_text("no picture")
    Image.new("L", (16, 16), 255).save(tmp_path / "white.png")
    (tmp_path / "bad").mkdir()
    shutil.copy(drawn, tmp_path / "bad" / "0003.png")
    few = ["--steps", "2"]
    ldm(["edit", model, drawn, PROMPT, "--strength", "0.5", "--out", f"{out}/edit", *few])
    ldm(["inpaint", model, drawn, PROMPT, "--mask", mask, "--soft", "2", "--out", f"{out}/in", *few])
    assert "25% of the picture is white in the mask" in capsys.readouterr().out
    ldm(["inpaint", model, drawn, PROMPT, "--canvas", "24x16", "--out", f"{out}/around", *few])
    ldm(["vary", model, drawn, "--n", "2", "--out", f"{out}/vary", *few, PROMPT])
    ldm(["invert", model, drawn, PROMPT, "--to", "a blue star", "--out", f"{out}/back", *few])
    assert "PSNR" in capsys.readouterr().out
    ldm(["interpolate", model, "1", drawn, PROMPT, "--count", "3", "--out", f"{out}/between", *few])
    ldm(["interpolate", model, "1", "1", PROMPT, "--to", "a star", "--out", f"{out}/said", *few])
    text = Image.open(f"{out}/edit/0000.png").text
    assert text["strength"] == "0.5" and text["made_by"] == "ldm edit" and text["from_picture"] == "p.png"
    assert not any(str(tmp_path) in value for value in text.values())
    assert Image.open(f"{out}/around/0000.png").size == (24, 16)
    assert [len([*Path(out, name).glob("0*.png")]) for name in ("vary", "back", "between", "said")] == [
        2,
        2,
        3,
        8,
    ]
    for words, code, said in [
        (["edit", model, f"{out}/text.png", PROMPT], 1, "is in no format that is read"),
        (["edit", model, f"{out}/missing.png", PROMPT], 1, "can't be opened"),
        (["edit", model, drawn, PROMPT, "--strength", "2"], 1, "strength is 2.0"),
        (["edit", model, drawn, PROMPT, "--seed", "1,2"], 1, "2 seeds for 1 pictures"),
        (["edit", model, drawn, PROMPT, "--size", "1x1"], 1, "the picture is 1x1"),
        (["edit", model, drawn], 1, "There is no prompt, but this model needs a caption"),
        (["vary", model, drawn], 1, "There is no prompt, but this model needs a caption"),
        (["vary", model, drawn, PROMPT, "--class", "pear"], 1, "this model is told no classes"),
        (["inpaint", model, drawn, PROMPT], 2, "--mask"),
        (["inpaint", model, drawn, PROMPT, "--mask", f"{out}/white.png"], 1, "white everywhere"),
        (["vary", model, drawn, PROMPT, "--amount", "2"], 1, "amount is 2.0"),
        (["vary", model, drawn, PROMPT, "more"], 2, "unrecognized arguments: more"),
        (["interpolate", model, "1", f"{out}/missing.png", PROMPT], 1, "can't be opened"),
        (["interpolate", model, "1", "2", PROMPT, "--size", "16x16"], 1, "no picture to scale"),
        (
            ["edit", model, f"{out}/bad/0003.png", PROMPT],
            1,
            "bad/0003.png lies in --out and would be replaced",
        ),
        (
            ["interpolate", model, "1", f"{out}/bad/0003.png", PROMPT],
            1,
            "lies in --out and would be replaced",
        ),
    ]:
        with pytest.raises(SystemExit) as ended:
            ldm([*words, "--out", f"{out}/bad"])
        assert ended.value.code == code and said in capsys.readouterr().err
