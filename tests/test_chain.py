"""The whole chain on a toy budget: both scripts, resume, signals, two processes, and the stock reload."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

import train_ldm
import train_vae
from autoencoder.kl import AutoencoderKL
from ldm import random
from ldm.checkpoint import damage
from ldm.conditioning import Cond
from ldm.data import DataConfig, ScenesConfig, open_source
from ldm.pictures import to_tensor
from pipelines import LatentDiffusion
from tests.support import PROMPTS, ROOT, TOY, losses, newest_weights, ran, started


def test_latents_of_the_training_set_have_mean_0_and_std_1(chain: Path) -> None:
    autoencoder = AutoencoderKL.from_pretrained(chain / "vae" / "model")
    source = open_source(DataConfig(size=16, scenes=ScenesConfig(count=24)))
    posterior = autoencoder.encode(torch.stack([to_tensor(source.picture(i, 16)) for i in range(24)]))
    mean = posterior.mean.mean(dim=(0, 2, 3))
    variance = (posterior.mean.square() + posterior.std.square()).mean(dim=(0, 2, 3)) - mean.square()
    assert mean.abs().max() < 0.01 and (variance.sqrt() - 1).abs().max() < 0.01
    assert autoencoder.config.scaling_factor == 1


def test_run_folders_hold_what_they_should(chain: Path) -> None:
    for stage in ("vae", "ldm"):
        names = {p.name for p in (chain / stage).iterdir()}
        assert {"config.yaml", "checkpoints", "model", "samples", "metrics.jsonl", "result.json"} <= names
        assert [p.name for p in sorted((chain / stage / "checkpoints").iterdir())] == [
            "step-00000003",
            "step-00000006",
        ]
    assert json.loads((chain / "vae" / "result.json").read_text())["psnr_db"] > 3


def test_a_finished_run_starts_at_no_cost(chain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (chain / "vae" / "metrics.jsonl").read_text()
    train_vae.main(["--config", str(TOY / "vae.yaml"), "--run.out", str(chain / "vae")])
    assert "is finished" in capsys.readouterr().err
    assert (chain / "vae" / "metrics.jsonl").read_text() == before


def test_a_resumed_run_repeats_the_uninterrupted_one_bit_for_bit(chain: Path, tmp_path: Path) -> None:
    for stage, script in (("vae", train_vae), ("ldm", train_ldm)):
        arguments = ["--config", str(TOY / f"{stage}.yaml"), "--run.out", str(tmp_path / stage)]
        arguments += ["--autoencoder", str(chain / "vae")] if stage == "ldm" else []
        with pytest.raises(SystemExit) as stopped:
            _main_until(script, arguments, step=3)
        assert stopped.value.code == 143
        script.main(arguments)
        one, other = newest_weights(chain / stage), newest_weights(tmp_path / stage)
        differ = [key for key in one if not torch.equal(one[key], other[key])]
        assert not differ and one.keys() == other.keys()
        assert losses(chain / stage) == losses(tmp_path / stage)


def _main_until(script, arguments: list[str], step: int) -> None:
    """Run a script in this process and send it SIGTERM during an optimizer step."""
    original = script.Run.update

    def update(run, *rest) -> None:
        original(run, *rest)
        if run.step == step:
            signal.raise_signal(signal.SIGTERM)

    script.Run.update = update
    try:
        script.main(arguments)
    finally:
        script.Run.update = original


def assert_learned_alike(one: Path, other: Path) -> None:
    """The same first loss to rounding; later ones as near as bfloat16 in Muon lets rounding grow."""
    mine, theirs = losses(one), losses(other)
    assert mine[0] == pytest.approx(theirs[0], rel=1e-6) and mine == pytest.approx(theirs, rel=1e-4)
    assert logged(one, "learning_rate") == logged(other, "learning_rate")
    weights, others = newest_weights(one), newest_weights(other)
    assert weights.keys() == others.keys()
    for key in weights:
        torch.testing.assert_close(weights[key], others[key], rtol=1e-2, atol=1e-3, msg=key)


def logged(run: Path, name: str) -> list[float]:
    return [json.loads(line)[name] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_captions_are_dropped_by_position_and_the_share_is_logged(chain: Path) -> None:
    recipe = yaml.safe_load((chain / "ldm" / "config.yaml").read_text())
    u = random.uniform(recipe["run"]["seed"], "drop", torch.arange(6 * 4)).view(6, 4)
    shares = (u < recipe["conditioning"]["dropout"]).double().mean(dim=1)
    assert logged(chain / "ldm", "dropped") == pytest.approx(shares.tolist()) and 0 < shares.mean() < 1


def test_averages_of_stage_2_have_moved_and_are_what_is_exported(chain: Path) -> None:
    before, after = sorted((chain / "ldm" / "checkpoints").iterdir())
    raw = load_file(after / "unet.safetensors")
    one, other = (load_file(c / "model/unet/diffusion_pytorch_model.safetensors") for c in (before, after))
    for name in ("conv_in.weight", "conv_out.weight"):
        assert not torch.equal(one[name], other[name]) and not torch.equal(other[name], raw[f"state.{name}"])


def test_two_processes_learn_what_one_learns(chain: Path, tmp_path: Path) -> None:
    for stage in ("vae", "ldm"):
        arguments = [
            f"train_{stage}.py",
            "--config",
            str(TOY / f"{stage}.yaml"),
            "--run.out",
            str(tmp_path / stage),
        ]
        arguments += ["--autoencoder", str(chain / "vae")] if stage == "ldm" else []
        ran(*arguments, processes=2)
        assert_learned_alike(chain / stage, tmp_path / stage)


def test_sigterm_saves_and_the_same_command_goes_on(chain: Path, tmp_path: Path) -> None:
    arguments = ["train_vae.py", "--config", str(TOY / "vae.yaml"), "--run.out", str(tmp_path / "run")]
    arguments += ["--run.steps", "400"]
    process = started(*arguments)
    metrics = tmp_path / "run" / "metrics.jsonl"
    while not metrics.exists():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143 and "to go on, run the same command again" in err
    saved = sorted((tmp_path / "run" / "checkpoints").iterdir())[-1]
    assert int(saved.name.removeprefix("step-")) >= len(metrics.read_text().splitlines())


def test_another_autoencoder_is_refused(
    chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train_vae.main(["--config", str(TOY / "vae.yaml"), "--run.out", str(tmp_path / "vae"), "--run.seed", "1"])
    moved = chain / "vae" / "model.away"
    (chain / "vae" / "model").rename(moved)
    (chain / "ldm" / "result.json").rename(chain / "ldm" / "result.away")
    try:
        (tmp_path / "vae" / "model").rename(chain / "vae" / "model")
        with pytest.raises(SystemExit) as stopped:
            train_ldm.main(
                [
                    "--config",
                    str(TOY / "ldm.yaml"),
                    "--autoencoder",
                    str(chain / "vae"),
                    "--run.out",
                    str(chain / "ldm"),
                ]
            )
    finally:
        (chain / "vae" / "model").rename(tmp_path / "vae" / "model")
        moved.rename(chain / "vae" / "model")
        (chain / "ldm" / "result.away").rename(chain / "ldm" / "result.json")
    assert stopped.value.code == 1 and "begun with another autoencoder" in capsys.readouterr().err


def test_another_recipe_is_refused(chain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train_vae.main(
            [
                "--config",
                str(TOY / "vae.yaml"),
                "--run.out",
                str(chain / "vae"),
                "--run.steps",
                "9",
                "--loss.kl",
                "0.1",
            ]
        )
    said = capsys.readouterr().err
    assert "loss.kl was 1e-06 and is 0.1" in said


@pytest.mark.parametrize("kind", ["class", "none"])
def test_class_folders_train_draw_and_open_in_stock_parts(
    chain: Path, fruit: Path, tmp_path: Path, kind: str
) -> None:
    diffusers = pytest.importorskip("diffusers", reason="diffusers is the oracle")
    train_ldm.main(
        f"--config {TOY}/ldm-plain.yaml --conditioning.kind {kind} --data.path {fruit} "
        f"--autoencoder {chain}/vae --run.out {tmp_path}/run --data.balance true".split()
    )
    model = LatentDiffusion.from_pretrained(tmp_path / "run")
    prompts = ["plum", "lime"] if kind == "class" else None
    assert len(model(prompts, n=2, steps=2)) == (4 if prompts else 2)
    if kind == "class":
        with pytest.raises(ValueError, match="there is no class 'plam'; the nearest are plum"):
            model("plam")
    stock = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "run" / "model" / "unet")
    x, t, label = torch.randn(2, 4, 8, 8), torch.tensor([3.0, 700.0]), torch.tensor([1, 2])
    ours = model.unet(x, t, Cond(label=label if prompts else None))
    theirs = stock(x, t, encoder_hidden_states=None, class_labels=label if prompts else None).sample
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.fixture
def small_disk(tmp_path: Path):
    """A real file system of 1.5 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", str(disk)], capture_output=True
    )
    if mount.returncode:
        pytest.skip("mounting a small disk needs root")
    yield disk
    # The exception that a test holds on to holds files that it was reading.
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_a_full_disk_is_one_sentence_and_keeps_what_was_saved(
    small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "--config",
        str(TOY / "vae.yaml"),
        "--run.out",
        str(small_disk / "run"),
        "--run.save_every",
        "1",
    ]
    arguments += ["--run.keep", "9", "--run.steps", "30"]
    with pytest.raises(SystemExit) as ended:
        train_vae.main(arguments)
    said = capsys.readouterr().err
    assert ended.value.code == 1 and "can't be written" in said and "MB are free" in said
    assert "Traceback" not in said
    kept = sorted((small_disk / "run" / "checkpoints").glob("step-*"))
    assert kept and not any(damage(folder) for folder in kept)


STOCK = """
import sys, torch
sys.modules.update(dict.fromkeys(("ldm", "autoencoder", "pipelines"), None))  # importing ours fails from here on
from diffusers import StableDiffusionPipeline
model = StableDiffusionPipeline.from_pretrained(sys.argv[1])
generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
images = model(sys.argv[3:], num_inference_steps=7, guidance_scale=3.0, generator=generators).images
for i, image in enumerate(images):
    image.save(f"{sys.argv[2]}/{i}.png")
"""


def test_stock_diffusers_draws_what_we_draw_without_our_packages(chain: Path, tmp_path: Path) -> None:
    pytest.importorskip("diffusers", reason="diffusers is the oracle")
    subprocess.run(
        [sys.executable, "-c", STOCK, str(chain / "ldm" / "model"), str(tmp_path), *PROMPTS],
        check=True,
        cwd=tmp_path,
    )
    ours = LatentDiffusion.from_pretrained(chain / "ldm")(PROMPTS, steps=7, guidance=3.0, seed=5)
    for i, image in enumerate(ours):
        theirs = np.asarray(Image.open(tmp_path / f"{i}.png")).astype(int)
        assert np.abs(np.asarray(image) - theirs).max() <= 2


def test_pictures_depend_on_their_seed_alone(chain: Path) -> None:
    model = LatentDiffusion.from_pretrained(chain / "ldm")
    for sampler in ("dpmpp_2m", "euler_ancestral"):
        together = model(PROMPTS, n=2, steps=4, seed=3, sampler=sampler)
        alone = [model(PROMPTS[i // 2], steps=4, seed=3 + i, sampler=sampler)[0] for i in range(4)]
        for one, other in zip(together, alone, strict=True):
            assert np.abs(np.asarray(one).astype(int) - np.asarray(other)).max() <= 1


def test_an_autoencoder_with_a_scaling_factor_is_used_with_it(chain: Path, tmp_path: Path) -> None:
    """A stock autoencoder as it is: its factor scales latents in training as stock pipelines unscale them."""
    autoencoder = AutoencoderKL.from_pretrained(chain / "vae" / "model")
    autoencoder.config = replace(autoencoder.config, scaling_factor=0.5, shift_factor=0.25)
    mean, std, noise = (torch.randn(2, 4, 8, 8) for _ in range(3))
    z = train_ldm.scaled_latents({"mean": mean, "std": std}, noise, autoencoder)
    model = LatentDiffusion.from_pretrained(chain / "ldm")
    model.autoencoder = autoencoder
    torch.testing.assert_close(model.decode(z), autoencoder.decode(mean + std * noise))
    assert not torch.allclose(z, mean + std * noise)


def test_the_recipes_for_a_folder_train_on_a_folder(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / "pictures").mkdir(exist_ok=True)
        Image.new("RGB", (70, 66), (40, 90, 160)).save(tmp_path / "pictures" / f"{name}.png")
        (tmp_path / "pictures" / f"{name}.txt").write_text(f"the letter {name}")
    short = "--run.steps 1 --run.batch_size 2 --run.tracker none --run.precision no"
    recipe = f"--config {ROOT}/configs/folder/{{0}}.yaml --data.path {tmp_path}/pictures --run.out {tmp_path}/{{0}}"
    train_vae.main(f"{recipe} {short} --readiness.probe_steps 2".format("vae").split())
    train_ldm.main(f"{recipe} {short} --autoencoder {tmp_path}/vae --show.steps 1".format("ldm").split())
    assert (tmp_path / "ldm" / "model" / "model_index.json").exists()


def test_accumulated_batches_learn_what_one_batch_learns(chain: Path, tmp_path: Path) -> None:
    train_vae.main(
        ["--config", str(TOY / "vae.yaml"), "--run.out", str(tmp_path / "vae"), "--run.accumulate", "2"]
    )
    assert_learned_alike(chain / "vae", tmp_path / "vae")


def test_stratified_levels_cover_each_global_batch_evenly(chain: Path, tmp_path: Path) -> None:
    seen: list[torch.Tensor] = []
    original = train_ldm.levels

    def levels(run, batch, stratified):
        seen.append(original(run, batch, stratified))
        return seen[-1]

    train_ldm.levels = levels
    arguments = f"--config {TOY}/ldm.yaml --autoencoder {chain}/vae --run.out {tmp_path}/ldm --run.steps 3"
    try:
        train_ldm.main([*arguments.split(), "--stratified", "true", "--run.accumulate", "2"])
    finally:
        train_ldm.levels = original
    assert [len(u) for u in seen] == [2] * 6
    for batch in torch.cat(seen).view(3, 4):
        assert sorted((batch * 4).long().tolist()) == [0, 1, 2, 3]
