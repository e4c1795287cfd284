"""What the figures of a readiness report mean, in sentences. Limits stand here and nowhere else."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from pipelines.doctor.latent_measures import FP16_MAX

Kind = Literal["good", "doubtful", "bad"]
KINDS: tuple[Kind, ...] = ("bad", "doubtful", "good")

OFF_MEAN, OFF_STD = (0.05, 0.5), (0.05, 0.5)
"""|mean| and |std - 1| of a channel, less three standard errors: above the first doubtful, above the second bad"""
PSNR_DB = (26.0, 20.0)
"""Of reconstructions: below the first doubtful, below the second bad"""
NOISE_SHARE = 0.9
"""Of a channel's variance that is the posterior's own noise: above it, the channel is dead"""
KURTOSIS, LARGEST = 10.0, 15.0
"""Tails above which a channel is doubtful"""
CORRELATION = 0.9
"""Between two channels, above which they say the same"""
WHITENESS = 0.6
"""Share of the variance of latents above a quarter of a cycle per pixel; 0.8 is white noise"""
MARGIN = 4.0
"""By which activations must stay below the largest float16 number: the pictures seen are few"""
UNSEEN_DB = 40.0
"""PSNR of half against full precision above which nobody sees a difference"""
FRAGILE_DB = 22.0
"""PSNR of decoding with and without noise of a tenth of a deviation, below which decoding is fragile"""
GAIN = (0.3, 0.1)
"""Of the probe: below the first doubtful, below the second bad"""


OVERALL: dict[Kind, str] = {
    "good": "These latents are ready for stage 2.",
    "doubtful": "These latents can be trained on, with doubts.",
    "bad": "These latents are not ready for stage 2.",
}


class Check(NamedTuple):
    """One judgement."""

    name: str
    kind: Kind
    sentence: str


def checks(figures: dict[str, Any]) -> list[Check]:
    """All judgements on the figures of `readiness.examine`, the worst first."""
    found = [judge(figures) for judge in JUDGES]
    if figures["spectra"]:
        found.append(whiteness(figures))
    if "probe" in figures:
        found.append(probe(figures))
    return sorted(found, key=lambda check: KINDS.index(check.kind))


def overall(found: list[Check]) -> Kind:
    """The worst of them."""
    return next(kind for kind in KINDS if any(check.kind == kind for check in found))


def contract(figures: dict[str, Any]) -> Check:
    channels = figures["channels"]
    if not all(math.isfinite(x) for x in channels["mean"] + channels["std"]):
        return Check("contract", "bad", "Latents are not finite: the autoencoder's training has failed.")
    mean, std = (
        max(abs(x - wanted) - 3 * error for x, error in zip(channels[of], channels[errors], strict=True))
        for of, wanted, errors in (("mean", 0.0, "mean_error"), ("std", 1.0, "std_error"))
    )
    if mean <= OFF_MEAN[0] and std <= OFF_STD[0]:
        return Check("contract", "good", "Every channel has mean 0 and standard deviation 1, but for chance.")
    kind: Kind = "doubtful" if mean <= OFF_MEAN[1] and std <= OFF_STD[1] else "bad"
    return Check(
        "contract",
        kind,
        f"Channels are off mean 0 by {max(0.0, mean):.2f} and off standard deviation 1 by {max(0.0, std):.2f}, beyond "
        "chance: noise levels mean something else in each; fold the statistics in, as stage 1 does at its end.",
    )


def reconstruction(figures: dict[str, Any]) -> Check:
    db = figures["reconstruction"]["psnr_db"]
    if db >= PSNR_DB[0]:
        return Check("reconstruction", "good", f"Held-out pictures come back at {db:.1f} dB.")
    kind: Kind = "doubtful" if db >= PSNR_DB[1] else "bad"
    return Check(
        "reconstruction",
        kind,
        f"Held-out pictures come back at only {db:.1f} dB, and no latent model draws better than that: train longer, "
        "or with more channels or a smaller factor.",
    )


def dead(figures: dict[str, Any]) -> Check:
    shares = figures["channels"]["noise_share"]
    gone = [i for i, share in enumerate(shares) if not share <= NOISE_SHARE]
    if not gone:
        return Check(
            "dead channels",
            "good",
            f"All {len(shares)} channels carry information (noise {max(shares):.1%} at most).",
        )
    return Check(
        "dead channels",
        "bad" if 2 * len(gone) >= len(shares) else "doubtful",
        f"{len(gone)} of {len(shares)} channels ({', '.join(map(str, gone[:8]))}{', ...' * (len(gone) > 8)}) are noise "
        "that a latent model learns for nothing: lower the KL weight, or use fewer channels.",
    )


def tails(figures: dict[str, Any]) -> Check:
    kurtosis, largest = max(figures["channels"]["kurtosis"]), max(figures["channels"]["largest"])
    if kurtosis <= KURTOSIS and largest <= LARGEST:
        return Check("tails", "good", f"No latent is further than {largest:.1f} deviations from its mean.")
    return Check(
        "tails",
        "doubtful",
        f"Latents have long tails (up to {largest:.1f} deviations, excess kurtosis {kurtosis:.1f}), which a latent "
        "model reaches late: a larger KL weight shortens them.",
    )


def redundancy(figures: dict[str, Any]) -> Check:
    rows = figures["correlation"]
    pairs = [(abs(r), i, j) for i, row in enumerate(rows) for j, r in enumerate(row[:i])]
    worst, i, j = max(pairs, default=(0.0, 0, 0))
    if worst <= CORRELATION:
        return Check(
            "correlation", "good", f"No two channels say the same (correlation {worst:.2f} at most)."
        )
    return Check(
        "correlation",
        "doubtful",
        f"Channels {j} and {i} are correlated by {worst:.2f}: fewer channels would say as much.",
    )


def whiteness(figures: dict[str, Any]) -> Check:
    high = figures["spectra"]["latents"]["high_share"]
    shrunk = figures["spectra"]["shrunk pictures"]["high_share"]
    about = f"{high:.0%} of the latents' variance is fine detail (pictures of that size {shrunk:.0%}, white noise 80%)"
    if high <= WHITENESS:
        return Check("spectrum", "good", f"{about}.")
    return Check(
        "spectrum",
        "doubtful",
        f"{about}: neighbours say little about each other, which is hard to learn; try equivariance in stage 1.",
    )


def half(figures: dict[str, Any]) -> Check:
    layer, largest = max(figures["activations"].items(), key=lambda item: item[1])
    results = figures["half_precision"]
    bf16, fp16 = results["bf16"]["psnr_db"], results["fp16"]["psnr_db"]
    room = f"the largest activation is {largest:,.0f} of {FP16_MAX:,.0f}, in {layer}"
    safe = largest * MARGIN < FP16_MAX and results["fp16"]["finite"] and fp16 >= UNSEEN_DB
    if bf16 >= UNSEEN_DB and safe:
        sentence = (
            f"Decoding in bf16 ({bf16:.0f} dB against float32) and fp16 ({fp16:.0f} dB) is safe: {room}."
        )
        return Check("half precision", "good", sentence)
    advice = "decode in float32" if bf16 < UNSEEN_DB else "decode in bf16 or float32"
    if safe:
        advice = "decode in fp16 or float32"
    sentence = (
        f"Not every half precision is safe (bf16 {bf16:.0f} dB, fp16 {fp16:.0f} dB against float32; {room}): "
    )
    return Check("half precision", "doubtful", f"{sentence}{advice}.")


def robustness(figures: dict[str, Any]) -> Check:
    db = figures["noise"]["0.1"]["against_decoding_db"]
    if db >= FRAGILE_DB:
        sentence = (
            f"Pictures survive noise of a tenth of a deviation on the latents: {db:.1f} dB against none."
        )
        return Check("noise", "good", sentence)
    return Check(
        "noise",
        "doubtful",
        f"Noise of a tenth of a deviation on the latents leaves {db:.1f} dB of likeness: small mistakes of a latent "
        "model will show; a larger KL weight makes decoding sturdier.",
    )


def probe(figures: dict[str, Any]) -> Check:
    found = figures["probe"]
    gain, score, steps = found["gain"], found["score"], found["steps"]
    removed = f"{gain:.0%}" if gain > 0 else "none"
    about = (
        f"a small denoiser explains {score:.0%} of held-out latents after {steps} steps, and removes {removed} of the "
        "error that treating each number alone would leave"
    )
    if gain >= GAIN[0]:
        return Check("probe", "good", f"The latents are learnable: {about}.")
    kind: Kind = "doubtful" if gain >= GAIN[1] else "bad"
    return Check("probe", kind, f"The latents are hard to learn: {about}.")


JUDGES: tuple[Callable[[dict[str, Any]], Check], ...] = (
    contract,
    reconstruction,
    dead,
    tails,
    redundancy,
    half,
    robustness,
)
"""Of what is always measured"""
