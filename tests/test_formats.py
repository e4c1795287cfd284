"""Every form in which data comes, as real files; the same pictures, captions and classes out of each."""

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from ldm import streaming
from ldm.config import UserError
from ldm.data import DataConfig, Source, open_source
from ldm.pictures import BadPicture
from ldm.sampling import Pixels, Stream, order, read

COLOURS = [(i * 20, 255 - i * 20, 99) for i in range(12)]
PICTURES = [Image.new("RGB", (40, 30), colour) for colour in COLOURS]
TEXTS = [f"picture, number {i}" for i in range(12)]
LABELS = ["even" if i % 2 == 0 else "odd" for i in range(12)]


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def as_folder(root: Path) -> None:
    for i, image in enumerate(PICTURES):
        (root / "train").mkdir(exist_ok=True)
        image.save(root / "train" / f"{i:02d}.png")
        (root / "train" / f"{i:02d}.txt").write_text(TEXTS[i] + "\n")


def with_metadata(kind: str) -> Callable[[Path], None]:
    def make(root: Path) -> None:
        as_folder(root)
        rows = [
            {"file_name": f"{i:02d}.png", "text": TEXTS[i], "label": LABELS[i]} for i in range(len(PICTURES))
        ]
        for file in root.rglob("*.txt"):
            file.unlink()
        target = root / "train" / f"metadata.{kind}"
        if kind == "parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), target)
        elif kind == "jsonl":
            target.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
        else:
            lines = [f'{r["file_name"]},"{r["text"]}",{r["label"]}' for r in rows]
            target.write_text("\ufefffile_name,text,label\n" + "\n".join(lines) + "\n")

    return make


def as_dataset(root: Path) -> None:
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "text": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["even", "odd"]),
        }
    )
    rows = datasets.Dataset.from_dict({"image": PICTURES, "text": TEXTS, "label": LABELS}, features=features)
    for i in range(2):
        shard = rows.shard(2, i, contiguous=True)
        shard.to_parquet(root / f"train-{i:05d}-of-00002.parquet")
    rows.select([3]).to_parquet(root / "test-00000-of-00001.parquet")


def as_plain_parquet(root: Path) -> None:
    """Bytes in a column, without what `datasets` writes about them."""
    rows = {"image": [png(image) for image in PICTURES], "text": TEXTS, "label": LABELS}
    pyarrow.parquet.write_table(pyarrow.table(rows), root / "all.parquet")


def as_tars(root: Path) -> None:
    for shard in range(2):
        with tarfile.open(root / f"shard-{shard:04d}.tar", "w") as tar:
            for i in range(6 * shard, 6 * shard + 6):
                kind = "PNG" if i % 3 else "TIFF"  # also mixed within a shard
                file = io.BytesIO()
                PICTURES[i].save(file, kind)
                about = json.dumps({"text": TEXTS[i], "width": 40}) if shard else TEXTS[i]
                members = {
                    "png" if i % 3 else "tif": file.getvalue(),
                    "json" if shard else "caption": about.encode(),
                    "cls": LABELS[i].encode(),
                }
                for extension, data in members.items():
                    member = tarfile.TarInfo(f"./{i:04d}.{extension}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))


FORMS: dict[str, tuple[Callable[[Path], None], bool, str]] = {
    "txt": (as_folder, False, "picture folder with a .txt beside each picture"),
    "csv": (with_metadata("csv"), True, "picture folder with metadata.csv"),
    "jsonl": (with_metadata("jsonl"), True, "picture folder with metadata.jsonl"),
    "metadata.parquet": (with_metadata("parquet"), True, "picture folder with metadata.parquet"),
    "datasets": (as_dataset, True, "parquet shards, split train"),
    "parquet": (as_plain_parquet, True, "parquet shards, split train"),
    "tars": (as_tars, True, "2 webdataset shards, split train"),
}


def made(form: str, root: Path) -> Source:
    (root / form).mkdir()
    FORMS[form][0](root / form)
    return open_source(DataConfig(path=str(root / form), size=16))


@pytest.mark.parametrize("form", FORMS)
def test_each_form_gives_the_same(form: str, tmp_path: Path) -> None:
    source = made(form, tmp_path)
    _, labelled, kind = FORMS[form]
    assert source.texts == TEXTS
    assert [source.picture(i, 16).getpixel((8, 8)) for i in range(12)] == COLOURS
    assert source.kind == kind and f"12 pictures: {kind}" in source.describe()
    if labelled:
        assert source.classes == ("even", "odd") and source.labels.tolist() == [0, 1] * 6
    assert source.describe().count("\n  ") == 3


def test_splits_of_shards_are_in_their_names(tmp_path: Path) -> None:
    made("datasets", tmp_path)
    made("tars", tmp_path)
    assert len(open_source(DataConfig(path=str(tmp_path / "datasets"), size=16), "test")) == 1
    (tmp_path / "tars" / "shard-0001.tar").rename(tmp_path / "tars" / "val-0001.tar")
    assert len(open_source(DataConfig(path=str(tmp_path / "tars"), size=16), "validation")) == 6
    for path in ("tars", "datasets"):
        with pytest.raises(UserError, match=r"No shard in|can't be read"):
            open_source(DataConfig(path=str(tmp_path / path), size=16), "dev")


def test_all_forms_together(tmp_path: Path) -> None:
    for form in FORMS:
        made(form, tmp_path)
    source = open_source(DataConfig(path=tuple(str(tmp_path / form) for form in FORMS), size=16))
    assert len(source) == 12 * len(FORMS) and source.labels is None
    assert [source.picture(i, 16).getpixel((8, 8)) for i in range(len(source))] == COLOURS * len(FORMS)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("metadata.json", "[]", "is in no form that is read"),
        ("metadata.csv", "image,text\n00.png,x\n", "has a row without file_name"),
        ("metadata.jsonl", "{no json}\n", "can't be read"),
        ("metadata.parquet", "no parquet", "can't be read"),
        ("metadata.jsonl", '{"file_name": "00.png", "text": ["a", "b"]}\n', "holds list, not text"),
        ("metadata.jsonl", "[1, 2]\n", r"'\[1, 2\]' is no object"),
        ("metadata.jsonl", "3\n", "'3' is no object"),
        ("metadata.csv", "file_name,text\n00.png,red, round\n", "line 2 has more fields .* into quotes"),
        ("metadata.csv", "file_name,text\n", "names no picture of split 'train'"),
    ],
)
def test_bad_metadata_is_one_sentence(tmp_path: Path, name: str, text: str, message: str) -> None:
    PICTURES[0].save(tmp_path / "00.png")
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        open_source(DataConfig(path=str(tmp_path), size=16))


def test_pictures_that_metadata_does_not_name_are_mentioned(tmp_path: Path) -> None:
    as_folder(tmp_path)
    (tmp_path / "metadata.csv").write_text(
        "file_name,text\ntrain/03.png,three\n../x.png,out\nhttp://x/y.png,url\n"
    )
    source = open_source(DataConfig(path=str(tmp_path), size=16))
    assert source.texts == ["three"] and "11 pictures are not named" in source.describe()
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "train/03.png", "text": "once more"}\n')
    source = open_source(DataConfig(path=str(tmp_path), size=16))
    assert "1 rows of metadata.csv, metadata.jsonl name a picture that another row names" in source.describe()


def test_a_cut_tar_is_one_sentence(tmp_path: Path) -> None:
    made("tars", tmp_path)
    tar = tmp_path / "tars" / "shard-0001.tar"
    tar.write_bytes(tar.read_bytes()[:700])
    with pytest.raises(UserError, match=r"shard-0001\.tar can't be read"):
        open_source(DataConfig(path=str(tmp_path / "tars"), size=16))


def test_a_hub_set_that_can_not_be_reached_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="Split 'train' of no-one/nothing can't be read"):
        open_source(DataConfig(path="hub:no-one/nothing"))
    with pytest.raises(UserError, match="names no data set"):
        open_source(DataConfig(path="hub:"))
    with pytest.raises(UserError, match="newest revision of hub:no-one/nothing is not known"):
        open_source(DataConfig(path="hub:no-one/nothing", streaming=True))


def test_a_stream_is_read_once_kept_small_and_goes_on_when_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(streaming, "SHARD", 5)
    made("datasets", tmp_path)
    config = DataConfig(path=str(tmp_path / "datasets"), size=16, streaming=True)
    whole = open_source(config)
    assert whole.texts == TEXTS and whole.classes == ("even", "odd") and len(whole) == 12
    assert [whole.picture(i, 16).getpixel((8, 8)) for i in range(12)] == COLOURS
    [folder] = (tmp_path / "cache").glob("ldm-small-*[!k]")
    with Image.open(io.BytesIO(whole.pictures[0].data)) as small:
        assert small.size == (21, 16)
    before = {f.name: f.read_bytes() for f in folder.glob("*.parquet")}
    assert len(before) == 3
    for name in ("complete", "00001.parquet", "00002.parquet"):
        (folder / name).unlink()
    again = open_source(config)
    assert {f.name: f.read_bytes() for f in folder.glob("*.parquet")} == before
    assert again.fingerprint == whole.fingerprint
    (tmp_path / "datasets" / "train-00000-of-00002.parquet").touch()
    assert open_source(config).fingerprint == whole.fingerprint
    assert len([*(tmp_path / "cache").glob("ldm-small-*[!k]")]) == 2  # never stale
    few = open_source(DataConfig(path=str(tmp_path / "datasets"), size=16, streaming=True, limit=7))
    assert few.texts == TEXTS[:7]
    made("tars", tmp_path)
    with pytest.raises(UserError, match="is neither; leave it out"):
        open_source(DataConfig(path=str(tmp_path / "tars"), size=16, streaming=True))


def test_bad_pictures_of_a_stream_are_still_bad(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    cells = [png(noise), png(noise)[:900], b"<html>", b"", None]
    (tmp_path / "data").mkdir()
    pyarrow.parquet.write_table(pyarrow.table({"image": cells}), tmp_path / "data" / "all.parquet")
    source = open_source(DataConfig(path=str(tmp_path / "data"), size=16, streaming=True))
    assert source.picture(0, 16).size == (16, 16)
    for i, reason in enumerate(("is damaged", "is HTML", "is empty", "is empty"), start=1):
        with pytest.raises(BadPicture, match=reason):
            source.picture(i, 16)


@pytest.mark.parametrize("form", ["txt", "datasets", "tars"])
def test_any_number_of_workers_gives_the_same_stream(form: str, tmp_path: Path) -> None:
    source = made(form, tmp_path)
    config = DataConfig(path=str(tmp_path / form), size=16, flip=True, crop="random")
    pixels = Pixels(source, config, seed=5)

    def batches(workers: int) -> list[dict[str, torch.Tensor]]:
        stream = Stream(order(source, False), seed=5, batch=5, start=5, stop=60, rank=0, ranks=1)
        return [*read(pixels, stream, workers)]

    alone = batches(0)
    assert torch.cat([batch["position"] for batch in alone]).tolist() == list(range(5, 60))
    for workers in (1, 2):
        for one, other in zip(alone, batches(workers), strict=True):
            assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_random_crops_are_functions_of_position(tmp_path: Path) -> None:
    ramp = Image.fromarray(np.tile(np.arange(0, 256, 2, dtype=np.uint8), (32, 1))).convert("RGB")
    ramp.save(tmp_path / "a.png")
    config = DataConfig(path=str(tmp_path), size=32, crop="random")
    pixels = Pixels(open_source(config), config, seed=0)
    many = pixels.__getitems__([(p, 0) for p in range(20)])["pixels"]
    assert torch.equal(many[7:8], pixels.__getitems__([(7, 0)])["pixels"])
    left = many[:, 0, 0, 0]
    assert len(left.unique()) > 10 and left.min() < -0.7 and left.max() > 0.2
