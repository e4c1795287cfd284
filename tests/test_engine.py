"""Checkpointing, compiling, accumulating and precision change how a step is computed, not what it learns."""

import json
from pathlib import Path

import pytest
import torch

import train_ldm
import train_vae
from autoencoder.kl import AutoencoderConfig, AutoencoderKL
from autoencoder.layers import enable_checkpointing
from autoencoder.vq import VQConfig, VQModel
from ldm.conditioning import Cond
from ldm.memory import Saved
from ldm.unet import UNet
from ldm.unet_config import UNetConfig
from pipelines import LatentDiffusion
from tests.support import TOY, losses, newest_weights
from tests.test_chain import _main_until

WIDTHS = {"block_out_channels": (16, 32), "norm_num_groups": 8, "layers_per_block": 2}


def step(network: torch.nn.Module, *inputs: object) -> tuple[list[torch.Tensor], int]:
    """Gradients, and the bytes kept for them."""
    saved = Saved([network])
    network.zero_grad()
    with saved.watching():
        out = network(*inputs)
        (out if isinstance(out, torch.Tensor) else out[0]).square().mean().backward()
    return [p.grad.clone() for p in network.parameters() if p.grad is not None], sum(saved.sizes)


@pytest.mark.parametrize("kind", ["kl", "vq", "unet"])
def test_checkpointing_keeps_gradients_bit_for_bit_and_less_memory(kind: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 32, 32)
    if kind == "unet":
        blocks = {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D")}
        blocks |= {"up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")}
        shape = UNetConfig(
            in_channels=3, out_channels=3, attention_head_dim=2, cross_attention_dim=8, **WIDTHS, **blocks
        )
        network, inputs = UNet(shape), (x, torch.rand(2), Cond(tokens=torch.randn(2, 5, 8)))
    else:
        network = AutoencoderKL(AutoencoderConfig(**WIDTHS)) if kind == "kl" else VQModel(VQConfig(**WIDTHS))
        inputs = (x,)
    plain, kept = step(network, *inputs)
    enable_checkpointing(network)
    again, less = step(network, *inputs)
    assert len(plain) == len(again) and all(map(torch.equal, plain, again))
    assert less < 0.5 * kept


@pytest.mark.parametrize("stage", ["vae", "ldm"])
def test_a_checkpointed_run_learns_the_same_bit_for_bit(chain: Path, tmp_path: Path, stage: str) -> None:
    script = train_vae if stage == "vae" else train_ldm
    words = ["--config", str(TOY / f"{stage}.yaml"), "--run.out", str(tmp_path / stage)]
    words += ["--autoencoder", str(chain / "vae")] if stage == "ldm" else []
    script.main([*words, "--run.gradient_checkpointing", "true"])
    one, other = newest_weights(chain / stage), newest_weights(tmp_path / stage)
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_a_compiled_run_keeps_its_names_and_goes_on_uncompiled(chain: Path, tmp_path: Path) -> None:
    words = ["--config", str(TOY / "ldm.yaml"), "--autoencoder", str(chain / "vae")]
    words += ["--run.out", str(tmp_path / "ldm")]
    with pytest.raises(SystemExit):
        _main_until(train_ldm, [*words, "--run.compile", "aot_eager"], step=3)
    assert newest_weights(tmp_path / "ldm").keys() == newest_weights(chain / "ldm").keys()
    train_ldm.main(words)
    assert losses(tmp_path / "ldm") == pytest.approx(losses(chain / "ldm"), rel=1e-4)
    LatentDiffusion.from_pretrained(tmp_path / "ldm")


def test_compiling_is_real_and_can_be_rehearsed(
    chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    words = ["--config", str(TOY / "vae.yaml"), "--run.out", str(tmp_path / "vae"), "--dry-run"]
    train_vae.main([*words, "--run.compile", "aot_eager", "--run.gradient_checkpointing", "true"])
    assert torch._dynamo.utils.counters["stats"]["calls_captured"] > 10
    assert "All was tried once" in capsys.readouterr().out


@pytest.mark.parametrize("stage", ["vae", "ldm"])
def test_two_batches_of_four_are_one_of_eight(chain: Path, tmp_path: Path, stage: str) -> None:
    script = train_vae if stage == "vae" else train_ldm
    first = []
    for accumulate in ("1", "2"):
        out = tmp_path / accumulate
        words = ["--config", str(TOY / f"{stage}.yaml"), "--run.out", str(out), "--run.steps", "1"]
        words += ["--autoencoder", str(chain / "vae")] if stage == "ldm" else []
        script.main([*words, "--run.batch_size", "8", "--run.accumulate", accumulate])
        first.append(json.loads((out / "metrics.jsonl").read_text().splitlines()[0]))
    for value in ("loss", "gradient_norm"):
        assert first[0][value] == pytest.approx(first[1][value], rel=1e-6)


def test_fp16_without_a_gpu_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(SystemExit) as ended:
        train_vae.main(
            ["--config", str(TOY / "vae.yaml"), "--run.out", str(tmp_path), "--run.precision", "fp16"]
        )
    said = capsys.readouterr().err
    assert ended.value.code == 1 and "set run.precision to bf16 or no" in said
