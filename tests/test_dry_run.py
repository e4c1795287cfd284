"""--dry-run tries everything, says what it takes, and leaves nothing behind; a fresh run tries its end first."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import train_ldm
import train_vae
from autoencoder.adversarial import Adversary
from autoencoder.discriminator import Discriminator
from autoencoder.kl import AutoencoderKL
from autoencoder.layers import ResnetBlock
from ldm import memory
from ldm.config import UserError
from ldm.findings import Findings, Part, folder_bytes, hours
from ldm.memory import Memory, Saved, foreseen
from tests.support import TOY, ran

SCRIPTS = {"vae": train_vae, "ldm": train_ldm}


def arguments(stage: str, chain: Path, out: Path) -> list[str]:
    words = ["--config", str(TOY / f"{stage}.yaml"), "--run.out", str(out), "--dry-run"]
    return words + (["--autoencoder", str(chain / "vae")] if stage == "ldm" else [])


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(p): (p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(folder.rglob("*"))}


@pytest.mark.parametrize("more", [[], ["--run.accumulate", "2", "--run.tracker", "tensorboard"]])
@pytest.mark.parametrize("stage", ["vae", "ldm"])
def test_a_dry_run_says_what_a_run_takes_and_leaves_nothing(
    chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], stage: str, more: list[str]
) -> None:
    SCRIPTS[stage].main(arguments(stage, chain, tmp_path / "new" / "run") + more)
    said, beside = capsys.readouterr()
    assert "seed: 0" in said and "images/s" in said and "All was tried once and worked" in said
    assert "the model is in" not in beside, "nothing came of it"
    weights = sum(p.numel() for p in AutoencoderKL.from_pretrained(chain / "vae/model").parameters())
    assert f"{weights:,} {'trained' if stage == 'vae' else 'frozen'}" in said
    assert "for the 6 steps from here" in said
    assert list(tmp_path.iterdir()) == []


def test_a_discriminator_is_tried_although_it_begins_later(
    chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[int] = []
    original = Adversary.discriminator_loss

    def counted(self: Adversary, pixels: torch.Tensor, made: torch.Tensor, step: int) -> object:
        tried.append(len(pixels))
        return original(self, pixels, made, step)

    monkeypatch.setattr(Adversary, "discriminator_loss", counted)
    gan = ["--loss.gan.weight", "0.1", "--loss.gan.start", "5", "--loss.gan.head_start", "1"]
    gan += ["--loss.gan.layers", "1", "--loss.gan.channels", "8"]
    train_vae.main(arguments("vae", chain, tmp_path / "run") + gan)
    said = capsys.readouterr().out
    weights = sum(p.numel() for p in Discriminator(8, 1).parameters())
    assert f"{weights:,} trained" in said and "All was tried once and worked" in said
    assert tried[:3] == [2, 4, 4] and list(tmp_path.iterdir()) == []


def test_a_begun_run_is_not_touched_and_its_rest_is_counted(
    chain: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = snapshot(chain)
    train_vae.main([*arguments("vae", chain, chain / "vae"), "--run.steps", "6"])
    assert "is finished" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        train_vae.main([*arguments("vae", chain, chain / "vae"), "--loss.kl", "0.1"])
    assert "loss.kl was 1e-06 and is 0.1" in capsys.readouterr().err
    assert snapshot(chain) == before


def test_the_rest_of_a_run_and_its_folder_are_counted(
    chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    begun = tmp_path / "checkpoints" / "step-00000004"
    begun.mkdir(parents=True)
    before = snapshot(tmp_path)
    train_vae.main(arguments("vae", chain, tmp_path))
    assert "for the 2 steps from here" in capsys.readouterr().out
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    ("stage", "more", "message"),
    [
        ("vae", ["--run.keep", "999999999"], "are free on its disk"),
        ("vae", ["--data.path", "nowhere/at/all", "--data.scenes.count", "8192"], "while starting"),
        ("ldm", ["--autoencoder", "nowhere/at/all/x"], "while starting: "),
        (
            "ldm",
            ["--network.in_channels", "9"],
            "while caching latents and captions: network.in_channels is 9",
        ),
    ],
)
def test_what_fails_is_one_sentence(
    chain: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    stage: str,
    more: list[str],
    message: str,
) -> None:
    with pytest.raises(SystemExit) as ended:
        SCRIPTS[stage].main(arguments(stage, chain, tmp_path / "run") + more)
    said = capsys.readouterr().err
    assert ended.value.code == 1 and "Traceback" not in said
    assert message in said.replace("building the networks", "starting")
    assert list(tmp_path.iterdir()) == []


def test_a_batch_that_would_not_fit_is_refused_before_it_is_tried(
    chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Memory, "room", lambda memory: 10**6)
    with pytest.raises(SystemExit) as ended:
        train_ldm.main(arguments("ldm", chain, tmp_path / "run"))
    assert ended.value.code == 1 and "not even one sample at a time fits" in capsys.readouterr().err


def test_what_to_lower_is_what_would_fit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = Findings(steps=1, batch=8, keep=2, save_every=1, room=5 * 10**9)
    assert "raise run.accumulate, which" in found.memory()
    found.by_accumulate = {1: 9 * 10**9, 2: 6 * 10**9, 4: 4 * 10**9}
    found.bytes["activations"], found.peaks = 3 * 10**9, {"validation": 10**9}
    said = found.memory()
    assert "a training step takes about 9.00 GB, validation takes about 1.00 GB, of 5.00 GB" in said
    assert "activations 3.00 GB" in said and "raise run.accumulate to 4 (4.00 GB)" in said
    found.room = 10**9
    assert "not even one sample at a time fits: lower data.size" in found.memory()
    found.room = 10**10
    assert "fits if nothing else takes memory" in found.memory()
    monkeypatch.setattr(memory, "LIMIT", tmp_path / "memory.max")
    for limit, room in (("1000", 1000), ("max", Memory(torch.device("cpu")).room())):
        memory.LIMIT.write_text(f"{limit}\n")
        assert Memory(torch.device("cpu")).room() == pytest.approx(room, rel=0.5)


def test_two_processes_rehearse_together(chain: Path, tmp_path: Path) -> None:
    said = ran("train_ldm.py", *arguments("ldm", chain, tmp_path / "run"), processes=2)
    assert said.count("All was tried once and worked") == 1
    assert list(tmp_path.iterdir()) == []


def test_what_autograd_keeps_is_foreseen_from_few_samples() -> None:
    network = nn.Sequential(ResnetBlock(8, 16, groups=4), nn.AvgPool2d(2), ResnetBlock(16, 16, groups=4))
    saved = Saved([network])
    sizes = []
    for n in (2, 4, 13):
        with saved.watching():
            network(torch.randn(n, 8, 12, 12)).square().mean().backward()
        sizes.append(saved.sizes)
        saved.clear()
    by_hand = foreseen((2, 4), (sizes[0], sizes[1]), 13) - foreseen((2, 4), (sizes[0], sizes[1]), 0)
    assert by_hand == pytest.approx(sum(sizes[2]) + 10 * max(sizes[2]), rel=0.01)
    kept = sum(p.numel() * 4 for p in network.parameters())
    assert sum(sizes[0]) > 2 * 16 * 12 * 12 * 4 and kept not in sizes[0]


def test_memory_at_its_peak_is_measured() -> None:
    memory = Memory(torch.device("cpu"))
    memory.forget()
    if memory.peak() is None:
        pytest.skip("this system doesn't tell")
    before = memory.held()
    torch.ones(2**24).sum()  # 64 MiB that are free again
    assert memory.peak() - before > 60 * 2**20


def test_times_and_bytes_are_added_up(tmp_path: Path) -> None:
    found = Findings(steps=100, batch=8, keep=2, save_every=50, done=40)
    found.parts = [Part("UNet", 7, 3)]
    found.step_seconds, found.cache_seconds, found.repeated_seconds, found.finish_seconds = (
        2.0,
        5.0,
        10.0,
        1.0,
    )
    assert found.seconds == 60 * 2 + 16
    found.disk["cache"], found.free = 3000, 2000
    with pytest.raises(UserError, match=r"will need 0\.0000 GB more"):
        found.check_disk(tmp_path)
    found.there = 1500
    found.check_disk(tmp_path)
    assert "4.0 images/s; 2.3 min for the 60 steps" in found.report(tmp_path)
    assert "1.7 min between checkpoints (run.save_every 50)" in found.report(tmp_path)
    (tmp_path / "a").write_bytes(b"123")
    assert folder_bytes(tmp_path) == 3 and hours(7200) == "2.0 h"


def test_a_fresh_run_shows_and_saves_before_it_trains(
    chain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for stage in ("vae", "ldm"):
        assert list((chain / stage / "samples").glob("*-00000000.png"))
        first = json.loads((chain / stage / "metrics.jsonl").read_text().splitlines()[0])
        assert first["step"] == 1 and "psnr_db" not in first

    def stop(*ignored: object) -> None:
        raise ValueError("trained")

    monkeypatch.setattr(train_vae.Run, "update", stop)
    words = arguments("vae", chain, tmp_path / "run")
    words.remove("--dry-run")
    with pytest.raises(SystemExit):
        train_vae.main(words)
    assert (tmp_path / "run" / "checkpoints" / "step-00000000" / "manifest.json").exists()
