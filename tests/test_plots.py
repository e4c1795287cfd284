"""Plots show the paths as they are, and `ldm plot` answers bad input in a sentence."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFont

from ldm.pictures import to_images, to_tensor
from pipelines import LatentDiffusion
from pipelines.cli import main as ldm
from pipelines.reports.plots import PATHS, interpolation, levels, noising, prompt_sheet, schedules, trajectory
from pipelines.reports.run_plots import by_level, curves, logged, losses, speeds
from pipelines.sheets import _lines, contact_sheet, tiles

PROMPTS = ["a large red circle", "a small blue star"]


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


def shown(picture: Image.Image, side: int = 128) -> np.ndarray:
    """As a sheet shows it."""
    return np.asarray(contact_sheet([picture], tile=side).crop((8, 8, 8 + side, 8 + side)), dtype=float)


def test_a_sheet_has_room_for_tall_pictures_and_says_when_a_caption_has_none() -> None:
    images = [Image.new("RGB", (16, 16 * i), (200, 0, 0)) for i in (1, 2, 1, 1)]
    captions = ["one", "many words and more of them, all in one long line that has an end", "three", "four"]
    sheet = contact_sheet(images, captions, columns=2, tile=64, headings=["a row", "another"])
    boxes = [box for _, box in json.loads(sheet.info["tiles"])]
    assert boxes[1][3] - boxes[1][1] == 128 and boxes[2][1] > boxes[1][3] + 30
    pixels = np.asarray(sheet).astype(int)
    red = (pixels[..., 0] - pixels[..., 1]) > 150
    assert [tile.size for _, tile in tiles(sheet)] == [(64, 64), (64, 128), (64, 64), (64, 64)]
    assert red.sum() == sum((x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in boxes), "nothing is drawn over"
    font = ImageFont.load_default(12)
    cut = _lines(captions[1], font, 64).splitlines()
    assert len(cut) == 3 and cut[-1].endswith("…") and all(font.getlength(line) <= 64 for line in cut)
    assert _lines("word " * 20_000, font, 64).endswith(" …"), "at once, however long it is"


def test_a_sheet_says_where_its_pictures_lie(tmp_path: Path) -> None:
    images = [Image.new("RGB", (16, 8 * i), (50 * i, 0, 0)) for i in (1, 2, 3)]
    found = tiles(contact_sheet(images, ["one", "two", "drei ü"], tile=32))
    assert [caption for caption, _ in found] == ["one", "two", "drei ü"]
    assert [tile.size for _, tile in found] == [(32, 16), (32, 32), (32, 48)]
    assert [tile.getpixel((9, 9)) for _, tile in found] == [(50 * i, 0, 0) for i in (1, 2, 3)]
    assert tiles(images[0]) == []
    tall = contact_sheet([Image.new("RGB", (8, 24), "red")] * 4, ["below"] * 4, tile=32, columns=2)
    (_, first), (_, _), (_, third), _ = tiles(tall)
    assert {*first.getdata()} == {*third.getdata()} == {(255, 0, 0)}  # nothing lies over another


@pytest.mark.parametrize("sampler", ["ddim", "heun", "dpmpp_2m", "unipc", "euler_ancestral"])
def test_a_trajectory_goes_from_noise_to_what_is_drawn(chain: Path, sampler: str) -> None:
    model = LatentDiffusion.from_pretrained(chain / "ldm")
    settings = {"steps": 5, "sampler": sampler, "guidance": 2.0, "seed": 3}
    found = tiles(trajectory(model, PROMPTS, count=3, **settings))
    captions = [caption for caption, _ in found]
    assert captions == captions[:3] * 4
    noise = [float(caption.removesuffix("% noise")) for caption in captions[:3]]
    assert noise == sorted(noise, reverse=True) and noise[0] > 90
    for row, picture in enumerate(model(PROMPTS, **settings)):
        last = np.asarray(found[6 * row + 5][1], dtype=float)
        assert np.abs(last - shown(picture)).max() <= 2, "the last x_0 is the picture"
        x_t, x_0 = (np.asarray(found[6 * row + i][1], dtype=float) for i in (0, 3))
        assert np.abs(x_t - x_0).mean() > 5


def test_an_interpolation_has_the_same_ends_on_both_ways(chain: Path) -> None:
    model = LatentDiffusion.from_pretrained(chain / "ldm")
    found = [
        np.asarray(tile, dtype=float)
        for _, tile in tiles(interpolation(model, 1, 2, PROMPTS[0], count=3, steps=3))
    ]
    above, below = found[:3], found[3:]
    for end, seed in ((0, 1), (2, 2)):
        drawn = model(PROMPTS[0], seed=seed, steps=3, sampler="ddim", guidance=1.0)[0]
        assert np.abs(above[end] - shown(drawn)).max() <= 2
        again = model.decode(model.encode(to_tensor(drawn)[None]))
        assert np.abs(below[end] - shown(to_images(again)[0])).max() <= 2
    assert np.abs(above[1] - below[1]).max() > 2


def test_a_sheet_of_prompts_has_a_row_for_each(chain: Path) -> None:
    model = LatentDiffusion.from_pretrained(chain / "ldm")
    found = tiles(prompt_sheet(model, PROMPTS, n=3, steps=2, seed=5))
    assert [caption for caption, _ in found] == ["seed 5", "seed 6", "seed 7"] * 2
    alone = model(PROMPTS[1], steps=2, seed=6)[0]
    assert np.abs(np.asarray(found[4][1], dtype=float) - shown(alone)).max() <= 2


def test_curves_show_what_a_run_logged(chain: Path) -> None:
    titles = {axes.get_title() for axes in curves(chain / "ldm").axes}
    assert {"loss", "learning rate", "test loss of averaged weights", "test prompts satisfied"} <= titles
    assert not any("snr" in title for title in titles), "these are drawn by `losses`"


def test_losses_by_level_are_those_that_were_logged(chain: Path) -> None:
    lines = logged(chain / "ldm")
    found = by_level(lines)
    assert [*found] == ["test, ema", "test, raw"]
    over_steps, at_end = losses(chain / "ldm").axes
    for weights, line in zip(("ema", "raw"), at_end.lines, strict=True):
        assert line.get_label() == f"test, {'averaged' if weights == 'ema' else 'raw'} weights"
        snr, values = line.get_data()
        assert [*snr] == sorted(snr, reverse=True)
        name = f"test_loss_{weights}/ln_snr_"
        assert [*values] == [lines[-1][f"{name}{at:.2f}"] for at in snr]
    assert len(over_steps.lines) == 4 and [*over_steps.lines[0].get_xdata()] == [3, 6]


def test_speeds_leave_out_the_time_that_a_run_stood_still() -> None:
    times = [0, 2, 4, 1000, 1002, 1004]
    lines = [{"step": 10 * (i + 1), "time": float(time)} for i, time in enumerate(times)]
    assert speeds(lines, batch=4) == ([20, 30, 50, 60], [20.0] * 4)
    assert speeds(lines[:1], batch=4) == ([], [])


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
    few = ["--steps", "2", "--out"]
    ldm(["plot", "trajectory", str(chain / "ldm"), "a red circle", *few, str(tmp_path / "trajectory.png")])
    ldm(["plot", "sheet", str(chain / "ldm"), "a red circle", *few, str(tmp_path / "sheet.png")])
    ldm(
        [
            "plot",
            "interpolation",
            str(chain / "ldm"),
            "1",
            "2",
            "a circle",
            *few,
            str(tmp_path / "between.png"),
        ]
    )
    ldm(["plot", "losses", str(chain / "ldm"), "--out", str(tmp_path / "losses.png")])
    for name in ("guidance", "steps", "trajectory", "sheet", "between", "losses"):
        assert min(Image.open(tmp_path / f"{name}.png").size) > 100
    bad = [
        ["noising", str(tmp_path / "guidance.png"), "--path", "none"],
        ["curves", str(tmp_path)],
        ["losses", str(chain / "vae")],
        ["trajectory", str(chain / "ldm"), "x", "--count", "1"],
        ["trajectory", str(chain / "ldm")],
        ["sheet", str(chain / "ldm"), "x", "--n", "0"],
        ["interpolation", str(chain / "ldm"), "1", str(tmp_path / "missing.png"), "x"],
        ["noising", str(tmp_path / "missing.png")],
        ["steps", str(chain / "ldm"), "a circle", "--counts", "5", "0"],
    ]
    for words in bad:
        with pytest.raises(SystemExit) as ended:
            ldm(["plot", *words, "--out", str(tmp_path / "x.png")])
        assert ended.value.code == 1
    assert "Traceback" not in capsys.readouterr().err


def test_where_a_picture_can_not_be_saved_is_found_before_it_is_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ldm(["plot", "schedules", "--out", str(tmp_path / "new" / "schedules.svg")])
    assert (tmp_path / "new" / "schedules.svg").read_text().startswith("<?xml")
    (tmp_path / "file").touch()
    for out, why in (
        ("sheet", "ends in .png"),
        ("sheet.svg", "ends in .png"),
        ("file/x.png", "can't be written"),
    ):
        with pytest.raises(SystemExit):
            ldm(["plot", "sheet", "/no/model", "a pear", "--out", str(tmp_path / out)])
        said = capsys.readouterr().err
        assert why in said and "/no/model" not in said
