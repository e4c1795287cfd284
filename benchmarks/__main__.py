"""python -m benchmarks [--quick] [--only WORDS ...] [--device cpu|cuda] [--json FILE]

On a processor a small model, on a GPU networks of Stable Diffusion 1.5's size in bf16, compiled (docs/scaling.md says
how long it takes). Set OMP_NUM_THREADS to choose the threads, which both sides share.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import platform
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from autoencoder.files import write_text
from benchmarks.models import compiling, device, on_gpu, shape
from benchmarks.peaks import peaks
from benchmarks.rows import NETWORKS, ROWS, Measurable
from benchmarks.timing import FULL, QUICK, Row, matrix_rate

HEADER = (
    f"{'':72} {'ratio':>6}  {'quartiles':>11} {'target':>6} {'fast peer':>9} {'difference':>10} "
    f"{'ours':>12} {'of peak':>7} {'MB, ours and peer':>17}"
)


def main() -> None:
    reader = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    reader.add_argument(
        "--quick",
        action="store_true",
        help="few rounds, without memory and the longest rows: about three minutes",
    )
    reader.add_argument(
        "--only", nargs="+", default=[""], metavar="WORDS", help="rows whose name holds any of these"
    )
    reader.add_argument("--device", choices=("cpu", "cuda"), help="must be what PyTorch would take here")
    reader.add_argument("--json", type=Path, metavar="FILE", help="where to keep the figures")
    options = reader.parse_args()
    if options.device not in (None, device()):
        reader.error(f"--device is {options.device}, but PyTorch runs on {device()} here")
    if options.json and not options.json.absolute().parent.is_dir():
        reader.error(f"--json is {options.json}, but there is no folder {options.json.parent}")
    found: list[Row] = []
    failed: list[str] = []
    print(HEADER)
    for cases in ROWS:
        for made in measured(partial(cases, shape()), options.only, options.quick, cases in NETWORKS):
            if isinstance(made, Row):
                found.append(made)
                tqdm.write(line(made))
            else:
                failed.append(made)
            if options.json:  # after each row: a long run that is stopped has not been for nothing
                keep(options.json, found, failed)
        let_go()
    if failed:
        raise SystemExit("\n".join(["These rows could not be measured:", *failed]))
    if not found:
        reader.error(
            f"no row's name holds any of {options.only}, or only long ones' do, which --quick leaves out"
        )


def measured(
    cases: Callable[[], Iterator[Measurable]], words: list[str], quick: bool, networks: bool = False
) -> Iterator[Row | str]:
    """Rows whose names hold any of the words, or what went wrong: the others are none the worse for it.

    Args:
        networks: whether their memory is measured too, unless it is to be quick.
    """
    for case in cases():
        if any(word in case.name for word in words) and not (quick and case.long):
            try:
                held = peaks(cases, case) if networks and not quick else {}
                row = replace(case.measure(QUICK if quick else FULL), **held)
                yield for_a_gpu(row) if on_gpu() else row
            except Exception as error:
                traceback.print_exc()
                yield f"{case.name}: {type(error).__name__}: {str(error)[:300]}"
            gc.collect()


def for_a_gpu(row: Row) -> Row:
    """With the targets that hold there: 1.3 times the peer compiled, 45 % of the matrix rate where the U-Net trains."""
    trains = row.name.startswith("latent training step, network alone")
    fast_target = 1.3 if row.fast_ratio else None
    return replace(row, target=None, fast_target=fast_target, share_target=0.45 if trains else None)


def let_go() -> None:
    """Of networks that were measured, and of graphs and kernels of them: rows to come may need the GPU's memory."""
    gc.collect()
    if on_gpu():
        torch.compiler.reset()
        torch.cuda.empty_cache()


def keep(file: Path, found: list[Row], failed: list[str]) -> None:
    kept = {"machine": machine(), "rows": [row.as_dict() for row in found]}
    write_text(file, json.dumps(kept | ({"failed": failed} if failed else {}), indent=1) + "\n")


def line(row: Row) -> str:
    low, high = row.spread or (row.ratio, row.ratio)
    most = [shown(mb, ".0f") for mb in (row.ours_peak_mb, row.peer_peak_mb)]
    return (
        f"{row.name:72} {row.ratio:6.2f}  {low:5.2f}-{high:5.2f} {shown(row.target, '.2f'):>6} "
        f"{shown(row.fast_ratio, '.2f'):>9} {shown(row.difference, '.0e'):>10} {row.ours * 1e3:>9.1f} ms "
        f"{shown(row.share_of_peak, '.0%'):>7} {most[0]:>10} {most[1]:>6}"
    )


def shown(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def machine() -> dict[str, Any]:
    """What the figures hold for."""
    kinds = {"compiled": compiling(graphs=True)["mode"], "autotuned": torch._inductor.config.max_autotune}
    return {
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name() if on_gpu() else processor(),
        "threads": torch.get_num_threads(),
        "matrix_gflops_f32": round(matrix_rate(torch.float32) / 1e9),
        "matrix_gflops_bf16": round(matrix_rate(torch.bfloat16) / 1e9),
        **(kinds if on_gpu() else {}),
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
