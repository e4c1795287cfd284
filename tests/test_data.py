"""What a path holds is detected; pictures of every mode become RGB; the stream is complete and repeatable."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import train_vae
from ldm.config import UserError, load
from ldm.data import DataConfig, open_source
from ldm.pictures import fitted, to_images, to_tensor
from ldm.sampling import Pixels, Stream, order
from tests.support import TOY

RED, BLUE = (200, 30, 30), (30, 30, 200)


def paint(path: Path, colour: tuple[int, int, int] = RED, size: tuple[int, int] = (20, 12)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def opened(path: Path, **settings: object):
    return open_source(DataConfig(path=str(path), size=8, **settings))


def test_text_files_beside_pictures_are_captions(tmp_path: Path) -> None:
    for name, colour in (("a", RED), ("b", BLUE)):
        paint(tmp_path / f"{name}.png", colour)
        (tmp_path / f"{name}.txt").write_text(f"a picture called {name}\n")
    source = opened(tmp_path)
    assert source.texts == ["a picture called a", "a picture called b"] and not source.classes
    assert source.picture(1, 8).getpixel((4, 4)) == BLUE
    assert "2 pictures" in source.describe() and "a picture called b" in source.describe()


def test_sub_folders_are_classes(tmp_path: Path) -> None:
    for name in ("pear/1", "apple/1", "apple/2"):
        paint(tmp_path / f"{name}.jpg")
    source = opened(tmp_path)
    assert source.classes == ("apple", "pear") and source.labels.tolist() == [0, 0, 1]


def test_a_picture_beside_the_sub_folders_is_told(tmp_path: Path) -> None:
    for name in ("pear/1", "apple/1", "stray"):
        paint(tmp_path / f"{name}.jpg")
    source = opened(tmp_path)
    assert not source.classes
    assert "not taken for classes, as 1 pictures lie in none" in source.describe()


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl"])
def test_metadata_files_give_captions(tmp_path: Path, name: str) -> None:
    paint(tmp_path / "x.png", RED)
    paint(tmp_path / "y.png", BLUE)
    rows = [{"file_name": "x.png", "text": "red, plain"}, {"file_name": "y.png", "text": "blue"}]
    if name.endswith("csv"):
        (tmp_path / name).write_text('file_name,text\nx.png,"red, plain"\ny.png,blue\n')
    else:
        (tmp_path / name).write_text("\n".join(map(json.dumps, rows)))
    assert opened(tmp_path).texts == ["red, plain", "blue"]


def test_parquet_shards_with_splits(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    for split, colours in (("train", [RED, RED, BLUE]), ("test", [BLUE])):
        rows = {
            "image": [Image.new("RGB", (9, 9), c) for c in colours],
            "label": ["r" if c == RED else "b" for c in colours],
        }
        features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
        datasets.Dataset.from_dict(rows, features=features).to_parquet(
            tmp_path / f"{split}-00000-of-00001.parquet"
        )
    source = opened(tmp_path)
    assert source.classes == ("b", "r") and source.labels.tolist() == [1, 1, 0]
    assert len(open_source(DataConfig(path=str(tmp_path), size=8), "test")) == 1
    seen = order(source, balance=True)
    assert sorted(source.labels[seen].tolist()) == [0, 0, 1, 1]


def test_several_paths_are_one_source(tmp_path: Path) -> None:
    for name in ("one/pear/a", "one/plum/b", "two/plum/c", "three/d"):
        paint(tmp_path / f"{name}.png", BLUE if name.endswith("c") else RED)
    paths = [str(tmp_path / name) for name in ("one", "two")]
    both = open_source(DataConfig(path=tuple(paths), size=8))
    assert both.classes == ("pear", "plum") and both.labels.tolist() == [0, 1, 1]
    assert both.picture(2, 8).getpixel((4, 4)) == BLUE and len(both) == 3
    assert [Path(both.pictures[i].name).name for i in range(3)] == ["a.png", "b.png", "c.png"]
    assert "2 from" in both.describe() and "plum" in both.describe()
    mixed = open_source(DataConfig(path=(*paths, str(tmp_path / "three")), size=8))
    assert mixed.labels is None and f"the classes are left out: {tmp_path}/three has none" in mixed.describe()


def test_a_list_of_paths_comes_from_yaml_and_flags(tmp_path: Path) -> None:
    recipe = str(TOY / "vae.yaml")
    for said, paths in (("[a, b]", ("a", "b")), ("a", ("a",))):
        arguments = ["--config", recipe, "--data.scenes.count", "8192", "--data.path", said]
        assert load(train_vae.Recipe, arguments, prog="x").data.paths == paths
    with pytest.raises(ValueError, match="must be scenes alone"):
        DataConfig(path=("scenes", "a"))


def test_fingerprint_follows_the_content(tmp_path: Path) -> None:
    paint(tmp_path / "a.png")
    before = opened(tmp_path).fingerprint
    assert before == opened(tmp_path).fingerprint
    paint(tmp_path / "a.png", BLUE, (21, 12))
    assert opened(tmp_path).fingerprint != before


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: None, "There is nothing at"),
        (lambda p: p.mkdir(), "holds no pictures"),
        (lambda p: (p.mkdir(), (p / "notes.md").write_text("x")), "holds no pictures"),
        (lambda p: p.write_text("x"), "is a file"),
        (
            lambda p: (paint(p / "a.png"), paint(p / "b.png"), (p / "a.txt").write_text("x")),
            "1 of 2 pictures have no caption file beside them, .*b.png first; write one",
        ),
    ],
)
def test_bad_folders_are_one_sentence(tmp_path: Path, make, message: str) -> None:
    make(tmp_path / "data")
    with pytest.raises(UserError, match=message):
        opened(tmp_path / "data")


def test_wrong_columns_and_splits_are_named(tmp_path: Path) -> None:
    paint(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"data\.text is 'words'"):
        opened(tmp_path, text="words")
    with pytest.raises(UserError, match="no sub-folder 'test'"):
        opened(tmp_path, split="test")
    with pytest.raises(UserError, match=r"data\.balance needs classes"):
        order(opened(tmp_path), balance=True)


def test_modes_become_rgb() -> None:
    assert fitted(Image.new("RGBA", (9, 9), (0, 0, 0, 0)), 8, "white").getpixel((0, 0)) == (255, 255, 255)
    palette = Image.new("P", (9, 9))
    palette.putpalette([10, 20, 30])
    assert fitted(palette, 8, "white").getpixel((0, 0)) == (10, 20, 30)
    deep = Image.fromarray(np.full((9, 9), 32768, dtype=np.uint16))
    assert fitted(deep, 8, "white").getpixel((0, 0)) == (128, 128, 128)
    assert fitted(Image.new("CMYK", (9, 9)), 8, "white").mode == "RGB"
    assert fitted(Image.new("L", (30, 9), 77), 8, "white").size == (8, 8)


def test_exif_orientation_is_applied() -> None:
    picture = Image.new("RGB", (8, 8), RED)
    picture.paste(BLUE, (0, 0, 8, 4))  # blue on top
    picture.getexif()[0x0112] = 3  # stored upside down
    assert fitted(picture, 8, "white").getpixel((4, 0)) == RED


def test_tensors_and_pictures_are_inverse() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8))
    pixels = to_tensor(noise)
    assert pixels.min() >= -1 and pixels.max() <= 1
    assert np.array_equal(np.asarray(to_images(pixels[None])[0]), np.asarray(noise))


def positions(
    n: int = 10, batch: int = 4, start: int = 0, stop: int = 40, ranks: int = 1, seed: int = 0
) -> list:
    streams = [
        Stream(np.arange(n), seed=seed, batch=batch // ranks, start=start, stop=stop, rank=r, ranks=ranks)
        for r in range(ranks)
    ]
    return [item for parts in zip(*streams, strict=True) for part in parts for item in part]


def test_every_sample_once_an_epoch_with_a_remainder_too() -> None:
    seen = [index for _, index in positions()]
    for epoch in range(4):
        assert sorted(seen[10 * epoch : 10 * epoch + 10]) == list(range(10))
    assert seen[:10] != seen[10:20]


def test_two_processes_see_what_one_sees_and_a_resumed_run_too() -> None:
    assert positions(ranks=2) == positions()
    assert positions(start=16) == positions()[16:]
    assert positions(seed=1) != positions()


def test_flips_belong_to_positions(tmp_path: Path) -> None:
    picture = Image.new("RGB", (8, 8), RED)
    picture.paste(BLUE, (0, 0, 4, 8))
    picture.save(tmp_path / "a.png")
    pixels = Pixels(opened(tmp_path), DataConfig(path=str(tmp_path), size=8, flip=True), seed=0)
    together = pixels.__getitems__([(p, 0) for p in range(16)])["pixels"]
    alone = torch.cat([pixels.__getitems__([(p, 0)])["pixels"] for p in range(16)])
    assert torch.equal(together, alone)
    mirrored = (together[:, 2, 0, 0] < 0).sum().item()
    assert 0 < mirrored < 16
