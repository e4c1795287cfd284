"""Proofs that nothing that ends a training costs more than the steps since its last checkpoint.

Each takes a fresh folder, and says how many trials it made; an AssertionError says which one failed, and how.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from ldm import checkpoint
from ldm.signals import StopSignals
from tests.forked import Killer, alike, ended, forked, train, trained
from tests.support import flip, losses, truncate, zero


def reference(folder: Path, *arguments: str, stage: str = "vae") -> tuple[Path, float]:
    """An undisturbed toy training, and the seconds that it took."""
    trained(folder / "warm", *arguments, stage=stage)
    start = time.monotonic()
    assert trained(folder / "reference", *arguments, stage=stage) == 0, (folder / "reference.log").read_text()
    return folder / "reference", time.monotonic() - start


def goes_on(run: Path, expected: Path, *arguments: str, stage: str = "vae") -> None:
    """The same command again ends well, with the losses and tensors of the run that was not disturbed."""
    assert trained(run, *arguments, stage=stage) == 0, run.with_suffix(".log").read_text()[-2000:]
    assert alike(run, expected), f"{run} went on in another way than {expected}"
    leftovers = [path for path in run.rglob(".*") if path.name.endswith((".writing", ".old"))]
    assert not leftovers, leftovers


def kill_at_random(folder: Path, trials: int, seed: int = 0, stage: str = "vae") -> int:
    """kill -9 at random moments, from the start of the process to its end; what it has built before, too."""
    given = () if stage == "vae" else stage_1(folder)
    expected, seconds = reference(folder, *given, stage=stage)
    moments = random.Random(seed)
    for trial in range(trials):
        run = folder / f"killed-{trial}"
        child = forked(lambda run=run: train(run, *given, stage=stage), run.with_suffix(".log"))
        time.sleep(moments.uniform(0, seconds))
        os.kill(child, signal.SIGKILL)
        ended(child)
        goes_on(run, expected, *given, stage=stage)
    return trials


def stage_1(folder: Path) -> tuple[str, ...]:
    """Arguments that give stage 2 a toy autoencoder, and have it leave snapshots of its averages."""
    assert trained(folder / "autoencoder") == 0, (folder / "autoencoder.log").read_text()
    return "--autoencoder", str(folder / "autoencoder"), "--ema_every", "2"


def operations(folder: Path, *arguments: str) -> int:
    """How many operations on files a toy training makes."""

    def work() -> None:
        killer = Killer(folder / "counted", None)
        train(folder / "counted", *arguments)
        (folder / "count").write_text(str(killer.count))

    assert ended(forked(work, folder / "counted.log")) == 0
    return int((folder / "count").read_text())


def kill_at_operations(
    folder: Path, chosen: Callable[[int], Iterable[int]] = lambda count: range(1, count + 1)
) -> int:
    """kill -9 at each write, fsync and rename of a training, or at those chosen of so many."""
    short = ("--run.steps", "3")
    expected, _ = reference(folder, *short)
    numbers = list(chosen(operations(folder, *short)))
    for number in numbers:
        run = folder / f"operation-{number}"

        def work(run: Path = run, number: int = number) -> None:
            Killer(run, number)
            train(run, *short)

        assert ended(forked(work, run.with_suffix(".log"))) == 9
        goes_on(run, expected, *short)
    return len(numbers)


def stop_at_random(folder: Path, trials: int, seed: int = 0) -> int:
    """SIGTERM, SIGINT, SIGUSR1 or SIGHUP at random moments of the loop: saved within one step, the right exit code."""
    steps = 12
    rarely = ("--run.steps", f"{steps}", "--run.save_every", f"{steps}", "--show.every", f"{steps}")
    expected, seconds = reference(folder, *rarely)
    moments = random.Random(seed)
    for trial in range(trials):
        run = folder / f"stopped-{trial}"
        child = forked(lambda run=run: train(run, *rarely), run.with_suffix(".log"))
        after, metrics = moments.randint(1, steps - 3), run / "metrics.jsonl"
        while not metrics.exists() or len(losses(run)) < after:
            time.sleep(0.001)
        time.sleep(moments.uniform(0, seconds / steps))
        done = len(losses(run))
        number = StopSignals.caught[trial % 4]
        os.kill(child, number)
        code, said = ended(child), run.with_suffix(".log").read_text()
        if "to go on, run the same command again" in said:
            assert code == 128 + (signal.SIGTERM if number == signal.SIGUSR1 else number), said
            saved = int(max((run / "checkpoints").glob("step-*")).name.removeprefix("step-"))
            assert done <= saved <= done + 2 and saved == len(losses(run)), (done, saved)
        else:  # this process was kept from sending it until the last step was done
            assert done >= steps - 2 and code in (0, -number, 128 + number), (done, code, said)
        goes_on(run, expected, *rarely)
    return trials


HARMS: tuple[Callable[[Path], None], ...] = (truncate, flip, zero, Path.unlink)


def damage_every_file(
    folder: Path, chosen: Callable[[int], Iterable[int]] = lambda count: range(count)
) -> int:
    """Every file of the newest checkpoint, harmed in four ways, or chosen ones of so many harms; the run goes on."""
    expected, _ = reference(folder)
    newest = max((expected / "checkpoints").glob("step-*"))
    files = [path.relative_to(expected) for path in sorted(newest.rglob("*")) if path.is_file()]
    harms = [(file, harm) for file in files for harm in HARMS]
    numbers = list(chosen(len(harms)))
    for number in numbers:
        file, harm = harms[number]
        run = folder / f"damaged-{number}"
        os.system(f"cp -r {expected} {run} && rm {run}/result.json")
        harm(run / file)
        assert trained(run) == 0, run.with_suffix(".log").read_text()
        assert (run / "checkpoints" / f"damaged-{newest.name}").exists(), (file, harm)
        assert checkpoint.damage(run / newest.relative_to(expected)) is None
        assert alike(run, expected), (file, harm)
    return len(numbers)
