"""The readiness report as a page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from ldm.pictures import to_images
from pipelines.doctor.latent_measures import FP16_MAX
from pipelines.doctor.readiness import Findings, Pictures
from pipelines.reports.page import Page
from pipelines.sheets import contact_sheet, side_by_side

COLUMNS = 8
MOST_CHANNELS = 32
"""More are measured, but not shown one by one"""


def write_page(out: Path, found: list[Findings], pictures: Pictures) -> None:
    """One verdict and one section for each autoencoder; what can be compared stands in common tables and plots."""
    page = Page("Are the latents ready?")
    page.text(
        f"{len(pictures.train)} training pictures of {pictures.data.where} at {pictures.data.size} pixels, and "
        f"{len(pictures.held)} held out ({pictures.split})."
    )
    for one in found:
        title = one.sentence if len(found) == 1 else f"{one.name}: {one.sentence}"
        page.heading(title)
        for check in one.checks:
            page.verdict(f"{check.name.capitalize()}. {check.sentence}", check.kind)
    page.heading("In figures")
    page.table(["", *(one.name for one in found)], summary([one.figures for one in found]))
    plots(page, {one.name: one.figures for one in found})
    for one in found:
        details(page, one, f" of {one.name}" if len(found) > 1 else "")
    page.save(out)


def summary(figures: list[dict[str, Any]]) -> list[list[str]]:
    """Rows of the common table."""

    def row(name: str, *keys: str, of: str = "{:.3g}") -> list[str]:
        return [name, *(_cell(one, keys, of) for one in figures)]

    shapes = ["{channels} x {sides[0]} x {sides[1]}, f{factor}".format(**one["shape"]) for one in figures]
    rows = [
        ["latents", *shapes],
        row("PSNR, held out (dB)", "reconstruction", "psnr_db", of="{:.2f}"),
        row("SSIM, held out", "reconstruction", "ssim", of="{:.4f}"),
        row("probe: explained, mean of all noise levels", "probe", "score", of="{:.1%}"),
        row("probe: error removed beyond single numbers", "probe", "gain", of="{:.1%}"),
    ]
    sigmas = sorted({s for one in figures for s in one.get("probe", {}).get("decoded_db", {})})
    rows += [
        row(f"probe: picture seen through noise {s} (dB)", "probe", "decoded_db", s, of="{:.1f}")
        for s in sigmas
    ]
    rows += [
        row(f"picture after noise {s} on latents (dB)", "noise", s, "against_originals_db", of="{:.1f}")
        for s in figures[0]["noise"]
    ]
    rows += [
        row("fine detail in latents", "spectra", "latents", "high_share", of="{:.0%}"),
        row("flatness of their spectrum (white: 1)", "spectra", "latents", "flatness", of="{:.2f}"),
        row(
            "latents turned, decoded, against turned picture (dB)",
            "equivariance_db",
            "quarter turn",
            of="{:.1f}",
        ),
        row(
            "latents halved, decoded, against halved picture (dB)",
            "equivariance_db",
            "half the size",
            of="{:.1f}",
        ),
        row("decoding in bf16 against float32 (dB)", "half_precision", "bf16", "psnr_db", of="{:.1f}"),
        row("decoding in fp16 against float32 (dB)", "half_precision", "fp16", "psnr_db", of="{:.1f}"),
        row("in tiles of pixels", "seams", "tile", of="{}"),
        row(
            "tiled against untiled decoding, tiles alone (dB)",
            "seams",
            "passes",
            "0",
            "decode_db",
            of="{:.1f}",
        ),
        row("with a pass for statistics (dB)", "seams", "passes", "1", "decode_db", of="{:.1f}"),
    ]
    return rows


def _cell(value: Any, keys: tuple[str, ...], of: str) -> str:
    for key in keys:
        if key not in value:
            return "-"
        value = value[key]
    return of.format(value)


ABOUT_PROBE = (
    "The probe is the same small denoiser trained for the same steps on each autoencoder's latents. Its figures "
    "say how easily latents are learned, not how good pictures can become: read them beside PSNR, as latents that "
    "hold little are easy to learn. Its plot shows the share of the variance of held-out latents that it predicts "
    "through each level of noise; grey is what is predictable from each number alone, and the area above it is "
    "structure that was found."
)
ABOUT_SPECTRA = (
    "The spectra are the power of the latents, and of the pictures shrunk to their size, at each frequency; 1 is "
    "white noise."
)


def plots(page: Page, found: dict[str, dict[str, Any]]) -> None:
    """What the probe explains, and spectra, as far as they were measured; figures by the autoencoder's name."""
    probes = {name: figures["probe"] for name, figures in found.items() if "probe" in figures}
    spectra = {name: figures["spectra"] for name, figures in found.items() if figures["spectra"]}
    shown = [(explained(probes), ABOUT_PROBE)] if probes else []
    shown += [(powers(spectra), ABOUT_SPECTRA)] if spectra else []
    for _, about in shown:
        page.text(about)
    page.plots([figure for figure, _ in shown])


def explained(probes: dict[str, dict[str, Any]]) -> Figure:
    """What the probe explains by noise level."""
    figure, axis = _axis("noise level sigma", "share explained")
    first = next(iter(probes.values()))
    axis.fill_between(first["sigma"], first["pointwise"], color="#bbb", label="from each number alone")
    for name, one in probes.items():
        axis.plot(one["sigma"], one["explained"], "o-", label=name if len(probes) > 1 else "probe")
    axis.set_ylim(top=1)
    axis.legend(frameon=False)
    return figure


def powers(spectra: dict[str, dict[str, Any]]) -> Figure:
    """Spectra of latents and of pictures of their size."""
    figure, axis = _axis("cycles per latent pixel", "power")
    for name, one in spectra.items():
        prefix = f"{name}: " if len(spectra) > 1 else ""
        for kind, style in (("latents", "-"), ("shrunk pictures", ":")):
            axis.plot(one[kind]["frequency"], one[kind]["power"], style, label=prefix + kind)
    axis.axhline(1, color="#bbb", zorder=0)
    axis.set_yscale("log")
    axis.legend(frameon=False)
    return figure


def _axis(across: str, up: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(4.6, 3.4), layout="constrained")
    axis = figure.subplots()
    axis.set(xlabel=across, ylabel=up)
    axis.spines[["top", "right"]].set_visible(False)
    return figure, axis


def details(page: Page, one: Findings, of: str) -> None:
    """Pictures, channels, precision and noise of one autoencoder."""
    shown = one.pictures
    page.heading(f"Reconstructions{of}")
    page.picture(rows(shown, "originals", "reconstructions"), "Originals, and below each its reconstruction.")
    page.heading(f"Latents{of}")
    page.picture(
        latent_maps(one.latents.mean[:COLUMNS], shown["originals"]),
        "Each row a picture and the channels of its latents; black is three deviations below 0, white above.",
    )
    page.plot(
        histograms(one),
        "Left: values of each channel; grey is the normal distribution. Right: correlation between channels.",
    )
    statistics = one.figures["channels"]
    cells = zip(*(statistics[key] for key in CHANNEL_KEYS), strict=True)
    page.table(
        ["channel", *CHANNEL_KEYS.values()],
        [[i, *(f"{cell:.3g}" for cell in row)] for i, row in enumerate(cells)][:MOST_CHANNELS],
    )
    page.heading(f"Noise on the latents{of}")
    noisy = [name for name in shown if name.startswith("noise")]
    page.picture(
        rows(shown, "originals", *noisy, count=COLUMNS),
        f"Originals, and what is decoded after {', '.join(noisy)} (in deviations) on the latents.",
    )
    seen = [name for name in shown if name.startswith("estimate")]
    if seen:
        levels_seen = ", ".join(name.removeprefix("estimate ") for name in seen)
        page.picture(
            rows(shown, "originals", *seen, count=COLUMNS),
            f"Originals, and what the probe sees through noise levels {levels_seen}: the last is mostly invented.",
        )
    precision(page, one.figures, of)


CHANNEL_KEYS = {
    "mean": "mean",
    "std": "deviation",
    "noise_share": "share of noise",
    "kurtosis": "excess kurtosis",
    "largest": "largest (deviations)",
}


def rows(shown: dict[str, Tensor], *names: str, count: int = 2 * COLUMNS) -> Image.Image:
    """Pictures of each name one below the other."""
    return side_by_side(*(to_images(shown[name][:count]) for name in names), columns=COLUMNS)


def latent_maps(z: Tensor, originals: Tensor) -> Image.Image:
    """A row for each picture: the picture, then its channels as grey maps."""
    channels = min(z.shape[1], 15)
    grey = (z[:, :channels].clamp(-3, 3) / 3).unsqueeze(2).expand(-1, -1, 3, -1, -1)
    images: list[Image.Image] = []
    for picture, maps in zip(originals, grey, strict=False):
        images += to_images(picture[None])
        images += [m.resize((96, 96), Image.Resampling.NEAREST) for m in to_images(maps)]
    return contact_sheet(images, columns=channels + 1, tile=96)


def histograms(one: Findings) -> Figure:
    """Values of the channels, and their correlation."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    values, matrix = figure.subplots(1, 2, width_ratios=(3, 2))
    grid = torch.linspace(-5, 5, 101)
    normal = torch.exp(-grid.square() / 2) / (2 * torch.pi) ** 0.5
    values.fill_between(grid, normal, color="#ccc")
    for i, channel in enumerate(one.latents.mean.transpose(0, 1).flatten(1)[:MOST_CHANNELS]):
        counts = torch.histc(channel.clamp(-5, 5), bins=100, min=-5, max=5)
        values.stairs(
            counts / counts.sum() * 10, grid, label=str(i) if len(one.latents.mean[0]) <= 8 else None
        )
    values.set(xlabel="value", yticks=[], xlim=(-5, 5))
    values.spines[["top", "right", "left"]].set_visible(False)
    if len(one.latents.mean[0]) <= 8:
        values.legend(title="channel", frameon=False)
    shown = matrix.imshow(one.figures["correlation"], vmin=-1, vmax=1, cmap="RdBu")
    ticks = list(range(0, len(one.figures["correlation"]), 1 + len(one.figures["correlation"]) // 9))
    matrix.set(xlabel="channel", ylabel="channel", xticks=ticks, yticks=ticks)
    figure.colorbar(shown, ax=matrix)
    return figure


def precision(page: Page, figures: dict[str, Any], of: str) -> None:
    """Largest activations, and what half precision does."""
    page.heading(f"Precision{of}")
    results = figures["half_precision"]
    page.text(
        "; ".join(
            f"{name}: {one['psnr_db']:.1f} dB against float32 ({one['how']})" for name, one in results.items()
        )
        + f". force_upcast is {figures['force_upcast']}, by which stock pipelines decode fp16 models in float32."
    )
    largest = sorted(figures["activations"].items(), key=lambda item: -item[1])[:8]
    page.table(
        ["layer with the largest activations", "largest", f"of float16's {FP16_MAX:,.0f}"],
        [[name, f"{value:,.1f}", f"{value / FP16_MAX:.2%}"] for name, value in largest],
    )
