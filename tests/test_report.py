"""The report shows what the run has left behind, all of it inside one file, and fits a phone."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from pipelines.cli import main as ldm
from pipelines.reports.report import report
from pipelines.reports.run_record import read_record, sheets
from pipelines.sheets import contact_sheet, tiles

PROTOCOL = {
    "n": 64,
    "extractors": {"tiny": {"sha256": "0123abcd" * 8}},
    "guidance": 4.0,
    "note": "<b>bold</b>",
}


@pytest.fixture(scope="module")
def trained(chain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of both runs, evaluated."""
    out = tmp_path_factory.mktemp("report")
    for stage in ("vae", "ldm"):
        shutil.copytree(chain / stage, out / stage, ignore=shutil.ignore_patterns("evaluations"))
    folder = out / "ldm" / "evaluations"
    folder.mkdir()
    Image.new("RGB", (900, 40), "red").save(folder / "test.png")
    found = {
        "figures": {
            "kid": {"value": 0.012345, "error": 0.002, "interval": [0.008, 0.016]},
            "class_accuracy": {"value": 0.995, "error": None, "interval": None},
        },
        "left_out": {"clip_score": "there is no CLIP model"},
        "protocol": PROTOCOL,
        "pictures": {"nearest": "test.png"},
        "measured": "2026-11-21T12:00:00",
    }
    (folder / "test.json").write_text(json.dumps(found))
    (folder / "torn.json").write_text("{")
    return out


@pytest.fixture(scope="module")
def page(trained: Path) -> str:
    return html.unescape(report(trained / "ldm").read_text())


def test_nothing_lies_outside_the_file(trained: Path) -> None:
    text = report(trained / "ldm", trained / "page.html").read_text()
    for address in re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?([^"'\s>)]+)""", text):
        assert address.startswith(("data:image/", "#part-")), address
    assert "<script" not in text and "<b>" not in text and "@import" not in text


def test_every_prompt_is_shown_at_every_look(trained: Path, page: str) -> None:
    looks = sheets(trained / "ldm", "drawn")
    assert [step for step, _ in looks] == [0, 3, 6]
    prompts = [caption for caption, _ in tiles(looks[0][1])]
    assert len(prompts) == 4
    newest, *rows = page.split(">Samples</h2>")[1].split("<h2")[0].split("<h3>")[1:]
    assert (
        newest.startswith("At step 6<") and re.findall(r"<figcaption>(.*?)</figcaption>", newest) == prompts
    )
    for prompt, row in zip(prompts, rows, strict=True):
        assert row.startswith(prompt)
        assert re.findall(r"<figcaption>(.*?)</figcaption>", row) == ["step 0", "step 3", "step 6"]


def test_looks_are_spread_from_the_first_to_the_last(tmp_path: Path) -> None:
    (tmp_path / "samples").mkdir()
    for step in range(0, 2300, 100):
        contact_sheet([Image.new("RGB", (4, 4))]).save(tmp_path / "samples" / f"drawn-{step:08d}.png")
    assert [step for step, _ in sheets(tmp_path, "drawn", most=4)] == [0, 700, 1400, 2200]


def test_reconstructions_of_both_reports_stand_beside_their_originals(trained: Path, page: str) -> None:
    own = html.unescape(report(trained / "vae").read_text())
    for text in (page, own):
        part = text.split(">Reconstructions</h2>")[1].split("<h2")[0]
        assert part.count("<figcaption>original</figcaption>") == part.count("<figcaption>step 6<") == 4
        result = json.loads((trained / "vae" / "result.json").read_text())
        assert f"PSNR {result['psnr_db']:.4g} dB" in part and "on split test" in part
    assert ">Samples</h2>" not in own


def test_figures_come_with_their_protocol_and_what_is_missing_is_said(page: str) -> None:
    part = page.split(">Metrics</h2>")[1].split("<h2")[0]
    cells = re.findall(r"<td>(.*?)</td>", part)
    assert cells == ["KID", "0.0123 ± 0.0020", "0.0080 to 0.0160", "class accuracy", "0.995", ""]
    assert "<li>CLIP score: there is no CLIP model</li>" in part
    for line in (
        "measured: 2026-11-21T12:00:00",
        "n: 64",
        f"extractors.tiny.sha256: {'0123abcd' * 8}",
        "guidance: 4.0",
        "note: <b>bold</b>",
    ):
        assert line in part
    assert "torn.json can't be read" in part and "Nothing has been measured of vae" in part


def test_recipe_timings_and_environment_are_those_of_the_run(trained: Path, page: str) -> None:
    assert (trained / "ldm" / "config.yaml").read_text().split("network:")[0].strip() in page
    start = read_record(trained / "ldm").starts[0]
    assert (
        f"torch {start['torch']}" in page and f"processes 1, device cpu, machine {start['machine']}" in page
    )
    assert "Finished after 6 steps" in page and ">24<" in page


def test_a_run_under_way_and_one_without_its_autoencoder_say_so(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "ldm", tmp_path / "alone")
    for name in ("result.json", "metrics.jsonl", "history.jsonl"):
        (tmp_path / "alone" / name).unlink()
    shutil.rmtree(tmp_path / "alone" / "samples")
    recipe = tmp_path / "alone" / "config.yaml"
    recipe.write_text(re.sub("(?m)^autoencoder: .*$", "autoencoder: some/where/else", recipe.read_text()))
    text = html.unescape(report(tmp_path / "alone").read_text())
    for said in (
        "Under way, or stopped: 0 of 6 steps so far",
        "No samples have been saved",
        "Nothing has been logged",
        "neither at some/where/else nor beside this one",
        "Where it was trained has not been recorded",
    ):
        assert said in text


def test_the_command_answers_in_a_sentence(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ldm(["report", str(trained / "ldm"), "--out", str(tmp_path / "page.html")])
    assert (tmp_path / "page.html").exists() and "page.html" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        ldm(["report", str(tmp_path)])
    said = capsys.readouterr().err
    assert stopped.value.code == 1 and "holds no config.yaml" in said and "Traceback" not in said


@pytest.mark.parametrize("recipe", ["", "a: 1", "run: {seed: 0}", "a: [1", b"\xff"])
def test_a_folder_with_another_recipe_is_refused(
    recipe: str | bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_bytes(recipe.encode() if isinstance(recipe, str) else recipe)
    with pytest.raises(SystemExit):
        ldm(["report", str(tmp_path)])
    assert "give the folder of a training run" in capsys.readouterr().err


def test_pictures_outside_of_the_run_are_not_shown(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "ldm", tmp_path / "ldm")
    file = tmp_path / "ldm" / "evaluations" / "test.json"
    Image.new("RGB", (900, 40), "blue").save(tmp_path / "secret.png")
    file.write_text(file.read_text().replace('"test.png"', '"../../secret.png"'))
    assert "leads out of that folder" in html.unescape(report(tmp_path / "ldm").read_text())


MEASURE = """<!doctype html><body><p id="found"></p><iframe style="width:{width}px;height:800px;border:0"
srcdoc="{page}" onload="const page = this.contentDocument;
document.getElementById('found').textContent = 'wide ' + page.documentElement.scrollWidth + ' broken ' +
[...page.images].filter(image => !image.naturalWidth).length + ' of ' + page.images.length"></iframe>"""


@pytest.mark.parametrize("width", [390, 1280])
def test_in_a_browser_the_page_is_as_wide_as_its_window_and_all_pictures_show(
    trained: Path, tmp_path: Path, width: int
) -> None:
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("there is no Chromium to look at the page with")
    page = report(trained / "ldm", tmp_path / "page.html").read_text()
    frame = tmp_path / "frame.html"
    frame.write_text(MEASURE.format(width=width, page=html.escape(page)))
    told = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    seen = subprocess.run(
        [browser, *told, "--dump-dom", frame.as_uri()], capture_output=True, text=True, check=True
    )
    found = re.search(r"wide (\d+) broken (\d+) of (\d+)", seen.stdout.partition("<iframe")[0])
    assert found, seen.stderr[-2000:]
    assert int(found[1]) <= width and int(found[2]) == 0 and int(found[3]) > 20
