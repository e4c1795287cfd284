"""python -m benchmarks [--quick] [--only WORDS] [--json FILE]"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from autoencoder.files import write_text
from benchmarks.models import device, shape
from benchmarks.rows import ROWS
from benchmarks.timing import Row, matrix_rate, measure


def main() -> None:
    reader = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    reader.add_argument("--quick", action="store_true", help="3 rounds instead of 15")
    reader.add_argument("--only", default="", metavar="WORDS", help="rows whose name holds these words")
    reader.add_argument("--json", type=Path, metavar="FILE", help="where to keep the figures")
    options = reader.parse_args()
    found: list[Row] = []
    print(HEADER)
    for cases in ROWS:
        for case in cases(shape()):
            if options.only in case.name:
                found.append(measure(case, 3 if options.quick else 15))
                tqdm.write(line(found[-1]))
        gc.collect()
    if options.json:
        rows = [row.as_dict() for row in found]
        write_text(options.json, json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")


HEADER = (
    f"{'':58} {'ratio':>6}  {'quartiles':>11} {'target':>6} {'difference':>10} {'ours':>9} {'of peak':>7}"
)


def line(row: Row) -> str:
    low, high = row.spread
    target = f"{row.target:.1f}" if row.target else ""
    unlike = "" if row.difference is None else f"{row.difference:.0e}"
    return (
        f"{row.name:58} {row.ratio:6.2f}  {low:5.2f}-{high:5.2f} {target:>6} {unlike:>10} "
        f"{row.per_second:7.1f}/s {row.share_of_peak:7.0%}"
    )


def machine() -> dict[str, Any]:
    """What the figures hold for."""
    return {
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name() if device() == "cuda" else platform.processor() or "cpu",
        "threads": torch.get_num_threads(),
        "matrix_gflops_f32": round(matrix_rate(torch.float32) / 1e9),
        "matrix_gflops_bf16": round(matrix_rate(torch.bfloat16) / 1e9),
        "versions": {name: version(name) for name in ("torch", "diffusers", "transformers")},
    }


if __name__ == "__main__":
    main()
