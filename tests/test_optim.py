"""Muon orthogonalises, AdamW does the rest, and rates follow their curve."""

import copy
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import train_vae
from ldm.checkpoint import join, split
from ldm.config import UserError
from ldm.optim import OptimizerConfig, as_judged, make_optimizer, orthogonalise
from tests.support import TOY, newest_weights
from tests.test_chain import _main_until

PACKAGES = {"adamw8bit": ["bitsandbytes"], "schedulefree": ["schedulefree"]}


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


@pytest.mark.parametrize(
    ("key", "value"),
    [("lr", 0.0), ("lr", float("nan")), ("decay_from", 1.0), ("weight_decay", -0.1), ("warmup", -1)],
)
def test_bad_settings_are_named(key: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"optimizer.{key} is {value}"):
        OptimizerConfig(**{key: value})


def test_settings_without_effect_are_refused() -> None:
    with pytest.raises(ValueError, match=r"optimizer.betas are \[2.0, 0.9\]"):
        OptimizerConfig(betas=(2.0, 0.9))
    with pytest.raises(ValueError, match=r"optimizer.decay_from is set, but optimizer.decay is none"):
        OptimizerConfig(decay="none", decay_from=0.5)


@pytest.mark.parametrize("name", ["muon", "adamw", "adamw8bit", "schedulefree"])
def test_a_reloaded_optimizer_goes_on_bit_for_bit_in_channels_last(name: str, tmp_path: Path) -> None:
    for needed in PACKAGES.get(name, ()):
        pytest.importorskip(needed, reason="an optional package")
    torch.manual_seed(0)
    first = nn.Sequential(nn.Conv2d(8, 32, 5), nn.Conv2d(32, 8, 5)).to(memory_format=torch.channels_last)
    config = OptimizerConfig(name=name, lr=0.01, decay="none")
    optimizer = make_optimizer(config, [first])
    inputs = [torch.randn(2, 8, 10, 10) for _ in range(4)]

    def train(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor) -> None:
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    for x in inputs[:2]:
        train(first, optimizer, x)
    second = copy.deepcopy(first)
    reloaded = make_optimizer(config, [second])
    tensors, values = split(optimizer.state_dict())
    save_file(tensors, tmp_path / "optimizer.safetensors")
    reloaded.load_state_dict(
        join(load_file(tmp_path / "optimizer.safetensors"), json.loads(json.dumps(values)))
    )
    for x in inputs[2:]:
        train(first, optimizer, x)
        train(second, reloaded, x)
    assert all(map(torch.equal, first.parameters(), second.parameters()))


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


def test_8_bits_are_near_32() -> None:
    pytest.importorskip("bitsandbytes", reason="an optional package")
    torch.manual_seed(0)
    ours = nn.Linear(128, 128)
    theirs, start = copy.deepcopy(ours), copy.deepcopy(ours)
    pairs = [
        (m, make_optimizer(OptimizerConfig(name=name, lr=1e-3), [m]))
        for m, name in ((ours, "adamw8bit"), (theirs, "adamw"))
    ]
    for _ in range(10):
        x = torch.randn(32, 128)
        for model, optimizer in pairs:
            (model(x) - x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    state = pairs[0][1].state_dict()["state"]
    assert any(value.dtype == torch.uint8 for value in _tensors(state))
    moved = (theirs.weight - start.weight).norm()
    assert (ours.weight - theirs.weight).norm() < 0.1 * moved


def _tensors(state: object) -> list[torch.Tensor]:
    if isinstance(state, dict):
        return [tensor for value in state.values() for tensor in _tensors(value)]
    return [state] if isinstance(state, torch.Tensor) else []


@pytest.mark.parametrize(("name", "packages"), PACKAGES.items())
def test_a_missing_package_is_named(name: str, packages: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, packages[0], None)
    with pytest.raises(UserError, match=f"needs the package {packages[0]}; pip install {packages[0]}"):
        make_optimizer(OptimizerConfig(name=name, decay="none"), [nn.Linear(2, 2)])


def test_schedule_free_refuses_a_schedule() -> None:
    with pytest.raises(ValueError, match=r"optimizer.decay is cosine, but schedulefree"):
        OptimizerConfig(name="schedulefree")


def test_schedule_free_weights_are_read_where_they_are_judged() -> None:
    library = pytest.importorskip("schedulefree", reason="an optional package")
    torch.manual_seed(0)
    ours = nn.Linear(6, 4)
    theirs = copy.deepcopy(ours)
    mine = make_optimizer(
        OptimizerConfig(name="schedulefree", lr=0.01, decay="none", weight_decay=0.0), [ours]
    )
    other = library.AdamWScheduleFree(theirs.parameters(), lr=0.01, betas=(0.9, 0.99))
    other.train()
    for _ in range(5):
        x = torch.randn(8, 6)
        for model, optimizer in ((ours, mine), (theirs, other)):
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        before = ours.weight.clone()
        with as_judged(mine):
            judged = ours.weight.clone()
        torch.testing.assert_close(ours.weight, before, rtol=1e-5, atol=1e-7)
    assert (judged - before).abs().max() > 1e-5
    other.eval()
    torch.testing.assert_close(judged, theirs.weight, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", PACKAGES)
def test_a_run_with_an_optional_optimizer_resumes_bit_for_bit(name: str, tmp_path: Path) -> None:
    if not all(importlib.util.find_spec(package) for package in PACKAGES[name]):
        pytest.skip(f"{PACKAGES[name][0]} is not installed")
    weights = []
    for folder in ("whole", "halves"):
        words = ["--config", str(TOY / "vae.yaml"), "--run.out", str(tmp_path / folder)]
        words += ["--optimizer.name", name, "--optimizer.decay", "none"]
        if folder == "halves":
            with pytest.raises(SystemExit):
                _main_until(train_vae, words, step=4)
        train_vae.main(words)
        weights.append(newest_weights(tmp_path / folder))
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())
