"""Models as stock diffusers folders.

A model of captions is a `StableDiffusionPipeline`, or a `StableDiffusionXLPipeline` if its encoders make one vector
of a caption besides the states; one that fills holes as captions say is a `StableDiffusionInpaintPipeline`. Models of
classes, of both, of nothing, or of another task consist of the same stock parts, listed in `model_index.json` with the
class names under `id2label`, as `DiTPipeline` keeps them, and the task under `task`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from autoencoder.files import require_replaceable, written_beside
from autoencoder.kl import AutoencoderKL
from autoencoder.store import weight_hash
from autoencoder.untrusted import inside, read_json
from ldm.conditioning import ClassLabels, Conditioner, Text, join, labels_of, text_of
from ldm.config import UserError
from ldm.encoders import quietly
from ldm.palette import palette
from ldm.prediction import make_prediction
from ldm.tasks import Inpaint, Segment, Task, from_json, to_json
from ldm.unet import UNet
from pipelines.schedulers import DIFFUSERS_VERSION, from_scheduler_config, scheduler_config
from pipelines.strangers import load_encoder

if TYPE_CHECKING:
    from pipelines.latent_diffusion import LatentDiffusion

INDEX = "model_index.json"
OURS = "LatentDiffusionPipeline"
TEXT, POOLED = "StableDiffusionPipeline", "StableDiffusionXLPipeline"
INPAINT = "StableDiffusionInpaintPipeline"
ZERO_NULL = "force_zeros_for_empty_prompt"  # of POOLED
FILES = ["model_index.json", "*/*.json", "*/*.safetensors", "*/*.txt", "*/*.model"]


def save(model: LatentDiffusion, folder: Path) -> None:
    """Write `model` to `folder`, taking the place of a model that was there only when all of it is written.

    Raises:
        FileExistsError: the folder holds something else.
    """
    require_replaceable(folder, INDEX)
    parts: dict[str, Any] = {
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    scheduler = scheduler_config(model.path, model.prediction.name, model.sampler, model.spacing)
    parts["scheduler"] = ["diffusers", scheduler["_class_name"]]
    with written_beside(folder) as fresh:
        model.unet.save_pretrained(fresh / "unet")
        model.autoencoder.save_pretrained(fresh / "vae")
        write_json(fresh / "scheduler" / "scheduler_config.json", scheduler)
        kind = kind_of(model)
        index: dict[str, Any] = {"_class_name": kind, "_diffusers_version": DIFFUSERS_VERSION}
        text, labels = text_of(model.conditioner), labels_of(model.conditioner)
        if text:
            parts |= _save_text(text, fresh, stock=kind != OURS)
        if model.task and kind != INPAINT:
            index["task"] = to_json(model.task)
            if isinstance(model.task, Segment):
                index["task"]["colors"] = palette(len(model.task.classes)).tolist()
        if labels:
            index["id2label"] = dict(enumerate(labels.classes))
        index["_autoencoder_sha256"] = weight_hash(model.autoencoder.state_dict())
        write_json(fresh / INDEX, index | parts)


def kind_of(model: LatentDiffusion) -> str:
    """The stock pipeline that draws exactly as the model does, or `OURS`."""
    text = text_of(model.conditioner)
    if text is None or labels_of(model.conditioner):
        return OURS
    if model.task is None:
        return POOLED if text.pools else TEXT
    return INPAINT if isinstance(model.task, Inpaint) and not text.pools else OURS


def _save_text(text: Text, fresh: Path, *, stock: bool) -> dict[str, Any]:
    """Encoders and tokenizers into their folders => their lines of the index, and of what a stock pipeline lacks."""
    lines: dict[str, Any] = {ZERO_NULL: text.zero_null} if text.pools else {}
    if stock:
        lacking = ["feature_extractor", "image_encoder"]
        lacking += ["text_encoder", "tokenizer"] if text.pools else ["safety_checker"]
        lines |= {name: [None, None] for name in lacking}
        lines |= {} if text.pools else {"requires_safety_checker": False}
    ends = ["", "_2"] if len(text.encoders) == 2 else ["_2" if text.pools else ""]
    for end, encoder, tokenizer in zip(ends, text.encoders, text.tokenizers, strict=True):
        with quietly():
            encoder.save_pretrained(fresh / f"text_encoder{end}")
        tokenizer.save_pretrained(fresh / f"tokenizer{end}")
        lines[f"text_encoder{end}"] = ["transformers", type(encoder).__name__]
        lines[f"tokenizer{end}"] = ["transformers", tokenizer_class(tokenizer)]
    return lines


def tokenizer_class(tokenizer: Any) -> str:
    """The name under which every transformers release has the tokenizer's class."""
    name = getattr(tokenizer, "stock_class", type(tokenizer).__name__)
    return "PreTrainedTokenizerFast" if name == "TokenizersBackend" else name


def load(model: str | Path) -> dict[str, Any]:
    """The parts of a `LatentDiffusion`, in float32 on the CPU.

    Args:
        model: a run folder, a stock folder, or the name of one on the hub.

    Raises:
        UserError: nothing there, or not a kind of model that is drawn with here.
        ValueError: a part that is not supported, or does not belong to the others.
    """
    folder = find(model)
    try:
        return _load(folder)
    except (UserError, ValueError, OSError, KeyboardInterrupt, SystemExit):
        raise
    except (
        BaseException
    ) as problem:  # whatever a damaged or hostile file leads to; a panic in Rust is no Exception
        reason = " ".join(str(problem).split())[:200]
        raise UserError(f"{folder} holds no sound model ({type(problem).__name__}: {reason}).") from problem


def _load(folder: Path) -> dict[str, Any]:
    index = read_json(folder / INDEX)
    kind = index.get("_class_name")
    if kind not in (OURS, TEXT, POOLED, INPAINT):
        raise UserError(
            f"{folder} holds a {kind}; this tool draws with {TEXT}, {POOLED}, {INPAINT} and {OURS} folders."
        )
    autoencoder = AutoencoderKL.from_pretrained(inside(folder, "vae"))
    made_for = index.get("_autoencoder_sha256")
    if made_for and made_for != weight_hash(autoencoder.state_dict()):
        raise UserError(f"The autoencoder in {folder}/vae is not the one that the U-Net was trained with.")
    path, prediction, sampler, spacing = from_scheduler_config(
        read_json(inside(folder, "scheduler") / "scheduler_config.json")
    )
    unet, conditioner = UNet.from_pretrained(inside(folder, "unet")), load_conditioner(folder, index)
    task = Inpaint() if kind == INPAINT else from_json(index["task"]) if index.get("task") else None
    require_fit(unet, autoencoder, conditioner, task, folder)
    return {
        "autoencoder": autoencoder,
        "unet": unet,
        "conditioner": conditioner,
        "path": path,
        "prediction": make_prediction(prediction, path),
        "sampler": sampler,
        "spacing": spacing,
        "task": task,
    }


def load_conditioner(folder: Path, index: dict[str, Any]) -> Conditioner:
    """Captions, classes, both or nothing, as `model_index.json` says."""
    ends = [end for end in ("", "_2") if (index.get(f"text_encoder{end}") or [None])[0]]
    encoders = [load_encoder(folder, end) for end in ends]
    text = Text(*encoders, frozen=True, zero_null=zero_null(index)).eval() if encoders else None
    names = index.get("id2label")
    return join(ClassLabels([str(names[str(i)]) for i in range(len(names))]) if names else None, text)


def require_fit(
    unet: UNet, autoencoder: AutoencoderKL, conditioner: Conditioner, task: Task | None, folder: Path
) -> None:
    """ValueError unless the U-Net reads what the others make."""
    with torch.no_grad():
        null = conditioner.null(1)
    reads, classes = unet.config.reads(), labels_of(conditioner)
    for name in ("tokens", "label", "pooled"):
        made, wanted = getattr(null, name), reads[name]
        if (made is None) != (wanted is None):
            told = "is told none" if made is None else "is told some"
            raise ValueError(f"{folder}: the U-Net does not fit the others: as to {name}, it {told}.")
        if made is not None and wanted and made.shape[-1] != wanted[-1]:
            raise ValueError(
                f"{folder}: {name} has {made.shape[-1]} channels, but the U-Net reads {wanted[-1]}."
            )
    if classes and (rows := unet.config.num_class_embeds) != len(classes.classes) + 1:
        raise ValueError(
            f"{folder}: id2label names {len(classes.classes)} classes, but the U-Net has {rows} embeddings, "
            "the null one included."
        )
    latent = autoencoder.config.latent_channels
    wanted_in = latent + (task.channels(autoencoder.config.factor, latent) if task else 0)
    if unet.config.in_channels != wanted_in:
        raise ValueError(
            f"{folder}: the U-Net reads {unet.config.in_channels} channels, but latents"
            f"{f' and what is given to {task.kind}' if task else ''} have {wanted_in}."
        )
    if unet.config.out_channels != autoencoder.config.latent_channels:
        raise ValueError(
            f"{folder}: the U-Net makes {unet.config.out_channels} channels, but the autoencoder has "
            f"{autoencoder.config.latent_channels}."
        )


def zero_null(index: dict[str, Any]) -> bool:
    """Whether nothing said is all zeros, not the empty caption: a stock default of `StableDiffusionXLPipeline`."""
    return bool(index.get(ZERO_NULL, index["_class_name"] == POOLED))


def find(model: str | Path) -> Path:
    """The local folder with `model_index.json` that a run folder, a stock folder or a hub name stands for."""
    folder = Path(model).expanduser()
    for candidate in (folder, folder / "model"):
        if (candidate / INDEX).is_file():
            return candidate
    if folder.exists():
        raise UserError(f"{folder} holds no model ({INDEX}); give a run folder whose training has saved one.")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(model), allow_patterns=FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as problem:
        reason = str(problem).strip().splitlines()[0]
        raise UserError(f"{model} is neither a folder here nor a model on the hub: {reason}") from None


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
