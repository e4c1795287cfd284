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

from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric

from ldm.config import UserError
from ldm.data import DataConfig, ScenesConfig, open_source
from pipelines.evaluation import bootstrap, fidelity
from pipelines.evaluation.classifier import Classifier
from pipelines.evaluation.extractors import Seen, before_last_linear
from pipelines.evaluation.fidelity import measured, of_pictures, of_sets
from pipelines.evaluation.generation import bytes_of


class Features(nn.Identity):
    """Tells torchmetrics that what it is given are features."""

    num_features = 12


def normal(n: int, seed: int, width: int = 12, shift: float = 0.0, scale: float = 1.0) -> Tensor:
    return shift + scale * torch.randn(n, width, generator=torch.Generator().manual_seed(seed))


def test_figures_agree_with_torchmetrics_on_the_same_features(monkeypatch: pytest.MonkeyPatch) -> None:
    made, real = normal(80, 0, shift=0.3), normal(80, 1, scale=1.2)
    monkeypatch.setattr(fidelity, "SPLITS", 1)  # torchmetrics shuffles before it splits
    ours = measured(Seen(made, made), Seen(real, None))
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
    found = measured(Seen(made, None), Seen(real, None))
    assert math.isclose(found["precision"], 0.5)  # those of height 1
    assert math.isclose(
        found["recall"], 0.7, rel_tol=1e-6
    )  # 0..6: (4, 1) reaches 3 far, (3, 1) and (2, 1) reach 2


@pytest.mark.parametrize("n", [200, 16])  # more and fewer than numbers in a feature
def test_a_set_is_at_no_distance_from_itself(n: int) -> None:
    features = normal(n, 0, width=64)
    assert abs(measured(Seen(features, None), Seen(features.clone(), None))["frechet"]) < 1e-3


def test_two_gaussians_have_their_closed_form() -> None:
    spread = torch.tensor([1.0, 2.0, 0.5, 1.5])
    made, real = normal(40_000, 0, width=4), normal(40_000, 1, width=4) * spread + 0.7
    truth = 4 * 0.7**2 + (spread - 1).square().sum().item()  # |difference of means|^2 + sum of (s1 - s2)^2
    statistics = Seen(made, None), Seen(real, None)
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
            found = [measured(one, noisy[0])[name] for one in made]
            assert all(np.diff(found) > 0), (name, found)


def test_intervals_cover_the_known_distances_of_gaussians(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        bootstrap, "within", lambda *_: torch.zeros(fidelity.TIMES)
    )  # would take most of the time
    at, n, repeats = 0.8, 200, 50
    third = at**3 + 3 * at  # E x³ of N(at, 1), whose E x² is 1 + at²
    truth = {"frechet": at**2, "kid": third**2 / 8 + 3 * at**4 / 4 + 3 * at**2 / 2}  # kernel (xy / 2 + 1)³
    flat = torch.zeros(n, 1)  # torch-fidelity takes no single feature
    covered = dict.fromkeys(truth, 0)
    for i in range(repeats):
        made, real = normal(n, 2 * i, 1, shift=at), normal(n, 2 * i + 1, 1)
        for name, figure in of_sets(*(Seen(torch.cat([x, flat], 1), None) for x in (made, real))).items():
            if name in truth:
                covered[name] += figure.interval[0] <= truth[name] <= figure.interval[1]
    assert all(0.85 * repeats <= times for times in covered.values()), covered  # of 95 %
    assert not all(times == repeats for times in covered.values()), "so wide that they say nothing"


@pytest.mark.parametrize(("n", "width"), [(60, 3), (24, 128)])  # more and fewer pictures than features
def test_the_error_is_what_repetitions_scatter_by(
    n: int, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fidelity, "TIMES", 60)
    spread = torch.arange(1, width + 1).rsqrt()
    sets = [
        [Seen(normal(n, 2 * i + k, width, shift=0.5 - k / 2) * spread, None) for k in (0, 1)]
        for i in range(24)
    ]
    figures = [of_sets(*pair) for pair in sets]
    for name in ("frechet", "kid", "precision", "recall"):
        scatter = np.std([one[name].value for one in figures], ddof=1)
        said = np.mean([one[name].error for one in figures])
        assert 0.65 < said / scatter < 1.65, (name, said, scatter)


def test_what_a_picture_weighs_is_how_figures_change_when_it_is_there_once_more() -> None:
    made, real, times = normal(20, 0, 3, shift=0.5), normal(25, 1, 3), 500
    whole = made.repeat(times, 1)
    more = torch.cat([whole, made[:1]])
    changes = {
        "frechet": bootstrap.of_frechet(made.double(), real.double())[0],
        "inception_score": bootstrap.of_score(made.double()),
    }
    large = real.repeat(times, 1)

    def figures(features: Tensor) -> dict[str, float]:
        statistics = [fid_features_to_statistics(part.double()) for part in (features, large)]
        distance = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
        score = isc_features_to_metric(features.double(), splits=1)["inception_score_mean"]
        return {"frechet": distance, "inception_score": score}

    before, after = figures(whole), figures(more)
    for name, change in changes.items():
        wanted = (change[0] - change.mean()).item() / len(more)
        assert math.isclose(after[name] - before[name], wanted, rel_tol=0.02), name


def test_all_pictures_once_have_the_precision_and_recall_of_torch_fidelity() -> None:
    made, real = normal(40, 0, 4, shift=0.5), normal(50, 1, 4)
    found, w, v = measured(Seen(made, None), Seen(real, None)), torch.ones(1, 40), torch.ones(1, 50)
    assert math.isclose(bootstrap.within(made, real, w, v).item(), found["precision"], rel_tol=1e-6)
    assert math.isclose(bootstrap.within(real, made, v, w).item(), found["recall"], rel_tol=1e-6)


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


def test_a_share_of_pictures_is_not_certain_because_none_or_all_of_them_have_it() -> None:
    alone = of_pictures(torch.tensor([False] * 300 + [True] * 100))
    spread = of_pictures(torch.tensor([0.0] * 300 + [1.0] * 100))
    assert alone.value == spread.value == 0.25 and math.isclose(alone.error, spread.error, rel_tol=0.1)
    assert np.allclose(alone.interval, spread.interval, atol=0.01)
    whole = of_pictures(torch.ones(100, dtype=torch.bool))
    assert whole.value == whole.interval[1] == 1 and 0.95 < whole.interval[0] < 0.97  # Wilson: 0.963
    far = of_sets(Seen(normal(20, 0, shift=99), None), Seen(normal(25, 1), None))
    assert far["precision"].value == far["recall"].value == 0
    assert 0.1 < far["recall"].interval[1] < far["precision"].interval[1] < 0.2  # Wilson: 0.133 and 0.161
    assert whole.error > 0.005 and of_pictures(torch.zeros(100, dtype=torch.bool)).interval[0] == 0


def test_too_few_pictures_are_refused() -> None:
    with pytest.raises(UserError, match="7 pictures can't be compared with 20 real ones: at least 8"):
        of_sets(Seen(normal(7, 0), None), Seen(normal(20, 1), None))
