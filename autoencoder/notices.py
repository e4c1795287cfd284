"""Warnings for the person who runs a command: said in a sentence, without the place in the code that they come from."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm


class Notice(UserWarning):
    """To be said once, as it is."""


@contextmanager
def spoken(prog: str) -> Iterator[None]:
    """While open, notices come as `prog: sentence` on stderr, above any progress bar; other warnings as ever."""
    with warnings.catch_warnings():
        usual = warnings.showwarning

        def say(message: Warning | str, category: type[Warning], *where: Any) -> None:
            if issubclass(category, Notice):
                tqdm.write(f"{prog}: {message}", file=sys.stderr)
            else:
                usual(message, category, *where)

        warnings.simplefilter("once", Notice)
        warnings.showwarning = say  # type: ignore[assignment]
        yield
