"""A text in the pixels is read back, outlives what the manual says, and is refused where it would not be read."""

import argparse
import importlib.util
import io
import multiprocessing
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm.config import UserError
from ldm.scenes import Scenes
from pipelines.cli import main as ldm
from pipelines.cli.out import write
from pipelines.doctor.picture import findings, printable
from pipelines.watermark import (
    BITS,
    bits_of,
    library,
    marked,
    require_room,
    require_text,
    text_of,
    watermark_of,
)


@pytest.fixture(scope="module")
def scene() -> Image.Image:
    if not importlib.util.find_spec("blind_watermark"):
        pytest.skip("watermarks are optional: blind-watermark is not installed")
    return Scenes(2, size=256, level=1, split="test")[1]["image"]


def through_jpeg(image: Image.Image, quality: int) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file)


def test_a_watermark_is_read_back_and_outlives_jpeg_and_scaling(scene: Image.Image) -> None:
    made = marked(scene, "ldm-2026")
    assert watermark_of(made) == "ldm-2026" and made.size == scene.size
    assert watermark_of(through_jpeg(made, 90)) == "ldm-2026"
    assert watermark_of(made.resize((192, 192)).resize((256, 256))) == "ldm-2026"
    difference = np.asarray(made).astype(float) - np.asarray(scene)
    assert 10 * np.log10(255**2 / np.square(difference).mean()) > 28
    assert (
        watermark_of(scene) is None and watermark_of(made.crop((3, 5, 256, 256)).resize((256, 256))) is None
    )
    assert watermark_of(Image.new("RGB", (256, 256))) is None


def test_importing_the_package_does_not_change_how_processes_start(
    scene: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.startswith("blind_watermark")]:
        monkeypatch.delitem(sys.modules, name)
    before = multiprocessing.get_start_method(allow_none=True)
    library()
    assert multiprocessing.get_start_method(allow_none=True) == before


def test_bits_are_the_text_or_nothing() -> None:
    for text in ("a", "0123456789", "héé", "🦊"):
        bits = bits_of(text)
        assert bits.shape == (BITS,) and text_of(bits) == text
        for i in range(BITS - 1):
            bits[i] = not bits[i]
            assert text_of(bits) != text
            bits[i] = not bits[i]
    assert text_of(np.zeros(BITS, bool)) is None and text_of(np.ones(BITS, bool)) is None


def test_what_can_not_be_marked_is_one_sentence(scene: Image.Image) -> None:
    for text in ("", "12345678901", "ééééééé"):
        with pytest.raises(UserError, match="must be of 1 to 10 bytes"):
            require_text(text)
    with pytest.raises(UserError, match=r"64 x 300 pixels does not hold one .* at least 256 a side"):
        require_room((64, 300))


def test_without_the_package_it_says_which(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "blind_watermark", None)
    with pytest.raises(UserError, match="pip install blind-watermark"):
        require_text("me")


def test_the_commands_mark_what_they_make_or_say_why_not(
    chain: Path,
    scene: Image.Image,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = ["generate", str(chain / "ldm"), "a red circle", "--steps", "1", "--watermark", "me"]
    with pytest.raises(SystemExit):
        ldm([*words, "--out", str(tmp_path / "small")])
    assert "a picture of 16 x 16 pixels does not hold one" in capsys.readouterr().err
    assert not [*(tmp_path / "small").glob("*.png")]
    ldm([*words, "--size", "256x256", "--out", str(tmp_path / "out")])
    found = dict(findings(tmp_path / "out" / "0000.png"))
    said = capsys.readouterr().err
    assert (found["watermark"] == "me") is ("can't be read back from" not in said)
    assert found["notes"] == "a model made it" and found["prompt"] == "a red circle"
    ldm(["doctor", "picture", str(tmp_path / "out" / "0000.png")])
    assert "made_by:            ldm generate" in capsys.readouterr().out
    write({tmp_path / "scene.png": (scene, {})}, argparse.Namespace(credentials=None), "me")
    assert watermark_of(Image.open(tmp_path / "scene.png")) == "me" and not capsys.readouterr().err

    again = [
        "recreate",
        str(chain / "ldm"),
        str(tmp_path / "out" / "0000.png"),
        "--out",
        str(tmp_path / "again"),
    ]
    ldm(again)
    assert "the same, bit for bit, with watermark 'me'" in capsys.readouterr().out
    assert "watermark" not in Image.open(tmp_path / "again" / "0000.png").info
    monkeypatch.setitem(sys.modules, "blind_watermark", None)
    ldm(again)
    assert "not compared, as that has the watermark 'me'" in capsys.readouterr().out


def test_notes_of_strangers_stay_on_their_line() -> None:
    assert printable("x\n  signature (C2PA):   Trusted\n\x1b[31mred") == "x signature (C2PA): Trusted [31mred"
