"""The readiness report: every figure against signals whose answer is known, and the whole on a real run."""

import json
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import train_vae
from autoencoder.kl import AutoencoderConfig, AutoencoderKL
from autoencoder.latents import LatentStatistics
from ldm.data import DataConfig, open_source
from ldm.pictures import to_tensor
from pipelines.cli import main as ldm
from pipelines.doctor import latent_measures as measures
from pipelines.doctor.latent_measures import Coder, Latents
from pipelines.doctor.probe import Probe, train_probe
from pipelines.doctor.readiness import Budget, choose, report
from pipelines.doctor.readiness_verdict import checks, overall
from pipelines.stages.stage_one import data_of
from tests.support import ROOT, TOY

FRUITS = ROOT.parent / "shared" / "data" / "fruits"


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def smooth(*shape: int) -> torch.Tensor:
    """Signals that vary slowly, of deviation about 1."""
    small = noise(*shape[:2], 3, 3)
    x = torch.nn.functional.interpolate(small, size=shape[2:], mode="bicubic", align_corners=True)
    return x / x.std()


def make() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(AutoencoderConfig(block_out_channels=(8, 16), norm_num_groups=4)).eval()


def pixels() -> torch.Tensor:
    return torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_channels_are_described_by_what_they_are() -> None:
    mean = noise(400, 4, 4, 4) * torch.tensor([0.1, 1.0, 1.0, 2.0])[:, None, None]
    mean[:, 3] += 0.5
    mean[:, 2] = mean[:, 2].pow(3)
    std = torch.tensor([1.0, 0.1, 0.1, 0.1])[:, None, None].expand_as(mean)
    found = measures.channel_statistics(Latents(mean, std))
    assert found["mean"] == pytest.approx([0, 0, 0, 0.5], abs=4 * max(found["mean_error"]))
    assert found["std"][0] == pytest.approx((1 + 0.01) ** 0.5, rel=0.01)
    assert found["std"][3] == pytest.approx((4 + 0.01) ** 0.5, rel=0.05)
    assert (
        found["noise_share"][0] == pytest.approx(1 / 1.01, rel=0.01) and max(found["noise_share"][1:]) < 0.02
    )
    assert abs(found["kurtosis"][1]) < 0.3 and found["kurtosis"][2] > 10
    assert found["mean_error"][3] == pytest.approx(2 / (400 * 16) ** 0.5, rel=0.2)


def test_correlation_finds_the_channel_that_repeats_another() -> None:
    mean = noise(50, 3, 4, 4)
    mean[:, 2] = -mean[:, 0]
    found = torch.tensor(measures.correlation(Latents(mean, mean)))
    assert found[0, 2] == pytest.approx(-1) and abs(found[0, 1]) < 0.15 and torch.equal(found, found.T)


def test_spectrum_tells_white_noise_from_pictures() -> None:
    white, slow = measures.spectrum(noise(300, 2, 16, 16)), measures.spectrum(smooth(300, 2, 16, 16))
    assert white.high_share == pytest.approx(0.8, abs=0.03) and white.flatness > 0.95
    assert max(abs(p - 1) for p in white.power[1:]) < 0.1
    assert slow.high_share < 0.05 and slow.flatness < 0.2 and slow.power[0] > 50 * slow.power[-1]


@torch.no_grad()
def test_the_largest_activation_is_found_where_it_is() -> None:
    model = make()
    model.decoder.mid_block.resnets[0].conv1.bias[3] = 1e4
    found = measures.activation_maxima(model, pixels())
    assert 0.9e4 < found["decoder.mid_block.resnets.0.conv1"] < 1.1e4
    assert found["encoder.conv_in"] == pytest.approx(model.encoder.conv_in(pixels()).abs().max().item())
    assert list(found).index("encoder.conv_in") < list(found).index("decoder.conv_out")
    assert not any(module._forward_hooks for module in model.modules())


@torch.no_grad()
def test_half_precision_finds_what_overflows_in_fp16_and_not_in_bf16() -> None:
    model = make()
    z = Coder(model).encode(pixels()).mean
    fine = measures.half_precision(Coder(model), z, Coder(model).decode(z))
    assert fine["fp16"]["psnr_db"] > fine["bf16"]["psnr_db"] > 30
    model.decoder.mid_block.resnets[0].conv1.bias[3] = 1e5
    over = measures.half_precision(Coder(model), z, Coder(model).decode(z))
    assert not over["fp16"]["finite"] and over["bf16"]["finite"] and "rounded" in str(over["fp16"]["how"])


def test_scaled_latents_are_what_a_latent_model_sees() -> None:
    """Decoding takes back what encoding applies: the factor and shift of a stock config."""
    model = make()
    plain = Coder(model).encode(pixels())
    model.config = replace(model.config, scaling_factor=0.5, shift_factor=0.25)
    scaled = Coder(model).encode(pixels())
    torch.testing.assert_close(scaled.mean, (plain.mean / 0.18215 - 0.25) * 0.5)
    torch.testing.assert_close(scaled.std, plain.std / 0.18215 * 0.5)
    torch.testing.assert_close(
        Coder(model).decode(scaled.mean), model.decode(plain.mean / 0.18215).clamp(-1, 1)
    )


def probed(x: torch.Tensor, steps: int) -> Probe:
    exact = [Latents(part, torch.zeros_like(part)) for part in (x[16:], x[:16])]
    return train_probe(*exact, steps, torch.device("cpu"))[0]


def test_the_probe_tells_structure_from_noise() -> None:
    """Latents that are the same everywhere can be seen through noise; white ones can't."""
    easy, hard = probed(noise(80, 2, 1, 1).expand(-1, -1, 8, 8), 40), probed(noise(80, 2, 8, 8), 40)
    assert easy.gain > 0.3 > 0.1 > hard.gain
    assert easy.score > hard.score
    assert hard.pointwise[0] > 0.95 > hard.pointwise[-1]


def test_the_probe_repeats_itself() -> None:
    x = smooth(80, 2, 8, 8)
    before = torch.get_rng_state()
    assert probed(x, 3).loss == probed(x, 3).loss
    assert torch.equal(before, torch.get_rng_state()), (
        "a training that goes on draws what it would have drawn"
    )


@pytest.fixture(scope="module")
def figures(chain: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict]:
    """Of the toy autoencoder, by the command."""
    out = tmp_path_factory.mktemp("readiness") / "page.html"
    ldm(["doctor", "latents", str(chain / "vae"), "--out", str(out), "--probe-steps", "3"])
    yield {"file": out, **json.loads(out.with_suffix(".json").read_text())}


def test_the_command_writes_a_page_and_its_figures(chain: Path, figures: dict) -> None:
    page = figures["file"].read_text()
    assert "Are the latents ready?" in page and page.count("data:image/") >= 6
    assert figures["data"]["size"] == 16 and figures["held_out"] == "split test"
    one = figures["autoencoders"][str(chain / "vae")]
    assert one["verdict"] == "bad", "six steps make no autoencoder"
    assert one["looked_at"]["training"] == 24 and one["shape"]["channels"] == 4
    assert all(check["sentence"] in page.replace("&#39;", "'") for check in one["checks"])


def test_verdicts_follow_the_figures(chain: Path, figures: dict) -> None:
    """Good figures are good; each fault alone is found, named and sets the verdict."""
    sound = deepcopy(figures["autoencoders"][str(chain / "vae")])
    sound["reconstruction"]["psnr_db"] = 33.0
    sound["noise"]["0.1"]["against_decoding_db"] = 30.0
    sound["probe"] |= {"gain": 0.5, "score": 0.7}
    sound["spectra"]["latents"]["high_share"] = 0.1
    sound["correlation"] = torch.eye(4).tolist()
    sound["channels"] |= {"noise_share": [0.01] * 4, "kurtosis": [0.0] * 4, "largest": [4.0] * 4}
    sound["activations"] = {"decoder.conv_in": 100.0}
    for name in ("bf16", "fp16"):
        sound["half_precision"][name] |= {"psnr_db": 50.0, "finite": True}
    assert overall(checks(sound)) == "good", checks(sound)
    faults = [
        (("reconstruction", "psnr_db"), 15.0, "reconstruction", "bad"),
        (("channels", "std"), [4.9, 5.0, 5.1, 5.0], "contract", "bad"),
        (("channels", "mean"), [0.0, 0.3, 0.0, 0.0], "contract", "doubtful"),
        (("channels", "mean"), [float("nan")] * 4, "contract", "bad"),
        (("channels", "noise_share"), [0.0, 0.99, 0.0, 0.0], "dead channels", "doubtful"),
        (("channels", "noise_share"), [0.99, 0.99, 0.0, 0.0], "dead channels", "bad"),
        (("channels", "largest"), [40.0, 4.0, 4.0, 4.0], "tails", "doubtful"),
        (("correlation",), [[1.0, 0.99], [0.99, 1.0]], "correlation", "doubtful"),
        (("spectra", "latents", "high_share"), 0.75, "spectrum", "doubtful"),
        (("activations",), {"decoder.conv_in": 30000.0}, "half precision", "doubtful"),
        (("half_precision", "bf16", "psnr_db"), 20.0, "half precision", "doubtful"),
        (("noise", "0.1", "against_decoding_db"), 12.0, "noise", "doubtful"),
        (("probe", "gain"), 0.02, "probe", "bad"),
    ]
    for keys, value, name, kind in faults:
        faulty = deepcopy(sound)
        place = faulty
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = value
        worst = checks(faulty)[0]
        assert (worst.name, worst.kind) == (name, kind), (keys, value)
        assert overall(checks(faulty)) == kind


def test_two_autoencoders_are_compared_on_the_same_pictures(chain: Path, tmp_path: Path) -> None:
    model = AutoencoderKL.from_pretrained(chain / "vae" / "model")
    data, budget = (
        DataConfig(path="scenes", size=16),
        Budget(pictures=16, held_out=8, decoded=8, probe_steps=2),
    )
    first, second = report({"a": model, "b": deepcopy(model)}, data, tmp_path / "page.html", budget)
    assert first.figures | {"seconds": 0, "probe": 0} == second.figures | {"seconds": 0, "probe": 0}
    assert first.figures["probe"]["loss"] == second.figures["probe"]["loss"]
    assert "<th>a</th><th>b</th>" in (tmp_path / "page.html").read_text()


def test_without_a_held_out_split_the_probe_does_not_see_what_it_is_judged_on(tmp_path: Path) -> None:
    scenes = open_source(DataConfig(path="scenes", size=16))
    for i in range(24):
        scenes.picture(i, 16).save(tmp_path / f"{i:02d}.png")
    found = choose(DataConfig(path=str(tmp_path), size=16), Budget())
    assert len(found.held) == 3 and len(found.train) == 21 and "knows them" in found.split
    assert not set(found.train) & {7, 15, 23}


def test_a_handful_of_pictures_is_enough_to_be_told_something(tmp_path: Path) -> None:
    """Stage 1 must not fail at its end because of them."""
    scenes = open_source(DataConfig(path="scenes", size=16))
    (tmp_path / "few").mkdir()
    scenes.picture(0, 16).save(tmp_path / "few" / "one.png")
    data, budget = DataConfig(path=str(tmp_path / "few"), size=8), Budget(probe_steps=1)
    config = AutoencoderConfig(
        block_out_channels=(8, 8, 8), norm_num_groups=4
    )  # 2 x 2 latents have no spectrum
    (found,) = report({"model": AutoencoderKL(config).eval()}, data, tmp_path / "page.html", budget)
    assert found.figures["looked_at"]["held_out"] == 1 and not found.figures["spectra"]
    page = (tmp_path / "page.html").read_text()
    assert (
        "the training pictures themselves" in page
        and "The probe is" in page
        and "The spectra are" not in page
    )
    assert not any("nan" in check.sentence for check in found.checks)


def test_the_run_says_what_it_was_trained_on(chain: Path) -> None:
    assert data_of(str(chain / "vae")).scenes.count == 24
    assert data_of(str(chain / "vae" / "model")) is None


def test_bad_requests_are_one_sentence(chain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        ([str(chain / "vae" / "model")], "name them with --data"),
        (["nowhere/at/all/x"], "nowhere/at/all/x"),
        ([str(chain / "vae"), "--pictures", "0"], "pictures is 0"),
        ([str(chain / "vae"), "--size", "17"], "not a multiple of 2"),
    ):
        with pytest.raises(SystemExit) as ended:
            ldm(["doctor", "latents", *arguments])
        said = capsys.readouterr().err
        assert ended.value.code == 1 and message in said and "Traceback" not in said


# --- the latent contract, on what stage 1 has made -----------------------------------------------------------------


@torch.no_grad()
def assert_contract(run: Path) -> None:
    """Latents of the whole training set: mean 0 and deviation 1 in every channel, within 0.01."""
    model, data = AutoencoderKL.from_pretrained(run / "model"), data_of(str(run))
    source, statistics = open_source(data), LatentStatistics(model.config.latent_channels)
    for first in range(0, len(source), 32):
        rows = range(first, min(first + 32, len(source)))
        statistics.update(model.encode(torch.stack([to_tensor(source.picture(i, data.size)) for i in rows])))
    assert statistics.mean.abs().max() < 0.01
    assert (statistics.std - 1).abs().max() < 0.01


def test_latents_of_the_toy_set_keep_the_contract(chain: Path) -> None:
    assert_contract(chain / "vae")


@pytest.mark.skipif(not FRUITS.exists(), reason="needs ../shared/data/fruits")
def test_latents_of_photographs_keep_the_contract(tmp_path: Path) -> None:
    """A short training, on four hundred of the fruits."""
    source = open_source(DataConfig(path=str(FRUITS)))
    (tmp_path / "fruits").mkdir()
    for i in range(0, len(source), len(source) // 400):
        source.picture(i, 32).save(tmp_path / "fruits" / f"{i:05d}.png")
    sizes = ["--data.path", str(tmp_path / "fruits"), "--data.size", "32", "--data.scenes.count", "8192"]
    train_vae.main(["--config", str(TOY / "vae.yaml"), "--run.out", str(tmp_path / "run"), *sizes])
    assert_contract(tmp_path / "run")
