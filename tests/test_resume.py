"""The same command again goes on with a run, whatever has changed around it, and refuses what would make it another."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
import yaml

import train_ldm
from autoencoder.kl import AutoencoderKL
from ldm.config import UserError, load, plain
from ldm.run_folder import changed_settings, environment
from ldm.sampling import cores
from ldm.training import Run
from pipelines import LatentDiffusion
from tests.forked import alike, ended, forked, ranked, train, trained
from tests.support import TOY, losses


def test_one_then_two_then_one_process_see_the_same_samples_with_the_same_noise(tmp_path: Path) -> None:
    """Written down by the processes themselves: (position, index, noise) of all they trained on."""

    def seen(run: Path, rank: int) -> None:
        original = Run.normal

        def normal(self: Run, purpose: str, batch: dict, shape: tuple) -> torch.Tensor:
            noise = original(self, purpose, batch, shape)
            rows = zip(
                batch["position"].tolist(),
                batch["index"].tolist(),
                noise.flatten(1)[:, 0].tolist(),
                strict=True,
            )
            with (run.parent / f"{run.name}.seen").open("a") as file:
                file.writelines(f"{row}\n" for row in rows)
            return noise

        def update(self: Run, *rest: object) -> None:
            before(self, *rest)
            if self.step in (3, 7) and os.environ.get("STOP") == str(self.step) and rank == 0:
                signal.raise_signal(signal.SIGTERM)

        before, Run.normal, Run.update = Run.update, normal, update  # type: ignore[method-assign]
        every = ("--show.every", "--run.log_every", "--run.save_every", "--run.steps")
        # Muon's bfloat16 would let the rounding of sums over parts of a batch grow.
        train(run, "--optimizer.name", "adamw", *(word for name in every for word in (name, "13")))

    def one(run: Path) -> int:
        return ended(forked(lambda: seen(run, 0), run.with_suffix(".log")))

    assert one(tmp_path / "straight") == 0
    moved = tmp_path / "moved"
    os.environ["STOP"] = "3"
    assert one(moved) == 143
    os.environ["STOP"] = "7"
    assert [ended(c) for c in ranked(lambda rank: seen(moved, rank), tmp_path / "two.x")] == [143, 143]
    del os.environ["STOP"]
    assert one(moved) == 0
    rows = [sorted((tmp_path / f"{name}.seen").read_text().splitlines()) for name in ("straight", "moved")]
    assert rows[0] == rows[1] and len({eval(row)[2] for row in rows[0]}) == 13 * 4  # each its own noise
    epoch = [eval(row)[1] for row in sorted(rows[0], key=lambda row: eval(row)[0])][:24]
    assert sorted(epoch) == list(range(24))
    assert losses(moved) == pytest.approx(losses(tmp_path / "straight"), rel=1e-5)
    starts = [json.loads(line) for line in (moved / "history.jsonl").read_text().splitlines()]
    assert [(s["step"], s["processes"]) for s in starts] == [(0, 1), (3, 2), (7, 1)]


def test_a_log_interval_across_a_stop_has_the_same_means(tmp_path: Path) -> None:
    def work() -> None:
        original = Run.update

        def update(run: Run, *rest: object) -> None:
            original(run, *rest)
            if run.step == 4:
                signal.raise_signal(signal.SIGTERM)

        Run.update = update  # type: ignore[method-assign]
        train(tmp_path / "stopped", "--run.log_every", "6")

    assert trained(tmp_path / "straight", "--run.log_every", "6") == 0
    assert ended(forked(work, tmp_path / "log")) == 143
    assert trained(tmp_path / "stopped", "--run.log_every", "6") == 0
    assert alike(tmp_path / "straight", tmp_path / "stopped")
    means = [json.loads((tmp_path / name / "metrics.jsonl").read_text()) for name in ("straight", "stopped")]
    assert {k: v for k, v in means[0].items() if k != "time"} == {
        k: v for k, v in means[1].items() if k != "time"
    }


def test_initial_weights_do_not_depend_on_what_was_drawn_before(chain: Path, tmp_path: Path) -> None:
    """Such as by making the cache, which a run that was killed early finds there."""
    arguments = ("--autoencoder", str(chain / "vae"), "--run.steps", "1")
    assert trained(tmp_path / "cold", *arguments, stage="ldm") == 0
    shutil.copytree(tmp_path / "cold" / "cache", tmp_path / "warm" / "cache")
    assert trained(tmp_path / "warm", *arguments, stage="ldm") == 0
    assert alike(tmp_path / "cold", tmp_path / "warm")


def test_any_number_of_readers_gives_the_same_run(tmp_path: Path) -> None:
    for workers in (0, 3):
        assert trained(tmp_path / str(workers), "--workers", str(workers)) == 0
    assert alike(tmp_path / "0", tmp_path / "3")


def test_settings_that_do_not_matter_may_change_and_are_written_down(tmp_path: Path) -> None:
    def work() -> None:
        original = Run.log

        def log(run: Run) -> None:
            original(run)
            if run.step == 2:
                raise SystemExit(5)

        Run.log = log  # type: ignore[method-assign]
        train(tmp_path / "run", "--run.save_every", "1")

    assert ended(forked(work)) == 5
    assert trained(tmp_path / "run", "--run.keep", "3", "--run.accumulate", "2") == 0
    last = json.loads((tmp_path / "run" / "history.jsonl").read_text().splitlines()[-1])
    assert last["changed"] == ["run.accumulate was 1 and is 2", "run.keep was 2 and is 3"]
    assert last["step"] == 1


def test_a_run_may_be_lengthened_before_its_rate_falls(tmp_path: Path) -> None:
    rates = ("--optimizer.decay", "linear", "--optimizer.decay_from", "0.5", "--run.steps")
    assert trained(tmp_path / "straight", *rates, "12") == 0

    def work() -> None:
        original = Run.save

        def save(run: Run) -> None:
            original(run)
            if run.step == 4:
                run._writer.wait()
                os._exit(5)

        Run.save = save  # type: ignore[method-assign]
        train(tmp_path / "run", *rates, "8")

    assert ended(forked(work)) == 5
    assert trained(tmp_path / "run", *rates, "12") == 0
    assert alike(tmp_path / "run", tmp_path / "straight")
    last = json.loads((tmp_path / "run" / "history.jsonl").read_text().splitlines()[-1])
    assert last["changed"] == ["run.steps was 8 and is 12"]
    assert trained(tmp_path / "run", *rates, "16") == 1
    assert "run.steps was 12 and is 16. Set them back" in (tmp_path / "run.log").read_text()


def test_a_checkpoint_is_a_model(chain: Path, tmp_path: Path) -> None:
    newest = max((chain / "ldm" / "checkpoints").iterdir())
    one, other = (LatentDiffusion.from_pretrained(folder) for folder in (newest, chain / "ldm"))
    for mine, theirs in zip(one.unet.parameters(), other.unet.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert (newest / "model" / weights).samefile(chain / "ldm" / "model" / weights)
    assert (newest / "ema.safetensors").stat().st_size < 1000  # the average is stored once, in the model
    stage1 = AutoencoderKL.from_pretrained(max((chain / "vae" / "checkpoints").iterdir()) / "model")
    assert stage1.config.latent_channels == 4


def test_settings_of_tasks_that_are_not_chosen_may_have_had_other_defaults(tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text("{}")

    def changed(task: str) -> list[str]:
        recipe = load(train_ldm.Recipe, ["--config", f"{TOY}/ldm-plain.yaml", "--task", task], prog="")
        before = plain(recipe)
        before["segment"]["masks"] = "masks"  # the default until it was told from nothing
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(before))
        return changed_settings(tmp_path, recipe)

    assert changed("upscale") == []
    with pytest.raises(UserError, match=r"segment\.masks was 'masks' and is None"):
        changed("segment")


def test_a_folder_is_trained_in_by_one_start_at_a_time(tmp_path: Path) -> None:
    def work() -> None:
        def wait(run: Run) -> None:
            (tmp_path / "begun").touch()
            time.sleep(600)

        Run.save = wait  # type: ignore[method-assign]
        train(tmp_path / "run")

    child = forked(work)
    while not (tmp_path / "begun").exists():
        time.sleep(0.01)
    assert trained(tmp_path / "run") == 1
    said = (tmp_path / "run.log").read_text()
    assert f"run is being trained in by process {child} on " in said and "Traceback" not in said
    os.kill(child, signal.SIGKILL)
    ended(child)
    assert trained(tmp_path / "run") == 0


def test_machines_without_a_common_disk_are_told(tmp_path: Path) -> None:
    children = ranked(lambda rank: train(tmp_path / str(rank)), tmp_path / "log.x")
    assert [ended(child) for child in children] == [1, 1]
    assert "is not the folder that the first machine has; set run.out" in (tmp_path / "log.0.log").read_text()


def test_systems_that_do_not_tell_their_cores_can_train(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)  # such as macOS
    assert int(environment(torch.device("cpu"))["cores"]) >= 1 and cores(10**6) >= 1
