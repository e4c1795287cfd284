"""Draws with stock diffusers alone, as a stranger would: run by `pipelines.publishing.gate` as a process of its own.

python draw.py REQUEST.json, which says folder, kind, variants, words, given pictures, seeds, steps, guidance, where to.
"""

import json
import sys
from pathlib import Path
from typing import Any

sys.modules.update(dict.fromkeys(("ldm", "autoencoder", "pipelines"), None))  # type: ignore[arg-type]

import diffusers  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402


def main(request: dict[str, Any]) -> None:
    if request["kind"] == "LatentDiffusionPipeline":
        sys.path.insert(0, request["folder"])
        from pipeline import LatentDiffusionPipeline as kind  # type: ignore[import-not-found]
    else:
        kind = getattr(diffusers, request["kind"])
    torch.set_num_threads(request["threads"])
    out = Path(request["out"])
    for name, variant in request["variants"].items():
        model = kind.from_pretrained(
            request["folder"], variant=variant, torch_dtype=torch.float32, use_safetensors=True
        )
        model.set_progress_bar_config(disable=True)
        (out / name).mkdir()
        for i, image in enumerate(drawn(model, request)):
            image.save(out / name / f"{i}.png")
    (out / "version").write_text(diffusers.__version__)


def drawn(model: Any, request: dict[str, Any]) -> list[Image.Image]:
    """What is asked for."""
    options = {"num_inference_steps": request["steps"]}
    options |= {"guidance_scale": request["guidance"]} if request["words"] else {}
    generators = [torch.Generator().manual_seed(seed) for seed in request["seeds"]]
    if not request["given"]:
        return list(model(**request["words"], generator=generators, **options).images)
    images = []
    for i, given in enumerate(request["given"]):
        words = {name: [said[i]] for name, said in request["words"].items()}
        images.append(made(model, given, generator=generators[i : i + 1], **words, **options))
    return images


def made(model: Any, given: list[str], **options: Any) -> Image.Image:
    """What a model makes of a picture, and of a hole, outside of which the picture stays as it is."""
    picture, *holes = map(Image.open, given)
    if holes:
        options["mask_image"] = holes[0]
    image = model(image=picture, **options).images[0]
    return Image.composite(image, picture, holes[0]) if holes else image


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
