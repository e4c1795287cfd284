"""The two pieces of code of a model card, each of which draws the first sample."""

from __future__ import annotations

from collections.abc import Sequence

from ldm.tasks import Inpaint, Segment, Task
from pipelines.diffusers_format import INPAINT, OURS
from pipelines.publishing.samples import Request, Sample


def stock_snippet(name: str, pipeline: str, request: Request, samples: Sequence[Sample]) -> str:
    """A few lines of stock diffusers."""
    kind, more = pipeline, ""
    if pipeline == OURS:
        kind, more = "DiffusionPipeline", f', custom_pipeline="{name}", trust_remote_code=True'
    said = words(request, prompt="prompt", class_name="class_labels", guidance="guidance_scale")
    pictures = {"picture": "image=picture", "hole": "mask_image=hole"}
    files = given(name, request, samples)
    arguments = [
        *said,
        *(pictures[key] for key in files),
        f"num_inference_steps={request.steps}",
        "generator=seeds",
    ]
    return "\n".join(
        [
            "import torch",
            f"from diffusers import {kind}",
            *imports(files, samples),
            "",
            f'model = {kind}.from_pretrained("{name}"{more})',
            *(f"{key} = {read}" for key, read in files.items()),
            f"seeds = [torch.Generator().manual_seed({request.seed})]",
            f"image = model({', '.join(arguments)}).images[0]",
            *(["image = Image.composite(image, picture, hole)"] if pipeline == INPAINT else []),
            'image.save("drawn.png")',
        ]
    )


def our_snippet(name: str, task: Task | None, request: Request, samples: Sequence[Sample]) -> str:
    """The same with this tool."""
    files = given(name, request, samples)
    said = words(request, prompt="", class_name="classes", guidance="guidance")
    arguments = [*(["model"] if task else []), *files, *said]
    arguments += [f"steps={request.steps}", f"seed={request.seed}"]
    module = "editing" if isinstance(task, Inpaint) else "tasks"
    first = ".picture()" if isinstance(task, Segment) else "[0]" if task is None or "hole" in files else ""
    return "\n".join(
        [
            *imports(files, samples),
            "from pipelines import LatentDiffusion",
            *([f"from pipelines.{module} import {task.kind}"] if task else []),
            "",
            f'model = LatentDiffusion.from_pretrained("{name}")',
            *(f"{key} = {read}" for key, read in files.items()),
            f"image = {task.kind if task else 'model'}({', '.join(arguments)}){first}",
            'image.save("drawn.png")',
        ]
    )


def words(request: Request, *, prompt: str, class_name: str, guidance: str) -> list[str]:
    """Arguments for what the first sample is told, under these names; the prompt by its place if it has none."""
    if not request.prompts:
        return []
    one = repr(request.prompts[0])
    said = [f"{prompt}={one}" if prompt else one]
    said += [f"{class_name}={request.classes[0]!r}"] if request.classes else []
    return [*said, f"{guidance}={request.guidance}"]


def given(name: str, request: Request, samples: Sequence[Sample]) -> dict[str, str]:
    """Code that opens what the first sample was made of, by variable; the reader's own files if none is shown."""
    if not request.given:
        return {}
    variables = ["picture", "hole"] if request.given[0].hole else ["picture"]
    if not samples:
        return {variable: f'Image.open("{variable}.png")' for variable in variables}
    reads = [f'Image.open(hf_hub_download("{name}", "{file}"))' for file in samples[0].given]
    return dict(zip(variables, reads, strict=True))


def imports(files: dict[str, str], samples: Sequence[Sample]) -> list[str]:
    """For what `given` says."""
    if not files:
        return []
    return [*(["from huggingface_hub import hf_hub_download"] if samples else []), "from PIL import Image"]
