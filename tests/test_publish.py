"""From a finished run to the hub, through the real client and a real server on loopback, and back."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.config import UserError
from ldm.data import DataConfig, open_source
from pipelines import LatentDiffusion
from pipelines.cli import main as ldm
from pipelines.evaluation.memorisation import find_copies
from pipelines.publishing import gate
from pipelines.publishing.card import cell
from pipelines.publishing.publication import Publication
from pipelines.publishing.publish import publish, require_release
from pipelines.publishing.release import ALLOWED, listed, search_secrets, write_release
from tests.hub import Hub
from tests.support import ROOT, ran

pytest.importorskip("diffusers", reason="publishing opens the model in stock diffusers")

NAME = "tester/toy-scenes"
PROMPTS = ["a large red circle at the top left on a white background", "a small blue star"]
BASE = {"name": NAME, "license": "cc-by-4.0", "dry_run": True, "prompts": tuple(PROMPTS[:1])}


@pytest.fixture(scope="session")
def published(chain: Path, tmp_path_factory: pytest.TempPathFactory):
    """The toy text model, published by the command line: (hub, home of the client, what was printed)."""
    folder = tmp_path_factory.mktemp("hub")
    with Hub(folder / "hub", chunk=50_000) as hub:
        client = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(folder / "home"), "HF_TOKEN": "hf_test_write"}
        patch = pytest.MonkeyPatch()
        for key, value in client.items():
            patch.setenv(key, value)
        flags = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
        flags += ["--license", "cc-by-4.0", "--looked-at", "--data", "scenes", "--accept-copies"]
        flags += ["--about", "Shapes drawn by a program."]
        said = ran(
            "-c", "from pipelines.cli import main; main()", "publish", str(chain / "ldm"), NAME, *flags
        )
        patch.undo()
        yield hub, client, said


def stranger(code: str, client: dict[str, str], cwd: Path) -> None:
    """Run code that cannot import our packages."""
    block = "import sys; sys.modules.update(dict.fromkeys(('ldm', 'autoencoder', 'pipelines'), None))\n"
    subprocess.run([sys.executable, "-c", block + code], check=True, cwd=cwd, env=os.environ | client)


def difference(one: Path, other: Path) -> int:
    a, b = (np.asarray(Image.open(path).convert("RGB")).astype(int) for path in (one, other))
    return int(np.abs(a - b).max())


def card(hub: Hub) -> str:
    return hub.blob(hub.tree(NAME)["README.md"]).read_text()


def test_what_was_published_is_the_manifest_in_one_commit(published) -> None:
    hub, _, said = published
    tree = hub.tree(NAME)
    manifest = json.loads(hub.blob(tree["manifest.json"]).read_text())["files"]
    assert {path: about["sha256"] for path, about in manifest.items()} == {
        path: sha256 for path, sha256 in tree.items() if path not in ("manifest.json", ".gitattributes")
    }
    assert all(ALLOWED.fullmatch(path) for path in manifest) and "samples/01.png" in manifest
    assert "unet/diffusion_pytorch_model.fp16.safetensors" in manifest
    assert hub.blob(tree["LICENSE"]).read_text().startswith("Creative Commons Attribution 4.0")
    assert hub.commits(NAME) == 2 and "published and read back" in said


def test_the_token_is_in_no_output_and_goes_to_no_other_host(published) -> None:
    hub, client, said = published
    assert client["HF_TOKEN"] not in said
    with_token = {request.host for request in hub.requests if request.token}
    hosts = {request.host for request in hub.requests}
    assert with_token == {hub.endpoint.removeprefix("http://")} and len(hosts) == 2
    assert not any(client["HF_TOKEN"].encode() in request.body for request in hub.requests)


IMAGE_TO_IMAGE = f"""
from diffusers import AutoPipelineForImage2Image
from PIL import Image
model = AutoPipelineForImage2Image.from_pretrained({NAME!r})
start = Image.new("RGB", (16, 16), "red")
model({PROMPTS[0]!r}, image=start, strength=0.5, num_inference_steps=4).images[0].save("changed.png")
"""


@pytest.mark.parametrize("number", [0, 1], ids=["stock", "ours"])
def test_the_snippets_of_the_card_draw_the_published_sample(published, tmp_path: Path, number: int) -> None:
    hub, client, _ = published
    snippet = re.findall(r"```python\n(.*?)```", card(hub), re.S)[number]
    if number == 0:
        stranger(snippet + IMAGE_TO_IMAGE, client, tmp_path)
        assert Image.open(tmp_path / "changed.png").size == (16, 16)
    else:
        environment = os.environ | client | {"PYTHONPATH": str(ROOT)}
        subprocess.run([sys.executable, "-c", snippet], check=True, cwd=tmp_path, env=environment)
    (tmp_path / "sample.png").write_bytes(hub.blob(hub.tree(NAME)["samples/00.png"]).read_bytes())
    assert difference(tmp_path / "drawn.png", tmp_path / "sample.png") <= gate.TOLERANCE
    assert "trainedAlgorithmicMedia" in Image.open(tmp_path / "sample.png").text["digital_source_type"]


def test_the_card_is_complete_and_says_nothing_of_this_machine(published, chain: Path) -> None:
    from huggingface_hub import ModelCard

    hub, _, _ = published
    text = card(hub)
    header = ModelCard(text).data
    assert (header.license, header.library_name) == ("cc-by-4.0", "diffusers")
    assert header.pipeline_tag == "text-to-image"
    result = json.loads((chain / "vae" / "result.json").read_text())
    assert header.eval_results[0].metric_value == result["psnr_db"]
    for words in (
        "Shapes drawn by a program.",
        "24 pictures: drawn scenes",
        "No checker was run",
        "averages over them",
        *PROMPTS,
    ):
        assert words in text
    assert "{{" not in text and "{%" not in text and str(chain) not in text and "None" not in text
    headings = re.findall(r"^## (.*)$", text, re.M)
    assert headings[:3] == ["Samples", "Use", "Training data"] and "Limits" in headings
    assert all(f"\n\n## {heading}\n\n" in text for heading in headings)


def test_captions_do_not_break_the_tables_of_the_card() -> None:
    assert cell("a | b\n[c]") == r"a \| b \[c\]" and cell("") == ""


def test_a_dry_run_needs_no_hub_and_lists_what_would_go(
    chain: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # --out is where the person stands
    assert publish(Publication(model=chain / "ldm", **BASE, out=Path("out"), half=False, shard="20KB")) == ""
    listed_names = set(re.findall(r"^ +[\d,]+  (\S+)$", capsys.readouterr().out, re.M))
    there = {p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert listed_names == there - {"manifest.json"} and not any("sample" in name for name in there)
    assert "unet/diffusion_pytorch_model.safetensors.index.json" in there
    assert "No samples are shown" in (tmp_path / "out" / "README.md").read_text()
    one, other = (
        LatentDiffusion.from_pretrained(tmp_path / "out"),
        LatentDiffusion.from_pretrained(chain / "ldm"),
    )
    theirs = other.unet.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in one.unet.state_dict().items())


def test_what_float16_can_not_hold_is_not_published(chain: Path, tmp_path: Path) -> None:
    model = LatentDiffusion.from_pretrained(chain / "ldm")

    def draw(model: LatentDiffusion) -> list[Image.Image]:
        return model(list(PROMPTS), steps=2)

    before, _ = gate.scan_half(model, draw)
    with torch.no_grad():
        model.unet.conv_in.weight.mul_(6e4)  # no weight is too large, but what it makes
    after, _ = gate.scan_half(model, draw)
    assert before.safe and not after.safe and after.where == "unet.conv_in"
    gate.require_half(before)
    with pytest.raises(UserError, match=r"unet.conv_in reaches .* nothing was published; give --no-half"):
        gate.require_half(after)


def test_a_stock_pipeline_that_hangs_is_one_sentence_and_leaves_half_a_release_nowhere(
    chain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate, "SECONDS", 0.1)
    with pytest.raises(
        UserError, match=r"did not draw 1 pictures within 0.1 seconds, so nothing was published"
    ):
        publish(Publication(model=chain / "ldm", **BASE, out=tmp_path / "out", half=False))
    assert [path.name for path in tmp_path.iterdir()] == ["out-samples.png"]


def test_only_an_earlier_release_is_replaced(tmp_path: Path) -> None:
    for name in ("manifest.json", "samples/00.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(UserError, match="holds something else than a release"):
        require_release(tmp_path)
    (tmp_path / "thesis.tex").unlink()
    require_release(tmp_path)


def test_pictures_that_differ_stop_it() -> None:
    one, other = (Image.new("RGB", (4, 4), (grey, 0, 0)) for grey in (100, 103))
    assert gate.require_same([one], [one]) == 0
    with pytest.raises(UserError, match="differ by 3 of 255"):
        gate.require_same([one], [other])


def test_a_copy_of_a_training_picture_is_found_and_a_new_one_is_not() -> None:
    source = open_source(DataConfig(size=32))
    copy = source.picture(5, 32).transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8))
    found = find_copies([copy, noise], source)
    assert (found.which, found.total, found.nearest[0]) == ((0,), 2, 5)


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["--license", "my-own"], 1, "--license is my-own"),
        ([], 2, "--license"),
        (["--license", "mit"], 1, "There is no token for the hub"),
        (["--license", "openrail", "--dry-run"], 1, "The text of openrail isn't here"),
        (
            ["--license", "mit", "--dry-run", "--data", "{pictures}"],
            1,
            "holds other pictures, captions or classes",
        ),
        (["--license", "mit", "--dry-run", "--data", "nowhere"], 1, "There is nothing at nowhere"),
        (["--license", "mit", "--dry-run", "--prompt", "x", "--out", "{ldm}"], 1, "holds something else"),
        (["--license", "mit", "--dry-run", "--prompt", "x", "--looked-art"], 2, "--looked-art"),
        (["--license", "mit", "--dry-run", "--shard", "much"], 1, "--shard is much"),
        (["--license", "mit", "--dry-run", "--checker", "{ldm}/model/unet"], 1, "is no safety checker"),
    ],
)
def test_bad_requests_are_one_sentence(
    chain: Path, fruit: Path, flags: list[str], code: int, message: str, capsys, monkeypatch
) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    words = [flag.format(ldm=chain / "ldm", pictures=fruit) for flag in flags]
    with pytest.raises(SystemExit) as ended:
        ldm(["publish", str(chain / "ldm"), NAME, *words])
    said = capsys.readouterr().err
    assert ended.value.code == code and message in said and "Traceback" not in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", NAME], "no finished run"),
        (["{ldm}/../vae", NAME], "no finished run of train_ldm.py"),
        (["{ldm}", "no-namespace"], "no-namespace is no name on the hub"),
        (["{ldm}", "somebody/früchte"], "somebody/früchte is no name on the hub"),
        (["{ldm}", "somebody/fruit-"], "somebody/fruit- is no name on the hub"),
        (["{ldm}", "somebody/red--fruit"], "somebody/red--fruit is no name on the hub"),
    ],
)
def test_bad_names_are_one_sentence(chain: Path, arguments: list[str], message: str, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        words = [argument.format(ldm=chain / "ldm") for argument in arguments]
        ldm(["publish", *words, "--license", "mit", "--dry-run"])
    said = capsys.readouterr().err
    assert ended.value.code == 1 and message in said and "Traceback" not in said


# Put together here, so that no scanner takes this file for a leak.
PLANTED = [
    "hf_" + "AbCdEfGhIjKlMnOpQrStUvWxYz01234567",
    "ghp_" + "a1B2c3D4e5F6g7H8i9J0k1L2m3N4o5P6q7R8",
    "github_pat_" + "11AAAAAAA0abcdefghijklmnop",
    "glpat-" + "abcdefGHIJKL12345678",
    "sk-" + "proj-abcdef1234567890ABCDEFGH",
    "sk-ant-" + "api03-abcdefghijklmnop-1234",
    "AKIA" + "IOSFODNN7EXAMPLE",
    "AIza" + "SyA1234567890abcdefghijklmnopqrstu",
    "ya29." + "a0AfH6SMBabcdefghijklmnop",
    "GOCSPX-" + "abcdefghijklmnopqrstuvwx",
    "xoxb-" + "123456789012-abcdefghijkl",
    "https://hooks.slack.com/" + "services/T000/B000/XXXX",
    "https://discord.com/" + "api/webhooks/1234567890/abc",
    "1234567890:" + "AAabcdefghijklmnopqrstuvwxyz0123456",
    "SG." + "abcdefghijklmnopqr.stuvwxyz0123456789",
    "SK" + "0123456789abcdef0123456789abcdef",
    "npm_" + "abcdefghijklmnopqrstuvwxyz0123456789",
    "pypi-" + "AgEIcHlwaS5vcmcabcdef",
    "dop_v1_" + "0123456789abcdef0123456789abcdef",
    "nvapi-" + "abcdefghijklmnopqrstuvwxyz",
    "sk_live_" + "abcdefghij1234567890",
    "eyJhbGciOiJIUzI1NiJ9." + "eyJzdWIiOiIxMjM0In0.abcdefghijk",
    "-----BEGIN RSA " + "PRIVATE KEY-----",
    "AGE-SECRET-KEY-1" + "QQPQQPQQPQQP",
    "postgres://user:" + "hunter22@db.internal/x",
    "Authorization: Bearer " + "abcdef0123456789abcdef",
    "machine huggingface.co login me " + "password xyz",
    "password: " + "correct-horse",
    "api_key=" + "abcdef123456",
    "/home/" + "alice/pictures",
    "/Volumes/" + "Photos",
    "/kaggle/" + "input/pictures",
    "wJalrXUtnFEMI7K7MDENGbPxRfi" + "CYEXAMPLEKEY12345",
    "C:\\Users\\" + "alice",
]


@pytest.fixture(scope="session")
def release(chain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of a published model, as they are before they are listed."""
    folder = tmp_path_factory.mktemp("release")
    write_release(chain / "ldm" / "model", folder, half=False)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    return folder


def test_a_release_of_a_run_holds_no_secret(release: Path) -> None:
    listed(release)
    search_secrets(release, {"hf_test_write": "your token"})


@pytest.mark.parametrize("place", ["README.md", "tokenizer/tokenizer.json", "text_encoder/config.json"])
def test_planted_secrets_are_found_by_kind_and_never_repeated(release: Path, place: str) -> None:
    listed(release)
    before = (release / place).read_text()
    try:
        for secret in PLANTED:
            quoted = json.dumps({"note": secret}) if place.endswith("json") else f"Thanks to {secret}\n"
            (release / place).write_text(before + quoted)
            with pytest.raises(UserError) as found:
                search_secrets(release, {})
            assert secret not in str(found.value) and Path(place).name in str(found.value), secret
    finally:
        (release / place).write_text(before)


def test_files_beside_the_model_do_not_leave_the_machine(chain: Path, tmp_path: Path) -> None:
    stock = tmp_path / "model"
    shutil.copytree(chain / "ldm" / "model", stock)
    strays = (
        ".env",
        "id_rsa",
        "unet/optimizer.safetensors",
        "unet/notes.txt",
        "train.log",
        "vae/x.ckpt",
        ".git/config",
    )
    for stray, secret in zip(strays, PLANTED, strict=False):
        (stock / stray).parent.mkdir(exist_ok=True)
        (stock / stray).write_text(secret)
    assert sorted(write_release(stock, tmp_path / "out", half=False)) == sorted(strays)
    assert not any("optimizer" in name or "env" in name for name in listed(tmp_path / "out"))
    (stock / "unet" / "link.json").symlink_to("/etc/hostname")
    with pytest.raises(UserError, match=r"link.json is a link"):
        write_release(stock, tmp_path / "other", half=False)


def test_names_of_layers_and_words_are_no_secrets() -> None:
    from pipelines.publishing.release import random_word

    words = ("CrossAttnDownBlock2DCrossAttnDownBlock2D", "transformerlayersperblock00000", "a" * 40)
    assert not any(map(random_word, words)) and random_word("q8Zr5t1Yp0Xw7Vb3Nm2Kj4Hg6")
