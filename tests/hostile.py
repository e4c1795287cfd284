"""Mutated model folders, each of which must load or be refused in a sentence: python -m tests.hostile RUN [--count N]

Counts exceptions that are none of ours, files opened outside of the folder, and the slowest and largest cases.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import resource
import shutil
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import trange

from ldm.config import UserError
from pipelines import LatentDiffusion

REFUSALS = (UserError, ValueError, OSError)
NUMBERS = [0, 1, -1, 3, 10**6, 2**31, 2**63, 10**30, 0.5, -1.5, 1e308, True, False, None]
WORDS = ["", "x", "../../../../etc/passwd", "/etc/passwd", "a" * 10_000, "DistilBertModel", "\0", "🦊"]
TREES = [[], [0], [1, 2], [64] * 1000, {}, {"a": {}}, [[[[]]]], ["diffusers", "os.system"], [None, None]]
VALUES: list[Any] = [*NUMBERS, *WORDS, *TREES]


def places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of every value in a JSON tree."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in list(items):
        yield tree, key
        yield from places(value)


def value_for(rng: random.Random) -> Any:
    """One of `VALUES`, a copy: it may be mutated too."""
    return copy.deepcopy(rng.choice(VALUES))


def mutated_json(path: Path, rng: random.Random) -> str:
    tree = json.loads(path.read_text())
    for _ in range(rng.choice((1, 1, 2, 4))):
        container, key = rng.choice(list(places(tree)))
        action = rng.random()
        if action < 0.6:
            container[key] = value_for(rng)
        elif action < 0.8:
            del container[key]
        elif isinstance(container, dict):
            container[rng.choice(("auto_map", "x", "_class_name", "vocab_file", "quantization_config"))] = (
                value_for(rng)
            )
        if not list(places(tree)):
            break
    text = json.dumps(tree)
    return text if rng.random() < 0.9 else text[: rng.randrange(len(text))]


def mutated_header(data: bytes, rng: random.Random) -> bytes:
    """A safetensors file with another header: bits, lengths, names, shapes, offsets."""
    (size,) = struct.unpack("<Q", data[:8])
    header, rest = bytearray(data[8 : 8 + size]), data[8 + size :]
    kind = rng.randrange(5)
    if kind == 0:
        for _ in range(rng.choice((1, 3, 20))):
            header[rng.randrange(len(header))] = rng.randrange(256)
    elif kind == 1:
        return struct.pack("<Q", rng.choice((0, 1, size - 1, size + 1, 2**31, 2**63))) + bytes(header) + rest
    elif kind == 2:
        return data[: rng.randrange(len(data))]
    elif kind == 3:
        rest = rest[: rng.randrange(len(rest))]
    else:
        tree = json.loads(header)
        container, key = rng.choice(list(places(tree)))
        container[key] = value_for(rng)
        header = bytearray(json.dumps(tree).encode())
    return struct.pack("<Q", len(header)) + bytes(header) + rest


@contextmanager
def opened_files(inside: Path) -> Iterator[list[str]]:
    """While open, the files outside of `inside` that are opened for reading and are no part of Python."""
    seen: list[str] = []
    watching = [True]
    own = (
        str(inside),
        sys.prefix,
        sys.base_prefix,
        str(Path(__file__).parents[1]),
        "/proc",
        "/sys",
        "/dev",
        "/tmp",
    )

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if (
            watching
            and event == "open"
            and isinstance(arguments[0], str)
            and not arguments[0].startswith(own)
        ):
            seen.append(arguments[0])

    sys.addaudithook(hook)
    try:
        yield seen
    finally:
        watching.clear()


def outcome(load: Callable[[], object]) -> str:
    """loaded, refused, or what else happened."""
    try:
        load()
    except REFUSALS as problem:
        return "refused" if str(problem).strip() else f"no words: {type(problem).__name__}"
    except KeyboardInterrupt:
        raise
    except BaseException as problem:  # a panic in Rust is no Exception
        return f"CRASH {type(problem).__name__}: {str(problem)[:200]}"
    return "loaded"


def fuzz(model: Path, count: int, seed: int = 0) -> dict[str, Any]:
    """Load `count` mutations of the stock folder `model`; what became of them."""
    rng = random.Random(seed)
    found: Counter[str] = Counter()
    longest, largest, worst = 0.0, 0, ""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        shutil.copytree(model, folder)
        files = [p for p in sorted(folder.rglob("*")) if p.is_file()]
        LatentDiffusion.from_pretrained(folder)
        with opened_files(folder) as outside:
            for _ in trange(count, unit="folder", disable=None):
                path = rng.choice(files)
                before = path.read_bytes()
                if path.suffix == ".safetensors":
                    path.write_bytes(mutated_header(before, rng))
                else:
                    path.write_text(mutated_json(path, rng))
                memory, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
                became = outcome(lambda: LatentDiffusion.from_pretrained(folder))
                found[became] += 1
                seconds = time.process_time() - began
                if seconds > longest:
                    longest, worst = seconds, f"{path.relative_to(folder)} {became[:60]}"
                largest = max(largest, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory)
                path.write_bytes(before)
    return {
        "outcomes": dict(found),
        "outside": sorted(set(outside)),
        "longest_seconds": round(longest, 2),
        "longest": worst,
        "largest_growth_mb": round(largest / 1024, 1),
    }


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("run", type=Path)
    options.add_argument("--count", type=int, default=10_000)
    options.add_argument("--seed", type=int, default=0)
    given = options.parse_args()
    print(json.dumps(fuzz(given.run, given.count, given.seed), indent=1))


if __name__ == "__main__":
    main()
