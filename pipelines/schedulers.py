"""Our (path, prediction, sampler, spacing) as a stock scheduler_config.json, and back.

The table says which diffusers class draws exactly what we draw, at any number of steps. Where none does, the
row is left out and asking for it is an error: there is no EDM class of Heun or UniPC, and FlowMatch classes
have no init_noise_sigma, so that StableDiffusionPipeline can't run them. Nor is a class used that is only
nearly right: DDIMScheduler lands at t - 1000 // steps, which is the next level only if steps divides 1000; instead,
DPM-Solver++ of order 1 is the same sampler. DDPM and Heun have their own idea of zero terminal SNR. Leading VP
spacing is not exported, since StableDiffusionPipeline moves it up by one level. See docs/log.md for each refusal.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ldm.paths import EDM, VP, Flow, Grid, Path, Spacing, vp_betas

DIFFUSERS_VERSION = "0.42.1"  # whose classes the table was compared with


@dataclass(frozen=True, kw_only=True)
class Stock:
    """A diffusers scheduler class that draws exactly as we do."""

    name: str
    spacings: Mapping[Spacing, Mapping[str, Any]]  # of our grid, the usual one first; the keys that say so
    predictions: tuple[str, ...]
    fixed: dict[str, Any] = field(default_factory=dict)
    starts_at_sigma: bool = False  # multiplies the first noise by its sigma; the others by grid.start
    zero_terminal_snr: bool = True  # takes rescale_betas_zero_snr, as we do

    @property
    def spacing(self) -> Spacing:
        """The usual one."""
        return next(iter(self.spacings))


UNREAD = "steps_offset"  # without effect at these spacings; stock pipelines warn of another value than 1
TRAILING: dict[str, Any] = {"timestep_spacing": "trailing", "steps_offset": 1}
UNSPACED: dict[str, Any] = {
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
}
ODE, SDE = {"algorithm_type": "dpmsolver++"}, {"algorithm_type": "sde-dpmsolver++"}
FIRST, SECOND = {"solver_order": 1}, {"solver_order": 2}
ALWAYS = {"thresholding": False, "lower_order_final": True, "final_sigmas_type": "zero"}
DPM = ALWAYS | {"solver_type": "midpoint", "euler_at_final": False, "use_lu_lambdas": False}
UNIPC = ALWAYS | SECOND | {"solver_type": "bh2", "predict_x0": True, "disable_corrector": []}
DDPM = {"variance_type": "fixed_small", "clip_sample": False, "thresholding": False}
EDM_DPM = ALWAYS | {"solver_type": "midpoint", "euler_at_final": False}
AS_TOLD: dict[Spacing, dict[str, Any]] = {"trailing": TRAILING}
SPACED: dict[Spacing, dict[str, Any]] = {
    "trailing": TRAILING | UNSPACED,
    "karras": TRAILING | UNSPACED | {"use_karras_sigmas": True},
    "exponential": TRAILING | UNSPACED | {"use_exponential_sigmas": True},
}
EDM_SPACED: dict[Spacing, dict[str, Any]] = {
    "karras": {"sigma_schedule": "karras"},
    "exponential": {"sigma_schedule": "exponential"},
}


def vp(
    name: str,
    fixed: Mapping[str, Any],
    spacings: Mapping[Spacing, Mapping[str, Any]] = AS_TOLD,
    *,
    sample: bool = True,
    **traits: bool,
) -> Stock:
    """A row of the VP path."""
    predictions: tuple[str, ...] = ("epsilon", "v", "sample") if sample else ("epsilon", "v")
    return Stock(name=name, spacings=spacings, predictions=predictions, fixed=dict(fixed), **traits)


def flow(name: str, spacing: Spacing, fixed: Mapping[str, Any]) -> Stock:
    """A row of the flow path. Stock v_prediction takes alpha^2 + sigma^2 for 1, which it is not there."""
    spaced = {spacing: UNSPACED | {"timestep_spacing": "linspace", "steps_offset": 1}}
    fixed = {"use_flow_sigmas": True} | dict(fixed)
    return Stock(name=name, spacings=spaced, predictions=("flow", "epsilon", "sample"), fixed=fixed)


def edm(name: str, fixed: Mapping[str, Any]) -> Stock:
    """A row of the EDM path."""
    return Stock(name=name, spacings=EDM_SPACED, predictions=("edm", "v"), fixed=dict(fixed))


VP_DPM = DPM | {"use_flow_sigmas": False}
EULER = UNSPACED | {"interpolation_type": "linear", "timestep_type": "discrete", "final_sigmas_type": "zero"}

# Where two samplers are the same one, the name that `from_scheduler_config` gives back comes first.
TABLE: dict[tuple[str, str], Stock] = {
    ("vp", "ddpm"): vp("DDPMScheduler", DDPM, zero_terminal_snr=False),
    ("vp", "ddim"): vp("DPMSolverMultistepScheduler", VP_DPM | FIRST | ODE, SPACED),
    ("vp", "euler"): vp("EulerDiscreteScheduler", EULER, starts_at_sigma=True),
    ("vp", "euler_ancestral"): vp("EulerAncestralDiscreteScheduler", {}, sample=False, starts_at_sigma=True),
    ("vp", "heun"): vp(
        "HeunDiscreteScheduler",
        UNSPACED | {"clip_sample": False},
        starts_at_sigma=True,
        zero_terminal_snr=False,
    ),
    ("vp", "dpmpp_2m"): vp("DPMSolverMultistepScheduler", VP_DPM | SECOND | ODE, SPACED),
    ("vp", "dpmpp_2m_sde"): vp("DPMSolverMultistepScheduler", VP_DPM | SECOND | SDE, SPACED),
    ("vp", "unipc"): vp("UniPCMultistepScheduler", UNIPC | {"use_flow_sigmas": False}, SPACED),
    ("flow", "euler"): flow("DPMSolverMultistepScheduler", "leading", DPM | FIRST | ODE),
    ("flow", "ddim"): flow("DPMSolverMultistepScheduler", "leading", DPM | FIRST | ODE),
    ("flow", "euler_ancestral"): flow("DPMSolverMultistepScheduler", "leading", DPM | FIRST | SDE),
    ("flow", "ddpm"): flow("DPMSolverMultistepScheduler", "leading", DPM | FIRST | SDE),
    ("flow", "dpmpp_2m"): flow("DPMSolverMultistepScheduler", "leading", DPM | SECOND | ODE),
    ("flow", "dpmpp_2m_sde"): flow("DPMSolverMultistepScheduler", "leading", DPM | SECOND | SDE),
    ("flow", "unipc"): flow("UniPCMultistepScheduler", "trailing", UNIPC),
    ("edm", "euler"): edm("EDMEulerScheduler", {"final_sigmas_type": "zero"}),
    ("edm", "ddim"): edm("EDMEulerScheduler", {"final_sigmas_type": "zero"}),
    ("edm", "euler_ancestral"): edm("EDMDPMSolverMultistepScheduler", EDM_DPM | FIRST | SDE),
    ("edm", "ddpm"): edm("EDMDPMSolverMultistepScheduler", EDM_DPM | FIRST | SDE),
    ("edm", "dpmpp_2m"): edm("EDMDPMSolverMultistepScheduler", EDM_DPM | SECOND | ODE),
    ("edm", "dpmpp_2m_sde"): edm("EDMDPMSolverMultistepScheduler", EDM_DPM | SECOND | SDE),
}

PREDICTION_TYPES = {"epsilon": "epsilon", "sample": "sample", "v": "v_prediction", "flow": "flow_prediction"}
EDM_PREDICTION_TYPES = {"edm": "epsilon", "v": "v_prediction"}  # stock EDM classes call F "epsilon"
NEAREST = {"heun": "dpmpp_2m", "unipc": "dpmpp_2m", "vp": "v", "flow": "flow", "edm": "edm"}  # that has a row
BETA_SCHEDULES = {"linear": "linear", "scaled_linear": "scaled_linear", "cosine": "squaredcos_cap_v2"}


def stock(path: Path, sampler: str) -> Stock:
    """The row of the table; ValueError if there is none."""
    row = TABLE.get((path.kind, sampler))
    if row is None:
        known = ", ".join(name for kind, name in TABLE if kind == path.kind)
        nearest = f"; the nearest is {NEAREST[sampler]}" if sampler in NEAREST else ""
        raise ValueError(
            f"sampler {sampler} on path {path.kind} has no exact stock scheduler; choose one of {known}{nearest}"
        )
    return row


def scheduler_config(
    path: Path, prediction: str, sampler: str, spacing: Spacing | None = None
) -> dict[str, Any]:
    """The scheduler_config.json with which stock diffusers draws exactly as `sampler` does here.

    Args:
        spacing: of the grid; by default the sampler's usual one.

    Raises:
        ValueError: no stock class does, for this path, prediction, sampler or spacing.
    """
    row = stock(path, sampler)
    if prediction not in row.predictions:
        raise ValueError(
            f"prediction {prediction} with {sampler} on path {path.kind} has no exact stock scheduler; "
            f"choose one of {', '.join(row.predictions)}; the nearest is {NEAREST[path.kind]}"
        )
    spacing = spacing or row.spacing
    if spacing not in exact_spacings(path, row):
        raise ValueError(
            f"spacing {spacing} with {sampler} on path {path.kind} has no exact stock scheduler; "
            f"choose one of {', '.join(exact_spacings(path, row))}"
        )
    types = EDM_PREDICTION_TYPES if path.kind == "edm" else PREDICTION_TYPES
    config = {
        "_class_name": row.name,
        "_diffusers_version": DIFFUSERS_VERSION,
        "prediction_type": types[prediction],
    }
    return config | row.fixed | dict(row.spacings[spacing]) | path_config(path, row)


def exact_spacings(path: Path, row: Stock) -> list[Spacing]:
    """Those that stock pipelines draw with as we do.

    StableDiffusionPipeline begins at the second of two equal first times, to which karras and exponential spacing
    round on a schedule that is steep at its noisy end.
    """

    def begins_once(spacing: Spacing) -> bool:
        t = path.grid(path.train_steps, spacing).t
        return bool(t[0] != t[1])

    return [spacing for spacing in row.spacings if path.kind != "vp" or begins_once(spacing)]


def path_config(path: Path, row: Stock) -> dict[str, Any]:
    """The keys that say which path it is."""
    if isinstance(path, EDM):
        names = ("sigma_min", "sigma_max", "sigma_data", "rho")
        return {"num_train_timesteps": path.train_steps} | {name: getattr(path, name) for name in names}
    if isinstance(path, Flow):
        if path.shift_tokens is not None:
            raise ValueError(
                "shift_tokens makes the shift depend on the size; export path.at(tokens), for one size"
            )
        return {"num_train_timesteps": path.train_steps, "flow_shift": path.shift}
    assert isinstance(path, VP)
    if path.zero_terminal_snr and not row.zero_terminal_snr:
        raise ValueError(
            f"zero_terminal_snr has no exact counterpart in {row.name}; export another sampler "
            "(euler_ancestral is the same as ddpm)"
        )
    start, end = path.betas
    config = {
        "num_train_timesteps": path.train_steps,
        "beta_start": start,
        "beta_end": end,
        "beta_schedule": BETA_SCHEDULES.get(path.schedule, "linear"),
        "trained_betas": vp_betas(path).tolist() if path.schedule == "sigmoid" else None,
    }
    return config | (
        {"rescale_betas_zero_snr": path.zero_terminal_snr} if row.name != "HeunDiscreteScheduler" else {}
    )


def sampling_grid(path: Path, sampler: str, steps: int, spacing: Spacing | None = None) -> tuple[Grid, float]:
    """The levels that stock visits, and what it multiplies the first noise with; without a row, our own."""
    row = TABLE.get((path.kind, sampler))
    grid = path.grid(steps, spacing or (row.spacing if row else None))
    at_sigma = row and row.starts_at_sigma and spacing in (None, *row.spacings)
    return grid, grid.sigma[0].item() if at_sigma else grid.start


def from_scheduler_config(config: Mapping[str, Any]) -> tuple[Path, str, str, Spacing]:
    """A stock scheduler_config.json => path, prediction, and sampler and spacing that draw exactly as it does.

    How the path is trained on is not in it: those fields have their defaults.

    Raises:
        ValueError: no sampler here does; `path_and_prediction` may still read the rest.
    """
    path, prediction = path_and_prediction(config)
    for (kind, sampler), row in TABLE.items():
        if kind == path.kind and row.name == config["_class_name"]:
            for spacing in exact_spacings(path, row):
                said = row.fixed | dict(row.spacings[spacing])
                if all(config.get(key) == value for key, value in said.items() if key != UNREAD):
                    return path, prediction, sampler, spacing
    raise ValueError(f"no sampler here draws exactly as {config['_class_name']} with this configuration does")


def path_and_prediction(config: Mapping[str, Any]) -> tuple[Path, str]:
    """The path and prediction of a model by its stock scheduler_config.json, whatever the scheduler.

    Raises:
        ValueError: a path or prediction that we do not have.
    """
    name = config.get("_class_name", "")
    steps = config.get("num_train_timesteps", 1000)
    types = EDM_PREDICTION_TYPES if name.startswith("EDM") else PREDICTION_TYPES
    kind = "flow_prediction" if name.startswith("FlowMatch") else config.get("prediction_type", "epsilon")
    if kind not in types.values():
        raise ValueError(f"prediction_type is {kind!r}, which is not supported for {name}")
    prediction = next(ours for ours, theirs in types.items() if theirs == kind)
    if name.startswith("EDM"):
        fields = {
            key: config[key] for key in ("sigma_min", "sigma_max", "sigma_data", "rho") if key in config
        }
        return EDM(**fields), prediction
    if name.startswith("FlowMatch") or config.get("use_flow_sigmas"):
        if steps != Flow.train_steps or config.get("use_dynamic_shifting"):
            raise ValueError("num_train_timesteps other than 1000 and use_dynamic_shifting are not supported")
        return Flow(shift=config.get("flow_shift", config.get("shift", 1.0))), prediction
    return vp_path(config, steps), prediction


def vp_path(config: Mapping[str, Any], steps: int) -> VP:
    """The VP path of a stock configuration; ValueError if its schedule is not one of ours."""
    theirs, trained = config.get("beta_schedule", "linear"), config.get("trained_betas")
    ours = {stock: name for name, stock in BETA_SCHEDULES.items()} | {"sigmoid": "sigmoid"}
    if trained is None and theirs not in ours:
        raise ValueError(f"beta_schedule is {theirs!r}, which is not supported; there are {', '.join(ours)}")
    schedule: Any = "sigmoid" if trained is not None else ours[theirs]
    usual = VP(schedule=schedule).betas
    given = config.get("beta_start", 0.0001), config.get("beta_end", 0.02)
    start, end = (None if schedule == "cosine" or g == u else g for g, u in zip(given, usual, strict=True))
    zero = bool(config.get("rescale_betas_zero_snr", False))
    path = VP(schedule=schedule, beta_start=start, beta_end=end, zero_terminal_snr=zero, train_steps=steps)
    if trained is not None and not (
        len(trained) == steps and torch.allclose(torch.tensor(trained), vp_betas(path), rtol=1e-5, atol=0)
    ):
        raise ValueError("trained_betas follow no schedule that we have")
    return path
