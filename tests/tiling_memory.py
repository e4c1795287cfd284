"""Peak memory and time of encoding and decoding a large picture, at once or in tiles: python -m tests.tiling_memory

Each measurement runs in a process of its own, so that nothing that was freed before is counted.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch

from autoencoder import tiling
from autoencoder.kl import AutoencoderConfig, AutoencoderKL
from tests.support import ROOT

STATUS = Path("/proc/self/status")  # Linux
WIDTHS = (16, 32, 64, 64)  # f8


def work(size: int, tile: int | None, widths: tuple[int, ...]) -> dict[str, float]:
    """Encode and decode one picture of size x size pixels in this process."""
    torch.set_num_threads(1)
    config = AutoencoderConfig(block_out_channels=widths, norm_num_groups=8, mid_block_add_attention=False)
    model = AutoencoderKL(config).eval()
    pixels = torch.rand(1, 3, size, size)
    before, began = peak(), time.time()
    with torch.no_grad():
        if tile is None:
            model.decode(model.encode(pixels).mean)
        else:
            z = tiling.encode(model, pixels, tile=tile).mean
            tiling.decode(model, z, tile=tile)
    return {"mb": round(peak() - before, 1), "total_mb": peak(), "seconds": round(time.time() - began, 1)}


def peak() -> float:
    """Largest resident memory of this program so far, in MB. getrusage would count the process that started it."""
    lines = dict(line.split(":") for line in STATUS.read_text().splitlines())
    return round(int(lines["VmHWM"].split()[0]) * 1024 / 1e6, 1)


def measured(size: int, tile: int | None, widths: tuple[int, ...] = WIDTHS) -> dict[str, float]:
    """`work` in a process of its own: MB above what it had before, MB in all, and seconds."""
    words = [str(size), "--widths", *map(str, widths), *(["--tile", str(tile)] if tile else []), "--here"]
    command = [sys.executable, "-m", "tests.tiling_memory", *words]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


if __name__ == "__main__":
    reader = argparse.ArgumentParser(description=__doc__)
    reader.add_argument("size", type=int, nargs="?", default=2048)
    reader.add_argument("--tile", type=int)
    reader.add_argument("--widths", type=int, nargs="+", default=WIDTHS)
    reader.add_argument("--here", action="store_true", help="in this process")
    options = reader.parse_args()
    if options.here:
        print(json.dumps(work(options.size, options.tile, tuple(options.widths))))
    else:
        for tile in dict.fromkeys([options.tile, 512, 256]):
            print(
                f"{options.size} pixels, tile {tile}: {measured(options.size, tile, tuple(options.widths))}"
            )
