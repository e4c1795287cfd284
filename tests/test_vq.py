"""VQModel against diffusers', its quantizer, and the usage of the codebook."""

from pathlib import Path

import diffusers
import pytest
import torch
from torch import nn

from autoencoder.vq import VectorQuantizer, VQConfig, VQModel, codebook_usage, count_codes
from tests.test_autoencoder import gradient_difference, read_by_stock, relative

SMALL = {"block_out_channels": (8, 16), "norm_num_groups": 4, "num_vq_embeddings": 16}
SHAPES = {
    "plain": SMALL,
    "other-code-size": {**SMALL, "vq_embed_dim": 5, "latent_channels": 4, "scaling_factor": 0.5},
    "amused": {**SMALL, "mid_block_add_attention": False, "lookup_from_codebook": True, "force_upcast": True},
}


def make(**keys: object) -> VQModel:
    torch.manual_seed(0)
    return stirred(VQModel(VQConfig(**keys)))


def stirred(network: nn.Module) -> nn.Module:
    """No weight stays at the 0 or 1 that would hide a mistake; codes as far apart as latents are."""
    with torch.no_grad():
        for weight in network.parameters():
            weight += 0.1 * torch.randn_like(weight)
        network.quantize.embedding.weight.normal_()
    return network


def parity(shape: str, folder: Path) -> tuple[float, float]:
    """Largest relative difference to diffusers of what is computed, and of gradients; weights come by a file."""
    torch.manual_seed(0)
    config = VQConfig(**SHAPES[shape])
    theirs = stirred(diffusers.VQModel(**vars(config), **config.fixed()))
    theirs.save_pretrained(folder)
    ours = VQModel.from_pretrained(folder)
    assert ours.config == config

    x = torch.randn(2, 3, 16, 16)
    made, quantized = ours(x)
    their_made, their_loss = theirs(x, return_dict=False)
    # diffusers weighs the terms the other way round, as the first implementation did.
    loss = (quantized.commitment + 0.25 * quantized.codebook).mean()
    assert len(quantized.indices.unique()) > 1
    forward = max(
        relative(ours.encode(x), theirs.encode(x).latents),
        relative(made, their_made),
        relative(loss, their_loss),
    )
    (made.square().mean() + loss).backward()
    (their_made.square().mean() + their_loss).backward()
    return forward, gradient_difference(ours, theirs)


@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_gradients_are_those_of_diffusers(shape: str, tmp_path: Path) -> None:
    forward, gradient = parity(shape, tmp_path)
    assert forward <= 1e-5 and gradient <= 1e-4


@pytest.mark.parametrize("shape", SHAPES)
def test_diffusers_reads_what_we_save(shape: str, tmp_path: Path) -> None:
    ours = make(**SHAPES[shape])
    theirs = read_by_stock(ours, diffusers.VQModel, tmp_path)

    z = torch.randn(2, ours.config.code_size, 4, 4)
    with torch.no_grad():
        assert relative(ours.decode(z), theirs.decode(z).sample) <= 1e-5


def test_indices_decode_as_in_diffusers(tmp_path: Path) -> None:
    ours = make(**SHAPES["amused"])
    ours.save_pretrained(tmp_path)
    theirs = diffusers.VQModel.from_pretrained(tmp_path)
    indices = torch.randint(16, (2, 4, 6))
    with torch.no_grad():
        wanted = theirs.decode(indices.flatten(), force_not_quantize=True, shape=(2, 4, 6, 3)).sample
        assert relative(ours.decode_indices(indices), wanted) <= 1e-5


def test_defaults_are_those_of_diffusers() -> None:
    config = VQConfig()
    theirs = diffusers.VQModel().config
    assert vars(config) | config.fixed() == {key: theirs[key] for key in theirs if not key.startswith("_")}


def test_full_size_state_dict_is_that_of_diffusers() -> None:
    config = VQConfig(block_out_channels=(128, 256, 512), layers_per_block=2, num_vq_embeddings=8192)
    with torch.device("meta"):
        ours, theirs = VQModel(config), diffusers.VQModel(**vars(config), **config.fixed())
    assert {name: weight.shape for name, weight in ours.state_dict().items()} == {
        name: weight.shape for name, weight in theirs.state_dict().items()
    }


def test_spatial_normalisation_is_refused_by_name(tmp_path: Path) -> None:
    diffusers.VQModel(norm_type="spatial").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"not supported: norm_type = 'spatial' .only 'group'."):
        VQModel.from_pretrained(tmp_path)


def test_the_nearest_code_is_taken_and_gradients_pass_straight_through() -> None:
    quantizer = VectorQuantizer(codes=3, code_size=2)
    with torch.no_grad():
        quantizer.embedding.weight.copy_(torch.tensor([[0.0, 0.0], [1.0, 1.0], [-5.0, 0.0]]))
    z = torch.tensor([[0.9, 0.8], [-0.1, 0.2]]).T.reshape(1, 2, 1, 2).requires_grad_()
    quantized = quantizer(z)
    assert quantized.indices.tolist() == [[[1, 0]]]
    assert torch.allclose(quantized.latents, torch.tensor([[1.0, 1.0], [0.0, 0.0]]).T.reshape(1, 2, 1, 2))

    weight = torch.randn_like(z)
    (gradient,) = torch.autograd.grad((quantized.latents * weight).sum(), z, retain_graph=True)
    assert torch.equal(gradient, weight)
    # (0.1^2 + 0.2^2 + 0.1^2 + 0.2^2) / 4
    assert quantized.codebook.tolist() == quantized.commitment.tolist() == pytest.approx([0.025])
    codes = quantizer.embedding.weight
    assert torch.autograd.grad(quantized.codebook.sum(), z, retain_graph=True, allow_unused=True) == (None,)
    (moved,) = torch.autograd.grad(quantized.codebook.sum(), codes, retain_graph=True)
    assert moved[2].abs().max() == 0 < moved[:2].abs().min()
    assert torch.autograd.grad(quantized.commitment.sum(), codes, retain_graph=True, allow_unused=True) == (
        None,
    )

    loss = quantized.loss(beta=0.5)
    assert loss.tolist() == pytest.approx([0.0375])
    (of_commitment,) = torch.autograd.grad(quantized.commitment.sum(), z, retain_graph=True)
    (of_loss,) = torch.autograd.grad(loss.sum(), z, retain_graph=True)
    assert torch.allclose(of_loss, 0.5 * of_commitment)


def test_bfloat16_quantizes_in_float32() -> None:
    model = make(**SMALL).to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        made, quantized = model(x)
    assert quantized.latents.dtype == quantized.loss().dtype == torch.float32
    assert made.shape == x.shape
    (made.float().square().mean() + quantized.loss().mean()).backward()
    assert all(weight.grad.isfinite().all() for weight in model.parameters())
    assert model.to(torch.bfloat16)(x)[0].dtype == torch.bfloat16


def test_usage_counts_codes_over_batches() -> None:
    counts = count_codes(torch.tensor([[[0, 1], [0, 1]]]), 8) + count_codes(torch.tensor([2, 3, 2, 3]), 8)
    assert counts.tolist() == [2, 2, 2, 2, 0, 0, 0, 0]
    assert codebook_usage(counts) == pytest.approx((0.5, 4.0))
    assert codebook_usage(count_codes(torch.zeros(5, dtype=torch.long), 8)) == pytest.approx((1 / 8, 1.0))
    with pytest.raises(ValueError, match="counts are all 0"):
        codebook_usage(torch.zeros(8, dtype=torch.long))


def test_unfit_input_is_refused() -> None:
    model = make(**SMALL)
    with pytest.raises(ValueError, match="height of 17, not a multiple of 2: the nearest is 16"):
        model.encode(torch.zeros(1, 3, 17, 16))
    with pytest.raises(ValueError, match=r"latents must be \[B, 3, h, w\]"):
        model.decode(torch.zeros(1, 4, 8, 8))
    with pytest.raises(ValueError, match="num_vq_embeddings = 0"):
        VQConfig(num_vq_embeddings=0)
