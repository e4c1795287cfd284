"""Text encoders of every kind in training and on the command line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import train_ldm
from pipelines import LatentDiffusion
from pipelines.cli import main as ldm
from tests.encoders import ENCODERS, conditioner, config, model_of
from tests.support import TOY, newest_weights

diffusers = pytest.importorskip("diffusers", reason="diffusers is the oracle")


def recipe(chain: Path, fruit: Path, encoders: dict[str, Path], name: str, out: Path, more: str) -> list[str]:
    flags = (
        f"--config {TOY}/ldm-plain.yaml --data.path {fruit} --autoencoder {chain}/vae --run.out {out} {more}"
    )
    for key, kind in zip(("encoder", "encoder_2"), ENCODERS[name], strict=False):
        flags += f" --conditioning.text.{key} {encoders[kind]}"
    return flags.split()


@pytest.mark.parametrize(
    ("name", "kind", "weights"),
    [("pair", "text", "pretrained"), ("pair", "text", "random"), ("t5", "class+text", "random")],
)
def test_they_are_trained_with(
    name: str, kind: str, weights: str, chain: Path, fruit: Path, encoders: dict[str, Path], tmp_path: Path
) -> None:
    flags = f"--conditioning.kind {kind} --conditioning.text.weights {weights} --conditioning.dropout 0.4"
    train_ldm.main(recipe(chain, fruit, encoders, name, tmp_path / "run", flags))
    model = LatentDiffusion.from_pretrained(tmp_path / "run")
    learned = newest_weights(tmp_path / "run")
    assert any(key.startswith("conditioner/") for key in learned) == (weights == "random")
    cached = [load_file(file) for file in (tmp_path / "run" / "cache").glob("text-*/*.safetensors")]
    keys = {"tokens", "pooled"} if weights == "pretrained" else set(model.conditioner.read(["a"], ["lime"]) if
        kind == "class+text" else model.conditioner.read(["a"])) - {"label"}  # fmt: skip
    assert [set(shard) for shard in cached] == [keys]
    if kind == "class+text":
        assert len(model("a red lime", classes="lime", steps=2, n=2)) == 2
        return
    stock = diffusers.StableDiffusionXLPipeline.from_pretrained(tmp_path / "run" / "model")
    stock.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    theirs = stock("a red lime", num_inference_steps=4, guidance_scale=3.0, generator=generator).images[0]
    ours = model("a red lime", steps=4, guidance=3.0, seed=3)[0]
    assert np.abs(np.asarray(ours).astype(int) - np.asarray(theirs)).max() <= 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--network.addition_time_embed_dim 8", "network.addition_time_embed_dim is 8"),
        ("--show.classes [plum]", "classes are given, but this model is not told both"),
    ],
)
def test_recipes_that_say_too_much_are_refused(
    flags: str,
    message: str,
    chain: Path,
    fruit: Path,
    encoders: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        train_ldm.main(recipe(chain, fruit, encoders, "clip", tmp_path / "run", flags))
    assert message in capsys.readouterr().err


def test_the_command_draws_classes_with_captions(encoders: dict[str, Path], tmp_path: Path) -> None:
    model_of(conditioner(config(encoders, "clip"), kind="class+text"), num_class_embeds=3).save_pretrained(
        tmp_path / "model"
    )
    flags = f"--class lime --class plum --n 2 --steps 2 --out {tmp_path}/out".split()
    ldm(["generate", str(tmp_path / "model"), "a red circle", "a blue square", *flags])
    drawn = [Image.open(tmp_path / "out" / f"{i:04d}.png").text for i in range(4)]
    assert [note["class_name"] for note in drawn] == ["lime", "lime", "plum", "plum"]
    assert [note["prompt"] for note in drawn][1:3] == ["a red circle", "a blue square"]
