"""The command line: what it writes, and that bad input ends in one sentence."""

from pathlib import Path

import pytest
from PIL import Image

import train_ldm
import train_vae
from pipelines.cli import main as ldm
from tests.support import PROMPTS, TOY


def test_generate_writes_pictures_with_their_settings(chain: Path, tmp_path: Path) -> None:
    (tmp_path / "more.txt").write_text(PROMPTS[1] + "\n\n")
    flags = f"--prompts {tmp_path}/more.txt --steps 2 --n 2 --seed 7 --size 24x16 --out {tmp_path}/out"
    ldm(["generate", str(chain / "ldm"), *flags.split(), PROMPTS[0]])
    assert len(list((tmp_path / "out").glob("0*.png"))) == 4 and (tmp_path / "out" / "sheet.png").exists()
    last = Image.open(tmp_path / "out" / "0003.png")
    assert last.size == (24, 16)
    assert (
        last.text["prompt"] == PROMPTS[1] and last.text["seed"] == "10" and last.text["sampler"] == "dpmpp_2m"
    )


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["generate", "nowhere", "x", "--out", "o"], 1, "neither a folder here nor a model on the hub"),
        (["generate", "{ldm}", "--out", "o"], 1, "needs a caption"),
        (["generate", "{ldm}", "x", "--steps", "0", "--out", "o"], 1, "steps is 0"),
        (["generate", "{ldm}", "x", "--steps", "1001", "--out", "o"], 1, "steps is 1001"),
        (["generate", "{ldm}", "x", "--sampler", "magic", "--out", "o"], 1, "sampler is 'magic'"),
        (["generate", "{ldm}", "x", "--size", "15x16", "--out", "o"], 1, "width is 15"),
        (["generate", "{ldm}", "x", "--batch", "-1", "--out", "o"], 1, "batch is -1"),
        (["generate", "{ldm}", "x", "--n", "0", "--out", "o"], 1, "n is 0"),
        (
            ["recognise", "{ldm}", "--data", "nowhere/at/all", "--out", "o.json"],
            1,
            "nothing at nowhere/at/all",
        ),
        (["generate", "{ldm}", "x", "--size", "big", "--out", "o"], 2, "'big' is not WIDTHxHEIGHT"),
        (["generate", "{ldm}", "x", "--guidance", "nan", "--out", "o"], 1, "scale is nan"),
        (["generate", "{ldm}", "x"], 2, "--out"),
        (
            ["generate", "{ldm}", "x", "--out", "{ldm}/config.yaml"],
            1,
            "config.yaml can't be written to: File exists",
        ),
        (["generate", "{ldm}", "x", "--out", "o", "--stepz", "3"], 2, "unrecognized arguments: --stepz"),
        (["paint"], 2, "invalid choice: 'paint'"),
    ],
)
def test_bad_requests_are_one_sentence(
    chain: Path, arguments: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        ldm([argument.format(ldm=chain / "ldm") for argument in arguments])
    said = capsys.readouterr().err
    assert ended.value.code == code and message in said and "Traceback" not in said


@pytest.mark.parametrize(
    ("script", "arguments", "code", "message"),
    [
        (train_vae, ["--run.oot", "x"], 2, "run.oot"),
        (train_vae, ["--run.steps", "many"], 2, "run.steps"),
        (train_vae, ["--run.batch_size", "0"], 2, "run.batch_size is 0"),
        (train_vae, ["--config", "nowhere.yaml"], 2, "nowhere.yaml"),
        (train_vae, ["--data.path", "nowhere/at/all"], 2, "data.scenes is set, but data.path is nowhere"),
        (
            train_vae,
            ["--data.path", "nowhere/at/all", "--data.scenes.count", "8192"],
            1,
            "There is nothing at nowhere/at/all",
        ),
        (train_vae, ["--data.size", "17"], 2, "data.size is 17"),
        (train_vae, ["--show.every", "0"], 2, "show.every is 0"),
        (train_ldm, ["--show.steps", "0"], 2, "show.steps is 0"),
        (train_ldm, ["--show.guidance", ".inf"], 2, "show.guidance is inf"),
        (train_ldm, ["--autoencoder", "{vae}", "--spacing", "karras"], 1, "spacing karras with dpmpp_2m"),
        (train_ldm, ["--autoencoder", "{vae}", "--sampler", "magic"], 1, "magic"),
        (train_ldm, ["--conditioning.text.encoder", "x"], 2, "text.width is of the small encoder"),
        (train_vae, ["--network.norm_num_groups", "3"], 2, "norm_num_groups"),
        (train_vae, ["--run.out", "/proc/nope"], 1, "/proc/nope can't be made"),
        (train_ldm, ["--autoencoder", "nowhere/at/all/x"], 1, "nowhere/at/all/x"),
        (train_ldm, ["--conditioning.kind", "class"], 2, "conditioning.text is set"),
        (train_ldm, ["--path.kind", "edm", "--path.flow.shift", "3"], 2, "flow is set"),
        (train_ldm, ["--autoencoder", "{vae}", "--network.in_channels", "9"], 1, "network.in_channels is 9"),
    ],
)
def test_bad_settings_are_one_sentence(
    chain: Path,
    tmp_path: Path,
    script,
    arguments: list[str],
    code: int,
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    stage = script.__name__.removeprefix("train_")
    with pytest.raises(SystemExit) as ended:
        script.main(
            ["--config", str(TOY / f"{stage}.yaml"), "--run.out", str(tmp_path / "run")]
            + [argument.format(vae=chain / "vae") for argument in arguments]
        )
    said = capsys.readouterr().err
    assert ended.value.code == code and message in said and "Traceback" not in said
