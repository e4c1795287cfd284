"""What several test files share."""

import ctypes
from pathlib import Path

import pytest
import torch
from PIL import Image

import train_ldm
import train_vae
from autoencoder import compiled
from ldm.data import DataConfig, ScenesConfig, open_source
from pipelines import LatentDiffusion
from pipelines.cli import main as ldm
from pipelines.evaluation.classifier import Classifier, Recogniser, save_recogniser
from tests.encoders import publish
from tests.support import DRAWING, JUDGED, KINDS, SIDE, TOY

torch.set_num_threads(1)  # tiny networks: threads cost more than they bring


@pytest.fixture(scope="session")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both stages, trained in this process: folders vae and ldm."""
    out = tmp_path_factory.mktemp("chain")
    train_vae.main(["--config", str(TOY / "vae.yaml"), "--run.out", str(out / "vae")])
    train_ldm.main(
        ["--config", str(TOY / "ldm.yaml"), "--autoencoder", str(out / "vae"), "--run.out", str(out / "ldm")]
    )
    return out


@pytest.fixture(scope="session")
def model(chain: Path) -> LatentDiffusion:
    """The model of `chain`, told captions; not to be changed."""
    return LatentDiffusion.from_pretrained(chain / "ldm")


WITHOUT = {"all that there is": (), "no pairs": ("-mno-avx512bf16",), "AVX2": ("-mno-avx512f",)}


@pytest.fixture(scope="session")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ctypes.CDLL]:
    """Our C as compiled here, and as on lesser processors."""
    usual, made = compiled.COMPILING, {}
    with pytest.MonkeyPatch.context() as patched:
        for name, without in WITHOUT.items():
            patched.setattr(compiled, "COMPILING", (*usual, *without))
            made[name] = compiled.opened(tmp_path_factory.mktemp("compiled"))
    return made


@pytest.fixture(params=WITHOUT)
def instructions(
    request: pytest.FixtureRequest, libraries: dict[str, ctypes.CDLL], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of them in turn."""
    made = libraries[request.param]
    monkeypatch.setattr(compiled, "library", lambda: made)


@pytest.fixture(scope="session")
def picture() -> Image.Image:
    """A drawn scene of 16x16 pixels."""
    return open_source(DataConfig(size=16)).picture(3, 16)


@pytest.fixture(scope="session")
def fruit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of two classes, with captions beside them."""
    out = tmp_path_factory.mktemp("fruit")
    for name, colour in (("plum", (90, 20, 90)), ("lime", (60, 200, 40))):
        (out / name).mkdir()
        for i in range(3):
            Image.new("RGB", (20 + i, 18), colour).save(out / name / f"{i}.png")
            (out / name / f"{i}.txt").write_text(f"a {'red' if i else 'green'} {name}")
    return out


@pytest.fixture(scope="session")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny published text encoder of each kind."""
    out = tmp_path_factory.mktemp("encoders")
    return {kind: publish(kind, out / kind) for kind in ("clip", "projection", "t5", "bert")}


@pytest.fixture(scope="session")
def runs(chain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of each task that begins with a picture, and `holes`: inpainting that is told nothing."""
    out = tmp_path_factory.mktemp("tasks")
    shared = f"--config {TOY}/ldm-plain.yaml --data.path scenes --data.scenes.count 24 --workers 0"
    for name in (*KINDS, "holes"):
        more = f"--task {name} --autoencoder {chain}/vae --run.out {out}/{name}"
        more += " --upscale.factor 2" if name == "upscale" else ""
        more += " --conditioning.text.width 16 --conditioning.text.heads 2" if name == "inpaint" else ""
        more = more.replace("--task holes", "--task inpaint --conditioning.kind none")
        train_ldm.main([*shared.split(), *more.split()])
    return out


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Drawn scenes with their captions, in train/one, train/two, test/one and test/two."""
    folder = tmp_path_factory.mktemp("pictures")
    for split in ("train", "test"):
        source = open_source(DataConfig(size=SIDE, scenes=ScenesConfig(count=JUDGED)), split)
        for i in range(JUDGED):
            place = folder / split / ("one", "two")[i % 2]
            place.mkdir(parents=True, exist_ok=True)
            source.picture(i, SIDE).save(place / f"{i:02d}.png")
            (place / f"{i:02d}.txt").write_text(source.texts[i])
    return folder


@pytest.fixture(scope="session")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights, but normalised as if by training, so that features have a spread."""
    torch.manual_seed(0)
    folder, network = tmp_path_factory.mktemp("classifier") / "untrained", Classifier(2)
    with torch.no_grad():
        for _ in range(30):
            network(torch.rand(32, 3, SIDE, SIDE) * 2 - 1)
    save_recogniser(Recogniser(network.eval(), ("one", "two"), SIDE, {}), folder)
    return folder


@pytest.fixture(scope="session")
def asked(pictures: Path, classifier: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options of `ldm evaluate`: the real pictures, and what judges them."""
    cache = str(tmp_path_factory.mktemp("cache"))
    return ["--data", str(pictures), "--extractor", str(classifier), "--cache", cache, "--lpips", "vgg"]


@pytest.fixture(scope="session")
def result(chain: Path, asked: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `ldm evaluate` found of the chain."""
    pytest.importorskip("torch_fidelity", reason="the figures are torch-fidelity's")
    file = tmp_path_factory.mktemp("result") / "a.json"
    ldm(["evaluate", str(chain / "ldm"), *asked, *DRAWING, "--out", str(file)])
    return file


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub is not asked, which where it can't be reached takes 23 seconds of trying again."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
