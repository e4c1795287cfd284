"""`ldm doctor data` finds each problem that was planted, and nothing in a set without any."""

import re
from pathlib import Path

import pytest
from PIL import Image

from ldm.scenes import Scenes
from pipelines.cli import main as ldm

SCENES = Scenes(60, size=64, level=2, split="train")


def planted(folder: Path, split: str, numbers: range, label: str = "some") -> None:
    (folder / split / label).mkdir(parents=True, exist_ok=True)
    for i in numbers:
        sample = SCENES[i]
        sample["image"].save(folder / split / label / f"{i:02d}.png")
        (folder / split / label / f"{i:02d}.txt").write_text(sample["text"])


def asked(folder: Path, capsys: pytest.CaptureFixture[str], *more: str, code: int = 0) -> tuple[str, str]:
    """What the command printed, and the page that it wrote."""
    out = folder.parent / "page.html"
    arguments = ["doctor", "data", str(folder), "--out", str(out), "--max-length", "64", *more]
    if code:
        with pytest.raises(SystemExit) as ended:
            ldm(arguments)
        assert ended.value.code == code
    else:
        ldm(arguments)
    printed = capsys.readouterr()
    return printed.out + printed.err, out.read_text()


def test_a_sound_set_is_called_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    planted(tmp_path / "data", "train", range(12), "a")
    planted(tmp_path / "data", "train", range(12, 24), "b")
    said, page = asked(tmp_path / "data", capsys)
    assert said.splitlines()[0] == "Nothing stands in the way of training on this."
    assert "a sub-folder for each class" in page and page.count("data:image/") == 2


def test_each_planted_problem_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "data"
    planted(data, "train", range(33), "common")
    planted(data, "train", range(33, 35), "rare")
    planted(data, "test", range(35, 40), "common")
    common = data / "train" / "common"
    (common / "cut.png").write_bytes((common / "00.png").read_bytes()[:100])
    (common / "copy.png").write_bytes((common / "01.png").read_bytes())
    with Image.open(common / "02.png") as image:
        image.resize((56, 56)).save(common / "again.jpg", quality=85)
    with Image.open(common / "03.png") as image:
        image.save(data / "test" / "common" / "leak.bmp")
        Image.new("RGB", (200, 64), "teal").save(common / "long.png")
    texts = {"cut": "x", "copy": "", "again": "a " * 80, "long": "long"}
    for name, text in texts.items():
        (common / f"{name}.txt").write_text(text)
    (data / "test" / "common" / "leak.txt").write_text("leaked")
    said, page = asked(data, capsys)
    for sentence in (
        r"train: 1 of 39 \(2\.6%\) pictures can't be used",
        r"1 pictures that are exact copies of another, train: \S+/01\.png and train: \S+/copy\.png",
        r"1 pictures that are nearly equal to another, train: \S+/02\.png and train: \S+/again\.jpg",
        r"1 exact copies in two splits.*train: \S+/03\.png and test: \S+/leak\.bmp",
        r"train: 1 of 38 \(2\.6%\) captions are empty",
        r"train: 1 of 38 \(2\.6%\) captions are longer than 64 tokens",
        r"the largest class has 18 times the pictures of the smallest, rare",
        r"train: 1 of 38 \(2\.6%\) pictures are smaller than 64 pixels",
        r"train: 1 of 38 \(2\.6%\) pictures are more than twice as long as wide",
    ):
        assert re.search(sentence, said), (sentence, said)
    assert "This needs mending" in said
    assert re.search(r"cut\.png is damaged", page) and "<script" not in page


def test_only_unusable_data_is_a_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.jpg").write_bytes(b"<html>")
    said, page = asked(tmp_path / "data", capsys, code=1)
    assert "None of the pictures" in said and "is HTML or XML" in page
