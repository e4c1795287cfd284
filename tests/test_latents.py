"""The latent contract: exact statistics, and folding that changes latents but no picture."""

from pathlib import Path

import diffusers
import pytest
import torch

from autoencoder.kl import AutoencoderConfig, AutoencoderKL, Posterior
from autoencoder.latents import LatentStatistics, fold

SMALL = {"block_out_channels": (8, 16), "norm_num_groups": 4}
WITHOUT = {"use_quant_conv": False, "use_post_quant_conv": False}
SHAPES = {
    "both": SMALL,
    "neither": {**SMALL, **WITHOUT, "latent_channels": 6, "shift_factor": 0.1, "latents_mean": (0.5,) * 6},
    "encoder-only": {**SMALL, "use_post_quant_conv": False},
    "decoder-only": {**SMALL, "use_quant_conv": False, "latents_std": (2.0,) * 4},
}


def make(**keys: object) -> AutoencoderKL:
    """An autoencoder whose latents are far from the contract: channels differ in mean and deviation."""
    torch.manual_seed(0)
    model = AutoencoderKL(AutoencoderConfig(**keys)).eval()
    last = model.encoder.conv_out if model.quant_conv is None else model.quant_conv
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.1 * torch.randn_like(weight)
        channels = model.config.latent_channels
        last.weight[:channels] *= torch.linspace(0.5, 8, channels)[:, None, None, None]
        last.bias[:channels] += torch.linspace(-9, 4, channels)
        last.bias[channels:] += torch.linspace(-8, 0, channels)
    return model


def images() -> torch.Tensor:
    return torch.rand(12, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1


@torch.no_grad()
def measure(model: AutoencoderKL) -> LatentStatistics:
    statistics = LatentStatistics(model.config.latent_channels)
    for batch in images().split(5):
        statistics.update(model.encode(batch))
    return statistics


def test_statistics_are_those_of_samples_over_the_whole_set() -> None:
    torch.manual_seed(0)
    posteriors = [
        Posterior(
            torch.randn(size, 2, 6, 6) * torch.tensor([0.1, 3.0])[:, None, None] + 50.0,
            torch.randn(size, 2, 6, 6) + torch.tensor([-4.0, 1.0])[:, None, None],
        )
        for size in (7, 3, 1)
    ]
    statistics = LatentStatistics(2)
    for posterior in posteriors:
        statistics.update(posterior)

    mean = torch.cat([posterior.mean for posterior in posteriors]).double()
    variance = torch.cat([posterior.logvar for posterior in posteriors]).double().exp()
    spread = mean.var(dim=(0, 2, 3), correction=0) + variance.mean(dim=(0, 2, 3))
    assert torch.allclose(statistics.mean, mean.mean(dim=(0, 2, 3)), rtol=1e-12)
    assert torch.allclose(statistics.std, spread.sqrt(), rtol=1e-9)

    drawn = torch.cat(
        [posterior.sample(torch.randn(2000, *posterior.mean.shape)) for posterior in posteriors], dim=1
    )
    assert torch.allclose(drawn.std(dim=(0, 1, 3, 4)).double(), statistics.std, rtol=5e-3)


def test_parts_merge_to_the_whole() -> None:
    model = make(**SMALL)
    whole, first, second = (LatentStatistics(4) for _ in range(3))
    with torch.no_grad():
        whole.update(model.encode(images()))
        first.update(model.encode(images()[:9]))
        second.update(model.encode(images()[9:]))
    first.merge(second)
    assert first.sums[0].tolist() == [12 * 8 * 8] * 4
    assert torch.allclose(first.mean, whole.mean, rtol=1e-5)
    assert torch.allclose(first.std, whole.std, rtol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_folding_changes_latents_but_no_picture(shape: str) -> None:
    model = make(**SHAPES[shape])
    statistics = measure(model)
    assert statistics.mean.abs().max() > 3
    assert statistics.std.max() / statistics.std.min() > 1.5
    folded = fold(model, statistics)

    after = measure(folded)
    assert after.mean.abs().max() < 1e-5
    assert (after.std - 1).abs().max() < 1e-5

    noise = torch.randn(12, model.config.latent_channels, 8, 8)
    for n in (None, noise):
        (made, posterior), (folded_made, folded_posterior) = model(images(), n), folded(images(), n)
        assert (folded_made - made).abs().max() <= 1e-5 * made.abs().max()
    mean, std = (moment.float()[:, None, None] for moment in (statistics.mean, statistics.std))
    assert torch.allclose(folded_posterior.mean, (posterior.mean - mean) / std, atol=1e-5)
    assert torch.allclose(folded_posterior.std, posterior.std / std, rtol=1e-5)


def test_the_clamp_is_the_limit_of_exactness() -> None:
    """Beyond it only deviations are off that are as good as none: e^-15 of the latents' own."""
    model = make(**SMALL)
    with torch.no_grad():
        model.quant_conv.bias[4:] = -100.0
        folded = fold(model, measure(model))
        assert folded.encode(images()).std.max() == pytest.approx(3.06e-7, rel=1e-2)
        made, folded_made = model(images())[0], folded(images())[0]
    assert (folded_made - made).abs().max() <= 1e-5 * made.abs().max()


@pytest.mark.parametrize("shape", SHAPES)
def test_the_new_config_says_that_nothing_is_left_to_do(shape: str) -> None:
    model = make(**SHAPES[shape])
    config, weights = model.config, {name: weight.clone() for name, weight in model.state_dict().items()}
    folded = fold(model, measure(model)).config
    assert (folded.scaling_factor, folded.shift_factor) == (1.0, 0.0)
    assert (folded.latents_mean, folded.latents_std) == (None, None)
    assert model.config == config
    assert all(torch.equal(weights[name], weight) for name, weight in model.state_dict().items())


@pytest.mark.parametrize("shape", SHAPES)
def test_diffusers_draws_the_same_pictures_with_the_folded_model(shape: str, tmp_path: Path) -> None:
    model = make(**SHAPES[shape])
    folded = fold(model, measure(model))
    folded.save_pretrained(tmp_path)
    theirs, info = diffusers.AutoencoderKL.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    with torch.no_grad():
        made, wanted = theirs(images()).sample, model(images())[0]
    assert (made - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_folding_again_changes_nothing() -> None:
    once = fold(make(**SMALL), measure(make(**SMALL)))
    twice = fold(once, measure(once))
    for name, weight in once.state_dict().items():
        assert torch.allclose(twice.state_dict()[name], weight, rtol=1e-4, atol=1e-5), name


def test_unfit_statistics_are_refused() -> None:
    model = make(**SMALL)
    with pytest.raises(
        ValueError,
        match=r"channel 0 of the latents has a standard deviation of nan: .* training has diverged",
    ):
        fold(model, LatentStatistics(4))
    with pytest.raises(ValueError, match="statistics are of 3 channels, but the model's latents have 4"):
        fold(model, LatentStatistics(3))
    statistics = measure(model)
    statistics.sums[3, 2] = float("inf")
    with pytest.raises(ValueError, match="channel 2 of the latents has a standard deviation of inf"):
        fold(model, statistics)
