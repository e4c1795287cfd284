"""What stage 1 leaves behind: an autoencoder, and the data that it was trained on."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
import yaml

from autoencoder.kl import AutoencoderKL
from autoencoder.latents import LatentStatistics, fold
from autoencoder.store import find_folder
from ldm.config import UserError, parser_for
from ldm.data import DataConfig


def autoencoder_folder(name: str) -> Path:
    """Where the autoencoder lies of a run of either stage, a stock pipeline or a stock folder, here or on the hub.

    Raises UserError if there is none in the folder `name`, FileNotFoundError if nothing is called `name`.
    """
    folder = Path(name).expanduser()
    places = [folder / part for part in ("", "model", "vae", "model/vae")]
    inner = next((place for place in places if (place / "config.json").is_file()), None)
    if inner is None and folder.is_dir():
        raise UserError(
            f"{name} holds no finished autoencoder; train one with train_vae.py --run.out {name}, "
            "or name another."
        )
    return inner or find_folder(name)


def open_autoencoder(name: str) -> AutoencoderKL:
    """The one in `autoencoder_folder`.

    A stock shift_factor is folded in, as `autoencoder.latents` says: stock pipelines of a U-Net ignore it.
    """
    autoencoder = AutoencoderKL.from_pretrained(autoencoder_folder(name))
    config = autoencoder.config
    if config.latents_mean or config.latents_std:
        raise UserError(f"{name} has latents_mean and latents_std, which stock pipelines of a U-Net ignore.")
    if config.shift_factor:  # which they ignore too
        autoencoder = fold(
            autoencoder, known(config.latent_channels, config.shift_factor, config.scaling_factor)
        )
    return autoencoder.requires_grad_(False)


def known(channels: int, shift: float, scale: float) -> LatentStatistics:
    """The statistics that a stock config's shift_factor and scaling_factor stand for."""
    statistics = LatentStatistics(channels)
    number, mean, deviation = 1.0, shift, 1 / scale
    statistics.sums[:] = torch.tensor([number, mean, mean**2, deviation**2])[:, None]
    return statistics


@dataclass(frozen=True, kw_only=True)
class _Recipe:
    data: DataConfig = field(default_factory=DataConfig)


def data_of(name: str) -> DataConfig | None:
    """What a run was trained on, as its config.yaml says; None for anything but a run."""
    recipe = Path(name).expanduser() / "config.yaml"
    if not recipe.is_file():
        return None
    try:
        said = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        raise UserError(f"{recipe} is no YAML; give the folder of a training run.") from None
    if not isinstance(said, dict) or "data" not in said:
        raise UserError(f"{recipe} says nothing of data; name the pictures with --data.")
    parser = parser_for(_Recipe, str(recipe))
    return parser.instantiate(parser.parse_object({"data": said["data"]})).data


def data_at(path: str | None, name: str) -> DataConfig:
    """The pictures at `path`, by default those that the run `name` was trained on, brought to size as it does.

    Of pictures at another place than its own the run does not say columns, scenes or how they are streamed.
    """
    trained = data_of(name)
    if trained is None:
        return DataConfig() if path is None else DataConfig(path=path)
    if path is None or path == trained.path:
        return trained
    return DataConfig(
        path=path, size=trained.size, background=trained.background, max_megapixels=trained.max_megapixels
    )
