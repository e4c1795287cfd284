"""PatchGAN: tells originals from reconstructions, patch by patch (Isola et al. 2017, section 3.2 and appendix 6.1)."""

from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

SLOPE = 0.2  # of the leaky ReLUs below zero


class Discriminator(nn.Module):
    """Pictures to one logit a patch, positive for originals.

    Normalised in groups, not over the batch as in the paper: statistics over a batch would differ between
    processes, would have to be averaged for evaluation, and would tell originals and reconstructions in one batch
    apart by their mixture.

    Args:
        channels: of the first convolution; they double with each further one, up to eightfold.
        layers: convolutions that halve the resolution. 3 see patches of 70 pixels, 2 of 34, 1 of 16.
    """

    def __init__(self, channels: int, layers: int) -> None:
        super().__init__()
        widths = [channels * min(2**i, 8) for i in range(layers + 1)]
        self.conv_in = nn.Conv2d(3, widths[0], 4, stride=2, padding=1)
        self.convs = nn.ModuleList(
            nn.Conv2d(before, after, 4, stride=2 if i + 1 < layers else 1, padding=1)
            for i, (before, after) in enumerate(pairwise(widths))
        )
        self.norms = nn.ModuleList(nn.GroupNorm(max(1, width // 16), width) for width in widths[1:])
        self.conv_out = nn.Conv2d(widths[-1], 1, 4, padding=1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """[B,3,H,W] in [-1, 1] => logits [B,1,h,w] with h = H / 2^layers - 2."""
        x = F.leaky_relu(self.conv_in(x), SLOPE)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.leaky_relu(norm(conv(x)), SLOPE)
        return self.conv_out(x)
