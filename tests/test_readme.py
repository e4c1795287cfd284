"""What the README and the manual show runs as shown."""

import argparse
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import train_ldm
import train_vae
from ldm.config import DRY_RUN, load, without
from pipelines.cli import parser
from tests.support import ROOT

README = (ROOT / "README.md").read_text()


MANUAL = (ROOT / "docs" / "manual.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README + MANUAL, re.DOTALL)


@pytest.mark.parametrize("code", blocks("python"))
def test_python_runs(code: str, chain: Path, tmp_path: Path) -> None:
    if "diffusers" in code:
        pytest.importorskip("diffusers", reason="diffusers is the oracle")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "scenes").symlink_to(chain)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env=environment)
    assert (tmp_path / "circle.png").exists()


@pytest.mark.parametrize("line", [line for block in blocks("sh") for line in block.splitlines()])
def test_commands_are_understood(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    words = shlex.split(line, comments=True)
    words = [word.removeprefix(".venv/bin/") if i == 0 else word for i, word in enumerate(words)]
    if words[0] == "make":
        assert f"\n{words[1]}:" in (ROOT / "Makefile").read_text()
    elif words[0] == "python":
        script = {"train_vae.py": train_vae, "train_ldm.py": train_ldm}[words[1]]
        load(script.Recipe, without(DRY_RUN, words[2:])[0], prog=words[1])
    elif words[0] == "ldm":
        parser().parse_args(words[1:])
    else:
        assert words[:3] in (
            ["python3", "-m", "venv"],
            ["pip", "install", "-e"],
            ["source", ".venv/bin/activate"],
        )


def test_the_manual_names_every_verb() -> None:
    verbs = next(a for a in parser()._actions if isinstance(a, argparse._SubParsersAction)).choices
    assert [verb for verb in verbs if f"`ldm {verb}" not in MANUAL] == []


def test_links_lead_somewhere() -> None:
    for text, folder in ((README, ROOT), (MANUAL, ROOT / "docs")):
        headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
        anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
        for link in re.findall(r"\]\((?!https?:)([^)]+)\)", text):
            assert link[1:] in anchors if link.startswith("#") else (folder / link).exists(), link


def test_the_file_tree_is_the_one_there_is() -> None:
    tree = README.split("## Where things are")[1]
    named = set(re.findall(r"\b(\w+\.py)\b", tree))
    folders = ("autoencoder", "ldm", "pipelines")
    there = {p.name for folder in folders for p in (ROOT / folder).rglob("*.py")}
    assert there - {"__init__.py", "__main__.py"} - named == set()
    assert named - there == {"train_vae.py", "train_ldm.py"}
