"""Every kind of extractor gives the features that its own library gives, and bad ones are refused in a sentence."""

import hashlib
import pickle
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

from ldm.config import UserError
from ldm.pictures import to_images
from pipelines.evaluation import extractors
from pipelines.evaluation.classifier import Classifier, Recogniser, load_recogniser, save_recogniser
from pipelines.evaluation.extractors import open_extractor
from pipelines.evaluation.references import bytes_of
from pipelines.evaluation.scores import Clip
from tests.encoders import clip_config, clip_tokenizer

CPU = torch.device("cpu")


@pytest.fixture
def pixels() -> Tensor:
    noise = torch.rand(2, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    return (noise * 255).round().to(torch.uint8)


def saved_classifier(folder: Path, classes: int = 5) -> Recogniser:
    torch.manual_seed(0)
    one = Recogniser(Classifier(classes).eval(), tuple("abcdefghij"[:classes]), 24, {"test": 0.5})
    save_recogniser(one, folder)
    return one


def test_our_classifier_comes_back_as_it_was(tmp_path: Path, pixels: Tensor) -> None:
    one = saved_classifier(tmp_path / "mine")
    found = open_extractor(str(tmp_path / "mine"), CPU)
    seen = found(pixels)
    x = pixels.float() / 127.5 - 1
    with torch.no_grad():
        assert torch.allclose(seen.logits, one.network(x), atol=1e-5)
        assert torch.allclose(one.network[-1](seen.features), seen.logits, atol=1e-5)
    assert found.classes == one.classes and load_recogniser(tmp_path / "mine").accuracy == {"test": 0.5}
    other = saved_classifier(tmp_path / "other", classes=4)
    assert (
        open_extractor(str(tmp_path / "other"), CPU).stamp()["weights_sha256"]
        != found.stamp()["weights_sha256"]
    )
    assert other.names(x) == [other.classes[i] for i in other.network(x).argmax(1).tolist()]


def test_a_classifier_of_torchvision(tmp_path: Path, pixels: Tensor) -> None:
    from torchvision.models import resnet18
    from torchvision.transforms import v2

    torch.manual_seed(0)
    network = resnet18().eval()
    save_file(network.state_dict(), tmp_path / "resnet18.safetensors")
    seen = open_extractor(f"torchvision:resnet18@{tmp_path}/resnet18.safetensors", CPU)(pixels)
    whole = v2.functional.resize(
        pixels.float() / 255, [224, 224], v2.InterpolationMode.BICUBIC, antialias=True
    )
    x = v2.functional.normalize(whole.clamp(0, 1), list(extractors.IMAGENET[0]), list(extractors.IMAGENET[1]))
    with torch.no_grad():
        assert torch.allclose(seen.logits, network(x), atol=1e-4)
        network.fc = torch.nn.Identity()
        assert torch.allclose(seen.features, network(x), atol=1e-4)


def test_a_model_of_timm(tmp_path: Path, pixels: Tensor) -> None:
    timm = pytest.importorskip("timm", reason="the model is timm's")
    name = "test_vit.r160_in1k"
    network = timm.create_model(name, pretrained=False).eval()
    save_file(network.state_dict(), tmp_path / "vit.safetensors")
    found = open_extractor(f"timm:{name}@{tmp_path}/vit.safetensors", CPU)
    told = timm.get_pretrained_cfg(name)
    with torch.no_grad():
        x = extractors.resized(told.input_size[-1], told.mean, told.std)(pixels)
        expected = network.forward_head(network.forward_features(x), pre_logits=True)
    assert torch.allclose(found(pixels).features, expected, atol=1e-5) and found(pixels).logits is None


def test_a_vision_model_of_transformers(tmp_path: Path, pixels: Tensor) -> None:
    torch.manual_seed(0)
    shape = transformers.Dinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    network = transformers.Dinov2Model(shape).eval()
    network.save_pretrained(tmp_path)
    size = {"height": 28, "width": 28}
    transformers.BitImageProcessor(size=size, crop_size=size, do_center_crop=True).save_pretrained(tmp_path)
    found = open_extractor(f"transformers:{tmp_path}", CPU)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    with torch.no_grad():
        x = extractors.resized(28, processor.image_mean, processor.image_std)(pixels)
        assert torch.allclose(found(pixels).features, network(x).pooler_output, atol=1e-5)
    assert "28x28" in found.resize


def test_inception_is_torch_fidelitys(
    tmp_path: Path, pixels: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch_fidelity", reason="the network is torch-fidelity's")
    from torch_fidelity import feature_extractor_inceptionv3 as theirs

    with monkeypatch.context() as patched:  # random weights, in a file like the published one
        patched.setattr(theirs, "load_state_dict_from_url", lambda *_, **__: {})
        patched.setattr(theirs.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        torch.manual_seed(0)
        wanted = ["2048", "logits_unbiased"]
        network = theirs.FeatureExtractorInceptionV3("inception-v3-compat", wanted, verbose=False)
    torch.save(network.state_dict(), tmp_path / "inception.pth")
    with (tmp_path / "inception.pth").open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()[:8]
    named = tmp_path / "checkpoints" / f"weights-inception-2015-12-05-{digest}.pth"
    named.parent.mkdir()
    (tmp_path / "inception.pth").rename(named)
    monkeypatch.setattr(theirs, "URL_INCEPTION_V3", f"https://nowhere/{named.name}")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    features, logits = network.eval()(pixels)
    for name in (f"inception@{named}", "inception"):  # the second finds it where the published one belongs
        seen = open_extractor(name, CPU)(pixels)
        assert torch.equal(seen.features, features) and torch.equal(seen.logits, logits)


class Harm:
    """Makes a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = str(file)

    def __reduce__(self) -> tuple:
        return open, (self.file, "w")


def test_a_pickle_that_runs_something_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("torch_fidelity", reason="which unpickles")
    torch.save({"fc.weight": Harm(tmp_path / "ran")}, tmp_path / "harm.pth")
    (tmp_path / "old.pth").write_bytes(pickle.dumps(Harm(tmp_path / "ran")))
    for name in ("harm.pth", "old.pth"):
        with pytest.raises(UserError, match="does not hold the weights of Inception"):
            open_extractor(f"inception@{tmp_path / name}", CPU)
    assert not (tmp_path / "ran").exists()


def test_missing_weights_are_named_with_their_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch_fidelity", reason="it names the file")

    def offline(url: str, *_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(UserError) as said:
        open_extractor("inception", CPU)
    assert f"{tmp_path}/checkpoints/weights-inception-2015-12-05-6726825d.pth" in str(said.value)
    assert "inception@FILE" in str(said.value) and "no network" in str(said.value)
    (tmp_path / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth").write_bytes(b"half")
    with pytest.raises(UserError, match="is damaged: its SHA-256"):
        open_extractor("inception", CPU)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing", "There is no extractor 'nothing'"),
        ("torchvision:", "There is no extractor"),
        ("torchvision:nothing", "torchvision has no model 'nothing'"),
        ("timm:nothing", "timm has no model 'nothing'"),
        ("transformers:no/where", "models--no--where"),
        ("inception@/nowhere.pth", "The weights /nowhere.pth of the extractor inception are not there"),
        ("{empty}", "holds no classifier"),
    ],
)
def test_bad_names_are_one_sentence(name: str, message: str, tmp_path: Path, offline: None) -> None:
    if name.startswith("timm"):
        pytest.importorskip("timm", reason="the model is timm's")
    with pytest.raises(UserError) as said:
        open_extractor(name.format(empty=tmp_path), CPU)
    assert message in str(said.value) and "\n" not in str(said.value)


def test_a_damaged_classifier_is_refused(tmp_path: Path) -> None:
    saved_classifier(tmp_path / "mine")
    config = tmp_path / "mine" / "config.json"
    config.write_text(config.read_text().replace('"e"', '"e", "f"'))
    with pytest.raises(ValueError, match="does not hold the weights of a classifier of 6 classes"):
        open_extractor(str(tmp_path / "mine"), CPU)


def test_clip_score_is_the_cosine_of_picture_and_caption(tmp_path: Path, pixels: Tensor) -> None:
    torch.manual_seed(0)
    tokenizer = clip_tokenizer()
    vision = transformers.CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
    )
    shape = transformers.CLIPConfig(
        text_config=clip_config(tokenizer, 2).to_dict(), vision_config=vision.to_dict(), projection_dim=12
    )
    model = transformers.CLIPModel(shape).eval()
    model.save_pretrained(tmp_path)
    size = {"height": 28, "width": 28}
    images = transformers.CLIPImageProcessor(size={"shortest_edge": 28}, crop_size=size)
    processor = transformers.CLIPProcessor(images, tokenizer)
    processor.save_pretrained(tmp_path)
    captions = ["a red circle", "many words and more"]
    found = Clip(str(tmp_path), CPU)(pixels, captions)
    told = processor(
        text=captions, images=to_images(pixels.float() / 127.5 - 1), return_tensors="pt", padding=True
    )
    with torch.no_grad():
        out = model(**told)
    cosine = torch.nn.functional.cosine_similarity(out.image_embeds, out.text_embeds)
    assert torch.allclose(found, (100 * cosine).clamp(min=0), atol=1e-2)
    assert cosine.max() > 0  # or the clamp would be all that is tested
    with pytest.raises(UserError, match="The CLIP model /nowhere can't be had"):
        Clip("/nowhere", CPU)


def test_bytes_are_those_of_the_pictures(pixels: Tensor) -> None:
    assert torch.equal(bytes_of(to_images(pixels.float() / 127.5 - 1)), pixels)
