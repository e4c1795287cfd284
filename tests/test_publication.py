"""What is known of a model before it is published: of old runs too, of its pictures, and of what it began as."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from ldm.config import UserError
from ldm.data import ScenesConfig
from pipelines.evaluation import memorisation
from pipelines.publishing.card import header
from pipelines.publishing.card_words import beginnings, published_recipe
from pipelines.publishing.publication import Candidate, FinishedRun, LatentRun, Publication, trained_by
from pipelines.publishing.publish import no_copies
from pipelines.publishing.samples import request_for

NAME = "tester/toy-scenes"
BASE = {"name": NAME, "license": "cc-by-4.0", "dry_run": True, "prompts": ("a small blue star",)}


def test_a_run_of_an_earlier_version_is_read(chain: Path, tmp_path: Path) -> None:
    """Before `show.classes`, `loss.lpips` and the contract."""
    recipe = yaml.safe_load((chain / "ldm" / "config.yaml").read_text())
    del recipe["show"]["classes"], recipe["data"]["crop"], recipe["segment"]
    shutil.copytree(chain / "ldm" / "model", tmp_path / "model")
    (tmp_path / "result.json").write_text((chain / "ldm" / "result.json").read_text())
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(recipe))
    candidate = Candidate.of(Publication(model=tmp_path, name=NAME, license="mit"))
    assert (
        request_for(candidate).prompts
        and len(candidate.source) == 24
        and candidate.stage1.folder == chain / "vae"
    )
    assert "lr: 0.002" in published_recipe({"loss": {"kl": 1e-6}, "optimizer": {"lr": 0.002}})
    for damage in ({"show": 3}, {"data": None}, {"ema_decay": "often"}, {"run": []}, {"show": {"colour": 1}}):
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(recipe | damage))
        with pytest.raises(UserError, match="is no finished run"):
            Candidate.of(Publication(model=tmp_path, name=NAME, license="mit"))


def test_the_training_pictures_are_looked_at_if_they_are_the_same(
    chain: Path, tmp_path: Path, capsys
) -> None:
    run = LatentRun(chain / "ldm")
    assert len(run.source(None)) == 24
    run.data = replace(run.data, scenes=ScenesConfig(count=25))
    assert run.source(None) is None and "scenes holds other pictures" in capsys.readouterr().out
    run.data = replace(run.data, path=str(tmp_path / "gone"), scenes=ScenesConfig())
    assert run.source(None) is None
    candidate = replace(Candidate.of(Publication(model=chain / "ldm", **BASE)), source=None)
    shown = replace(candidate.what, prompts=())
    with pytest.raises(UserError, match="Which captions to draw samples of is not said"):
        request_for(replace(candidate, what=shown))
    assert no_copies(candidate, []) is None and "copies were not looked for" in capsys.readouterr().out


def test_a_copy_stops_it_and_is_shown(chain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    candidate = Candidate.of(Publication(model=chain / "ldm", **BASE))
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8))
    monkeypatch.setattr(memorisation, "NEIGHBOURS", 9)
    drawn = [noise, candidate.source.picture(3, 16)]
    with pytest.raises(UserError, match=r"1 of 2 drawn pictures are copies .* \(see toy-scenes-copies.png\)"):
        no_copies(candidate, drawn)
    assert Image.open("toy-scenes-copies.png").width < 2 * 96  # the one, above what it is a copy of
    accepted = replace(candidate, what=replace(candidate.what, accept_copies=True))
    assert no_copies(accepted, drawn).which == (1,)


def test_what_did_not_begin_as_random_numbers_is_said(chain: Path, tmp_path: Path) -> None:
    candidate = Candidate.of(Publication(model=chain / "ldm", **BASE))
    assert beginnings(candidate) == "It was trained from zero: all weights began as random numbers."
    candidate.run.text |= {"encoder": "someone/clip", "weights": "pretrained"}
    candidate.run.autoencoder = "stabilityai/sd-vae-ft-mse"
    assert beginnings(replace(candidate, stage1=None)) == (
        "Its weights began as random numbers, except those of the text encoder someone/clip, which was taken as it is "
        "and of the autoencoder stabilityai/sd-vae-ft-mse, which was taken as it is."
    )
    candidate.run.text["weights"] = "random"
    candidate.run.recipe["start"] = "runs/other/ldm"
    assert "of the U-Net and of what it is told, which were trained on from ldm" in beginnings(candidate)
    assert "trained-from-scratch" not in header(candidate, ())
    del candidate.run.recipe["start"]
    shutil.copytree(chain / "vae", tmp_path / "vae")
    recipe = yaml.safe_load((tmp_path / "vae" / "config.yaml").read_text())
    (tmp_path / "vae" / "config.yaml").write_text(yaml.safe_dump(recipe | {"start": "/home/me/sd-vae"}))
    started = replace(candidate, stage1=FinishedRun(tmp_path / "vae"))
    assert beginnings(started).endswith("those of the autoencoder, which was trained on from sd-vae.")
    autoencoder = candidate.model.autoencoder
    assert trained_by(tmp_path / "vae", autoencoder).folder == tmp_path / "vae"
    with torch.no_grad():
        autoencoder.quant_conv.bias.add_(1)
    assert trained_by(tmp_path / "vae", autoencoder) is None  # trained anew since
