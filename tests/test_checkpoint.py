"""A checkpoint is whole or not there, and a damaged one is passed over."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from autoencoder.files import require_replaceable, written_beside
from ldm import checkpoint
from ldm.optim import OptimizerConfig, make_optimizer
from tests.support import flip, truncate, zero


def trained() -> dict[str, checkpoint.Stateful]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8))
    optimizer = make_optimizer(OptimizerConfig(), [model])
    for _ in range(2):
        model(torch.randn(2, 3, 8, 8)).square().mean().backward()
        optimizer.step()
    return {"model": model, "optimizer": optimizer}


def save(folder: Path, parts: dict, texts: dict[str, str], keep: int) -> None:
    checkpoint.write(folder, checkpoint.Snapshot(parts), texts, keep)


def test_state_survives_bit_for_bit(tmp_path: Path) -> None:
    before = trained()
    save(tmp_path / "step-1", before, {"note.txt": "x"}, keep=2)
    after = trained()
    for p in after["model"].parameters():
        p.data.zero_()
    after["optimizer"].state.clear()
    checkpoint.restore(tmp_path / "step-1", after)
    for name in before:
        one, other = (checkpoint.split(parts[name].state_dict()) for parts in (before, after))
        assert one[1] == other[1]
        assert all(torch.equal(one[0][key], other[0][key]) for key in one[0] | other[0])


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in range(4):
        save(tmp_path / f"step-{step:08d}", trained(), {}, keep=2)
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["step-00000002", "step-00000003"]


def test_pruning_spares_what_a_run_went_back_to(tmp_path: Path) -> None:
    for step in (1000, 2000, 3000):
        save(tmp_path / f"step-{step:08d}", trained(), {}, keep=9)
    for step in (2000, 3000):
        flip(tmp_path / f"step-{step:08d}" / "model.safetensors")
    save(tmp_path / "step-00001500", trained(), {}, keep=2)
    assert {"step-00001000", "step-00001500"} <= {p.name for p in tmp_path.iterdir()}


@pytest.mark.parametrize("harm", [truncate, flip, zero, Path.unlink])
def test_any_damage_to_any_file_falls_back(tmp_path: Path, harm) -> None:
    good, bad = tmp_path / "step-00000001", tmp_path / "step-00000002"
    save(good, trained(), {"config.yaml": "a: 1"}, keep=2)
    for name in [p.name for p in sorted(good.iterdir())]:
        save(bad, trained(), {"config.yaml": "a: 1"}, keep=2)
        assert checkpoint.newest(tmp_path) == bad
        harm(bad / name)
        with pytest.warns(UserWarning, match="damaged checkpoint"):
            assert checkpoint.newest(tmp_path) == good, name


def test_all_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: set[str] = set()
    sync, rename = os.fsync, os.rename

    def fsync(handle: int) -> None:
        sync(handle)
        synced.add(str(Path(f"/proc/self/fd/{handle}").readlink()))

    def renamed(source: Path, target: Path) -> None:
        missing = {str(path) for path in [source, *Path(source).rglob("*")]} - synced
        assert not missing, missing
        synced.discard(str(Path(target).parent))
        rename(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", renamed)
    parts = trained()
    snapshot = checkpoint.Snapshot(parts, Stock(parts["model"]))
    checkpoint.write(tmp_path / "step-1", snapshot, {"note.txt": "x"}, 2, publish=tmp_path / "model")
    assert str(tmp_path) in synced, "the new name itself is not on the disk"


class Stock:
    """A model that writes a stock folder, with a part in a folder of its own."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network

    def save_pretrained(self, folder: Path) -> None:
        (folder / "unet").mkdir(parents=True)
        save_file(self.network.state_dict(), folder / "unet" / "weights.safetensors")


def test_a_snapshot_is_a_copy_and_stores_what_the_model_has_once(tmp_path: Path) -> None:
    parts = trained()
    model = parts["model"]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    snapshot = checkpoint.Snapshot(parts, Stock(model))
    for p in model.parameters():
        p.data.fill_(7)  # training goes on
    checkpoint.write(tmp_path / "step-1", snapshot, {}, 2, publish=tmp_path / "model")
    checkpoint.restore(tmp_path / "step-1", parts)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not load_file(tmp_path / "step-1" / "model.safetensors")
    stored = "unet/weights.safetensors"
    assert (tmp_path / "step-1" / "model" / stored).samefile(tmp_path / "model" / stored)


def test_a_failed_write_leaves_the_old_folder(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with written_beside(target) as fresh:
        (fresh / "a").write_text("old")
    with pytest.raises(RuntimeError), written_beside(target) as fresh:
        (fresh / "a").write_text("new")
        raise RuntimeError
    assert (target / "a").read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_kill_between_the_two_renames_is_mended(tmp_path: Path) -> None:
    (tmp_path / ".model.old").mkdir()
    (tmp_path / ".model.old" / "a").write_text("old")
    with pytest.raises(RuntimeError), written_beside(tmp_path / "model"):
        raise RuntimeError
    assert (tmp_path / "model" / "a").read_text() == "old"


def test_a_tied_weight_is_kept_once_and_comes_back_in_both_places(tmp_path: Path) -> None:
    model, again = (nn.ModuleList([nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)]) for _ in range(2))
    for one in (model, again):
        one[1].weight = one[0].weight
    save(tmp_path / "step-00000001", {"model": model}, {}, keep=2)
    assert len(load_file(tmp_path / "step-00000001" / "model.safetensors")) == 1
    checkpoint.restore(tmp_path / "step-00000001", {"model": again})
    assert torch.equal(again[1].weight, model[0].weight) and again[1].weight is again[0].weight


def test_only_what_bears_the_mark_is_replaced(tmp_path: Path) -> None:
    thesis = tmp_path / "mine" / "thesis.txt"
    require_replaceable(thesis.parent, "model_index.json")
    thesis.parent.mkdir()
    require_replaceable(thesis.parent, "model_index.json")
    thesis.write_text("precious")
    for taken in (thesis.parent, thesis):
        with pytest.raises(FileExistsError, match="holds something else"):
            require_replaceable(taken, "model_index.json")
    (thesis.parent / "model_index.json").write_text("{}")
    require_replaceable(thesis.parent, "model_index.json")
