"""Models trained for a task: stock tools make the same of a picture, sizes are kept, tiles leave no seams."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from ldm.degradations import compressed, noisy
from ldm.paths import Level
from ldm.pictures import to_images, to_tensor
from ldm.random import stream
from pipelines import LatentDiffusion
from pipelines.cli import main as ldm
from pipelines.doctor.model import doctor_model
from pipelines.editing import image_to_image, inpaint, outpaint
from pipelines.evaluation.recover import inside, mean_filled, seam
from pipelines.inputs import to_mask
from pipelines.publishing.publish import SHIPPED
from pipelines.tasks import (
    Segmentation,
    damage_level,
    hole_filled,
    in_tiles,
    restore,
    segment,
    upscale,
    voted,
)
from tests.support import KINDS
from tests.test_editing import PROMPT, array, hole

MASK = hole((16, 16), (4, 4, 12, 16))


# --- stock tools -------------------------------------------------------------------------------------------------


def filled(model: LatentDiffusion, picture: Image.Image, mask: Image.Image, prompt: str | None, **how):
    """What a model that was trained for holes makes, before it is joined to the known pixels."""
    pixels, hole = to_tensor(picture), to_mask(mask, picture)[0]
    return to_images(hole_filled(model, pixels, hole, model.read(prompt, 1), [5], **how))[0]


def test_stock_inpainting_fills_the_hole_with_the_same(runs: Path, picture: Image.Image) -> None:
    stock = diffusers.StableDiffusionInpaintPipeline.from_pretrained(runs / "inpaint" / "model")
    stock.set_progress_bar_config(disable=True)
    model = LatentDiffusion.from_pretrained(runs / "inpaint")
    assert model.unet.config.in_channels == 9
    for mask in (MASK, hole((16, 16), (1, 3, 6, 16))):  # not aligned with latent pixels
        settings = {"height": 16, "width": 16, "strength": 1.0, "num_inference_steps": 6}
        generator = torch.Generator().manual_seed(5)
        theirs = stock(
            PROMPT, image=picture, mask_image=mask, guidance_scale=3.0, generator=generator, **settings
        ).images[0]
        made = filled(model, picture, mask, PROMPT, steps=6, guidance=3.0)
        assert abs(array(made) - array(theirs)).max() <= 1


@pytest.mark.parametrize("name", ["upscale", "restore", "segment", "holes"])
def test_the_shipped_pipeline_makes_the_same(
    runs: Path, picture: Image.Image, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(runs / name / "model", tmp_path / "model")
    shutil.copyfile(SHIPPED, tmp_path / "model" / "pipeline.py")
    monkeypatch.syspath_prepend(tmp_path / "model")
    monkeypatch.delitem(sys.modules, "pipeline", raising=False)
    from pipeline import LatentDiffusionPipeline

    stock = LatentDiffusionPipeline.from_pretrained(tmp_path / "model")
    stock.set_progress_bar_config(disable=True)
    odd = picture.resize((14, 16) if name == "holes" else (13, 11))
    more = {"mask_image": hole((14, 16), (3, 2, 9, 16))} if name == "holes" else {}
    generators = [torch.Generator().manual_seed(5)]
    theirs = stock(image=odd, num_inference_steps=4, generator=generators, **more).images[0]
    model = LatentDiffusion.from_pretrained(runs / name)
    if name == "holes":
        known = np.asarray(more["mask_image"])[..., None] == 0
        ours = Image.fromarray(np.where(known, odd, filled(model, odd, more["mask_image"], None, steps=4)))
    elif name == "segment":
        ours = segment(model, odd, samples=1, steps=4, seed=5).picture()
        colours = np.array(stock.config.task["colors"])
        nearest = np.square(array(theirs)[:, :, None] - colours).sum(-1).argmin(-1)
        assert theirs.size == odd.size and (nearest == np.asarray(ours)).mean() > 0.98
        return
    else:
        ours = {"upscale": upscale, "restore": restore}[name](model, odd, steps=4, seed=5)
    grown = 2 if name == "upscale" else 1
    assert ours.size == theirs.size == (odd.width * grown, odd.height * grown)
    assert abs(array(ours) - array(theirs)).max() <= 1
    with pytest.raises(ValueError, match="The task of this model is"):
        stock(num_inference_steps=2)


def test_the_doctor_looks_at_models_of_every_task(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in KINDS:
        doctor_model(str(runs / name))
        said = capsys.readouterr().out
        assert f"task:           {name}" in said and "float16:        safe" in said


# --- properties ---------------------------------------------------------------------------------------------------


def test_tiles_of_what_looks_at_its_own_pixel_are_the_whole() -> None:
    image, x = torch.randn(1, 3, 21, 34), torch.randn(1, 4, 21, 34)
    level = Level(*(torch.tensor(v) for v in (0.0, 1.0, 1.0)))

    def told(part: torch.Tensor):
        assert max(part.shape[2:]) <= 8
        return lambda x, level: x * part.mean(1, keepdim=True) + part[:, :1]

    whole = x * image.mean(1, keepdim=True) + image[:, :1]
    torch.testing.assert_close(in_tiles(told, image, 8)(x, level), whole)


def test_large_pictures_are_made_in_tiles(runs: Path, picture: Image.Image) -> None:
    model = LatentDiffusion.from_pretrained(runs / "upscale")
    small = picture.resize((40, 25))
    made = upscale(model, small, steps=2, tile=32)
    assert made.size == (80, 50)
    assert (array(made) == array(upscale(model, small, steps=2, tile=32))).all()
    one = upscale(model, picture.resize((8, 8)), steps=2)
    assert (array(one) == array(upscale(model, picture.resize((8, 8)), steps=2, tile=16))).all()


def test_what_was_drawn_meets_what_is_known(runs: Path, picture: Image.Image) -> None:
    model = LatentDiffusion.from_pretrained(runs / "inpaint")
    ours, raw = (
        inpaint(model, picture, MASK, PROMPT, steps=2, seed=5)[0],
        filled(model, picture, MASK, PROMPT, steps=2),
    )
    hole = to_mask(MASK, picture)
    assert (array(ours) == array(picture))[np.asarray(MASK) == 0].all()
    pasted = to_tensor(raw) * hole + to_tensor(picture) * (1 - hole)
    assert seam(to_tensor(ours)[None], hole) < 0.8 * seam(pasted, hole)


def test_a_picture_depends_on_its_own_seed_alone(runs: Path, picture: Image.Image) -> None:
    model = LatentDiffusion.from_pretrained(runs / "inpaint")
    both = inpaint(model, picture, MASK, PROMPT, steps=2, n=2, seed=3)
    alone = inpaint(model, picture, MASK, PROMPT, steps=2, seed=4)[0]
    assert abs(array(both[1]) - array(alone)).max() <= 1
    assert (array(both[0]) != array(both[1])).any()


def test_the_spacing_of_the_steps_is_heeded(runs: Path, picture: Image.Image) -> None:
    model = LatentDiffusion.from_pretrained(runs / "inpaint")
    one, other = (
        inpaint(model, picture, MASK, PROMPT, steps=4, sampler="ddim", spacing=spacing)[0]
        for spacing in ("trailing", "leading")
    )
    assert (array(one) != array(other)).any()
    with pytest.raises(ValueError, match="spacing"):
        inpaint(model, picture, MASK, PROMPT, steps=4, spacing="nothing")  # type: ignore[arg-type]


def test_every_setting_reaches_a_model_that_was_trained_for_holes(runs: Path, picture: Image.Image) -> None:
    model = LatentDiffusion.from_pretrained(runs / "inpaint")
    one = inpaint(model, picture, MASK, PROMPT, steps=2, soft=2)[0]
    for setting in (
        {"spacing": "karras"},
        {"sampler": "ddpm"},
        {"seed": 1},
        {"guidance": 1.0},
        {"soft": 0},
        {"negative": "a star"},
    ):
        other = inpaint(model, picture, MASK, PROMPT, **{"steps": 2, "soft": 2} | setting)[0]
        assert (array(one) != array(other)).any(), f"{setting} is not used"
    wide = outpaint(model, picture, (24, 16), PROMPT, steps=2)[0]
    assert (array(wide)[:, 4:20] == array(picture)).all()
    with pytest.raises(ValueError, match="resample is 2"):
        inpaint(model, picture, MASK, PROMPT, resample=2)


def test_what_a_model_was_not_trained_for_is_refused(runs: Path, chain: Path, picture: Image.Image) -> None:
    plain, large = (LatentDiffusion.from_pretrained(f) for f in (chain / "ldm", runs / "upscale"))
    for ask, sentence in (
        (lambda: upscale(plain, picture), "trained to draw pictures, not to upscale them"),
        (lambda: segment(large, picture), "trained to upscale pictures, not to segment them"),
        (lambda: restore(large, picture), "trained to upscale pictures, not to restore them"),
        (lambda: large(), "trained to upscale pictures, and can do nothing else"),
        (lambda: image_to_image(large, picture), "trained to upscale pictures, and can do nothing else"),
        (lambda: inpaint(large, picture, MASK), "trained to upscale pictures, not to inpaint them"),
        (lambda: upscale(large, picture, classes="pear"), "not told both captions and classes"),
        (lambda: restore(plain, picture, noise=60, negative="a pear"), "no prompt to be guided by"),
        (lambda: upscale(large, picture, noise=0.2), r"noise is 0.2, but must lie in \[0, 0.1\]"),
        (lambda: upscale(large, picture, "a pear"), "prompts are given, but this model draws without"),
        (lambda: upscale(large, picture, tile=7), "tile"),
        (lambda: restore(plain, picture, guidance=2.0), "no prompt to be guided by"),
        (lambda: upscale(large, picture, seed=-1), "seed is -1"),
        (lambda: restore(plain, picture, noise=-5), r"noise is -5, but must lie in \[0, 255\]"),
        (lambda: restore(plain, picture, noise=float("nan")), "noise is nan"),
        (lambda: restore(plain, picture, noise=60, samples=0), "samples is 0"),
        (lambda: restore(plain, picture, jpeg=96), "jpeg is 96"),
    ):
        with pytest.raises(ValueError, match=sentence):
            ask()


def test_a_plain_model_begins_where_the_noise_is(chain: Path, picture: Image.Image) -> None:
    model = replace(LatentDiffusion.from_pretrained(chain / "ldm"), fast=False)  # so that the U-Net is called
    spoiled = noisy(picture, 60, stream(0, "test", 0))
    calls = {}
    for noise in (20, 60, None):
        seen: list[float] = []
        original = model.unet.forward

        def watched(x, t, cond, seen=seen, original=original):
            seen.append(float(t[0]))
            return original(x, t, cond)

        model.unet.forward = watched
        made = restore(model, spoiled, PROMPT, noise=noise, steps=40)
        model.unet.forward = original
        assert made.size == spoiled.size
        calls[noise] = len(seen)
    assert calls[20] < calls[60] and abs(calls[None] - calls[60]) <= 4
    with pytest.raises(ValueError, match="less than the last of 5 steps removes"):
        restore(model, spoiled, noise=0.01, steps=5)
    assert restore(model, spoiled.crop((0, 0, 15, 13)), noise=60).size == (15, 13)


def test_samples_of_a_plain_model_are_averaged(model: LatentDiffusion, picture: Image.Image) -> None:
    settings = {"noise": 60, "steps": 20}
    one, two = (array(restore(model, picture, PROMPT, samples=n, **settings)) for n in (1, 2))
    assert abs(one - two).max() > 2
    alone = [array(restore(model, picture, PROMPT, seed=s, sampler="ddpm", **settings)) for s in (0, 1)]
    assert abs(alone[0] - alone[1]).max() > 2
    with pytest.raises(ValueError, match="sampler ddim makes the same each time"):
        restore(model, picture, samples=2, sampler="ddim", **settings)


def test_the_level_of_jpeg_artefacts_is_found(model: LatentDiffusion, picture: Image.Image) -> None:
    sound = picture.resize((64, 64), Image.Resampling.BICUBIC)
    levels = []
    for quality in (5, 20, 60):
        spoiled = compressed(sound, quality)
        z, moved = (model.encode(to_tensor(one)[None]) for one in (sound, spoiled))
        levels.append(damage_level(model, spoiled, None, quality, 0))
        assert 0.4 < levels[-1] / (moved - z).square().mean().sqrt().item() < 2.5
    assert levels == sorted(levels, reverse=True)
    assert damage_level(model, spoiled, 10, 60, 0) > levels[-1]


def test_votes_confidence_and_boxes() -> None:
    light, red = 215 / 127.5 - 1, 40 / 127.5 - 1
    pixels = torch.full((4, 3, 8, 9), light)
    pixels[:3, 1:, 2:5, 3:7] = red  # three of four samples say "thing" here
    pixels[0, 1:, 7, 8] = red
    found = voted(pixels, ("background", "thing"))
    assert found.boxes() == {"thing": [3, 2, 6, 4]}
    assert found.numbers.sum() == 12 and found.confidence[3, 4] == 0.75 and found.confidence[7, 8] == 0.75
    assert found.confidence[0, 0] == 1
    assert (np.asarray(found.picture()) == found.numbers).all()
    marked = array(found.over(Image.new("RGB", (9, 8))))
    assert marked[4, 3].tolist() == [255, 0, 0] and marked.sum() > 0
    assert Segmentation(("a", "b"), np.zeros((2, 2), np.uint8), np.ones((2, 2))).boxes() == {}


def test_figures_of_holes() -> None:
    truth, mask = torch.rand(3, 3, 12, 12) - 0.5, torch.zeros(3, 1, 12, 12)
    mask[:, :, 4:8, 2:9] = 1
    error = 0.1 * mask
    assert inside(truth + error, truth, mask) == pytest.approx(10 * np.log10(4 / 0.01), abs=1e-3)
    filled = mean_filled(truth, mask)
    assert torch.equal(filled * (1 - mask), truth * (1 - mask))
    torch.testing.assert_close(filled.mean((2, 3)), (truth * (1 - mask)).sum((2, 3)) / (1 - mask).sum((2, 3)))
    assert seam(torch.zeros_like(truth), mask) == 0
    assert seam(0.2 * mask.expand(-1, 3, -1, -1), mask) == pytest.approx(0.2 * 127.5, abs=0.01)


# --- files and the command line -------------------------------------------------------------------------------------


def test_a_model_of_another_task_is_refused(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "upscale" / "model", tmp_path / "model")
    file = tmp_path / "model" / "model_index.json"
    index = json.loads(file.read_text())
    assert index["task"] == {"kind": "upscale", "factor": 2, "noise": 0.1}
    for task, sentence in (
        ({"kind": "restore"}, "the U-Net reads 8 channels, but latents and what is given to restore have 16"),
        (None, "the U-Net reads 8 channels, but latents have 4"),
        ({"kind": "upscale", "factor": 10**9}, "upscale.factor is 1000000000"),
        ("upscale", "the task 'upscale' is not supported"),
    ):
        file.write_text(json.dumps(index | {"task": task}))
        with pytest.raises(ValueError, match=sentence):
            LatentDiffusion.from_pretrained(tmp_path / "model")


def test_the_command_line_has_files_in_and_out(
    runs: Path, chain: Path, picture: Image.Image, tmp_path: Path, capsys
) -> None:
    picture.save(tmp_path / "one.png")
    picture.convert("RGBA").resize((10, 12)).save(tmp_path / "two.png")
    files = [str(tmp_path / name) for name in ("one.png", "two.png")]
    for verb in ("upscale", "restore", "segment"):
        ldm([verb, str(runs / verb), *files, "--out", str(tmp_path / verb), "--steps", "2", "--samples", "2"])
    assert Image.open(tmp_path / "upscale" / "two.png").size == (20, 24)
    assert Image.open(tmp_path / "restore" / "two.png").size == (10, 12)
    names = {path.name for path in (tmp_path / "segment").iterdir()}
    ends = ("-mask.png", "-confidence.png", "-boxes.json", "-boxes.png")
    assert names == {name + end for name in ("one", "two") for end in ends}
    assert Image.open(tmp_path / "segment" / "one-mask.png").mode == "P"
    MASK.save(tmp_path / "mask.png")
    holes = ["inpaint", str(runs / "holes"), files[0], "--mask", str(tmp_path / "mask.png"), "--steps", "2"]
    ldm([*holes, "--out", str(tmp_path / "holes")])
    assert Image.open(tmp_path / "holes" / "0000.png").text["guidance"] == "1.0"
    noisy(picture, 60, stream(0, "test", 0)).save(tmp_path / "noisy.png")
    plain = ["restore", str(chain / "ldm"), str(tmp_path / "noisy.png"), "--out", str(tmp_path / "plain")]
    capsys.readouterr()
    ldm(plain)
    noise = Image.open(tmp_path / "plain" / "noisy.png").text["noise"]
    assert f"noisy: noise of about {noise} of 255, estimated" in capsys.readouterr().out and float(noise) > 20
    ldm([*plain, "--jpeg", "5", "--samples", "2", "--steps", "60"])
    capsys.readouterr()
    for words, sentence in (
        (["generate", str(runs / "upscale"), "--out", str(tmp_path / "x")], "trained to upscale pictures"),
        (
            ["upscale", str(runs / "upscale"), files[0], files[0], "--out", str(tmp_path / "x")],
            "Two pictures",
        ),
        (
            ["upscale", str(runs / "upscale"), str(tmp_path / "no.png"), "--out", str(tmp_path / "x")],
            "no.png",
        ),
        (["restore", str(runs / "restore"), str(tmp_path), "--out", str(tmp_path / "x")], "is a folder"),
        (["restore", str(runs / "restore"), files[0], "--out", str(tmp_path)], "would be replaced"),
        (
            ["restore", str(runs / "restore"), files[0], "--jpeg", "9", "--out", str(tmp_path / "x")],
            "sees for itself",
        ),
        (
            ["recover", str(chain / "ldm"), "--blur", "1", "--out", str(tmp_path / "y.json")],
            "no blur is undone",
        ),
        (["recover", str(runs / "restore"), "--out", str(tmp_path)], "must name a file .json"),
        (["recover", str(runs / "restore"), "--seed", "-1", "--out", str(tmp_path / "x.json")], "seed is -1"),
        (["upscale", str(chain / "ldm"), files[0], "--out", str(tmp_path / "x")], "not to upscale them"),
        (["segment", str(chain / "ldm"), files[0], "--out", str(tmp_path / "x")], "not to segment them"),
        (
            [*holes, "--project", "--guidance", "3", "--out", str(tmp_path / "x")],
            "--project and --guidance is",
        ),
        (
            ["upscale", str(runs / "upscale"), files[0], "--guidance", "3", "--out", str(tmp_path)],
            "guided by",
        ),
        (
            ["recover", str(runs / "restore"), "--guidance", "3", "--out", str(tmp_path / "x.json")],
            "guided by",
        ),
    ):
        with pytest.raises(SystemExit) as stopped:
            ldm(words)
        assert stopped.value.code == 1 and sentence in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("kind", [*KINDS, "plain"])
def test_recovering_is_measured(runs: Path, chain: Path, tmp_path: Path, kind: str) -> None:
    model = chain / "ldm" if kind == "plain" else runs / kind
    words = ["recover", str(model), "--n", "3", "--out", str(tmp_path / "f.json"), "--steps"]
    ldm(words + (["20", "--noise", "60", "--samples", "2"] if kind == "plain" else ["2"]))
    figures = json.loads((tmp_path / "f.json").read_text())
    assert figures["task"] == ("restore" if kind == "plain" else kind)
    assert figures["trial"]["n"] == 3 and (tmp_path / "f.png").exists()
    if kind == "segment":
        assert 0 <= figures["mean_iou"] <= 1
    else:
        assert figures["made"]["psnr_db"] > 0 and figures["autoencoder alone"]["psnr_db"] > 0


def test_a_run_on_scenes_is_tried_on_other_pictures(runs: Path, fruit: Path, tmp_path: Path) -> None:
    words = ["recover", str(runs / "restore"), "--data", str(fruit), "--split", "train", "--steps", "1"]
    ldm([*words, "--out", str(tmp_path / "f.json")])
    assert json.loads((tmp_path / "f.json").read_text())["trial"]["n"] == 6
