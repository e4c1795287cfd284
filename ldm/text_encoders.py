"""The text models of CLIP (Radford et al. 2021) and DistilBERT (Sanh et al. 2019) to draw with, under stock names.

To import those of `transformers` takes longer than to draw a picture. `fitting` says what is read by the networks
here; everything else, and all training of encoders, is left to `transformers`. There is no dropout.

B captions of L tokens, states of D numbers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoencoder.files import write_tensors
from autoencoder.store import filled
from autoencoder.untrusted import bounded

TEXT_MODEL = "text_model."
"""Before the names of CLIP's weights in older files, and beside a projection"""


def quick_gelu(x: Tensor) -> Tensor:
    """CLIP's approximation."""
    return x * torch.sigmoid(1.702 * x)


GELU: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "quick_gelu": quick_gelu}
SHARED: dict[str, Any] = {"model_type": "", "transformers_version": "", "dtype": "", "torch_dtype": ""}
SHARED |= {"use_attention_mask": False, "tie_word_embeddings": True, "initializer_range": 0.02}
SHARED |= {"dropout": 0.0, "attention_dropout": 0.0, "bos_token_id": None, "eos_token_id": None}
BERT: dict[str, Any] = {"vocab_size": 30522, "max_position_embeddings": 512, "dim": 768, "hidden_dim": 3072}
BERT |= {"n_layers": 6, "n_heads": 12, "activation": "gelu", "pad_token_id": 0, "sinusoidal_pos_embds": False}
BERT |= {"qa_dropout": 0.1, "seq_classif_dropout": 0.2}
CLIP: dict[str, Any] = {"vocab_size": 49408, "max_position_embeddings": 77, "hidden_size": 512}
CLIP |= {"intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 8, "projection_dim": 512}
CLIP |= {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "pad_token_id": 1, "eos_token_id": 49407}
CLIP |= {"initializer_factor": 1.0}
USUAL = {"distilbert": SHARED | BERT, "clip_text_model": SHARED | CLIP}
"""By `model_type`, the stock defaults of all settings that are read here, or change nothing of what is said"""


class States(NamedTuple):
    """What an encoder says, under the names of `transformers`."""

    last_hidden_state: Tensor  # [B,L,D]
    hidden_states: tuple[Tensor, ...] = ()  # [B,L,D] into each layer, and out of the last one; if asked for
    text_embeds: Tensor | None = None  # [B,P] with a projection


class TextEncoder(nn.Module):
    """A text encoder as its config.json describes it, `told`; `config` has the defaults besides.

    `prefix` is what the names of its weights begin with in its file.
    """

    def __init__(self, told: Mapping[str, Any], prefix: str = "") -> None:
        super().__init__()
        self.told = {key: value for key, value in told.items() if not key.startswith("_")}  # those are notes
        self.prefix = prefix
        self.config = SimpleNamespace(**USUAL[told["model_type"]] | self.told)

    def fill(self, weights: Mapping[str, Tensor]) -> None:
        """Give the network, which was built on the meta device, the weights of its file."""
        filled(self, {name.removeprefix(self.prefix): tensor for name, tensor in weights.items()})

    def get_input_embeddings(self) -> nn.Module:
        """Of the tokens."""
        return next(part for part in self.modules() if isinstance(part, nn.Embedding))

    def save_pretrained(self, folder: Path) -> None:
        """Write config.json and model.safetensors as they were read, but for the type of the weights."""
        folder.mkdir(parents=True, exist_ok=True)
        weights = {self.prefix + name: one.cpu().contiguous() for name, one in self.state_dict().items()}
        write_tensors(folder / "model.safetensors", weights, {"format": "pt"})
        told = self.told | {"dtype": str(next(self.parameters()).dtype).removeprefix("torch.")}
        told.pop("torch_dtype", None)  # its older name
        (folder / "config.json").write_text(json.dumps(told, indent=2, sort_keys=True) + "\n")


class DistilBertModel(TextEncoder):
    """Each token attends to all that `attention_mask` leaves of the caption."""

    def __init__(self, told: Mapping[str, Any], prefix: str = "") -> None:
        super().__init__(told, prefix)
        c = self.config
        self.embeddings = nn.ModuleDict()
        self.embeddings["word_embeddings"] = nn.Embedding(c.vocab_size, c.dim)
        self.embeddings["position_embeddings"] = nn.Embedding(c.max_position_embeddings, c.dim)
        self.embeddings["LayerNorm"] = nn.LayerNorm(c.dim, eps=1e-12)
        layers = nn.ModuleList(DistilBertLayer(c) for _ in range(c.n_layers))
        self.transformer = nn.ModuleDict({"layer": layers})

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, output_hidden_states: bool = False
    ) -> States:
        """[B,L] int64 numbers of tokens, and 1 for each that is attended to."""
        words, places, norm = self.embeddings.values()
        x = norm(words(input_ids) + places(torch.arange(input_ids.shape[1], device=input_ids.device)))
        mask = None if attention_mask is None else attention_mask.bool()[:, None, None]
        states = through(self.transformer["layer"], x, mask)
        return States(states[-1], states if output_hidden_states else ())


class DistilBertLayer(nn.Module):
    """Attention, then two linear layers; what each makes is added to what it read, and normalised."""

    def __init__(self, c: SimpleNamespace) -> None:
        super().__init__()
        self.heads, self.activation = c.n_heads, GELU[c.activation]
        self.attention = linear(**dict.fromkeys(("q_lin", "k_lin", "v_lin", "out_lin"), (c.dim, c.dim)))
        self.sa_layer_norm = nn.LayerNorm(c.dim, eps=1e-12)
        self.ffn = linear(lin1=(c.dim, c.hidden_dim), lin2=(c.hidden_dim, c.dim))
        self.output_layer_norm = nn.LayerNorm(c.dim, eps=1e-12)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v, out = self.attention.values()
        x = self.sa_layer_norm(out(attended(q(x), k(x), v(x), self.heads, mask)) + x)
        up, down = self.ffn.values()
        return self.output_layer_norm(down(self.activation(up(x))) + x)


class CLIPTextModel(TextEncoder):
    """Each token attends to itself and those before it, as far as `attention_mask` leaves them."""

    def __init__(self, told: Mapping[str, Any], prefix: str = "") -> None:
        super().__init__(told, prefix)
        c = self.config
        self.embeddings = nn.ModuleDict()
        self.embeddings["token_embedding"] = nn.Embedding(c.vocab_size, c.hidden_size)
        self.embeddings["position_embedding"] = nn.Embedding(c.max_position_embeddings, c.hidden_size)
        layers = nn.ModuleList(CLIPLayer(c) for _ in range(c.num_hidden_layers))
        self.encoder = nn.ModuleDict({"layers": layers})
        self.final_layer_norm = nn.LayerNorm(c.hidden_size, eps=c.layer_norm_eps)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, output_hidden_states: bool = False
    ) -> States:
        """[B,L] int64 numbers of tokens, and 1 for each that is attended to."""
        words, places = self.embeddings.values()
        x = words(input_ids) + places(torch.arange(input_ids.shape[1], device=input_ids.device))
        mask = None
        if attention_mask is not None:
            before = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
            mask = before & attention_mask.bool()[:, None, None]
        states = through(self.encoder["layers"], x, mask)
        return States(self.final_layer_norm(states[-1]), states if output_hidden_states else ())


class CLIPLayer(nn.Module):
    """Attention, then two linear layers; each reads states that are normalised, and adds to them as they were."""

    def __init__(self, c: SimpleNamespace) -> None:
        super().__init__()
        width, inner = c.hidden_size, c.intermediate_size
        self.heads, self.activation = c.num_attention_heads, GELU[c.hidden_act]
        self.self_attn = linear(**dict.fromkeys(("q_proj", "k_proj", "v_proj", "out_proj"), (width, width)))
        self.layer_norm1 = nn.LayerNorm(width, eps=c.layer_norm_eps)
        self.mlp = linear(fc1=(width, inner), fc2=(inner, width))
        self.layer_norm2 = nn.LayerNorm(width, eps=c.layer_norm_eps)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        (q, k, v, out), normed = self.self_attn.values(), self.layer_norm1(x)
        x = x + out(attended(q(normed), k(normed), v(normed), self.heads, mask, causal=mask is None))
        up, down = self.mlp.values()
        return x + down(self.activation(up(self.layer_norm2(x))))


class CLIPTextModelWithProjection(TextEncoder):
    """CLIP's text model, and one vector of each caption: its states at the token that ends it, projected."""

    def __init__(self, told: Mapping[str, Any], prefix: str = "") -> None:
        super().__init__(told, prefix)
        self.text_model = CLIPTextModel(told)
        self.text_projection = nn.Linear(self.config.hidden_size, self.config.projection_dim, bias=False)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, output_hidden_states: bool = False
    ) -> States:
        """[B,L] int64 numbers of tokens, and 1 for each that is attended to."""
        said = self.text_model(input_ids, attention_mask, output_hidden_states)
        end = self.config.eos_token_id
        # the first published configurations say 2 where the end is in truth the largest number
        last = input_ids.argmax(-1) if end == 2 else (input_ids == end).int().argmax(-1)
        pooled = said.last_hidden_state[torch.arange(len(last), device=last.device), last]
        return said._replace(text_embeds=self.text_projection(pooled))


def linear(**sizes: tuple[int, int]) -> nn.ModuleDict:
    return nn.ModuleDict({name: nn.Linear(*size) for name, size in sizes.items()})


def through(layers: Any, x: Tensor, mask: Tensor | None) -> tuple[Tensor, ...]:
    """[B,L,D] => what goes into each layer, and what comes out of the last one."""
    states = [x]
    for layer in layers:
        states.append(layer(states[-1], mask))
    return tuple(states)


def attended(
    q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None, causal: bool = False
) -> Tensor:
    """Attention of [B,L,D] in so many heads; the mask is True where it may look."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal).transpose(1, 2).flatten(2)


KINDS: dict[str, tuple[type[TextEncoder], ...]] = {
    "distilbert": (DistilBertModel,),
    "clip_text_model": (CLIPTextModel, CLIPTextModelWithProjection),
}


def fitting(
    told: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], where: str, *, projects: bool
) -> TextEncoder | None:
    """The encoder in a folder, on the meta device; None if it is not in every respect one of those here.

    Args:
        told: its config.json, of which every setting must be known.
        shapes: of the tensors in its file, which must be those of the network, and no others.
        where: names the config.json in errors.
        projects: whether it must have a projection; without, it may have one.

    Raises:
        ValueError: it describes many more tensors than the file has.
    """
    kind = told["model_type"]
    made = next((one for one in KINDS.get(kind, ()) if told.get("architectures") == [one.__name__]), None)
    if made is None or (projects and made is not CLIPTextModelWithProjection):
        return None
    if not understood(told, USUAL[kind]):
        return None
    names = {name: shape for name, shape in shapes.items() if "position_ids" not in name}  # 0, 1, 2 ...
    prefixed = made is CLIPTextModel and all(name.startswith(TEXT_MODEL) for name in names)
    with bounded(len(names), where):
        network = made(told, TEXT_MODEL if prefixed else "")
    own = {network.prefix + name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    return network if own == names else None


def understood(told: Mapping[str, Any], usual: Mapping[str, Any]) -> bool:
    """Whether all settings are known, of the type of the usual ones, and go together."""
    settings = {key: value for key, value in told.items() if key != "architectures" and key[:1] != "_"}
    if not all(key in usual and alike(value, usual[key]) for key, value in settings.items()):
        return False
    said = {**usual, **settings}
    numbers = {key: value for key, value in said.items() if type(value) is int}
    tokens = [numbers.pop(key) for key in [*numbers] if key.endswith("_token_id")]
    width = said["dim"] if "dim" in said else said["hidden_size"]
    heads = said["n_heads"] if "n_heads" in said else said["num_attention_heads"]
    fits = min(numbers.values()) >= 1 and width % heads == 0
    return fits and all(0 <= token < said["vocab_size"] for token in tokens)


def alike(value: Any, usual: Any) -> bool:
    """Whether a setting is of the type of the usual one, and if that is an activation, one that is known."""
    if usual is None or isinstance(usual, float):
        return type(value) is int or type(value) is type(usual)
    return type(value) is type(usual) and (usual not in GELU or value in GELU)
