"""Convolutions by tiles against PyTorch's own, and that they serve where they are faster and nowhere else."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoencoder import winograd_training
from autoencoder.layers import ResnetBlock
from autoencoder.winograd_training import Conv3x3, Winograd, pays


def passes(convolve: object, *inputs: Tensor) -> list[Tensor]:
    """Output of a convolution, and the gradients of what goes in when another map comes back."""
    made = convolve(*inputs)  # type: ignore[operator]
    back = torch.randn(made.shape, generator=torch.Generator().manual_seed(1)).to(made.dtype)
    return [made, *torch.autograd.grad(made, inputs, back)]


@pytest.mark.parametrize("shape", [(2, 3, 5, 8, 12), (1, 8, 4, 4, 4), (3, 16, 32, 16, 16)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_same_in_all_directions(shape: tuple[int, ...], layout: torch.memory_format) -> None:
    torch.manual_seed(0)
    samples, channels, made, height, width = shape
    x, weight = torch.randn(samples, channels, height, width), torch.randn(made, channels, 3, 3)
    inputs = [part.to(memory_format=layout) for part in (x, weight)] + [torch.randn(made)]
    ours = passes(Winograd.apply, *(part.requires_grad_() for part in inputs))
    exact = [part.detach().double().requires_grad_() for part in inputs]
    wanted = passes(lambda *parts: F.conv2d(*parts, padding=1), *exact)
    for a, b in zip(ours, wanted, strict=True):
        assert a.shape == b.shape and (a - b).abs().max() <= 1e-5 * b.abs().max()
    assert ours[0].is_contiguous(memory_format=torch.channels_last)


def test_it_serves_wide_float32_maps_that_train(monkeypatch: pytest.MonkeyPatch) -> None:
    done = []
    monkeypatch.setattr(winograd_training, "Winograd", spied := type("Spy", (), {}))
    spied.apply = lambda *inputs: done.append(inputs) or F.conv2d(*inputs, padding=1)  # type: ignore[attr-defined]
    block, x = ResnetBlock(64, 96, temb_channels=8), torch.randn(4, 64, 16, 16)
    block(x, torch.randn(4, 8))
    assert [list(inputs[1].shape) for inputs in done] == [[96, 64, 3, 3], [96, 96, 3, 3]]
    with torch.no_grad():
        block(x, torch.randn(4, 8))
    with torch.autocast("cpu", torch.bfloat16):
        block(x, torch.randn(4, 8))
    assert len(done) == 2


@pytest.mark.parametrize("shape", [(64, 64, 4, 14, 16), (64, 64, 64, 4, 4), (32, 64, 64, 16, 16)])
def test_odd_few_or_narrow_maps_go_the_usual_way(shape: tuple[int, ...]) -> None:
    channels, made, samples, height, width = shape
    assert not pays(torch.randn(samples, channels, height, width), Conv3x3(channels, made).weight)


def test_it_starts_as_a_convolution_does() -> None:
    torch.manual_seed(0)
    usual = nn.Conv2d(8, 8, 3, padding=1).state_dict()
    torch.manual_seed(0)
    ours = Conv3x3(8, 8).state_dict()
    assert list(ours) == list(usual) and all(torch.equal(ours[name], usual[name]) for name in usual)
