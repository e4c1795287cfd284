"""The C of this package, compiled once on the machine that it runs on, and kept in the user's cache.

It needs a C compiler that is there, as on most machines that train; without one a message says so, and PyTorch's own
operations serve, which give the same to rounding. Threads are those of PyTorch's OpenMP: the library is linked to none
of its own, and finds what PyTorch has loaded.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import warnings
from functools import cache
from pathlib import Path
from subprocess import PIPE

import torch
from torch import Tensor, nn

from autoencoder.files import user_cache
from autoencoder.notices import Notice

FOLDER = Path(__file__).parent
COMPILERS = "cc", "gcc"
COMPILING = "-O3", "-march=native", "-fopenmp", "-fPIC", "-c"
SECONDS = 180
"""After which a compiler is given up"""

KINDS = {"p": ctypes.c_void_p, "i": ctypes.c_int, "l": ctypes.c_long, "f": ctypes.c_float}
SIGNATURES = {
    "vector_lanes": "",
    "winograd_weights": "ppplli",
    "winograd": "piippppllllli",
    "winograd_gradient": "pipippllllli",
    "attention": "ppppppillllli",
    "attention_backward": "pppppppppillllli",
    "gate_forward": "ppilli",
    "gate_backward": "pppilli",
    "norm_forward": "ppppppfiilllli",
    "norm_backward": "pppppppppiilllli",
}
"""Of the functions: addresses, flags, sizes, and last on how many threads"""


class Uncompiled(Exception):
    """Why there is no library, in words for a person."""


class Unloadable(Uncompiled):
    """It was compiled, but not into what can be loaded."""


@cache
def library() -> ctypes.CDLL | None:
    """What the C makes; None where it serves nobody, as it is written for Linux on x86-64 with AVX, or can't be made,
    which a warning says, once."""
    if os.environ.get("LDM_C") == "0":
        return None
    vectors = torch.backends.cpu.get_cpu_capability().startswith("AVX")
    if sys.platform != "linux" or platform.machine() != "x86_64" or not vectors:
        return None
    try:
        return opened_somewhere()
    except (Uncompiled, OSError, ValueError) as why:
        say_unused(str(why))
        return None


def say_unused(why: str) -> None:
    warnings.warn(
        f"Our convolutions, normalisations, gates and attention in C can't be used: {why}. Drawing and training on the "
        "CPU take PyTorch's own, which are slower.",
        Notice,
        stacklevel=3,
    )


def at_hand(*parts: Tensor) -> bool:
    """Whether tensors lie in this machine's memory and may be worked on by their addresses: none is of a subclass, and
    nobody traces or counts operations."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or watched():
        return False
    return all(
        type(part) in (Tensor, nn.Parameter) and part.device.type == "cpu" and not part.is_neg()
        for part in parts
    )


def watched() -> bool:
    """Whether a mode or a transform sees every operation, which PyTorch tells by functions of its own; where it has
    them no longer, nobody can know."""
    try:
        return bool(torch._C._len_torch_dispatch_stack()) or bool(
            torch._C._functorch.peek_interpreter_stack()
        )
    except AttributeError as gone:
        say_unkept(str(gone))
        return True


@cache
def say_unkept(why: str) -> None:
    """Once."""
    say_unused(f"this PyTorch does not tell who watches its operations ({why})")


def lanes() -> int:
    """How many values a vector of the library has: channels must be a multiple. 0 where there is no library."""
    made = library()
    return made.vector_lanes() if made else 0


def call(name: str, *arguments: object) -> None:
    """A function of the library, tensors by their addresses, on as many threads as PyTorch takes."""
    if getattr(library(), name)(*arguments, torch.get_num_threads()):
        raise MemoryError("There is not memory enough to compute in.")


def opened_somewhere() -> ctypes.CDLL:
    """From the user's cache; where that can't be written to or run from, compiled for this process alone."""
    try:
        return opened(user_cache("compiled"))
    except (OSError, RuntimeError, Unloadable):  # RuntimeError: there is no home
        with tempfile.TemporaryDirectory() as folder:
            return opened(Path(folder))  # a file that was opened may go


def opened(folder: Path) -> ctypes.CDLL:
    """The library from a folder, put there if it is not: under a hash of all that it depends on, as several machines
    may share the folder.

    Raises:
        Uncompiled: there is no compiler, it fails, or what it made can't be loaded.
        OSError: the folder can't be written to.
    """
    compiler, texts = chosen_compiler(), [file.read_text() for file in sorted(FOLDER.glob("*.[ch]"))]
    about = "\n".join([*texts, *compiler, *COMPILING, processor()])
    file = folder / f"{hashlib.sha256(about.encode()).hexdigest()[:32]}.so"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".") as beside:
            compile_to(Path(beside) / file.name, compiler)
            (Path(beside) / file.name).replace(file)
    try:
        made = ctypes.CDLL(str(file))
    except OSError as error:
        raise Unloadable(str(error)) from None
    for name, kinds in SIGNATURES.items():
        getattr(made, name).argtypes = [KINDS[kind] for kind in kinds]
    return made


def chosen_compiler() -> list[str]:
    """$CC, which may have arguments, or the first that is found."""
    named = shlex.split(os.environ.get("CC", ""))
    found = next(filter(None, map(shutil.which, named[:1] or COMPILERS)), None)
    if found is None:
        sought = (
            f"the compiler that CC names, {named[0]}," if named else f"a C compiler ({', '.join(COMPILERS)})"
        )
        raise Uncompiled(f"{sought} is not found")
    return [found, *named[1:]]


def compile_to(file: Path, compiler: list[str]) -> None:
    """In two steps: linked with -fopenmp it would bring an OpenMP of its own, whose threads contend with PyTorch's."""
    sources = sorted(FOLDER.glob("*.c"))
    if not sources:
        raise Uncompiled(f"there are no *.c in {FOLDER}")
    objects = [str(file.with_name(f"{source.stem}.o")) for source in sources]
    run(*([*compiler, *COMPILING, str(one), "-o", made] for one, made in zip(sources, objects, strict=True)))
    run([*compiler, "-shared", *objects, "-lm", "-o", str(file)])


def run(*commands: list[str]) -> None:
    """All at once."""
    compiler = commands[0][0]
    started = [subprocess.Popen(command, stdout=PIPE, stderr=PIPE, text=True) for command in commands]
    try:
        for one in started:
            complaint = one.communicate(timeout=SECONDS)[1].splitlines()
            if one.returncode:
                told = [line for line in complaint if "error" in line] or complaint or [str(one.returncode)]
                raise Uncompiled(f"{compiler} says: {told[0]}")
    except subprocess.TimeoutExpired:
        raise Uncompiled(f"{compiler} took more than {SECONDS} seconds") from None
    finally:
        for one in started:
            one.kill()
            one.communicate()


def processor() -> str:
    """What the machine's instructions are: a library made for others may end the process."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line for line in lines if line.startswith("flags")), "")
