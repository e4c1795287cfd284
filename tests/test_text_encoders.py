"""Text encoders and tokenizers that are drawn with without `transformers`, against it; and what is left to it."""

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from ldm import text_encoders
from ldm.conditioning import Text
from ldm.encoders import Encoder, TextConfig, encoder_class, small
from ldm.tokens import Tokenizer, encodings
from pipelines.strangers import load_encoder
from tests.encoders import CAPTIONS, clip_config, clip_tokenizer
from tests.support import ran

ODD = [
    "",
    " ",
    "Red RED\n\tréd",
    "naïve 日本語 🦊",
    "[PAD] [UNK] [SEP]x",
    "<|endoftext|> red <|startoftext|>",
]
ODD += ["don't it's 12,5!", "a" * 300, "e\u0301 ﬁ \u200b \x00", "zebra", "red " * 11]
KINDS = {
    "small": {},
    "clip": {},
    "clip, the exact GELU": {"hidden_act": "gelu"},
    "projection": {},
    "projection, the end told as at first": {"eos_token_id": 2},
}


def published(folder: Path, kind: str, settings: dict[str, Any], length: int = 12) -> Path:
    """`text_encoder` and `tokenizer` of a stock folder, with random weights; those of a projection end in _2."""
    torch.manual_seed(0)
    end = "_2" if "projection" in kind else ""
    if kind == "small":
        config = TextConfig(width=16, layers=2, heads=2, max_length=length)
        tokenizer, model = small(config, [*CAPTIONS[:2], "Réd zebra's, 12"])
    else:
        tokenizer = clip_tokenizer()
        tokenizer.model_max_length = length
        made = transformers.CLIPTextModelWithProjection if end else transformers.CLIPTextModel
        config = clip_config(tokenizer, 3)
        for key, value in settings.items():
            setattr(config, key, value)
        model = made(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.2 * torch.randn_like(weight)
    model.save_pretrained(folder / f"text_encoder{end}")
    tokenizer.save_pretrained(folder / f"tokenizer{end}")
    return folder


def edit(file: Path, **keys: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | keys, indent=2, sort_keys=True) + "\n")


def stock(folder: Path, end: str) -> Encoder:
    network = folder / f"text_encoder{end}"
    made = encoder_class(transformers.AutoConfig.from_pretrained(network))
    tokenizer = AutoTokenizer.from_pretrained(folder / f"tokenizer{end}")
    return Encoder(tokenizer, made.from_pretrained(network).float().eval())


def is_ours(encoder: Encoder) -> tuple[bool, bool]:
    """Whether the tokenizer is, and the network."""
    return isinstance(encoder.tokenizer, Tokenizer), type(encoder.model).__module__ == text_encoders.__name__


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_and_states_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    folder, end = published(tmp_path, kind, KINDS[kind]), "_2" if "projection" in kind else ""
    ours, theirs = load_encoder(folder, end), stock(folder, end)
    assert is_ours(ours) == (True, True) and is_ours(theirs) == (False, False)
    assert type(ours.model).__name__ == type(theirs.model).__name__
    captions = [*CAPTIONS, *ODD]
    for one, other in zip(*(encodings(e.tokenizer, captions) for e in (ours, theirs)), strict=True):
        for name in ("ids", "attention_mask", "offsets", "word_ids", "special_tokens_mask"):
            assert getattr(one, name) == getattr(other, name)
        assert [rest.ids for rest in one.overflowing] == [rest.ids for rest in other.overflowing]
    assert ours.tokenizer.get_vocab() == theirs.tokenizer.get_vocab()
    assert ours.tokenizer.unk_token_id == theirs.tokenizer.unk_token_id
    texts = [Text(encoder, frozen=True).eval() for encoder in (ours, theirs)]
    assert texts[0].vocabulary_hash() == texts[1].vocabulary_hash()
    long = sum(len(ids) > 12 for ids in stock(folder, end).tokenizer(captions).input_ids)
    assert [text.cut(captions) for text in texts] == [long, long] and 0 < long < len(captions)
    read = texts[0].read(captions)
    assert all(torch.equal(value, texts[1].read(captions)[name]) for name, value in read.items())
    for masked in (False, True):
        for text in texts:
            text.encoder.config.use_attention_mask = masked
        said, wanted = (text.encode(read) for text in texts)
        for name, value in wanted.items():
            torch.testing.assert_close(said[name], value, rtol=1e-5, atol=1e-5)
            assert value.std() > 0.1
    with torch.no_grad():
        mask = {"attention_mask": read["attend"], "output_hidden_states": True}
        said, wanted = (encoder.model(read["ids"], **mask) for encoder in (ours, theirs))
    for one, other in zip(said.hidden_states, wanted.hidden_states, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert said.text_embeds is None or torch.allclose(said.text_embeds, wanted.text_embeds, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_is_what_was_loaded(kind: str, tmp_path: Path) -> None:
    folder, end = published(tmp_path, kind, KINDS[kind]), "_2" if "projection" in kind else ""
    loaded = load_encoder(folder, end)
    text = pickle.loads(pickle.dumps(copy.deepcopy(Text(loaded, frozen=True))))
    text.read(CAPTIONS)
    text.encoder.save_pretrained(tmp_path / "again" / f"text_encoder{end}")
    text.tokenizers[0].save_pretrained(tmp_path / "again" / f"tokenizer{end}")
    for file in (path for path in tmp_path.glob("t*/*") if path.suffix == ".json"):
        assert file.read_bytes() == (tmp_path / "again" / file.relative_to(tmp_path)).read_bytes()
    before, after = (
        load_file(f / f"text_encoder{end}/model.safetensors") for f in (folder, folder / "again")
    )
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


def test_older_files_of_clip_are_read_and_written_with_their_names(tmp_path: Path) -> None:
    folder = published(tmp_path, "clip", {})
    wanted, file = stock(folder, "").model.state_dict(), folder / "text_encoder" / "model.safetensors"
    older = {f"text_model.{name}": tensor.half() for name, tensor in load_file(file).items()}
    save_file(older | {"text_model.embeddings.position_ids": torch.arange(77)[None]}, file, {"format": "pt"})
    edit(folder / "text_encoder" / "config.json", torch_dtype="float16", _name_or_path="/home/someone/clip")
    loaded = load_encoder(folder, "").model
    assert is_ours(Encoder(None, loaded))[1] and loaded.state_dict().keys() == wanted.keys()
    assert all(
        torch.equal(tensor, wanted[name].half().float()) for name, tensor in loaded.state_dict().items()
    )
    loaded.save_pretrained(tmp_path / "again")
    told = json.loads((tmp_path / "again" / "config.json").read_text())
    assert told["dtype"] == "float32" and not {"torch_dtype", "_name_or_path"} & told.keys()
    assert load_file(tmp_path / "again" / "model.safetensors").keys() == older.keys()


def settings(part: str, **keys: Any) -> Callable[[Path], object]:
    name = {"text_encoder": "config.json", "tokenizer": "tokenizer_config.json"}[part]
    return lambda folder: edit(folder / part / name, **keys)


def words(**keys: Any) -> Callable[[Path], object]:
    return lambda folder: edit(folder / "tokenizer" / "tokenizer.json", **keys)


def other_parts(folder: Path) -> None:
    """What CLIP's class does not take from the file, and what it does."""
    file = folder / "tokenizer" / "tokenizer.json"
    content = json.loads(file.read_text())
    content["normalizer"]["normalizers"].pop()
    file.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("kind", "change", "ours"),
    [
        ("small", settings("text_encoder", activation="relu"), (True, False)),
        ("small", settings("text_encoder", chunk_size_feed_forward=4), (True, False)),
        ("small", settings("text_encoder", architectures=["DistilBertForMaskedLM"]), (True, False)),
        ("small", settings("text_encoder", dropout=0.1, _name_or_path="x"), (True, True)),
        ("clip", settings("text_encoder", hidden_act="gelu_new"), (True, False)),
        ("small", settings("tokenizer", padding_side="left"), (False, True)),
        ("small", settings("tokenizer", add_bos_token=True), (False, True)),
        ("small", settings("tokenizer", unk_token=None), (False, True)),
        ("small", settings("tokenizer", stride=0, max_length=5, is_local=True), (True, True)),
        ("small", words(post_processor=None), (False, True)),
        (
            "small",
            lambda folder: (folder / "tokenizer" / "added_tokens.json").write_text("{}"),
            (False, True),
        ),
        ("clip", other_parts, (False, True)),
    ],
)
def test_what_is_not_known_here_is_left_to_transformers(
    kind: str, change: Callable[[Path], object], ours: tuple[bool, bool], tmp_path: Path
) -> None:
    folder = published(tmp_path, kind, {})
    change(folder)
    loaded, wanted = load_encoder(folder, ""), stock(folder, "")
    assert is_ours(loaded) == ours
    texts = [Text(encoder, frozen=True).eval() for encoder in (loaded, wanted)]
    read, theirs = (text.read([*CAPTIONS, *ODD]) for text in texts)
    assert all(torch.equal(read[name], value) for name, value in theirs.items())
    torch.testing.assert_close(*(text.encode(read)["tokens"] for text in texts), rtol=1e-5, atol=1e-5)


def test_drawing_loads_only_what_it_needs(chain: Path, tmp_path: Path) -> None:
    heavy = ("transformers", "torchvision", "huggingface_hub", "datasets", "accelerate", "sympy", "scipy")
    heavy += ("torch._dynamo", "torch.distributed.tensor", "ldm.data", "ldm.training", "matplotlib")
    command = ["generate", str(chain / "ldm"), "red", "--steps", "1", "--out", str(tmp_path)]
    say = f"main({command}); print([name for name in {heavy} if name in sys.modules])"
    assert "[]" in ran("-c", f"import sys; from pipelines.cli import main; {say}").splitlines()
