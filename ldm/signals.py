"""Stopping a run from outside without losing work."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

ECHO = 2.0
"""Seconds within which a launcher passes on a signal that a terminal has sent to all its processes already"""


class StopSignals:
    """While open, SIGINT, SIGTERM, SIGUSR1 and SIGHUP end the process with code 128 + number and a line that says so.

    Inside `kept`, the first one is put into `received` instead, and the second ends the process at once. SIGUSR1, with
    which schedulers warn before they end a job, counts as SIGTERM; SIGHUP, which a terminal sends when it is closed,
    stays ignored under nohup. Under torchrun or `accelerate launch` a second signal that follows within `ECHO` seconds
    is the same one, passed on.
    """

    caught = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)

    def __init__(self, say: Callable[[str], None]) -> None:
        self.received, self._say, self._process = 0, say, os.getpid()
        self._when, self._keeps = 0.0, False
        self._echo = ECHO if "TORCHELASTIC_RUN_ID" in os.environ else 0.0

    def __enter__(self) -> None:
        heard = [n for n in self.caught if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._handle) for number in heard}

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """While steps are made, which are finished before the run stops."""
        self._keeps = True
        try:
            yield
        finally:
            self._keeps = False

    def _handle(self, number: int, frame: object) -> None:
        if os.getpid() != self._process:  # one that prepares batches, which ends with its parent
            return
        number = signal.SIGTERM if number == signal.SIGUSR1 else number
        if self.received:
            if time.monotonic() - self._when >= self._echo:
                os._exit(128 + number)
            return
        self.received, self._when = number, time.monotonic()
        if not self._keeps:
            self._say("stopped; to go on, run the same command again")
            raise SystemExit(128 + number)
        self._say("stopping after this step; once more to leave at once")
