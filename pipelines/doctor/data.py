"""`ldm doctor data`: what is wrong with a set of pictures, before anything is trained on it, as a page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ldm.conditioning import ConditioningConfig, TextConfig, make_conditioner
from ldm.config import UserError
from ldm.data import DataConfig, Source, open_source
from ldm.inspection import Look, look
from pipelines.doctor.duplicates import Pairs, pairs
from pipelines.reports.page import Page
from pipelines.sheets import contact_sheet, side_by_side

SPLITS = ("train", "validation", "test")
SHOWN = 24
"""Pictures, or names, of one kind on the page"""
SCALE = {"good": 0, "doubtful": 1, "bad": 2}


@dataclass(frozen=True, kw_only=True)
class Part:
    """One split, looked at."""

    split: str
    source: Source
    looks: list[Look]

    @property
    def sound(self) -> list[int]:
        return [i for i, seen in enumerate(self.looks) if not seen.reason]

    @property
    def bad(self) -> list[Look]:
        return [seen for seen in self.looks if seen.reason]


class Findings:
    """Sentences with how serious they are."""

    def __init__(self) -> None:
        self.said: list[tuple[str, str]] = []

    def add(self, kind: str, text: str) -> None:
        self.said.append((kind, text))

    @property
    def worst(self) -> str:
        return max((kind for kind, _ in self.said), key=SCALE.__getitem__, default="good")


def doctor_data(config: DataConfig, split: str | None, text: TextConfig, out: Path) -> None:
    """Look at every picture and caption, write the page `out`, and print the verdict.

    Args:
        split: the only one looked at; by default all of train, validation and test that there are.
        text: the tokenizer that captions are cut by.

    Raises:
        UserError: nothing can be trained on; the page is written all the same if there are pictures at all.
    """
    parts = [
        Part(split=name, source=source, looks=[*look(source, thorough=True)])
        for name, source in _open(config, split)
    ]
    page, rest, findings = Page(f"Data: {config.where}"), Page(""), Findings()
    for part in parts:
        _describe(rest, part)
        _sizes(rest, findings, part, config.size)
        _bad(rest, findings, part)
        _captions(rest, findings, part, text)
        _classes(rest, findings, part)
    _duplicates(rest, findings, parts)
    usable = any(part.sound for part in parts)
    verdict = {
        "good": "Nothing stands in the way of training on this.",
        "doubtful": "This can be trained on; look at what is said below first.",
        "bad": "This needs mending before it is trained on.",
    }[findings.worst]
    if not usable:
        verdict = "None of these pictures can be used."
    page.verdict(verdict, findings.worst)
    page.list([sentence for _, sentence in findings.said])
    page.extend(rest)
    page.save(out)
    for line in (verdict, *(f"- {sentence}" for _, sentence in findings.said), f"The page is {out}."):
        print(line)
    if not usable:
        raise UserError(f"None of the pictures in {config.where} can be used; see {out}.")


def _open(config: DataConfig, split: str | None) -> list[tuple[str, Source]]:
    found = []
    for name in (split,) if split else SPLITS:
        try:
            found.append((name, open_source(config, name)))
        except UserError:
            if name in (split, SPLITS[0]):
                raise
    return found


def _share(part: int, whole: int) -> str:
    return f"{part:,} of {whole:,} ({part / max(1, whole):.1%})"


def _thumbnails(part: Part, indices: Sequence[int]) -> list[Image.Image]:
    return [part.source.picture(i, 96) for i in indices]


def _spread(items: Sequence[Any], count: int = SHOWN) -> list[Any]:
    """`count` of the items, evenly over all."""
    return [items[i * len(items) // count] for i in range(count)] if len(items) > count else [*items]


def _describe(page: Page, part: Part) -> None:
    page.heading(f"Split {part.split}")
    head, *notes = [line for line in part.source.describe().splitlines() if not line.startswith("  ")]
    page.text(f"{head}.")
    page.list([*notes, *(part.source.example(i) for i in range(min(3, len(part.source))))])
    shown = _spread(part.sound)
    if shown:
        texts = [part.source.example(i).partition(": ")[2] for i in shown]
        page.picture(
            contact_sheet(_thumbnails(part, shown), texts if any(texts) else None, columns=6, tile=96),
            f"{len(shown)} pictures from all over the split, as they are cropped",
        )


def _sizes(page: Page, findings: Findings, part: Part, size: int) -> None:
    from matplotlib.figure import Figure

    sizes = np.array([part.looks[i].size for i in part.sound]).reshape(-1, 2)
    if not len(sizes):
        return
    rows = []
    for name, values in (
        ("width", sizes[:, 0]),
        ("height", sizes[:, 1]),
        ("width : height", sizes[:, 0] / sizes[:, 1]),
    ):
        rows.append([name, *(f"{v:.4g}" for v in np.quantile(values, [0, 0.25, 0.5, 0.75, 1]))])
    page.table(["pixels", "least", "a quarter below", "half below", "three quarters below", "most"], rows)
    figure = Figure(figsize=(6, 2.2))
    axes = figure.subplots()
    axes.hist(sizes.min(1), bins=40)
    axes.set_xlabel("shorter side in pixels")
    axes.set_ylabel("pictures")
    page.plot(figure, "How large the pictures are")
    kinds = Counter((part.looks[i].format, part.looks[i].mode) for i in part.sound)
    page.table(["format", "mode", "pictures"], [[*kind, f"{count:,}"] for kind, count in kinds.most_common()])
    small = int((sizes.min(1) < size).sum())
    if small:
        findings.add(
            "doubtful",
            f"{part.split}: {_share(small, len(sizes))} pictures are smaller than {size} pixels and would be enlarged.",
        )
    long = np.maximum(sizes[:, 0] / sizes[:, 1], sizes[:, 1] / sizes[:, 0])
    lost = int((long > 2).sum())
    if lost:
        findings.add(
            "doubtful",
            f"{part.split}: {_share(lost, len(sizes))} pictures are more than twice as long as wide: a square crop "
            "loses over half of them.",
        )


def _bad(page: Page, findings: Findings, part: Part) -> None:
    remarks = [seen for seen in part.looks if seen.remark]
    if remarks:
        findings.add(
            "good", f"{part.split}: {len(remarks):,} pictures, {remarks[0].name} first: {remarks[0].remark}."
        )
    if not part.bad:
        return
    share, allowed = len(part.bad) / len(part.looks), part.source.config.bad_share
    findings.add(
        "bad" if share > allowed else "doubtful",
        f"{part.split}: {_share(len(part.bad), len(part.looks))} pictures can't be used; data.bad_share lets a run "
        f"leave out {allowed:.1%}.",
    )
    page.text("Pictures that can't be used:")
    page.list([f"{seen.name} {seen.reason}" for seen in part.bad[:500]])
    if len(part.bad) > 500:
        page.text(f"and {len(part.bad) - 500:,} more, which a run names in bad_pictures.jsonl")


def _captions(page: Page, findings: Findings, part: Part, text: TextConfig) -> None:
    if part.source.texts is None:
        findings.add("good", f"{part.split}: there are no captions.")
        return
    texts = [part.source.texts[i] for i in part.sound]
    empty = sum(not caption.strip() for caption in texts)
    if empty:
        findings.add("doubtful", f"{part.split}: {_share(empty, len(texts))} captions are empty.")
    if empty == len(texts):
        return
    words = [len(caption.split()) for caption in texts]
    rows = [[f"{v:.0f}" for v in np.quantile(words, [0, 0.25, 0.5, 0.75, 1])]]
    page.table(
        ["words in a caption: least", "a quarter below", "half below", "three quarters below", "most"], rows
    )
    page.text(f"{len(set(texts)):,} of {len(texts):,} captions are different.")
    conditioner = make_conditioner(ConditioningConfig(kind="text", text=text), texts, ())
    cut = conditioner.cut(texts)  # type: ignore[operator]
    if cut:
        findings.add(
            "doubtful",
            f"{part.split}: {_share(cut, len(texts))} captions are longer than {text.max_length} tokens of "
            f"{text.encoder or 'the small tokenizer'} and would be cut; raise conditioning.text.max_length.",
        )


def _classes(page: Page, findings: Findings, part: Part) -> None:
    if part.source.labels is None:
        return
    labels = part.source.labels[part.sound].tolist()
    counts = Counter(dict.fromkeys(part.source.classes, 0))
    counts.update(part.source.classes[label] for label in labels)
    ordered = counts.most_common()
    page.text(f"{len(ordered):,} classes:")
    if len(ordered) > SHOWN:
        ordered = [*ordered[: SHOWN // 2], ("...", 0), *ordered[-SHOWN // 2 :]]
    page.table(
        ["class", "pictures"], [[name, f"{count:,}" if name != "..." else ""] for name, count in ordered]
    )
    most, least = max(counts.values()), min(counts.values())
    rare = min(counts, key=counts.__getitem__)
    if least == 0:
        findings.add(
            "doubtful",
            f"{part.split}: {_share(list(counts.values()).count(0), len(counts))} classes have no picture: "
            f"{rare} for one.",
        )
    elif most > 10 * least:
        findings.add(
            "doubtful",
            f"{part.split}: the largest class has {most / least:.0f} times the pictures of the smallest, {rare}; "
            "consider data.balance.",
        )


def _duplicates(page: Page, findings: Findings, parts: Sequence[Part]) -> None:
    """Copies within a split, and leaks from one split into another."""
    owner = [(part, i) for part in parts for i in range(len(part.looks))]
    found = pairs([part.looks[i] for part, i in owner])
    within = Pairs(*([p for p in kind if owner[p[0]][0] is owner[p[1]][0]] for kind in found))
    across = Pairs(*([p for p in kind if owner[p[0]][0] is not owner[p[1]][0]] for kind in found))
    for words, some, kind in (
        ("pictures that are exact copies of another", within.equal, "doubtful"),
        ("pictures that are nearly equal to another", within.near, "good"),
        ("exact copies in two splits: what is measured on the later one is flattered", across.equal, "bad"),
        ("nearly equal pictures in two splits", across.near, "doubtful"),
    ):
        if not some:
            continue
        first, second = (f"{owner[i][0].split}: {owner[i][0].looks[owner[i][1]].name}" for i in some[0])
        findings.add(kind, f"{len(some):,} {words}, {first} and {second} for one.")
        page.heading(f"{len(some):,} {words}")
        shown = _spread(some)
        rows = [
            [owner[pair[side]][0].source.picture(owner[pair[side]][1], 96) for pair in shown]
            for side in (0, 1)
        ]
        page.picture(side_by_side(*rows), f"{len(shown)} of them, each above the one that it is like")
        page.list([" = ".join(owner[i][0].looks[owner[i][1]].name for i in pair) for pair in shown])
