"""A text encoder and its tokenizer from a folder that a stranger wrote.

Their classes come from the lists here and in `ldm.encoders`, never from a string in a file alone; no code in the
folder is run, and no file outside of it is opened.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from autoencoder.untrusted import (
    bounded,
    inside,
    read_header,
    read_json,
    require_finite,
    require_memory,
    weight_files,
)
from ldm import text_encoders, tokens
from ldm.encoders import Encoder, encoder_class, quietly

TOKENIZER_BYTES = 50_000_000  # of tokenizer.json
MAX_LENGTH = 4096  # tokens of a caption
ENCODERS = (
    *("clip", "clip_text_model", "t5", "distilbert", "bert", "roberta", "xlm-roberta", "mpnet", "electra"),
    *("deberta", "deberta-v2", "albert", "modernbert", "gemma", "gemma2", "gemma3_text", "qwen2", "qwen3"),
)
TOKENIZERS = {
    name + ending
    for name in ("CLIP", "T5", "DistilBert", "Bert", "Roberta", "XLMRoberta", "MPNet", "Electra", "Deberta")
    for ending in ("Tokenizer", "TokenizerFast")
} | {"PreTrainedTokenizerFast", "TokenizersBackend", "DebertaV2TokenizerFast", "AlbertTokenizerFast"}
TOKENIZERS |= {"GemmaTokenizerFast", "GemmaTokenizer", "Qwen2TokenizerFast", "Qwen2Tokenizer"}
RUNS = (
    "auto_map",
    "custom_pipelines",
    "quantization_config",
)  # keys that make readers import or run something


def load_encoder(model: Path, end: str) -> Encoder:
    """`text_encoder` and `tokenizer` of a stock folder; `end` is "" or "_2".

    Raises:
        ValueError: a class that is not on the list, code, links or names that lead out of the folder, tensors that
            are missing, unexpected, misshapen, not finite or too large, or a tokenizer that does not fit.
    """
    network = inside(model, f"text_encoder{end}")
    for path in sorted(network.iterdir()):
        inside(network, path.name)
    told = known(network / "config.json", "model_type", ENCODERS)
    if (network / "adapter_config.json").exists():
        raise ValueError(
            f"{network} has an adapter_config.json, which names weights elsewhere; it is not read."
        )
    files = weight_files(network, "model.safetensors")
    header = {name: size for file in files for name, size in read_header(file).items()}
    encoder: Any = text_encoders.fitting(told, header, str(network / "config.json"), projects=bool(end))
    if encoder is None:
        encoder = from_transformers(network, told, header, projects=bool(end))
    else:
        require_memory(sum(map(math.prod, header.values())), str(network))
        encoder.fill({name: tensor for file in files for name, tensor in load_file(file).items()})
    encoder.eval()
    require_finite(encoder.state_dict(), network)
    return Encoder(load_tokenizer(inside(model, f"tokenizer{end}"), encoder), encoder)


def from_transformers(
    network: Path, told: dict[str, Any], header: Mapping[str, tuple[int, ...]], *, projects: bool
) -> Any:
    """The encoder in a folder as `transformers` reads it; ValueError as for `load_encoder`."""
    from transformers import AutoConfig, AutoModel

    shape = AutoConfig.for_model(**told)
    made = encoder_class(shape, projects)
    with bounded(len(header), str(network / "config.json")):
        empty = made.from_config(shape) if made is AutoModel else made(made.config_class.from_dict(told))
    elements, held = sum(p.numel() for p in empty.parameters()), sum(map(math.prod, header.values()))
    if elements > 2 * held + 10_000_000:
        raise ValueError(
            f"{network}: config.json describes {elements:,} weights, but the files hold {held:,}."
        )
    require_memory(max(elements, held), str(network))
    try:
        with quietly():
            encoder, found = made.from_pretrained(
                network, use_safetensors=True, output_loading_info=True, local_files_only=True
            )
    except RuntimeError as problem:  # which names tensors of the wrong shape on lines of their own
        reason = " ".join(str(problem).split())[:300]
        raise ValueError(f"{network}: the weights do not fit config.json ({reason}).") from None
    require_complete(network, found)
    return encoder.float()


def load_tokenizer(folder: Path, encoder: Any) -> Any:
    """The tokenizer in a folder, if its words and lengths are those of the encoder; ValueError if they are not."""
    for path in sorted(folder.iterdir()):
        inside(folder, path.name)
        if path.suffix == ".json":
            read_json(path, TOKENIZER_BYTES)
    told = known(folder / "tokenizer_config.json", "tokenizer_class", TOKENIZERS)
    if elsewhere := [key for key, value in told.items() if key.endswith("_file") and value is not None]:
        raise ValueError(f"{folder}/tokenizer_config.json names a file in {elsewhere[0]}, which is not read.")
    length = told.get("model_max_length")
    if not isinstance(length, int) or not 1 <= length <= MAX_LENGTH:
        raise ValueError(f"{folder}: model_max_length is {length!r}, but must be from 1 to {MAX_LENGTH}.")
    try:
        tokenizer: Any = tokens.fitting(folder, told)
    except ValueError as problem:
        raise ValueError(f"{folder}: the tokenizer can't be read ({problem}).") from None
    if tokenizer is None:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    tokens.encodings(tokenizer, ["a"])  # if its parts do not fit each other, it fails now
    rows = encoder.get_input_embeddings().weight.shape[0]
    if (most := max(tokenizer.get_vocab().values(), default=0)) >= rows:
        raise ValueError(f"{folder} has words up to number {most:,}, but the text encoder only {rows:,}.")
    if (longest := getattr(encoder.config, "max_position_embeddings", length)) < length:
        raise ValueError(
            f"{folder}: model_max_length is {length}, but the text encoder reads at most {longest}."
        )
    return tokenizer


def known(path: Path, key: str, names: Collection[str]) -> dict[str, Any]:
    """A configuration whose `key` is one of `names`, and that has readers import or run nothing; else ValueError."""
    told = read_json(path)
    if told.get(key) not in names:
        raise ValueError(
            f"{path}: {key} is {told.get(key)!r:.80}, which is not on the list of those that are read."
        )
    if runs := [word for word in RUNS if told.get(word) is not None]:
        raise ValueError(f"{path} has {runs[0]}, by which readers run code; it is not read.")
    return told


def require_complete(folder: Path, found: dict[str, Any]) -> None:
    """ValueError that names tensors that are missing or that nobody knows."""
    harmless = {"missing_keys": "pooler", "unexpected_keys": "position_ids", "mismatched_keys": "\0"}
    for kind, word in harmless.items():
        if names := sorted(str(name) for name in found.get(kind, ()) if word not in str(name)):
            problem = kind.removesuffix("_keys")
            raise ValueError(
                f"{folder}: the weights do not fit config.json; {problem}: {', '.join(names[:3])}."
            )
