"""From an empty folder to pictures of prompts that the model never saw: `make demo`."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from autoencoder.files import write_text
from ldm.config import UserError
from ldm.scenes import prompts
from ldm.scenes_check import satisfied
from pipelines.latent_diffusion import LatentDiffusion, best_device
from pipelines.safety import provenance
from pipelines.sheets import contact_sheet

RECIPES = Path(__file__).parents[2] / "configs" / "scenes"
PROMPTS, SHOWN = 128, 24
STEPS, GUIDANCE = 15, 3.0


def demo(out: Path) -> None:
    """Train both stages under `out`, draw held-out prompts, check them, write result.json and sheet.png.

    What is there already is not done again.
    """
    print(f"1/3  the autoencoder: pictures to latents and back, in {out}/vae", flush=True)
    stage("train_vae", out / "vae")
    print(f"2/3  the latent model: captions to latents, in {out}/ldm", flush=True)
    stage("train_ldm", out / "ldm", "--autoencoder", str(out / "vae"))
    print(f"3/3  drawing {PROMPTS} prompts that were kept out of training", flush=True)
    result = out / "result.json"
    trained = out / "ldm" / "result.json"
    if not result.exists() or result.stat().st_mtime < trained.stat().st_mtime:
        write_text(result, json.dumps(draw_and_check(out), indent=1) + "\n")
    found = json.loads(result.read_text())
    print(
        f"\nautoencoder PSNR {found['autoencoder_psnr_db']:.1f} dB; {found['prompts_satisfied']:.0%} of the prompts "
        f"are satisfied in every attribute; {found['seconds'] / 60:.1f} minutes of training and drawing\n"
        f"look at {out}/sheet.png, then draw your own:\n"
        f'  .venv/bin/ldm generate {out}/ldm "a small blue star at the center on a black background" --out pictures'
    )


def stage(script: str, out: Path, *arguments: str) -> None:
    """One training script as its own process; it goes on where it was stopped, and ends at once if it is finished."""
    recipe = RECIPES / f"{script.removeprefix('train_')}.yaml"
    if not recipe.exists():
        raise UserError(f"{recipe} is not there; run the demo from a checkout of the project.")
    command = [sys.executable, "-m", script, "--config", str(recipe), "--run.out", str(out), *arguments]
    child = subprocess.Popen(command)
    with passed_on(child):
        code = child.wait()
    if code:
        raise SystemExit(code if code > 0 else 128 - code)


@contextmanager
def passed_on(child: subprocess.Popen[bytes]) -> Iterator[None]:
    """While open, a request to stop goes to the training, which saves first. Ctrl-C reaches it by itself."""

    def forward(number: int, frame: object) -> None:
        if number != signal.SIGINT:
            child.send_signal(number)

    before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def draw_and_check(out: Path) -> dict[str, object]:
    """Draw the held-out prompts, save the sheet, and say how many are satisfied, attribute by attribute."""
    began = time.time()
    captions = prompts(PROMPTS, "test")
    model = LatentDiffusion.from_pretrained(out / "ldm").to(best_device())
    images = model(captions, steps=STEPS, guidance=GUIDANCE, batch=32, progress=True)
    verdicts = [satisfied(image, caption) for image, caption in zip(images, captions, strict=True)]
    shares = {key: sum(v[key] for v in verdicts) / len(verdicts) for key in verdicts[0]}
    wrong = [not verdict["all"] for verdict in verdicts]
    few = contact_sheet(images[:SHOWN], captions[:SHOWN], columns=6, wrong=wrong[:SHOWN])
    few.save(out / "sheet.png", pnginfo=provenance(made_by="ldm demo"))
    whole = contact_sheet(images, captions, columns=16, wrong=wrong)
    whole.save(out / "all.png", pnginfo=provenance(made_by="ldm demo"))
    stages = [json.loads((out / name / "result.json").read_text()) for name in ("vae", "ldm")]
    kib = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return {
        "prompts_satisfied": shares.pop("all"),
        "satisfied_by_attribute": shares,
        "prompts": len(captions),
        "autoencoder_psnr_db": stages[0]["psnr_db"],
        "seconds": round(sum(s["seconds"] for s in stages) + time.time() - began, 1),
        "seconds_by_stage": {"vae": stages[0]["seconds"], "ldm": stages[1]["seconds"]},
        "peak_memory_gb": round(kib * 1024 / 1e9, 2),
        "drawing": {"steps": STEPS, "guidance": GUIDANCE, "sampler": model.sampler, "weights": "EMA"},
    }
