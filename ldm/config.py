"""Recipes: frozen dataclasses, filled from YAML and the command line by one function, `load`."""

from __future__ import annotations

import ast
import functools
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, NoReturn, TypeVar

import jsonargparse
import yaml

from autoencoder.notices import spoken

Recipe = TypeVar("Recipe")
DRY_RUN = "--dry-run"


class UserError(Exception):
    """Something only the person can put right. The message says what is wrong, where, and what to do.

    Command lines print it as one sentence and exit with 1.
    """


def command(
    prog: str, explain: Callable[[BaseException], str | None] = lambda problem: None
) -> Callable[[Callable[[Sequence[str]], None]], Callable[..., None]]:
    """Decorates the `main(argv)` of a command: bad input ends in one sentence on stderr and exit code 1.

    So does what `explain` has a sentence for; notices are sentences too. With LDM_DEBUG=1 in the environment the
    traceback is shown instead.
    """

    def decorate(main: Callable[[Sequence[str]], None]) -> Callable[..., None]:
        @functools.wraps(main)
        def run(argv: Sequence[str] | None = None) -> None:
            try:
                with spoken(prog):
                    main(sys.argv[1:] if argv is None else argv)
            except KeyboardInterrupt:
                raise SystemExit(130) from None
            except Exception as problem:
                known = isinstance(problem, UserError | OSError | ValueError)
                text = explain(problem) or (str(problem) if known else None)
                if text is None or os.environ.get("LDM_DEBUG"):
                    raise
                sentence = " ".join(text.split()) or type(problem).__name__
                print(f"{prog}: {sentence}", file=sys.stderr)
                raise SystemExit(1) from None

        return run

    return decorate


class Parser(jsonargparse.ArgumentParser):
    """Says what is wrong in a sentence, without a page of usage."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        sentence = in_our_words(" ".join(str(message).split()))
        print(f"{self.prog}: {sentence}; see {self.prog} --help", file=sys.stderr)
        raise SystemExit(2)


WANTED = {
    "<class 'int'>": "a whole number",
    "<class 'float'>": "a finite number",
    "<class 'bool'>": "true or false",
    "<class 'str'>": "text",
    "<class 'tuple'>": "a list",
    "tuple[int, ...]": "a list of whole numbers",
}


def in_our_words(message: str) -> str:
    """What jsonargparse says of a value of another type than its key's, as our refusals are worded.

    A message of another form stays as it is, after its key.
    """
    if group := re.fullmatch(r"""Parser key "([\w.]+)": Unable to load config '(.*?)' - .*""", message):
        return f"{group[1]} is {group[2]}, but it is a group of settings: set those by their own names"
    found = re.fullmatch(r'Parser key "([\w.]+)": (.*?)(?:\. Got|Errors: .* Given) value: (.*)', message)
    other = re.sub(r'^Parser key "([\w.]+)": ', r"\1: ", message)
    if found is None:
        return other
    key, said, value = found.groups()
    each = r"typing\.Literal\[.*?\]|<class '\w+'>|tuple\[int, \.\.\.\]|tuple with \d+ elements"
    kinds = [kind for kind in re.findall(each, said) if kind != "<class 'NoneType'>"]
    if not kinds:
        return other
    return f"{key} is {value}, but must be {' or '.join(map(_wanted, kinds))}"


def _wanted(kind: str) -> str:
    """A type, as jsonargparse writes it, in words."""
    if kind.startswith("typing.Literal"):
        *most, last = ast.literal_eval(kind.removeprefix("typing.Literal"))
        return f"{', '.join(map(str, most))} or {last}" if most else str(last)
    if kind.startswith("tuple with"):
        return f"a list of {kind.split()[2]}"
    return WANTED.get(kind, kind)


def parser_for(cls: type, prog: str) -> jsonargparse.ArgumentParser:
    """A parser with `--config FILE.yaml` and one `--section.key` for each field of the dataclass `cls`."""
    jsonargparse.set_parsing_settings(
        subclasses_disabled=[is_dataclass],  # a recipe says values, never which class to import
        docstring_parse_attribute_docstrings=True,
    )
    parser = Parser(prog=prog, description=cls.__doc__)
    parser.add_argument("--config", action="config", help="a recipe in YAML; later arguments override it")
    parser.epilog = (
        f"{DRY_RUN}: try everything once, say what it takes and how long, and leave nothing behind "
        "but the copy of a stream"
    )
    parser.add_class_arguments(cls, None)
    return parser


def without(flag: str, argv: Sequence[str]) -> tuple[list[str], bool]:
    """Arguments without a flag, and whether it was among them."""
    return [word for word in argv if word != flag], flag in argv


def load(cls: type[Recipe], argv: Sequence[str], *, prog: str) -> Recipe:
    """Read `--config` files and `--section.key value` overrides into the frozen dataclass `cls`.

    Unknown keys and wrong types end the program with exit code 2 and a sentence that names the key.
    """
    parser = parser_for(cls, prog)
    try:
        read = parser.instantiate(parser.parse_args(list(argv)))
        return cls(**{field.name: read[field.name] for field in fields(cls)})  # type: ignore[arg-type]
    except ValueError as problem:
        print(f"{prog}: {problem}", file=sys.stderr)
        raise SystemExit(2) from None


def plain(value: Any) -> Any:
    """A recipe as nested dicts and lists of plain values, ready for YAML or JSON."""
    if hasattr(value, "__dataclass_fields__"):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def to_yaml(recipe: Any) -> str:
    """The resolved recipe, every default written out."""
    return yaml.safe_dump(plain(recipe), sort_keys=False, allow_unicode=True, width=110)


def filled(saved: dict[str, Any], recipe: Any) -> dict[str, Any]:
    """A recipe as it was saved, with their defaults for settings that it is too old to have."""
    whole = dict(saved)
    for f in fields(recipe):
        value = getattr(recipe, f.name)
        if f.name in saved:
            if is_dataclass(value) and isinstance(saved[f.name], dict):
                whole[f.name] = filled(saved[f.name], value)
        elif f.default is not MISSING:
            whole[f.name] = plain(f.default)
        elif f.default_factory is not MISSING:
            whole[f.name] = plain(f.default_factory())
    return whole


def differences(before: Any, now: Any) -> list[str]:
    """How two plain recipes differ, a sentence part a setting: "run.seed was 0 and is 1"."""
    old, new = flat(before), flat(now)
    return [
        f"{key} was {old.get(key)!r} and is {new.get(key)!r}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """{"run": {"seed": 0}} => {"run.seed": 0}"""
    if not isinstance(tree, dict):
        return {prefix.removesuffix("."): tree}
    return {
        key: value for name, item in tree.items() for key, value in flat(item, f"{prefix}{name}.").items()
    }
