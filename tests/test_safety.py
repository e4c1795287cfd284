"""The stock safety checker without stock code, and what it does to a publication."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from ldm.config import UserError
from pipelines import LatentDiffusion
from pipelines.cli import main as ldm
from pipelines.publishing.publication import Publication
from pipelines.publishing.publish import verdict
from pipelines.safety import ClipSafetyChecker, Verdict, provenance, withheld

COLOURS = ("red", "green", "blue", "white", "black", "yellow")
IMAGES = [Image.new("RGB", (56, 40), colour) for colour in COLOURS]
IMAGES[0].putdata([(x % 251, x % 199, x % 91) for x in range(56 * 40)])


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory):
    """A small stock checker with random weights, half of whose verdicts are positive, in its folder."""
    pytest.importorskip("diffusers", reason="diffusers is the oracle")
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPConfig

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = shape | {"image_size": 32, "patch_size": 8}
    checker = StableDiffusionSafetyChecker(CLIPConfig(vision_config=vision, projection_dim=16)).eval()
    with torch.no_grad():
        for name in ("concept_embeds", "special_care_embeds"):
            getattr(checker, name).copy_(torch.randn(getattr(checker, name).shape))
            getattr(checker, f"{name}_weights").fill_(1.0)
    folder = tmp_path_factory.mktemp("checker")
    checker.save_pretrained(folder)
    looked = ClipSafetyChecker.from_pretrained(folder)
    nearest = [max(verdict.scores.values()) + 1 for verdict in looked(IMAGES)]
    with torch.no_grad():  # half of the pictures are nearer than the mean of the nearest
        checker.concept_embeds_weights.fill_(float(np.median(nearest)))
        checker.special_care_embeds_weights[0] = 0.0  # so that some are held to the stricter thresholds
    checker.save_pretrained(folder)
    return checker, folder


def test_verdicts_are_those_of_the_stock_checker(stock) -> None:
    theirs, folder = stock
    ours = ClipSafetyChecker.from_pretrained(folder)
    pixels = torch.stack([ours.prepare(image) for image in IMAGES])
    _, flagged = theirs(pixels, [np.zeros((1, 1, 3)) for _ in IMAGES])
    assert [verdict.flagged for verdict in ours(IMAGES)] == flagged
    embeds = theirs.visual_projection(theirs.vision_model(pixels)[1])
    torch.testing.assert_close(ours.network(pixels).image_embeds, embeds)


def test_pictures_are_prepared_as_stock_clip_prepares_them(stock) -> None:
    from transformers import CLIPImageProcessorPil

    ours = ClipSafetyChecker.from_pretrained(stock[1])
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    theirs = CLIPImageProcessorPil(**size)(IMAGES, return_tensors="pt").pixel_values
    mine = torch.stack([ours.prepare(image) for image in IMAGES])
    assert (mine - torch.as_tensor(theirs)).abs().max() < 0.1  # of about 4: bytes are rounded differently


def test_a_folder_without_the_embeddings_is_no_checker(stock, tmp_path: Path) -> None:
    weights = load_file(stock[1] / "model.safetensors")
    del weights["concept_embeds"]
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((stock[1] / "config.json").read_bytes())
    with pytest.raises(UserError, match="no safety checker"):
        ClipSafetyChecker.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("model.safetensors", "no tensors at all"),
        ("config.json", '{"model_type": "clip", "projection_dim": "x"}'),
        ("config.json", '{"model_type": "clip", "vision_config": 3}'),
        ("config.json", '{"model_type": "clip", "vision_config": {"num_attention_heads": 0}}'),
        ("config.json", "[]"),
        ("config.json", "{"),
    ],
)
def test_a_damaged_checker_is_one_sentence(stock, tmp_path: Path, file: str, text: str) -> None:
    for path in stock[1].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / file).write_text(text)
    with pytest.raises(UserError, match="no safety checker"):
        ClipSafetyChecker.from_pretrained(tmp_path)


def test_without_a_checker_or_eyes_no_samples_are_shown(stock, tmp_path: Path) -> None:
    def asked(**more: object) -> Publication:
        return Publication(model=tmp_path, name="a/b", license="mit", **more)

    assert "did not say to have looked" in verdict(IMAGES, asked(), None)[1]
    assert verdict(IMAGES, asked(looked_at=True), None)[1] == ""
    checker = ClipSafetyChecker.from_pretrained(stock[1])
    flagged = [found.flagged for found in checker(IMAGES)]
    assert any(flagged) and not all(flagged)
    with pytest.raises(UserError, match=f"flags {sum(flagged)} of 6 samples, so nothing was published"):
        verdict(IMAGES, asked(), checker)
    clean = [image for image, bad in zip(IMAGES, flagged, strict=True) if not bad]
    said, why_not = verdict(clean, asked(), checker)
    assert why_not == "" and f"flagged 0 of {len(clean)} samples" in said


def test_flagged_pictures_are_withheld(stock) -> None:
    checker = ClipSafetyChecker.from_pretrained(stock[1])
    shown, verdicts = withheld(IMAGES, checker)
    assert any(verdict.flagged for verdict in verdicts)
    for image, original, said in zip(shown, IMAGES, verdicts, strict=True):
        assert image.size == original.size
        assert (image.getextrema() == ((0, 0),) * 3) if said.flagged else image is original


def test_a_checker_that_can_not_judge_lets_nothing_through(stock) -> None:
    checker = ClipSafetyChecker.from_pretrained(stock[1])
    checker.weights = checker.weights | {"concept_embeds": checker.weights["concept_embeds"] * float("nan")}
    assert all(verdict.flagged for verdict in checker(IMAGES))

    class Silent:
        name = "silent"

        def __call__(self, images: Sequence[Image.Image]) -> list[Verdict]:
            return []

    with pytest.raises(UserError, match="judged 0 of 6 pictures, so all are withheld"):
        withheld(IMAGES, Silent())


def with_thresholds(checker: Path, folder: Path, shift: float) -> Path:
    """The same checker in another folder, its thresholds shifted, and nothing that asks for special care."""
    folder.mkdir()
    (folder / "config.json").write_bytes((checker / "config.json").read_bytes())
    weights = load_file(checker / "model.safetensors")
    weights["concept_embeds_weights"] += shift
    weights["special_care_embeds_weights"] += 2
    save_file(weights, folder / "model.safetensors")
    return folder


def test_generate_withholds_what_is_flagged(
    stock, chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checker = ClipSafetyChecker.from_pretrained(stock[1])
    drawn = LatentDiffusion.from_pretrained(chain / "ldm")("a circle", n=6, steps=2)
    nearest = [max(verdict.scores.values()) for verdict in checker(drawn)]
    with_thresholds(stock[1], tmp_path / "strict", float(np.median(nearest)))  # half of these are too near
    flagged = [v.flagged for v in ClipSafetyChecker.from_pretrained(tmp_path / "strict")(drawn)]
    assert any(flagged) and not all(flagged)
    told = ["generate", str(chain / "ldm"), "a circle", "--n", "6", "--steps", "2"]
    told += ["--checker", str(tmp_path / "strict")]
    (tmp_path / "out").mkdir()
    drawn[0].save(tmp_path / "out" / f"{flagged.index(True):04d}.png")
    ldm([*told, "--out", str(tmp_path / "out")])
    assert f"strict flagged {sum(flagged)} of 6 pictures; these are not written" in capsys.readouterr().out
    written = {path.name for path in (tmp_path / "out").glob("0*.png")}
    assert written == {f"{i:04d}.png" for i in range(6) if not flagged[i]}
    ldm([*told, "--keep-flagged", "--out", str(tmp_path / "all")])
    texts = [Image.open(tmp_path / "all" / f"{i:04d}.png").text for i in range(6)]
    assert [text["flagged"] for text in texts] == [str(bad) for bad in flagged]
    assert {text["checked_by"] for text in texts} == {"strict"}


def test_tasks_withhold_what_is_flagged(
    stock, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    strict = with_thresholds(stock[1], tmp_path / "strict", -9.0)
    IMAGES[0].save(tmp_path / "a.png")
    told = [
        "restore",
        str(runs / "restore"),
        str(tmp_path / "a.png"),
        "--steps",
        "1",
        "--checker",
        str(strict),
    ]
    ldm([*told, "--out", str(tmp_path / "out")])
    assert f"strict flagged {tmp_path}/out/a.png; these are not written" in capsys.readouterr().out
    assert not [*(tmp_path / "out").iterdir()]
    ldm([*told, "--keep-flagged", "--reuse", "2", "--out", str(tmp_path / "all")])
    text = Image.open(tmp_path / "all" / "a.png").text
    assert (text["flagged"], text["checked_by"], text["made_by"]) == ("True", "strict", "ldm restore")
    with pytest.raises(SystemExit) as ended:
        ldm(["segment", *told[1:], "--out", str(tmp_path / "none")])
    assert ended.value.code == 2 and "unrecognized arguments: --checker" in capsys.readouterr().err


def test_pictures_say_that_a_model_made_them(tmp_path: Path) -> None:
    IMAGES[0].save(tmp_path / "made.png", pnginfo=provenance(prompt="a 🦊", seed=3))
    text = Image.open(tmp_path / "made.png").text
    assert text["prompt"] == "a 🦊" and text["digital_source_type"].endswith("trainedAlgorithmicMedia")
