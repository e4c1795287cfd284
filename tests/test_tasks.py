"""What a task is given of pictures: exactly that, for the same sample always the same, and beside x_t."""

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
import torch.nn.functional as F
from PIL import Image

import train_ldm
from autoencoder.kl import AutoencoderKL
from ldm import random
from ldm.conditioning import Cond
from ldm.config import UserError, load
from ldm.data import DataConfig, ScenesConfig, open_source
from ldm.denoiser import Denoiser
from ldm.guidance import guided
from ldm.masks import Masks, coloured, named, palette, with_classes
from ldm.paths import EDM, Level
from ldm.pictures import BadPicture, to_tensor
from ldm.prediction import make_prediction
from ldm.sampling import Pixels
from ldm.tasks import (
    Inpaint,
    Pairs,
    Restore,
    Segment,
    Upscale,
    from_json,
    on_grid,
    random_hole,
    spoiled,
    task_of,
    to_json,
    words_of,
)
from tests.support import TOY, newest_weights
from tests.test_cache import run_of
from tests.test_chain import _main_until

TASKS = (Inpaint(), Upscale(factor=2), Upscale(factor=4), Restore(), Segment())


@pytest.fixture(scope="module")
def scenes() -> list[Image.Image]:
    source = open_source(DataConfig(size=16, scenes=ScenesConfig(count=24)))
    return [source.picture(i, 16) for i in range(6)]


# --- the contract ----------------------------------------------------------------------------------------------


def test_the_picture_joins_the_scaled_noise_and_is_the_same_with_and_without_words() -> None:
    seen = []

    def network(x: torch.Tensor, t: torch.Tensor, cond: Cond) -> torch.Tensor:
        assert cond.image is None
        seen.append((x, cond.label))
        return x[:, :4] * (1 + cond.label.view(-1, 1, 1, 1))

    path = EDM()
    denoiser = Denoiser(network, path, make_prediction("edm", path))
    x, image = 30 * torch.randn(2, 4, 8, 8), torch.randn(2, 3, 8, 8)
    to, away = (Cond(label=torch.full((2,), label), image=image) for label in (1, 2))
    level = Level(*(torch.tensor(v) for v in (0.0, 1.0, 30.0)))
    guided(denoiser, to, away, 3.0)(x, level)
    ((shown, labels),) = seen
    assert labels.tolist() == [2, 2, 1, 1] and shown.shape == (4, 7, 8, 8)
    torch.testing.assert_close(shown[:2, :4], path.scale_input(x, level.sigma))
    assert torch.equal(shown[:2, 4:], image) and torch.equal(shown[2:, 4:], image)


def test_a_picture_alone_is_nothing_to_be_guided_away_from() -> None:
    calls = []

    def network(x: torch.Tensor, t: torch.Tensor, cond: Cond) -> torch.Tensor:
        calls.append(len(x))
        return x[:, :4]

    path = EDM()
    denoise = guided(
        Denoiser(network, path, make_prediction("edm", path)), Cond(image=torch.zeros(2, 1, 8, 8)), None, 4.0
    )
    denoise(torch.randn(2, 4, 8, 8), Level(*(torch.tensor(v) for v in (0.0, 1.0, 2.0))))
    assert calls == [2]


@pytest.mark.parametrize("task", TASKS, ids=lambda task: f"{task.kind}{getattr(task, 'factor', '')}")
@pytest.mark.parametrize("factor", [2, 4])
def test_what_is_given_has_the_channels_that_the_network_is_built_for(task, factor: int, scenes) -> None:
    given = spoiled(task, scenes, 0, range(6))
    image = task.image(given, lambda x: F.avg_pool2d(x, factor)[:, [0, 1, 2, 0]], factor)
    assert image.shape == (6, task.channels(factor, 4), 16 // factor, 16 // factor)


@pytest.mark.parametrize("task", TASKS, ids=lambda task: f"{task.kind}{getattr(task, 'factor', '')}")
def test_what_is_given_depends_on_seed_and_position_alone(task, scenes) -> None:
    whole = spoiled(task, scenes, 5, range(10, 16))
    part = spoiled(task, scenes[2:4], 5, [12, 13])
    assert all(torch.equal(whole[name][2:4], part[name]) for name in whole)
    other = spoiled(task, scenes, 6, range(10, 16))
    assert isinstance(task, Segment) or any((whole[name] != other[name]).any() for name in whole)


def test_no_pixel_is_lost_on_the_grid() -> None:
    pixels = torch.randn(2, 3, 16, 24)
    assert torch.equal(F.pixel_shuffle(on_grid(pixels, 4), 4), pixels)
    assert torch.equal(on_grid(pixels, 0.5)[:, :, ::2, ::2], pixels)


def test_an_inpainting_model_is_not_told_what_is_in_the_hole(scenes) -> None:
    given = spoiled(Inpaint(), scenes, 0, range(6))
    other = given | {"picture": torch.where(given["mask"] > 0.5, torch.randn(6, 3, 16, 16), given["picture"])}
    encode = lambda x: F.avg_pool2d(x, 2)  # noqa: E731
    one, two = (Inpaint().image(g, encode, 2) for g in (given, other))
    assert torch.equal(one, two)
    assert torch.equal(one[:, :1], given["mask"][:, :, ::2, ::2])


def test_holes_are_neither_empty_nor_everything() -> None:
    shares = [np.mean(np.asarray(random_hole((32, 24), random.stream(0, "t", p))) > 0) for p in range(300)]
    assert min(shares) > 0 and max(shares) < 1 and 0.3 < np.mean(shares) < 0.7
    whole = spoiled(Inpaint(whole=1.0), [Image.new("RGB", (8, 8))], 0, [0])
    assert (whole["mask"] == 1).all()


def test_the_noise_of_a_small_picture_is_as_told() -> None:
    task, grey = Upscale(factor=2, noise=0.5), [Image.new("RGB", (64, 64), (128, 128, 128))] * 40
    given = spoiled(task, grey, 0, range(40))
    stds = given["picture"].std((1, 2, 3))
    torch.testing.assert_close(stds, given["noise"], rtol=0.1, atol=0.01)
    assert given["noise"].min() >= 0 and 0.4 < given["noise"].max() <= 0.5
    told = task.image(given, lambda x: x, 2)[:, -1]
    torch.testing.assert_close(told.mean((1, 2)), given["noise"] / 0.5)


# --- recipes -----------------------------------------------------------------------------------------------------


def recipe(*more: str) -> train_ldm.Recipe:
    return load(train_ldm.Recipe, ["--config", str(TOY / "ldm-plain.yaml"), *more], prog="test")


def test_a_task_says_what_words_are_told_unless_the_recipe_does() -> None:
    kinds = {"text": "text", "class": "class", "unconditional": "none", "inpaint": "text", "upscale": "none"}
    assert {task: recipe("--task", task).conditioning.kind for task in kinds} == kinds
    assert recipe().conditioning.kind == "text" and recipe().begins_with() is None
    assert recipe("--task", "upscale", "--conditioning.kind", "class").conditioning.kind == "class"
    assert recipe("--task", "text", "--conditioning.kind", "class+text").conditioning.kind == "class+text"
    both = recipe("--task", "upscale", "--upscale.factor", "2")
    assert both.begins_with() == Upscale(factor=2)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--task", "text", "--conditioning.kind", "class"], "task is text, but conditioning.kind is class"),
        (["--task", "unconditional", "--conditioning.kind", "text"], "task is unconditional, but"),
        (["--task", "restore", "--upscale.factor", "2"], "upscale is set, but task is restore"),
        (["--upscale.factor", "2"], "upscale is set, but task is None"),
        (["--task", "upscale", "--upscale.factor", "3"], "factor"),
        (["--task", "upscale", "--conditioning.text.width", "64"], "conditioning.text is set, but"),
        (["--task", "paint"], "task"),
    ],
)
def test_contradictions_are_refused(flags: list[str], sentence: str, capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        recipe(*flags)
    assert stopped.value.code == 2 and sentence in capsys.readouterr().err


def test_a_task_is_read_back_as_it_was_saved() -> None:
    for task in (*TASKS, Restore(blur=None), Segment(classes=("nothing", "cat", "dog"))):
        assert from_json(to_json(task)) == task
    assert "masks" not in to_json(Segment(masks="/home/somebody/masks"))
    assert words_of(None, None) == "text" and task_of(None, TASKS[:1]) is None
    for bad in (
        None,
        "upscale",
        {"kind": "draw"},
        {"kind": "upscale", "factor": "4"},
        {"kind": "upscale", "noise": []},
        {"kind": "restore", "blur": [1]},
        {"kind": "inpaint", "whole": "x"},
        {"kind": "inpaint", "other": 1},
        {"kind": "segment", "classes": ["a", "a"]},
        {"kind": "segment", "classes": [{}]},
    ):
        with pytest.raises(ValueError, match=r"task|segment|upscale|restore|inpaint"):
            from_json(bad)


# --- masks ------------------------------------------------------------------------------------------------------


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


# --- training -----------------------------------------------------------------------------------------------------


def test_a_resumed_run_spoils_the_same_pictures_in_the_same_way(chain: Path, tmp_path: Path) -> None:
    def arguments(out: str) -> list[str]:
        return (
            f"--config {TOY}/ldm-plain.yaml --task inpaint --conditioning.kind none --data.path scenes "
            f"--data.scenes.count 24 --data.flip true --autoencoder {chain}/vae --workers 0 --run.out {tmp_path}/{out}"
        ).split()

    train_ldm.main(arguments("one"))
    with pytest.raises(SystemExit):
        _main_until(train_ldm, arguments("two"), step=3)
    train_ldm.main([*arguments("two"), "--workers", "1"])
    one, two = newest_weights(tmp_path / "one"), newest_weights(tmp_path / "two")
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
