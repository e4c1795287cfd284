"""Draws with stock diffusers alone, as a stranger would: run by `pipelines.gate` as a process of its own.

python draw.py REQUEST.json, which says folder, kind, variant, prompts, seeds, steps, guidance and where to.
"""

import json
import sys
from pathlib import Path

sys.modules.update(dict.fromkeys(("ldm", "autoencoder", "pipelines"), None))  # type: ignore[arg-type]

import diffusers  # noqa: E402
import torch  # noqa: E402


def main(request: dict) -> None:
    if request["kind"] == "LatentDiffusionPipeline":
        sys.path.insert(0, request["folder"])
        from pipeline import LatentDiffusionPipeline as kind  # type: ignore[import-not-found]
    else:
        kind = getattr(diffusers, request["kind"])
    torch.set_num_threads(request["threads"])
    model = kind.from_pretrained(
        request["folder"], variant=request["variant"], torch_dtype=torch.float32, use_safetensors=True
    )
    model.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in request["seeds"]]
    options = {"num_inference_steps": request["steps"], "generator": generators}
    if request["prompts"] is not None:
        options |= {"prompt": request["prompts"], "guidance_scale": request["guidance"]}
    for i, image in enumerate(model(**options).images):
        image.save(Path(request["out"]) / f"{i}.png")
    (Path(request["out"]) / "version").write_text(diffusers.__version__)


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
