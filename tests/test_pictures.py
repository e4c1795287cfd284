"""Every kind of bad picture is skipped, counted and named; good ones of every mode have the right colours."""

import io
import json
import os
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image, ImageCms

from ldm.config import UserError
from ldm.data import DataConfig, open_source
from ldm.inspection import inspected
from ldm.pictures import BadPicture, Stored, content, decoded, fitted
from ldm.sampling import read

NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8))


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def opened(data: bytes, megapixels: float = 64) -> Image.Image:
    return decoded("it", data, megapixels, whole=True).image


def png_of_size(width: int, height: int) -> bytes:
    """A PNG whose header promises more than there is."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(99)))
        + chunk(b"IEND", b"")
    )


def flipped(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 0x40]) + data[place + 1 :]


def nan_tiff() -> bytes:
    values = np.full((9, 9), 0.5, dtype=np.float32)
    values[3, 4] = np.nan
    return encoded(Image.fromarray(values), "TIFF")


PNG, JPEG = encoded(NOISE, "PNG"), encoded(NOISE, "JPEG")
BAD = {
    "cut.jpg": (JPEG[: len(JPEG) // 2], "is damaged: image file is truncated"),
    "cut.png": (PNG[: len(PNG) // 2], "is damaged"),
    "empty.jpg": (b"", "is empty"),
    "page.jpg": (b"<!DOCTYPE html><html><body>404</body></html>", "is HTML or XML"),
    "crc.png": (flipped(PNG, PNG.index(b"IDAT") + 4 + len(PNG) // 2), "is damaged"),
    "large.png": (png_of_size(9_000, 9_000), "is 9000x9000, larger than data.max_megapixels 64"),
    "bomb.png": (png_of_size(30_000, 30_000), "is larger than data.max_megapixels 64"),
    "bomb.gif": (
        b"GIF89a" + struct.pack("<HH", 65_000, 65_000) + encoded(NOISE, "GIF")[10:],
        "is larger than data.max_megapixels 64",
    ),
    "bomb.webp": (
        b"RIFF"
        + struct.pack("<I", 22)
        + b"WEBPVP8X"
        + struct.pack("<II", 10, 0)
        + b"\xff\x3e\x00\xff\x3e\x00",
        "is larger than data.max_megapixels 64",
    ),
    "nan.tif": (nan_tiff(), "not numbers"),
    "wide.tif": (encoded(Image.fromarray(np.full((9, 9), 1e9, dtype=np.float32)), "TIFF"), "values run from"),
    "drawing.svg": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "is SVG"),
    "drawing.png": (b'<?xml version="1.0"?><svg/>', "is XML or SVG"),
    "print.eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is PostScript"),
    "print.jpg": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is PostScript"),
    "paper.pdf": (b"%PDF-1.7\n", "is PDF"),
    "icon.ico": (encoded(NOISE, "ICO"), "is in no format that is read"),
    "noise.webp": (os.urandom(300), "is in no format that is read"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_bytes_are_refused_in_words(name: str) -> None:
    data, reason = BAD[name]
    with pytest.raises(BadPicture, match=reason):
        decoded(name, content(Stored(name, data=data)), 64, whole=True)


def a_run(out: Path, rank: int = 0, together: Barrier | None = None) -> SimpleNamespace:
    """What `inspected` needs of a run, on one process or one of those that meet at a barrier."""
    said: list[str] = []
    together = together or Barrier(1)
    accelerator = SimpleNamespace(
        wait_for_everyone=together.wait, process_index=rank, num_processes=together.parties
    )
    return SimpleNamespace(out=out, main=rank == 0, accelerator=accelerator, say=said.append, said=said)


def plant(folder: Path) -> dict[str, str]:
    """Every bad picture as a file; names with what must be said of them."""
    folder.mkdir(parents=True)
    for name, (data, _) in BAD.items():
        (folder / name).write_bytes(data)
    os.mkfifo(folder / "pipe.png")
    outside = folder.parent / "outside"
    outside.mkdir()
    (outside / "secret.png").write_bytes(PNG)
    (folder / "link.png").symlink_to(outside / "secret.png")
    (folder / "broken.png").symlink_to(folder / "nothing.png")
    (folder / "linked-folder.png").symlink_to(outside)
    return {name: reason for name, (_, reason) in BAD.items()} | {
        "pipe.png": "is not a regular file",
        "link.png": "leads out of the data folder",
        "broken.png": "can't be opened",
        "linked-folder.png": "leads out of the data folder",
    }


def test_bad_files_are_skipped_counted_and_named(tmp_path: Path) -> None:
    planted = plant(tmp_path / "data")
    names = ["good-0.png", "good-1.png", os.fsdecode(b"good-\xff.png")]  # the last is no UTF-8
    for name in names:
        (tmp_path / "data" / name).write_bytes(PNG)
    source = open_source(DataConfig(path=str(tmp_path / "data"), size=8, bad_share=0.95))
    run = a_run(tmp_path / "run")
    sound = inspected(source, run)
    assert [Path(sound.pictures[i].name).name for i in range(len(sound))] == names
    lines = (tmp_path / "run" / "bad_pictures.jsonl").read_text().splitlines()
    named = {Path(line["picture"]).name: line["reason"] for line in map(json.loads, lines)}
    assert named.keys() == planted.keys()
    assert all(reason in named[name] for name, reason in planted.items())
    assert f"{len(planted)} of {len(planted) + 3} pictures are bad" in run.said[-1]


def test_too_many_bad_pictures_stop_the_run(tmp_path: Path) -> None:
    planted = plant(tmp_path / "data")
    run = a_run(tmp_path / "run")
    with pytest.raises(UserError, match=f"None of the {len(planted)} pictures"):
        inspected(open_source(DataConfig(path=str(tmp_path / "data"), size=8, bad_share=0.99)), run)
    (tmp_path / "data" / "good.png").write_bytes(PNG)
    with pytest.raises(UserError, match=r"data\.bad_share allows 1\.0%"):
        inspected(open_source(DataConfig(path=str(tmp_path / "data"), size=8)), run)


def test_a_mended_picture_is_seen_again_and_others_are_not_read_twice(tmp_path: Path) -> None:
    for name, data in (("a.png", PNG), ("b.png", b"")):
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / name).write_bytes(data)
    config, run = DataConfig(path=str(tmp_path / "data"), size=8, bad_share=0.5), a_run(tmp_path / "run")
    before = inspected(open_source(config), run)
    assert len(before) == 1
    kept = [(f.name, f.stat().st_mtime_ns) for f in (tmp_path / "run" / "cache").iterdir()]
    assert inspected(open_source(config), run).fingerprint == before.fingerprint
    assert kept == [(f.name, f.stat().st_mtime_ns) for f in (tmp_path / "run" / "cache").iterdir()]
    (tmp_path / "data" / "b.png").write_bytes(JPEG)
    after = inspected(open_source(config), run)
    assert len(after) == 2 and after.fingerprint != before.fingerprint
    assert not (tmp_path / "run" / "bad_pictures.jsonl").exists()


def test_processes_share_the_looking_and_find_what_one_finds(tmp_path: Path) -> None:
    planted = plant(tmp_path / "data")
    for i in range(70):
        (tmp_path / "data" / f"good-{i:02d}.png").write_bytes(PNG)
    config = DataConfig(path=str(tmp_path / "data"), size=8, bad_share=0.95)
    alone, three = a_run(tmp_path / "alone"), Barrier(3, timeout=60)
    runs = [a_run(tmp_path / "shared", rank, three) for rank in range(3)]
    expected = inspected(open_source(config), alone)
    with ThreadPoolExecutor() as pool:
        found = [*pool.map(lambda run: inspected(open_source(config), run), runs)]
    assert {one.fingerprint for one in found} == {expected.fingerprint} and len(expected) == 70
    bad, cache = (tmp_path / "shared" / name for name in ("bad_pictures.jsonl", "cache"))
    assert bad.read_text() == (tmp_path / "alone" / bad.name).read_text()
    assert len(bad.read_text().splitlines()) == len(planted) and len([*cache.iterdir()]) == 1


def test_the_fingerprint_is_of_content_not_of_place(tmp_path: Path) -> None:
    prints = []
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.png").write_bytes(PNG)
        source = open_source(DataConfig(path=str(tmp_path / name), size=8))
        prints += [source.fingerprint, inspected(source, a_run(tmp_path / "run")).fingerprint]
    assert len(set(prints)) == 1


def test_a_picture_that_goes_bad_later_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"gone bad")
    source = open_source(DataConfig(path=str(tmp_path), size=8))

    class Pictures:
        def __getitems__(self, items: list[int]) -> list[Image.Image]:
            return [source.picture(i, 8) for i in items]

    for workers in (0, 1):
        with pytest.raises(BadPicture, match=r"^\S+a\.png is in no format that is read") as problem:
            list(read(Pictures(), [[0]], workers))
        assert "Traceback" not in str(problem.value)


def test_a_dead_worker_is_one_sentence() -> None:
    class Deadly:
        def __getitems__(self, items: list[int]) -> None:
            os._exit(9)

    with pytest.raises(
        UserError, match=r"a process that prepares batches is gone .* run the same command again"
    ):
        list(read(Deadly(), [[0]], 1))


def test_urls_and_paths_in_a_table_are_not_followed(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    (tmp_path / "outside.png").write_bytes(PNG)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "inside.png").write_bytes(PNG)
    cells = [
        {"bytes": None, "path": p} for p in ("https://example.org/a.png", "../outside.png", "inside.png")
    ]
    cells += [
        {"bytes": None, "path": "zip://a.png::https://example.org/a.zip"},
        {"bytes": PNG, "path": "/etc/passwd"},
    ]
    features = datasets.Features({"image": datasets.Image()})
    table = pyarrow.table({"image": pyarrow.array(cells, features.arrow_schema.field("image").type)})
    about = {"huggingface": json.dumps({"info": {"features": features.to_dict()}})}
    pyarrow.parquet.write_table(table.replace_schema_metadata(about), tmp_path / "data" / "train.parquet")
    source = open_source(DataConfig(path=str(tmp_path / "data"), size=8))
    reasons = []
    for i in range(5):
        try:
            reasons.append(source.picture(i, 8).size)
        except BadPicture as problem:
            reasons.append(problem.reason.split(",")[0])
    assert reasons == ["is a URL", "leads out of the data folder", (8, 8), "is a URL", (8, 8)]


def cmyk_profile() -> bytes:
    """A small CMYK profile in which cyan ink prints dark red, and no ink is white."""
    identity, white, red = bytes(range(256)), bytes([255, 128, 128]), bytes([136, 208, 195])  # L, a, b
    table = b"mft1" + bytes(4) + bytes([4, 3, 2, 0])
    table += struct.pack(">9i", 65536, 0, 0, 0, 65536, 0, 0, 0, 65536) + identity * 4
    table += white * 8 + red * 8 + identity * 3  # corners in the order of C, M, Y, K
    header = struct.pack(">II4s4s4s4s", 144 + len(table), 0, b"\x02\x40\0\0", b"prtr", b"CMYK", b"Lab ")
    header += bytes(12) + b"acsp" + bytes(28) + struct.pack(">3i", 63190, 65536, 54061) + bytes(48)
    return header + struct.pack(">I4sII", 1, b"A2B0", 144, len(table)) + table


@pytest.mark.parametrize("kind", ["TIFF", "JPEG"])
def test_cmyk_goes_through_its_profile(kind: str) -> None:
    plain = Image.new("CMYK", (9, 9), (255, 0, 0, 0))
    assert opened(encoded(plain, kind)).getpixel((4, 4)) == (0, 255, 255)
    r, g, b = opened(encoded(plain, kind, icc_profile=cmyk_profile())).getpixel((4, 4))
    assert r > 100 and g < 40 and b < 40


def swapping_profile() -> bytes:
    """An RGB profile, made from littleCMS' sRGB, in which red and blue have changed places."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    for i in range(struct.unpack(">I", profile[128:132])[0]):
        entry = 132 + 12 * i
        name = bytes(profile[entry : entry + 4])
        profile[entry : entry + 4] = {b"rXYZ": b"bXYZ", b"bXYZ": b"rXYZ"}.get(name, name)
    return bytes(profile).replace("sRGB".encode("utf-16-be"), "swap".encode("utf-16-be"))


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_an_embedded_profile_is_applied(kind: str) -> None:
    red = Image.new("RGB", (9, 9), (255, 0, 0))
    data = encoded(red, kind, icc_profile=swapping_profile())
    r, g, b = opened(data).getpixel((4, 4))
    assert b > 250 and r < 5 and g < 5
    clear = red.convert("RGBA")
    clear.putalpha(128)
    r, g, b, a = opened(encoded(clear, kind, icc_profile=swapping_profile())).getpixel((4, 4))
    assert b > 250 and r < 5 and a == 128
    broken = encoded(red, kind, icc_profile=b"not a profile")
    assert opened(broken).getpixel((4, 4)) == (255, 0, 0)


@pytest.mark.parametrize(("kind", "dtype"), [("PNG", np.uint16), ("TIFF", np.uint16), ("TIFF", np.float32)])
def test_deep_grey_is_scaled_not_clipped(kind: str, dtype: type) -> None:
    top = 1.0 if dtype == np.float32 else 65535
    ramp = np.linspace(0, top, 256).astype(dtype).reshape(16, 16)
    image = opened(encoded(Image.fromarray(ramp), kind))
    assert np.array_equal(np.asarray(image).ravel(), np.arange(256))
    dark = opened(encoded(Image.fromarray((ramp / 512).astype(dtype)), kind))
    assert np.asarray(dark).max() == 0  # not stretched to its own range


def test_transparency_is_composited_on_the_background() -> None:
    palette = Image.new("P", (9, 9), 1)
    palette.putpalette([10, 20, 30, 200, 100, 50])
    for image, kind, options in (
        (palette, "PNG", {"transparency": 1}),
        (palette, "GIF", {"transparency": 1}),
        (Image.new("LA", (9, 9), (7, 0)), "PNG", {}),
        (Image.new("RGB", (9, 9), (1, 2, 3)), "PNG", {"transparency": (1, 2, 3)}),
        (Image.new("RGBA", (9, 9), (1, 2, 3, 0)), "WEBP", {"lossless": True}),
    ):
        shown = fitted(opened(encoded(image, kind, **options)), 8, "#102030")
        assert shown.getpixel((4, 4)) == (0x10, 0x20, 0x30), (image.mode, kind)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_upright(orientation: int) -> None:
    stored = Image.new("RGB", (40, 20), (0, 0, 0))
    stored.paste((255, 255, 255), (0, 0, 20, 10))  # upper left of what is stored
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = opened(encoded(stored, "JPEG", exif=exif, quality=95)).convert("L")
    assert upright.size == ((40, 20) if orientation < 5 else (20, 40))
    width, height = upright.size
    right, bottom = orientation in (2, 3, 6, 7), orientation in (3, 4, 7, 8)
    corner = (width - 5 if right else 5, height - 5 if bottom else 5)
    assert upright.getpixel(corner) > 200


def test_of_an_animation_the_first_frame_is_used_with_a_warning(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (9, 9), colour) for colour in ("red", "blue")]
    for kind in ("GIF", "WEBP", "PNG", "TIFF", "AVIF"):
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
        picture = decoded("it", data, 64)
        r, _, b = picture.image.convert("RGB").getpixel((4, 4))
        assert r > 240 and b < 15 and "only the first is used" in picture.remark, kind
    (tmp_path / "a.gif").write_bytes(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    run = a_run(tmp_path / "run")
    inspected(open_source(DataConfig(path=str(tmp_path), size=8)), run)
    assert "a.gif has several frames" in run.said[-1]


def test_phone_pictures_with_a_second_image_are_pictures() -> None:
    data = encoded(NOISE, "MPO", save_all=True, append_images=[NOISE])
    picture = decoded("it", data, 64)
    assert picture.image.size == NOISE.size and not picture.remark
