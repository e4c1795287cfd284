"""Checkpoints: safetensors and JSON in a folder that is either whole or not there.

`Snapshot` copies named parts, anything with `state_dict`, to the CPU; `write` puts it on the disk, beside the
training if a `Writer` calls it; `newest` finds the last sound checkpoint; `restore` puts it back. Nothing is pickled:
a nested state becomes one file of tensors and one of plain values. A model that lies in the checkpoint as a stock
folder is not stored twice: parts refer to its files.
"""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from autoencoder.files import flush, link_folder, write_tensors, written_beside
from ldm.config import UserError
from ldm.sharding import is_sharded, load, whole

MANIFEST = "manifest.json"
MODEL = "model"
"""Folder of the stock model within a checkpoint"""


class Stateful(Protocol):
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any], /) -> Any: ...


class Model(Protocol):
    """A module, or something whose attributes are modules, that writes a stock folder."""

    def save_pretrained(self, folder: Path, /) -> None: ...


class Snapshot:
    """Parts, and the model, as they are now: copies on the CPU, so that training may go on while they are written.

    Args:
        parts: each becomes NAME.safetensors and NAME.json.
        model: becomes the stock folder model/. Its tensors that are also in a part are copied and stored once.
        keep: whether this process keeps the copies. All processes make the snapshot together, one keeps it.
    """

    def __init__(
        self, parts: Mapping[str, Stateful], model: Model | None = None, *, keep: bool = True
    ) -> None:
        self.keep = keep
        self._copies: dict[tuple[Any, ...], tuple[Tensor, Tensor]] = {}
        self.parts = {name: split(part.state_dict(), self._copy) for name, part in parts.items()}
        self.model = self._copied_model(model) if keep and model is not None else None
        self._copies = {}

    def _copy(self, tensor: Tensor) -> Tensor:
        if is_sharded(tensor):
            return _on_cpu(whole(tensor)) if self.keep else whole(tensor)[:0]
        if not self.keep:
            return tensor
        key = (tensor.data_ptr(), tensor.device, tensor.dtype, tensor.shape, tensor.stride())
        if key not in self._copies:  # the original is kept, or its address could come to be another one's
            self._copies[key] = (tensor, _on_cpu(tensor))
        return self._copies[key][1]

    def _copied_model(self, model: Model) -> Model:
        attributes = [model] if isinstance(model, nn.Module) else list(vars(model).values())
        modules = [module for module in attributes if isinstance(module, nn.Module)]
        known: dict[int, Any] = {id(b): self._copy(b) for m in modules for b in m.buffers()}
        known |= {
            id(p): nn.Parameter(self._copy(p), requires_grad=False) for m in modules for p in m.parameters()
        }
        return copy.deepcopy(model, known)


def _on_cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


def write(
    folder: Path, snapshot: Snapshot, extra: Mapping[str, str], keep: int, publish: Path | None = None
) -> None:
    """Write `folder` (.../step-00001000), then remove all but the newest `keep` beside it.

    Args:
        extra: text files by name, such as the recipe.
        keep: checkpoints to leave in the parent folder, this one counted.
        publish: a folder that the stock model is put into too, once the checkpoint is whole on the disk.
    """
    with writing(folder), written_beside(folder) as fresh:
        if snapshot.model is not None:
            snapshot.model.save_pretrained(fresh / MODEL)
        stored = _Stored(fresh)
        for name, (tensors, values) in snapshot.parts.items():
            elsewhere = {key: place for key, t in tensors.items() if t.numel() and (place := stored.find(t))}
            write_tensors(
                fresh / f"{name}.safetensors", {k: t for k, t in tensors.items() if k not in elsewhere}
            )
            (fresh / f"{name}.json").write_text(json.dumps({"state": values, "elsewhere": elsewhere}))
        for name, text in extra.items():
            (fresh / name).write_text(text, encoding="utf-8")
        files = [path for path in sorted(fresh.rglob("*")) if path.is_file()]
        sums = {path.relative_to(fresh).as_posix(): digest(path) for path in files}
        (fresh / MANIFEST).write_text(json.dumps(sums, indent=1))
        for path in files:
            flush(path)
        if problem := damage(fresh):
            raise UserError(f"The checkpoint {folder} did not survive writing: {problem}; check the disk.")
        if publish is not None and snapshot.model is not None:
            with written_beside(publish) as shown:
                link_folder(fresh / MODEL, shown)
    before = [old for old in sorted(folder.parent.glob("step-*")) if old.name <= folder.name]
    for old in before[:-keep]:
        shutil.rmtree(old)


class _Stored:
    """The tensors of the stock model in a folder, to be found by their bytes."""

    def __init__(self, folder: Path) -> None:
        self._places: dict[tuple[Any, ...], list[tuple[list[str], Tensor]]] = {}
        for path in sorted((folder / MODEL).rglob("*.safetensors")):
            file = path.relative_to(folder).as_posix()
            for name, tensor in load_file(path).items():  # memory-mapped
                self._places.setdefault(self._look(tensor), []).append(([file, name], tensor))

    def _look(self, tensor: Tensor) -> tuple[Any, ...]:
        return tensor.dtype, tensor.shape, _bytes(tensor.flatten()[:64]).numpy().tobytes()

    def find(self, tensor: Tensor) -> list[str] | None:
        """[file, name] under which these very bytes are stored, or None."""
        for place, stored in self._places.get(self._look(tensor), ()):
            if torch.equal(_bytes(stored), _bytes(tensor)):  # as numbers, 0 and -0 would be equal
                return place
        return None


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


class Writer:
    """Writes beside the training, one thing at a time. What goes wrong is raised by the next `check` or `wait`."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._problem: BaseException | None = None

    def start(self, job: Callable[[], None]) -> None:
        """Begin a job, once the last one has ended."""
        self.wait()

        def work() -> None:
            try:
                job()
            except BaseException as problem:  # raised in the thread that trains
                self._problem = problem

        self._thread = threading.Thread(target=work, name="checkpoint")
        self._thread.start()

    def ended(self) -> BaseException | None:
        """What the last job raised, once it has ended."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        problem, self._problem = self._problem, None
        return problem

    def wait(self) -> None:
        """Until the last job has ended; raises what it raised."""
        if problem := self.ended():
            raise problem

    def check(self) -> None:
        """Raise what the last job has raised by now."""
        if self._problem is not None:
            self.wait()


@contextmanager
def writing(target: Path) -> Iterator[None]:
    """Around whatever writes `target`: a full or read-only disk becomes one sentence that names it."""
    try:
        yield
    except (OSError, SafetensorError) as problem:
        there = next(folder for folder in (target, *target.parents) if folder.exists())
        room = f"{shutil.disk_usage(there).free / 1e6:,.0f} MB are free there"
        raise UserError(
            f"{target} can't be written ({problem}; {room}); what was saved before is intact. "
            "Make room, then run the same command again."
        ) from None


def newest(folder: Path) -> Path | None:
    """The newest sound checkpoint in `folder`, or None if there are none.

    Damaged ones are named in a warning and set aside as damaged-step-XXXXXXXX. Raises UserError if none is sound.
    """
    candidates = sorted(folder.glob("step-*"), reverse=True)
    for candidate in candidates:
        problem = damage(candidate)
        if not problem:
            return candidate
        aside = candidate.with_name(f"damaged-{candidate.name}")
        warnings.warn(
            f"Passing over the damaged checkpoint {candidate}: {problem}. It is now {aside.name}.",
            stacklevel=2,
        )
        shutil.rmtree(aside, ignore_errors=True)
        candidate.rename(aside)
    if candidates:
        raise UserError(
            f"None of the {len(candidates)} checkpoints in {folder} is sound; "
            "run the same command once more to begin anew, or bring back a copy."
        )
    return None


def restore(folder: Path, parts: Mapping[str, Stateful]) -> None:
    """Load every part of `parts` from the checkpoint `folder`."""
    for name, part in parts.items():
        file = folder / f"{name}.json"
        if not file.exists():
            raise UserError(f"{folder} was saved without {name}; choose another run.out.")
        content = json.loads(file.read_text())
        tensors = load_file(folder / f"{name}.safetensors")
        for key, (place, there) in content["elsewhere"].items():
            with safe_open(folder / place, framework="pt") as stored:
                tensors[key] = stored.get_tensor(there)
        state = join(tensors, content["state"])
        if isinstance(part, nn.Module):
            load(part, state)
        else:
            part.load_state_dict(state)


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None."""
    try:
        sums = json.loads((folder / MANIFEST).read_text())
        if not isinstance(sums, dict) or not sums:
            return "manifest.json lists no files"
        for name, expected in sums.items():
            if digest(folder / name) != expected:
                return f"{name} has changed since it was written"
    except (OSError, ValueError) as problem:
        return f"{type(problem).__name__}: {problem}"
    return None


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def split(
    state: Any, copied: Callable[[Tensor], Tensor] = Tensor.contiguous
) -> tuple[dict[str, Tensor], Any]:
    """A nested state as tensors by path, and the same nest with each tensor replaced by {"tensor": its path}.

    A tensor that stands in several places, such as a tied weight, is kept once.
    """
    tensors: dict[str, Tensor] = {}
    first: dict[Any, str] = {}

    def walk(value: Any, path: str) -> Any:
        if isinstance(value, Tensor):
            # All that are shared out have the address 0.
            own = value.numel() and not is_sharded(value)
            same = (value.data_ptr(), value.shape, value.stride(), value.dtype) if own else path
            if same not in first:
                first[same], tensors[path] = path, copied(value)
            return {"tensor": first[same]}
        if isinstance(value, Mapping):
            # JSON keys are strings, while optimizers number their parameters.
            return {"items": [[key, walk(item, f"{path}.{key}")] for key, item in value.items()]}
        if isinstance(value, list | tuple):
            return [walk(item, f"{path}.{i}") for i, item in enumerate(value)]
        return value

    return tensors, walk(state, "state")


def join(tensors: Mapping[str, Tensor], values: Any) -> Any:
    """The inverse of `split`."""
    if isinstance(values, list):
        return [join(tensors, item) for item in values]
    if not isinstance(values, dict):
        return values
    if "tensor" in values:
        return tensors[values["tensor"]]
    return {key: join(tensors, item) for key, item in values["items"]}
