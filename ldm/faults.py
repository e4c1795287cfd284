"""What goes wrong outside a run's own doing: said in a sentence, and a hung process ended."""

from __future__ import annotations

import atexit
import errno
import os
import re
import sys
import threading
import time
import traceback

from torch import distributed

GO_ON = "to go on from the last checkpoint, run the same command again"


def explain(problem: BaseException) -> str | None:
    """A sentence for a fault of the machine or of another process that ends a training; None for anything else."""
    name, text = type(problem).__name__, " ".join(str(problem).split())
    if out_of_memory(problem):
        lower = "lower run.batch_size, data.size or the network (--dry-run says beforehand what a step takes)"
        return "; ".join(
            [f"out of memory ({text[:200] or name})", *getattr(problem, "__notes__", [lower]), GO_ON]
        )
    if isinstance(problem, OSError) and problem.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"a disk is full ({text}); make room; {GO_ON}"
    if text.startswith("DataLoader worker") or text.startswith("DataLoader timed out"):
        return f"a process that prepares batches is gone ({text[:200]}); lower workers if memory was short; {GO_ON}"
    if isinstance(problem, RuntimeError) and re.search(r"^Dist|\bgloo\b|NCCL", f"{name} {text}"):
        return f"another process of this run died or hangs ({text[:200]}); its own message says why; {GO_ON}"
    return None


def out_of_memory(problem: BaseException) -> bool:
    name = type(problem).__name__
    return (
        isinstance(problem, MemoryError)
        or name == "OutOfMemoryError"
        or "can't allocate memory" in str(problem)
    )


def let_exchanges_end() -> None:
    """Have this process wait half a second, once all is done, before it lets go of the group and takes Python down.

    A thread of gloo that frees what it last sent needs the interpreter's lock. Asking for it any later aborts the
    process (pytorch issue 190489), and caches of sharded tensors keep these threads beyond the end of their group.
    Freed earlier, as with a compiled network in DDP, the group waits for the thread with the lock in hand, for ever.
    """
    atexit.register(lambda group: time.sleep(0.5), distributed.group.WORLD)


class Watchdog:
    """Ends this process if `beat` is not called for `timeout` seconds while it is open: something hangs.

    The other processes of a run then fail at their next exchange, so that none waits for ever.
    """

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self._last, self._closed = time.monotonic(), threading.Event()

    def __enter__(self) -> Watchdog:
        self.beat()
        self._closed.clear()
        trained = threading.get_ident()
        threading.Thread(target=self._watch, args=(trained,), name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._closed.set()

    def beat(self) -> None:
        self._last = time.monotonic()

    def _watch(self, trained: int) -> None:
        while not self._closed.wait(min(1.0, self.timeout / 10)):
            if time.monotonic() - self._last > self.timeout:
                frame = sys._current_frames().get(trained)
                where = traceback.format_stack(frame)[-1].strip().splitlines()[0] if frame else "unknown"
                print(
                    f"no step was finished for {self.timeout:g} seconds (run.timeout); process {os.getpid()} hangs "
                    f"in {where}; {GO_ON}",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(1)
