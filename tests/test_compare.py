"""`ldm compare` and `ldm sweep`: only what was measured in the same way is laid side by side."""

import json
import subprocess
from pathlib import Path

import pytest
import torch
from PIL import Image

pytest.importorskip("torch_fidelity", reason="the figures are torch-fidelity's")

from ldm.config import UserError
from pipelines.cli import main as ldm
from pipelines.evaluation.compare import Row, compare
from pipelines.evaluation.protocol import commit, precision, versions
from pipelines.evaluation.sweeps import plot
from tests.support import DRAWING, ROOT, values


def test_compare_refuses_what_was_measured_otherwise(
    result: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = json.loads(result.read_text())
    other["protocol"]["guidance"] = 7.0
    other["figures"]["kid"]["value"] += 100
    (tmp_path / "b.json").write_text(json.dumps(other))
    with pytest.raises(SystemExit) as ended:
        ldm(["compare", str(result), str(tmp_path / "b.json")])
    said = capsys.readouterr().err
    assert ended.value.code == 1 and "guidance: 2.0 and 7.0" in said and "steps" not in said
    ldm(["compare", str(result), str(tmp_path / "b.json"), "--but", "guidance"])
    table = capsys.readouterr().out.splitlines()
    (kid,) = [line for line in table if line.startswith("kid ")]
    (fd,) = [line for line in table if line.startswith("fd ")]
    assert "the first is better" in kid and "within chance" in fd
    assert "17 pictures are few" in table[-1]


def test_compare_refuses_fields_that_are_not_there_and_values_that_are_no_numbers(
    result: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="'guidnce', but the protocols have no such field"):
        compare(result, result, ["guidnce"])
    assert compare(result, result, ["reference"])
    other = json.loads(result.read_text())
    other["figures"]["kid"]["value"] = "much"
    (tmp_path / "b.json").write_text(json.dumps(other))
    with pytest.raises(UserError, match="no number"):
        compare(result, tmp_path / "b.json")


def test_a_difference_is_judged_by_its_error_and_direction() -> None:
    figure = {"value": 1.0, "error": 0.1, "interval": [0.8, 1.2]}
    assert "within chance" in Row("fid", figure, figure | {"value": 1.2}).verdict
    assert "the first is better" in Row("fid", figure, figure | {"value": 1.4}).verdict
    assert "the second is better" in Row("precision", figure, figure | {"value": 1.4}).verdict
    assert "not known" in Row("fid", figure, figure | {"error": None}).verdict


def test_the_stamp_says_where_less_than_float32_is_computed_in() -> None:
    assert precision(torch.device("cpu")) == "float32"
    assert precision(torch.device("cuda")) == "float32, convolutions in TF32"  # torch's default
    assert precision(torch.device("cpu"), "bf16") == "drawn in bf16, measured in float32"


def test_what_is_drawn_in_bf16_or_with_reuse_is_not_compared_with_what_is_not(
    chain: Path, asked: list[str], result: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["evaluate", str(chain / "ldm"), *asked, *DRAWING, "--training-split", "none"]
    ldm([*words, "--precision", "bf16", "--reuse", "2", "--out", str(tmp_path / "b.json")])
    capsys.readouterr()
    assert values(tmp_path / "b.json")["kid"] != values(result)["kid"]
    with pytest.raises(SystemExit):
        ldm(["compare", str(result), str(tmp_path / "b.json"), "--but", "training"])
    said = capsys.readouterr().err
    assert "precision: float32 and drawn in bf16, measured in float32; reuse: 1 and 2" in said
    ldm(["compare", str(result), str(tmp_path / "b.json"), "--but", "training", "precision", "reuse"])


def test_sweep_plots_the_figures_and_measures_anew_only_what_was_measured_otherwise(
    chain: Path,
    asked: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    again = ["--n", "8", "--training-split", "none", "--out", str(tmp_path / "steps.png")]
    words = ["sweep", "steps", "1", "2", "--model", str(chain / "ldm"), *asked, *again]
    ldm(words)
    assert min(Image.open(tmp_path / "steps.png").size) > 100
    files = [tmp_path / "steps" / f"steps-{n}.json" for n in (1, 2)]
    found = [json.loads(file.read_text())["protocol"] for file in files]
    assert [how.pop("steps") for how in found] == [1, 2] and found[0] == found[1]

    measured: list[Path] = []
    monkeypatch.setattr("pipelines.evaluation.sweeps.measure", lambda bench, file: measured.append(file))
    capsys.readouterr()
    ldm(words)
    assert not measured and capsys.readouterr().out.count("is there already") == 2
    other = json.loads(files[1].read_text())
    other["model"]["unet_sha256"] = "0" * 64
    files[1].write_text(json.dumps(other))
    ldm([*words, "--guidance", "4"])
    said = capsys.readouterr().out
    assert measured == files[1:] and "unet_sha256: " + "0" * 64 in said
    ldm([*words, "--guidance", "3"])
    assert measured == [files[1], *files] and "guidance: 4.0 and 3.0" in capsys.readouterr().out


def test_figures_of_several_extractors_are_plotted_each_and_what_has_none_is_refused(
    result: Path, tmp_path: Path
) -> None:
    files, content = [tmp_path / "a.json", tmp_path / "b.json"], json.loads(result.read_text())
    figures = content["figures"]
    content["figures"] = {"kid (a)": figures["kid"], "kid (b)": figures["kid"], "recall": figures["recall"]}
    for file, steps in zip(files, (5, 20), strict=True):
        content["protocol"]["steps"] = steps
        file.write_text(json.dumps(content))
    panels = plot(files, "steps").axes
    wanted = ["KID (a) (less is better)", "KID (b) (less is better)", "recall (more is better)"]
    assert [panel.get_title() for panel in panels] == wanted
    assert all([*panel.get_xticks()] == [5, 20] for panel in panels)
    content["figures"] = {"copies_pixels": figures["copies_pixels"]}
    files[0].write_text(json.dumps(content))
    with pytest.raises(UserError, match="none of the figures"):
        plot(files[:1], "steps")


def test_the_stamp_names_the_commit(tmp_path: Path) -> None:
    def git(*words: str) -> None:
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", str(tmp_path), *who, *words], check=True, capture_output=True)

    (tmp_path / "inner").mkdir()
    (tmp_path / "a.py").write_text("1")
    git("init")
    git("add", "a.py")
    git("commit", "-m", "a", "--no-gpg-sign")
    clean = commit(tmp_path)
    assert len(clean) == 12 and int(clean, 16) and commit(tmp_path / "inner") == ""
    commit.cache_clear()
    (tmp_path / "a.py").write_text("2")
    assert commit(tmp_path) == f"{clean}-dirty"
    said = versions(torch.device("cpu"))["ldm-from-scratch"]
    assert ("commit" in said) == (ROOT / ".git").exists(), said
