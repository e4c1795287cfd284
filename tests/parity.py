"""Every sampler and network against the diffusers class it corresponds to: `python -m tests.parity`.

Samplers: each side draws on its own, with its own grid, conversion of the network's output and scale of the first
noise; only the network and the noise are shared. Both calculate in float64. Networks: tiny ones with random weights,
which travel by files, in float32. The table says what was compared:

    export       the class and configuration of the export table, used as a stock pipeline uses it
    img2img      the same, begun part-way from a noised picture, as stock image-to-image pipelines do
    converted    the same as export, but the network's output is first converted to a prediction that the class takes
    levels       no class has this path: the one with this sampler is run on our levels
    karras etc.  the same as export, with another spacing of the steps than the usual one
    class        another class of the same mathematics, with its own grid
    forward      a network of ours and theirs with the same weights, saved by one and loaded by the other
    gradient     gradients of all its weights, the largest difference of any
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path as FilePath
from typing import Any
from unittest import mock

import diffusers
import torch
from torch import Tensor

from ldm.conditioning import Cond
from ldm.denoiser import Denoiser
from ldm.paths import EDM, VP, Flow, Grid, Path, Spacing
from ldm.prediction import PREDICTIONS, make_prediction
from ldm.samplers import SAMPLERS, Sampler, ddim
from pipelines.schedulers import TABLE, exact_spacings, sampling_grid, scheduler_config
from tests import test_autoencoder, test_unet, test_vq

BOUND = 1e-5  # largest difference, relative to the largest value
GRADIENT_BOUND = 1e-4  # of the gradients of a network's weights
STEPS = (2, 7, 10, 20, 50)
SHAPE = (2, 4, 6, 6)
PATHS: dict[str, Path] = {
    "flow": Flow(),
    "flow shift 3": Flow(shift=3.0),
    "vp scaled_linear": VP(),
    "vp linear": VP(schedule="linear"),
    "vp cosine": VP(schedule="cosine"),
    "vp sigmoid": VP(schedule="sigmoid"),
    "vp zero-SNR": VP(zero_terminal_snr=True),
    "edm": EDM(),
}
PICTURE = torch.linspace(-1, 1, 288, dtype=torch.float64).sin().view(SHAPE)
ShownNetwork = Callable[[Tensor, Tensor, int], Tensor]  # (scaled x, t, call) -> output


@dataclass(frozen=True)
class Row:
    """One comparison."""

    path: str
    prediction: str
    sampler: str
    steps: int
    scheduler: str
    how: str
    difference: float
    bound: float = BOUND

    def __str__(self) -> str:
        failed = "" if self.difference <= self.bound else "  FAILED"
        return (
            f"{self.path:31}{self.prediction:12}{self.sampler:17}{self.steps or '':5}  {self.scheduler:33}"
            f"{self.how:12}{self.difference:10.1e}  {self.bound:g}{failed}"
        )


def network(x: Tensor, t: Tensor, cond: Cond | None = None) -> Tensor:
    """Some smooth function of all it is given, in place of a trained network; too flat to be chaotic."""
    turn = torch.cos(t.to(x) / 300).view(-1, 1, 1, 1)
    return 0.2 * torch.sin(x) + 0.1 * turn * x.roll(1, 1) - 0.1 * x.roll(1, 3)


def normal(seed: int = 0) -> Callable[..., Tensor]:
    """Standard normal numbers, the same sequence for both sides, whatever they are asked for."""
    generator = torch.Generator().manual_seed(seed)
    return lambda *_, **__: torch.randn(SHAPE, generator=generator, dtype=torch.float64)


def ours(denoiser: Denoiser, sampler: Sampler, grid: Grid, scale: float, strength: float = 1.0) -> Tensor:
    """Draw with our sampler; from PICTURE if strength is below 1."""
    draw, grid = normal(), grid.from_strength(strength)
    x = draw() * scale if strength == 1 else grid.alpha[0] * PICTURE + grid.sigma[0] * draw()
    return sampler(lambda x, level: denoiser(x, level, Cond()), x, grid, noise=draw)


class Double:
    """torch, for a module that would cast to float32."""

    float32 = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def theirs(
    scheduler: Any,
    steps: int,
    shown: ShownNetwork | None = None,
    *,
    levels: Grid | None = None,
    strength: float = 1.0,
    **extra: Any,
) -> Tensor:
    """Draw as a stock pipeline does; on our levels if given; from PICTURE if strength is below 1."""
    draw, module = normal(), type(scheduler).__module__
    shown = shown or (lambda x, t, call: network(x, t.expand(len(x))))
    scheduler.set_timesteps(steps)
    if levels is not None:
        twice = [1, *[scheduler.order] * (steps - 1), 1]  # Heun lists every inner level twice
        scheduler.sigmas = (levels.sigma / levels.alpha).repeat_interleave(torch.tensor(twice))
        scheduler.timesteps = torch.arange(len(scheduler.timesteps)).to(scheduler.timesteps)
    elif hasattr(scheduler, "sigmas"):
        scheduler.sigmas = scheduler.sigmas.double()
    first = (steps - int(steps * strength)) * scheduler.order
    timesteps = scheduler.timesteps[first:]
    if first and hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(first)
    x = draw() * getattr(scheduler, "init_noise_sigma", 1.0) if not first else draw()
    x = scheduler.add_noise(PICTURE, x, timesteps[:1].expand(len(x))) if first else x
    with mock.patch(f"{module}.randn_tensor", draw, create=True), mock.patch(f"{module}.torch", Double()):
        for call, t in enumerate(timesteps):
            scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
            x = scheduler.step(shown(scaled, t, call), t, x, **extra, return_dict=False)[0]
    return x


def converting(denoiser: Denoiser, grid: Grid, taken: str, sigma_data: float, order: int) -> ShownNetwork:
    """The denoiser as a network that predicts what a class takes.

    sigma_data: the class shows x divided by (alpha^2 sigma_data^2 + sigma^2)^1/2, on a flow path x itself.
    """
    prediction = make_prediction(taken, denoiser.path)

    def shown(scaled: Tensor, t: Tensor, call: int) -> Tensor:
        level = grid[(call + order - 1) // order]
        flat = denoiser.path.kind == "flow"
        x = scaled if flat else scaled * ((level.alpha * sigma_data) ** 2 + level.sigma**2).sqrt()
        x0 = denoiser(x, level, Cond())
        return prediction.target(x0, (x - level.alpha * x0) / level.sigma, level.alpha, level.sigma)

    return shown


def difference(a: Tensor, b: Tensor) -> float:
    """Largest difference relative to the largest value; infinite if anything is not finite."""
    value = ((a - b).abs().max() / b.abs().max()).item()
    return value if math.isfinite(value) else math.inf


def exported(
    path: Path, prediction: str, sampler: str, spacing: Spacing | None, steps: int
) -> tuple[str, str, float]:
    """A row of the export table, with any prediction and spacing."""
    row = TABLE[path.kind, sampler]
    taken: Any = prediction if prediction in row.predictions else row.predictions[-1]
    scheduler = getattr(diffusers, row.name).from_config(scheduler_config(path, taken, sampler, spacing))
    grid, scale = sampling_grid(path, sampler, steps, spacing)
    denoiser = Denoiser(network, path, make_prediction(prediction, path))
    sigma_data = path.sigma_data if isinstance(path, EDM) else 1.0
    shown = None if taken == prediction else converting(denoiser, grid, taken, sigma_data, scheduler.order)
    drawn = ours(denoiser, SAMPLERS[sampler], grid, scale)
    how = spacing or ("export" if shown is None else "converted")
    return row.name, how, difference(drawn, theirs(scheduler, steps, shown))


def from_picture(path: Path, prediction: str, sampler: str, steps: int) -> tuple[str, str, float]:
    """A row of the export table as stock image-to-image pipelines use it."""
    row, strength = TABLE[path.kind, sampler], 0.55
    scheduler = getattr(diffusers, row.name).from_config(scheduler_config(path, prediction, sampler))
    denoiser = Denoiser(network, path, make_prediction(prediction, path))
    drawn = ours(denoiser, SAMPLERS[sampler], path.grid(steps, row.spacing), 1.0, strength)
    return row.name, "img2img", difference(drawn, theirs(scheduler, steps, strength=strength))


def on_levels(path: Path, prediction: str, sampler: str, steps: int) -> tuple[str, str, float]:
    """A path that no class has: the class with this sampler, on our levels."""
    name = {"heun": "HeunDiscreteScheduler", "unipc": "UniPCMultistepScheduler"}[sampler]
    scheduler = getattr(diffusers, name)(timestep_spacing="leading")
    grid = path.grid(steps)
    denoiser = Denoiser(network, path, make_prediction(prediction, path))
    shown = converting(denoiser, grid, "epsilon", 1.0, scheduler.order)
    drawn = ours(denoiser, SAMPLERS[sampler], grid, grid.start)
    return name, "levels", difference(drawn, theirs(scheduler, steps, shown, levels=grid))


def flow_match(path: Flow, sampler: str, steps: int) -> tuple[str, str, float]:
    """The FlowMatch classes, whose grid shifts twice at its lower end."""
    name = f"FlowMatch{sampler.capitalize()}DiscreteScheduler"
    denoiser = Denoiser(network, path, make_prediction("flow", path))
    drawn = ours(denoiser, SAMPLERS[sampler], path.grid(steps, "linspace"), 1.0)
    return name, "class", difference(drawn, theirs(getattr(diffusers, name)(shift=path.shift), steps))


def ddim_class(path: VP, prediction: str, eta: float, steps: int) -> tuple[str, str, float]:
    """DDIMScheduler, which lands where it means to with leading spacing."""
    config = scheduler_config(path, prediction, "ddim")
    keys = ("beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type")
    scheduler = diffusers.DDIMScheduler(clip_sample=False, **{key: config[key] for key in keys})
    denoiser = Denoiser(network, path, make_prediction(prediction, path))
    drawn = ours(denoiser, partial(ddim, eta=eta), path.grid(steps, "leading"), 1.0)
    return "DDIMScheduler", "class", difference(drawn, theirs(scheduler, steps, eta=eta))


def rows(paths: dict[str, Path] = PATHS, steps: tuple[int, ...] = STEPS) -> Iterator[Row]:
    """Every comparison on these paths."""
    for name, path in paths.items():
        for n in steps:
            for compared, prediction, sampler in comparisons(path):
                yield Row(name, prediction, sampler, n, *compared(n))


def comparisons(path: Path) -> Iterator[tuple[Callable[[int], tuple[str, str, float]], str, str]]:
    """What is to be compared on a path: (function of the steps, prediction, sampler)."""
    zero = isinstance(path, VP) and path.zero_terminal_snr
    for prediction in PREDICTIONS:
        for sampler in SAMPLERS:
            row = TABLE.get((path.kind, sampler))
            if zero and (prediction == "epsilon" or (row and not row.zero_terminal_snr)):
                continue  # refused, as tests/test_schedulers.py shows
            if row:
                yield partial(exported, path, prediction, sampler, None), prediction, sampler
                if prediction in row.predictions:
                    for spacing in exact_spacings(path, row)[1:]:
                        yield partial(exported, path, prediction, sampler, spacing), prediction, sampler
                if prediction == ("v" if path.kind == "vp" else row.predictions[0]):
                    yield partial(from_picture, path, prediction, sampler), prediction, sampler
            elif path.kind == "edm":
                yield partial(on_levels, path, prediction, sampler), prediction, sampler
    if isinstance(path, Flow):
        for sampler in ("euler", "heun"):
            yield partial(flow_match, path, sampler), "flow", sampler
    if isinstance(path, VP) and not zero:
        for prediction in ("epsilon", "v", "sample"):
            for eta in (0.0, 0.5, 1.0):
                yield partial(ddim_class, path, prediction, eta), prediction, f"ddim eta {eta}"


def network_rows() -> Iterator[Row]:
    """Every network shape that is compared, forward and backward."""
    for module, name in (
        (test_unet, "UNet2DConditionModel"),
        (test_autoencoder, "AutoencoderKL"),
        (test_vq, "VQModel"),
    ):
        for shape in module.SHAPES:
            with tempfile.TemporaryDirectory() as folder:
                forward, gradient = module.parity(shape, FilePath(folder))
            yield Row(shape, "", "", 0, name, "forward", forward)
            yield Row(shape, "", "", 0, name, "gradient", gradient, GRADIENT_BOUND)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--path", choices=[*PATHS, "networks"], help="compare this path, or the networks, only"
    )
    chosen = parser.parse_args().path
    paths = {name: path for name, path in PATHS.items() if chosen in (None, name)}
    failed = count = 0
    heads = f"{'path or network':31}{'prediction':12}{'sampler':17}{'steps':>5}  {'diffusers class':33}"
    print(f"{heads}{'how':12}{'difference':>10}  bound")
    for row in chain(rows(paths), network_rows() if chosen in (None, "networks") else ()):
        count, failed = count + 1, failed + (not row.difference <= row.bound)
        print(row)
    print(f"{count} rows, {failed} over their bound")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
