"""LPIPS: the right weights in the right place, gradients through it, and files that are not there."""

import hashlib
import warnings
from pathlib import Path

import pytest
import torch
import torchvision
from huggingface_hub import constants
from lpips import LPIPS
from safetensors.torch import save_file

from autoencoder import perceptual
from autoencoder.kl import AutoencoderConfig, AutoencoderKL
from autoencoder.losses import LossConfig, Objective
from autoencoder.perceptual import NAMES, SMALLEST, Perceptual, PerceptualConfig, cached_file

CPU = torch.device("cpu")


def classifier(network: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return torchvision.models.get_model(NAMES[network], weights=None)


@pytest.fixture(scope="module")
def squeeze(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of a real classifier in a real file."""
    file = tmp_path_factory.mktemp("weights") / "squeeze.safetensors"
    save_file(classifier("squeeze").state_dict(), file)
    return file


def make(file: Path, network: str = "squeeze") -> Perceptual:
    return Perceptual(PerceptualConfig(weight=1.0, network=network, weights=str(file)), CPU)


def pictures(side: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.rand(3, 3, side, side) * 2 - 1, torch.rand(3, 3, side, side) * 2 - 1


def test_weights_come_to_lie_where_torchvision_has_them(squeeze: Path) -> None:
    lpips, (x, _) = make(squeeze), pictures()
    with torch.no_grad():
        torch.testing.assert_close(lpips.network.net(x)[-1], classifier("squeeze").features[:13](x))


@pytest.mark.parametrize("network", ["alex", "vgg", "squeeze"])
def test_every_classifier_is_found_under_torchvisions_names(network: str) -> None:
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = torchvision.models.get_model(NAMES[network], weights=None).state_dict()
        slices = LPIPS(net=network, pretrained=False, pnet_rand=True, verbose=False).net.state_dict()
    for name, weight in slices.items():
        assert theirs["features." + name.split(".", 1)[1]].shape == weight.shape


def test_the_linear_layers_are_those_of_the_package(squeeze: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = LPIPS(net="squeeze", pnet_rand=True, verbose=False)
    lpips, (x, y) = make(squeeze), pictures()
    theirs.net.load_state_dict(lpips.network.net.state_dict())
    assert all(lin.model[-1].weight.min() >= 0 for lin in theirs.lins), "trained ones are never negative"
    torch.testing.assert_close(lpips(x, y), theirs(x, y).flatten())
    assert lpips(x, x).abs().max() == 0 < lpips(x, y).min()


def test_its_gradient_reaches_every_weight_of_the_decoder_and_none_of_its_own(squeeze: Path) -> None:
    """Through the objective that training minimises, its other terms taken off."""
    torch.manual_seed(0)
    shape = {"block_out_channels": (8, 16), "norm_num_groups": 4, "mid_block_add_attention": False}
    autoencoder, lpips = AutoencoderKL(AutoencoderConfig(**shape)), make(squeeze)
    x, _ = pictures()
    before = {name: value.clone() for name, value in lpips.network.state_dict().items()}
    made, posterior = autoencoder(x, torch.randn(3, 4, 16, 16))
    last = autoencoder.decoder.conv_out.weight
    config = LossConfig(lpips=PerceptualConfig(weight=1.0, network="squeeze"))
    whole, rest = (Objective(config, judge, None, last)(x, made, posterior, 0)[0] for judge in (lpips, None))
    assert (whole - rest).item() == pytest.approx(lpips(made, x).mean().item(), rel=1e-4)
    (whole - rest).backward()
    for part in (autoencoder.decoder, autoencoder.post_quant_conv, autoencoder.encoder):
        for name, weight in part.named_parameters():
            assert weight.grad is not None and weight.grad.abs().max() > 0, name
    assert not lpips.network.training
    assert all(p.grad is None and not p.requires_grad for p in lpips.network.parameters())
    assert all(torch.equal(value, before[name]) for name, value in lpips.network.state_dict().items())


def test_weights_are_found_in_torch_hubs_cache_and_on_the_hub(
    squeeze: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As they lie there: a pickle that carries its hash in its name, and a repository's model.safetensors."""
    x, y = pictures()
    wanted, config = make(squeeze)(x, y), PerceptualConfig(weight=1.0, network="squeeze")
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    monkeypatch.setitem(perceptual.HUB, "squeeze", "owner/squeeze")
    hub = {("owner/squeeze", "model.safetensors"): squeeze}
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *name: hub[name])
    assert torch.equal(Perceptual(config, CPU)(x, y), wanted)
    hub.clear()
    torch.save(classifier("squeeze").state_dict(), tmp_path / "weights.pth")
    digest = hashlib.sha256((tmp_path / "weights.pth").read_bytes()).hexdigest()
    stock = torchvision.models.SqueezeNet1_1_Weights.IMAGENET1K_V1.value
    monkeypatch.setattr(stock, "url", f"https://nowhere/squeezenet1_1-{digest[:8]}.pth")
    cached_file("squeeze").parent.mkdir()
    (tmp_path / "weights.pth").rename(cached_file("squeeze"))
    assert torch.equal(Perceptual(config, CPU)(x, y), wanted)


@pytest.mark.parametrize(("network", "side"), SMALLEST.items())
def test_pictures_below_the_stated_size_have_no_features(network: str, side: int) -> None:
    vgg = torchvision.models.vgg  # the classifier behind the features takes seconds to draw
    features = vgg.make_layers(vgg.cfgs["D"]) if network == "vgg" else classifier(network).features
    last = {"alex": 12, "vgg": 30, "squeeze": 13}[network]
    features[:last](torch.zeros(1, 3, side, side))
    with pytest.raises(RuntimeError):
        features[:last](torch.zeros(1, 3, side - 1, side - 1))


@pytest.mark.parametrize("network", ["alex", "vgg"])
def test_missing_weights_are_one_sentence_that_says_what_to_do(
    network: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=f"weights of {NAMES[network]}.*is not there") as problem:
        Perceptual(PerceptualConfig(weight=1.0, network=network), CPU)
    said = str(problem.value)
    assert str(cached_file(network)) in said and "set loss.lpips.weights to a safetensors file" in said
    assert str(tmp_path) in said and ("timm/vgg16.tv_in1k" in said) == (network == "vgg")


def test_files_that_are_not_what_they_should_be_are_refused(
    squeeze: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="holds no alexnet of torchvision: features"):
        make(squeeze, network="alex")
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        make(tmp_path / "nothing.safetensors")
    (tmp_path / "torn.safetensors").write_bytes(squeeze.read_bytes()[:5000])
    with pytest.raises(ValueError, match="not a sound safetensors file"):
        make(tmp_path / "torn.safetensors")
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    cached_file("squeeze").parent.mkdir()
    cached_file("squeeze").write_bytes(b"not what the name says")
    with pytest.raises(ValueError, match="its SHA-256 is not the one in its name"):
        Perceptual(PerceptualConfig(weight=1.0, network="squeeze"), CPU)
