"""Masks beside pictures, wherever data keep them: the same pixels, checked, in colours and back."""

import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from autoencoder.kl import AutoencoderKL
from ldm.config import UserError
from ldm.data import DataConfig, ScenesConfig, open_source
from ldm.masks import Masks, with_classes
from ldm.palette import coloured, named, palette
from ldm.pictures import BadPicture, to_tensor
from ldm.sampling import Pixels
from ldm.tasks import (
    Pairs,
    Segment,
)
from tests.test_cache import run_of


def paired(folder: Path) -> DataConfig:
    """Pictures that are red on the left, and masks that say 1 there and 2 in a corner."""
    for name in ("images", "masks"):
        (folder / name / "sub").mkdir(parents=True)
    for i, name in enumerate(("a", "sub/b", "c")):
        image, mask = Image.new("RGB", (20, 16), "white"), Image.new("L", (20, 16))
        image.paste("red", (0, 0, 6 + i, 16))
        mask.paste(1, (0, 0, 6 + i, 16))
        mask.paste(2, (0, 0, 4, 4))
        image.save(folder / "images" / f"{name}.png")
        mask.save(folder / "masks" / f"{name}.png")
    return DataConfig(path=str(folder / "images"), size=16, flip=True)


CLASSES = Segment(classes=("white", "red", "corner"))


def test_pictures_and_masks_are_turned_the_same_way(tmp_path: Path, chain: Path) -> None:
    from ldm import cache
    from ldm.conditioning import Unconditional

    data = paired(tmp_path)
    source = open_source(data)
    masks = Masks(source, CLASSES)
    autoencoder = AutoencoderKL.from_pretrained(chain / "vae" / "model")
    latents = cache.build(tmp_path / "cache", masks, data, autoencoder, Unconditional(), run_of())
    items = [(position, position % 3) for position in range(24)]
    batch = Pairs(latents, Pixels(source, data, 3), CLASSES).__getitems__(items)
    red = batch["picture"][:, 1] < 0  # [24,16,16]
    assert 5 < red[:, 0, -1].sum() < 19, "some are mirrored, some not"
    for picture, mean, (_, i) in zip(red, batch["mean"], items, strict=True):
        mask = masks.mask(i, 16)
        mask = mask[:, ::-1] if picture[8, -1] else mask
        assert (picture.numpy() == (mask > 0)).mean() > 0.9
        wanted = to_tensor(coloured(np.ascontiguousarray(mask), 3))[None]
        torch.testing.assert_close(mean[None], autoencoder.encode(wanted).mean, rtol=1e-4, atol=1e-4)


def test_another_mask_is_another_set(tmp_path: Path) -> None:
    source = open_source(paired(tmp_path))
    before = Masks(source, CLASSES).fingerprint
    assert before != source.fingerprint and before == Masks(source, CLASSES).fingerprint
    assert before != Masks(source, Segment(classes=("a", "b", "c"))).fingerprint
    Image.new("L", (20, 16)).save(tmp_path / "masks" / "c.png")
    assert Masks(source, CLASSES).fingerprint != before


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        (Image.new("L", (16, 20)), "a mask must be as large"),
        (Image.new("L", (20, 16), 3), "has the number 3, but segment.classes names the classes 0 to 2"),
        (Image.new("RGB", (20, 16), "red"), "is RGB; a mask is grey or has a palette"),
        (b"not a picture", "is no sound PNG"),
    ],
)
def test_bad_masks_are_named(tmp_path: Path, mask: Image.Image | bytes, reason: str) -> None:
    masks = Masks(open_source(paired(tmp_path)), CLASSES)
    file = tmp_path / "masks" / "a.png"
    if isinstance(mask, bytes):
        file.write_bytes(mask)
    else:
        mask.save(file)
    with pytest.raises(BadPicture, match=reason):
        masks.mask(0, 16)


def test_missing_masks_are_counted_before_anything_is_trained(tmp_path: Path) -> None:
    source = open_source(paired(tmp_path))
    (tmp_path / "masks" / "sub" / "b.png").unlink()
    with pytest.raises(UserError, match=r"There is no .*sub/b.png, and 0 more pictures of 3 have no mask"):
        Masks(source, CLASSES)
    source.config = replace(source.config, streaming=True)
    with pytest.raises(UserError, match=r"data.streaming keeps pictures without their masks"):
        Masks(source, CLASSES)
    with pytest.raises(UserError, match="drawn scenes have their own masks"):
        with_classes(CLASSES, open_source(DataConfig(size=16)))


def as_rows(folder: Path) -> list[tuple[bytes, bytes]]:
    """The files of `paired`, picture and mask."""
    return [
        ((folder / "images" / f"{name}.png").read_bytes(), (folder / "masks" / f"{name}.png").read_bytes())
        for name in ("a", "c", "sub/b")
    ]


def metadata(folder: Path, out: Path, column: str, form: str) -> None:
    """Picture and mask files beside each other, which a metadata file names."""
    for i, (image, mask) in enumerate(as_rows(folder)):
        (out / f"{i}.png").write_bytes(image)
        (out / f"{i}-mask.png").write_bytes(mask)
    rows = [{"file_name": f"{i}.png", column: f"{i}-mask.png"} for i in range(3)]
    if form == "csv":
        lines = [",".join(row.values()) for row in rows]
        (out / "metadata.csv").write_text("\n".join([f"file_name,{column}", *lines]))
    elif form == "jsonl":
        (out / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), out / "metadata.parquet")


def parquet(folder: Path, out: Path, typed: bool) -> None:
    """Masks in the first column, as `datasets` writes pictures, or as bytes."""
    images, masks = zip(*as_rows(folder), strict=True)
    rows = {"mask": list(masks), "image": list(images)}
    if typed:
        features = datasets.Features({"mask": datasets.Image(), "image": datasets.Image()})
        datasets.Dataset.from_dict(rows, features=features).to_parquet(out / "train.parquet")
    else:
        pyarrow.parquet.write_table(pyarrow.table(rows), out / "all.parquet")


def tars(folder: Path, out: Path, ends: tuple[str, str]) -> None:
    with tarfile.open(out / "shard.tar", "w") as tar:
        for i, row in enumerate(as_rows(folder)):
            for end, data in zip(ends, row, strict=True):
                member = tarfile.TarInfo(f"{i:04d}.{end}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


IN_COLUMNS = {
    "csv": lambda folder, out: metadata(folder, out, "mask", "csv"),
    "jsonl": lambda folder, out: metadata(folder, out, "mask_file_name", "jsonl"),
    "metadata.parquet": lambda folder, out: metadata(folder, out, "annotation", "parquet"),
    "datasets": lambda folder, out: parquet(folder, out, True),
    "parquet": lambda folder, out: parquet(folder, out, False),
    "tars": lambda folder, out: tars(folder, out, ("png", "mask.png")),
    "tars, both named": lambda folder, out: tars(folder, out, ("image.png", "mask.png")),
}


@pytest.mark.parametrize("form", IN_COLUMNS)
def test_masks_in_columns_are_those_of_the_folder(form: str, tmp_path: Path) -> None:
    beside = open_source(paired(tmp_path))
    wanted = Masks(beside, CLASSES)
    (tmp_path / "data").mkdir()
    IN_COLUMNS[form](tmp_path, tmp_path / "data")
    source = open_source(DataConfig(path=str(tmp_path / "data"), size=16))
    assert len(source) == 3 and "left out" not in source.describe()
    masks = Masks(source, CLASSES)
    for i in range(3):
        assert (masks.mask(i, 16) == wanted.mask(i, 16)).all()
        assert source.picture(i, 16).tobytes() == beside.picture(i, 16).tobytes()
    part = Masks(source.chosen([2]), CLASSES)
    assert (part.mask(0, 16) == wanted.mask(2, 16)).all() and part.fingerprint != masks.fingerprint
    with pytest.raises(UserError, match=r"masks2/\d.png, and 2 more|no column 'masks2' of pictures"):
        Masks(source, Segment(masks="masks2"))


def test_masks_of_several_places_are_one_column(tmp_path: Path) -> None:
    paired(tmp_path)
    for name in ("csv", "tars"):
        (tmp_path / name).mkdir()
        IN_COLUMNS[name](tmp_path, tmp_path / name)
    source = open_source(DataConfig(path=(str(tmp_path / "csv"), str(tmp_path / "tars")), size=16))
    masks = Masks(source, CLASSES)
    assert len(masks) == 6 and (masks.mask(1, 16) == masks.mask(4, 16)).all()


def test_a_row_without_a_mask_is_named(tmp_path: Path) -> None:
    paired(tmp_path)
    (tmp_path / "csv").mkdir()
    IN_COLUMNS["csv"](tmp_path, tmp_path / "csv")
    file = tmp_path / "csv" / "metadata.csv"
    file.write_text(file.read_text().replace("1-mask.png", ""))
    source = open_source(DataConfig(path=str(tmp_path / "csv"), size=16))
    with pytest.raises(BadPicture, match="row 1 of column mask has neither bytes nor a file"):
        Masks(source, CLASSES).fingerprint  # noqa: B018
    assert "1 pictures are not named" in source.describe()


def test_masks_may_lie_in_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(paired(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "masks").rename(tmp_path / "truth")
    masks = Masks(source, Segment(masks="~/truth", classes=CLASSES.classes))
    assert masks.mask(0, 16).max() == 2
    grey = Image.open(tmp_path / "truth" / "a.png").convert("RGB")  # as many programs save grey
    before = masks.mask(0, 16)
    grey.save(tmp_path / "truth" / "a.png")
    assert (masks.mask(0, 16) == before).all()


def test_masks_of_scenes_show_what_is_drawn() -> None:
    source = open_source(DataConfig(scenes=ScenesConfig(count=30)), "test")
    task = with_classes(Segment(), source)
    masks = Masks(source, task)
    for i in range(12):
        picture, mask = np.asarray(source.picture(i, 64)).astype(int), masks.mask(i, 64)
        shape = source.texts[i].split()[3]
        assert set(np.unique(mask)) == {0, task.classes.index(shape)}
        ground = picture[0, 0]
        far = np.abs(picture - ground).sum(-1)
        assert (far[mask == 0] <= far[mask > 0].max() * 0.51 + 3).all() and np.median(far[mask > 0]) > 30


def test_colours_of_classes_are_told_apart() -> None:
    for count in (2, 7, 8, 40, 256):
        colours = palette(count).astype(int)
        assert len({tuple(colour) for colour in colours}) == count
        numbers = np.arange(count, dtype=np.uint8)[None].repeat(3, 0)
        assert (named(np.asarray(coloured(numbers, count)), count) == numbers).all()
