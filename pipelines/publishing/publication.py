"""What is published: what the person has decided about it, and what the run says of itself."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from autoencoder.kl import AutoencoderKL
from autoencoder.store import weight_hash
from ldm.conditioning import Words, labels_of, text_of
from ldm.config import UserError
from ldm.data import DataConfig, ScenesConfig, Source, open_source
from ldm.inspection import sound
from pipelines.credentials import Credentials
from pipelines.latent_diffusion import LatentDiffusion
from pipelines.publishing.licenses import require_license
from pipelines.publishing.release import SHARD
from pipelines.stages.showing import ShowConfig
from pipelines.stages.stage_one import data_of


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
    """The training pictures, to look for copies of them; by default where the run had them, if they are there"""
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
    """What the run folder of either stage says about itself, settings that it is too old to have as their defaults.

    Raises:
        UserError: it is no finished run.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.model = folder, folder / "model"
        with self.read():
            self.recipe = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
            self.result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
            self.steps, self.seconds = int(self.result["step"]), float(self.result["seconds"])
            self.batch, self.ema = int(self.recipe["run"]["batch_size"]), float(self.recipe["ema_decay"])
            self.recipe["data"]["path"]
            data = data_of(str(folder))
            assert data is not None
            self.data: DataConfig = data
            self.show: dict[str, Any] = dict(self.recipe.get("show", {}))

    @contextmanager
    def read(self) -> Iterator[None]:
        """While open, what a damaged folder leads to is a UserError."""
        try:
            yield
        except (OSError, ValueError, LookupError, TypeError, AttributeError, yaml.YAMLError) as problem:
            raise UserError(
                f"{self.folder} is no finished run of train_ldm.py, or of train_vae.py for its autoencoder "
                f"({problem!r:.200}); give the folder of one, with config.yaml, result.json and model."
            ) from None


class LatentRun(FinishedRun):
    """Of stage 2."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        with self.read():
            self.shown = ShowConfig(**self.show)
            self.text: dict[str, Any] = dict(self.recipe["conditioning"]["text"])
            self.autoencoder = str(self.recipe["autoencoder"])

    def source(self, path: str | None) -> Source | None:
        """The training pictures, found at `path`; without, where the run had them, None if they can't be had now.

        Raises:
            UserError: there are none at `path`, or others than the run was trained on.
        """
        there = all(one == "scenes" or Path(one).expanduser().exists() for one in self.data.paths)
        if path is None and not there:
            return None
        where = self.data.path if path is None else path
        scenes = self.data.scenes if where == "scenes" else ScenesConfig()
        try:
            source = sound(open_source(replace(self.data, path=where, scenes=scenes)))
            self.require_trained_on(source)
        except UserError as problem:
            if path is not None:
                raise
            print(f"the training pictures are not looked at: {problem}", flush=True)
            return None
        return source

    def require_trained_on(self, source: Source) -> None:
        """UserError unless these are the pictures, captions and classes that the run began with, as far as it tells."""
        contract = self.folder / "contract.json"
        if not contract.is_file() or self.recipe.get("task") == "segment":  # whose contract is about masks
            return
        with self.read():
            begun_with = json.loads(contract.read_text(encoding="utf-8"))["set of pictures"]
        if begun_with != source.fingerprint:
            raise UserError(
                f"{source.config.where} holds other pictures, captions or classes than {self.folder} was trained on; "
                "give the very same with --data, or leave it out."
            )


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A model that is to be published, and all that is known of it."""

    what: Publication
    run: LatentRun
    model: LatentDiffusion
    source: Source | None
    """The training pictures, if they are at hand"""
    stage1: FinishedRun | None
    """The run that trained the autoencoder, if it is still there"""

    @classmethod
    def of(cls, what: Publication) -> Candidate:
        """UserError if there is no finished run, or its pictures are not where the person says."""
        run = LatentRun(what.model)
        model = LatentDiffusion.from_pretrained(run.model)
        return cls(
            what=what,
            run=run,
            model=model,
            source=run.source(what.data),
            stage1=trained_by(Path(run.autoencoder).expanduser(), model.autoencoder),
        )

    @property
    def words(self) -> Words:
        """What the model is told."""
        text, labels = text_of(self.model.conditioner), labels_of(self.model.conditioner)
        if text and labels:
            return "class+text"
        return "text" if text else "class" if labels else "none"

    @property
    def classes(self) -> tuple[str, ...]:
        """Their names, if it is told some."""
        labels = labels_of(self.model.conditioner)
        return tuple(labels.classes) if labels else ()


def trained_by(folder: Path, autoencoder: AutoencoderKL) -> FinishedRun | None:
    """`folder` if it is a finished run whose model is this very autoencoder."""
    if not all((folder / name).is_file() for name in ("config.yaml", "result.json", "model/config.json")):
        return None
    same = weight_hash(folder / "model") == weight_hash(autoencoder.state_dict())
    return FinishedRun(folder) if same else None
