"""`ldm publish`: a finished run becomes a public model.

Everything is made and proven on this machine first; only then is it uploaded, in one commit, and read back.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from PIL import Image
from torch import nn

from autoencoder.store import weight_hash
from ldm.conditioning import labels_of, text_of
from ldm.config import UserError
from ldm.data import DataConfig, ScenesConfig, Source, open_source
from ldm.inspection import sound
from pipelines.card import Facts, Metric, leaf, model_card
from pipelines.card_figures import evaluated
from pipelines.credentials import Credentials
from pipelines.gate import (
    Proof,
    Request,
    drawn_by_stock,
    furthest,
    require_diffusers,
    require_same,
    scan_half,
)
from pipelines.latent_diffusion import LatentDiffusion
from pipelines.licenses import license_text, require_license
from pipelines.memorisation import Copies, find_copies
from pipelines.release import ALLOWED, SHARD, listed, search_secrets, write_release
from pipelines.safety import ClipSafetyChecker, SafetyChecker, provenance
from pipelines.sheets import contact_sheet, side_by_side
from pipelines.upload import MANIFEST, HubSession, token_of_person, upload

SHIPPED = Path(__file__).parent / "shipped" / "pipeline.py"


@dataclass(frozen=True, kw_only=True)
class Publication:
    """What is published, and what the person has decided about it."""

    model: Path
    """A run folder"""
    name: str
    """NAMESPACE/NAME on the hub"""
    license: str
    """As the hub calls it, one of `pipelines.licenses.LICENSES`"""
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
        """How long, in words."""
        batch = self.recipe["run"]["batch_size"]
        return (
            f"{self.steps:,} optimizer steps of {batch} samples in {self.seconds / 60:.1f} minutes "
            "(wall clock, all restarts included)."
        )

    def metrics(self, autoencoder: str) -> list[Metric]:
        """The figures that stage 1 measured, if its run is there and trained the autoencoder that is published."""
        if self.stage1 is None or weight_hash(self.stage1 / "model") != autoencoder:
            return []
        result = json.loads((self.stage1 / "result.json").read_text())
        recipe = yaml.safe_load((self.stage1 / "config.yaml").read_text())
        show, data = recipe["show"], recipe["data"]
        split = result.get("psnr_split") or show.get("split") or data["split"]
        protocol = f"autoencoder alone; mean over {show['count']} pictures of split {split} of "
        protocol += f"{leaf(data['path'])}, {data['size']} pixels, posterior means"
        known = {"psnr_db": "psnr", "ssim": "ssim", "lpips": "lpips"}
        return [
            Metric(kind=kind, name=f"{key} of reconstructions", value=result[key], protocol=protocol)
            for key, kind in known.items()
            if key in result
        ]

    def source(self, path: str) -> Source:
        """The training pictures, found at `path`."""
        said = self.recipe["data"]
        scenes = ScenesConfig(**said["scenes"]) if path == "scenes" else ScenesConfig()
        return sound(open_source(DataConfig(**{**said, "path": path, "scenes": scenes})))


def publish(what: Publication) -> str:
    """Build, prove, and unless it is a dry run upload; the address of the commit, or "".

    Raises:
        UserError: something is missing or not as it should be; nothing has left the machine then, unless the
            message says otherwise.
    """
    token = "" if what.dry_run else token_of_person()
    terms, checker = checked(what)
    run = FinishedRun(what.model)
    model = LatentDiffusion.from_pretrained(run.model)
    source = run.source(what.data) if what.data else None
    request = samples_wanted(what, run, model, source)  # which also refuses kinds that can't be published
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ldm-publish-")))
        release = scratch / "release" if what.out is None else emptied(what.out)
        print("1/5  building: the averaged (EMA) weights, anew, and nothing else of the run", flush=True)
        scan, images = scan_half(model, partial(request.drawn_by, progress=True))
        if what.out:
            contact_sheet(images, request.prompts).save(f"{what.out}-samples.png")
        if what.half and not scan.safe:
            raise UserError(
                f"{scan.where} reaches {scan.largest:.3g}, more than float16 can hold (65504), so nothing was "
                "published; give --no-half to publish float32 alone."
            )
        pipeline = build(model, release, scratch / "stock", what)
        print("2/5  drawing with stock diffusers in a process of its own", flush=True)
        theirs, version = drawn_by_stock(release, pipeline, request, scratch)
        difference = require_same(images, theirs)
        print(f"     largest difference from the trainer's pictures: {difference} of 255")
        if what.half:
            halved, _ = drawn_by_stock(release, pipeline, request, scratch, "fp16")
            print(f"     with float16 weights: {furthest(images, halved)} of 255")
        print("3/5  looking for copies of training pictures, and at the samples", flush=True)
        proof = Proof(
            request=request,
            difference=difference,
            diffusers=version,
            scan=scan,
            copies=no_copies(images, source, what),
            half=what.half,
        )
        safety, no_samples = verdict(images, what, checker)
        samples = [] if no_samples else save_samples(images, request, release, what)
        facts = Facts(
            name=what.name,
            license=what.license,
            license_name=what.license_name,
            about=what.about,
            pipeline=pipeline,
            proof=proof,
            samples=samples,
            no_samples=no_samples,
            safety=safety,
            data_facts=[f"{len(source):,} pictures: {source.kind}"] if source else [],
            **facts_of(run, model),
        )
        (release / "README.md").write_text(model_card(facts), encoding="utf-8")
        (release / "LICENSE").write_text(terms, encoding="utf-8")
        return send(what, release, token)


def checked(what: Publication) -> tuple[str, SafetyChecker | None]:
    """The licence's text, and who looks at the samples.

    Raises:
        UserError: for what would else fail, or be found useless, after all has been drawn.
    """
    require_diffusers()
    if what.credentials and not (what.checker or what.looked_at):
        raise UserError(
            "--credentials sign samples, of which none are published without --checker or --looked-at."
        )
    checker = ClipSafetyChecker.from_pretrained(what.checker) if what.checker else None
    return license_text(what.license, what.license_file, what.name.split("/")[0]), checker


def facts_of(run: FinishedRun, model: LatentDiffusion) -> dict[str, Any]:
    """What the card says of the run and its model."""
    identity = weight_hash(model.autoencoder.state_dict())
    first = yaml.safe_load((run.stage1 / "config.yaml").read_text(encoding="utf-8")) if run.stage1 else None
    return {
        "kind": kind_of(model),
        "recipe": run.recipe,
        "first_recipe": first,
        "trained": run.trained(),
        "parts": parts_of(model),
        "classes": labels.classes if (labels := labels_of(model.conditioner)) else (),
        "autoencoder": identity,
        "metrics": run.metrics(identity) + evaluated(run.folder, weight_hash(model.unet.state_dict())),
    }


def build(model: LatentDiffusion, release: Path, stock: Path, what: Publication) -> str:
    """Write the release, without its card; the class that stock tools open it with."""
    model.save_pretrained(stock)
    kind = json.loads((stock / "model_index.json").read_text())["_class_name"]
    left = write_release(stock, release, half=what.half, shard=what.shard)
    if left:
        print(f"     left out, as no reader needs them: {', '.join(left)}")
    if kind_of(model) != "text":
        shutil.copyfile(SHIPPED, release / "pipeline.py")
    return str(kind)


def send(what: Publication, release: Path, token: str) -> str:
    """Search what is to be sent for secrets, list it, and upload it unless this is a dry run."""
    print("4/5  searching every file for keys, tokens and paths of this machine", flush=True)
    files = listed(release)
    home = {str(Path.home()): "the path of your home folder"} if len(str(Path.home())) > 1 else {}
    search_secrets(release, home | ({token: "your token for the hub"} if token else {}))
    for name, about in files.items():
        print(f"     {about['size']:>14,}  {name}")
    if what.dry_run:
        where = f"; it lies in {what.out}" if what.out else ""
        print(f"5/5  a dry run: these files would go to {what.name}, and nothing else{where}")
        return ""
    hub = HubSession(what.name, token)
    print(f"5/5  uploading to {hub.api.endpoint}, in one commit", flush=True)
    address = upload(release, files, hub, private=what.private)
    print(f"published and read back: {address}")
    return address


def emptied(out: Path) -> Path:
    """A new folder, or one that holds an earlier release."""
    if out.exists() and any(out.iterdir()):
        files = [path.relative_to(out).as_posix() for path in out.rglob("*") if not path.is_dir()]
        if MANIFEST not in files or not all(map(ALLOWED.fullmatch, files)):
            raise UserError(f"{out} holds something else than a release; give an empty folder with --out.")
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    return out


def kind_of(model: LatentDiffusion) -> str:
    text, labels = text_of(model.conditioner), labels_of(model.conditioner)
    if model.task:
        raise UserError(
            f"A model that was trained to {model.task.kind} pictures can't be published by this command yet; the "
            "folder model of its run is what stock tools open, with pipelines/shipped/pipeline.py in it unless its "
            "model_index.json names a stock pipeline."
        )
    if text and labels:
        raise UserError(
            "A model of classes and captions together can't be published yet: no stock class draws so."
        )
    return "text" if text else "class" if labels else "none"


def samples_wanted(
    what: Publication, run: FinishedRun, model: LatentDiffusion, source: Source | None
) -> Request:
    """What is drawn for the gate and the card; UserError if nobody says which captions."""
    guidance, count = float(run.recipe["show"]["guidance"]), 4
    prompts = list(what.prompts) or list(run.recipe["show"]["prompts"])
    if kind_of(model) == "none":
        if what.prompts:
            raise UserError("--prompt is given, but this model draws without; leave it out.")
        return Request(prompts=None, count=count, guidance=guidance)
    if not prompts and (labels := labels_of(model.conditioner)):
        prompts = list(labels.classes)
    if not prompts and source and source.texts:
        prompts = list(dict.fromkeys(source.texts))
    if not prompts:
        raise UserError("Which captions to draw samples of is not said; give --prompt CAPTION, or --data.")
    chosen = tuple(prompts if what.prompts else prompts[: 2 * count])
    model.read(list(chosen), 1)
    return Request(prompts=chosen, count=len(chosen), guidance=guidance)


def no_copies(images: list[Image.Image], source: Source | None, what: Publication) -> Copies | None:
    """What was found; UserError if there are copies that the person has not accepted."""
    if source is None:
        print("     copies were not looked for; give --data with the training pictures, or the card says so")
        return None
    copies = find_copies(images, source)
    if copies.count and not what.accept_copies:
        sheet = Path(f"{what.name.split('/')[1]}-copies.png")
        real = [source.picture(i, images[0].width) for i in copies.nearest]
        side_by_side(images, real).save(sheet)
        raise UserError(
            f"{copies.count} of {copies.total} drawn pictures are copies of training pictures (see {sheet}: below each "
            "its nearest one), so nothing was published; train on more pictures or for fewer steps, or give "
            "--accept-copies, which the card records."
        )
    return copies


def verdict(images: list[Image.Image], what: Publication, checker: SafetyChecker | None) -> tuple[str, str]:
    """What the card says about safety, and why it shows no samples, or ""."""
    if checker:
        flagged = [i for i, found in enumerate(checker(images)) if found.flagged]
        if flagged and not what.looked_at:
            raise UserError(
                f"The checker {checker.name} flags {len(flagged)} of {len(images)} samples, so nothing was "
                "published; look at them with --out DIR and give --looked-at if they are harmless, choose others "
                "with --prompt, or train on other pictures."
            )
        said = f"The checker `{checker.name}` flagged {len(flagged)} of {len(images)} samples"
        said += "; the author looked at all of them." if what.looked_at else "."
        return said, ""
    if what.looked_at:
        return "No checker was run. The author looked at the samples and chose to show them.", ""
    print(
        "     no checker and nobody looked at the samples, so none are published: see --checker, --looked-at"
    )
    why = "no safety checker was run and the author did not say to have looked at them"
    return f"Nothing was checked: {why}.", why


def save_samples(
    images: list[Image.Image], request: Request, release: Path, what: Publication
) -> list[tuple[str, int, str]]:
    """samples/NN.png with notes of their origin, signed or not; (prompt, seed, file) of each."""
    (release / "samples").mkdir()
    saved = []
    for i, image in enumerate(images):
        prompt, seed, file = (
            (request.prompts or [""] * len(images))[i],
            request.seed + i,
            f"samples/{i:02d}.png",
        )
        about = {"prompt": prompt, "seed": seed, "steps": request.steps, "guidance": request.guidance}
        image.save(release / file, pnginfo=provenance(model=what.name, **about))
        if what.credentials:
            what.credentials.sign(release / file)
        saved.append((prompt, seed, file))
    return saved


def parts_of(model: LatentDiffusion) -> list[tuple[str, str, str]]:
    """(folder, class, number of weights) of each network."""
    parts: dict[str, nn.Module] = {"unet": model.unet, "vae": model.autoencoder}
    names = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL"}
    for i, encoder in enumerate(text.encoders if (text := text_of(model.conditioner)) else []):
        parts[f"text_encoder{'_2' * i}"] = encoder
        names[f"text_encoder{'_2' * i}"] = type(encoder).__name__
    return [(k, names[k], f"{sum(p.numel() for p in part.parameters()):,}") for k, part in parts.items()]
