"""The long versions of tests/test_faults.py: `python -m tests.long_faults [--kills 200] [--only NAME]`.

Prints how many trials each proof made; ends with an AssertionError at the first that fails.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from pathlib import Path

import torch

from tests import faults


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--stops", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="part of the name of a proof")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    proofs = {
        "kill_at_random": lambda folder: faults.kill_at_random(folder, asked.kills, asked.seed),
        "kill_stage_2_at_random": lambda folder: faults.kill_at_random(
            folder, asked.kills, asked.seed, "ldm"
        ),
        "kill_at_operations": faults.kill_at_operations,
        "stop_at_random": lambda folder: faults.stop_at_random(folder, asked.stops, asked.seed),
        "damage_every_file": faults.damage_every_file,
    }
    for name, proof in proofs.items():
        if asked.only and asked.only not in name:
            continue
        folder, start = Path(tempfile.mkdtemp(prefix="faults-")), time.monotonic()
        print(f"{name}: {proof(folder)} trials, all sound, {time.monotonic() - start:.0f} s", flush=True)
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
