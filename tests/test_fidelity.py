"""Figures of two sets against other implementations, closed forms and what they must do."""

import math

import numpy as np
import pytest
import torch
from PIL import ImageFilter
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import KernelInceptionDistance

pytest.importorskip("torch_fidelity", reason="the figures are torch-fidelity's")

from ldm.config import UserError
from ldm.data import DataConfig, ScenesConfig, open_source
from pipelines import fidelity
from pipelines.classifier import Classifier
from pipelines.extractors import Seen, before_last_linear
from pipelines.fidelity import measured, of_pictures, of_sets
from pipelines.generation import bytes_of


class Features(nn.Identity):
    """Tells torchmetrics that what it is given are features."""

    num_features = 12


def normal(n: int, seed: int, width: int = 12, shift: float = 0.0, scale: float = 1.0) -> Tensor:
    return shift + scale * torch.randn(n, width, generator=torch.Generator().manual_seed(seed))


def test_figures_agree_with_torchmetrics_on_the_same_features(monkeypatch: pytest.MonkeyPatch) -> None:
    made, real = normal(80, 0, shift=0.3), normal(80, 1, scale=1.2)
    monkeypatch.setattr(fidelity, "SPLITS", 1)  # torchmetrics shuffles before it splits
    ours = measured(Seen(made, made), Seen(real, None), 3, frechet=True)
    frechet = FrechetInceptionDistance(Features()).set_dtype(torch.float64)
    kernel = KernelInceptionDistance(Features(), subsets=1, subset_size=80)
    for metric in (frechet, kernel):
        metric.update(real.double(), real=True)
        metric.update(made.double(), real=False)
    score = InceptionScore(Features(), splits=1)
    score.update(made.double())
    assert math.isclose(ours["frechet"], frechet.compute().item(), rel_tol=1e-6)
    assert math.isclose(ours["kid"], kernel.compute()[0].item(), rel_tol=1e-6)
    assert math.isclose(ours["inception_score"], score.compute()[0].item(), rel_tol=1e-6)


def test_precision_and_recall_by_hand() -> None:
    real = torch.tensor(
        [[float(i), 0.0] for i in range(10)]
    )  # a line: three neighbours lie within 2, at its ends 3
    made = torch.tensor([[float(i), 1.0] for i in range(5)] + [[float(i), 50.0] for i in range(5)])
    found = measured(Seen(made, None), Seen(real, None), 1, frechet=False)
    assert math.isclose(found["precision"], 0.5)  # those of height 1
    assert math.isclose(
        found["recall"], 0.7, rel_tol=1e-6
    )  # 0..6: (4, 1) reaches 3 far, (3, 1) and (2, 1) reach 2


@pytest.mark.parametrize("n", [200, 16])  # more and fewer than numbers in a feature
def test_a_set_is_at_no_distance_from_itself(n: int) -> None:
    features = normal(n, 0, width=64)
    assert (
        abs(measured(Seen(features, None), Seen(features.clone(), None), 1, frechet=True)["frechet"]) < 1e-3
    )


def test_two_gaussians_have_their_closed_form() -> None:
    spread = torch.tensor([1.0, 2.0, 0.5, 1.5])
    made, real = normal(40_000, 0, width=4), normal(40_000, 1, width=4) * spread + 0.7
    truth = 4 * 0.7**2 + (spread - 1).square().sum().item()  # |difference of means|^2 + sum of (s1 - s2)^2
    statistics = Seen(made, None), Seen(real, None)
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    parts = [fid_features_to_statistics(seen.features.double()) for seen in statistics]
    found = fid_statistics_to_metric(*parts, verbose=False)["frechet_inception_distance"]
    assert math.isclose(found, truth, rel_tol=0.02)


def test_distances_grow_with_noise_and_with_blur() -> None:
    source = open_source(DataConfig(size=32, scenes=ScenesConfig(count=48)))
    images = [source.picture(i, 32) for i in range(48)]
    torch.manual_seed(0)
    read = before_last_linear(Classifier(4).eval(), "random")
    rng = np.random.default_rng(0)

    @torch.no_grad()
    def seen(pixels: Tensor) -> Seen:
        return Seen(read(pixels.float().clamp(0, 255) / 127.5 - 1).features, None)

    clean = bytes_of(images)
    noise = torch.from_numpy(rng.standard_normal(clean.shape)).float()
    noisy = [seen(clean + level * noise) for level in (0, 5, 15, 40, 100)]
    blurred = [
        seen(bytes_of([image.filter(ImageFilter.GaussianBlur(radius)) for image in images]))
        for radius in (0, 1, 2, 4)
    ]
    for made in (noisy, blurred):
        for name in ("frechet", "kid"):
            found = [measured(one, noisy[0], 1, frechet=True)[name] for one in made]
            assert all(np.diff(found) > 0), (name, found)


def test_the_error_is_what_repetitions_scatter_by(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fidelity, "HALVES", 25)
    figures = [
        of_sets(Seen(normal(60, 2 * i, 3, shift=0.8), None), Seen(normal(60, 2 * i + 1, 3), None))
        for i in range(24)
    ]
    for name in ("frechet", "kid"):
        scatter = np.std([one[name].value for one in figures], ddof=1)
        said = np.mean([one[name].error for one in figures])
        assert 0.6 < said / scatter < 1.6, (name, said, scatter)


def test_what_pairs_have_in_common_does_not_scatter() -> None:
    real = normal(60, 0, 3)
    made = Seen(real + 0.01 * normal(60, 1, 3), None)
    alone, paired = of_sets(made, Seen(real, None)), of_sets(made, Seen(real, None), paired=True)
    assert paired["frechet"].value == alone["frechet"].value
    assert paired["frechet"].error < alone["frechet"].error / 10


def test_the_mean_over_pictures_has_the_error_of_a_mean() -> None:
    values = normal(400, 0, width=1).flatten()
    found = of_pictures(values)
    assert math.isclose(found.value, values.mean().item(), abs_tol=1e-6)
    assert math.isclose(found.error, values.std().item() / 20, rel_tol=0.15)
    assert found.interval[0] < found.value < found.interval[1]
    assert of_pictures(torch.ones(9)).interval == (1.0, 1.0)


def test_too_few_pictures_are_refused() -> None:
    with pytest.raises(UserError, match="7 pictures can't be compared with 20 real ones: at least 8"):
        of_sets(Seen(normal(7, 0), None), Seen(normal(20, 1), None))
