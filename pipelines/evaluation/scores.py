"""Figures that each picture has of its own: likeness to an original, to a caption, and what a scene shows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from autoencoder.metrics import SMALLEST_FOR_SSIM, psnr, ssim
from autoencoder.perceptual import SMALLEST, Perceptual, PerceptualConfig, cached_file, fetching
from autoencoder.store import weight_hash
from ldm.config import UserError
from ldm.scenes_check import satisfied
from pipelines.evaluation.extractors import first_line, where_on_the_hub
from pipelines.evaluation.generation import images_of

ATTRIBUTES = ("all", "colour", "shape", "size", "place", "relation", "background")
"""Of what a scene's caption says; of place and relation a caption has one"""


class Clip:
    """CLIP score (Hessel et al. 2021), 100 times the cosine of picture and caption, by torchmetrics.

    Raises:
        UserError: the model can't be had.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        from torchmetrics.multimodal.clip_score import CLIPScore
        from transformers import CLIPModel, CLIPProcessor

        try:
            model = CLIPModel.from_pretrained(name, use_safetensors=True)
            processor: Any = CLIPProcessor.from_pretrained(name)
        except (OSError, ValueError) as problem:
            raise UserError(
                f"The CLIP model {name} can't be had ({first_line(problem)}): name a folder with its config, "
                f"tokenizer and model.safetensors, or {where_on_the_hub(name)}, or leave out --clip."
            ) from None
        self.device = device
        parts: Any = (_Plain(model), processor)
        self.metric = CLIPScore(lambda: parts, sync_on_compute=False).to(device)
        self.stamp = {"name": name, "weights_sha256": weight_hash(model.state_dict())}

    @torch.no_grad()
    def __call__(self, pixels: Tensor, captions: Sequence[str]) -> Tensor:
        """uint8 [B,3,H,W] and their captions => [B]."""
        scores = []
        for picture, caption in zip(pixels.to(self.device), captions, strict=True):
            self.metric.reset()
            self.metric.update(picture, caption)
            scores.append(self.metric.compute().float().cpu())
        return torch.stack(scores)


class _Plain(nn.Module):
    """A CLIP model whose features are tensors, as torchmetrics 1.9 takes them; transformers 5 wraps them."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.config = model, model.config

    def get_image_features(self, pixels: Tensor) -> Tensor:
        return _tensor(self.model.get_image_features(pixel_values=pixels))

    def get_text_features(self, tokens: Tensor, mask: Tensor) -> Tensor:
        return _tensor(self.model.get_text_features(input_ids=tokens, attention_mask=mask))


def _tensor(features: Any) -> Tensor:
    return features if isinstance(features, Tensor) else features.pooler_output


def perceptual(config: PerceptualConfig, side: int, device: torch.device) -> tuple[Perceptual | None, str]:
    """LPIPS, or None and why not; UserError if weights that were named are not there."""
    if side < SMALLEST[config.network]:
        return (
            None,
            f"LPIPS of {config.network} needs {SMALLEST[config.network]} pixels, and the pictures have {side}",
        )
    try:
        return Perceptual(config, device), ""
    except FileNotFoundError:
        if config.weights:
            raise UserError(f"--lpips-weights is {config.weights}, but there is no such file.") from None
        return (
            None,
            f"LPIPS needs {cached_file(config.network)}, which {fetching(config.network)} fetches where there is "
            "internet; or name a safetensors file with --lpips-weights",
        )


def likeness(made: Tensor, originals: Tensor, lpips: Perceptual | None) -> dict[str, Tensor]:
    """Of pictures [B,3,H,W] in [-1, 1]: psnr in dB, 100 at most; ssim, unless they are too small; lpips, if given.

    [B] each.
    """
    found = {
        "psnr": psnr(made, originals).clamp(max=100)
    }  # or one equal picture would make the mean infinite
    if min(made.shape[-2:]) >= SMALLEST_FOR_SSIM:
        found["ssim"] = ssim(made, originals)
    if lpips:
        found["lpips"] = lpips(made, originals)
    return {name: values.detach().cpu() for name, values in found.items()}


def of_scenes(pixels: Tensor, captions: Sequence[str]) -> Tensor:
    """Whether pictures uint8 [B,3,S,S] show their captions, [B,7] 1 or 0 for each of ATTRIBUTES; NaN: not said."""
    rows = []
    for image, caption in zip(images_of(pixels), captions, strict=True):
        holds = satisfied(image, caption)
        rows.append([float(holds[name]) if name in holds else torch.nan for name in ATTRIBUTES])
    return torch.tensor(rows)
