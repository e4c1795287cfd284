"""Stage 2 that goes on from a trained model: the same network at first, and nothing that would mean something else."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import train_ldm
from ldm.conditioning import Cond
from ldm.config import UserError
from pipelines import LatentDiffusion
from pipelines.publishing.card_words import beginnings
from pipelines.publishing.publication import Candidate, Publication
from pipelines.stages.starting import shape_of, take_over
from tests.support import TOY, newest_weights, tiny_unet
from tests.test_chain import _main_until


def recipe(tmp_path: Path, chain: Path, *more: str) -> list[str]:
    """A start from the model of `chain`, without a network."""
    lines = (TOY / "ldm.yaml").read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("network"))
    rest = [line for line in lines[first + 1 :] if not line.startswith(" ")]
    file = tmp_path / "start.yaml"
    file.write_text("\n".join(line for line in lines[:first] + rest if "conditioning" not in line))
    flags = (
        f"--config {file} --autoencoder {chain}/vae --start {chain}/ldm --workers 0 --run.out {tmp_path}/run"
    )
    return [*flags.split(), *more]


def test_a_network_taken_over_says_the_same_whatever_the_new_channels_show() -> None:
    begun, unet = (tiny_unet(in_channels=n, cross_attention_dim=16).eval() for n in (4, 9))
    take_over(unet, begun)
    x, t, tokens = torch.randn(2, 4, 8, 8), torch.tensor([3.0, 500.0]), torch.randn(2, 5, 16)
    more = torch.cat([x, torch.randn(2, 5, 8, 8)], dim=1)
    torch.testing.assert_close(unet(more, t, Cond(tokens=tokens)), begun(x, t, Cond(tokens=tokens)))


def test_a_drawing_model_learns_to_fill_holes_and_resumes_bit_for_bit(chain: Path, tmp_path: Path) -> None:
    arguments = recipe(tmp_path, chain, "--task", "inpaint")
    train_ldm.main(arguments)
    begun, learned = (LatentDiffusion.from_pretrained(run) for run in (chain / "ldm", tmp_path / "run"))
    assert learned.task is not None and learned.unet.config.in_channels == 9
    assert shape_of(learned) == shape_of(begun)
    said = [model.conditioner.state_dict() for model in (begun, learned)]
    assert all(torch.equal(said[0][key], said[1][key]) for key in said[0])
    weight = learned.unet.conv_in.weight
    assert not torch.equal(weight[:, :4], begun.unet.conv_in.weight) and weight[:, 4:].any()
    torch.testing.assert_close(weight[:, :4], begun.unet.conv_in.weight, atol=0.1, rtol=0)
    published = Publication(model=tmp_path / "run", name="me/holes", license="mit")
    assert "of what it is told, which were trained on from ldm" in beginnings(Candidate.of(published))
    again = [*arguments, "--run.out", f"{tmp_path}/again"]
    with pytest.raises(SystemExit):
        _main_until(train_ldm, again, step=3)
    train_ldm.main(again)
    one, two = newest_weights(tmp_path / "run"), newest_weights(tmp_path / "again")
    assert all(torch.equal(one[key], two[key]) for key in one)


@torch.no_grad()
def test_a_run_keeps_to_the_text_encoder_that_it_began_with(chain: Path) -> None:
    model, source = LatentDiffusion.from_pretrained(chain / "ldm"), SimpleNamespace(fingerprint="pictures")
    parts: Any = (source, model.autoencoder, model.conditioner)
    begun_with = train_ldm.contract_of(*parts).state_dict()
    train_ldm.contract_of(*parts).load_state_dict(begun_with)
    next(model.conditioner.parameters()).add_(1)
    with pytest.raises(UserError, match="begun with another text encoder"):
        train_ldm.contract_of(*parts).load_state_dict(begun_with)


@pytest.mark.parametrize(
    ("flags", "code", "sentence"),
    [
        (["--network.layers_per_block", "1"], 2, "network is set, but start brings its own"),
        (["--conditioning.text.width", "16"], 2, "conditioning.text is set, but start brings its own"),
        (["--conditioning.kind", "none"], 1, "start is told text; set conditioning.kind to that"),
        (
            ["--prediction", "v", "--path.kind", "vp"],
            1,
            "start has path.kind flow and prediction flow; set these",
        ),
        (["--start", "RUNS/upscale"], 1, "was trained to upscale pictures; choose a model that draws"),
        (["--start", "RUNS/inpaint", "--task", "restore"], 1, "was trained to inpaint pictures"),
        (["--autoencoder", "OTHER"], 1, "draws in the latents of another autoencoder"),
    ],
)
def test_what_would_mean_something_else_is_refused(
    chain: Path, runs: Path, tmp_path: Path, flags: list[str], code: int, sentence: str, capsys
) -> None:
    other = LatentDiffusion.from_pretrained(chain / "ldm").autoencoder
    other.decoder.conv_out.bias.data += 1
    other.save_pretrained(tmp_path / "other")
    places = {"RUNS": str(runs), "OTHER": f"{tmp_path}/other"}
    for name, place in places.items():
        flags = [flag.replace(name, place) for flag in flags]
    with pytest.raises(SystemExit) as stopped:
        train_ldm.main(recipe(tmp_path, chain, *flags))
    assert stopped.value.code == code and sentence in capsys.readouterr().err
