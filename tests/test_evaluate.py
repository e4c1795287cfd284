"""`ldm evaluate` on real, tiny models: the same figures however they are computed."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

pytest.importorskip("torch_fidelity", reason="the figures are torch-fidelity's")


from autoencoder.metrics import psnr
from autoencoder.vq import VQConfig, VQModel
from ldm.conditioning import Unconditional
from ldm.config import UserError
from ldm.data import DataConfig, open_source
from ldm.pictures import to_tensor
from ldm.tasks import Restore
from pipelines import LatentDiffusion
from pipelines.cli import main as ldm
from pipelines.evaluation.bench import Evaluation, require_fitting
from pipelines.evaluation.classifier import train_recogniser
from pipelines.evaluation.extractors import open_extractor
from pipelines.evaluation.generation import Drawing
from pipelines.evaluation.subjects import open_subject, reconstructed
from pipelines.stages.stage_one import data_at
from tests.support import DRAWING, JUDGED, SIDE, ran, values


def test_processes_and_batches_do_not_change_the_figures(
    chain: Path, asked: list[str], result: Path, tmp_path: Path
) -> None:
    words = ["evaluate", str(chain / "ldm"), *asked, *DRAWING]
    ldm([*words, "--batch", "3", "--out", str(tmp_path / "three.json")])
    ran("-m", "pipelines.cli", *words, "--out", str(tmp_path / "both.json"), processes=2)
    one = values(result)
    assert {
        "fd",
        "kid",
        "precision",
        "recall",
        "class_accuracy",
        "copies_pixels",
        "nearer_features",
    } <= one.keys()
    for name in ("three", "both"):
        other = values(tmp_path / f"{name}.json")
        assert other.keys() == one.keys()
        for key, value in one.items():
            assert other[key] == pytest.approx(value, rel=1e-3, abs=1e-4), (name, key)
        drawn = [
            np.asarray(Image.open(p.with_name(f"{p.stem}-drawn.png"))).astype(int)
            for p in (result, tmp_path / f"{name}.json")
        ]
        # 1 of 255 in a picture, which the sheet enlarges with weights whose sizes add up to more than 1
        assert abs(drawn[0] - drawn[1]).max() <= 2


def test_the_result_says_how_it_was_measured(result: Path, chain: Path) -> None:
    content = json.loads(result.read_text())
    how = content["protocol"]
    assert (how["n"], how["guidance"], how["steps"], how["sampler"]) == (17, 2.0, 2, "dpmpp_2m")
    assert how["seeds"] == "0 to 16" and how["weights"] == "averaged" and how["precision"] == "float32"
    assert how["reference"]["split"] == "test" and how["reference"]["pictures"] == JUDGED
    assert len(how["extractors"]["untrained"]["weights_sha256"]) == 64
    assert "antialiasing" in how["extractors"]["untrained"]["resize"]
    assert {"torch", "torch-fidelity"} <= how["versions"].keys()
    assert content["model"]["step"] == 6
    for name in ("drawn", "nearest"):
        assert min(Image.open(result.parent / content["pictures"][name]).size) > 100
    for figure in content["figures"].values():
        assert figure.keys() == {"value", "error", "interval"}
        assert figure["interval"][0] <= figure["value"] <= figure["interval"][1]


def test_raw_weights_are_others_and_the_result_lies_in_the_run(
    chain: Path, asked: list[str], result: Path
) -> None:
    words = ["evaluate", str(chain / "ldm"), *asked, *DRAWING, "--training-split", "none", "--raw"]
    ldm([*words, "--interval", "0.5", "4"])
    (file,) = (chain / "ldm" / "evaluations").glob(
        "step-00000006-test-n17-untrained-raw-*-interval0.5to4*.json"
    )
    mine, theirs = (json.loads(f.read_text()) for f in (file, result))
    assert mine["protocol"]["weights"] == "raw" and "memorisation" in mine["left_out"]
    assert mine["protocol"]["interval"] == [0.5, 4] and "interval" not in theirs["protocol"]
    assert mine["model"]["unet_sha256"] != theirs["model"]["unet_sha256"]
    assert mine["model"]["autoencoder_sha256"] == theirs["model"]["autoencoder_sha256"]


def test_an_autoencoder_is_measured_picture_by_picture(
    chain: Path, asked: list[str], pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))  # no weights for LPIPS
    monkeypatch.setattr("autoencoder.perceptual.HUB", {})
    ldm(["evaluate", str(chain / "vae"), *asked, "--size", str(SIDE), "--out", str(tmp_path / "vae.json")])
    content = json.loads((tmp_path / "vae.json").read_text())
    figures = {name: figure["value"] for name, figure in content["figures"].items()}
    assert figures.keys() == {"psnr", "ssim", "rfd", "rkid"}
    assert "vgg16-397923af.pth" in content["left_out"]["lpips"]
    source = open_source(DataConfig(path=str(pictures)), "test")
    x = torch.stack([to_tensor(source.picture(i, SIDE)) for i in range(JUDGED)])
    coder = open_subject(str(chain / "vae"), "averaged", torch.device("cpu")).model
    assert figures["psnr"] == pytest.approx(psnr(reconstructed(coder, x), x).mean().item(), rel=1e-4)


def test_a_codebook_is_measured_too(pictures: Path, tmp_path: Path, offline: None) -> None:
    torch.manual_seed(0)
    VQModel(VQConfig(block_out_channels=(8, 8), norm_num_groups=4, sample_size=SIDE)).save_pretrained(
        tmp_path / "vq"
    )
    words = ["--data", str(pictures), "--extractor", "none", "--n", "4", "--out", str(tmp_path / "vq.json")]
    ldm(["evaluate", str(tmp_path / "vq"), *words])
    content = json.loads((tmp_path / "vq.json").read_text())
    assert content["protocol"]["latent"] == "nearest codes" and content["protocol"]["weights"] == "as saved"
    assert {"psnr", "ssim"} == content["figures"].keys()


def test_a_classifier_is_trained_and_judges(
    chain: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(tmp_path / "judge")
    ldm(["classifier", "--data", str(pictures), "--size", str(SIDE), "--epochs", "2", "--out", folder])
    assert "2 classes, names" in capsys.readouterr().out
    found = open_extractor(folder, torch.device("cpu"))
    assert found.classes == ("one", "two") and found.resize.endswith("16x16")


def test_a_held_out_split_without_classes_is_not_what_a_classifier_is_judged_by(
    pictures: Path, tmp_path: Path
) -> None:
    shutil.copytree(pictures / "train", tmp_path / "train")
    (tmp_path / "test").mkdir()
    for i in range(3):
        Image.new("RGB", (SIDE, SIDE)).save(tmp_path / "test" / f"{i}.png")
    found = train_recogniser(DataConfig(path=str(tmp_path), size=SIDE), epochs=1)
    assert found.classes == ("one", "two") and not found.accuracy


def test_lpips_is_measured_where_its_weights_are(chain: Path, asked: list[str], tmp_path: Path) -> None:
    from torchvision.models import squeezenet1_1

    torch.manual_seed(0)
    save_file(squeezenet1_1().state_dict(), tmp_path / "squeeze.safetensors")
    words = [*asked, "--size", "32", "--n", "8", "--lpips", "squeeze", "--out", str(tmp_path / "vae.json")]
    ldm(["evaluate", str(chain / "vae"), *words, "--lpips-weights", str(tmp_path / "squeeze.safetensors")])
    content = json.loads((tmp_path / "vae.json").read_text())
    assert content["figures"]["lpips"]["value"] > 0 and content["protocol"]["lpips"]["network"] == "squeeze"
    assert not content["left_out"]
    with pytest.raises(SystemExit):
        ldm(["evaluate", str(chain / "vae"), *words, "--lpips-weights", str(tmp_path / "none.safetensors")])


def test_scenes_are_checked_by_evaluate(chain: Path, tmp_path: Path) -> None:
    words = ["--data", "scenes", "--split", "test", "--n", "4", "--steps", "1", "--extractor", "none"]
    ldm(["evaluate", str(chain / "ldm"), *words, "--out", str(tmp_path / "scenes.json")])
    found = values(tmp_path / "scenes.json")
    how = json.loads((tmp_path / "scenes.json").read_text())["protocol"]
    assert how["reference"]["pictures"] == 24  # as the run's recipe says
    assert (
        0 <= found["prompts_satisfied"] <= 1
        and "satisfied_colour" in found
        and "satisfied_relation" not in found
    )


def test_real_pictures_are_read_as_the_run_read_its_own(
    chain: Path, pictures: Path, classifier: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(chain / "vae", run)
    recipe = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(recipe.replace("background: white", "background: black"))
    for name in ("train", "test"):
        (tmp_path / "clear" / name).mkdir(parents=True)
        for i in range(8):
            Image.new("RGBA", (SIDE, SIDE)).save(tmp_path / "clear" / name / f"{i}.png")
    seen = {}
    for model in (run, run / "model"):
        words = ["--data", str(tmp_path / "clear"), "--extractor", str(classifier), "--size", "8"]
        out = tmp_path / f"{model.name}.json"
        ldm(["evaluate", str(model), *words, "--cache", str(tmp_path / "cache"), "--out", str(out)])
        seen[json.loads(out.read_text())["protocol"]["reference"]["background"]] = values(out)["psnr"]
    assert seen["black"] != seen["white"] and len([*(tmp_path / "cache").iterdir()]) == 2
    assert data_at(None, str(run)).path == data_at("scenes", str(run)).path == "scenes"
    assert data_at("scenes", str(run)).scenes.count == 24
    assert data_at(str(pictures), str(run)).background == "black"
    (run / "config.yaml").write_text("a: [1")
    with pytest.raises(UserError, match="is no YAML"):
        data_at(None, str(run))


def test_what_a_model_for_one_task_is_measured_with_is_said(model: LatentDiffusion) -> None:
    with pytest.raises(
        UserError, match="trained to restore pictures, not to draw; measure it with `ldm recover`"
    ):
        require_fitting(Evaluation(data=DataConfig()), replace(model, task=Restore()))


@pytest.mark.parametrize("asked", [{"guidance": 2.0}, {"interval": (0.5, 4.0)}])
def test_a_model_that_is_told_nothing_is_not_guided(model: LatentDiffusion, asked: dict[str, Any]) -> None:
    nothing = replace(model, conditioner=Unconditional())
    assert Drawing().scale(nothing) == 1 and Drawing().scale(model) == 4
    with pytest.raises(ValueError, match="leave out --guidance and --interval"):
        Drawing(**asked).by(nothing)


SWEEP = ("--model", "{ldm}", "--data", "{data}", "--extractor", "none", "--out", "/nowhere/x.png")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["evaluate", "/nowhere", "--data", "{data}"], "/nowhere"),
        (["evaluate", "{ldm}", "--data", "/nowhere", "--extractor", "none"], "There is nothing at /nowhere"),
        (["evaluate", "{ldm}", "--data", "{data}", "--extractor", "x"], "There is no extractor 'x'"),
        (["evaluate", "{ldm}", "--data", "{data}", "--extractor", "none", "--extractor", "x"], "remove one"),
        (["evaluate", "{ldm}", "--data", "{data}", "--extractor", "none", "--n", "0"], "--n is 0"),
        (["evaluate", "{ldm}", "--data", "{data}", "--extractor", "{extractor}", "--n", "7"], "at least 8"),
        (["evaluate", "{ldm}", "--data", "{data}", *(["--extractor", "{extractor}"] * 2)], "Two extractors"),
        (["evaluate", "{ldm}", "--data", "{data}", "--extractor", "none", "--split", "dev"], "dev"),
        (["evaluate", "{ldm}/model", "--data", "{data}", "--extractor", "none", "--raw"], "no run folder"),
        (["evaluate", "{ldm}/model", "--data", "{data}", "--extractor", "none"], "--out FILE.json"),
        (
            ["evaluate", "{ldm}", "--data", "{data}", "--extractor", "none", "--sampler", "x"],
            "sampler is 'x'",
        ),
        (["evaluate", "{vae}", "--data", "{data}", "--extractor", "none", "--n", "21"], "only 20 pictures"),
        (["evaluate", "{data}", "--data", "{data}", "--extractor", "none"], "holds neither"),
        (
            ["evaluate", "{ldm}", "--data", "{data}", "--extractor", "none", "--size", "32"],
            "leave out --size",
        ),
        (["evaluate", "{vae}", "--data", "{data}", "--extractor", "none", "--size", "0"], "--size is 0"),
        (["evaluate", "{vae}", "--data", "{data}", "--extractor", "none", "--steps", "3"], "draws nothing"),
        (
            ["evaluate", "{ldm}", "--data", "{data}", "--extractor", "none", "--out", "{data}"],
            "must name a file .json",
        ),
        (["sweep", "steps", "1", "--model", "{vae}", "--data", "{data}", "--out", "x.png"], "draws nothing"),
        (
            ["sweep", "steps", "1.5", "--model", "{ldm}", "--data", "{data}", "--out", "x.png"],
            "steps is a int",
        ),
        (["sweep", "steps", "1", "--model", "{ldm}", "--data", "{data}", "--out", "x.json"], "ends in .png"),
        (["sweep", "steps", "1", "--model", "{ldm}", "--data", "{data}", "--out", "x"], "ends in .png"),
        (["sweep", "sampler", "ddim", "foo", *SWEEP], "sampler is 'foo'"),
        (["sweep", "steps", "1", "0", *SWEEP], "steps is 0"),
        (["sweep", "guidance", "1", "nan", *SWEEP], "guidance scale is nan"),
        (["sweep", "guidance", "2", "1", "--interval", "0.5", "4", *SWEEP], "--interval says how to guide"),
        (["sweep", "steps", "1", "--interval", "4", "0.5", *SWEEP], "interval is (4.0, 0.5)"),
        (["compare", "/nowhere.json", "/nowhere.json"], "/nowhere.json can't be read"),
        (
            ["compare", "{ldm}/model/model_index.json", "{ldm}/model/model_index.json"],
            "no result of `ldm evaluate`",
        ),
        (["classifier", "--data", "scenes", "--out", "x"], "has no classes"),
        (["classifier", "--data", "{data}", "--epochs", "0", "--out", "x"], "epochs is 0"),
    ],
)
def test_bad_input_is_one_sentence(
    words: list[str],
    message: str,
    chain: Path,
    pictures: Path,
    classifier: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as ended:
        places = {"ldm": chain / "ldm", "vae": chain / "vae", "data": pictures, "extractor": classifier}
        ldm([word.format(**places) for word in words])
    said = capsys.readouterr().err
    assert ended.value.code == 1 and message in said and "Traceback" not in said
    assert not Path("/nowhere").exists()
