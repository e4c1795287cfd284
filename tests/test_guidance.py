"""Guidance: what it computes, what it costs, and what it refuses."""

import math

import diffusers
import pytest
import torch
from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer, normalized_guidance
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

from ldm.conditioning import Cond
from ldm.denoiser import Denoiser
from ldm.guidance import Guidance, Projection, Threshold, guided
from ldm.paths import EDM, VP, Flow
from ldm.prediction import make_prediction
from ldm.samplers import SAMPLERS

SHAPE = (3, 4, 5, 5)
COND, NULL, NEGATIVE = (Cond(label=torch.full((3,), label)) for label in (3, 0, 7))
OPTIONS = {
    "plain": {},
    "rescale": {"rescale": 0.7},
    "projection": {"projection": Projection(norm=2.0, momentum=-0.5)},
    "interval": {"interval": (0.1, 10.0)},
}


def normal(seed=0, dtype=torch.float32):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=dtype)


class Network:
    """A network that counts its calls and the samples it was shown."""

    def __init__(self, slope=0.3):
        self.slope, self.calls, self.samples = slope, 0, 0

    def __call__(self, x, t, cond):
        self.calls += 1
        self.samples += len(x)
        label = 0 if cond.label is None else cond.label.view(-1, 1, 1, 1) / 10
        return torch.sin(self.slope * x + label) + label * x.roll(1, 3)


def denoiser(path=None, prediction="flow", slope=0.3):
    path = path or Flow()
    return Denoiser(Network(slope), path, make_prediction(prediction, path))


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("sampler", ["dpmpp_2m", "ddpm"])
def test_scale_one_is_no_guidance_bit_for_bit_and_costs_one_pass(options, sampler):
    model, grid, x = denoiser(), Flow().grid(6), normal()
    plain = SAMPLERS[sampler](lambda x, level: model(x, level, COND), x, grid, noise=normal)
    model.network.samples = 0
    found = SAMPLERS[sampler](guided(model, COND, NULL, Guidance(**OPTIONS[options])), x, grid, noise=normal)
    assert torch.equal(found, plain)
    assert (model.network.samples, len(x)) == (6 * 3, 3)


@pytest.mark.parametrize("path", [Flow(), VP(), EDM()], ids=["flow", "vp", "edm"])
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v", "flow", "edm"])
def test_guided_is_the_published_extrapolation_of_outputs_and_of_x0_alike(path, prediction):
    model, x, level = denoiser(path, prediction), normal(dtype=torch.float64), path.grid(7)[3]
    found = guided(model, COND, NULL, 4.0)(x, level)
    assert model.network.calls == 1 and model.network.samples == 6
    to, away = model(x, level, COND), model(x, level, NULL)
    assert torch.allclose(found, away + 4 * (to - away))


def test_a_negative_prompt_takes_the_place_of_the_null_condition():
    model, x, level = denoiser(), normal(), Flow().grid(5)[2]
    found = guided(model, COND, NEGATIVE, 3.0)(x, level)
    to, away = model(x, level, COND), model(x, level, NEGATIVE)
    assert torch.allclose(found, away + 3 * (to - away), atol=1e-5)


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_rescale_is_that_of_stock_pipelines(share):
    path, x = VP(), normal(dtype=torch.float64)
    model, level = denoiser(path, "epsilon"), path.grid(10)[4]
    to, away = model.output(x, level, COND), model.output(x, level, NULL)
    expected = rescale_noise_cfg(away + 5 * (to - away), to, share)
    found = guided(model, COND, NULL, Guidance(scale=5.0, rescale=share))(x, level)
    assert torch.allclose(found, model.to_x0(x, expected, level))


@pytest.mark.parametrize(
    ("interval", "inside"),
    [((0.0, math.inf), 10), ((0.3, 3.0), None), ((0.0, 1e-9), 0), ((0.5, math.inf), None)],
)
def test_interval_costs_two_inside_and_one_outside(interval, inside):
    model, grid = denoiser(), Flow().grid(10)
    ratio = grid.sigma[:-1] / grid.alpha[:-1]
    within = int(((ratio > interval[0]) & (ratio <= interval[1])).sum())
    assert inside in (None, within) and (inside is not None or 0 < within < 10)
    SAMPLERS["euler"](guided(model, COND, NULL, Guidance(scale=3.0, interval=interval)), normal(), grid)
    assert model.network.calls == 10
    assert model.network.samples == 3 * (10 + within)


def test_interval_leaves_the_plain_estimate_outside():
    model, grid, x = denoiser(), Flow().grid(10), normal()
    denoise = guided(model, COND, NULL, Guidance(scale=3.0, interval=(0.3, 3.0)))
    assert torch.equal(denoise(x, grid[0]), model(x, grid[0], COND))
    assert torch.equal(denoise(x, grid[5]), guided(model, COND, NULL, 3.0)(x, grid[5]))


@pytest.mark.parametrize("momentum", [0.0, -0.5])
@pytest.mark.parametrize("norm", [math.inf, 2.0])
@pytest.mark.parametrize("parallel", [0.0, 0.4, 1.0])
def test_projection_is_that_of_diffusers(momentum, norm, parallel):
    model, grid = denoiser(), Flow().grid(5)
    by = Projection(parallel=parallel, norm=norm, momentum=momentum)
    denoise = guided(model, COND, NULL, Guidance(scale=6.0, projection=by))
    buffer = MomentumBuffer(momentum)
    for i in range(3):  # the momentum is felt from the second step on
        x, level = normal(i, torch.float64), grid[i]
        to, away = model(x, level, COND), model(x, level, NULL)
        threshold = 0.0 if norm == math.inf else norm
        expected = normalized_guidance(to, away, 5.0, buffer, parallel, threshold, True)
        assert torch.allclose(denoise(x, level), expected)


def test_full_projection_is_plain_guidance_and_costs_the_same():
    model, x, level = denoiser(), normal(dtype=torch.float64), Flow().grid(5)[1]
    plain = guided(model, COND, NULL, 3.0)(x, level)
    found = guided(model, COND, NULL, Guidance(scale=3.0, projection=Projection(parallel=1.0)))(x, level)
    assert torch.allclose(found, plain)
    assert model.network.calls == 2


def test_autoguidance_moves_away_from_the_weaker_model():
    model, weak, x = denoiser(), denoiser(slope=0.1), normal(dtype=torch.float64)
    level = Flow().grid(5)[2]
    found = guided(model, COND, None, 2.5, weak=weak)(x, level)
    to, away = model(x, level, COND), weak(x, level, COND)
    assert torch.allclose(found, away + 2.5 * (to - away))
    assert (model.network.samples, weak.network.samples) == (6, 6)
    other = guided(model, COND, NEGATIVE, 2.5, weak=weak)(x, level)  # the weak model's own condition
    assert torch.allclose(other, weak(x, level, NEGATIVE) + 2.5 * (to - weak(x, level, NEGATIVE)))


def test_threshold_is_that_of_stock_schedulers_and_scales_with_its_limit():
    x0 = normal(dtype=torch.float64) * torch.tensor([0.1, 1.0, 5.0]).view(3, 1, 1, 1)
    scheduler = diffusers.DDPMScheduler(
        thresholding=True, dynamic_thresholding_ratio=0.9, sample_max_value=1e9
    )
    assert torch.allclose(Threshold(quantile=0.9)(x0), scheduler._threshold_sample(x0))
    assert torch.allclose(Threshold(quantile=0.9, limit=4.0)(4 * x0), 4 * Threshold(quantile=0.9)(x0))
    assert torch.equal(Threshold(limit=1.0)(x0)[:1], x0[:1])


def test_threshold_bounds_the_guided_estimate():
    x, level = normal(), Flow().grid(5)[1]
    wild = guided(denoiser(), COND, NULL, 30.0)(x, level)
    tame = guided(denoiser(), COND, NULL, Guidance(scale=30.0, threshold=Threshold(limit=3.0)))(x, level)
    assert wild.abs().max() > 3.1 and tame.abs().max() <= 3.00001


def test_a_model_that_is_told_nothing_costs_one_pass():
    model, x, level = denoiser(), normal(), Flow().grid(5)[1]
    found = guided(model, Cond(), Cond(), 4.0)(x, level)
    assert torch.equal(found, model(x, level, Cond())) and model.network.samples == 6


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: guided(denoiser(), COND, NULL, math.nan), "guidance scale is nan, but must be finite"),
        (lambda: guided(denoiser(), COND, NULL, math.inf), "guidance scale is inf, but must be finite"),
        (lambda: guided(denoiser(), COND, None, 2.0), "guidance scale is 2.0, but null is None"),
        (lambda: Guidance(rescale=1.5), "rescale is 1.5"),
        (lambda: Guidance(rescale=math.nan), "rescale is nan"),
        (lambda: Guidance(interval=(2.0, 1.0)), "interval is"),
        (lambda: Guidance(interval=(math.nan, 1.0)), "interval is"),
        (lambda: Guidance(rescale=0.5, projection=Projection()), "projection"),
        (lambda: guided(denoiser(), COND, None, 2.0, weak=denoiser(VP(), "v")), "weak has another path"),
        (lambda: Projection(parallel=-1.0), "parallel is -1.0"),
        (lambda: Projection(norm=0.0), "norm is 0.0"),
        (lambda: Projection(momentum=1.0), "momentum is 1.0"),
        (lambda: Threshold(quantile=0.0), "quantile is 0.0"),
        (lambda: Threshold(limit=-1.0), "limit is -1.0"),
    ],
)
def test_bad_guidance_is_refused_in_one_sentence(make, message):
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert "\n" not in str(error.value)
