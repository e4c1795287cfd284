"""Trackers get settings, figures and pictures; an unknown or missing one is a sentence before anything starts."""

import json
from pathlib import Path

import pytest
from accelerate.tracking import (
    LOGGER_TYPE_TO_CLASS,
    GeneralTracker,
    get_available_trackers,
    register_tracker_class,
)
from PIL import Image

import train_vae
from ldm.config import UserError, load
from ldm.trackers import chosen_tracker, settings
from tests.support import TOY

WORDS = ["--config", str(TOY / "vae.yaml"), "--run.steps", "2"]


def test_names_are_checked_early(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert chosen_tracker("none") is None and chosen_tracker("tensorboard") == "tensorboard"
    with pytest.raises(UserError, match=r"run\.tracker is 'tensorbord'; choose none or one of aim, "):
        chosen_tracker("tensorbord")
    missing = set(LOGGER_TYPE_TO_CLASS) - {str(name) for name in get_available_trackers()}
    if not missing:
        pytest.skip("every tracker is installed")
    name = sorted(missing)[0]
    for dry in ([], ["--dry-run"]):
        with pytest.raises(SystemExit) as ended:
            train_vae.main([*WORDS, "--run.out", str(tmp_path / "run"), "--run.tracker", name, *dry])
        assert ended.value.code == 1 and f"pip install {name}" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_settings_are_single_values() -> None:
    told = settings(load(train_vae.Recipe, WORDS, prog="test"))
    assert told["run.seed"] == 0 and told["data.path"] == "scenes" and told["data.text"] == "None"
    assert told["network.block_out_channels"] == "[8, 16]" and told["data.flip"] is False


def test_tensorboard_holds_settings_figures_and_pictures(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train_vae.main([*WORDS, "--run.out", str(tmp_path), "--run.tracker", "tensorboard"])
    folders = {path.parent for path in (tmp_path / "tensorboard").rglob("events*")}
    read = [accumulator.EventAccumulator(str(folder)).Reload() for folder in sorted(folders)]
    scalars, images = (
        [tag for events in read for tag in events.Tags()[kind]] for kind in ("scalars", "images")
    )
    assert "loss" in scalars and "reconstructions" in images
    assert [
        e.step
        for events in read
        if "reconstructions" in events.Tags()["images"]
        for e in events.Images("reconstructions")
    ] == [0, 2]
    saved = [json.dumps(path.read_text()) for path in (tmp_path / "tensorboard").rglob("hparams.yml")]
    assert len(saved) == 1 and "optimizer.lr: 0.002" in saved[0]


class Lines(GeneralTracker):
    """A tracker that writes lines of JSON."""

    name = "lines"
    requires_logging_directory = True
    main_process_only = True

    def __init__(self, run_name: str, logging_dir: str, **kwargs: object) -> None:
        super().__init__()
        self.file = Path(logging_dir, f"{run_name}.jsonl")

    @property
    def tracker(self) -> Path:
        return self.file

    def _write(self, **entry: object) -> None:
        with self.file.open("a") as file:
            file.write(json.dumps(entry) + "\n")

    def store_init_configuration(self, values: dict) -> None:
        self._write(settings=values)

    def log(self, values: dict, step: int | None = None, **kwargs: object) -> None:
        self._write(step=step, values=values)


class Pictures(Lines):
    name = "pictures"

    def log_images(self, values: dict, step: int | None = None, **kwargs: object) -> None:
        for name, images in values.items():
            assert all(isinstance(image, Image.Image) for image in images)
            self._write(step=step, picture=name, size=images[0].size)


@pytest.mark.parametrize("tracker", [Lines, Pictures])
def test_other_trackers_go_through_accelerate(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tracker: type[Lines]
) -> None:
    register_tracker_class(tracker)
    try:
        train_vae.main([*WORDS, "--run.out", str(tmp_path), "--run.tracker", tracker.name])
    finally:
        del LOGGER_TYPE_TO_CLASS[tracker.name]
    lines = [json.loads(line) for line in (tmp_path / f"{tracker.name}.jsonl").read_text().splitlines()]
    assert lines[0]["settings"]["run.steps"] == 2
    assert [line["step"] for line in lines if "values" in line] == [1, 2]
    shown = [line["step"] for line in lines if "picture" in line]
    assert shown == ([0, 2] if tracker is Pictures else [])
    assert ("takes no pictures" in capsys.readouterr().err) == (tracker is Lines)
