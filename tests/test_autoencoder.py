"""AutoencoderKL against diffusers', its posterior, and the pixel losses."""

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

from autoencoder.kl import AutoencoderConfig, AutoencoderKL, Posterior
from autoencoder.losses import reconstruction

SMALL = {"block_out_channels": (8, 16), "norm_num_groups": 4}
SHAPES = {
    "sd": SMALL,
    "sd-deeper": {"block_out_channels": (8, 8, 16), "layers_per_block": 2, "norm_num_groups": 8},
    "sdxl": {
        **SMALL,
        "scaling_factor": 0.13025,
        "latents_mean": (0.1, -0.2, 0, 0),
        "latents_std": (1, 2, 3, 4),
    },
    "sixteen": {
        **SMALL,
        "latent_channels": 16,
        "scaling_factor": 0.3611,
        "shift_factor": 0.1159,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    },
    "no-attention": {**SMALL, "mid_block_add_attention": False, "force_upcast": False, "in_channels": 1},
}
FULL_SIZE = {
    "sd": {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2},
    "flux": {
        "block_out_channels": (128, 256, 512, 512),
        "layers_per_block": 2,
        "latent_channels": 16,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    },
}


def make(**keys: object) -> AutoencoderKL:
    torch.manual_seed(0)
    return stirred(AutoencoderKL(AutoencoderConfig(**keys)))


def stirred(network: nn.Module) -> nn.Module:
    """No weight stays at the 0 or 1 that would hide a mistake."""
    with torch.no_grad():
        for weight in network.parameters():
            weight += 0.1 * torch.randn_like(weight)
    return network


def relative(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def norms(network: nn.Module) -> dict[str, tuple[int, float]]:
    """A wrong eps shows in outputs only where activations hardly vary."""
    modules = network.named_modules()
    return {name: (norm.num_groups, norm.eps) for name, norm in modules if isinstance(norm, nn.GroupNorm)}


def stock(config: AutoencoderConfig) -> diffusers.AutoencoderKL:
    return diffusers.AutoencoderKL(**vars(config), **config.fixed())


def gradient_difference(ours: nn.Module, theirs: nn.Module) -> float:
    """The largest relative difference of a weight's gradient.

    Biases that a softmax or a normalisation takes out again have gradients of rounding only.
    """
    wanted = {name: weight.grad for name, weight in theirs.named_parameters()}
    least = max(gradient.abs().max() for gradient in wanted.values()) / 100
    return max(
        ((weight.grad - wanted[name]).abs().max() / max(wanted[name].abs().max(), least)).item()
        for name, weight in ours.named_parameters()
    )


def parity(shape: str, folder: Path) -> tuple[float, float]:
    """Largest relative difference to diffusers of what is computed, and of gradients; weights come by a file."""
    torch.manual_seed(0)
    theirs = stirred(stock(AutoencoderConfig(**SHAPES[shape])))
    theirs.save_pretrained(folder)
    ours = AutoencoderKL.from_pretrained(folder)

    x = torch.randn(2, ours.config.in_channels, 24, 16)
    their_posterior = theirs.encode(x).latent_dist
    noise = torch.randn_like(their_posterior.mean)
    made, posterior = ours(x, noise)
    their_made = theirs.decode(their_posterior.mean + their_posterior.std * noise).sample
    forward = max(
        relative(posterior.mean, their_posterior.mean),
        relative(posterior.logvar, their_posterior.logvar),
        relative(made, their_made),
        relative(posterior.kl(), their_posterior.kl()),
    )
    (made.square().mean() + posterior.kl().mean()).backward()
    (their_made.square().mean() + their_posterior.kl().mean()).backward()
    return forward, gradient_difference(ours, theirs)


@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_gradients_are_those_of_diffusers(shape: str, tmp_path: Path) -> None:
    forward, gradient = parity(shape, tmp_path)
    assert forward <= 1e-5 and gradient <= 1e-4


def read_by_stock(ours: Any, stock: Any, folder: Path) -> Any:
    """What the stock class `stock` makes of the network as we save it; all settings must be as ours."""
    ours.save_pretrained(folder)
    theirs, info = stock.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    for key, value in (vars(ours.config) | ours.config.fixed()).items():
        saved = theirs.config[key]
        assert (tuple(saved) if isinstance(saved, list) else saved) == value, key
    return theirs


@pytest.mark.parametrize("shape", SHAPES)
def test_diffusers_reads_what_we_save(shape: str, tmp_path: Path) -> None:
    ours = make(**SHAPES[shape])
    theirs = read_by_stock(ours, diffusers.AutoencoderKL, tmp_path)
    assert AutoencoderKL.from_pretrained(tmp_path).config == ours.config

    x = torch.randn(1, ours.config.in_channels, 16, 16)
    with torch.no_grad():
        assert relative(ours(x)[0], theirs(x).sample) <= 1e-5


@pytest.mark.parametrize("shape", FULL_SIZE)
def test_full_size_state_dict_is_that_of_diffusers(shape: str) -> None:
    config = AutoencoderConfig(**FULL_SIZE[shape])
    with torch.device("meta"):
        ours, theirs = AutoencoderKL(config), stock(config)
    assert {name: weight.shape for name, weight in ours.state_dict().items()} == {
        name: weight.shape for name, weight in theirs.state_dict().items()
    }
    assert norms(ours) == norms(theirs)
    assert config.factor == 8


def test_defaults_are_those_of_diffusers() -> None:
    config = AutoencoderConfig()
    theirs = diffusers.AutoencoderKL().config
    ours = vars(config) | config.fixed()
    assert ours == {key: theirs[key] for key in theirs if not key.startswith("_")}


def test_channels_last_and_bfloat16_change_rounding_only() -> None:
    model = make(**SMALL)
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        wanted, posterior = model(x)
        model = model.to(memory_format=torch.channels_last)
        assert relative(model(x.to(memory_format=torch.channels_last))[0], wanted) <= 1e-5
        with torch.autocast("cpu", torch.bfloat16):
            made, half = model(x)
        assert half.mean.dtype == half.kl().dtype == torch.float32
        assert 1e-5 < relative(made.float(), wanted) < 0.1
        assert relative(half.kl(), posterior.kl()) < 0.1
        made, half = model.to(torch.bfloat16)(x)
        assert made.dtype == torch.bfloat16
        assert half.mean.dtype == torch.float32
        assert relative(made.float(), wanted) < 0.1


def test_gradients_flow_under_autocast_in_channels_last() -> None:
    model = make(**SMALL).to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 16, 16).to(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        made, posterior = model(x, torch.randn(2, 4, 8, 8))
        (made.square().mean() + posterior.kl().mean()).backward()
    for name, weight in model.named_parameters():
        assert weight.grad is not None, name
        assert weight.grad.isfinite().all(), name


def test_posterior_is_the_clamped_gaussian() -> None:
    mean, logvar = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    logvar[0, 0, 0, :2] = torch.tensor([-50.0, 40.0])
    posterior = Posterior.from_moments(torch.cat([mean, logvar], dim=1))
    assert posterior.logvar.aminmax() == (-30, 20)

    gaussian = torch.distributions.Normal(posterior.mean, posterior.std)
    unit = torch.distributions.Normal(0.0, 1.0)
    kl = torch.distributions.kl_divergence(gaussian, unit).sum(dim=(1, 2, 3))
    assert torch.allclose(posterior.kl(), kl, rtol=1e-5)
    noise = torch.randn_like(mean)
    assert torch.equal(posterior.sample(noise), posterior.mean + torch.exp(posterior.logvar / 2) * noise)


def test_forward_decodes_the_sample_that_the_noise_stands_for() -> None:
    model = make(**SMALL)
    x, noise = torch.randn(1, 3, 8, 8), torch.randn(1, 4, 4, 4)
    made, posterior = model(x, noise)
    assert torch.equal(made, model.decode(posterior.mean + posterior.std * noise))
    made, posterior = model(x)
    assert torch.equal(made, model.decode(posterior.mean))


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((1, 3, 33, 32), "height of 33, not a multiple of 4: the nearest is 32"),
        ((1, 3, 32, 1), "width of 1, not a multiple of 4: the nearest is 4"),
        ((1, 4, 32, 32), r"shape \[1, 4, 32, 32\]: images must be \[B, 3, H, W\]"),
        ((3, 32, 32), r"images must be \[B, 3, H, W\]"),
    ],
)
def test_unfit_images_are_refused(shape: tuple[int, ...], words: str) -> None:
    model = make(block_out_channels=(8, 8, 8), norm_num_groups=4)
    with pytest.raises(ValueError, match=words):
        model.encode(torch.zeros(shape))


def test_unfit_latents_are_refused() -> None:
    with pytest.raises(ValueError, match=r"latents must be \[B, 4, h, w\]"):
        make(**SMALL).decode(torch.zeros(1, 3, 8, 8))


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"block_out_channels": ()}, "block_out_channels is empty"),
        (
            {"block_out_channels": (32, 48)},
            "block_out_channels holds 48, not a multiple of norm_num_groups = 32",
        ),
        ({"layers_per_block": 0}, "layers_per_block = 0 must be at least 1"),
        ({"latent_channels": -1}, "latent_channels = -1 must be at least 1"),
    ],
)
def test_unfit_configs_are_refused(keys: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        AutoencoderConfig(**keys)


def test_reconstruction_losses_are_averages_for_each_image() -> None:
    x = torch.zeros(2, 3, 4, 4)
    y = torch.stack([torch.full((3, 4, 4), 0.5), torch.full((3, 4, 4), -2.0)])
    assert reconstruction(x, y, "l1").tolist() == [0.5, 2.0]
    assert reconstruction(x, y, "l2").tolist() == [0.25, 4.0]
    assert reconstruction(x, y, "charbonnier").tolist() == pytest.approx([0.500001, 2.0], abs=1e-6)

    x.requires_grad_()
    reconstruction(x, x.detach().clone(), "charbonnier").sum().backward()
    assert x.grad.abs().max() == 0  # smooth where l1 has a corner, and finite
    with pytest.raises(ValueError, match="'huber' must be"):
        reconstruction(x, x, "huber")
