"""What `ldm evaluate` measured reaches the card, if it was measured of these weights."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from autoencoder.store import weight_hash
from ldm.config import UserError
from pipelines import LatentDiffusion
from pipelines.publishing.card import leaf, published_recipe
from pipelines.publishing.card_figures import evaluated


def test_figures_of_these_weights_alone(chain: Path, result: Path, tmp_path: Path) -> None:
    (tmp_path / "evaluations").mkdir()
    shutil.copy(result, tmp_path / "evaluations")
    model = LatentDiffusion.from_pretrained(chain / "ldm")
    found = {metric.name: metric for metric in evaluated(tmp_path, weight_hash(model.unet.state_dict()))}
    said = json.loads(result.read_text())["figures"]
    assert {name.replace("_", " "): figure["value"] for name, figure in said.items()} == {
        name: metric.value for name, metric in found.items()
    }
    assert "17 pictures of 16x16 against" in found["kid"].protocol and "steps 2" in found["kid"].protocol
    assert not any(str(part) in repr(found) for part in (chain.parent, Path.home()))
    with torch.no_grad():
        model.unet.conv_out.bias.add_(1)
    assert evaluated(tmp_path, weight_hash(model.unet.state_dict())) == []


def test_a_damaged_result_is_named(tmp_path: Path) -> None:
    (tmp_path / "evaluations").mkdir()
    (tmp_path / "evaluations" / "a.json").write_text('{"figures": {}}')
    with pytest.raises(UserError, match=r"a\.json is no result of ldm evaluate"):
        evaluated(tmp_path, "0" * 64)


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
