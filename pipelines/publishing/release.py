"""What may leave the machine: an allowlist of files, written anew, and searched for what is nobody's business."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from ldm.config import UserError
from pipelines.publishing.upload import MANIFEST, entry, manifest_text

SHARD = "5GB"  # files above this are split
WEIGHTS = r"(diffusion_pytorch_model|model)(\.fp16)?(-\d{5}-of-\d{5})?\.safetensors"
SHARDS = r"(diffusion_pytorch_model|model)\.safetensors\.index(\.fp16)?\.json"
WORDS = (
    "tokenizer.json|tokenizer_config.json|special_tokens_map.json|added_tokens.json|"
    "vocab.json|vocab.txt|merges.txt|spiece.model|sentencepiece.bpe.model"
)
ALLOWED = re.compile(
    rf"README\.md|LICENSE|model_index\.json|pipeline\.py|{re.escape(MANIFEST)}|samples/\d{{2}}(-given|-hole)?\.png"
    rf"|(unet|vae|text_encoder|text_encoder_2)/(config\.json|{WEIGHTS}|{SHARDS})"
    rf"|scheduler/scheduler_config\.json|(tokenizer|tokenizer_2)/({WORDS})"
)

KEYS = (
    r"pass(?:word|wd|phrase)|(?:client[_-]?)?secret|(?:secret|api|access|account|private)[_-]?key(?:[_-]?id)?"
    r"|(?:auth|access|refresh|api|bot)[_-]?token"
)
SECRETS = {  # what it looks like -> what it is
    r"hf_[A-Za-z0-9]{16,}": "a Hugging Face token",
    r"gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}": "a GitHub token",
    r"glpat-[\w-]{16,}": "a GitLab token",
    r"\bsk-[A-Za-z0-9_-]{20,}": "an API key",
    r"\b[sr]k_(?:live|test)_[A-Za-z0-9]{10,}": "a Stripe key",
    r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b": "an AWS key",
    r"\bAIza[\w-]{30,}|\bya29\.[\w-]{20,}|\bGOCSPX-[\w-]{20,}": "a Google key",
    r"\bxox[abeoprs]-[\w-]{10,}|hooks\.slack\.com/services/\w+": "a Slack token",
    r"discord(?:app)?\.com/api/webhooks/\d+": "a Discord webhook",
    r"\b\d{8,10}:AA[\w-]{30,}": "a Telegram bot token",
    r"\bSG\.[\w-]{16,}\.[\w-]{16,}": "a SendGrid key",
    r"\bSK[0-9a-f]{32}\b": "a Twilio key",
    r"\bnpm_[A-Za-z0-9]{30,}|\bpypi-[\w-]{16,}|\bdop_v1_[0-9a-f]{30,}|\bnvapi-[\w-]{20,}": "a registry or cloud token",
    r"\br8_[A-Za-z0-9]{30,}|\bgsk_[A-Za-z0-9]{30,}|\bwandb_v1_\w{20,}": "an API key",
    r"\beyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]{8,}": "a signed web token (JWT)",
    r"-----BEGIN [A-Z ]*PRIVATE KEY|PuTTY-User-Key-File|AGE-SECRET-KEY-1\w+": "a private key",
    r"\b[a-z][a-z0-9+.-]*://[^\s/:@\"']+:[^\s/@\"']+@": "an address with a password",
    r"\bBearer\s+[\w.~+/-]{16,}|\bBasic\s+[A-Za-z0-9+/]{16,}=*": "an authorization header",
    r"\bmachine\s+\S+\s+login\s+\S+": "a line of a .netrc",
    rf"(?i)(?<![a-z])(?:{KEYS})[\"']?\s*[:=]\s*[\"']?"
    r"(?!\d+\s*[,}\n])(?!null|true|false)[^\s\"',}]{6,}": "a password or key",
}
PATHS = (
    r"(?<![\w.:/])/(?:home|Users|root|mnt|media|workspace|work|data|scratch|tmp|var/folders"
    r"|Volumes|content|kaggle|opt|srv|nfs)/[\w.-]+"
    r"|\b[A-Za-z]:\\\\?Users\\"
)
RANDOM = re.compile(r"[A-Za-z0-9]{24,}")


def write_release(stock: Path, folder: Path, *, half: bool, shard: str = SHARD) -> list[str]:
    """From the stock folder that a model was saved to, `folder` with what is published of it; says what was left out.

    Configurations are copied, weights written anew with no notes in them: float32, and float16 beside it if `half`.
    """
    left = []
    for path in sorted(stock.rglob("*")):
        name = path.relative_to(stock).as_posix()
        if path.is_symlink():
            raise UserError(f"{path} is a link; a published folder may have none.")
        if path.is_file() and not ALLOWED.fullmatch(name):
            left.append(name)
        elif path.is_file() and not re.search(r"\.safetensors", name):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(path.read_bytes())
    for part in sorted({path.parent for path in stock.glob("*/*.safetensors")}):
        files = [
            path
            for path in sorted(part.glob("*.safetensors"))
            if ALLOWED.fullmatch(f"{part.name}/{path.name}")
        ]
        tensors = {key: value for path in files for key, value in load_file(path).items()}
        stem = files[0].stem.partition("-")[0]
        write_weights(tensors, folder / part.name, stem, "", shard)
        if half:
            halved = {k: v.half() if v.is_floating_point() else v for k, v in tensors.items()}
            write_weights(halved, folder / part.name, stem, "fp16", shard)
    return left


def write_weights(
    tensors: dict[str, torch.Tensor], folder: Path, stem: str, variant: str, shard: str
) -> None:
    """One safetensors file, or shards with an index, as stock tools name them."""
    name = f"{stem}.{variant}" if variant else stem
    save_torch_state_dict(
        tensors,
        folder,
        filename_pattern=name + "{suffix}.safetensors",
        max_shard_size=shard,
        metadata={"format": "pt"},
    )
    index = folder / f"{name}.safetensors.index.json"
    if variant and index.exists():  # stock tools have the variant's name at the end here
        index.replace(folder / f"{stem}.safetensors.index.{variant}.json")


def listed(folder: Path) -> dict[str, dict[str, Any]]:
    """Every file of a release with its hash and size; UserError if one is not on the allowlist or a link."""
    files = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            raise UserError(f"{path} is a link; a published folder may have none.")
        if path.is_dir() or name == MANIFEST:
            continue
        if not ALLOWED.fullmatch(name):
            raise UserError(f"{path} is no file of a published model; remove it from there.")
        files[name] = entry(path)
    (folder / MANIFEST).write_text(manifest_text(files), encoding="utf-8")
    return files


def search_secrets(folder: Path, private: dict[str, str]) -> None:
    """UserError with the place and kind, never the value, of the first thing that must not be published.

    Args:
        private: strings that may occur nowhere, such as the token itself -> what each is.
    """
    hashes = set(re.findall(r"\b[0-9a-f]{64}\b", _own_hashes(folder)))
    for path in sorted(folder.rglob("*")):
        if path.is_dir():
            continue
        name = path.relative_to(folder)
        for text in texts(path):
            found = next((kind for value, kind in private.items() if value in text), None)
            found = found or next((kind for like, kind in SECRETS.items() if re.search(like, text)), None)
            found = found or ("a path of this machine" if re.search(PATHS, text) else None)
            words = (word for word in RANDOM.findall(text) if word not in hashes)
            found = found or ("what looks like a random key" if any(map(random_word, words)) else None)
            if found:
                raise UserError(
                    f"{name} holds {found}, so nothing was published; take it out of the run's captions, class names, "
                    "tokenizer, configuration or description, and publish again."
                )


def _own_hashes(folder: Path) -> str:
    index = json.loads((folder / "model_index.json").read_text()).get("_autoencoder_sha256", "")
    card, manifest = folder / "README.md", folder / MANIFEST
    return f"{index} {card.read_text() if card.exists() else ''} {manifest.read_text() if manifest.exists() else ''}"


def texts(path: Path) -> Iterator[str]:
    """What can be read in a file: text files whole, of weights the header, of pictures the notes."""
    yield path.name
    if path.suffix == ".safetensors":
        with path.open("rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            yield file.read(size).decode(errors="replace")
        with safe_open(path, "pt") as opened:
            if opened.metadata() not in ({"format": "pt"}, None):
                raise UserError(f"{path} has notes in its header; it was not written here.")
    elif path.suffix == ".png":
        with Image.open(path) as image:
            image.load()
            yield "\n".join(f"{key}: {value}" for key, value in image.info.items())
    else:
        yield path.read_text(encoding="utf-8", errors="replace")


def random_word(word: str) -> bool:
    """Whether letters and digits alternate as in a key; in names of layers and files they rarely do."""
    return sum(a.isdigit() != b.isdigit() for a, b in pairwise(word)) >= 5
