"""Toy trainings in forked children, which skip the seconds of imports, and ways to end them."""

from __future__ import annotations

import importlib
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState

import train_ldm
import train_vae
from autoencoder.files import write_tensors
from ldm import checkpoint
from tests.support import TOY, losses, newest_weights

for lazy in (
    "torch._dynamo",
    "torchmetrics",
):  # what trainings import when they need it: seconds, in each child
    importlib.import_module(lazy)

SCRIPTS = {"vae": train_vae, "ldm": train_ldm}


def forked(work: Callable[[], None], log: Path | None = None) -> int:
    """Start `work` in a child process, its output in the file `log`; returns its id."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        out = os.open(log or os.devnull, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(out, stream)
        sys.stdout, sys.stderr = os.fdopen(1, "w", 1), os.fdopen(2, "w", 1)
        torch.set_num_threads(1)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which nohup has ignored
        work()
        code = 0
    except SystemExit as ended:
        code = int(ended.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)  # nothing of the parent, such as pytest, runs on in here


def ended(child: int, within: float = 600) -> int:
    """The exit code of a child, negative if a signal ended it; it must end in time."""
    limit = time.monotonic() + within
    while time.monotonic() < limit:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raise AssertionError(f"process {child} did not end within {within:g} s")


def train(out: Path, *arguments: str, stage: str = "vae") -> None:
    """A toy training in this process; what it saves, it saves at each step."""
    SCRIPTS[stage].main(
        ["--config", str(TOY / f"{stage}.yaml"), "--run.out", str(out), "--run.save_every", "1", *arguments]
    )


def trained(out: Path, *arguments: str, stage: str = "vae") -> int:
    """The exit code of a toy training in a child."""
    return ended(forked(lambda: train(out, *arguments, stage=stage), out.with_suffix(".log")))


def alike(one: Path, other: Path) -> bool:
    """Whether two runs have the same losses and tensors, bit for bit."""
    mine, theirs = newest_weights(one), newest_weights(other)
    return (
        losses(one) == losses(other)
        and mine.keys() == theirs.keys()
        and all(torch.equal(mine[key], theirs[key]) for key in mine)
    )


def ranked(work: Callable[[int], None], log: Path, ranks: int = 2) -> list[int]:
    """Start `work(rank)` in children that form one distributed run over gloo; returns their ids."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def begin(rank: int) -> Callable[[], None]:
        def run() -> None:
            for state in (AcceleratorState, PartialState, GradientState):
                state._shared_state.clear()  # of the parent, which is not distributed
            os.environ |= {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(ranks),
                "LOCAL_WORLD_SIZE": str(ranks),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "ACCELERATE_USE_CPU": "true",
            }
            work(rank)

        return run

    return [forked(begin(rank), log.with_suffix(f".{rank}.log")) for rank in range(ranks)]


FILE_OPERATIONS = ("os.rename", "os.link", "os.remove", "os.rmdir", "os.mkdir")


class Killer:
    """Ends this process, as kill -9 does, just before its n-th operation on files under `folder`.

    Counted are opening for writing, renaming, linking, removing and fsync. Weight files, which are written outside
    Python, count as one operation more, after which half of the file is there.
    """

    def __init__(self, folder: Path, at: int | None) -> None:
        self.folder, self.at, self.count = str(folder), at, 0
        sys.addaudithook(self._audit)  # stays for the rest of the process
        self._fsync = os.fsync
        os.fsync = self._synced  # type: ignore[assignment]
        checkpoint.write_tensors = self._saved  # type: ignore[assignment]

    def _operation(self) -> bool:
        self.count += 1
        return self.count == self.at

    def _audit(self, event: str, arguments: tuple) -> None:
        writes = (
            event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        )
        if (
            (writes or event in FILE_OPERATIONS)
            and str(arguments[0]).startswith(self.folder)
            and self._operation()
        ):
            os._exit(9)

    def _synced(self, handle: int) -> None:
        if self._operation():
            os._exit(9)
        self._fsync(handle)

    def _saved(self, path: Path, tensors: dict) -> None:
        write_tensors(path, tensors)
        if self._operation():
            os.truncate(path, path.stat().st_size // 2)
            os._exit(9)
