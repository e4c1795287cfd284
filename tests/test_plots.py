"""Plots show the paths as they are, and `ldm plot` answers bad input in a sentence."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.cli import main as ldm
from pipelines.plots import PATHS, curves, levels, noising, schedules


@pytest.mark.parametrize("name", PATHS)
def test_levels_go_from_clean_to_noise(name: str) -> None:
    alpha, sigma, share = levels(PATHS[name])
    snr = (alpha / sigma) ** 2
    assert (np.diff(snr) < 0).all() and snr[0] > 100 and snr[-1] < 1e-2
    assert share[0] == 0 and share[-1] == 1
    if name.startswith("VP"):
        assert np.allclose(alpha**2 + sigma**2, 1, atol=1e-6)


def test_noising_starts_at_the_picture_and_ends_in_noise() -> None:
    picture = Image.new("RGB", (32, 32), (200, 30, 30))
    sheet = np.asarray(noising(PATHS["VP cosine"], picture, count=4)).astype(float)
    first, last = sheet[8:136, 8:136], sheet[8:136, -136:-8]
    assert abs(first.mean(axis=(0, 1)) - [200, 30, 30]).max() < 3
    assert last.std() > 40


def test_every_path_has_its_curve_and_betas_are_of_vp_alone() -> None:
    betas, signal, snr = schedules().axes
    assert len(betas.lines) == 4 and len(signal.lines) == len(snr.lines) == len(PATHS)


def test_curves_show_what_a_run_logged(chain: Path) -> None:
    assert {"loss", "learning rate"} <= {axes.get_title() for axes in curves(chain / "ldm").axes}


def test_plot_from_the_command_line(chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = [
        "plot",
        "guidance",
        str(chain / "ldm"),
        "a large red circle",
        "--scales",
        "1",
        "3",
        "--steps",
        "2",
    ]
    ldm([*told, "--out", str(tmp_path / "guidance.png")])
    told = ["plot", "steps", str(chain / "ldm"), "a red circle", "--counts", "1", "2", "--samplers", "ddim"]
    ldm([*told, "--out", str(tmp_path / "steps.png")])
    for name in ("guidance", "steps"):
        assert min(Image.open(tmp_path / f"{name}.png").size) > 100
    bad = [
        ["noising", str(tmp_path / "guidance.png"), "--path", "none"],
        ["curves", str(tmp_path)],
        ["noising", str(tmp_path / "missing.png")],
    ]
    for words in bad:
        with pytest.raises(SystemExit) as ended:
            ldm(["plot", *words, "--out", str(tmp_path / "x.png")])
        assert ended.value.code == 1
    assert "Traceback" not in capsys.readouterr().err
