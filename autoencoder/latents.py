"""The latent contract: latents of mean 0 and standard deviation 1 in every channel, everywhere and for ever.

The statistics of the latents over the whole training set are folded into the autoencoder's own convolutions,
so nobody downstream has a factor to know, apply or forget. Latent models and caches carry the autoencoder's
`store.weight_hash`, and are refused with another one.
"""

from copy import deepcopy
from dataclasses import replace

import torch
from torch import Tensor, nn

from autoencoder.kl import AutoencoderKL, Posterior


class LatentStatistics:
    """Mean and standard deviation of each latent channel over a whole set, accumulated in float64.

    The latents are z ~ N(m, v) with m and v of each image's posterior, so that Var[z] = Var[m] + E[v].

    Attributes:
        sums: [4, C] float64 on the CPU: number of latent pixels, and sums of m, m^2 and v over them. They add
            up over batches and over processes, where one all-reduce of `sums` does what `merge` does.
    """

    def __init__(self, channels: int) -> None:
        self.sums = torch.zeros(4, channels, dtype=torch.float64)

    def update(self, posterior: Posterior) -> None:
        """Add a batch of posteriors [B, C, h, w]."""
        mean, logvar = (moment.detach().cpu().double() for moment in posterior)
        rows = (torch.ones_like(mean), mean, mean.square(), logvar.exp())
        self.sums += torch.stack([row.sum(dim=(0, 2, 3)) for row in rows])

    def merge(self, other: "LatentStatistics") -> None:
        """Add what another process, or another part of the set, has accumulated."""
        self.sums += other.sums

    @property
    def mean(self) -> Tensor:
        """E[z] of each channel: [C] float64; NaN before the first update."""
        return self.sums[1] / self.sums[0]

    @property
    def std(self) -> Tensor:
        """Standard deviation of z of each channel: [C] float64; NaN before the first update."""
        number, _, squares, variances = self.sums
        return ((squares + variances) / number - self.mean.square()).sqrt()


def fold(model: AutoencoderKL, statistics: LatentStatistics) -> AutoencoderKL:
    """A new autoencoder that makes the same pictures through latents (z - mean) / std.

    The encoder's last convolution gives (m - mean) / std and log v - 2 log std; the 1x1 convolution before
    the decoder takes that back. A model without one is given one: the shift cannot go into the decoder's 3x3
    convolution, whose padding at the borders is zeros and not the mean. The new config says
    scaling_factor = 1, shift_factor = 0 and no latents_mean or latents_std.

    Equal to float32 rounding as long as log-variances stay inside the posterior's limits of [-30, 20].

    Raises ValueError if the statistics are of another number of channels, empty, or not finite and positive.
    """
    mean, std = statistics.mean, statistics.std
    channels = model.config.latent_channels
    if len(std) != channels:
        raise ValueError(f"statistics are of {len(std)} channels, but the model's latents have {channels}.")
    for channel, deviation in enumerate(std.tolist()):
        if not 0 < deviation < float("inf"):
            raise ValueError(
                f"channel {channel} of the latents has a standard deviation of {deviation}: the autoencoder's training "
                "has diverged, so that a smaller learning rate is needed, or nothing was measured."
            )
    folded = deepcopy(model)
    folded.config = replace(
        model.config,
        scaling_factor=1.0,
        shift_factor=0.0,
        latents_mean=None,
        latents_std=None,
        use_post_quant_conv=True,
    )
    if folded.post_quant_conv is None:
        folded.post_quant_conv = _identity(channels).to(model.decoder.conv_in.weight)
    last = folded.encoder.conv_out if folded.quant_conv is None else folded.quant_conv
    _affine_after(last, torch.cat([1 / std, torch.ones_like(std)]), torch.cat([-mean / std, -2 * std.log()]))
    _affine_before(folded.post_quant_conv, std, mean)
    return folded


def _identity(channels: int) -> nn.Conv2d:
    conv = nn.Conv2d(channels, channels, 1)
    with torch.no_grad():
        conv.weight.copy_(torch.eye(channels)[:, :, None, None])
        _bias(conv).zero_()
    return conv


@torch.no_grad()
def _affine_after(conv: nn.Conv2d, scale: Tensor, shift: Tensor) -> None:
    """Let `conv` give scale * y + shift where it gave y; scale and shift are [out_channels] float64."""
    conv.weight.copy_(conv.weight.cpu().double() * scale[:, None, None, None])
    _bias(conv).copy_(_bias(conv).cpu().double() * scale + shift)


@torch.no_grad()
def _affine_before(conv: nn.Conv2d, scale: Tensor, shift: Tensor) -> None:
    """Let the 1x1 `conv` give for x what it gave for scale * x + shift, both [in_channels] float64."""
    weight = conv.weight.cpu().double()
    conv.weight.copy_(weight * scale[None, :, None, None])
    _bias(conv).copy_(_bias(conv).cpu().double() + weight[:, :, 0, 0] @ shift)


def _bias(conv: nn.Conv2d) -> Tensor:
    assert conv.bias is not None  # all convolutions here have one; the type does not say so
    return conv.bias
