"""A published model carries the text of its licence, or the person is asked for it."""

import datetime
from pathlib import Path

import pytest

from ldm.config import UserError
from pipelines.publishing.licenses import LICENSES, TEXTS, license_text, require_license

FIRST = {
    "apache-2.0": "Apache License",
    "bsd-3-clause": f"Copyright (c) {datetime.date.today().year} alice",
    "cc-by-4.0": "Creative Commons Attribution 4.0 International",
    "cc-by-nc-4.0": "Creative Commons Attribution-NonCommercial 4.0 International",
    "cc-by-nc-sa-4.0": "Creative Commons Attribution-NonCommercial-ShareAlike 4.0 International",
    "cc-by-sa-4.0": "Creative Commons Attribution-ShareAlike 4.0 International",
    "cc0-1.0": "Creative Commons Legal Code",
    "mit": "MIT License",
}


def test_the_texts_here_are_of_licences_that_the_hub_knows() -> None:
    assert {path.stem for path in TEXTS.iterdir()} == FIRST.keys() <= set(LICENSES)
    assert len(set(LICENSES)) == len(LICENSES) and "unknown" not in LICENSES


@pytest.mark.parametrize("name", FIRST)
def test_a_text_begins_with_its_title_and_has_no_gaps(name: str) -> None:
    text = license_text(name, None, "alice")
    assert text.strip().splitlines()[0].strip() == FIRST[name] and text.endswith("\n")
    assert "<" not in text and len(text) > 1000


def test_the_persons_own_text_is_taken_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "terms.txt").write_text("Copyright (c) <year> <holder>\n")
    for name in ("mit", "other"):
        assert license_text(name, tmp_path / "terms.txt", "alice") == "Copyright (c) <year> <holder>\n"


def test_a_text_that_is_not_here_must_be_given(tmp_path: Path) -> None:
    for name in ("openrail", "other"):
        with pytest.raises(UserError, match=f"The text of {name} isn't here .* --license-file FILE"):
            license_text(name, None, "alice")
    (tmp_path / "terms.pdf").write_bytes(b"%PDF\xff\xfe")
    for file in (tmp_path / "nowhere", tmp_path / "terms.pdf"):
        with pytest.raises(UserError, match="can't be read as text"):
            license_text("mit", file, "alice")


def test_the_licence_is_one_that_the_hub_knows() -> None:
    require_license("gemma")
    for name in ("my-own", "unknown", "MIT"):
        with pytest.raises(UserError, match=f"--license is {name}, which is no licence that the hub knows"):
            require_license(name)
