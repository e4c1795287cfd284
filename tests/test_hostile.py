"""Folders that strangers wrote: each is refused in a sentence, quickly, and nothing outside of it is read."""

import json
import os
import resource
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipelines import LatentDiffusion
from tests.hostile import REFUSALS, fuzz

UNET, VAE, TEXT = (
    "unet/diffusion_pytorch_model.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
    "text_encoder/model.safetensors",
)


@pytest.fixture
def model(chain: Path, tmp_path: Path) -> Path:
    shutil.copytree(chain / "ldm" / "model", tmp_path / "model")
    return tmp_path / "model"


def edit(folder: Path, name: str, **keys: object) -> None:
    content = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(content | keys))


def tensors(folder: Path, name: str, change: Callable[[dict], object]) -> None:
    weights = load_file(folder / name)
    change(weights)
    save_file(weights, folder / name, metadata={"format": "pt"})


def first(weights: dict) -> str:
    return min(weights)


def put(value: torch.Tensor | None, name: str | None = None) -> Callable[[dict], object]:
    """Replace a tensor, or remove it."""

    def change(weights: dict) -> None:
        key = name or first(weights)
        if value is None:
            del weights[key]
        else:
            weights[key] = value if value.dim() else weights[key] * value

    return change


def header_of(size: int) -> Callable[[Path], object]:
    return lambda m: (m / UNET).write_bytes(struct.pack("<Q", size) + b"{" + b" " * 100)


def many_tensors(m: Path) -> None:
    names = {f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(60_000)}
    header = json.dumps(names).encode()
    (m / UNET).write_bytes(struct.pack("<Q", len(header)) + header)


def link(name: str, target: str) -> Callable[[Path], object]:
    def change(m: Path) -> None:
        path = m / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        path.symlink_to(target)

    return change


def moved_out(m: Path) -> None:
    """A whole part is a link to a place outside."""
    (m / "unet").rename(m.parent / "elsewhere")
    (m / "unet").symlink_to(m.parent / "elsewhere")


def shards(name: str) -> Callable[[Path], object]:
    def change(m: Path) -> None:
        (m / UNET).unlink()
        (m / f"{UNET}.index.json").write_text(json.dumps({"weight_map": {"conv_in.weight": name}}))

    return change


def pickled(m: Path) -> None:
    (m / UNET).rename(m / "unet" / "diffusion_pytorch_model.bin")


def panicking(m: Path) -> None:
    """A template names a token that is none, at which the library written in Rust panics: no `Exception`."""
    template = json.loads((m / "tokenizer/tokenizer.json").read_text())["post_processor"]
    edit(m, "tokenizer/tokenizer.json", post_processor=template | {"special_tokens": {}})


def fifo(m: Path) -> None:
    (m / UNET).unlink()
    os.mkfifo(m / UNET)


HOSTILE: dict[str, tuple[Callable[[Path], object], str]] = {
    "pipeline class from a string": (
        lambda m: edit(m, "model_index.json", _class_name="os.system"),
        "holds a os.system",
    ),
    "encoder class from a string": (
        lambda m: edit(m, "text_encoder/config.json", model_type="evil"),
        "not on the list",
    ),
    "tokenizer class from a string": (
        lambda m: edit(m, "tokenizer/tokenizer_config.json", tokenizer_class="EvilTokenizer"),
        "not on the list",
    ),
    "remote code of an encoder": (
        lambda m: edit(m, "text_encoder/config.json", auto_map={"AutoModel": "evil.Model"}),
        "by which readers run code",
    ),
    "remote code of a tokenizer": (
        lambda m: edit(m, "tokenizer/tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.T", None]}),
        "by which readers run code",
    ),
    "vocabulary elsewhere": (
        lambda m: edit(m, "tokenizer/tokenizer_config.json", vocab_file="/etc/passwd"),
        "names a file in vocab_file",
    ),
    "template of unknown tokens": (panicking, "no entry found for key"),
    "adapter elsewhere": (
        lambda m: (m / "text_encoder/adapter_config.json").write_text("{}"),
        "adapter_config.json",
    ),
    "pickled weights": (pickled, "other weight formats are not read"),
    "shards above": (shards("../../secret.safetensors"), "names files that are no shards"),
    "shards elsewhere": (shards("/etc/passwd"), "names files that are no shards"),
    "weights are a link": (link(UNET, "/etc/passwd"), "leads out of that folder"),
    "config is a link": (link("unet/config.json", "/etc/passwd"), "leads out of that folder"),
    "a part is a link": (moved_out, "leads out of that folder"),
    "tokenizer is a link": (link("tokenizer/tokenizer.json", "/etc/passwd"), "leads out of that folder"),
    "weights never end": (fifo, "neither a file nor a folder"),
    "missing tensor": (lambda m: tensors(m, UNET, put(None, "conv_in.weight")), "missing: conv_in.weight"),
    "unexpected tensor": (lambda m: tensors(m, VAE, put(torch.zeros(1), "evil")), "unexpected: evil"),
    "misshapen tensor": (
        lambda m: tensors(m, UNET, put(torch.zeros(3), "conv_in.bias")),
        "wrong shape: conv_in.bias",
    ),
    "NaN": (
        lambda m: tensors(m, UNET, put(torch.tensor(float("nan")), "conv_in.bias")),
        "conv_in.bias holds values",
    ),
    "infinity": (lambda m: tensors(m, VAE, put(torch.tensor(float("inf")))), "not finite"),
    "missing word vectors": (
        lambda m: tensors(m, TEXT, put(None, "embeddings.word_embeddings.weight")),
        "missing: embeddings.word_embeddings.weight",
    ),
    "unexpected tensor of text": (
        lambda m: tensors(m, TEXT, put(torch.zeros(1), "evil")),
        "unexpected: evil",
    ),
    "NaN in text": (lambda m: tensors(m, TEXT, put(torch.tensor(float("nan")))), "not finite"),
    "misshapen tensor of text": (
        lambda m: tensors(m, TEXT, put(torch.zeros(3, 3), "embeddings.word_embeddings.weight")),
        "do not fit",
    ),
    "network of a million layers": (
        lambda m: edit(m, "unet/config.json", layers_per_block=10**6),
        "more than",
    ),
    "huge network": (lambda m: edit(m, "unet/config.json", block_out_channels=[2**19, 2**18]), "wrong shape"),
    "endless network": (lambda m: edit(m, "unet/config.json", layers_per_block=10**9), "numbers above"),
    "huge vocabulary": (lambda m: edit(m, "text_encoder/config.json", vocab_size=10**12), "describes"),
    "endless encoder": (lambda m: edit(m, "text_encoder/config.json", n_layers=10**9), "more than"),
    "endless captions": (
        lambda m: edit(m, "tokenizer/tokenizer_config.json", model_max_length=10**12),
        "model_max_length",
    ),
    "endless schedule": (
        lambda m: edit(m, "scheduler/scheduler_config.json", num_train_timesteps=10**12),
        "num_train_timesteps",
    ),
    "header too long": (header_of(2**40), "not a sound safetensors file"),
    "header longer than the file": (header_of(10_000), "not a sound safetensors file"),
    "too many tensors": (many_tensors, "at most 50,000"),
    "long config": (lambda m: (m / "unet/config.json").write_text(" " * 2_000_000), "at most 1,000,000"),
    "deep config": (lambda m: (m / "unet/config.json").write_text("[" * 100_000), "not JSON"),
    "number that is none": (
        lambda m: (m / "vae/config.json").write_text('{"scaling_factor": NaN}'),
        "not finite",
    ),
    "number too large": (
        lambda m: (m / "vae/config.json").write_text('{"scaling_factor": 1e999}'),
        "not finite",
    ),
    "an index that is a list": (
        lambda m: (m / "model_index.json").write_text("[]"),
        "must hold a JSON object",
    ),
    "parts that do not fit": (lambda m: edit(m, "unet/config.json", cross_attention_dim=4096), "wrong shape"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_folders_are_refused_in_a_sentence(model: Path, name: str) -> None:
    change, words = HOSTILE[name]
    change(model)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(REFUSALS, match=words) as refused:
        LatentDiffusion.from_pretrained(model)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) / 1024 < 200
    assert "\n" not in str(refused.value).strip() and len(str(refused.value)) < 1000


def test_links_within_the_hubs_cache_are_followed(model: Path, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "cache/snapshots/abc", tmp_path / "cache/blobs"
    shutil.copytree(model, snapshot)
    blobs.mkdir()
    for i, path in enumerate(sorted(p for p in snapshot.rglob("*") if p.is_file())):
        path.rename(blobs / str(i))
        path.symlink_to(blobs / str(i))
    LatentDiffusion.from_pretrained(snapshot)


def test_mutated_folders_load_or_are_refused(chain: Path) -> None:
    found = fuzz(chain / "ldm" / "model", 150)
    assert not found["outside"]
    assert set(found["outcomes"]) <= {"loaded", "refused"}, found
    assert found["outcomes"]["refused"] > 50
