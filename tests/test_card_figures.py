"""What `ldm evaluate` measured reaches the card, if it was measured of these weights."""

import json
from pathlib import Path

import pytest
import torch

from autoencoder.store import weight_hash
from ldm.config import UserError
from pipelines import LatentDiffusion
from pipelines.cli import main as ldm
from pipelines.publishing.card_figures import measured
from pipelines.publishing.card_words import leaf, published_recipe


def test_figures_of_these_weights_alone(chain: Path, result: Path, tmp_path: Path) -> None:
    model = LatentDiffusion.from_pretrained(chain / "ldm")
    found = {metric.name: metric for metric in measured(result, weight_hash(model.unet.state_dict()))}
    said = json.loads(result.read_text())["figures"]
    assert {name.replace("_", " "): figure["value"] for name, figure in said.items()} == {
        name: metric.value for name, metric in found.items()
    }
    assert "17 pictures of 16x16 against" in found["kid"].protocol and "steps 2" in found["kid"].protocol
    assert (found["kid"].data, found["kid"].split) == ("pictures0", "test")
    assert not any(str(part) in repr(found) for part in (chain.parent, Path.home()))
    with torch.no_grad():
        model.unet.conv_out.bias.add_(1)
    assert measured(result, weight_hash(model.unet.state_dict())) == []


@pytest.mark.parametrize(
    ("kind", "name", "words"),
    [
        ("inpaint", "PSNR in dB of what was made, in the hole", "the mean"),
        ("upscale", "PSNR in dB of what was made", "bicubic"),
        ("restore", "PSNR in dB of what was made", "spoiled by noise 25, 1 samples of each"),
        ("segment", "mean IoU", "the least of a class"),
    ],
)
def test_figures_of_models_for_a_task(runs: Path, tmp_path: Path, kind: str, name: str, words: str) -> None:
    more = ["--noise", "25"] if kind == "restore" else []
    file = tmp_path / "evaluations" / "recover.json"
    ldm(["recover", str(runs / kind), "--n", "3", "--steps", "1", "--out", str(file), *more])
    unet = weight_hash(LatentDiffusion.from_pretrained(runs / kind).unet.state_dict())
    found = {metric.name: metric for metric in measured(file, unet)}
    said = json.loads(file.read_text())
    made = said["mean_iou"] if kind == "segment" else said[name.partition(" of what was ")[2]]["psnr_db"]
    assert found[name].value == made and words in found[name].protocol and found[name].data == "scenes"
    assert measured(file, "0" * 64) == []


def test_a_damaged_result_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"figures": {}}')
    with pytest.raises(UserError, match=r"a\.json is no result of ldm evaluate or ldm recover"):
        measured(tmp_path / "a.json", "0" * 64)


def test_the_card_says_no_path_of_the_author() -> None:
    recipe = {
        "run": {"out": "runs/a", "steps": 3, "tracker": "none"},
        "data": {"path": "acme/photos"},
        "start": "../clients/acme/vae",
        "loss": {"lpips": {"weights": "../alice/acme/lpips.safetensors"}},
        "autoencoder": "stabilityai/sd-vae-ft-mse",
    }
    said = published_recipe(recipe)
    assert "acme" not in said and "alice" not in said and "runs/a" not in said
    assert "stabilityai/sd-vae-ft-mse" in said and "photos" in said
    assert leaf(["hub:acme/photos", "~/acme/more"], hub=False) == "hub:acme/photos, more"
