"""What is cached is what would have been computed; a killed build goes on; damage is noticed; RAM stays free."""

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import train_ldm
import train_vae
from autoencoder.kl import AutoencoderConfig, AutoencoderKL
from ldm import cache, random
from ldm.conditioning import ConditioningConfig, make_conditioner
from ldm.config import UserError
from ldm.data import DataConfig, Source, open_source
from ldm.denoiser import Denoiser
from ldm.paths import PathConfig, make_path
from ldm.prediction import Weight, make_prediction
from ldm.sampling import Pixels
from tests.support import ROOT, TOY, tiny_unet

SEED, SIZE, COUNT = 3, 16, 41


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "SHARD", 4)
    monkeypatch.setattr(cache, "BATCH", 3)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    folder = tmp_path_factory.mktemp("data")
    noise = np.random.default_rng(0)
    for i in range(COUNT):
        image = Image.fromarray(noise.integers(0, 256, (18, 20, 3), dtype=np.uint8))
        image.save(folder / f"{i:02d}.png")
        (folder / f"{i:02d}.txt").write_text(f"noise of kind {i % 5}")
    return DataConfig(path=str(folder), size=SIZE, flip=True)


@pytest.fixture(scope="module")
def parts(data: DataConfig) -> tuple[Source, AutoencoderKL, torch.nn.Module]:
    torch.manual_seed(0)
    config = AutoencoderConfig(block_out_channels=(8, 16), norm_num_groups=4, sample_size=SIZE)
    source = open_source(data)
    conditioner = make_conditioner(ConditioningConfig(), source.texts, ())
    return source, AutoencoderKL(config).eval().requires_grad_(False), conditioner


def run_of(rank: int = 0, ranks: int = 1, wait=lambda: None) -> SimpleNamespace:
    """What `build` needs of a run."""
    accelerator = SimpleNamespace(process_index=rank, num_processes=ranks, wait_for_everyone=wait)
    return SimpleNamespace(
        main=rank == 0, accelerator=accelerator, device=torch.device("cpu"), config=SimpleNamespace(seed=SEED)
    )


def build(folder: Path, data: DataConfig, parts, run: SimpleNamespace | None = None) -> cache.LatentCache:
    source, autoencoder, conditioner = parts
    return cache.build(folder, source, data, autoencoder, conditioner, run or run_of())


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def test_the_loss_with_the_cache_is_the_loss_without(data: DataConfig, parts, tmp_path: Path) -> None:
    source, autoencoder, conditioner = parts
    latents = build(tmp_path, data, parts)
    channels, side, _ = latents.shape
    network = tiny_unet(
        in_channels=channels,
        out_channels=channels,
        sample_size=side,
        cross_attention_dim=conditioner.null(1).tokens.shape[-1],
    )
    path = make_path(PathConfig())
    denoiser = Denoiser(network, path, make_prediction("epsilon", path), Weight())
    items = [(position, position % COUNT) for position in range(100, 100 + COUNT)]
    cached = latents.__getitems__(items)
    seen = Pixels(source, data, SEED).__getitems__(items)
    posterior = autoencoder.encode(seen["pixels"])
    told = conditioner.read([source.texts[i] for _, i in items])
    noise = random.normal(SEED, "noise", cached["position"], latents.shape)
    t = path.times(random.uniform(SEED, "time", cached["position"])).float()
    losses = []
    for mean, std, batch in (
        (cached["mean"], cached["std"], cached),
        (posterior.mean, posterior.std, cached | told),
    ):
        z = mean + std * random.normal(SEED, "posterior", cached["position"], latents.shape)
        with torch.no_grad():
            losses.append(denoiser.loss(z, conditioner(batch), t=t, noise=noise))
    assert 0 < (random.uniform(SEED, "flip", cached["position"]) < 0.5).sum() < COUNT
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-5)
    assert all(torch.equal(cached[name], told[name]) for name in told)


def test_a_sample_is_the_same_alone_and_in_a_batch(data: DataConfig, parts, tmp_path: Path) -> None:
    built = build(tmp_path, data, parts)
    items = [(100, 7), (101, 40), (102, 0)]
    together = built.__getitems__(items)
    for row, item in enumerate(items):
        alone = built.__getitems__([item])
        assert alone.keys() == together.keys()
        assert all(torch.equal(alone[name][0], together[name][row]) for name in alone)


def test_a_killed_build_goes_on_and_ends_in_the_same_bytes(data: DataConfig, parts, tmp_path: Path) -> None:
    build(tmp_path / "whole", data, parts)
    process = multiprocessing.get_context("fork").Process(
        target=build, args=(tmp_path / "killed", data, parts)
    )
    process.start()
    while len(list((tmp_path / "killed").rglob("*.json"))) < 3:
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    done = {f: f.stat().st_mtime_ns for f in (tmp_path / "killed").rglob("*.json")}
    (next(iter(done)).parent / "00009.writing").write_bytes(b"half a shard")
    assert 3 <= len(done) < len(list((tmp_path / "whole").rglob("*.json")))
    build(tmp_path / "killed", data, parts)
    assert bytes_of(tmp_path / "killed") == bytes_of(tmp_path / "whole")
    assert done == {f: f.stat().st_mtime_ns for f in done}  # what was there was not made again


def test_two_processes_that_are_killed_and_started_again_build_the_same_bytes(
    data: DataConfig, parts, tmp_path: Path
) -> None:
    build(tmp_path / "one", data, parts)
    context = multiprocessing.get_context("fork")

    def begun() -> list[multiprocessing.Process]:
        wait = context.Barrier(2).wait
        arguments = [(tmp_path / "two", data, parts, run_of(rank, 2, wait)) for rank in range(2)]
        processes = [context.Process(target=build, args=some) for some in arguments]
        for process in processes:
            process.start()
        return processes

    killed = begun()
    while len(list((tmp_path / "two").rglob("*.json"))) < 3:
        time.sleep(0.002)
    for process in killed:
        process.kill()
        process.join()
    done = {f: f.stat().st_mtime_ns for f in (tmp_path / "two").rglob("*.json")}
    assert 3 <= len(done) < len(list((tmp_path / "one").rglob("*.json")))
    again = begun()
    for process in again:
        process.join()
    assert [process.exitcode for process in again] == [0, 0]
    assert bytes_of(tmp_path / "one") == bytes_of(tmp_path / "two")
    assert done == {f: f.stat().st_mtime_ns for f in done}


@pytest.mark.parametrize("damage", ["truncate", "flip", "zero", "delete", "sums"])
def test_a_damaged_shard_is_noticed_and_made_again(
    data: DataConfig, parts, tmp_path: Path, damage: str
) -> None:
    build(tmp_path, data, parts)
    before = bytes_of(tmp_path)
    shard = next(tmp_path.glob("latents-*/00002.safetensors"))
    whole = shard.read_bytes()
    if damage == "truncate":
        shard.write_bytes(whole[: len(whole) // 2])
    elif damage == "flip":
        shard.write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
    elif damage == "zero":
        shard.write_bytes(b"")
    elif damage == "delete":
        shard.unlink()
    else:
        shard.with_suffix(".json").write_text("{")
    if damage == "delete":
        build(tmp_path, data, parts)
    else:
        with pytest.warns(UserWarning, match=r"00002\.safetensors has changed since it was written"):
            build(tmp_path, data, parts)
    assert bytes_of(tmp_path) == before


def test_whatever_latents_depend_on_makes_another_cache(data: DataConfig, parts, tmp_path: Path) -> None:
    source, autoencoder, conditioner = parts
    build(tmp_path, data, parts)
    names = {folder.name for folder in tmp_path.iterdir()}
    with torch.no_grad():
        autoencoder.quant_conv.bias[0] += 1e-3
    build(tmp_path, data, parts)
    with torch.no_grad():
        autoencoder.quant_conv.bias[0] -= 1e-3
    fewer = source.chosen(range(COUNT - 1))
    build(tmp_path, data, (fewer, autoencoder, conditioner))
    assert len({folder.name for folder in tmp_path.iterdir()} - names) == 2


def test_a_disk_that_is_too_small_is_said_before_the_work(data: DataConfig, parts, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    size = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if subprocess.run(size, capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        with pytest.raises(
            UserError, match=r"disk/cache/latents-\w+ will need [\d,]+ bytes more, but [\d,]+ are"
        ):
            build(disk / "cache", data, parts)
        (disk / "filler").write_bytes(bytes(shutil.disk_usage(disk).free // 4096 * 4096))
        with pytest.raises(UserError, match="can't be written"):
            cache._write(disk / "00000.safetensors", {"mean": torch.zeros(9999)})
        assert not list(disk.glob("00000*"))
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


MEMORY = """
import sys, numpy as np, torch, psutil
from pathlib import Path
from types import SimpleNamespace
from safetensors.torch import save_file
from ldm import cache
accelerator = SimpleNamespace(process_index=0, num_processes=1, wait_for_everyone=lambda: None)
run = SimpleNamespace(main=True, accelerator=accelerator)
folder = Path(sys.argv[1])
cache.SHARD = 32
whole = torch.zeros(32, 2, 4, 128, 244)
members = [range(32), range(32, 64)]
cache._shards(folder, members, run, "x", lambda some: ({"mean": whole + 1, "std": whole} for _ in some))
before = psutil.Process().memory_info().rss
places = np.array([[i // 32, i % 32] for i in range(64)])
latents = cache.LatentCache(cache._shards(folder, members, run, "x", lambda some: iter(())), 0, places, 128)
row = latents.__getitems__([(0, 3), (1, 60)])
print(sum(f.stat().st_size for f in folder.glob("*.safetensors")), psutil.Process().memory_info().rss - before)
"""


def test_the_cache_is_not_read_into_memory(tmp_path: Path) -> None:
    """A set of 128 MB costs a few."""
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert not done.returncode, done.stderr
    size, grown = map(int, done.stdout.split())
    assert size > 125e6 and grown < 20e6


def test_another_autoencoder_is_refused_before_anything_is_made(
    chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for stage in ("vae", "ldm"):
        shutil.copytree(chain / stage, tmp_path / stage)
    (tmp_path / "ldm" / "result.json").unlink()
    before = bytes_of(tmp_path / "ldm" / "cache")
    weights = tmp_path / "vae" / "model" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    save_file({name: tensor * 1.01 for name, tensor in tensors.items()}, weights)
    with pytest.raises(SystemExit) as ended:
        train_ldm.main(
            f"--config {TOY}/ldm.yaml --autoencoder {tmp_path}/vae --run.out {tmp_path}/ldm".split()
        )
    assert ended.value.code == 1 and "begun with another autoencoder" in capsys.readouterr().err
    assert bytes_of(tmp_path / "ldm" / "cache") == before


def test_a_run_leaves_bad_pictures_out_and_keeps_to_its_set(
    data: DataConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(data.path, tmp_path / "data")
    (tmp_path / "data" / "07.png").write_bytes(b"<html>")
    arguments = (
        f"--config {TOY}/vae.yaml --data.scenes.count 8192 --data.path {tmp_path}/data --data.bad_share 0.1 "
        f"--workers 1 --run.out {tmp_path}/run"
    ).split()
    train_vae.main(arguments)
    said = capsys.readouterr().err
    assert "1 of 41 pictures are bad, left out and named in" in said
    assert "07.png" in (tmp_path / "run" / "bad_pictures.jsonl").read_text()
    (tmp_path / "run" / "result.json").unlink()
    shutil.copy(tmp_path / "data" / "08.png", tmp_path / "data" / "07.png")  # mended under way
    with pytest.raises(SystemExit) as ended:
        train_vae.main(arguments)
    assert ended.value.code == 1 and "begun with another set of pictures" in capsys.readouterr().err
