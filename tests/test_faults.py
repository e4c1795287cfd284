"""A run that is killed, stopped, damaged or starved goes on as if nothing had been. tests/long_faults.py has more."""

import json
import os
import re
import signal
import time
from pathlib import Path

import psutil
import pytest
import torch

import train_vae
from ldm import checkpoint
from ldm.estimate import Estimate
from ldm.faults import Watchdog, explain
from ldm.training import Run
from tests import faults
from tests.forked import ended, forked, ranked, train, trained
from tests.support import losses


def test_a_killed_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    assert faults.kill_at_random(tmp_path, 20) == 20


def test_a_save_killed_at_any_write_fsync_or_rename_costs_nothing(tmp_path: Path) -> None:
    """Ten operations over about one save; all of all saves in tests/long_faults.py."""
    chosen = lambda count: range(count // 2, 3 * count // 4, max(1, count // 40))  # noqa: E731
    assert faults.kill_at_operations(tmp_path, chosen) >= 10


def test_stop_signals_save_within_a_step(tmp_path: Path) -> None:
    assert faults.stop_at_random(tmp_path, 20) == 20


def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path) -> None:
    assert faults.damage_every_file(tmp_path, lambda count: range(1, count, 7)) > 6


def test_a_second_signal_leaves_at_once(tmp_path: Path) -> None:
    def work() -> None:
        original = Run.update

        def update(run: Run, *rest: object) -> None:
            original(run, *rest)
            if run.step == 2:
                signal.raise_signal(signal.SIGINT)
                signal.raise_signal(signal.SIGINT)
                time.sleep(60)

        Run.update = update  # type: ignore[method-assign]
        train(tmp_path / "run", "--run.save_every", "6")

    assert ended(forked(work, tmp_path / "log"), within=30) == 130
    assert "once more to leave at once" in (tmp_path / "log").read_text()
    assert not list((tmp_path / "run" / "checkpoints").glob("step-*[1-9]"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_outside_the_steps_ends_with_a_line(tmp_path: Path, number: signal.Signals) -> None:
    def work() -> None:
        train_vae.finish = lambda *rest: signal.raise_signal(number)
        train(tmp_path / "run")

    assert ended(forked(work, tmp_path / "log")) == 128 + (15 if number == signal.SIGUSR1 else number)
    assert "stopped; to go on, run the same command again" in (tmp_path / "log").read_text()
    assert trained(tmp_path / "run") == 0


def spoil(steps: range, rank: int = 0) -> None:
    """Have one process meet losses of infinity, which have a finite gradient, in some steps."""
    original = Run.update

    def update(run: Run, loss: torch.Tensor, *rest: object) -> None:
        spoiled = run.step in steps and run.accelerator.process_index == rank
        original(run, loss + (torch.inf if spoiled else 0.0), *rest)

    Run.update = update  # type: ignore[method-assign]


def test_a_step_without_a_finite_loss_on_one_process_is_skipped_by_all(tmp_path: Path) -> None:
    def work(rank: int) -> None:
        spoil(range(2, 4), rank=1)
        train(tmp_path / "run")

    children = ranked(work, tmp_path / "log.x")
    assert [ended(child) for child in children] == [0, 0], (tmp_path / "log.0.log").read_text()
    lines = [json.loads(line) for line in (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 3] and all(len(line["indices"]) == 4 for line in lines)
    record = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(record) == 6 and all(line["loss"] < 10 for line in record)  # of the process that had one
    before, after = (
        checkpoint.load_file(tmp_path / f"run/checkpoints/step-0000000{step}/autoencoder.safetensors")
        for step in (5, 6)
    )
    assert all(torch.isfinite(value).all() for value in after.values())
    assert any(not torch.equal(before[key], after[key]) for key in before)


def test_many_such_steps_in_a_row_stop_the_run(tmp_path: Path) -> None:
    def work() -> None:
        spoil(range(2, 100))
        train(tmp_path / "run", "--run.steps", "40")

    assert ended(forked(work, tmp_path / "log")) == 1
    said = (tmp_path / "log").read_text()
    assert "20 steps in a row had no finite gradient" in said and "Traceback" not in said
    newest = checkpoint.newest(tmp_path / "run" / "checkpoints")
    assert newest is not None
    weights = checkpoint.load_file(newest / "autoencoder.safetensors")
    assert all(torch.isfinite(value).all() for value in weights.values())


def test_a_dead_reader_is_one_sentence(tmp_path: Path) -> None:
    def work() -> None:
        import psutil

        original = Run.update

        def update(run: Run, *rest: object) -> None:
            original(run, *rest)
            if run.step == 3:
                run._writer.wait()
                psutil.Process().children()[0].kill()

        Run.update = update  # type: ignore[method-assign]
        train(tmp_path / "run", "--workers", "1", "--run.steps", "600", "--show.every", "600")

    assert ended(forked(work, tmp_path / "log")) == 1
    said = (tmp_path / "log").read_text()
    assert "a process that prepares batches is gone" in said and "Traceback" not in said
    assert checkpoint.newest(tmp_path / "run" / "checkpoints") is not None


@pytest.mark.parametrize("fault", ["killed", "raises", "hangs"])
def test_when_one_process_fails_the_others_end(tmp_path: Path, fault: str) -> None:
    timeout = 6

    def work(rank: int) -> None:
        original = Run.update

        def update(run: Run, *rest: object) -> None:
            if run.step == 2 and rank == 1:
                (tmp_path / "failed").touch()
                if fault == "killed":
                    os.kill(os.getpid(), signal.SIGKILL)
                if fault == "raises":
                    raise RuntimeError("a fault of the test's")
                time.sleep(600)
            original(run, *rest)

        Run.update = update  # type: ignore[method-assign]
        train(tmp_path / "run", "--run.timeout", str(timeout))

    children = ranked(work, tmp_path / "log.x")
    while not (tmp_path / "failed").exists():
        time.sleep(0.01)
    codes = [ended(child, within=timeout + 5) for child in children]
    assert codes[0] == 1 and codes[1] == {"killed": -9, "raises": 70, "hangs": 1}[fault]
    said = (tmp_path / "log.0.log").read_text()
    assert "another process of this run died or hangs" in said or "no step was finished" in said, said
    if fault == "hangs":
        assert "hangs in" in (tmp_path / "log.1.log").read_text()
    assert trained(tmp_path / "run") == 0
    assert len(losses(tmp_path / "run")) == 6


def test_a_full_disk_met_in_the_background_ends_the_run(tmp_path: Path) -> None:
    def work() -> None:
        def full(*arguments: object) -> None:
            raise OSError(28, "No space left on device")

        original = Run.save

        def save(run: Run) -> None:
            if run.step == 3:
                run._writer.wait()
                checkpoint.save_file = full  # type: ignore[assignment]
            original(run)

        Run.save = save  # type: ignore[method-assign]
        train(tmp_path / "run")

    assert ended(forked(work, tmp_path / "log")) == 1
    said = (tmp_path / "log").read_text()
    assert "step-00000003 can't be written" in said and "MB are free" in said and "Traceback" not in said
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir()) == [
        "step-00000001",
        "step-00000002",
    ]


@pytest.mark.parametrize(
    ("problem", "words"),
    [
        (MemoryError(), "lower run.batch_size"),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
            "Tried to allocate 2.00 GiB",
        ),
        (
            RuntimeError(
                "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9"
            ),
            "lower",
        ),
    ],
)
def test_out_of_memory_says_what_to_lower(problem: Exception, words: str) -> None:
    assert words in (explain(problem) or "")


def test_faults_of_our_own_are_not_explained_away() -> None:
    assert explain(RuntimeError("shape mismatch")) is None
    assert explain(FileNotFoundError("igloo/NCCL.png is not there")) is None
    assert explain(RuntimeError("igloos.png")) is None
    assert "a disk is full ([Errno 28] x)" in (explain(OSError(28, "x")) or "") and not explain(
        OSError(2, "x")
    )
    reset = "[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1"
    assert "another process" in (explain(RuntimeError(reset)) or "")


@pytest.mark.parametrize("ranks", [1, 2])
def test_memory_that_runs_out_is_one_sentence_with_an_estimate(tmp_path: Path, ranks: int) -> None:
    def work(rank: int) -> None:
        import resource

        original = Run.update

        def update(run: Run, *rest: object) -> None:
            if run.step == 2 and run.accelerator.process_index == ranks - 1 and not isinstance(run, Estimate):
                run._writer.wait()
                room = psutil.Process().memory_info().vms + 2**30
                resource.setrlimit(resource.RLIMIT_AS, (room, room))
                torch.empty(2**33)
            original(run, *rest)

        Run.update = update  # type: ignore[method-assign]
        train(tmp_path / "run")

    children = ranked(work, tmp_path / "log.x", ranks)
    assert [ended(child) for child in children] == [1] * ranks
    said = (tmp_path / f"log.{ranks - 1}.log").read_text()
    assert "out of memory" in said and "Traceback" not in said and "to go on from the last checkpoint" in said
    phases = (
        r"a training step takes about [\d.]+ GB, validation .* [\d.]+ GB, saving .* [\d.]+ GB, of [\d.,]+ GB"
    )
    assert re.search(phases + r"; in a step weights 0\.\d+ GB, .*, activations 0\.\d+ GB", said), said
    assert not list((tmp_path / "run").glob(".estimate*"))
    assert trained(tmp_path / "run") == 0


def test_the_watchdog_leaves_alone_what_moves_on(tmp_path: Path) -> None:
    def work() -> None:
        with Watchdog(0.5) as dog:
            for _ in range(10):
                time.sleep(0.1)
                dog.beat()
        time.sleep(1)

    assert ended(forked(work)) == 0


def test_what_fails_first_is_told_when_a_save_beside_it_fails_too(tmp_path: Path) -> None:
    def work() -> None:
        original = Run.update

        def job() -> None:
            raise OSError("the second")

        def update(run: Run, *rest: object) -> None:
            original(run, *rest)
            if run.step == 2:
                run._writer.start(job)
                raise OSError("the first")

        Run.update = update  # type: ignore[method-assign]
        train(tmp_path / "run")

    assert ended(forked(work, tmp_path / "log")) == 1
    said = (tmp_path / "log").read_text()
    assert "train_vae.py: the first" in said and "the second" in said and "Traceback" not in said


def test_a_failing_save_is_raised_by_the_thread_that_trains() -> None:
    writer = checkpoint.Writer()

    def job() -> None:
        raise OSError("no")

    writer.start(job)
    with pytest.raises(OSError, match="no"):
        writer.wait()
    writer.wait()
