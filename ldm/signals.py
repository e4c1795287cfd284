"""Stopping a run from outside without losing work."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable


class StopSignals:
    """While open, the first SIGINT, SIGTERM or SIGUSR1 is kept in `received`, and the second ends the process.

    SIGUSR1, with which schedulers warn before they end a job, counts as SIGTERM.
    """

    caught = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

    def __init__(self, say: Callable[[str], None]) -> None:
        self.received, self._say, self._process = 0, say, os.getpid()

    def __enter__(self) -> None:
        self._before = {number: signal.signal(number, self._handle) for number in self.caught}

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: object) -> None:
        if os.getpid() != self._process:
            return  # a worker of the data loader, which ends with its parent
        number = signal.SIGTERM if number == signal.SIGUSR1 else number
        if self.received:
            os._exit(128 + number)
        self.received = number
        self._say("stopping after this step; once more to leave at once")
