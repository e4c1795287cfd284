"""The export table, row by row: each class takes its configuration, and it comes back as what it was.

That the classes then draw what we draw is shown by tests/parity.py.
"""

import json
import re

import diffusers
import pytest
import torch

from ldm.paths import EDM, VP, Flow, vp_betas
from ldm.prediction import PREDICTIONS
from ldm.samplers import SAMPLERS
from pipelines.schedulers import (
    TABLE,
    exact_spacings,
    from_scheduler_config,
    path_and_prediction,
    sampling_grid,
    scheduler_config,
)

PATHS = [
    Flow(),
    Flow(shift=2.5),
    *(VP(schedule=schedule) for schedule in ("linear", "scaled_linear", "cosine", "sigmoid")),
    VP(beta_end=0.011),
    VP(schedule="sigmoid", beta_start=0.0002),
    VP(zero_terminal_snr=True),
    EDM(),
    EDM(sigma_data=0.5, sigma_min=0.01, rho=5.0),
]
COMBINATIONS = [
    (path, prediction, sampler, spacing)
    for path in PATHS
    for (kind, sampler), row in TABLE.items()
    for prediction in row.predictions
    for spacing in exact_spacings(path, row)
    if kind == path.kind and (row.zero_terminal_snr or path != VP(zero_terminal_snr=True))
]
SAME = {"ddim": "euler", "ddpm": "euler_ancestral"}  # on flow and EDM paths one class serves both


@pytest.mark.parametrize(("path", "prediction", "sampler", "spacing"), COMBINATIONS)
def test_every_row_is_taken_and_comes_back(path, prediction, sampler, spacing, tmp_path):
    config = json.loads(json.dumps(scheduler_config(path, prediction, sampler, spacing)))
    if spacing == TABLE[path.kind, sampler].spacing:
        assert config == json.loads(json.dumps(scheduler_config(path, prediction, sampler)))
    cls = getattr(diffusers, config["_class_name"])
    scheduler, unused = cls.from_config(config, return_unused_kwargs=True)
    assert all(key.startswith("_") for key in unused)
    known = {key: value for key, value in config.items() if not key.startswith("_")}
    assert {key: scheduler.config[key] for key in known} == known
    scheduler.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "scheduler_config.json").read_text())
    for back in (config, saved):
        expected = sampler if path.kind == "vp" else SAME.get(sampler, sampler)
        assert from_scheduler_config(back) == (path, prediction, expected, spacing)


@pytest.mark.parametrize("kind", ["vp", "flow", "edm"])
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_what_has_no_exact_export_is_refused(kind, sampler, prediction):
    path = {"vp": VP(), "flow": Flow(), "edm": EDM()}[kind]
    row = TABLE.get((kind, sampler))
    if row and prediction in row.predictions:
        return
    with pytest.raises(ValueError, match="has no exact stock scheduler; choose one of") as error:
        scheduler_config(path, prediction, sampler)
    assert sampler in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("path", "prediction", "sampler", "spacing", "message"),
    [
        (Flow(), "flow", "heun", None, "choose one of .*; the nearest is dpmpp_2m"),
        (EDM(), "edm", "unipc", None, "choose one of .*; the nearest is dpmpp_2m"),
        (Flow(), "v", "euler", None, "choose one of flow, epsilon, sample; the nearest is flow"),
        (VP(), "flow", "euler", None, "choose one of epsilon, v, sample; the nearest is v"),
        (VP(), "v", "euler", "karras", "spacing karras with euler on path vp .*; choose one of trailing"),
        (VP(), "v", "dpmpp_2m", "leading", "spacing leading .*; choose one of trailing, karras, exponential"),
        (VP(schedule="cosine"), "v", "unipc", "karras", "choose one of trailing"),
        (VP(zero_terminal_snr=True), "v", "dpmpp_2m", "exponential", "choose one of trailing"),
        (Flow(), "flow", "dpmpp_2m", "karras", "choose one of leading"),
        (EDM(), "edm", "dpmpp_2m", "linspace", "choose one of karras, exponential"),
    ],
)
def test_refusals_name_what_works(path, prediction, sampler, spacing, message):
    with pytest.raises(
        ValueError, match=f"has no exact stock scheduler; .*{message.split('; ')[-1]}$"
    ) as error:
        scheduler_config(path, prediction, sampler, spacing)
    assert re.search(message, str(error.value))


def test_why_spacings_that_round_the_first_times_together_are_not_exported():
    path = VP(zero_terminal_snr=True)
    assert path.grid(30, "karras").t[0] == path.grid(30, "karras").t[1]
    keys = scheduler_config(path, "v", "dpmpp_2m") | {"use_karras_sigmas": True}
    scheduler = diffusers.DPMSolverMultistepScheduler.from_config(keys)
    scheduler.set_timesteps(30)
    scheduler.step(torch.zeros(1), scheduler.timesteps[0], torch.ones(1))
    assert scheduler.step_index == 2, "the first step has been left out"
    with pytest.raises(ValueError, match="no sampler here draws exactly"):
        from_scheduler_config(keys)


def test_why_leading_is_not_exported():
    """StableDiffusionPipeline sets steps_offset, which moves leading times up by one."""
    scheduler = diffusers.EulerDiscreteScheduler(timestep_spacing="leading", steps_offset=1)
    scheduler.set_timesteps(10)
    assert torch.equal(scheduler.timesteps.double(), VP().grid(10, "leading").t[:-1] + 1)


def test_why_edm_has_no_heun_and_no_unipc():
    """Their mathematics are there, but they tell the network an index, where an EDM network is told ln(sigma) / 4."""
    for cls in (diffusers.HeunDiscreteScheduler, diffusers.UniPCMultistepScheduler):
        scheduler = cls(use_karras_sigmas=True)
        scheduler.set_timesteps(5)
        told, sigmas = scheduler.timesteps.double().unique(), scheduler.sigmas[:-1].double().unique()
        assert not torch.allclose(told, sigmas.log() / 4, atol=1.0)


def test_the_pairs_without_a_row():
    pairs = {(kind, sampler) for kind in ("vp", "flow", "edm") for sampler in SAMPLERS}
    assert pairs.difference(TABLE) == {("flow", "heun"), ("edm", "heun"), ("edm", "unipc")}


def test_why_flow_match_classes_are_not_in_the_table():
    for cls in (diffusers.FlowMatchEulerDiscreteScheduler, diffusers.FlowMatchHeunDiscreteScheduler):
        assert not hasattr(cls(), "init_noise_sigma")


def test_why_ddim_is_not_exported_as_its_class():
    scheduler = diffusers.DDIMScheduler(timestep_spacing="trailing")
    scheduler.set_timesteps(7)
    gap = scheduler.timesteps[0] - scheduler.timesteps[1]
    assert gap == 143 and 1000 // 7 == 142  # it lands one level beside the next


@pytest.mark.parametrize("sampler", ["ddpm", "heun"])
def test_zero_terminal_snr_is_refused_where_the_class_differs(sampler):
    with pytest.raises(ValueError, match="zero_terminal_snr has no exact counterpart"):
        scheduler_config(VP(zero_terminal_snr=True), "v", sampler)


def test_a_shift_that_depends_on_size_is_exported_for_one_size():
    path = Flow(shift=2.0, shift_tokens=256)
    with pytest.raises(ValueError, match="shift_tokens makes the shift depend on the size"):
        scheduler_config(path, "flow", "euler")
    assert scheduler_config(path.at(1024), "flow", "euler")["flow_shift"] == 4.0


def test_sampling_grid_is_our_own_where_there_is_no_row():
    grid, scale = sampling_grid(EDM(), "unipc", 5)
    assert len(grid) == 5 and scale == grid.start
    grid, scale = sampling_grid(VP(), "euler", 5)
    assert scale == grid.sigma[0] < 1  # as init_noise_sigma of its class
    assert sampling_grid(VP(), "ddim", 5)[1] == pytest.approx(1.0)


STABLE_DIFFUSION = {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.6.0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
    "clip_sample": False,
}


def test_a_foreign_scheduler_still_tells_the_path():
    assert path_and_prediction(STABLE_DIFFUSION) == (VP(), "epsilon")
    v = STABLE_DIFFUSION | {"prediction_type": "v_prediction", "_class_name": "DDIMScheduler"}
    assert path_and_prediction(v) == (VP(), "v")
    sd3 = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}
    assert path_and_prediction(sd3) == (Flow(shift=3.0), "flow")
    with pytest.raises(ValueError, match="no sampler here draws exactly as PNDMScheduler"):
        from_scheduler_config(STABLE_DIFFUSION)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beta_schedule": "laplace"}, "beta_schedule is 'laplace'"),
        ({"prediction_type": "score"}, "prediction_type is 'score'"),
        ({"trained_betas": [0.1] * 1000}, "trained_betas follow no schedule"),
        (
            {"trained_betas": vp_betas(VP(schedule="sigmoid", train_steps=10)).tolist()},
            "trained_betas follow no",
        ),
        ({"use_flow_sigmas": True, "num_train_timesteps": 500}, "num_train_timesteps other than 1000"),
    ],
)
def test_a_path_that_we_do_not_have_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        path_and_prediction(STABLE_DIFFUSION | change)


@pytest.mark.parametrize(
    "change",
    [
        {"clip_sample": True},
        {"timestep_spacing": "leading"},
        {"variance_type": "learned"},
        {"thresholding": True},
    ],
)
def test_an_option_that_changes_the_drawing_is_not_overlooked(change):
    config = scheduler_config(VP(), "epsilon", "ddpm") | change
    with pytest.raises(ValueError, match="no sampler here draws exactly"):
        from_scheduler_config(config)
