"""Stock folders: what is read, what is refused and by which name, and that no save is ever half done."""

import json
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from autoencoder import files
from autoencoder.kl import AutoencoderConfig, AutoencoderKL
from autoencoder.store import CONFIG, INDEX, WEIGHTS, find_folder, weight_hash

CONFIG_KEYS = {"block_out_channels": (8, 16), "norm_num_groups": 4}


@pytest.fixture
def model() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(AutoencoderConfig(**CONFIG_KEYS)).eval()


@pytest.fixture
def folder(model: AutoencoderKL, tmp_path: Path) -> Path:
    model.save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"


def edit_config(folder: Path, **keys: object) -> None:
    content = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(content | keys))


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (
            {"speed": "high", "a": 1},
            "this AutoencoderKL has settings that are not supported: a = 1, speed = 'high'",
        ),
        ({"act_fn": "relu"}, "not supported: act_fn = 'relu' .only 'silu'."),
        (
            {"down_block_types": ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"]},
            "not supported: down_block_types = .*Attn",
        ),
        ({"_class_name": "VQModel"}, "describes VQModel, but AutoencoderKL is wanted"),
        ({"latent_channels": 0}, "config.json: latent_channels = 0 must be at least 1"),
        ({"latent_channels": "four"}, "config.json: "),
    ],
)
def test_unsupported_config_is_refused_by_name(folder: Path, keys: dict, words: str) -> None:
    edit_config(folder, **keys)
    with pytest.raises(ValueError, match=words):
        AutoencoderKL.from_pretrained(folder)


def test_private_keys_are_notes(folder: Path, model: AutoencoderKL) -> None:
    edit_config(folder, _diffusers_version="0.6.0", _name_or_path="somewhere")
    assert AutoencoderKL.from_pretrained(folder).config == model.config


def test_what_is_no_model_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="There is no folder '/nowhere/vae'"):
        AutoencoderKL.from_pretrained("/nowhere/vae")
    (folder / WEIGHTS).write_bytes(b"damaged")
    with pytest.raises(ValueError, match="not a sound safetensors file"):
        AutoencoderKL.from_pretrained(folder)
    (folder / WEIGHTS).unlink()
    (folder / "diffusion_pytorch_model.bin").write_bytes(b"a pickle")
    with pytest.raises(FileNotFoundError, match=f"has no {WEIGHTS}"):
        AutoencoderKL.from_pretrained(folder)
    (folder / CONFIG).write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        AutoencoderKL.from_pretrained(folder)
    (folder / CONFIG).write_text("[]")
    with pytest.raises(ValueError, match="must hold a JSON object, not list"):
        AutoencoderKL.from_pretrained(folder)
    (folder / CONFIG).unlink()
    with pytest.raises(FileNotFoundError, match=f"has no {CONFIG}"):
        AutoencoderKL.from_pretrained(folder)


def test_unfit_weights_are_refused_by_name(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    for change, words in (
        ({"encoder.conv_in.bias": None}, "missing: encoder.conv_in.bias"),
        ({"loss.discriminator": torch.zeros(1)}, "unexpected: loss.discriminator"),
        ({"quant_conv.bias": torch.zeros(3)}, r"of the wrong shape: quant_conv.bias \[3\] instead of \[8\]"),
        (dict.fromkeys(list(weights)[:5]), "missing: .*, .*, .* and 2 more"),
    ):
        changed = {name: tensor for name, tensor in (weights | change).items() if tensor is not None}
        save_file(changed, folder / WEIGHTS)
        with pytest.raises(ValueError, match=words):
            AutoencoderKL.from_pretrained(folder)


def test_names_of_old_attention_weights_are_read(folder: Path, model: AutoencoderKL) -> None:
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    weights = load_file(folder / WEIGHTS)
    for new, name in old.items():
        weights = {key.replace(f".{new}.", f".{name}."): tensor for key, tensor in weights.items()}
    assert "encoder.mid_block.attentions.0.proj_attn.bias" in weights
    save_file(weights, folder / WEIGHTS)
    read = AutoencoderKL.from_pretrained(folder).state_dict()
    assert all(torch.equal(read[name], tensor) for name, tensor in model.state_dict().items())


def test_shards_are_read(model: AutoencoderKL, folder: Path, tmp_path: Path) -> None:
    diffusers.AutoencoderKL.from_pretrained(folder).save_pretrained(
        tmp_path / "shards", max_shard_size="20KB"
    )
    assert (tmp_path / "shards" / INDEX).exists()
    assert weight_hash(AutoencoderKL.from_pretrained(tmp_path / "shards").state_dict()) == weight_hash(folder)


def test_a_loaded_network_is_ready_to_use(folder: Path, model: AutoencoderKL) -> None:
    loaded = AutoencoderKL.from_pretrained(folder)
    assert not loaded.training
    assert all(weight.requires_grad for weight in loaded.parameters())
    x = torch.randn(1, 3, 8, 8)
    assert torch.equal(loaded(x)[0], model(x)[0])


@pytest.mark.parametrize(
    "error", [OSError("No space left on device"), SafetensorError("No space left on device")]
)
def test_a_failed_save_leaves_the_old_one(
    folder: Path, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(tensors: dict, path: Path, metadata: dict) -> None:
        path.write_bytes(b"the first half")
        raise error

    monkeypatch.setattr(files, "save_file", full)
    other = AutoencoderKL(AutoencoderConfig(**CONFIG_KEYS, latent_channels=2))
    with pytest.raises(OSError, match=r"vae: this AutoencoderKL could not be saved .*No space left"):
        other.save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_save_replaces_the_old_one_and_nothing_else(folder: Path) -> None:
    (folder / "README.md").write_text("mine")
    other = AutoencoderKL(AutoencoderConfig(**CONFIG_KEYS, latent_channels=2))
    other.save_pretrained(folder)
    assert AutoencoderKL.from_pretrained(folder).config == other.config
    assert {path.name for path in folder.iterdir()} == {CONFIG, WEIGHTS, "README.md"}
    assert (folder / WEIGHTS).stat().st_mode == (folder / CONFIG).stat().st_mode, (
        "who may read one may read all"
    )


def test_memory_format_does_not_reach_the_file(folder: Path, model: AutoencoderKL) -> None:
    before = (folder / WEIGHTS).read_bytes()
    model.to(memory_format=torch.channels_last).save_pretrained(folder)
    assert (folder / WEIGHTS).read_bytes() == before


def test_hub_names_download_only_what_is_needed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(repository: str, allow_patterns: list[str]) -> str:
        asked.append((repository, allow_patterns[0]))
        return str(folder.parent)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert find_folder("some-body/model.1") == folder.parent
    assert find_folder("some-body/model.1/vae") == folder
    assert asked == [("some-body/model.1", "config.json"), ("some-body/model.1", "vae/config.json")]


def test_an_unknown_hub_name_is_refused_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> str:
        raise FileNotFoundError("no such name\nand much more")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(FileNotFoundError) as caught:
        AutoencoderKL.from_pretrained("nobody/nothing")
    assert str(caught.value) == (
        "'nobody/nothing' is neither a folder here nor a model on the Hugging Face hub (no such name)."
    )


def test_weight_hash_is_of_the_values(folder: Path, model: AutoencoderKL) -> None:
    weights = model.state_dict()
    identity = weight_hash(weights)
    assert len(identity) == 64
    assert weight_hash(folder) == identity
    assert weight_hash(dict(reversed(weights.items()))) == identity
    assert weight_hash(model.to(memory_format=torch.channels_last).state_dict()) == identity

    name = "quant_conv.bias"
    nudged = weights[name].clone()
    nudged[0] = torch.nextafter(nudged[0], torch.tensor(9.0))
    for change in ({name: nudged}, {name: weights[name].reshape(2, 4)}, {"other": weights[name]}):
        assert weight_hash(weights | change) != identity


def test_weight_hash_of_a_half_precision_file_is_that_of_the_model_read_from_it(folder: Path) -> None:
    full = weight_hash(folder)
    AutoencoderKL.from_pretrained(folder).half().save_pretrained(folder)
    loaded = AutoencoderKL.from_pretrained(folder)
    assert loaded.dtype == torch.float32
    assert weight_hash(folder) == weight_hash(loaded.state_dict()) != full
