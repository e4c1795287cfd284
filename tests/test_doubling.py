"""The convolution of a doubled map made of differences, against the convolution of the doubled map."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoencoder.doubling import doubled, pays
from autoencoder.layers import Upsample


def passes(convolve: object, x: Tensor, conv: nn.Conv2d) -> list[Tensor]:
    """Output, and the gradients of map, weight and bias when another map comes back."""
    made = convolve(x, conv)  # type: ignore[operator]
    back = torch.randn(made.shape, generator=torch.Generator().manual_seed(1)).to(made.dtype)
    return [made, *torch.autograd.grad(made, [x, *conv.parameters()], back)]


def direct(x: Tensor, conv: nn.Conv2d) -> Tensor:
    return conv(F.interpolate(x, scale_factor=2, mode="nearest"))


@pytest.mark.parametrize("shape", [(2, 3, 5, 4, 6), (1, 8, 4, 1, 1), (3, 16, 32, 5, 3)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_same_in_all_directions(shape: tuple[int, ...], layout: torch.memory_format) -> None:
    torch.manual_seed(0)
    samples, channels, made, height, width = shape
    conv = nn.Conv2d(channels, made, 3, padding=1).to(memory_format=layout)  # type: ignore[call-overload]
    x = torch.randn(samples, channels, height, width).to(memory_format=layout).requires_grad_()
    ours, wanted = (
        passes(doubled, x, conv),
        passes(direct, x.detach().double().requires_grad_(), conv.double()),
    )
    for a, b in zip(ours, wanted, strict=True):
        assert a.dtype == torch.float32
        assert a.shape == b.shape and (a - b).abs().max() <= 2e-6 * b.abs().max()
    assert ours[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("autocast", [True, False])
def test_in_bf16_it_errs_little_more_than_the_convolution(autocast: bool) -> None:
    torch.manual_seed(0)
    conv, x = nn.Conv2d(32, 48, 3, padding=1), torch.randn(2, 32, 8, 8)
    wanted = passes(direct, x.double().requires_grad_(), conv.double())
    conv, x = (conv.float(), x) if autocast else (conv.bfloat16(), x.bfloat16())
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        ours, theirs = (passes(way, x.requires_grad_(), conv) for way in (doubled, direct))
    for a, b, exact in zip(ours, theirs, wanted, strict=True):
        assert a.dtype == b.dtype and (a - exact).norm() <= 3.5 * (b - exact).norm() <= 0.02 * exact.norm()


def test_it_serves_wide_maps_that_train() -> None:
    layer, x = Upsample(32), torch.randn(1, 32, 4, 4)
    assert pays(x, layer.conv) and not pays(x[:, :16], nn.Conv2d(16, 32, 3, padding=1))
    assert "Doubled" in type(layer(x).grad_fn).__name__
    assert not pays(x.double(), layer.conv)  # its weights are summed up in float32
    assert layer.resized(x, (8, 7)).shape == (1, 32, 8, 7)
    with torch.no_grad():
        assert not pays(x, layer.conv)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        (gradient,) = torch.autograd.grad(layer(x.requires_grad_()).square().sum(), x, create_graph=True)
        gradient.sum().backward()
