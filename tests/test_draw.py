"""Drawing: a picture is a function of its seed and settings, in any thread, batch and life; prompts that are none."""

import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.guidance import Guidance, Projection, Threshold
from pipelines import LatentDiffusion
from pipelines.cli import main as ldm
from pipelines.editing import image_to_image
from pipelines.inversion import blended, interpolate, invert, vary
from pipelines.prompts import Unread
from pipelines.record import fingerprint, read_record, recreate
from pipelines.safety import provenance
from tests.drawing_memory import measured
from tests.encoders import CAPTIONS, conditioner, config, model_of

PROMPT = "a large red circle at the top left on a white background"
OTHER = "a small blue star at the center on a black background"


def same(a: Image.Image, b: Image.Image) -> bool:
    return a.tobytes() == b.tobytes()


def test_threads_share_one_pipeline(model: LatentDiffusion) -> None:
    """Stock schedulers carry state from step to step; tokenizers and tiling change what they work with."""

    def draw(job: int) -> Image.Image:
        told = {"sampler": ("dpmpp_2m", "ddpm", "unipc")[job % 3], "negative": OTHER if job % 2 else ""}
        more = {"size": (32, 16), "tile": 16} if job % 5 == 0 else {}
        long = f"{PROMPT} " * (1 + job % 4)
        return model(long, seed=job, steps=2, **told, **more)[0]

    jobs = range(8 * 5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Unread)
        alone = [draw(job) for job in jobs]
        with ThreadPoolExecutor(8) as pool:
            together = [*pool.map(draw, jobs)]
    assert all(map(same, alone, together))


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "euler_ancestral"])
def test_a_picture_does_not_depend_on_its_batch(model: LatentDiffusion, sampler: str) -> None:
    prompts = [PROMPT, OTHER] * 8
    one, many = (model(prompts, steps=4, seed=3, sampler=sampler, batch=batch) for batch in (1, 16))
    apart = max(np.abs(np.asarray(a, int) - np.asarray(b, int)).max() for a, b in zip(one, many, strict=True))
    assert apart <= 1
    listed = model(prompts[3:5], steps=4, seed=[6, 7], sampler=sampler, batch=1)
    assert all(map(same, listed, one[3:5]))


def test_drawing_leaves_no_memory_behind(chain: Path) -> None:
    assert measured(chain / "ldm", 60, 20)["grown_mb"] < 10


def test_pictures_are_recreated_bit_for_bit(
    chain: Path, model: LatentDiffusion, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = str(chain / "ldm"), tmp_path / "out"
    flags = (
        "--n 3 --batch 4 --steps 3 --seed 5,1,9,4,2,7 --size 24x16 --sampler euler_ancestral --guidance 2.7"
    )
    ldm(["generate", folder, PROMPT, OTHER, *flags.split(), "--negative", "a fox", "--out", str(out)])
    files = sorted(out.glob("0*.png"))
    for file in files:
        record, picture = read_record(file)
        assert same(recreate(model, record, picture.size), picture)
        assert not any(str(part) in repr(record) for part in (tmp_path, chain.parent, Path.home()))
    assert (record.prompt, record.seed, record.batch, record.place) == (OTHER, 7, 2, 1)
    capsys.readouterr()
    ldm(["recreate", folder, str(files[1]), str(files[5]), "--out", str(tmp_path / "again")])
    assert capsys.readouterr().out.count("the same, bit for bit") == 2
    again = Image.open(tmp_path / "again" / "0001.png")
    assert same(again, Image.open(files[5])) and again.text == Image.open(files[5]).text


def test_all_of_guidance_is_reached_and_recreated(
    chain: Path, model: LatentDiffusion, tmp_path: Path
) -> None:
    flags = "--interval 0.2 5 --project --threshold 2 --eta 0.5 --sampler ddim --steps 4 --guidance 6"
    folder = str(chain / "ldm")
    ldm(["generate", folder, PROMPT, *flags.split(), "--out", str(tmp_path)])
    record, picture = read_record(tmp_path / "0000.png")
    assert record.guidance == Guidance(
        scale=6.0, interval=(0.2, 5.0), projection=Projection(), threshold=Threshold(limit=2.0)
    )
    plain = {"steps": 4, "sampler": "ddim", "guidance": 6.0}
    assert same(recreate(model, record, picture.size), picture)
    assert not same(model(PROMPT, **plain)[0], picture)
    assert not same(model(PROMPT, **plain, eta=0.5)[0], model(PROMPT, **plain)[0])
    with pytest.raises(ValueError, match="sampler unipc has none to choose"):
        model(PROMPT, sampler="unipc", eta=0.5)
    with pytest.raises(SystemExit):
        ldm(["generate", folder, PROMPT, "--guidance", "1", "--project", "--out", str(tmp_path)])


def test_a_weaker_model_guides(chain: Path, model: LatentDiffusion) -> None:
    weak = LatentDiffusion.from_pretrained(chain / "ldm")
    told = {"steps": 3, "guidance": 3.0}
    unguided = model(PROMPT, steps=3, guidance=1.0)[0]
    itself = np.asarray(model(PROMPT, **told, weak=weak)[0], dtype=int)
    assert abs(itself - np.asarray(unguided, dtype=int)).max() <= 1  # no difference to move along
    with torch.no_grad():
        weak.unet.conv_out.weight.mul_(0.5)
    assert not same(model(PROMPT, **told, weak=weak)[0], unguided)
    with pytest.raises(ValueError, match="leave one out"):
        model(PROMPT, **told, weak=weak, negative="a fox")
    with torch.no_grad():
        weak.autoencoder.encoder.conv_in.weight.mul_(2)
    with pytest.raises(ValueError, match="weak has another autoencoder"):
        model(PROMPT, **told, weak=weak)


def test_another_model_is_noticed(
    chain: Path, model: LatentDiffusion, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ldm(["generate", str(chain / "ldm"), PROMPT, "--steps", "2", "--out", str(tmp_path / "out")])
    other = LatentDiffusion.from_pretrained(chain / "ldm")
    with torch.no_grad():
        other.unet.conv_out.bias[0] += 1e-3
    assert fingerprint(other) != fingerprint(model)
    other.save_pretrained(tmp_path / "other")
    picture = tmp_path / "out" / "0000.png"
    Image.open(picture).save(tmp_path / "bare.png")
    notes = {key: str(value) for key, value in read_record(picture)[0].notes().items()}
    for name, change in (
        ("place", {"place": 1}),
        ("seed", {"seed": "first"}),
        ("edit", {"made_by": "ldm edit"}),
    ):
        Image.open(picture).save(tmp_path / f"{name}.png", pnginfo=provenance(**notes | change))
    again = ["--out", str(tmp_path / "again")]
    for words, said in [
        ([str(tmp_path / "other"), str(picture)], "was drawn by another model, ldm"),
        ([str(chain / "ldm"), str(tmp_path / "bare.png")], "it has no note 'model'"),
        ([str(chain / "ldm"), str(tmp_path / "place.png")], "number 1 of 1 pictures"),
        ([str(chain / "ldm"), str(tmp_path / "seed.png")], "says nonsense"),
        ([str(chain / "ldm"), str(tmp_path / "edit.png")], "was made by ldm edit; only"),
        ([str(chain / "ldm"), str(tmp_path / "out" / "sheet.png")], "was made by ldm generate, as a sheet"),
        ([str(chain / "ldm"), str(tmp_path / "missing.png")], "can't be opened"),
    ]:
        with pytest.raises(SystemExit):
            ldm(["recreate", *words, *again])
        assert said in capsys.readouterr().err
    ldm(["recreate", str(tmp_path / "other"), str(picture), "--other-model", *again])
    assert "of 255 from it" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("prompts", "kind", "words"),
    [
        (None, ValueError, "prompts is None, but this model needs a caption"),
        ([], ValueError, "prompts is empty"),
        (b"a circle", TypeError, "prompts is b'a circle', but must be text"),
        ([PROMPT, None], TypeError, r"prompts\[1\] is None, but must be text"),
        ([PROMPT, 3], TypeError, r"prompts\[1\] is 3"),
        (7, TypeError, "prompts is 7"),
        ("half \ud83e", ValueError, "prompts is no text: character 5"),
        ("long" * 2_500_000, ValueError, "10,000,000 characters, but at most 100,000"),
    ],
)
def test_what_is_no_prompt_is_refused(
    model: LatentDiffusion, prompts: object, kind: type[Exception], words: str
) -> None:
    with pytest.raises(kind, match=words):
        model(prompts, steps=2)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "kind", "words"),
    [
        ({"seed": [1, 2, 3]}, ValueError, "3 seeds for 2 pictures"),
        ({"seed": [1, -2]}, ValueError, "seed is -2"),
        ({"seed": "one"}, TypeError, "seed is 'o'"),
        ({"seed": 1.5}, TypeError, "seed is 1.5"),
        ({"negative": None}, TypeError, "negative is None"),
        ({"negative": "\udcff"}, ValueError, "negative is no text"),
        ({"classes": "circle"}, ValueError, "not told both"),
        ({"negative": "a star", "guidance": 1.0}, ValueError, "guidance is 1: none"),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    model: LatentDiffusion, settings: dict[str, object], kind: type[Exception], words: str
) -> None:
    with pytest.raises(kind, match=words):
        model(PROMPT, n=2, steps=2, **settings)  # type: ignore[arg-type]


def test_the_empty_prompt_is_unconditional(model: LatentDiffusion) -> None:
    """Guidance has nothing to move from then."""
    plain, guided = (model("", steps=3, seed=1, guidance=scale)[0] for scale in (1.0, 8.0))
    assert np.abs(np.asarray(plain, int) - np.asarray(guided, int)).max() <= 1


@pytest.mark.parametrize("kind", ["clip", "t5", "bert"])
def test_what_is_cut_of_a_prompt_is_said(kind: str, encoders: dict[str, Path]) -> None:
    told = model_of(conditioner(config(encoders, kind)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        told(CAPTIONS[0][:6], steps=2)
    with pytest.warns(Unread, match=r"limit is 12 tokens: '[^']*red end'"):
        told("red red red red red red red red red red red red red end", steps=2)
    with pytest.warns(Unread, match="the end is not read"):
        told("red", negative="red " * 20, steps=2)


def test_words_that_a_model_has_not_are_said(model: LatentDiffusion) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model([PROMPT, OTHER.upper(), ""], steps=1)
    with pytest.warns(Unread, match=r"has no 'kiwi', 'Circl' \(circle\?\), '☃': it reads letters instead"):
        model(["a kiwi", "a Circl ☃, a kiwi"], steps=1)
    with pytest.warns(Unread, match="has no 'pear'"):
        model(PROMPT, negative="a pear", steps=1)


def test_classes_beside_captions(encoders: dict[str, Path]) -> None:
    both = conditioner(config(encoders, "bert"), "class+text")
    told = model_of(both, num_class_embeds=3)
    plum, lime, none = (told("red", classes=name, steps=2, seed=1)[0] for name in ("plum", "lime", ""))
    assert not same(plum, lime) and not same(plum, none)
    edited = image_to_image(told, plum, "red", classes="lime", steps=2)[0]
    assert edited.size == plum.size
    for classes, words in [
        ("plumm", "there is no class 'plumm'; the nearest are plum"),
        (None, "classes is None"),
        (["plum", "lime"], "2 classes for 1 prompts"),
    ]:
        with pytest.raises(ValueError, match=words):
            told("red", classes=classes, steps=2)


def test_every_verb_takes_a_class_beside_a_caption(
    encoders: dict[str, Path], picture: Image.Image, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    both = conditioner(config(encoders, "bert"), "class+text")
    model = model_of(both, num_class_embeds=3)
    with torch.no_grad():
        for weight in model.unet.parameters():
            weight += 0.05 * torch.randn_like(weight)
    model.save_pretrained(tmp_path / "both")
    noise = {name: invert(model, picture, "red", classes=name, steps=3) for name in ("plum", "lime")}
    assert (noise["plum"] - noise["lime"]).abs().max() > 1e-3
    between = blended(model, "red", "green", [0.0, 0.5, 1.0], "lime")
    assert between["label"].tolist() == model.read("green", 3, "lime")["label"].tolist()
    for ask in (vary, interpolate):
        ends = (picture,) if ask is vary else (1, 2)
        made = [ask(model, *ends, "red", classes=name, steps=2)[0] for name in ("plum", "lime")]
        assert not same(*made)
    file, hole = tmp_path / "in.png", tmp_path / "hole.png"
    picture.save(file)
    mask = Image.new("L", picture.size)
    mask.paste(255, (0, 0, 8, 8))
    mask.save(hole)
    for verb, *more in (
        ("edit", str(file), "red"),
        ("inpaint", str(file), "red", "--mask", str(hole)),
        ("vary", str(file), "red", "--n", "1"),
        ("invert", str(file), "red", "--to", "green"),
        ("interpolate", "1", str(file), "red", "--to", "green", "--count", "2"),
    ):
        out = tmp_path / verb
        words = [verb, str(tmp_path / "both"), *more, "--steps", "2", "--out", str(out)]
        ldm([*words, "--class", "lime"])
        notes = Image.open(out / "0000.png").text
        assert (notes["prompt"], notes["class_name"], notes["made_by"]) == ("red", "lime", f"ldm {verb}")
        with pytest.raises(SystemExit):
            ldm([*words, "--class", "limes"])
        assert "there is no class 'limes'; the nearest are lime" in capsys.readouterr().err
    words = ["restore", str(tmp_path / "both"), str(file), "--noise", "60", "--prompt", "red"]
    ldm([*words, "--class", "plum", "--out", str(tmp_path / "sound")])
    assert Image.open(tmp_path / "sound" / "in.png").text["class_name"] == "plum"


def test_bad_prompts_end_in_a_sentence(
    chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "large.txt").write_text("x" * 10_000_000)
    start = ["generate", str(chain / "ldm"), "--steps", "2", "--out", str(tmp_path / "out")]
    for words, code, said in [
        (["--prompts", str(tmp_path / "latin.txt")], 1, "is no text in UTF-8 (byte 3)"),
        (["--prompts", str(tmp_path / "empty.txt")], 1, "has no prompts"),
        (["--prompts", str(tmp_path / "large.txt")], 1, "10,000,000 characters"),
        (["--prompts", str(tmp_path / "missing.txt")], 1, "missing.txt can't be read: No such file"),
        ([PROMPT, "--class", "pear"], 1, "this model is told no classes"),
        (["bytes \udcff"], 1, "is no text: character 6"),
        ([PROMPT, "--seed", "1,2"], 1, "2 seeds for 1 pictures"),
        ([PROMPT, "--seed", "one"], 2, "'one' is no whole number"),
        ([PROMPT, "--size", "9999999x16"], 1, "width is 9999999"),
        ([PROMPT, "--columns", "0"], 1, "--columns is 0"),
        ([PROMPT, "--keep-flagged"], 1, "without --checker"),
        ([PROMPT, "--checker", str(tmp_path)], 1, "no safety checker"),
    ]:
        with pytest.raises(SystemExit) as ended:
            ldm([*start, *words])
        assert ended.value.code == code and said in capsys.readouterr().err
    assert not [*(tmp_path / "out").glob("*.png")]
    ldm([*start, " ".join(["many words"] * 30)])
    assert capsys.readouterr().err.count("the end is not read, as the model's limit is 16 tokens: ") == 1
