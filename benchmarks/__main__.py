"""python -m benchmarks [--quick] [--only WORDS] [--device cpu|cuda] [--json FILE]

On a processor a small model, on a GPU a U-Net of Stable Diffusion 1.5's size in float32 and bf16. Set OMP_NUM_THREADS
to choose the threads, which both sides share.
"""

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
from benchmarks.timing import FULL, QUICK, Row, matrix_rate

HEADER = (
    f"{'':72} {'ratio':>6}  {'quartiles':>11} {'target':>6} {'fast peer':>9} {'difference':>10} "
    f"{'ours':>12} {'of peak':>7}"
)


def main() -> None:
    reader = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    reader.add_argument(
        "--quick",
        action="store_true",
        help="few rounds, and not the longest rows: about three minutes instead of thirteen",
    )
    reader.add_argument("--only", default="", metavar="WORDS", help="rows whose name holds these words")
    reader.add_argument("--device", choices=("cpu", "cuda"), help="must be what PyTorch would take here")
    reader.add_argument("--json", type=Path, metavar="FILE", help="where to keep the figures")
    options = reader.parse_args()
    if options.device not in (None, device()):
        reader.error(f"--device is {options.device}, but PyTorch runs on {device()} here")
    if options.json and not options.json.absolute().parent.is_dir():
        reader.error(f"--json is {options.json}, but there is no folder {options.json.parent}")
    found: list[Row] = []
    print(HEADER)
    for cases in ROWS:
        for case in cases(shape()):
            if options.only in case.name and not (options.quick and case.long):
                found.append(case.measure(QUICK if options.quick else FULL))
                tqdm.write(line(found[-1]))
                if options.json:  # after each row: a long run that is stopped has not been for nothing
                    keep(options.json, found)
                gc.collect()
    if not found:
        reader.error(f"no row's name holds {options.only!r}, or only long ones' do, which --quick leaves out")


def keep(file: Path, found: list[Row]) -> None:
    rows = [row.as_dict() for row in found]
    write_text(file, json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")


def line(row: Row) -> str:
    low, high = row.spread or (row.ratio, row.ratio)
    ours = f"{row.ours:.0f} MB" if row.unit == "mb" else f"{row.ours * 1e3:.1f} ms"
    return (
        f"{row.name:72} {row.ratio:6.2f}  {low:5.2f}-{high:5.2f} {shown(row.target, '.2f'):>6} "
        f"{shown(row.fast_ratio, '.2f'):>9} {shown(row.difference, '.0e'):>10} {ours:>12} "
        f"{shown(row.share_of_peak, '.0%'):>7}"
    )


def shown(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def machine() -> dict[str, Any]:
    """What the figures hold for."""
    return {
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name() if device() == "cuda" else processor(),
        "threads": torch.get_num_threads(),
        "matrix_gflops_f32": round(matrix_rate(torch.float32) / 1e9),
        "matrix_gflops_bf16": round(matrix_rate(torch.bfloat16) / 1e9),
        "versions": {name: version(name) for name in ("torch", "diffusers", "transformers")},
    }


def processor() -> str:
    """Its name, where the system tells."""
    listed = Path("/proc/cpuinfo")
    lines = listed.read_text().splitlines() if listed.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "cpu"


if __name__ == "__main__":
    main()
