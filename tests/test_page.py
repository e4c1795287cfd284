"""Reports are pages that stand alone and show what they were given, not what it could be mistaken for."""

from pathlib import Path

from PIL import Image

from pipelines.reports.page import Page


def test_page_stands_alone_and_escapes_what_it_is_given(tmp_path: Path) -> None:
    page = Page("a <b>title</b>")
    page.verdict("fine & good", "good")
    page.table(["name", "value"], [["<script>alert(1)</script>", 3]])
    page.picture(Image.new("RGB", (4, 4), "red"), "a red picture")
    page.save(tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert "<script" not in text and "&lt;script&gt;" in text and "fine &amp; good" in text
    assert "http" not in text and "data:image/png;base64," in text
