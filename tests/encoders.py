"""Text encoders as they are published, but tiny and with random weights, and models that are told by them."""

import string
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from autoencoder.kl import AutoencoderConfig, AutoencoderKL
from ldm.conditioning import ConditioningConfig, make_conditioner
from ldm.encoders import TextConfig
from ldm.paths import VP
from ldm.prediction import make_prediction
from pipelines import LatentDiffusion
from tests.support import tiny_unet

CAPTIONS = ["a red circle", "a blue square", "a red square on a green background", "many words " * 20]
WIDTH, PROJECTED = 16, 12
LETTERS = string.ascii_lowercase


def clip_tokenizer() -> PreTrainedTokenizerBase:
    """Spells words out, apart from "red"; as SDXL's second one, it pads with another token than the end."""
    vocab = ["!", *LETTERS, *(f"{letter}</w>" for letter in LETTERS), "re", "red</w>"]
    vocab += ["<|startoftext|>", "<|endoftext|>"]
    numbers = {entry: i for i, entry in enumerate(vocab)}
    return transformers.CLIPTokenizer(vocab=numbers, merges=[("r", "e"), ("re", "d</w>")], pad_token="!")


def t5_tokenizer() -> PreTrainedTokenizerBase:
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), ("red", -1.0)]
    return transformers.T5Tokenizer(vocab=vocab + [(letter, -3.0) for letter in LETTERS], extra_ids=0)


def bert_tokenizer() -> PreTrainedTokenizerBase:
    vocab = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        "red",
        *LETTERS,
        *(f"##{letter}" for letter in LETTERS),
    ]
    return transformers.BertTokenizer(vocab={entry: i for i, entry in enumerate(vocab)})


def clip_config(tokenizer: PreTrainedTokenizerBase, layers: int) -> transformers.CLIPTextConfig:
    return transformers.CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=2,
        projection_dim=PROJECTED,
        max_position_embeddings=77,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def publish(kind: str, folder: Path) -> Path:
    """A folder with config, weights and tokenizer of a clip, projection (of clip), t5 or bert."""
    torch.manual_seed(len(kind))
    tokenizer = {"t5": t5_tokenizer, "bert": bert_tokenizer}.get(kind, clip_tokenizer)()
    if kind == "clip":
        model = transformers.CLIPTextModel(clip_config(tokenizer, 2))
    elif kind == "projection":
        model = transformers.CLIPTextModelWithProjection(clip_config(tokenizer, 3))
    elif kind == "t5":
        model = transformers.T5EncoderModel(
            transformers.T5Config(
                vocab_size=len(tokenizer), d_model=WIDTH, d_kv=8, d_ff=24, num_layers=2, num_heads=2
            )
        )
    else:
        model = transformers.BertModel(
            transformers.BertConfig(
                vocab_size=len(tokenizer),
                hidden_size=WIDTH,
                intermediate_size=24,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=77,
            )
        )
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.2 * torch.randn_like(weight)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    assert type(AutoTokenizer.from_pretrained(folder)) is type(tokenizer)
    return folder


ENCODERS = {
    "clip": ("clip",),
    "t5": ("t5",),
    "bert": ("bert",),
    "projection alone": ("projection",),
    "pair": ("clip", "projection"),
}


def config(encoders: dict[str, Path], name: str, weights: str = "pretrained", **more: Any) -> TextConfig:
    keys = zip(("encoder", "encoder_2"), ENCODERS[name], strict=False)
    named: Any = {key: str(encoders[kind]) for key, kind in keys}
    return TextConfig(**named, weights=weights, max_length=12, **more)


def conditioner(text: TextConfig, kind: Any = "text") -> Any:
    torch.manual_seed(0)
    return make_conditioner(ConditioningConfig(kind=kind, text=text), CAPTIONS, ("plum", "lime")).eval()


def model_of(conditioner: Any, **network: Any) -> LatentDiffusion:
    """A tiny model with random weights that is told this."""
    torch.manual_seed(1)
    autoencoder = AutoencoderKL(
        AutoencoderConfig(
            block_out_channels=(8, 16), norm_num_groups=4, latent_channels=4, scaling_factor=1.0
        )
    ).eval()
    cond = conditioner.null(1)
    if cond.pooled is not None:
        network |= {"addition_embed_type": "text_time", "addition_time_embed_dim": 8}
        network["projection_class_embeddings_input_dim"] = cond.pooled.shape[-1] + 48
    unet = tiny_unet(sample_size=8, cross_attention_dim=cond.tokens.shape[-1], **network)
    path = VP()
    return LatentDiffusion(
        autoencoder=autoencoder,
        unet=unet,
        conditioner=conditioner,
        path=path,
        prediction=make_prediction("epsilon", path),
    )
