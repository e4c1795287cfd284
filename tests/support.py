"""What tests start and look at: the scripts, as people start them, and a tiny network."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from ldm.unet import UNet
from ldm.unet_config import UNetConfig

ROOT = Path(__file__).parents[1]
TOY = ROOT / "tests" / "toy"
KINDS = ("inpaint", "upscale", "restore", "segment")
"""Tasks that begin with a picture"""
SIDE, JUDGED = 16, 20
"""Of the pictures that evaluations are tried on: pixels along a side, and how many are in each split"""
DRAWING = ["--count", "17", "--steps", "2", "--guidance", "2"]
"""How the evaluation `result` draws"""
PROMPTS = [
    "a large red circle at the top left on a white background",
    "a small blue star at the center on a black background",
]


def started(*command: str, processes: int = 1, cwd: Path = ROOT, **popen: object) -> subprocess.Popen:
    """A script of ours on one or more real processes, on the CPU, with one thread each."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
    launch = [sys.executable]
    if processes > 1:  # not by `accelerate launch --cpu`, which starts one process whatever the number
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return subprocess.Popen(
        [*launch, *command],
        cwd=cwd,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **popen,
    )


def ran(*command: str, processes: int = 1, code: int = 0, cwd: Path = ROOT) -> str:
    """What the script printed; it must have ended with `code`, and a training have been on so many processes."""
    process = started(*command, processes=processes, cwd=cwd)
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, err[-3000:]
    assert " process(es) on " not in err or f"{processes} process(es) on " in err
    return out + err


def tiny_unet(**config: Any) -> UNet:
    """A U-Net with random weights that reads captions."""
    return UNet(
        UNetConfig(
            block_out_channels=(8, 16),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            attention_head_dim=2,
            norm_num_groups=4,
            **config,
        )
    ).eval()


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def newest_weights(run: Path) -> dict[str, Tensor]:
    """Every tensor of the newest checkpoint, by part and name."""
    folder = sorted((run / "checkpoints").glob("step-*"))[-1]
    return {
        f"{f.relative_to(folder).with_suffix('')}/{key}": value
        for f in sorted(folder.rglob("*.safetensors"))
        for key, value in load_file(f).items()
    }


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def zero(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def values(result: Path) -> dict[str, float]:
    """The figures that `ldm evaluate` wrote, without their errors."""
    return {name: figure["value"] for name, figure in json.loads(result.read_text())["figures"].items()}
