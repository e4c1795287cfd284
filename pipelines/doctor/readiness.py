"""Are an autoencoder's latents ready for stage 2? Measurements, a verdict with its reasons, and a page.

`report` measures one autoencoder, or several on the same pictures, and writes FILE.html with FILE.json beside it.
Stage 1 calls it when it ends; `ldm doctor latents` calls it for anything that holds an autoencoder.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from autoencoder.files import write_text
from autoencoder.kl import AutoencoderKL
from autoencoder.metrics import likeness, psnr
from ldm import random
from ldm.checks import require_int
from ldm.config import UserError, plain
from ldm.data import DataConfig, Source, open_source, shown_source
from ldm.inspection import sound
from ldm.pictures import to_tensor
from pipelines.doctor import latent_measures as measures
from pipelines.doctor.latent_measures import BATCH, Coder, Latents
from pipelines.doctor.probe import SHOWN, estimates, train_probe
from pipelines.doctor.readiness_verdict import OVERALL, Check, Kind, checks, overall
from pipelines.latent_diffusion import best_device
from pipelines.stages.stage_one import data_at, data_of, open_autoencoder


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How much is looked at."""

    pictures: int = 1024
    """Training pictures whose latents are measured and given to the probe"""
    held_out: int = 128
    """Held-out pictures that the probe is judged on"""
    decoded: int = 32
    """Of those, pictures that are decoded again and again"""
    probe_steps: int = 400
    """Optimizer steps of the probe; 0: no probe"""

    def __post_init__(self) -> None:
        for name in ("pictures", "held_out", "decoded"):
            require_int(name, getattr(self, name), 2, 2**31)
        require_int("probe_steps", self.probe_steps, 0, 2**31)


@dataclass(frozen=True)
class Pictures:
    """What is looked at, the same for all autoencoders that are compared."""

    data: DataConfig
    source: Source
    train: list[int]
    """Indices in `source`"""
    held: Tensor
    """[N,3,S,S] in [-1, 1]"""
    split: str
    """Where the held-out ones are from, in words"""


@dataclass
class Findings:
    """All that was found of one autoencoder."""

    name: str
    figures: dict[str, Any]
    checks: list[Check]
    latents: Latents
    """Of the held-out pictures"""
    pictures: dict[str, Tensor] = field(default_factory=dict)
    """[decoded,3,S,S] by what they show"""

    @property
    def verdict(self) -> Kind:
        """The worst of the checks."""
        return overall(self.checks)

    @property
    def sentence(self) -> str:
        """The verdict in words."""
        return OVERALL[self.verdict]


def report(
    autoencoders: Mapping[str, AutoencoderKL], data: DataConfig, out: Path, budget: Budget | None = None
) -> list[Findings]:
    """Measure autoencoders on the same pictures, and write `out` (HTML) and the figures beside it (JSON).

    Args:
        autoencoders: by the name that the page shows; each on the device that it is measured on.
        data: the pictures, brought to `data.size`. Held out are those of the test or validation split; where there
            is none, every eighth training picture, which the probe then does not see; the page says so.

    Raises UserError if the data can't be read, ValueError if an autoencoder does not take pictures of that size.
    """
    from pipelines.doctor.readiness_page import write_page

    budget = budget or Budget()
    pictures = choose(data, budget)
    found = [examine(name, model, pictures, budget) for name, model in autoencoders.items()]
    write_page(out, found, pictures)
    about = {
        "data": plain(data),
        "budget": plain(budget),
        "held_out": pictures.split,
        "autoencoders": {
            f.name: f.figures | {"verdict": f.verdict, "checks": [c._asdict() for c in f.checks]}
            for f in found
        },
    }
    write_text(out.with_suffix(".json"), json.dumps(rounded(about), indent=1) + "\n")
    return found


def choose(data: DataConfig, budget: Budget) -> Pictures:
    """Training pictures and held-out ones, evenly spread."""
    source = sound(open_source(data))
    other, split = shown_source(data, None)
    other = source if split == data.split else sound(other)
    rows, held = list(range(len(source))), list(range(len(other)))
    if split != data.split:
        split = f"split {split}"
    elif len(rows) < 16:
        split = f"the training pictures themselves, as there are only {len(rows)}"
    else:
        rows, held = [i for i in rows if i % 8 != 7], rows[7::8]
        split = f"every eighth picture of split {split}, as there is no other; the autoencoder knows them"
    chosen = spread(held, budget.held_out)
    pixels = torch.stack([to_tensor(other.picture(i, data.size)) for i in chosen])
    return Pictures(data, source, spread(rows, budget.pictures), pixels, split)


def spread(rows: Sequence[int], count: int) -> list[int]:
    """At most `count` of them, evenly spread."""
    count = min(count, len(rows))
    return [rows[i * len(rows) // count] for i in range(count)]


def encoded(coder: Coder, pictures: Pictures) -> Latents:
    """Latents of the training pictures."""
    parts = []
    for first in tqdm(
        range(0, len(pictures.train), BATCH), desc="latents", unit="batch", leave=False, disable=None
    ):
        rows = pictures.train[first : first + BATCH]
        pixels = [to_tensor(pictures.source.picture(i, pictures.data.size)) for i in rows]
        parts.append(coder.encode(torch.stack(pixels)))
    return Latents(torch.cat([p.mean for p in parts]), torch.cat([p.std for p in parts]))


def examine(name: str, autoencoder: AutoencoderKL, pictures: Pictures, budget: Budget) -> Findings:
    """Measure everything, and judge it."""
    began, training = time.time(), autoencoder.training
    coder = Coder(autoencoder.eval())
    latents, held = encoded(coder, pictures), coder.encode(pictures.held)
    originals, z = pictures.held[: budget.decoded], held.mean[: budget.decoded]
    made = coder.decode(z)
    shown = {"originals": originals, "reconstructions": made}
    noise, noisy = measures.noise_sensitivity(coder, z, made, originals)
    shown |= {f"noise {s:g}": y for s, y in zip(measures.NOISES, noisy, strict=True)}
    channels, *sides = z.shape[1:]
    figures: dict[str, Any] = {
        "shape": {"factor": autoencoder.config.factor, "channels": channels, "sides": sides},
        "looked_at": {"training": len(pictures.train), "held_out": len(pictures.held), "decoded": len(z)},
        "reconstruction": likeness(made, originals, lpips=None),
        "channels": measures.channel_statistics(latents),
        "correlation": measures.correlation(latents),
        "spectra": measures.spectra(held, pictures.held),
        "activations": measures.activation_maxima(autoencoder, originals[:8]),
        "half_precision": measures.half_precision(coder, z, made),
        "force_upcast": autoencoder.config.force_upcast,
        "noise": noise,
        "equivariance_db": measures.equivariance(coder, z, originals),
        "seams": measures.seams(coder, originals),
    }
    if budget.probe_steps:
        figures["probe"], denoised = probed(coder, latents, held, originals, budget.probe_steps)
        shown |= denoised
    figures["seconds"] = round(time.time() - began, 1)
    autoencoder.train(training)
    return Findings(name, figures, checks(figures), held, shown)


def probed(
    coder: Coder, latents: Latents, held: Latents, originals: Tensor, steps: int
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Figures of the probe, and what pictures become of latents that it has freed of noise."""
    probe, denoiser = train_probe(latents, held, steps, coder.device)
    z = held.mean[: len(originals)]
    noise = random.normal(0, "held-out noise", torch.arange(len(z)), z.shape[1:])
    made = {s: coder.decode(estimates(denoiser, z, noise, s, coder.device)) for s in SHOWN}
    decoded = {f"{s:g}": psnr(y, originals).mean().item() for s, y in made.items()}
    return probe.figures() | {"decoded_db": decoded}, {f"estimate {s:g}": y for s, y in made.items()}


def rounded(value: Any) -> Any:
    """Plain values with floats to five digits, as JSON has them: none for infinities."""
    if isinstance(value, float):
        return float(f"{value:.5g}") if abs(value) < float("inf") else None
    if isinstance(value, Mapping):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list | tuple) else value


def doctor_latents(
    names: Sequence[str],
    path: str | None,
    size: int | None,
    out: Path | None,
    pictures: int,
    probe_steps: int,
) -> None:
    """`ldm doctor latents`: report on autoencoders by their names, and print the verdict.

    Raises UserError where a name, the data or its size is missing or can't be read.
    """
    models = {name: open_autoencoder(name).to(best_device()) for name in dict.fromkeys(names)}
    first = next(iter(models.values()))
    trained = data_of(names[0])
    if path is None and trained is None:
        raise UserError(f"{names[0]} is no stage 1 run, which would say its pictures; name them with --data.")
    side = trained.size if trained else first.config.sample_size
    data = replace(data_at(path, names[0]), size=side if size is None else size)
    out = out or Path(names[0] if trained else ".") / "readiness.html"
    found = report(models, data, out, Budget(pictures=pictures, probe_steps=probe_steps))
    for one in found:
        print(f"{one.name}: {one.verdict}")
        for check in one.checks:
            print(f"  {check.kind:8} {check.sentence}")
    print(f"the page is {out}, its figures are in {out.with_suffix('.json')}")
