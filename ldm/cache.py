"""Stage 2 never sees pixels: latents and captions are computed once and lie on disk, memory-mapped.

Kept are the posterior's mean and standard deviation, not a sample, for each way round that a picture may be seen;
sampling, choosing the way round and dropping captions happen at run time. A folder's name is a hash of everything
its content depends on (autoencoder weights, pictures, size; text encoder and captions), so it can't be stale: a
change makes another folder. Shards are renamed into place when whole, so an interrupted build goes on; their sums
are compared at every start, and what has been damaged since is made again.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm

from autoencoder.files import flush, write_tensors, write_text
from autoencoder.kl import AutoencoderKL
from autoencoder.store import weight_hash
from ldm import random
from ldm.checkpoint import digest, writing
from ldm.conditioning import Text, labels_of, text_of
from ldm.config import UserError
from ldm.data import DataConfig, Source
from ldm.sampling import Stills, cores, groups, read, slices

VERSION = 2
SHARD = 1024
"""Pictures, or captions, a file"""
BATCH = 32
"""Pictures, or captions, encoded together"""

Members = Sequence[Sequence[int]]
"""The numbers of the pictures, or captions, in each shard"""
Compute = Callable[[Members], Iterator[dict[str, Tensor]]]
"""From the members of some shards to the tensors of each"""


class LatentCache:
    """Latents and conditions of a source, for a DataLoader that asks for lists of (position, index)."""

    def __init__(self, latents: list[dict[str, Tensor]], seed: int, places: np.ndarray, side: int) -> None:
        self.latents, self.seed = latents, seed
        self.conditions: list[dict[str, Tensor]] = []
        self.places = places  # [N,2] shard and row of each picture
        self.which: Tensor | None = None  # [N] row of each picture's caption among the distinct ones
        self.labels: Tensor | None = None
        self.shape = (latents[0]["mean"].shape[2], side, side)  # C, h, w of a square
        self.ways = latents[0]["mean"].shape[1]

    def __getitems__(self, items: list[tuple[int, int]]) -> dict[str, Tensor]:
        """{"position", "index": [B], "mean", "std": [B,C,h,w], and what the conditioner reads or has read}."""
        positions, indices = (torch.tensor(column) for column in zip(*items, strict=True))
        way = (random.uniform(self.seed, "flip", positions) < 0.5).long() if self.ways == 2 else 0 * positions
        batch = {"position": positions, "index": indices}
        for name in ("mean", "std"):
            batch[name] = torch.stack(
                [
                    self.latents[shard][name][row, w]
                    for (shard, row), w in zip(
                        self.places[indices.numpy()].tolist(), way.tolist(), strict=True
                    )
                ]
            )
        if self.which is not None:
            rows = self.which[indices].tolist()
            for name in self.conditions[0]:
                batch[name] = torch.stack([self.conditions[r // SHARD][name][r % SHARD] for r in rows])
        if self.labels is not None:
            batch["label"] = self.labels[indices]
        return batch


def build(
    folder: Path,
    source: Source,
    data: DataConfig,
    autoencoder: AutoencoderKL,
    conditioner: nn.Module,
    run: Any,
) -> LatentCache:
    """The cache of `source` in `folder`, made by all processes of `run` where it is not there yet.

    Args:
        autoencoder, conditioner: on the run's device; the conditioner's states are kept only if it is frozen.

    Raises:
        UserError: the sizes of `source` are no multiples of the autoencoder's factor, or the disk is full.
    """
    if data.bucket_step % autoencoder.config.factor:
        raise UserError(
            f"data.bucket_step is {data.bucket_step}, which the autoencoder's factor {autoencoder.config.factor} "
            "does not divide."
        )
    cache = _latents(folder, source, data, autoencoder, run)
    text = text_of(conditioner)
    if text is not None and source.texts is not None:
        _add_captions(cache, folder, source.texts, text, run)
    if text is None or labels_of(conditioner):
        cache.labels = source.labels
    return cache


def _latents(
    folder: Path, source: Source, data: DataConfig, autoencoder: AutoencoderKL, run: Any
) -> LatentCache:
    parts = [
        VERSION,
        weight_hash(autoencoder.state_dict()),
        autoencoder.config,
        source.fingerprint,
        data.size,
        data.flip,
        data.background,
        None if source.sizes is None else source.sizes.tobytes(),
    ]
    members, side = groups(source, SHARD), data.size // autoencoder.config.factor
    places = np.zeros((len(source), 2), dtype=np.int64)
    for shard, indices in enumerate(members):
        places[indices, 0], places[indices, 1] = shard, range(len(indices))
    latents = _shards(
        folder / f"latents-{_key(*parts)}",
        members,
        run,
        "latents",
        _encode(source, data, autoencoder, run),
    )
    return LatentCache(latents, run.config.seed, places, side)


def _add_captions(cache: LatentCache, folder: Path, texts: Sequence[str], text: Text, run: Any) -> None:
    captions = sorted(set(texts))
    weights = weight_hash(text.state_dict()) if text.frozen else "joint"
    key = _key(VERSION, weights, text.vocabulary_hash(), *captions)
    cache.conditions = _shards(
        folder / f"text-{key}",
        [*slices(0, len(captions), SHARD)],
        run,
        "captions",
        partial(map, _read(captions, text, run)),
    )
    row = {caption: i for i, caption in enumerate(captions)}
    cache.which = torch.tensor([row[caption] for caption in texts])


def _key(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _shards(folder: Path, members: Members, run: Any, what: str, compute: Compute) -> list[dict[str, Tensor]]:
    """Shards of `compute`, each made by one process and memory-mapped by all.

    A shard counts only with its sum beside it, which is written last and compared at every start.
    """
    paths = [folder / f"{i:05d}.safetensors" for i in range(len(members))]
    rank, ranks = run.accelerator.process_index, run.accelerator.num_processes
    if run.main:
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob("*.writing"):
            leftover.unlink()
    run.accelerator.wait_for_everyone()
    for path in paths[rank::ranks]:
        _drop_damaged(path)
    run.accelerator.wait_for_everyone()
    missing = [i for i, path in enumerate(paths) if not path.exists()]
    run.accelerator.wait_for_everyone()  # nobody writes while others still look
    mine = missing[rank::ranks]
    some = [members[i] for i in mine]
    total = sum(len(members[i]) for i in missing)
    with tqdm(total=total, unit="img", desc=what, disable=not (run.main and missing)) as bar:
        for done, (i, tensors) in enumerate(zip(mine, compute(some), strict=True)):
            if not done:
                _require_room(folder, sum(t.nbytes for t in tensors.values()) * len(missing))
            _write(paths[i], tensors)
            bar.update(min(len(members[i]) * ranks, total - bar.n))
    run.accelerator.wait_for_everyone()
    return [load_file(path) for path in paths]


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    fresh = path.with_suffix(".writing")
    with writing(path):
        try:
            write_tensors(fresh, tensors)
            flush(fresh)
            total = digest(fresh)
            fresh.replace(path)
            write_text(path.with_suffix(".json"), json.dumps({"sha256": total}))
        finally:
            fresh.unlink(missing_ok=True)


def _drop_damaged(path: Path) -> None:
    """Remove a shard that is not what was written, to be made again."""
    if not path.exists():
        return
    sums = path.with_suffix(".json")
    if not sums.exists():  # the process that wrote it was killed between the two
        path.unlink()
        return
    try:
        sound = json.loads(sums.read_text())["sha256"] == digest(path)
    except (OSError, ValueError, KeyError, TypeError):
        sound = False
    if not sound:
        warnings.warn(f"{path} has changed since it was written; it is made again.", stacklevel=2)
        path.unlink()
        sums.unlink()


def _require_room(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if size > free:
        raise UserError(
            f"{folder} will need {size:,} bytes more, but {free:,} are free there; "
            "make room, or choose a run.out on another disk."
        )


def _encode(source: Source, data: DataConfig, autoencoder: AutoencoderKL, run: Any) -> Compute:
    @torch.no_grad()
    def compute(members: Members) -> Iterator[dict[str, Tensor]]:
        batches = [[some[p.start : p.stop] for p in slices(0, len(some), BATCH)] for some in members]
        pictures = read(Stills(source), [b for shard in batches for b in shard], cores(len(source)))
        for shard in batches:
            means, stds = [], []
            for pixels in islice(pictures, len(shard)):
                pixels = pixels.to(run.device)
                ways = [pixels, pixels.flip(-1)] if data.flip else [pixels]
                posteriors = [
                    autoencoder.encode(way.contiguous(memory_format=torch.channels_last)) for way in ways
                ]
                means.append(torch.stack([p.mean for p in posteriors], dim=1).cpu())
                stds.append(torch.stack([p.std for p in posteriors], dim=1).cpu())
            yield {"mean": torch.cat(means).contiguous(), "std": torch.cat(stds).contiguous()}

    return compute


def _read(captions: list[str], conditioner: Text, run: Any) -> Callable[..., dict[str, Tensor]]:
    @torch.no_grad()
    def compute(some: range) -> dict[str, Tensor]:
        if not conditioner.frozen:
            return conditioner.read(captions[some.start : some.stop])
        states = []
        for indices in slices(some.start, some.stop, BATCH):
            read = conditioner.read([captions[i] for i in indices])
            states.append(conditioner.encode({name: value.to(run.device) for name, value in read.items()}))
        return {name: torch.cat([part[name].cpu() for part in states]).contiguous() for name in states[0]}

    return compute
