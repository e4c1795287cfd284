"""Every shipped recipe is understood, and its networks can be built."""

import ast
import inspect
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import get_type_hints

import pytest
import torch

import train_ldm
import train_vae
from ldm.config import differences, filled, load, plain, to_yaml
from ldm.denoiser import Denoiser
from ldm.paths import make_path
from ldm.prediction import make_prediction
from ldm.unet import UNet
from pipelines.schedulers import scheduler_config

ROOT = Path(__file__).parents[1]
RECIPES = [*sorted((ROOT / "configs").rglob("*.yaml")), *sorted((ROOT / "tests" / "toy").glob("*.yaml"))]


def read(path: Path) -> train_vae.Recipe | train_ldm.Recipe:
    script = train_vae if path.name.startswith("vae") else train_ldm
    return load(script.Recipe, ["--config", str(path)], prog=script.__name__)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_recipes_describe_what_can_be_built(path: Path) -> None:
    recipe = read(path)
    with torch.device("meta"):
        if isinstance(recipe, train_vae.Recipe):
            network = train_vae.NETWORKS[recipe.kind](recipe.network.config(recipe.kind))
            assert network.config.factor == 2 ** (len(recipe.network.block_out_channels) - 1)
            assert recipe.network.sample_size == recipe.data.size, "stock tools read it"
            return
        UNet(recipe.network)
    noise = make_path(recipe.path)
    prediction = make_prediction(recipe.prediction, noise)
    Denoiser(lambda x, t, cond: x, noise, prediction, recipe.weight)
    assert scheduler_config(noise, prediction.name, recipe.sampler)["_class_name"]


def test_both_stages_of_a_recipe_see_the_same_pictures() -> None:
    for folder in ("scenes", "fruits", "emoji"):
        one, other = (read(ROOT / "configs" / folder / f"{stage}.yaml") for stage in ("vae", "ldm"))
        assert (one.data.path, one.data.size) == (other.data.path, other.data.size)
        assert other.autoencoder == str(one.run.out)


def test_a_resolved_recipe_reads_back_as_itself(tmp_path: Path) -> None:
    for name in ("vae.yaml", "ldm.yaml"):
        recipe = read(ROOT / "configs" / "scenes" / name)
        (tmp_path / name).write_text(to_yaml(recipe))
        assert plain(read(tmp_path / name)) == plain(recipe)


def test_settings_newer_than_a_run_have_their_defaults_in_it() -> None:
    recipe = load(train_ldm.Recipe, ["--config", str(ROOT / "tests" / "toy" / "ldm.yaml")], prog="test")
    old = plain(recipe)
    del old["ema_every"], old["run"]["timeout"], old["data"]["bad_share"]
    assert differences(filled(old, recipe), plain(recipe)) == []
    changed = load(
        train_ldm.Recipe,
        ["--config", str(ROOT / "tests" / "toy" / "ldm.yaml"), "--ema_every", "5"],
        prog="test",
    )
    assert differences(filled(old, changed), plain(changed)) == ["ema_every was 0 and is 5"]


def undocumented(kind: type) -> list[str]:
    """Settings of a dataclass, and of those in it, that no docstring follows."""
    said = set()
    for cls in kind.__mro__[:-1]:
        body = ast.parse(inspect.getsource(cls)).body[0].body
        after = dict(zip(body, [*body[1:], None], strict=True))
        said |= {
            n.target.id for n in after if isinstance(n, ast.AnnAssign) and isinstance(after[n], ast.Expr)
        }
    types = get_type_hints(kind)
    own = [f.name for f in fields(kind) if not is_dataclass(types[f.name])]
    missing = [f"{kind.__name__}.{name}" for name in own if name not in said]
    groups = [types[f.name] for f in fields(kind) if is_dataclass(types[f.name])]
    return missing + [name for group in groups for name in undocumented(group)]


@pytest.mark.parametrize("script", [train_vae, train_ldm])
def test_every_setting_says_what_it_is(script) -> None:
    assert undocumented(script.Recipe) == []


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--loss.kl nan", "loss.kl is nan, but must be a finite number"),
        ("--run.steps 1.5", "run.steps is 1.5, but must be a whole number"),
        ("--data.flip maybe", "data.flip is maybe, but must be true or false"),
        ("--loss.lpips.network resnet", "loss.lpips.network is resnet, but must be alex, vgg or squeeze"),
        ("--network.preset huge", "network.preset is huge, but must be tiny, small or base"),
        ("--network.factor eight", "network.factor is eight, but must be a whole number"),
        (
            "--network.block_out_channels [8,a]",
            "network.block_out_channels is [8, 'a'], but must be a list of whole",
        ),
        ("--optimizer.betas [0.9]", "optimizer.betas is [0.9], but must be a list of 2"),
        ("--loss.gan 5", "loss.gan is 5, but it is a group of settings"),
        ("--config nowhere.yaml", "config: File does not exist"),
        ("--run.seed -1", "run.seed is -1, but must lie between 0 and 2^32 - 1"),
        ("--run.max_norm 0", "run.max_norm is 0.0, but must be positive"),
    ],
)
def test_a_value_of_the_wrong_type_is_told_in_a_sentence(
    flags: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        load(train_vae.Recipe, ["--config", "tests/toy/vae.yaml", *flags.split()], prog="train_vae.py")
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.startswith(f"train_vae.py: {sentence}") and said.count("\n") == 1
