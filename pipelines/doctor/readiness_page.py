"""The readiness report as a page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from ldm.pictures import to_images
from pipelines.doctor.latent_measures import FP16_MAX
from pipelines.doctor.readiness import Findings, Pictures
from pipelines.reports.page import Page
from pipelines.sheets import contact_sheet, side_by_side

WORDS = {
    "good": "These latents are ready for stage 2.",
    "doubtful": "These latents can be trained on, with doubts.",
    "bad": "These latents are not ready for stage 2.",
}
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
        title = WORDS[one.verdict] if len(found) == 1 else f"{one.name}: {WORDS[one.verdict]}"
        page.heading(title)
        for check in one.checks:
            page.verdict(f"{check.name.capitalize()}. {check.sentence}", check.kind)
    page.heading("In figures")
    page.table(["", *(one.name for one in found)], summary([one.figures for one in found]))
    page.text(
        "The probe is the same small denoiser trained for the same steps on each autoencoder's latents. Its figures "
        "say how easily latents are learned, not how good pictures can become: read them beside PSNR, as latents that "
        "hold little are easy to learn."
    )
    page.plot(levels([one.name for one in found], [one.figures for one in found]), LEVELS_CAPTION)
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


LEVELS_CAPTION = (
    "Left: share of the variance of held-out latents that the probe predicts through each level of noise. Grey: "
    "what is predictable from each number alone; the area above it is structure that was found. Right: power of "
    "the latents, and of the pictures shrunk to their size, at each frequency; 1 is white noise."
)


def levels(names: list[str], figures: list[dict[str, Any]]) -> Figure:
    """The probe by noise level, and spectra."""
    probes = [one["probe"] for one in figures if "probe" in one]
    figure = Figure(figsize=(9, 3.4) if probes else (4.5, 3.4), layout="constrained")
    axes = figure.subplots(1, 2 if probes else 1, squeeze=False)[0]
    if probes:
        first = probes[0]
        axes[0].fill_between(first["sigma"], first["pointwise"], color="#bbb", label="from each number alone")
        for name, one in zip(names, probes, strict=True):
            axes[0].plot(one["sigma"], one["explained"], "o-", label=name if len(names) > 1 else "probe")
        axes[0].set(xlabel="noise level sigma", ylabel="share explained", ylim=(None, 1))
        axes[0].legend(frameon=False)
    for name, one in zip(names, figures, strict=True):
        prefix = f"{name}: " if len(names) > 1 else ""
        for kind, style in (("latents", "-"), ("shrunk pictures", ":")):
            of = one["spectra"][kind]
            axes[-1].plot(of["frequency"], of["power"], style, label=prefix + kind)
    axes[-1].axhline(1, color="#bbb", zorder=0)
    axes[-1].set(xlabel="cycles per latent pixel", ylabel="power", yscale="log")
    axes[-1].legend(frameon=False)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    return figure


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
