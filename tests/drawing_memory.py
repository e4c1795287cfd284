"""How much memory drawing leaves behind: python -m tests.drawing_memory MODEL --count 2000

Measured in a process of its own, after some pictures that fill every cache. With --threads 8, instead how many of the
pictures that so many threads draw with one object differ from the same ones drawn one after the other.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from pipelines import LatentDiffusion
from pipelines.prompts import Unread
from tests.support import ROOT
from tests.tiling_memory import STATUS

SAMPLERS = ("dpmpp_2m", "euler_ancestral", "unipc", "ddim")


def work(folder: Path, count: int, warm: int) -> dict[str, float]:
    """Draw `warm` pictures and then `count`, one a call, in this process: what the latter left."""
    torch.set_num_threads(1)
    model = LatentDiffusion.from_pretrained(folder)
    for i in range(warm + count):
        if i == warm:
            before = resident()
        prompt, sampler = f"{i}: a circle", SAMPLERS[i % len(SAMPLERS)]
        model(prompt, negative=f"{i}: a star", sampler=sampler, steps=2 + i % 3, seed=i)
    return {"before_mb": before, "grown_mb": round(resident() - before, 2)}


def together(folder: Path, count: int, threads: int) -> dict[str, int]:
    """`count` pictures, in threads and one after the other."""
    torch.set_num_threads(1)
    model = LatentDiffusion.from_pretrained(folder)

    def draw(i: int) -> bytes:
        told = {"negative": "a star" if i % 2 else "", "sampler": SAMPLERS[i % len(SAMPLERS)]}
        return model(f"{i}: a circle", seed=i, steps=2, **told)[0].tobytes()

    with ThreadPoolExecutor(threads) as pool:
        made = [*pool.map(draw, range(count))]
    return {"drawn": count, "other": sum(draw(i) != one for i, one in enumerate(made))}


def resident() -> float:
    """Memory that this program holds now, in MiB."""
    lines = dict(line.split(":") for line in STATUS.read_text().splitlines())
    return int(lines["VmRSS"].split()[0]) / 1024


def measured(folder: Path, count: int, warm: int) -> dict[str, float]:
    """`work` in a process of its own."""
    words = [str(folder), "--count", str(count), "--warm", str(warm), "--here"]
    command = [sys.executable, "-m", "tests.drawing_memory", *words]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    reader = argparse.ArgumentParser(description=__doc__)
    reader.add_argument("model", type=Path, help="the folder of a text model")
    reader.add_argument("--count", type=int, default=2000)
    reader.add_argument("--warm", type=int, default=100)
    reader.add_argument("--here", action="store_true", help="in this process")
    reader.add_argument("--threads", type=int, help="draw in threads and alone, and compare")
    options = reader.parse_args()
    warnings.simplefilter("ignore", Unread)  # few models know all these words
    if options.threads:
        print(json.dumps(together(options.model, options.count, options.threads)))
        sys.exit()
    run = work if options.here else measured
    print(json.dumps(run(options.model, options.count, options.warm)))
