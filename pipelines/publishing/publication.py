"""What is published: what the person has decided about it, and what the run says of itself."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ldm.config import UserError
from ldm.data import DataConfig, ScenesConfig, Source, open_source
from ldm.inspection import sound
from pipelines.credentials import Credentials
from pipelines.publishing.licenses import require_license
from pipelines.publishing.release import SHARD


@dataclass(frozen=True, kw_only=True)
class Publication:
    """What is published, and what the person has decided about it."""

    model: Path
    """A run folder"""
    name: str
    """NAMESPACE/NAME on the hub"""
    license: str
    """As the hub calls it, one of `pipelines.publishing.licenses.LICENSES`"""
    license_file: Path | None = None
    """Its text, if it is none of those that are here"""
    private: bool = False
    """For the namespace's members only"""
    dry_run: bool = False
    """Do everything except uploading"""
    out: Path | None = None
    """Folder in which the release is left to look at; by default it is removed in the end"""
    about: str = ""
    """What the training pictures are, where they are from, on which terms they were used"""
    data: str | None = None
    """The training pictures, to look for copies of them"""
    accept_copies: bool = False
    """Publish although drawn pictures are copies of training pictures; the card says so"""
    checker: str | None = None
    """A stock safety checker that looks at the samples: folder or hub name"""
    looked_at: bool = False
    """The person has looked at the samples; the card says so"""
    credentials: Credentials | None = None
    """Who signs the samples; by default they carry notes alone"""
    half: bool = True
    """Also publish float16 weights"""
    shard: str = SHARD
    """Largest weight file, such as 5GB"""
    prompts: tuple[str, ...] = ()
    """Of the samples; by default those that the recipe shows, or the first classes or captions"""
    classes: tuple[str, ...] = ()
    """Of the samples of a model of both: one, or one a prompt"""
    pictures: tuple[Path, ...] = ()
    """Of a task that begins with one, sound ones of which samples are made; by default drawn scenes"""

    def __post_init__(self) -> None:
        try:
            validate_repo_id(self.name)
        except HFValidationError as problem:
            raise UserError(f"{self.name} is no name on the hub ({problem}); give NAMESPACE/NAME.") from None
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", self.name, re.ASCII):
            raise UserError(f"{self.name} is no name on the hub; give NAMESPACE/NAME.")
        require_license(self.license)
        if not re.fullmatch(r"[1-9]\d*[KMGT]B", self.shard):
            raise UserError(f"--shard is {self.shard}, but must be a size such as 500MB or 5GB.")

    @property
    def license_name(self) -> str | None:
        """What the hub calls a licence that it doesn't know."""
        return self.license_file.stem if self.license == "other" and self.license_file else None


class FinishedRun:
    """What a run folder says about itself."""

    def __init__(self, folder: Path) -> None:
        try:
            self.recipe: dict[str, Any] = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
            self.result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
            self.steps, self.seconds = int(self.result["step"]), float(self.result["seconds"])
            self.recipe["data"]["path"], self.recipe["ema_decay"]
            stage1 = Path(self.recipe["autoencoder"]).expanduser()
        except (OSError, ValueError, KeyError, TypeError) as problem:
            raise UserError(
                f"{folder} is no finished run of train_ldm.py ({problem}); give the folder of one, with config.yaml, "
                "result.json and model."
            ) from None
        self.folder, self.model = folder, folder / "model"
        there = (stage1 / "config.yaml").is_file() and (stage1 / "result.json").is_file()
        self.stage1 = stage1 if there else None

    def trained(self) -> str:
        """How long, in words, and from where."""
        batch, start = self.recipe["run"]["batch_size"], self.recipe.get("start")
        name = Path(start).name if start and Path(start).exists() else start
        return (
            f"{self.steps:,} optimizer steps of {batch} samples in {self.seconds / 60:.1f} minutes "
            f"(wall clock, all restarts included){f', going on from the model {name}' if start else ''}."
        )

    def source(self, path: str) -> Source:
        """The training pictures, found at `path`."""
        said = self.recipe["data"]
        scenes = ScenesConfig(**said["scenes"]) if path == "scenes" else ScenesConfig()
        return sound(open_source(DataConfig(**{**said, "path": path, "scenes": scenes})))
