"""The parts of an evaluation: shares of processes, kept features, nearest pictures, scores of single pictures."""

import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("torch_fidelity", reason="the figures are torch-fidelity's")

from accelerate import PartialState

from ldm.data import DataConfig, open_source
from ldm.scenes import Scenes
from pipelines.evaluation import references
from pipelines.evaluation.extractors import open_extractor
from pipelines.evaluation.generation import Share, bytes_of, spread_out
from pipelines.evaluation.memorisation import Near, find_copies, nearer, nearest
from pipelines.evaluation.references import features_of
from pipelines.evaluation.scores import ATTRIBUTES, likeness, of_scenes
from tests.support import SIDE


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_shares_are_all_of_it_once(processes: int) -> None:
    shares = []
    for rank in range(processes):
        state = SimpleNamespace(process_index=rank, num_processes=processes)
        shares.append(Share(state, 17, 4).rows)
    assert sorted(torch.cat(shares).tolist()) == list(range(17))
    with pytest.raises(ValueError, match="the number of pictures is"):
        Share(SimpleNamespace(process_index=0, num_processes=processes), processes - 1, 4)


def test_what_pictures_are_told_is_spread_over_the_data() -> None:
    assert spread_out(3, 10) == [0, 3, 6] and spread_out(5, 2) == [0, 1, 0, 1, 0]


def test_features_are_kept_until_the_pictures_change(
    pictures: Path, classifier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extractor = open_extractor(str(classifier), torch.device("cpu"))
    state, size = PartialState(cpu=True), (SIDE, SIDE)
    source = open_source(DataConfig(path=str(pictures)), "test")
    first = features_of(source, size, extractor, state, tmp_path)
    monkeypatch.setattr("pipelines.evaluation.references.pixels_of", lambda *_: pytest.fail("read again"))
    again = features_of(open_source(DataConfig(path=str(pictures)), "test"), size, extractor, state, tmp_path)
    assert torch.equal(first.features, again.features) and torch.equal(first.logits, again.logits)
    monkeypatch.undo()
    features_of(source.chosen(range(10)), size, extractor, state, tmp_path)
    assert len([*tmp_path.glob("*.safetensors")]) == 2
    for kept in tmp_path.glob("*.safetensors"):
        kept.write_bytes(b"damaged")
    assert torch.equal(features_of(source, size, extractor, state, tmp_path).features, first.features)


def test_two_runs_may_keep_the_same_features_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    columns, file = [torch.ones(2, 3)], tmp_path / "f.safetensors"

    def other_run(path: Path) -> None:
        monkeypatch.undo()
        child = os.fork()
        if not child:
            references._write(file, columns)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0

    monkeypatch.setattr("pipelines.evaluation.references.flush", other_run)
    references._write(file, columns)
    assert [path.name for path in tmp_path.iterdir()] == ["f.safetensors"]


def test_the_nearest_are_found_in_batches_and_mirrored(pictures: Path) -> None:
    rng = torch.Generator().manual_seed(0)
    others, real = torch.randn(5, 6, generator=rng), torch.randn(130, 6, generator=rng)
    found = nearest(others, ([part] for part in real.split(40)))
    distances = torch.cdist(others, real)
    assert torch.equal(found.indices[:, 0], distances.argmin(1))
    assert torch.allclose(found.distances, distances.sort(1).values[:, :50], atol=1e-5)
    source = open_source(DataConfig(path=str(pictures)), "train")
    copy = source.picture(3, 32).transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    assert find_copies([copy], source).nearest == (3,)


def test_copies_are_nearer_than_held_out_pictures() -> None:
    def near(*distances: float) -> Near:
        return Near(torch.tensor(distances)[:, None], torch.zeros(len(distances), 1, dtype=torch.int64))

    held = near(1.0, 2.0, 3.0, 4.0)
    assert nearer(near(0.5, 2.5, 9.0), held).tolist() == [1.0, 0.5, 0.0]
    rng = np.random.default_rng(0)
    alike = nearer(near(*rng.uniform(size=500)), near(*rng.uniform(size=500)))
    assert abs(alike.mean().item() - 0.5) < 0.05


def test_equal_pictures_have_a_figure_that_a_file_can_hold() -> None:
    same = torch.ones(2, 3, 16, 16)
    assert likeness(same, same, None)["psnr"].tolist() == [100.0, 100.0]


def test_true_scenes_satisfy_their_captions_and_shuffled_ones_do_not() -> None:
    scenes = Scenes(24, size=64, split="test")
    captions = [scenes.scene(i).caption() for i in range(24)]
    pixels = bytes_of([scenes[i]["image"] for i in range(24)])
    true = of_scenes(pixels, captions)
    assert true[:, 0].mean() >= 0.98
    assert true[:, ATTRIBUTES.index("relation")].isnan().all()  # of two things, and here is one
    assert of_scenes(pixels, captions[1:] + captions[:1])[:, 0].mean() < 0.1
