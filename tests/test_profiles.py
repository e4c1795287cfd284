"""Averages chosen after training are those that would have been tracked."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import train_ldm
from ldm.config import UserError
from ldm.profiles import TRACKED, PowerEMA, Profiles, exponent, mixture, product, reconstruct
from pipelines import LatentDiffusion
from pipelines.cli import main as ldm
from tests.support import TOY, newest_weights


def test_exponents_are_those_of_the_paper() -> None:
    assert exponent(0.05) == pytest.approx(16.97, abs=0.005)
    assert exponent(0.10) == pytest.approx(6.94, abs=0.005)
    for sigma_rel in (0.02, 0.07, 0.2, 0.28):
        gamma = exponent(sigma_rel)
        mean, square = (gamma + 1) / (gamma + 2), (gamma + 1) / (gamma + 3)
        assert (square - mean**2) ** 0.5 == pytest.approx(sigma_rel, rel=1e-9)
    with pytest.raises(UserError, match=r"sigma_rel is 0\.3"):
        exponent(0.3)


def test_products_of_profiles_are_their_integrals() -> None:
    tau = (np.arange(200_000) + 0.5) / 200_000 * 90.0

    def profile(gamma: float, t: float) -> np.ndarray:
        return np.where(tau <= t, (gamma + 1) * (tau / t) ** gamma / t, 0.0)

    for one, other in (((6.9, 60.0), (17.0, 90.0)), ((3.0, 90.0), (3.0, 90.0)), ((0.5, 30.0), (9.0, 20.0))):
        integral = (profile(*one) * profile(*other)).sum() * 90.0 / 200_000
        assert product(one, other) == pytest.approx(integral, rel=1e-3)


def test_a_power_average_weights_steps_by_their_profile() -> None:
    """One-hot weights: after T steps the average holds what each step counts, the integral of its profile."""
    steps = 40
    module = nn.Linear(steps, 1, bias=False)
    average = PowerEMA(0.1, it=module)
    for step in range(1, steps + 1):
        with torch.no_grad():
            module.weight.copy_(torch.eye(steps)[step - 1])
        average.update(step, it=module)
    gamma = exponent(0.1)
    edges = (torch.arange(steps + 1, dtype=torch.float64) / steps) ** (gamma + 1)
    torch.testing.assert_close(average["it"].weight[0].double(), edges.diff(), rtol=1e-4, atol=1e-7)


def test_a_mixture_sums_to_one_and_finds_what_was_tracked() -> None:
    points = [(exponent(s), t) for t in (20.0, 40.0, 60.0) for s in TRACKED]
    x, distance = mixture(points, (exponent(0.1), 60.0))
    assert x == pytest.approx([0, 0, 0, 0, 0, 1], abs=1e-5) and distance < 1e-5
    x, distance = mixture(points, (exponent(0.07), 60.0))
    assert x.sum() == pytest.approx(1, abs=1e-9) and 0 < distance < 0.2


@pytest.mark.parametrize("sigma_rel", [0.04, 0.07, 0.15])
def test_reconstructed_equals_tracked(tmp_path: Path, sigma_rel: float) -> None:
    """Weights that wander like a random walk around a start: to 1 % of how far averages of other lengths are away."""
    torch.manual_seed(0)
    module = nn.Linear(64, 32)
    wanted, neighbour = PowerEMA(sigma_rel, unet=module), PowerEMA(sigma_rel * 1.5, unet=module)
    profiles = Profiles(unet=module)
    for step in range(1, 801):
        with torch.no_grad():
            for p in module.parameters():
                p.add_(0.01 * torch.randn_like(p))
        for average in (wanted, neighbour, profiles):
            average.update(step, unet=module)
        if step % 25 == 0:
            profiles.save(tmp_path, step)
    weights, step, _ = reconstruct(tmp_path, sigma_rel)
    assert step == 800 and weights["unet.weight"].dtype == torch.float32
    tracked = wanted["unet"].weight
    scale = (neighbour["unet"].weight - tracked).norm()
    assert (weights["unet.weight"] - tracked).norm() < 0.01 * scale


def test_too_few_snapshots_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no snapshots; train with --ema_every"):
        reconstruct(tmp_path, 0.1)
    profiles = Profiles(unet=nn.Linear(2, 2))
    for step in (50, 100):
        profiles.save(tmp_path, step)
    with pytest.raises(UserError, match=r"come no nearer to sigma_rel 0\.02"):
        reconstruct(tmp_path, 0.02)
    with pytest.raises(UserError, match="is of step 50, after step 20"):
        reconstruct(tmp_path, 0.1, step=20)
    reconstruct(tmp_path, 0.1)


def test_a_run_keeps_snapshots_and_ldm_ema_writes_a_model(
    chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--config", str(TOY / "ldm.yaml"), "--autoencoder", str(chain / "vae")]
    words += ["--run.out", str(tmp_path / "run"), "--ema_every", "2"]
    train_ldm.main(words)
    names = [p.name for p in sorted((tmp_path / "run" / "ema").iterdir())]
    assert names == [f"step-{step:08d}.safetensors" for step in (2, 4, 6)]
    ldm(["ema", str(tmp_path / "run"), "--sigma-rel", "0.1", "--out", str(tmp_path / "model")])
    assert "up to step 6; the profile is met to 0.00%" in capsys.readouterr().out
    model = LatentDiffusion.from_pretrained(tmp_path / "model")
    saved = newest_weights(tmp_path / "run")
    for name, part in (("unet", model.unet), ("conditioner", model.conditioner)):
        for key, value in part.named_parameters():
            tracked = saved[f"profiles/state.0.1.{name}.{key}"]
            torch.testing.assert_close(value, tracked, rtol=2e-3, atol=1e-6)  # float16
    assert model(["a large red circle at the top left on a white background"], steps=2)
    with pytest.raises(SystemExit):
        ldm(["ema", str(chain / "ldm"), "--sigma-rel", "0.1", "--out", str(tmp_path / "other")])
    assert "holds no snapshots" in capsys.readouterr().err


def test_tracked_averages_go_on_from_their_state() -> None:
    torch.manual_seed(0)
    module = nn.Linear(3, 3)
    first = Profiles(unet=module)
    second = Profiles(unet=copy.deepcopy(module))
    first.update(1, unet=nn.Linear(3, 3))
    second.load_state_dict(first.state_dict())
    for profiles in (first, second):
        profiles.update(2, unet=module)
    for sigma_rel in first.averages:
        assert torch.equal(
            first.averages[sigma_rel]["unet"].weight, second.averages[sigma_rel]["unet"].weight
        )
