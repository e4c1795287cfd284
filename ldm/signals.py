"""Stopping a run from outside without losing work."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

ECHO = 2.0
"""Seconds within which a launcher passes on a signal that a terminal has sent to all its processes already"""


class StopSignals:
    """While open, the first SIGINT, SIGTERM or SIGUSR1 is kept in `received`, and the second ends the process.

    SIGUSR1, with which schedulers warn before they end a job, counts as SIGTERM. Under torchrun or
    `accelerate launch` a second signal that follows within `ECHO` seconds is the same one, passed on.
    """

    caught = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

    def __init__(self, say: Callable[[str], None]) -> None:
        self.received, self._say, self._process = 0, say, os.getpid()
        self._when = 0.0
        self._echo = ECHO if "TORCHELASTIC_RUN_ID" in os.environ else 0.0

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
            if time.monotonic() - self._when >= self._echo:
                os._exit(128 + number)
            return
        self.received, self._when = number, time.monotonic()
        self._say("stopping after this step; once more to leave at once")
