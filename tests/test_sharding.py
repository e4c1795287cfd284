"""Weights in parts, one a process, learn, save and resume what whole ones do: FSDP over gloo, on the CPU."""

import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train_ldm
import train_vae
from ldm.training import Run
from tests.forked import ended, forked, ranked
from tests.support import TOY, losses, newest_weights


def main(chain: Path, out: Path, *arguments: str) -> None:
    """Stage 2 of the `chain` fixture."""
    train_ldm.main(
        [
            "--config",
            str(TOY / "ldm.yaml"),
            "--run.out",
            str(out),
            "--autoencoder",
            str(chain / "vae"),
            *arguments,
        ]
    )


def stopped_after(step: int) -> None:
    original = Run.update

    def update(run: Run, *rest: object) -> None:
        original(run, *rest)
        if run.step == step and run.main:
            signal.raise_signal(signal.SIGTERM)

    Run.update = update  # type: ignore[method-assign]


def test_shared_out_whole_and_shared_out_again(chain: Path, tmp_path: Path) -> None:
    """Begun on two processes that share the weights out, gone on with on one, and on two again."""
    out = tmp_path / "run"

    def part(step: int, *arguments: str) -> None:
        stopped_after(step)
        main(chain, out, *arguments)

    def shared(rank: int, step: int) -> None:
        part(step, "--run.shard", "true")

    first = ranked(lambda rank: shared(rank, 2), tmp_path / "first.x")
    assert [ended(child) for child in first] == [143, 143], (tmp_path / "first.0.log").read_text()
    assert ended(forked(lambda: part(4), tmp_path / "second.log")) == 143, (
        tmp_path / "second.log"
    ).read_text()
    third = ranked(lambda rank: shared(rank, 99), tmp_path / "third.x")
    assert [ended(child) for child in third] == [0, 0], (tmp_path / "third.0.log").read_text()

    assert losses(out) == pytest.approx(losses(chain / "ldm"), rel=1e-4)
    mine, theirs = newest_weights(out), newest_weights(chain / "ldm")
    assert {k: v.shape for k, v in mine.items()} == {k: v.shape for k, v in theirs.items()}
    for key, value in mine.items():
        torch.testing.assert_close(value, theirs[key], rtol=1e-2, atol=1e-3, msg=key)
    for file in (chain / "ldm" / "model").rglob("*.safetensors"):
        exported, expected = (
            load_file(out / "model" / file.relative_to(chain / "ldm" / "model")),
            load_file(file),
        )
        for key, value in expected.items():
            torch.testing.assert_close(exported[key], value, rtol=1e-2, atol=1e-3, msg=key)


def test_an_autoencoder_is_not_shared_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        train_vae.main(["--config", str(TOY / "vae.yaml"), "--run.out", str(tmp_path), "--run.shard", "true"])
    assert refused.value.code == 2 and "run.shard is true" in capsys.readouterr().err
