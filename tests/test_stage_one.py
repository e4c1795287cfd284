"""A stock autoencoder becomes one that needs no factors."""

from pathlib import Path

import pytest
import torch

from autoencoder.kl import AutoencoderConfig, AutoencoderKL
from autoencoder.vq import VQConfig, VQModel
from ldm.config import UserError
from pipelines.stages.stage_one import autoencoder_folder, open_autoencoder


def test_a_stock_shift_is_folded_in(tmp_path: Path) -> None:
    torch.manual_seed(0)
    shape = {"block_out_channels": (8, 8), "norm_num_groups": 4, "latent_channels": 3}
    factors = {"shift_factor": 0.3, "scaling_factor": 1.5}
    config = AutoencoderConfig(**shape, **factors, use_quant_conv=False, use_post_quant_conv=False)
    stock = AutoencoderKL(config)
    stock.save_pretrained(tmp_path)
    ours = open_autoencoder(str(tmp_path))
    assert ours.config.scaling_factor == 1 and not ours.config.shift_factor
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    theirs = stock.encode(x)
    assert torch.allclose(ours.encode(x).mean, (theirs.mean - 0.3) * 1.5, atol=1e-5)
    assert torch.allclose(ours.encode(x).std, theirs.std * 1.5, atol=1e-5)
    assert torch.allclose(ours.decode(ours.encode(x).mean), stock.decode(theirs.mean), atol=1e-5)
    assert not any(p.requires_grad for p in ours.parameters())


def test_a_stock_scale_alone_stays_as_it_is(tmp_path: Path) -> None:
    config = AutoencoderConfig(block_out_channels=(8,), norm_num_groups=4, scaling_factor=0.2)
    AutoencoderKL(config).save_pretrained(tmp_path)
    assert open_autoencoder(str(tmp_path)).config.scaling_factor == pytest.approx(0.2)


def test_a_codebook_is_refused_in_a_sentence(tmp_path: Path) -> None:
    VQModel(VQConfig(block_out_channels=(8,), norm_num_groups=4)).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match="VQModel, but AutoencoderKL is wanted: give a folder that holds a saved"
    ):
        open_autoencoder(str(tmp_path))


@pytest.mark.parametrize("place", ["", "model", "vae", "model/vae"])
def test_it_is_found_in_a_stock_folder_a_pipeline_and_a_run_of_either_stage(
    place: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="holds no finished autoencoder"):
        autoencoder_folder(str(tmp_path))
    (tmp_path / place).mkdir(parents=True, exist_ok=True)
    (tmp_path / place / "config.json").write_text("{}")
    assert autoencoder_folder(str(tmp_path)) == tmp_path / place
