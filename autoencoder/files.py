"""Nothing is ever half written: build beside, flush, rename."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor


def user_cache(part: str) -> Path:
    """Where a part of what can be made again is kept: in $XDG_CACHE_HOME/ldm, by default in ~/.cache/ldm."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ldm" / part


@contextmanager
def written_beside(target: Path) -> Iterator[Path]:
    """A fresh folder to fill; it takes the place of folder `target` only when the block ends without an error.

    What the block wrote is flushed to the disk before the rename, and the rename before this returns. After a
    crash there is either the old folder or the new one; leftovers of a crash are removed by the next call, and
    by `mend`.
    """
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    mend(target.parent, target.name)
    fresh, old = (target.with_name(f".{target.name}.{word}") for word in ("writing", "old"))
    fresh.mkdir()
    try:
        yield fresh
        for path in sorted(fresh.rglob("*")):
            flush(path)
        flush(fresh)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    if target.exists():
        target.rename(old)
    fresh.rename(target)
    flush(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def require_writable(folder: Path) -> None:
    """Make the folder for what takes long to make, before it is made; OSError if nothing can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as problem:
        raise OSError(f"{folder} can't be written to: {problem.strerror}; choose another folder.") from None


def require_replaceable(target: Path, mark: str) -> None:
    """That a folder may be replaced: it is not there, empty, or holds the file `mark` of what lay there before.

    Raises:
        FileExistsError: it holds something else.
    """
    if target.exists() and not (target / mark).is_file() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(
            f"{target} is there already and holds something else; choose a new or empty folder."
        )


def mend(folder: Path, name: str = "*") -> None:
    """Remove what killed writes have left in `folder`: of `name`, or of all. Nothing may be writing there now."""
    for old in sorted(folder.glob(f".{name}.old")):
        target = old.with_name(old.name.removeprefix(".").removesuffix(".old"))
        if not target.exists():  # killed between the two renames
            old.rename(target)
    for leftover in [*folder.glob(f".{name}.old"), *folder.glob(f".{name}.writing")]:
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink()


def link_folder(source: Path, target: Path) -> None:
    """Put the files of folder `source` into the folder `target` too, without a second copy where the disk can."""

    def link(file: str, beside: str) -> None:
        try:
            os.link(file, beside)
        except OSError:  # a file system without hard links
            shutil.copyfile(file, beside)

    shutil.copytree(source, target, copy_function=link, dirs_exist_ok=True)


def write_tensors(path: Path, tensors: dict[str, Tensor], notes: dict[str, str] | None = None) -> None:
    """A safetensors file for all who may read its folder: by itself the library gives it to its owner alone."""
    save_file(tensors, path, metadata=notes)
    path.chmod(path.parent.stat().st_mode & 0o644)


def write_text(path: Path, text: str) -> None:
    """Replace the file `path` by `text` in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.writing")
    fresh.write_text(text, encoding="utf-8")
    flush(fresh)
    fresh.replace(path)
    flush(path.parent)


def flush(path: Path) -> None:
    """Force a file or a folder's entries to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
