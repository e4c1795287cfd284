"""The house rules: who imports whom, and no file or function too long to be read."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = [
    path
    for folder in ("autoencoder", "ldm", "pipelines", ".")
    for path in sorted((ROOT / folder).glob("*.py" if folder == "." else "**/*.py"))
    if path.parent.name != "shipped"  # these run where our packages are not
]
FORBIDDEN = {
    "autoencoder": {"ldm", "pipelines", "train_vae", "train_ldm"},
    "ldm": {"pipelines", "train_vae", "train_ldm"},
    "pipelines": {"train_vae", "train_ldm"},
}
OURS = pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))


def imported(tree: ast.AST) -> set[str]:
    """Top-level names of all modules that a file imports, also inside functions."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


@OURS
def test_imports_point_one_way(path: Path) -> None:
    names = imported(ast.parse(path.read_text()))
    assert not names & FORBIDDEN.get(path.relative_to(ROOT).parts[0], set())
    assert "diffusers" not in names, "diffusers is a test oracle, not a part of the product"


@OURS
def test_files_and_functions_stay_readable(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, f"{node.name} is too long"


@OURS
def test_nothing_is_unpickled(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            assert ast.unparse(node.func) not in ("torch.load", "pickle.load", "pickle.loads", "yaml.load")
            trusting = [k for k in node.keywords if k.arg == "trust_remote_code"]
            assert all(isinstance(k.value, ast.Constant) and k.value.value is False for k in trusting)
