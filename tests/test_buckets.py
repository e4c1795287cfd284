"""Buckets: sizes of like area, each batch of one size, every picture once an epoch but for a stated remainder."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import train_ldm
import train_vae
from autoencoder.kl import AutoencoderConfig, AutoencoderKL
from ldm import cache, random
from ldm.buckets import Buckets, assign, sizes_for
from ldm.conditioning import Unconditional
from ldm.config import UserError
from ldm.data import DataConfig, open_source
from ldm.sampling import Pixels, Stream
from tests.support import TOY, losses
from tests.test_cache import run_of

SHAPES = [(40, 40)] * 11 + [(60, 36)] * 7 + [(30, 50)] * 6 + [(90, 20)]


@pytest.mark.parametrize(("side", "step"), [(64, 16), (64, 8), (512, 64), (16, 4)])
def test_sizes_are_multiples_of_like_area(side: int, step: int) -> None:
    sizes = sizes_for(side, step)
    assert (side, side) in sizes and len(set(sizes)) == len(sizes)
    assert {(h, w) for w, h in sizes} == set(sizes) or step > side // 8  # coarse steps round one way
    for w, h in sizes:
        assert w % step == h % step == 0 and max(w / h, h / w) <= 2
        assert side * side - max(w, h) * step < w * h <= side * side


def test_pictures_go_to_the_nearest_size_that_fills_a_batch() -> None:
    pictures, sizes = np.array(SHAPES), [(16, 16), (20, 12), (12, 20), (22, 11)]
    for least in (1, 4, 7, 12, 25):
        given = Counter(map(tuple, assign(pictures, sizes, least).tolist()))
        assert sum(given.values()) == len(SHAPES) and min(given.values()) >= least
    assert Counter(map(tuple, assign(pictures, sizes, 4).tolist())) == {
        (16, 16): 11,
        (20, 12): 8,
        (12, 20): 6,
    }
    with pytest.raises(UserError, match=r"25 pictures don't fill a batch"):
        assign(pictures, sizes, 26)


def positions(batch: int = 4, start: int = 0, stop: int = 60, ranks: int = 1, seed: int = 0) -> list:
    sizes = assign(np.array(SHAPES), sizes_for(16, 4), 4)
    buckets = Buckets(np.arange(len(SHAPES)), sizes, 4)
    streams = [
        Stream(buckets, seed=seed, batch=batch // ranks, start=start, stop=stop, rank=r, ranks=ranks)
        for r in range(ranks)
    ]
    return [item for parts in zip(*streams, strict=True) for part in parts for item in part]


def test_batches_are_of_one_size_and_epochs_complete_but_for_the_remainder() -> None:
    sizes = assign(np.array(SHAPES), sizes_for(16, 4), 4)
    seen = [index for _, index in positions()]
    for first in range(0, 60, 4):
        assert len({tuple(sizes[i]) for i in seen[first : first + 4]}) == 1
    length = len(Buckets(np.arange(len(SHAPES)), sizes, 4))
    members = Counter(map(tuple, sizes.tolist()))
    assert length == sum(count // 4 * 4 for count in members.values()) and length < len(SHAPES)
    epochs = [seen[first : first + length] for first in range(0, 60 - length, length)]
    for epoch in epochs:
        assert len(set(epoch)) == length
    left = [frozenset(range(len(SHAPES))) - set(epoch) for epoch in epochs]
    assert len(set(left)) > 1 and len(epochs) > 1


def test_order_is_a_function_of_seed_and_position() -> None:
    assert positions(ranks=2) == positions() == positions(ranks=4)
    assert positions(batch=2) == positions()  # run.accumulate 2
    assert positions(start=28) == positions()[28:]
    assert positions(seed=1) != positions()


def paint(folder: Path) -> DataConfig:
    noise = np.random.default_rng(0)
    folder.mkdir()
    for i, (w, h) in enumerate(SHAPES):
        Image.fromarray(noise.integers(0, 256, (h, w, 3), dtype=np.uint8)).save(folder / f"{i:02d}.png")
    return DataConfig(path=str(folder), size=16, bucket_step=4, flip=True)


def test_cached_latents_of_buckets_are_those_of_their_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "SHARD", 4)
    data = paint(tmp_path / "data")
    source = open_source(data)
    source.sizes = assign(np.array(SHAPES), sizes_for(16, 4), 4)
    torch.manual_seed(0)
    config = AutoencoderConfig(block_out_channels=(8, 16), norm_num_groups=4, sample_size=16)
    autoencoder = AutoencoderKL(config).eval().requires_grad_(False)
    latents = cache.build(tmp_path / "cache", source, data, autoencoder, Unconditional(), run_of())
    pixels = Pixels(source, data, 3)
    for first in range(0, 60, 4):
        items = positions()[first : first + 4]
        cached, seen = latents.__getitems__(items), pixels.__getitems__(items)["pixels"]
        posterior = autoencoder.encode(seen)
        assert cached["mean"].shape[2:] == tuple(side // 2 for side in seen.shape[2:])
        torch.testing.assert_close(cached["mean"], posterior.mean, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(cached["std"], posterior.std, rtol=1e-5, atol=1e-5)
    assert len({tuple(part["mean"].shape[3:]) for part in latents.latents}) > 1
    assert 0 < (random.uniform(3, "flip", torch.arange(60)) < 0.5).sum() < 60


def test_both_stages_train_on_pictures_of_many_shapes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = paint(tmp_path / "data")
    shared = f"--data.path {data.path} --data.bucket_step 4 --run.steps 8"
    train_vae.main(
        f"--config {TOY}/vae.yaml --data.scenes.count 8192 {shared} --run.out {tmp_path}/vae".split()
    )
    train_ldm.main(
        f"--config {TOY}/ldm-plain.yaml --conditioning.kind none {shared} --autoencoder {tmp_path}/vae "
        f"--run.out {tmp_path}/ldm".split()
    )
    said = capsys.readouterr().err
    assert said.count("16x16: 11 pictures") == 2
    for stage in ("vae", "ldm"):
        assert len(losses(tmp_path / stage)) == 8 and all(np.isfinite(losses(tmp_path / stage)))
    with pytest.raises(SystemExit):
        train_vae.main(
            f"--config {TOY}/vae.yaml --data.scenes.count 8192 {shared} --data.bucket_step 1 "
            f"--run.out {tmp_path}/odd".split()
        )
    assert "factor 2 does not divide" in capsys.readouterr().err
