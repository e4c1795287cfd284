"""What is drawn depends on the seed, the purpose and the position alone."""

import pytest
import torch

from ldm import random


@pytest.mark.parametrize("seed", [0, 2**32 - 1])
def test_each_row_is_of_its_own_stream(seed: int) -> None:
    positions = torch.tensor([0, 5, 2**40, -1, 5])
    noise, uniform = random.normal(seed, "noise", positions, (2, 3)), random.uniform(seed, "time", positions)
    for row, number, position in zip(noise, uniform, positions.tolist(), strict=True):
        drawn = random.stream(seed, "noise", position).standard_normal((2, 3), dtype="float32")
        assert torch.equal(row, torch.from_numpy(drawn))
        assert number == random.stream(seed, "time", position).uniform()
    assert not torch.equal(noise[0], noise[1]) and torch.equal(noise[1], noise[4])


def test_what_pytorch_draws_is_seeded_as_by_itself() -> None:
    torch.manual_seed(2**63 - 1)
    wanted = torch.rand(4)
    random.seed_torch(2**63 - 1, torch.device("cpu"))
    assert torch.equal(torch.rand(4), wanted)
