"""Predictions and loss weights: inverse conversions, published formulas, and every combination finite or refused."""

import pytest
import torch

from ldm.conditioning import Cond
from ldm.denoiser import Denoiser
from ldm.paths import EDM, VP, Flow, Level
from ldm.prediction import PREDICTIONS, Weight, make_prediction

PATHS = {
    "flow": Flow(),
    "flow uniform": Flow(times_by="uniform"),
    "vp": VP(),
    "vp cosine": VP(schedule="cosine"),
    "vp zero-SNR": VP(zero_terminal_snr=True),
    "vp cosine zero-SNR": VP(schedule="cosine", zero_terminal_snr=True),
    "edm": EDM(),
    "edm sigma_data 0.5": EDM(sigma_data=0.5),
}
WEIGHTS = ("uniform", "min_snr", "soft_min_snr", "edm")
REFUSED = {
    *(("vp zero-SNR", "epsilon", weight) for weight in WEIGHTS),
    *(("vp cosine zero-SNR", "epsilon", weight) for weight in WEIGHTS),
    ("flow uniform", "epsilon", "edm"),  # the error in x_0 is infinite at pure noise
    ("flow uniform", "sample", "edm"),  # the error in eps is infinite at no noise
}


def levels(path, n=1001):
    """Every level that may be trained on, the extremes included."""
    t = path.times(torch.linspace(0, 1, n, dtype=torch.float64)).unique()
    return t, *path.levels(t)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("weight", WEIGHTS)
def test_every_combination_is_finite_at_every_level_or_refused(path, prediction, weight):
    scale = torch.tensor(0.3, requires_grad=True)  # the only weight of the network

    def network(x, t, cond):
        return scale * x

    def make():
        p = PATHS[path]
        return Denoiser(network, p, make_prediction(prediction, p), Weight(kind=weight))

    if (path, prediction, weight) in REFUSED:
        with pytest.raises(ValueError, match="choose") as error:
            make()
        assert "\n" not in str(error.value)
        return
    denoiser = make()
    t, *_ = levels(PATHS[path])
    x0, noise = (normal(len(t), 1, 2, 2, seed=seed).float() for seed in (0, 1))
    loss = denoiser.loss(x0, Cond(), t=t.float(), noise=noise)
    assert loss.shape == (len(t),) and loss.isfinite().all() and (loss >= 0).all()
    gradients = [torch.autograd.grad(one, scale, retain_graph=True)[0] for one in loss[:: len(t) // 50]]
    assert torch.stack([*gradients, torch.autograd.grad(loss.mean(), scale)[0]]).isfinite().all()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_estimates_of_x0_are_finite_at_every_grid_level_or_refused(path, prediction):
    path = PATHS[path]
    if prediction == "epsilon" and getattr(path, "zero_terminal_snr", False):
        return
    denoiser = Denoiser(lambda x, t, cond: 0.3 * x, path, make_prediction(prediction, path))
    for spacing in path.spacings:
        grid = path.grid(20, spacing)
        for i in range(20):
            if prediction == "epsilon" and grid.alpha[i] == 0:
                with pytest.raises(ValueError, match="nothing about x_0 at alpha 0"):
                    denoiser(normal(2, 1, 2, 2), grid[i], Cond())
            else:
                assert denoiser(normal(2, 1, 2, 2), grid[i], Cond()).isfinite().all()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_target_and_x0_are_inverse_to_each_other_at_every_level(path, prediction):
    _, alpha, sigma = levels(PATHS[path])
    if prediction == "epsilon":
        alpha, sigma = alpha[alpha > 0], sigma[alpha > 0]
    x0, eps = normal(len(alpha)), normal(len(alpha), seed=1)
    p = make_prediction(prediction, PATHS[path])
    x = alpha * x0 + sigma * eps
    back = p.to_x0(x, p.target(x0, eps, alpha, sigma), alpha, sigma)
    assert ((back - x0).abs() <= 1e-13 * (1 + sigma / alpha.clamp(min=1e-9)) + 1e-12).all()
    to = p.target(back, (x - alpha * back) / sigma.clamp(min=1e-300), alpha, sigma)
    inside = (sigma > 1e-6) & (alpha > 1e-3)
    assert torch.allclose(to[inside], p.target(x0, eps, alpha, sigma)[inside], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_errors_are_what_a_unit_error_of_the_output_makes(path, prediction):
    _, alpha, sigma = levels(PATHS[path], 51)
    inside = (alpha > 0) & (sigma > 0)
    alpha, sigma = alpha[inside], sigma[inside]
    x, out = normal(len(alpha)), normal(len(alpha), seed=1)
    p = make_prediction(prediction, PATHS[path])
    x0, moved = p.to_x0(x, out, alpha, sigma), p.to_x0(x, out + 1, alpha, sigma)
    in_x0, in_eps = p.errors(alpha, sigma)
    assert torch.allclose((moved - x0) ** 2, in_x0, rtol=1e-6)
    assert torch.allclose((alpha * (moved - x0) / sigma) ** 2, in_eps, rtol=1e-6)


def test_v_is_the_published_one_on_vp_and_its_own_inverse():
    _, alpha, sigma = levels(VP())
    x0, eps = normal(len(alpha)), normal(len(alpha), seed=1)
    v = make_prediction("v", VP()).target(x0, eps, alpha, sigma)
    assert torch.allclose(v, alpha * eps - sigma * x0)
    assert torch.allclose(alpha * (alpha * x0 + sigma * eps) - sigma * v, x0)


def test_edm_preconditioning_is_table_1():
    path = EDM(sigma_data=0.5)
    sigma = torch.tensor([0.002, 0.3, 1.0, 80.0], dtype=torch.float64)
    one, x, out = torch.ones(4, dtype=torch.float64), normal(4), normal(4, seed=1)
    c_skip = 0.25 / (sigma**2 + 0.25)
    c_out = sigma * 0.5 / (0.25 + sigma**2).sqrt()
    assert torch.allclose(make_prediction("edm", path).to_x0(x, out, one, sigma), c_skip * x + c_out * out)
    assert torch.allclose(path.scale_input(x, sigma), x / (sigma**2 + 0.25).sqrt())
    assert torch.allclose(path.levels(sigma.log() / 4)[1], sigma)
    weight = Weight(kind="edm")(make_prediction("sample", path), one, sigma, path.sigma_data)
    assert torch.allclose(weight, (sigma**2 + 0.25) / (sigma * 0.5) ** 2)
    assert torch.allclose(Weight(kind="edm")(make_prediction("edm", path), one, sigma, 0.5), one)


def test_min_snr_is_the_published_one():
    """Hang et al. 2023, section 3.4: min(SNR, gamma) on x_0, over SNR on eps, over SNR + 1 on v."""
    _, alpha, sigma = levels(VP())
    snr = (alpha / sigma) ** 2
    top = snr.clamp(max=5)
    for prediction, expected in (("sample", top), ("epsilon", top / snr), ("v", top / (snr + 1))):
        weight = Weight(kind="min_snr")(make_prediction(prediction, VP()), alpha, sigma, 1.0)
        assert torch.allclose(weight, expected)
        soft = Weight(kind="soft_min_snr")(make_prediction(prediction, VP()), alpha, sigma, 1.0)
        assert torch.allclose(soft, expected / top * snr * 5 / (snr + 5))


@pytest.mark.parametrize("path", ["flow", "vp", "edm"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_perfect_network_has_no_loss(path, prediction):
    path = PATHS[path]
    p = make_prediction(prediction, path)
    x0, noise = normal(8, 2, 3, 3), normal(8, 2, 3, 3, seed=1)
    t = path.times(torch.linspace(0.1, 0.9, 8, dtype=torch.float64))
    alpha, sigma = (a.view(-1, 1, 1, 1) for a in path.levels(t))
    perfect = p.target(x0, noise, alpha, sigma)
    denoiser = Denoiser(lambda x, t, cond: perfect, path, p, Weight(kind="soft_min_snr"))
    assert torch.equal(denoiser.loss(x0, Cond(), t=t, noise=noise), torch.zeros(8, dtype=torch.float64))
    found = denoiser(alpha * x0 + sigma * noise, Level(t, *path.levels(t)), Cond())
    assert torch.allclose(found, x0)


def test_loss_is_the_mean_over_channels_and_pixels_of_each_sample():
    x0, noise = normal(3, 2, 4, 4), normal(3, 2, 4, 4, seed=1)
    denoiser = Denoiser(lambda x, t, cond: torch.zeros_like(x), Flow(), make_prediction("flow", Flow()))
    loss = denoiser.loss(x0, Cond(), t=torch.tensor([10.0, 500.0, 990.0]), noise=noise)
    assert torch.allclose(loss, ((noise - x0) ** 2).mean((1, 2, 3)))


def test_the_network_is_told_the_time_and_shown_the_scaled_input():
    seen = []
    path = EDM()
    denoiser = Denoiser(lambda x, t, cond: seen.append((x, t)) or x, path, make_prediction("edm", path))
    x = normal(2, 1, 2, 2)
    denoiser(x, path.grid(5)[0], Cond())
    shown, t = seen[0]
    assert t.shape == (2,) and t.dtype == torch.float32 and torch.allclose(t, torch.tensor(80.0).log() / 4)
    assert torch.allclose(shown, x / (80.0**2 + 1) ** 0.5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: make_prediction("noise", Flow()), "prediction is 'noise', but must be one of epsilon"),
        (lambda: Weight(kind="min_snr", gamma=0.0), "gamma is 0.0, but must be positive"),
        (lambda: Weight(kind="edm", gamma=3.0), "gamma is set, but weight is edm"),
    ],
)
def test_bad_options_are_refused_in_one_sentence(make, message):
    with pytest.raises(ValueError, match=message):
        make()
