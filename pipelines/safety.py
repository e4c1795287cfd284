"""Looking at pictures before others do: a checker gives scores and a verdict, and every file says where it is from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from ldm.config import UserError

# https://cv.iptc.org/newscodes/digitalsourcetype/: made by a model that was trained on sampled content
SOURCE_TYPE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
ORIGIN = {"software": "ldm", "digital_source_type": SOURCE_TYPE}


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a checker says of one picture."""

    flagged: bool
    """Whether the picture should be withheld"""
    scores: dict[str, float]
    """By concept: above 0 is too near to it"""


class SafetyChecker(Protocol):
    """Looks at pictures; `name` says which checker it is, for model cards."""

    name: str

    def __call__(self, images: Sequence[Image.Image]) -> list[Verdict]: ...


class ClipSafetyChecker:
    """The checker of Stable Diffusion: a CLIP image embedding, compared with embeddings of unwanted concepts.

    A picture near one of three concepts that ask for special care is held to stricter thresholds for the other 17.
    The concepts have numbers instead of names, as in the published weights.
    """

    def __init__(self, network: Any, weights: dict[str, Tensor], name: str) -> None:
        self.network, self.weights, self.name = network.eval(), weights, name

    @classmethod
    def from_pretrained(cls, source: str | Path) -> ClipSafetyChecker:
        """Read a stock `safety_checker` folder, here or on the hub, from safetensors only.

        Raises:
            UserError: it is not there, or is not such a checker.
        """
        from safetensors.torch import load_file
        from transformers import CLIPConfig, CLIPVisionConfig, CLIPVisionModelWithProjection

        folder = Path(source).expanduser()
        if not folder.is_dir():
            folder = _downloaded(str(source))
        try:
            config = CLIPConfig.from_pretrained(folder)
            assert isinstance(config.vision_config, CLIPVisionConfig)
            vision = CLIPVisionConfig(
                **config.vision_config.to_dict() | {"projection_dim": config.projection_dim}
            )
            weights = load_file(folder / "model.safetensors")
            own = {key: weights.pop(key) for key in [*weights] if "embeds" in key and "." not in key}
            network = CLIPVisionModelWithProjection(vision)
            # The published file has vision_model.vision_model.*, as it was written by a module around the model.
            named = {
                key.replace("vision_model.vision_model.", "vision_model."): v for key, v in weights.items()
            }
            named = {key: value for key, value in named.items() if not key.endswith("position_ids")}
            network.load_state_dict(named)
            wanted = ("concept_embeds", "special_care_embeds")
            if any(key not in own or f"{key}_weights" not in own for key in wanted):
                raise ValueError("the embeddings of the concepts are missing")
        except Exception as problem:  # transformers and safetensors have many for a damaged file
            reason = " ".join(str(problem).split())[:200]
            raise UserError(f"{source} is no safety checker in safetensors: {reason}") from None
        return cls(network, own, folder.name if folder == Path(source).expanduser() else str(source))

    @torch.no_grad()
    def __call__(self, images: Sequence[Image.Image]) -> list[Verdict]:
        embeds = torch.cat([self.network(pixels[None]).image_embeds for pixels in map(self.prepare, images)])
        special = self._over(embeds, "special_care_embeds")
        stricter = 0.01 * (special > 0).any(1, keepdim=True)
        concepts = self._over(embeds, "concept_embeds") + stricter
        # A score that is no number flags too.
        return [
            Verdict(flagged=not bool((row <= 0).all()), scores={str(i): float(x) for i, x in enumerate(row)})
            for row in concepts
        ]

    def _over(self, embeds: Tensor, concepts: str) -> Tensor:
        """[N,D] => [N, concepts], similarity above the threshold, to three places as the stock checker rounds it."""
        near = F.normalize(embeds) @ F.normalize(self.weights[concepts].float()).T
        return ((near - self.weights[f"{concepts}_weights"].float()) * 1000).round() / 1000

    def prepare(self, image: Image.Image) -> Tensor:
        """A picture as CLIP sees it: [3,S,S], shorter side to S, centre cropped, its mean and deviation removed."""
        from torchvision.transforms import v2

        side = self.network.config.image_size
        steps = v2.Compose(
            [
                v2.PILToTensor(),
                v2.Resize(side, v2.InterpolationMode.BICUBIC, antialias=True),
                v2.CenterCrop(side),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
            ]
        )
        return steps(image.convert("RGB"))


def withheld(
    images: Sequence[Image.Image], checker: SafetyChecker
) -> tuple[list[Image.Image], list[Verdict]]:
    """The pictures with a black one in the place of each that the checker flags, and what it said of all.

    Raises:
        UserError: the checker did not judge every picture, so that none is given out.
    """
    verdicts = checker(images)
    if len(verdicts) != len(images):
        raise UserError(
            f"The checker {checker.name} judged {len(verdicts)} of {len(images)} pictures, so all are withheld."
        )
    shown = [
        Image.new("RGB", image.size) if verdict.flagged else image
        for image, verdict in zip(images, verdicts, strict=True)
    ]
    return shown, verdicts


def _downloaded(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=["config.json", "model.safetensors"]))
    except (OSError, ValueError) as problem:
        reason = str(problem).strip().splitlines()[0]
        raise UserError(f"{name} is neither a folder here nor a model on the hub: {reason}") from None


def provenance(**about: object) -> PngInfo:
    """Notes for a PNG file: that a model made it, and what `about` says."""
    note = PngInfo()
    for key, value in (ORIGIN | about).items():
        note.add_itxt(key, str(value))
    return note
