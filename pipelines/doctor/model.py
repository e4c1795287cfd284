"""`ldm doctor model`: what a model is, and whether it is sound, before it is shown to anyone."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

from PIL import Image
from torch import nn

from ldm.conditioning import ClassAndText, labels_of, text_of
from ldm.config import UserError
from ldm.pictures import to_images
from ldm.tasks import spoiled
from pipelines.latent_diffusion import LatentDiffusion
from pipelines.publishing.gate import HALF, scan_half
from pipelines.schedulers import scheduler_config
from pipelines.tasks import made


def doctor_model(where: str, prompt: str | None = None) -> None:
    """Print what the model consists of, which stock classes open it, and whether half precision is safe.

    Args:
        prompt: what is drawn to see the activations; by default the first class, or the empty caption.

    Raises:
        UserError: the model is not sound: its weights, or what they make, are not finite.
    """
    model = LatentDiffusion.from_pretrained(where)
    for name, value in described(model).items():
        print(f"{name + ':':<16}{value}")
    scan, _ = scan_half(model, partial(drawn, prompt=prompt))
    print(f"{'largest value:':<16}{scan.largest:.3g} in {scan.where}")
    if not math.isfinite(scan.largest):
        raise UserError(f"{where} is not sound: what comes out of {scan.where} is not finite.")
    print(f"{'float16:':<16}{'safe' if scan.safe else f'not safe, it ends at {HALF:,.0f}; use bfloat16'}")


def described(model: LatentDiffusion) -> dict[str, str]:
    """What a model consists of, line by line."""
    channels, height, width = model.latent_shape(None)
    factor = model.autoencoder.config.factor
    about = {
        "pictures": f"{width * factor}x{height * factor} pixels, latents {channels}x{height}x{width}",
        "U-Net": weights(model.unet),
        "autoencoder": weights(model.autoencoder),
    }
    if text := text_of(model.conditioner):
        names = " and ".join(type(encoder).__name__ for encoder in text.encoders)
        about["captions"] = f"up to {text.max_length} tokens, {names}, {weights(text)}"
    if labels := labels_of(model.conditioner):
        about["classes"] = f"{len(labels.classes)}: {', '.join(labels.classes[:5])} ..."
    scheduler = scheduler_config(model.path, model.prediction.name, model.sampler, model.spacing)
    if model.task:
        about["task"] = model.task.kind
    return about | {
        "path": str(model.path),
        "prediction": model.prediction.name,
        "sampler": f"{model.sampler}, in stock diffusers {scheduler['_class_name']}",
    }


def weights(network: nn.Module) -> str:
    return f"{sum(p.numel() for p in network.parameters()):,} weights"


def drawn(model: LatentDiffusion, prompt: str | None) -> list[Image.Image]:
    """A picture; of a model whose task begins with one, what it makes of a grey one."""
    say = told(model, prompt)
    if model.task is None:
        return model(**say, progress=True)
    _, height, width = (side * model.autoencoder.config.factor for side in model.latent_shape(None))
    given = spoiled(model.task, [Image.new("RGB", (width, height), "grey")], 0, [0])
    return to_images(made(model, given, model.read(say.get("prompts"), 1, say.get("classes")), [0]))


def told(model: LatentDiffusion, prompt: str | None) -> dict[str, Any]:
    """Arguments to draw one picture with."""
    labels = labels_of(model.conditioner)
    if isinstance(model.conditioner, ClassAndText) and labels:
        return {"prompts": prompt or "", "classes": labels.classes[0]}
    if text_of(model.conditioner):
        return {"prompts": prompt or ""}
    return {"prompts": prompt or labels.classes[0]} if labels else {}
