"""Muon orthogonalises, AdamW does the rest, and rates follow their curve."""

import copy

import pytest
import torch
from torch import nn

from ldm.checkpoint import join, split
from ldm.optim import OptimizerConfig, make_optimizer, orthogonalise


@pytest.mark.parametrize("shape", [(3, 16, 40), (3, 40, 16), (2, 24, 48)])
def test_orthogonalise_brings_singular_values_near_one(shape: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    singular = torch.linalg.svdvals(orthogonalise(torch.randn(shape)).float())
    assert singular.min() > 0.5 and singular.max() < 1.3


def test_muon_agrees_with_torch_on_a_matrix() -> None:
    torch.manual_seed(0)
    ours = nn.Linear(24, 16, bias=False)
    theirs = copy.deepcopy(ours)
    config = OptimizerConfig(name="muon", lr=0.01, weight_decay=0.1)
    mine = make_optimizer(config, [ours])
    library = torch.optim.Muon(
        theirs.parameters(), lr=0.01, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"
    )
    for _ in range(3):
        x = torch.randn(8, 24)
        for model, optimizer in ((ours, mine), (theirs, library)):
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    moved = (theirs.weight - ours.weight).abs().max() / theirs.weight.abs().max()
    assert moved < 2e-3  # the products are bfloat16's


def test_adamw_is_torch_adamw() -> None:
    torch.manual_seed(0)
    ours = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8))
    theirs = copy.deepcopy(ours)
    mine = make_optimizer(OptimizerConfig(name="adamw", lr=0.01, weight_decay=0.1), [ours])
    groups = [
        {"params": [theirs[0].weight], "weight_decay": 0.1},
        {"params": [theirs[0].bias, *theirs[1].parameters()], "weight_decay": 0.0},
    ]
    library = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.99), fused=True)
    for _ in range(3):
        x = torch.randn(2, 3, 8, 8)
        for model, optimizer in ((ours, mine), (theirs, library)):
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)


def test_embeddings_are_not_orthogonalised() -> None:
    optimizer = make_optimizer(OptimizerConfig(), [nn.Embedding(5, 4), nn.Linear(4, 4)])
    assert [len(group["params"]) for group in optimizer.param_groups] == [1, 2]
    assert [group["muon"] for group in optimizer.param_groups] == [True, False]


def test_rates_warm_up_hold_and_fall_to_zero() -> None:
    config = OptimizerConfig(lr=1.0, warmup=10, decay="linear", decay_from=0.5)
    assert config.rate(0, 100) == pytest.approx(0.1)
    assert config.rate(30, 100) == 1.0
    assert config.rate(75, 100) == pytest.approx(0.5)
    assert config.rate(99, 100) == pytest.approx(0.02)
    rates = [OptimizerConfig(lr=1.0, warmup=1).rate(step, 50) for step in range(50)]
    assert rates == sorted(rates, reverse=True)


@pytest.mark.parametrize(("key", "value"), [("lr", 0.0), ("lr", float("nan")), ("decay_from", 1.0)])
def test_bad_settings_are_named(key: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"optimizer.{key} is {value}"):
        OptimizerConfig(**{key: value})


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_a_reloaded_optimizer_goes_on_bit_for_bit_in_channels_last(name: str) -> None:
    torch.manual_seed(0)
    first = nn.Conv2d(8, 8, 3).to(memory_format=torch.channels_last)
    config = OptimizerConfig(name=name, lr=0.01)
    optimizer = make_optimizer(config, [first])
    inputs = [torch.randn(2, 8, 6, 6) for _ in range(4)]

    def train(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor) -> None:
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    for x in inputs[:2]:
        train(first, optimizer, x)
    second = copy.deepcopy(first)
    reloaded = make_optimizer(config, [second])
    reloaded.load_state_dict(copy.deepcopy(join(*split(optimizer.state_dict()))))
    for x in inputs[2:]:
        train(first, optimizer, x)
        train(second, reloaded, x)
    assert torch.equal(first.weight, second.weight)


def test_an_overflown_fp16_gradient_moves_nothing() -> None:
    layer = nn.Linear(4, 4)
    before = copy.deepcopy(layer.state_dict())
    optimizer = make_optimizer(OptimizerConfig(), [layer])
    for p in layer.parameters():
        p.grad = torch.full_like(p, float("inf"))
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    assert all(torch.equal(before[key], value) for key, value in layer.state_dict().items())


def test_a_tied_weight_moves_once() -> None:
    one, two = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    two.weight = one.weight
    optimizer = make_optimizer(OptimizerConfig(), [nn.ModuleList([one, two])])
    assert [len(group["params"]) for group in optimizer.param_groups] == [1]
