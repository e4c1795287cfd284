"""The adversarial loss: who moves whom, its formulas by hand, and two processes."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from autoencoder.adversarial import AdversarialConfig, Adversary, lecam
from autoencoder.discriminator import Discriminator
from autoencoder.kl import AutoencoderConfig, AutoencoderKL
from autoencoder.losses import LossConfig, Objective
from tests.support import TOY, ran

GAN = {"weight": 0.7, "start": 2, "head_start": 1, "ramp": 4, "channels": 8, "layers": 2}


def alone(tensor: Tensor) -> Tensor:
    return tensor


def make(module: nn.Module | None = None, **keys: object) -> Adversary:
    torch.manual_seed(0)
    config = AdversarialConfig(**{**GAN, **keys})
    module = module or Discriminator(config.channels, config.layers)
    return Adversary(config, module, None, module, alone)


def small() -> AutoencoderKL:
    torch.manual_seed(1)
    return AutoencoderKL(AutoencoderConfig(block_out_channels=(8, 16), norm_num_groups=4))


def pictures() -> Tensor:
    return torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(2)) * 2 - 1


@pytest.mark.parametrize("kind", ["hinge", "non-saturating"])
def test_each_step_leaves_no_gradient_in_the_other_network(kind: str) -> None:
    network, adversary, pixels = small(), make(kind=kind, r1=1.0, r1_every=1, lecam=0.1), pictures()
    made, posterior = network(pixels, torch.randn(4, 4, 8, 8))

    loss, _ = adversary.discriminator_loss(pixels, made, step=5)
    loss.backward()
    assert all(p.grad.abs().max() > 0 for p in adversary.module.parameters())
    assert all(p.grad is None for p in network.parameters()) and pixels.grad is None

    adversary.module.zero_grad(set_to_none=True)
    objective = Objective(LossConfig(gan=adversary.config), None, adversary, network.decoder.conv_out.weight)
    loss, terms = objective(pixels, made, posterior, step=5)
    loss.backward()
    assert terms["adaptive"] > 0
    assert all(p.grad is None and p.requires_grad for p in adversary.module.parameters())
    assert all(p.grad is not None for p in network.parameters())


def test_the_adversarial_loss_alone_reaches_the_whole_autoencoder() -> None:
    network, adversary = small(), make()
    made, _ = network(pictures(), torch.randn(4, 4, 8, 8))
    adversary.autoencoder_loss(made).backward()
    untouched = [name for name, p in network.named_parameters() if not p.grad.abs().max() > 0]
    assert not [
        name for name in untouched if not name.endswith("to_k.bias")
    ]  # which a softmax takes out again


def test_the_adaptive_weight_is_the_ratio_of_gradients_at_the_last_layer() -> None:
    """A last layer made = w * x: both gradients can be written down."""
    x, target = torch.tensor([1.0, 2.0]), torch.tensor([0.0, 1.0])
    w = torch.tensor([3.0], requires_grad=True)
    distance = ((w * x - target) ** 2).mean()  # d/dw = mean(2 x (w x - target)) = (6 + 20) / 2 = 13
    fooled = -0.25 * (w * x).mean()  # d/dw = -0.25 * 1.5 = -0.375
    assert make().factor(distance, fooled, w, 2).item() == pytest.approx(13 / 0.375, rel=1e-5)
    assert make(adaptive_max=2.0).factor(distance, fooled, w, 2).item() == 2.0


def test_the_objective_is_the_sum_of_its_weighted_terms() -> None:
    network, adversary, pixels = small(), make(), pictures()
    made, posterior = network(pixels, torch.randn(4, 4, 8, 8))
    config = LossConfig(gan=adversary.config, kl=0.5, kl_warmup=10, reconstruction="l2")
    objective = Objective(config, None, adversary, network.decoder.conv_out.weight)
    assert "adversarial" not in objective(pixels, made, posterior, step=1)[1]
    loss, terms = objective(pixels, made, posterior, step=3)
    by_hand = (pixels - made).square().mean() + 0.5 * 0.4 * posterior.kl().mean() / pixels[0].numel()
    by_hand += 0.7 * 2 / 4 * terms["adaptive"] * -adversary.module(made).mean()  # the second of four steps up
    torch.testing.assert_close(loss, by_hand)


class Slope(nn.Module):
    """Logits a * x, whose gradient is known."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor(3.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.a * x[:, :1]


def test_a_narrow_discriminator_has_second_gradients_in_bf16() -> None:
    network = Discriminator(4, 2).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = torch.randn(1, 3, 128, 128).contiguous(memory_format=torch.channels_last).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        scores = network(x).float().sum()
    (gradient,) = torch.autograd.grad(scores, x, create_graph=True)
    gradient.square().sum().backward()
    assert all(p.grad is not None for name, p in network.named_parameters() if name.endswith("weight"))


def test_r1_is_half_the_squared_gradient_of_originals() -> None:
    pixels, made = torch.full((2, 1, 2, 2), 0.5), torch.full((2, 1, 2, 2), -0.5)
    plain, _ = make(Slope()).discriminator_loss(pixels, made, step=8)
    with_r1, _ = make(Slope(), r1=0.1, r1_every=4).discriminator_loss(pixels, made, step=8)
    skipped, _ = make(Slope(), r1=0.1, r1_every=4).discriminator_loss(pixels, made, step=9)
    # A picture's mean logit has the gradient a / 4 at each of 4 pixels: squared and summed a^2 / 4 = 9 / 4.
    assert with_r1.item() - plain.item() == pytest.approx(0.1 / 2 * 4 * 9 / 4)
    assert skipped.item() == plain.item() == pytest.approx(0.0)  # both logits are beyond the hinge


def test_lecam_pulls_towards_the_other_sides_running_mean() -> None:
    real, fake = torch.tensor([1.0, 3.0]), torch.tensor([-1.0, 0.0])
    distance = lecam(real, fake, torch.tensor(2.0), torch.tensor(-1.0))
    assert distance.item() == pytest.approx((4 + 16) / 2 + (9 + 4) / 2)


def test_a_winner_is_named_once() -> None:
    adversary, one = make(), torch.ones(2, 1, 2, 2)
    assert adversary.verdict(9) is None  # nothing seen yet
    for _ in range(100):
        adversary._judge(one, -one)
    assert "discriminator has won: 100% of its answers are right" in adversary.verdict(9)
    assert adversary.verdict(9) is None and adversary.averages.tolist() == pytest.approx([1, -1, 1])
    resumed = make()
    resumed.load_state_dict(adversary.state_dict())
    assert resumed.verdict(9) is None
    for _ in range(300):
        adversary._judge(one, one)
    assert adversary.verdict(1) is None  # it learns alone
    assert "guesses: 52% of its answers" in adversary.verdict(9)
    for _ in range(100):
        adversary._judge(one, torch.cat([one[:1], -one[:1]]))
    assert adversary.verdict(9) is None


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_a_logit_sees_one_patch(layers: int) -> None:
    network = Discriminator(8, layers)
    x = torch.randn(1, 3, 128, 128, requires_grad=True)
    logits = network(x)
    assert logits.shape[-1] == 128 // 2**layers - 2
    for norm in network.norms:  # statistics are of the whole picture
        norm.forward = alone
    middle = logits.shape[-1] // 2
    network(x)[0, 0, middle, middle].backward()
    assert x.grad.abs().sum(dim=(0, 1, 2)).nonzero().numel() == {1: 16, 2: 34, 3: 70}[layers]


def test_two_processes_give_the_gradients_of_one(tmp_path: Path) -> None:
    """Of both networks, with adaptive weight, R1 and LeCam, at equal global batch."""
    gan = "--loss.gan.weight 0.5 --loss.gan.start 0 --loss.gan.head_start 0 --loss.gan.ramp 1 "
    gan += "--loss.gan.channels 8 --loss.gan.layers 2 --loss.gan.r1 1 --loss.gan.lecam 0.1 "
    flags = f"tests/gradients.py {tmp_path} --config {TOY}/vae.yaml --run.steps 1 {gan}".split()
    for processes in (1, 2):
        ran(*flags, "--run.out", str(tmp_path / str(processes)), processes=processes)
    for network in range(2):
        one, two = (load_file(tmp_path / f"gradients-{n}-{network}.safetensors") for n in (1, 2))
        assert one.keys() == two.keys()
        apart = torch.cat([(one[key] - two[key]).flatten() for key in one]).norm()
        length = torch.cat([one[key].flatten() for key in one]).norm()
        assert length > 0 and apart / length <= 1e-6
