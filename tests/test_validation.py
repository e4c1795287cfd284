"""What held-out pictures tell: always the same of the same weights, and nothing to the training."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

import train_ldm
from ldm import random
from ldm.conditioning import ClassLabels
from ldm.config import UserError
from ldm.data import DataConfig, ScenesConfig, open_source
from ldm.denoiser import Denoiser
from ldm.paths import EDM, VP, Flow
from ldm.paths import Path as NoisePath
from ldm.scenes_check import score
from ldm.validation import SEED, HeldOut, ValidationConfig, hold_out, losses, named, read, told
from pipelines import LatentDiffusion
from pipelines.stages.validating import energy_distance, quick_figures, texture
from tests.support import TOY, newest_weights, ran

SCENES = DataConfig(size=16, scenes=ScenesConfig(count=24))


@pytest.fixture
def run(tmp_path: Path) -> SimpleNamespace:
    """As much of a run as is asked of one."""
    said: list[str] = []
    accelerator = Accelerator(cpu=True)
    return SimpleNamespace(
        out=tmp_path, main=True, device="cpu", accelerator=accelerator, say=said.append, said=said
    )


@pytest.fixture
def model(chain: Path) -> LatentDiffusion:
    return LatentDiffusion.from_pretrained(chain / "ldm")


def blurred(z: Tensor, much: float) -> Tensor:
    return torch.lerp(z, F.avg_pool2d(z, 3, 1, 1), much)


def noisy(z: Tensor, much: float) -> Tensor:
    return z + much * torch.randn(z.shape, generator=torch.Generator().manual_seed(2))


def faint(z: Tensor, much: float) -> Tensor:
    return z * (1 - much)


def held(model: LatentDiffusion, run: SimpleNamespace, **config: int) -> HeldOut:
    found = hold_out(ValidationConfig(**config), SCENES, open_source(SCENES), model, run)
    assert found is not None and found.split == "test"
    return found


def test_the_loss_is_that_of_the_recipe_at_the_levels_of_each_bin(
    model: LatentDiffusion, run: SimpleNamespace
) -> None:
    """Against the formula of a flow: the network is to predict noise minus data."""
    held_out, n, bins = held(model, run, count=5), 5, 3
    found = losses(
        run, held_out, Denoiser(model.unet, model.path, model.prediction), model.conditioner, 2, bins
    )
    cond = model.conditioner(held_out.batch)
    for level in range(bins):
        total = 0.0
        for i in range(n):
            u = torch.tensor((level + (i + 0.5) / n) / bins, dtype=torch.float64)
            sigma = torch.sigmoid(torch.special.ndtri(u)).float()
            noise = random.normal(
                SEED, "validation noise", torch.tensor([level * n + i]), held_out.z.shape[1:]
            )
            x = (1 - sigma) * held_out.z[i : i + 1] + sigma * noise
            one = cond._replace(tokens=cond.tokens[i : i + 1])
            out = model.unet(x, sigma[None] * 1000, one)
            total += (out - (noise - held_out.z[i : i + 1])).square().mean().item()
        assert found[level].item() == pytest.approx(total / n, rel=1e-4)


def test_one_process_two_and_shared_out_weights_give_the_same_bits(chain: Path, tmp_path: Path) -> None:
    found = []
    for name, processes, shard in (("one", 1, "false"), ("two", 2, "false"), ("shared", 2, "true")):
        ran("-m", "tests.measured", str(chain / "ldm"), str(tmp_path / name), shard, processes=processes)
        found.append(json.loads((tmp_path / name / "found.json").read_text()))
    assert found[0] == found[1] == found[2] and all(0.1 < loss < 10 for loss in found[0])


def test_what_is_learned_does_not_depend_on_it(chain: Path, tmp_path: Path) -> None:
    """Bit for bit; the resumed run of test_chain has it too."""
    arguments = (
        f"--config {TOY}/ldm.yaml --autoencoder {chain}/vae --run.out {tmp_path}/ldm --validation.every 0"
    )
    train_ldm.main(arguments.split())
    mine, theirs = newest_weights(tmp_path / "ldm"), newest_weights(chain / "ldm")
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)
    assert "_loss_" not in (tmp_path / "ldm" / "metrics.jsonl").read_text()


def test_a_run_logs_both_weights_by_level_and_what_is_drawn(chain: Path) -> None:
    lines = [json.loads(line) for line in (chain / "ldm" / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        assert ("test_loss_ema" in line) == (line["step"] in (3, 6))
    for weights in ("ema", "raw"):
        name = f"test_loss_{weights}"
        levels = {key: value for key, value in lines[-1].items() if key.startswith(f"{name}/ln_snr_")}
        assert len(levels) == 2 and sum(levels.values()) / 2 == pytest.approx(lines[-1][name])
    assert lines[-1]["test_loss_ema"] != lines[-1]["test_loss_raw"]
    assert 0 <= lines[-1]["test_prompts_satisfied"] <= 1


@pytest.mark.parametrize("path", [Flow(), VP(zero_terminal_snr=True), EDM()], ids=lambda path: path.kind)
def test_names_of_levels_are_finite_and_fall_from_clean_to_noise(path: NoisePath) -> None:
    figures = named("test", "raw", path, torch.arange(100, dtype=torch.float64))
    assert figures.pop("test_loss_raw") == 49.5
    snr = [float(name.removeprefix("test_loss_raw/ln_snr_")) for name in figures]
    assert len(snr) == 100 and snr == sorted(snr, reverse=True) and all(map(math.isfinite, snr))


def test_scenes_are_read_as_the_checker_reads_what_the_model_draws(
    model: LatentDiffusion, run: SimpleNamespace
) -> None:
    held_out = held(model, run, count=18)
    images = model(held_out.scenes, steps=3, guidance=2.0, seed=0)
    assert quick_figures(model, held_out, steps=3, guidance=2.0) == {
        "test_prompts_satisfied": score(images, held_out.scenes)["all"]
    }


def test_energy_distance_is_0_of_likes_and_grows_with_the_difference() -> None:
    x, y = torch.randn(2, 600, 30, generator=torch.Generator().manual_seed(0))
    assert abs(energy_distance(x, y)) < 0.01
    shifts = [energy_distance(x, y + shift) for shift in (0.5, 1, 2, 8)]
    assert shifts == sorted(shifts) and shifts[0] > 0.01 and 0.5 < shifts[-1] < 1
    assert energy_distance(torch.zeros(3, 1), torch.ones(3, 1)) == 1


@pytest.mark.parametrize("harm", [blurred, noisy, faint], ids=lambda harm: harm.__name__)
def test_texture_distance_grows_with_harm(harm: Callable[[Tensor, float], Tensor]) -> None:
    """On smooth random fields, of which one half stands for drawn pictures."""
    fields = F.avg_pool2d(torch.randn(400, 4, 19, 19, generator=torch.Generator().manual_seed(1)), 4, 1) * 4
    there = texture(fields[:200])
    distances = [energy_distance(texture(harm(fields[200:], much)), there) for much in (0, 0.1, 0.3, 0.6)]
    assert abs(distances[0]) < 0.01 and distances == sorted(distances) and distances[-1] > 0.05


def pictures(folder: Path, names: list[str]) -> None:
    for i, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        Image.new("RGB", (16, 16), (40 * i, 90, 160)).save(folder / name / f"{i}.png")


def test_classes_go_by_name_and_unknown_ones_are_left_out(tmp_path: Path) -> None:
    pictures(tmp_path / "train", ["b", "c"])
    pictures(tmp_path / "test", ["a", "b", "c"])
    source = open_source(DataConfig(path=str(tmp_path), size=16), "test")
    conditioner = ClassLabels(["b", "c"])
    usable = told(source, conditioner)
    assert [source.classes[source.labels[i]] for i in usable] == ["b", "c"]
    assert read(source, usable, conditioner)["label"].tolist() == [0, 1]


def test_without_a_held_out_split_the_figures_say_so(
    chain: Path, model: LatentDiffusion, run: SimpleNamespace, tmp_path: Path
) -> None:
    pictures(tmp_path / "data", ["b", "c"])
    data = DataConfig(path=str(tmp_path / "data"), size=16)
    model.conditioner = ClassLabels(["b", "c"])
    found = hold_out(ValidationConfig(), data, open_source(data), model, run)
    assert found is not None and found.split == "train" and len(found.z) == 2
    assert "which is trained on" in run.said[-1]
    assert hold_out(ValidationConfig(every=0), data, open_source(data), model, run) is None
    with pytest.raises(UserError, match="test"):
        hold_out(ValidationConfig(split="test"), data, open_source(data), model, run)
    pictures(tmp_path / "data" / "test", ["x"])
    pictures(tmp_path / "data" / "train", ["b", "c"])
    with pytest.raises(UserError, match=r"no pictures with the captions or classes .* set validation\.split"):
        hold_out(ValidationConfig(split="test"), data, open_source(data, "train"), model, run)


@pytest.mark.parametrize("setting", ["count 1", "bins 0", "bins 101", "every -1", "steps 0", "split 3 4"])
def test_bad_settings_are_one_sentence(
    setting: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, *values = setting.split()
    with pytest.raises(SystemExit) as stopped:
        train_ldm.main(
            [
                "--config",
                str(TOY / "ldm.yaml"),
                "--run.out",
                str(tmp_path / "run"),
                f"--validation.{name}",
                *values,
            ]
        )
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and "Traceback" not in said and len(said.splitlines()) == 1
