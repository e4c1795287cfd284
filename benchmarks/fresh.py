"""What only a fresh process shows: how long the first picture takes from `import` on, and the most memory held.

    python -m benchmarks.fresh ours|stock FOLDER

draws one and prints {"seconds", "peak_mb"}; nothing of the other side is imported. The memory is all that the process
holds, interpreter and libraries included.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.timing import Effort, Row  # which import torch, and that is part of what is timed

PROMPT, STEPS, GUIDANCE = "a large red circle", 20, 4.0
STATUS = Path("/proc/self/status")  # Linux


@dataclass(frozen=True)
class Fresh:
    """The row: by ours and by diffusers, in turns, from the folder of one stock pipeline."""

    size: Any
    name: str = "import to first picture, fresh process"
    long: bool = False

    def measure(self, effort: Effort) -> Row:
        from benchmarks.timing import Row

        found: dict[str, list[dict[str, float]]] = {side: [] for side in DRAW}
        with tempfile.TemporaryDirectory() as folder:
            save(self.size, Path(folder))
            for _ in range(effort.least):
                for side, values in found.items():
                    values.append(ran(side, folder))
            unlike = difference(*(Path(folder) / f"{side}.png" for side in found))
        seconds, most = (
            [[one[key] for one in values] for values in found.values()] for key in ("seconds", "peak_mb")
        )
        ratios = [peer / ours for ours, peer in zip(*seconds, strict=True)]
        return Row(
            name=self.name,
            ratio=statistics.median(ratios),
            spread=(min(ratios), max(ratios)),
            target=1 / 0.6,
            ours=statistics.median(seconds[0]),
            peer=statistics.median(seconds[1]),
            difference=unlike,
            ours_peak_mb=statistics.median(most[0]),
            peer_peak_mb=statistics.median(most[1]),
        )


def rows(size: Any) -> Iterator[Fresh]:
    yield Fresh(size)


def ran(side: str, folder: str) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.fresh", side, folder]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def save(size: Any, folder: Path) -> None:
    """A stock pipeline of random weights, with a small text encoder."""
    import torch

    from benchmarks.models import TOKENS, autoencoders, unets
    from benchmarks.unet_rows import PATH
    from ldm.conditioning import Text
    from ldm.encoders import TextConfig, small
    from ldm.prediction import make_prediction
    from pipelines import LatentDiffusion

    torch.manual_seed(0)
    width = size.unet["cross_attention_dim"]
    config = TextConfig(width=width, layers=6, heads=width // 64, max_length=TOKENS)
    model = LatentDiffusion(
        autoencoder=autoencoders(size)[0].cpu(),
        unet=unets(size)[0].cpu(),
        conditioner=Text(small(config, [PROMPT]), frozen=True),
        path=PATH,
        prediction=make_prediction("epsilon", PATH),
    )
    model.save_pretrained(folder / "model")


def difference(one: Path, other: Path) -> float:
    """Largest difference of two pictures, of 1."""
    import numpy as np
    from PIL import Image

    a, b = (np.asarray(Image.open(file), dtype=float) for file in (one, other))
    return float(abs(a - b).max() / 255)


def draw_ours(folder: Path) -> None:
    from pipelines import LatentDiffusion
    from pipelines.latent_diffusion import best_device

    model = LatentDiffusion.from_pretrained(folder / "model").to(best_device())
    model(PROMPT, steps=STEPS, guidance=GUIDANCE)[0].save(folder / "ours.png")


def draw_stock(folder: Path) -> None:
    import torch
    from diffusers import StableDiffusionPipeline

    model = StableDiffusionPipeline.from_pretrained(folder / "model")
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    model.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    made = model(PROMPT, num_inference_steps=STEPS, guidance_scale=GUIDANCE, generator=generator)
    made.images[0].save(folder / "stock.png")


DRAW = {"ours": draw_ours, "stock": draw_stock}


def main() -> None:
    start = time.perf_counter()
    side, folder = sys.argv[1:]
    DRAW[side](Path(folder))
    seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "peak_mb": peak_mb()}))


def peak_mb() -> float:
    """On a GPU of its memory, else of this program; `getrusage` would count that which started it, if it held more."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    if STATUS.exists():
        lines = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
        return int(lines["VmHWM"].split()[0]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
