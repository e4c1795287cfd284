"""Models of every kind but plain captions, published: stock diffusers and our own code make what the card shows."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import train_ldm
from ldm.config import UserError
from pipelines.cli import main as ldm
from pipelines.publishing import gate
from pipelines.publishing.publication import Candidate, Publication
from pipelines.publishing.publish import publish
from pipelines.publishing.release import listed
from pipelines.publishing.samples import request_for
from pipelines.publishing.upload import HubSession, upload
from tests.hub import Hub
from tests.support import ROOT, TOY

pytest.importorskip("diffusers", reason="publishing opens the model in stock diffusers")

TAGS = {  # kind -> the hub's pipeline_tag, and who opens it
    "class": ("unconditional-image-generation", "DiffusionPipeline"),
    "none": ("unconditional-image-generation", "DiffusionPipeline"),
    "class+text": ("text-to-image", "DiffusionPipeline"),
    "inpaint": ("image-to-image", "StableDiffusionInpaintPipeline"),
    "upscale": ("image-to-image", "DiffusionPipeline"),
    "segment": ("image-segmentation", "DiffusionPipeline"),
}


def photograph(folder: Path) -> Path:
    """A picture in which a camera has noted its owner."""
    exif = Image.Exif()
    exif[0xA430] = "Alice"
    file = folder / "photograph.jpg"
    Image.linear_gradient("L").convert("RGB").save(file, exif=exif, comment="of Alice")
    return file


STRANGER = """
import runpy, sys
DRAW = sys.argv[1]
for line in sys.stdin:
    sys.argv[1:] = [line.strip()]
    try:
        runpy.run_path(DRAW, run_name="__main__")
    except Exception as problem:
        print(repr(problem), flush=True)
    else:
        print("drawn", flush=True)
"""


class Stranger:
    """One process for all that `gate` starts a process for, as their imports take longer than the rest together."""

    process: subprocess.Popen | None = None

    def __call__(
        self, command: list[str], *, env: dict[str, str], **_: object
    ) -> subprocess.CompletedProcess:
        if self.process is None:
            words = [*command[:2], "-c", STRANGER, command[2]]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
            self.process = subprocess.Popen(words, env=env, text=True, **pipes)
        print(command[3], file=self.process.stdin, flush=True)
        said = self.process.stdout.readline().strip()
        return subprocess.CompletedProcess(command, int(said != "drawn"), "", said)

    def __del__(self) -> None:
        if self.process is not None:
            self.process.kill()


@pytest.fixture(scope="module")
def shelf(chain: Path, fruit: Path, runs: Path, tmp_path_factory: pytest.TempPathFactory):
    """All of them on one hub: (folder with a release of each kind, the hub)."""
    out = tmp_path_factory.mktemp("kinds")
    with Hub(out / "hub", chunk=50_000) as hub:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(gate.subprocess, "run", Stranger())
            for kind in TAGS:
                run = (
                    runs / kind
                    if (runs / kind).exists()
                    else trained(kind, out / f"run-{kind}", chain, fruit)
                )
                pictures = (photograph(out), fruit / "plum" / "1.png") if kind == "upscale" else ()
                publish(
                    Publication(
                        model=run, name=repository(kind), license="mit", dry_run=True, out=out / kind,
                        looked_at=True, half=False, pictures=pictures, accept_copies=True,
                    )
                )  # fmt: skip
        for kind in TAGS:
            session = HubSession(repository(kind), "hf_test_write", hub.endpoint)
            upload(out / kind, listed(out / kind), session, private=False)
        yield out, hub


def trained(kind: str, run: Path, chain: Path, fruit: Path) -> Path:
    """A run of models that draw, told this."""
    told = ["--conditioning.text.width", "16", "--conditioning.text.heads", "2"] if "text" in kind else []
    words = f"--config {TOY}/ldm-plain.yaml --conditioning.kind {kind} --data.path {fruit} --run.steps 1"
    train_ldm.main([*words.split(), "--autoencoder", f"{chain}/vae", "--run.out", str(run), *told])
    return run


def repository(kind: str) -> str:
    return f"tester/{kind.replace('+', '-')}"


def snippets(shelf, number: int) -> str:
    """The code of all cards, stock or ours, each of which draws into a file of its own."""
    out, _ = shelf
    codes = []
    for kind in TAGS:
        code = re.findall(r"```python\n(.*?)```", (out / kind / "README.md").read_text(), re.S)[number]
        codes.append(code.replace("drawn.png", f"{kind}.png"))
    return "\n".join(codes)


def drawn(shelf, folder: Path, code: str, **more: str) -> None:
    _, hub = shelf
    client = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(folder / "home"), "NO_PROXY": "127.0.0.1"}
    environment = os.environ | client | {"OMP_NUM_THREADS": "1"} | more
    subprocess.run([sys.executable, "-c", code], check=True, cwd=folder, env=environment)


def array(file: Path) -> np.ndarray:
    return np.asarray(Image.open(file).convert("RGB")).astype(int)


def test_the_stock_snippets_make_the_published_samples(shelf, tmp_path: Path) -> None:
    block = "import sys; sys.modules.update(dict.fromkeys(('ldm', 'autoencoder', 'pipelines'), None))\n"
    drawn(shelf, tmp_path, block + snippets(shelf, 0))
    for kind in TAGS:
        sample = array(shelf[0] / kind / "samples" / "00.png")
        assert abs(array(tmp_path / f"{kind}.png") - sample).max() <= gate.TOLERANCE, kind


def test_our_snippets_make_the_published_samples(shelf, tmp_path: Path) -> None:
    drawn(shelf, tmp_path, snippets(shelf, 1), PYTHONPATH=str(ROOT))
    for kind in TAGS:
        made, sample = array(tmp_path / f"{kind}.png"), array(shelf[0] / kind / "samples" / "00.png")
        if kind == "segment":  # by several samples, put to the vote
            numbers = np.asarray(Image.open(tmp_path / "segment.png"))
            assert numbers.shape == sample.shape[:2] and numbers.max() < 7
        elif kind == "inpaint":  # with its colours shifted to meet what is known
            known = array(shelf[0] / kind / "samples" / "00-hole.png") == 0
            assert known.any() and (made == sample)[known].all() and not (made == sample).all()
        else:
            assert abs(made - sample).max() <= gate.TOLERANCE, kind


def test_the_cards_say_what_the_models_do(shelf) -> None:
    from huggingface_hub import ModelCard

    out, _ = shelf
    cards = {kind: (out / kind / "README.md").read_text() for kind in TAGS}
    for kind, (tag, opens) in TAGS.items():
        card = cards[kind]
        assert ModelCard(card).data.pipeline_tag == tag and f"from diffusers import {opens}" in card
        assert (
            ("trust_remote_code" in card)
            == (out / kind / "pipeline.py").exists()
            == (opens != TAGS["inpaint"][1])
        )
        assert "{{" not in card and "{%" not in card and "None" not in card and str(out) not in card
    assert "draws 16 x 16 pixel pictures of 2 classes from captions" in cards["class+text"]
    assert "fills holes in pictures, told by captions" in cards["inpaint"]
    assert [kind for kind in TAGS if "That also shifts the colours" in cards[kind]] == ["inpaint"]
    assert (
        "| given | white is drawn | made | |\n|---|---|---|---|\n| ![given](samples/00-given.png)"
        in cards["inpaint"]
    )
    assert "makes pictures 2 times as wide and high" in cards["upscale"]
    assert "one of 7 colours" in cards["segment"] and "circle `rgb(" in cards["segment"]
    given = Image.open(out / "upscale" / "samples" / "00-given.png")
    assert given.size == (8, 8) and not given.info and not given.getexif()
    assert {path.name for path in (out / "segment" / "samples").iterdir()} == {
        f"{i:02d}{end}.png" for i in range(4) for end in ("", "-given")
    }


@pytest.mark.parametrize(
    ("run", "flags", "sentence"),
    [
        ("ldm", ["--picture", "x.png"], "--picture is given, but this model begins with none"),
        ("ldm", ["--class", "lime"], "--class is given, but this model is not told both"),
        ("upscale", ["--prompt", "a pear"], "--prompt is given, but this model draws without"),
        ("upscale", ["--picture", "nowhere.png"], "nowhere.png"),
        ("inpaint", ["--prompt", "a", "--prompt", "b", "--picture", "{picture}"], "2 prompts for 1 pictures"),
        ("ldm", ["--prompt", "a"] * 101, "There would be 101 samples; give at most 100"),
    ],
)
def test_bad_requests_are_one_sentence(
    chain: Path, runs: Path, fruit: Path, run: str, flags: list[str], sentence: str, capsys
) -> None:
    words = [flag.format(picture=fruit / "lime" / "0.png") for flag in flags]
    with pytest.raises(SystemExit) as ended:
        folder = (chain if run == "ldm" else runs) / run
        ldm(["publish", str(folder), "me/it", "--license", "mit", "--dry-run", *words])
    said = capsys.readouterr().err
    assert ended.value.code == 1 and sentence in said and "Traceback" not in said


def test_classes_are_those_that_were_asked_for_and_captions_those_of_the_data(shelf, fruit: Path) -> None:
    run = shelf[0] / "run-class+text"
    what = Publication(model=run, name="me/it", license="mit", classes=("lime",), data=str(fruit))
    candidate = Candidate.of(what)
    request = request_for(candidate)
    assert request.prompts == tuple(dict.fromkeys(candidate.source.texts))[:8]
    assert request.classes == ("lime",) * request.count


def test_a_checker_looks_at_what_is_given_too() -> None:
    from pipelines.publishing.publish import verdict
    from pipelines.safety import Verdict

    class Strict:
        name = "strict"

        def __call__(self, images):
            return [Verdict(flagged=image.width > 4, scores={}) for image in images]

    small, large = (Image.new("RGB", (side, side)) for side in (4, 8))
    what = Publication(model=Path("x"), name="a/b", license="mit")
    with pytest.raises(UserError, match="flags 1 of 2 samples"):
        verdict([small, large], what, Strict())
