"""Every request of a publication x every fault, once and for good: python -m tests.hub_faults [--json FILE]

Passes if each publication is complete, or ends in one sentence within 60 s with `main` as it was before.
"""

import argparse
import contextlib
import io
import itertools
import json
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from ldm.config import UserError
from tests.hub import Hub
from tests.test_upload import CONTENT, NAME, TOKEN, USED, holds, published_nothing, sent

FAULTS: dict[str, dict] = {str(status): {"status": status} for status in (401, 403, 429, 500, 503)}
FAULTS |= {
    "cut": {"cut": True},
    "slow": {"delay": 5.0},
    "hangs": {"delay": 90.0},
    "corrupt": {"corrupt": True},
}
SECONDS = 60


def tried(case: tuple[str, str, int]) -> dict:
    """One publication with one fault."""
    endpoint, fault, times = case
    began, said = time.monotonic(), ""
    with tempfile.TemporaryDirectory() as folder, Hub(Path(folder) / "hub", chunk=50_000) as hub:
        hub.fail(endpoint, times=times, **FAULTS[fault])
        with contextlib.redirect_stderr(io.StringIO()):
            try:
                sent(hub, Path(folder) / "release")
            except UserError as problem:
                said = str(problem)
            except Exception as problem:
                said = f"TRACEBACK {type(problem).__name__}: {problem}"
        seconds = time.monotonic() - began
        complete = NAME in hub.repos and hub.commits(NAME) > 1 and holds(hub, CONTENT)
        whole = complete or published_nothing(hub)
    sentence = bool(said) and "\n" not in said and not said.startswith("TRACEBACK") and TOKEN not in said
    good = whole and seconds < SECONDS and (sentence or (complete and not said))
    row = {"endpoint": endpoint, "fault": fault, "times": times, "seconds": round(seconds, 1)}
    return row | {"complete": complete, "said": said, "good": good}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--json", type=Path)
    options.add_argument("--fault", choices=FAULTS, action="append", help="only this one")
    options.add_argument("--at-once", type=int, default=24, help="publications, each of which mostly waits")
    given = options.parse_args()
    file = given.json
    cases = list(itertools.product(USED, given.fault or FAULTS, (1, 9999)))
    with ProcessPoolExecutor(given.at_once) as pool:
        rows = list(pool.map(tried, cases))
    for row in rows:
        if not row["good"]:
            print(row)
    done = sum(row["complete"] and not row["said"] for row in rows)
    print(
        f"{sum(row['good'] for row in rows)} of {len(rows)} as they should be: {done} published, "
        f"{sum(bool(row['said']) for row in rows)} ended in a sentence; longest {max(r['seconds'] for r in rows)} s"
    )
    if file:
        file.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
