"""The equivariance loss is 0 for an autoencoder that is equivariant, and learns on one that is not."""

import pytest
import torch
import torch.nn.functional as F

from autoencoder.equivariance import EquivarianceConfig, Transform, draw
from autoencoder.kl import AutoencoderConfig, AutoencoderKL, Posterior
from autoencoder.losses import reconstruction

CONFIG = AutoencoderConfig(block_out_channels=(8, 16), norm_num_groups=4, latent_channels=4)
ALWAYS = EquivarianceConfig(probability=1.0)


class Pooling(AutoencoderKL):
    """Averages 2x2 pixels, and repeats latents: turning and halving pass through it."""

    def encode(self, x: torch.Tensor) -> Posterior:
        mean = F.avg_pool2d(x, 2)
        return Posterior(mean, torch.full_like(mean, -30.0))

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        return F.interpolate(z, scale_factor=2.0, mode="nearest")


class Shuffling(Pooling):
    """Moves 2x2 pixels into channels, losing nothing: but a turned picture has its channels permuted."""

    def encode(self, x: torch.Tensor) -> Posterior:
        mean = F.pixel_unshuffle(x, 2)
        return Posterior(mean, torch.full_like(mean, -30.0))

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        return F.pixel_shuffle(z, 2)


def blocks(of: int, sides: tuple[int, int] = (4, 6)) -> torch.Tensor:
    """Pictures of random blocks of `of` pixels, which halving leaves sharp."""
    small = torch.rand(2, 3, *sides, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return small.repeat_interleave(of, 2).repeat_interleave(of, 3)


def loss(
    model: AutoencoderKL, pixels: torch.Tensor, transform: Transform, **of: torch.Tensor
) -> torch.Tensor:
    """As in training."""
    made, _ = model(pixels, transform=transform, **of)
    return reconstruction(made, transform(pixels, model.config.factor), "l2")


@pytest.mark.parametrize("turns", range(4))
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_an_equivariant_autoencoder_has_no_loss(scale: float, turns: int) -> None:
    pixels, transform = blocks(4), Transform(scale=scale, quarter_turns=turns)
    assert loss(Pooling(CONFIG), pixels, transform).max() < 1e-12
    made, _ = Pooling(CONFIG)(pixels, transform=transform)
    assert made.shape[2:] == transform(pixels, 2).shape[2:]


def test_one_that_is_not_has_a_loss_though_it_reconstructs_perfectly() -> None:
    pixels = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert loss(Shuffling(CONFIG), pixels, Transform(scale=1.0, quarter_turns=0)).max() == 0
    assert loss(Shuffling(CONFIG), pixels, Transform(scale=1.0, quarter_turns=1)).min() > 0.1
    assert loss(Shuffling(CONFIG), pixels, Transform(scale=0.5, quarter_turns=0)).min() > 0.01


def test_it_reaches_every_weight_of_encoder_and_decoder() -> None:
    torch.manual_seed(0)
    model, noise = AutoencoderKL(CONFIG), torch.randn(2, 4, 8, 12)
    loss(model, blocks(4), Transform(scale=0.5, quarter_turns=3), noise=noise).mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_what_is_drawn_is_a_function_of_the_uniforms_and_has_the_published_distribution() -> None:
    uniforms = torch.rand(4000, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    half = EquivarianceConfig(probability=0.5)
    drawn = [draw(half, u) for u in uniforms.tolist()]
    assert drawn == [draw(half, u) for u in uniforms.tolist()]
    kept = [transform for transform in drawn if transform is not None]
    assert abs(len(kept) / 4000 - 0.5) < 0.03
    assert {t.scale for t in kept} == {n / 32 for n in range(8, 32)}
    assert {t.quarter_turns for t in kept} == {1, 2, 3}
    only_smaller = EquivarianceConfig(probability=1, turn=False, smallest=0.5)
    assert {draw(only_smaller, u).quarter_turns for u in uniforms.tolist()} == {0}
    assert draw(EquivarianceConfig(), (0.0, 0.5, 0.5)) is None


@pytest.mark.parametrize("scale", [n / 32 for n in range(8, 33)])
def test_pictures_and_latents_are_brought_to_matching_sizes(scale: float) -> None:
    transform = Transform(scale=scale, quarter_turns=1)
    height, width = transform(torch.zeros(1, 4, 5, 9)).shape[2:]
    assert transform(torch.zeros(1, 3, 40, 72), 8).shape[2:] == (8 * height, 8 * width)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"probability": 1.5}, "probability is 1.5"),
        ({"smallest": 0.5}, "smallest is set, but equivariance.probability is 0"),
        ({"turn": False}, "turn is set, but equivariance.probability is 0"),
        ({"probability": 0.5, "smallest": 0.0}, "smallest is 0.0"),
        ({"probability": 0.5, "smallest": 1, "turn": False}, "changes nothing"),
    ],
)
def test_unfit_settings_are_refused(keys: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EquivarianceConfig(**keys)
