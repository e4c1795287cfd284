"""Noise paths: their levels, training times and grids, and what they refuse."""

import diffusers
import numpy as np
import pytest
import torch

from ldm.paths import EDM, VP, Flow, PathConfig, make_path, stratify

SCHEDULES = ("linear", "scaled_linear", "cosine", "sigmoid")
PATHS = [
    *(VP(schedule=schedule, zero_terminal_snr=zero) for schedule in SCHEDULES for zero in (False, True)),
    Flow(),
    Flow(shift=3.0, times_by="uniform"),
    EDM(),
]
STEPS = (1, 2, 7, 10, 20, 30, 50, 333, 1000)
EDM_LEVELS = {"sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 1.0}
STABLE_DIFFUSION = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_signal_to_noise_falls_strictly_with_time(path):
    t = path.times(torch.linspace(0.001, 0.999, 999, dtype=torch.float64)).unique()
    alpha, sigma = path.levels(t)
    assert ((alpha / sigma).log().diff() < 0).all()


@pytest.mark.parametrize("path", PATHS, ids=str)
@pytest.mark.parametrize("steps", STEPS)
def test_grids_lose_noise_at_every_step_and_end_clean(path, steps):
    for spacing in path.spacings:
        grid = path.grid(steps, spacing)
        assert len(grid) == steps
        assert all(a.dtype == torch.float64 and a.device.type == "cpu" for a in grid[0])
        assert ((grid.sigma / grid.alpha).diff() < 0).all()
        assert grid.sigma[-1] == 0 and grid.alpha[-1] == 1
        assert grid.t.isfinite().all()


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_grid_levels_are_the_path_levels(path):
    """For flow, on a spacing whose times are not cut to whole ones. Pure noise of a VP grid is a hair below it."""
    grid = path.grid(10, "linspace" if path.kind == "flow" else None)
    alpha, sigma = path.levels(grid.t[:-1])
    assert torch.allclose(alpha, grid.alpha[:-1], rtol=1e-5, atol=2**-12 if alpha[0] == 0 else 1e-7)
    assert torch.allclose(sigma, grid.sigma[:-1], rtol=1e-5)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("zero", [False, True])
def test_vp_levels_are_stock_to_the_last_bit(schedule, zero):
    path = VP(schedule=schedule, zero_terminal_snr=zero)
    names = {"cosine": "squaredcos_cap_v2"}
    start, end = path.betas
    scheduler = diffusers.DDPMScheduler(
        beta_schedule=names.get(schedule, schedule),
        beta_start=start,
        beta_end=end,
        rescale_betas_zero_snr=zero,
    )
    alpha, sigma = path.levels(torch.arange(1000, dtype=torch.float64))
    assert torch.equal(alpha.square().float(), scheduler.alphas_cumprod)
    assert torch.allclose(alpha**2 + sigma**2, torch.ones(1000, dtype=torch.float64))
    assert (alpha[-1] == 0) == zero


def stock_ratio(scheduler, steps):
    """What the class tells the network, and its sigma / alpha (or, for a flow, its sigma)."""
    scheduler.set_timesteps(steps)
    return scheduler.timesteps.double(), scheduler.sigmas.double()


VP_CASES = [
    (spacing, cls, {"timestep_spacing": spacing})
    for spacing in ("trailing", "leading", "linspace")
    for cls in ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler")
    if spacing != "linspace"  # they alone do not round it
] + [
    ("trailing", "DPMSolverMultistepScheduler", {"timestep_spacing": "trailing"}),
    ("trailing", "UniPCMultistepScheduler", {"timestep_spacing": "trailing"}),
    ("karras", "DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    ("karras", "UniPCMultistepScheduler", {"use_karras_sigmas": True}),
    ("exponential", "DPMSolverMultistepScheduler", {"use_exponential_sigmas": True}),
    ("exponential", "UniPCMultistepScheduler", {"use_exponential_sigmas": True}),
]


@pytest.mark.parametrize(("spacing", "cls", "options"), VP_CASES)
@pytest.mark.parametrize("zero", [False, True])
def test_vp_grid_is_stock(spacing, cls, options, zero):
    for steps in STEPS:
        scheduler = getattr(diffusers, cls)(**STABLE_DIFFUSION, rescale_betas_zero_snr=zero, **options)
        t, ratio = stock_ratio(scheduler, steps)
        grid = VP(zero_terminal_snr=zero).grid(steps, spacing)
        assert torch.equal(grid.t[:-1], t)
        assert torch.allclose(grid.sigma / grid.alpha, ratio, rtol=2e-7)


@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
@pytest.mark.parametrize("cls", ["DDPMScheduler", "DDIMScheduler"])
def test_vp_times_are_those_of_ddpm_and_ddim(spacing, cls):
    for steps in STEPS:
        scheduler = getattr(diffusers, cls)(timestep_spacing=spacing)
        scheduler.set_timesteps(steps)
        assert torch.equal(VP().grid(steps, spacing).t[:-1], scheduler.timesteps.double())


def test_trailing_has_as_many_steps_as_asked_where_stock_rounds_to_one_more():
    wrong = [n for n in range(1, 1001) if len(np.arange(1000, 0, -1000 / n)) != n]
    assert wrong  # numpy's rounding; diffusers then tells the network t = -1
    for steps in wrong:
        assert len(VP().grid(steps)) == steps


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0])
def test_flow_grid_is_stock(shift):
    path = Flow(shift=shift)
    flow = {"use_flow_sigmas": True, "flow_shift": shift}
    for spacing, scheduler in (
        ("leading", diffusers.DPMSolverMultistepScheduler(**flow)),
        ("trailing", diffusers.UniPCMultistepScheduler(**flow)),
        ("linspace", diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)),
        ("karras", diffusers.FlowMatchEulerDiscreteScheduler(shift=shift, use_karras_sigmas=True)),
        ("exponential", diffusers.FlowMatchEulerDiscreteScheduler(shift=shift, use_exponential_sigmas=True)),
    ):
        for steps in STEPS:
            t, sigma = stock_ratio(scheduler, steps)
            grid = path.grid(steps, spacing)
            assert torch.allclose(grid.sigma, sigma, rtol=2e-7, atol=0)
            assert torch.allclose(grid.t[:-1], t, rtol=2e-7)
            if spacing in ("leading", "trailing"):
                assert torch.equal(grid.t[:-1], t)
                assert torch.equal(grid.sigma, sigma)


@pytest.mark.parametrize("spacing", ["karras", "exponential"])
def test_edm_grid_is_stock(spacing):
    for cls in (diffusers.EDMEulerScheduler, diffusers.EDMDPMSolverMultistepScheduler):
        for steps in STEPS:
            if spacing == "exponential" and steps == 1:
                continue  # stock starts its only step at sigma_min
            t, sigma = stock_ratio(cls(sigma_schedule=spacing, **EDM_LEVELS), steps)
            grid = EDM().grid(steps, spacing)
            assert torch.allclose(grid.sigma, sigma, rtol=1e-5)  # some of stock is in float32
            assert torch.allclose(grid.t[:-1], t, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("strength", [0.05, 0.3, 0.55, 0.8, 1.0])
def test_strength_begins_where_stock_img2img_does(strength):
    scheduler = diffusers.DDIMScheduler(timestep_spacing="trailing")
    pipeline = type("Img2Img", (), {"scheduler": scheduler})()
    for steps in (20, 30, 50):
        scheduler.set_timesteps(steps)
        get = diffusers.StableDiffusionImg2ImgPipeline.get_timesteps
        t, kept = get(pipeline, steps, strength, "cpu")
        part = VP().grid(steps).from_strength(strength)
        assert len(part) == kept and torch.equal(part.t[:-1], t.double())


def test_logit_normal_times_have_their_distribution():
    u = torch.rand(100_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sigma = Flow(logit_mean=0.3, logit_std=0.8).times(u) / 1000
    logit = torch.logit(sigma)
    assert abs(logit.mean() - 0.3) < 0.02 and abs(logit.std() - 0.8) < 0.02
    log_sigma = EDM(log_mean=-0.4, log_std=1.1).times(u) * 4
    assert abs(log_sigma.mean() + 0.4) < 0.02 and abs(log_sigma.std() - 1.1) < 0.02


def test_vp_trains_on_every_level_alike():
    t = VP().times((torch.arange(4000) + 0.5) / 4000)
    assert torch.equal(
        t.bincount() if t.dtype == torch.int64 else t.long().bincount(), torch.full((1000,), 4)
    )
    assert VP().times(torch.tensor([0.0, 1.0])).tolist() == [0.0, 999.0]


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_times_repeat_and_stay_finite(path):
    u = torch.tensor([0.0, 1e-9, 0.25, 0.5, 1 - 1e-7, 1.0])
    assert torch.equal(path.times(u), path.times(u.clone())) and path.times(u).isfinite().all()
    assert all(level.isfinite().all() for level in path.levels(path.times(u)))


def test_stratified_times_have_one_sample_in_each_part():
    u = torch.rand(64, generator=torch.Generator().manual_seed(0))
    parts = (stratify(u, torch.arange(64).flip(0) + 128, 64) * 64).floor()
    assert parts.sort().values.tolist() == list(range(64))


def test_shift_is_the_sd3_rule_and_grows_with_size():
    path = Flow(shift=2.0, shift_tokens=256, times_by="uniform")
    assert path.at(256).shift == 2.0 and path.at(1024).shift == 4.0
    assert Flow(shift=2.0).at(1024).shift == 2.0
    u = torch.tensor([0.25, 0.5])
    assert torch.allclose(path.at(1024).times(u), 1000 * 4 * u / (1 + 3 * u))


def test_the_chosen_kind_is_made_and_others_are_not_ignored():
    assert make_path(PathConfig(kind="vp", vp=VP(schedule="cosine"))) == VP(schedule="cosine")
    assert make_path(PathConfig()) == Flow()
    with pytest.raises(ValueError, match="vp is set, but kind is flow"):
        PathConfig(vp=VP(schedule="linear"))


def test_config_reads_yaml_with_overrides(tmp_path):
    from jsonargparse import ArgumentParser

    parser = ArgumentParser()
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(PathConfig, "path")
    (tmp_path / "c.yaml").write_text("path:\n  kind: vp\n  vp:\n    schedule: linear\n")
    read = parser.parse_args(["--config", str(tmp_path / "c.yaml"), "--path.vp.zero_terminal_snr", "true"])
    made = parser.instantiate_classes(read).path
    assert make_path(made) == VP(schedule="linear", zero_terminal_snr=True)


@pytest.mark.parametrize("path", [VP(), Flow(), EDM()], ids=["vp", "flow", "edm"])
@pytest.mark.parametrize(
    ("steps", "error"),
    [(0, ValueError), (-3, ValueError), (1001, ValueError), (2.5, TypeError), (True, TypeError)],
)
def test_bad_steps_are_refused_by_name_and_value(path, steps, error):
    with pytest.raises(error, match=rf"^steps is {steps}, but must be a whole number from 1 to 1000$"):
        path.grid(steps)


@pytest.mark.parametrize("strength", [0, -0.1, 1.5, float("nan")])
def test_bad_strength_is_refused(strength):
    with pytest.raises(ValueError, match=rf"^strength is {strength}, but"):
        VP().grid(10).from_strength(strength)


def test_strength_that_leaves_no_step_is_refused():
    with pytest.raises(ValueError, match=r"strength 0\.05 of 10 steps leaves none"):
        VP().grid(10).from_strength(0.05)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Flow().grid(10, "karas"), "spacing is 'karas', but path flow has leading, trailing"),
        (lambda: EDM().grid(10, "trailing"), "path edm has karras, exponential"),
        (lambda: Flow(shift=0), "shift is 0"),
        (lambda: Flow(shift=float("nan")), "shift is nan"),
        (lambda: Flow(times_by="uniform", logit_mean=1.0), "logit_mean and logit_std mean nothing"),
        (lambda: Flow(shift_tokens=64).at(0), "tokens is 0"),
        (lambda: VP(schedule="cosine", beta_start=0.1), "mean nothing for schedule cosine"),
        (lambda: VP(beta_start=0.5, beta_end=0.1), "0 < start <= end < 1"),
        (lambda: VP(train_steps=1), "train_steps is 1"),
        (lambda: EDM(sigma_min=2, sigma_max=1), "sigma_min is 2, but must lie below sigma_max 1"),
        (lambda: EDM(rho=-1), "rho is -1"),
    ],
)
def test_bad_options_are_refused_in_one_sentence(make, message):
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert "\n" not in str(error.value)
