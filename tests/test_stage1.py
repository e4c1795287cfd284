"""train_vae.py at full strength: GAN and LPIPS resumed, VQ, presets, other people's autoencoders, precision."""

import json
import re
import signal
from pathlib import Path

import diffusers
import pytest
import torch
import torchvision
from safetensors.torch import load_file, save_file

import train_vae
from autoencoder.kl import AutoencoderKL
from autoencoder.presets import ShapeConfig
from autoencoder.vq import CodebookConfig, CodeUse, VQConfig, VQModel, codebook_usage
from ldm.config import load, to_yaml
from ldm.data import DataConfig, ScenesConfig, open_source
from ldm.pictures import to_tensor
from tests.support import TOY, losses, newest_weights, ran

GAN = (
    "--loss.gan.weight 0.5 --loss.gan.start 2 --loss.gan.head_start 1 --loss.gan.ramp 2 --loss.gan.layers 2 "
)
GAN += "--loss.gan.channels 8 --loss.gan.r1 1 --loss.gan.r1_every 2 --loss.gan.lecam 0.1 "
VQ = "--kind vq --loss.codebook.revive_every 2 --network.num_vq_embeddings 64 --network.latent_channels 3 "


def train(out: Path, flags: str = "") -> Path:
    train_vae.main(["--config", str(TOY / "vae.yaml"), "--run.out", str(out), *flags.split()])
    return out


def metrics(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stage1")


@pytest.fixture(scope="module")
def gan(folder: Path) -> Path:
    """A run with everything on; LPIPS by a classifier of random weights."""
    torch.manual_seed(0)
    save_file(torchvision.models.squeezenet1_1(weights=None).state_dict(), folder / "squeeze.safetensors")
    return train(folder / "gan", gan_flags(folder))


def gan_flags(folder: Path) -> str:
    lpips = f"--loss.lpips.weight 1 --loss.lpips.network squeeze --loss.lpips.weights {folder}/squeeze.safetensors"
    return f"{GAN} {lpips} --data.size 20"


@pytest.fixture(scope="module")
def vq(folder: Path) -> Path:
    return train(folder / "vq", VQ)


@pytest.mark.parametrize("name", ["gan", "vq"])
def test_a_stopped_run_goes_on_bit_for_bit(
    name: str, folder: Path, gan: Path, vq: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, flags = (gan, gan_flags(folder)) if name == "gan" else (vq, VQ)
    due = train_vae.Run.due

    def stop_at_3(run, every: int) -> bool:
        if run.step == 3 and every == run.config.save_every and not run.signals.received:
            signal.raise_signal(signal.SIGTERM)
        return due(run, every)

    with monkeypatch.context() as patched, pytest.raises(SystemExit) as stopped:
        patched.setattr(train_vae.Run, "due", stop_at_3)
        train(tmp_path / "run", flags)
    assert stopped.value.code == 143 and not (tmp_path / "run" / "result.json").exists()
    train(tmp_path / "run", flags)
    one, other = newest_weights(whole), newest_weights(tmp_path / "run")
    assert one.keys() == other.keys() and [key for key in one if not torch.equal(one[key], other[key])] == []
    parts = {key.split("/")[0] for key in one}
    assert parts >= (
        {"discriminator", "discriminator_optimizer", "judgement"} if name == "gan" else {"codes"}
    )
    for mine, theirs in zip(metrics(whole), metrics(tmp_path / "run"), strict=True):
        assert {**mine, "time": 0} == {**theirs, "time": 0}


def test_accumulated_batches_learn_what_one_batch_learns(folder: Path) -> None:
    flags = f"{GAN.replace('--loss.gan.lecam 0.1', '--loss.gan.adaptive false')} --run.save_every 6"
    one, two = train(folder / "one", flags), train(folder / "two", f"{flags} --run.accumulate 2")
    for mine, theirs in zip(metrics(one), metrics(two), strict=True):
        for key in mine.keys() - {"time"}:
            assert mine[key] == pytest.approx(theirs[key], rel=5e-3, abs=1e-4), (mine["step"], key)


def test_what_a_person_sees_while_it_trains(gan: Path, vq: Path) -> None:
    shown = metrics(gan)[2]
    assert {
        "psnr_db",
        "held_out_ssim",
        "held_out_lpips",
        "held_out_kl",
        "held_out_logits_real",
    } <= shown.keys()
    assert {"reconstruction", "lpips", "kl", "adversarial", "adaptive", "discriminator_loss"} <= shown.keys()
    assert "adversarial" not in metrics(gan)[1] and "logits_real" not in metrics(gan)[0]
    assert {"held_out_codebook_usage", "held_out_perplexity", "commitment"} <= metrics(vq)[2].keys()
    assert 0 < metrics(vq)[1]["codebook_usage"] <= 1 and "revived" in metrics(vq)[1]
    assert (gan / "samples" / "reconstructions-00000003.png").is_file()
    result = json.loads((gan / "result.json").read_text())
    assert {"psnr_db", "ssim", "lpips", "psnr_split"} <= result.keys()


def test_averaged_weights_have_moved_and_are_not_the_raw_ones(gan: Path) -> None:
    folders = sorted((gan / "checkpoints").iterdir())
    first, last = (load_file(f / "model" / "diffusion_pytorch_model.safetensors") for f in folders)
    raw = load_file(folders[-1] / "autoencoder.safetensors")
    assert len(raw) == len(last)
    for name, averaged in last.items():
        assert averaged.dtype == torch.float32
        assert not torch.equal(averaged, raw[f"state.{name}"])
        assert not torch.equal(averaged, first[name])


def test_stock_diffusers_reconstructs_what_we_do(gan: Path, vq: Path) -> None:
    x = torch.rand(2, 3, 20, 20) * 2 - 1
    for run, ours, theirs in (
        (gan, AutoencoderKL, diffusers.AutoencoderKL),
        (vq, VQModel, diffusers.VQModel),
    ):
        stock, report = theirs.from_pretrained(run / "model", output_loading_info=True)
        assert not any(report.values()) and stock.config.scaling_factor == 1
        with torch.no_grad():
            made, expected = ours.from_pretrained(run / "model")(x)[0], stock(x).sample
        assert (made - expected).abs().max() <= 1e-5


def test_weights_move_and_stay_float32_at_a_small_rate_in_bfloat16(tmp_path: Path) -> None:
    flags = "--run.precision bf16 --run.steps 50 --run.save_every 25 --run.log_every 50 --show.every 50 "
    flags += "--optimizer.lr 1e-6 --optimizer.warmup 0 --optimizer.decay none"
    run = tmp_path / "run"  # in a process of its own: Accelerate keeps a process's first precision
    ran("train_vae.py", "--config", f"{TOY}/vae.yaml", "--run.out", str(run), *flags.split())
    first, last = (load_file(f / "autoencoder.safetensors") for f in sorted((run / "checkpoints").iterdir()))
    assert all(weight.dtype == torch.float32 for weight in last.values())
    moved = torch.cat([(last[name] != first[name]).flatten() for name in last])
    assert moved.float().mean() > 0.98
    far = torch.cat([(last[name] - first[name]).abs().flatten() for name in last])
    assert 1e-6 < far.mean() < 26e-6


def test_codes_that_nobody_chose_come_back_as_latents() -> None:
    torch.manual_seed(0)
    model = VQModel(VQConfig(block_out_channels=(8, 16), norm_num_groups=4, num_vq_embeddings=32))
    x = torch.rand(4, 3, 16, 16) * 2 - 1
    use = CodeUse(32, torch.device("cpu"), lambda counts: 2 * counts)  # as if another process had the same
    quantized = model(x)[1]
    use.count(quantized.indices)
    assert use.counts.sum() == 2 * quantized.indices.numel()
    before, dead = model.quantize.embedding.weight.detach().clone(), use.counts == 0
    assert dead.sum() > 16
    revived = use.revive(
        [model.quantize.embedding], quantized.unquantized, train_vae.random.stream(0, "r", 1)
    )
    assert revived == dead.sum() and use.counts.sum() == 0
    after, latents = model.quantize.embedding.weight.detach(), model.encode(x).detach()
    assert torch.equal(after[~dead], before[~dead])
    vectors = latents.movedim(1, -1).flatten(0, -2)
    assert (after[dead][:, None] - vectors).abs().amax(dim=2).amin(dim=1).max() < 1e-6
    use.count(model(x)[1].indices)
    assert codebook_usage(use.counts).fraction > 0.9


def test_two_processes_revive_what_one_revives(vq: Path, tmp_path: Path) -> None:
    ran(
        "train_vae.py",
        "--config",
        f"{TOY}/vae.yaml",
        "--run.out",
        f"{tmp_path}/two",
        *VQ.split(),
        processes=2,
    )
    for mine, theirs in zip(metrics(vq)[:2], metrics(tmp_path / "two")[:2], strict=True):
        assert mine.keys() == theirs.keys()
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-3)
    assert metrics(vq)[1]["revived"] == metrics(tmp_path / "two")[1]["revived"]
    one, two = (newest_weights(run) for run in (vq, tmp_path / "two"))
    mine, theirs = (weights["codes/state.counts"] for weights in (one, two))
    # Rounding differs, and moves a few latents that lie between two codes.
    assert mine.sum() == theirs.sum() and (mine - theirs).abs().sum() < 0.05 * mine.sum()


# --- shapes and starts -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [4, 8, 16, 32])
@pytest.mark.parametrize("preset", ["tiny", "small", "base"])
def test_presets_have_every_factor_and_any_latent_width(preset: str, factor: int) -> None:
    shape = ShapeConfig(preset=preset, factor=factor, latent_channels=7).filled("kl", 64)
    config = shape.config("kl")
    assert config.factor == factor and config.latent_channels == 7 and config.sample_size == 64
    assert shape.filled("kl", 64) == shape
    with torch.device("meta"):
        network = AutoencoderKL(config)
        if factor <= 8:
            assert network(torch.empty(1, 3, 64, 64))[1].mean.shape == (1, 7, 64 // factor, 64 // factor)


def test_base_is_the_shape_of_stable_diffusion() -> None:
    config = ShapeConfig(preset="base").filled("kl", 256).config("kl")
    assert (config.block_out_channels, config.layers_per_block) == ((128, 256, 512, 512), 2)
    with torch.device("meta"):
        assert sum(p.numel() for p in AutoencoderKL(config).parameters()) == 83_653_863


def test_a_preset_is_written_out_and_reads_back(tmp_path: Path) -> None:
    flags = f"--run.out {tmp_path} --run.steps 1 --run.batch_size 1 --network.preset tiny --network.factor 4"
    recipe = load(train_vae.Recipe, [*flags.split(), "--network.layers_per_block", "3"], prog="")
    (tmp_path / "config.yaml").write_text(to_yaml(recipe))
    text = (tmp_path / "config.yaml").read_text()
    assert re.search(r"block_out_channels:\s+- 16\s+- 32\s+- 64\n", text) and "layers_per_block: 3" in text
    assert load(train_vae.Recipe, ["--config", str(tmp_path / "config.yaml")], prog="") == recipe


@pytest.mark.parametrize("quant_conv", [True, False])
def test_a_stock_autoencoder_is_trained_on_and_folded(quant_conv: bool, tmp_path: Path) -> None:
    """In the shape of Stable Diffusion 3 there are no 1x1 convolutions: the end adds the one that it needs."""
    torch.manual_seed(0)
    extra = {} if quant_conv else {"shift_factor": 0.1, "latents_mean": (0.5,) * 4, "latents_std": (2.0,) * 4}
    stock = diffusers.AutoencoderKL(
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        scaling_factor=1.5305,
        use_quant_conv=quant_conv,
        use_post_quant_conv=quant_conv,
        **extra,
    )
    stock.save_pretrained(tmp_path / "stock")
    recipe = (
        f"--run.out {tmp_path}/run --run.steps 1 --run.batch_size 2 --run.precision no --run.tracker none "
    )
    recipe += (
        f"--data.size 16 --data.scenes.count 8 --start {tmp_path}/stock --optimizer.lr 1e-9 --workers 0 "
    )
    recipe += "--readiness.pictures 0"
    train_vae.main(recipe.split())
    made = diffusers.AutoencoderKL.from_pretrained(tmp_path / "run" / "model")
    assert made.config.use_quant_conv == quant_conv and made.config.use_post_quant_conv
    assert (made.config.scaling_factor, made.config.shift_factor) == (1.0, 0.0)
    assert made.config.latents_mean is None and made.config.latents_std is None
    source = open_source(DataConfig(size=16, scenes=ScenesConfig(count=8)))
    x = torch.stack([to_tensor(source.picture(i, 16)) for i in range(8)])
    with torch.no_grad():
        torch.testing.assert_close(made(x).sample, stock(x).sample, rtol=1e-3, atol=1e-4)
        latents = made.encode(x).latent_dist
    spread = (latents.mean.var(dim=(0, 2, 3), correction=0) + latents.var.mean(dim=(0, 2, 3))).sqrt()
    assert latents.mean.mean(dim=(0, 2, 3)).abs().max() < 0.01 and (spread - 1).abs().max() < 0.01
    assert "  factor: 2" in (tmp_path / "run" / "config.yaml").read_text()


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        ("--loss.gan.start 500", 2, "loss.gan.start is set, but loss.gan.weight is 0"),
        ("--loss.lpips.network alex", 2, "loss.lpips.network is set, but loss.lpips.weight is 0"),
        ("--loss.gan.weight 1", 2, "loss.gan.start is 1000, but the run ends after 6 steps"),
        (f"{GAN} --loss.gan.layers 3", 2, "must have 24 pixels a side"),
        ("--loss.lpips.weight 1 --loss.lpips.network squeeze", 2, "needs pictures of 17 pixels a side"),
        ("--loss.lpips.weight 1 --loss.lpips.weights nowhere.safetensors", 1, "there is no such file"),
        (f"{GAN} --loss.gan.adaptive_max -1", 2, "loss.gan.adaptive_max is -1.0, but must be positive"),
        ("--loss.kl 0 --loss.kl_warmup 9", 2, "loss.kl_warmup is set, but loss.kl is 0"),
        ("--readiness.probe_steps 9", 2, "readiness.probe_steps is set, but readiness.pictures is 0"),
        ("--kind vq --readiness.pictures 9", 2, "readiness is set, but kind is vq"),
        ("--workers -1", 2, "workers is -1, but must be at least 0"),
        ("--optimizer.lr 1e12 --loss.kl 1e6", 1, "of the latents has a standard deviation of nan"),
        ("--gan_optimizer.lr 1", 2, "gan_optimizer is set, but loss.gan.weight is 0"),
        ("--loss.codebook.weight 2", 2, "loss.codebook.weight is set, but kind is kl"),
        ("--kind vq --loss.kl 1", 2, "loss.kl is set, but kind is vq"),
        ("--kind vq --network.use_quant_conv false", 2, "an autoencoder of kind vq has none"),
        ("--network.num_vq_embeddings 9", 2, "an autoencoder of kind kl has none"),
        (
            "--network.preset tiny --network.factor 8",
            2,
            "network.factor is 8, but 2 block_out_channels make 2",
        ),
        ("--network.preset tiny --network.factor 3", 2, "must be 2, 4, 8, 16 or 32"),
        ("--network.sample_size 32", 2, "network.sample_size is 32, but data.size 16"),
        ("--start {vq}/model", 1, "describes VQModel, but AutoencoderKL is wanted"),
        (
            "--start {gan} --data.size 20 --network.latent_channels 5",
            1,
            "has 4: remove",
        ),
        ("--start nowhere/at/all", 1, "neither a folder here nor a model on the Hugging Face hub"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_sentence(
    flags: str,
    code: int,
    message: str,
    gan: Path,
    vq: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as ended:
        train(tmp_path / "run", flags.format(gan=gan, vq=vq))
    said = capsys.readouterr().err
    assert ended.value.code == code and message in said and "Traceback" not in said


def test_an_own_run_is_a_place_to_start_from(gan: Path, tmp_path: Path) -> None:
    flags = f"--start {gan} --data.size 20 --run.steps 1 --optimizer.lr 1e-9"
    run = train(tmp_path / "run", flags)
    before, after = (load_file(r / "model" / "diffusion_pytorch_model.safetensors") for r in (gan, run))
    torch.testing.assert_close(before, after, rtol=1e-3, atol=1e-3)


def test_a_codebook_needs_a_weight() -> None:
    with pytest.raises(ValueError, match=r"loss.codebook.commitment is 0"):
        CodebookConfig(commitment=0)


def test_some_steps_are_turned_and_the_end_reports(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = ["--config", str(TOY / "vae.yaml"), "--readiness", '{"pictures": 16, "probe_steps": 2}']
    for name, probability in (("plain", "0"), ("turned", "0.5"), ("again", "0.5")):
        out = ["--run.out", str(tmp_path / name), "--equivariance.probability", probability]
        train_vae.main([*told, *out])
        told = ["--config", str(TOY / "vae.yaml")]
    assert "verdict" in (tmp_path / "plain" / "readiness.json").read_text()
    assert (tmp_path / "plain" / "readiness.html").exists()
    assert f"not ready for stage 2. Why: {tmp_path}/plain/readiness.html" in capsys.readouterr().err
    plain, turned, again = (losses(tmp_path / name) for name in ("plain", "turned", "again"))
    assert turned == again and plain != turned and plain[0] == pytest.approx(turned[0], rel=0.5)
