"""`ldm publish`: a finished run becomes a public model.

Everything is made and proven on this machine first; only then is it uploaded, in one commit, and read back.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from PIL import Image
from torch import nn

from autoencoder.files import written_beside
from autoencoder.store import weight_hash
from ldm.conditioning import text_of
from ldm.config import UserError
from ldm.tasks import Segment
from pipelines.diffusers_format import OURS
from pipelines.evaluation.memorisation import Copies, find_copies
from pipelines.latent_diffusion import LatentDiffusion
from pipelines.publishing.card import Facts, model_card
from pipelines.publishing.card_figures import figures_of
from pipelines.publishing.gate import Built, prove, require_diffusers, require_half, scan_half
from pipelines.publishing.licenses import license_text
from pipelines.publishing.publication import Candidate, Publication
from pipelines.publishing.release import ALLOWED, listed, search_secrets, write_release
from pipelines.publishing.samples import Request, request_for, save_samples
from pipelines.publishing.upload import MANIFEST, HubSession, token_of_person, upload
from pipelines.safety import ClipSafetyChecker, SafetyChecker, provenance
from pipelines.sheets import contact_sheet, side_by_side

SHIPPED = Path(__file__).parent / "shipped" / "pipeline.py"


def publish(what: Publication) -> str:
    """Build, prove, and unless it is a dry run upload; the address of the commit, or "".

    Raises:
        UserError: something is missing or not as it should be; nothing has left the machine then, unless the
            message says otherwise.
    """
    token = "" if what.dry_run else token_of_person()
    terms, checker = checked(what)
    candidate = Candidate.of(what)
    metrics = figures_of(candidate)
    request = request_for(candidate)
    with tempfile.TemporaryDirectory(prefix="ldm-publish-") as scratch:
        print("1/5  building: the averaged (EMA) weights, anew, and nothing else of the run", flush=True)
        built = build(candidate, Path(scratch))
        scan, images = scan_half(candidate.model, partial(request.drawn_by, progress=True))
        if what.out:
            save_sheet(images, request, Path(f"{what.out}-samples.png"))
        if what.half:
            require_half(scan)
        print("2/5  drawing with stock diffusers in a process of its own", flush=True)
        proof = prove(built, request, images, scan)
        print("3/5  looking for copies of training pictures, and at the samples", flush=True)
        copies = no_copies(candidate, images)
        safety, no_samples = verdict([*images, *(one.picture for one in request.given)], what, checker)
        facts = Facts(
            candidate=candidate,
            pipeline=built.pipeline,
            parts=parts_of(candidate.model),
            autoencoder=weight_hash(candidate.model.autoencoder.state_dict()),
            metrics=metrics,
            proof=proof,
            copies=copies,
            samples=[] if no_samples else save_samples(images, request, built.folder, what),
            no_samples=no_samples,
            safety=safety,
        )
        (built.folder / "README.md").write_text(model_card(facts), encoding="utf-8")
        (built.folder / "LICENSE").write_text(terms, encoding="utf-8")
        return send(what, built.folder, token)


def checked(what: Publication) -> tuple[str, SafetyChecker | None]:
    """The licence's text, and who looks at the samples.

    Raises:
        UserError: for what would else fail, or be found useless, after all has been drawn.
    """
    require_diffusers()
    if what.out:
        require_release(what.out)
    if what.credentials and not (what.checker or what.looked_at):
        raise UserError(
            "--credentials sign samples, of which none are published without --checker or --looked-at."
        )
    checker = ClipSafetyChecker.from_pretrained(what.checker) if what.checker else None
    return license_text(what.license, what.license_file, what.name.split("/")[0]), checker


def build(candidate: Candidate, scratch: Path) -> Built:
    """Write all that is published but the card, the licence and the samples to a folder in `scratch`."""
    stock, release, half = scratch / "stock", scratch / "release", candidate.what.half
    candidate.model.save_pretrained(stock)
    pipeline = json.loads((stock / "model_index.json").read_text())["_class_name"]
    left = write_release(stock, release, half=half, shard=candidate.what.shard)
    if left:
        print(f"     left out, as no reader needs them: {', '.join(left)}")
    if pipeline == OURS:
        shutil.copyfile(SHIPPED, release / "pipeline.py")
    return Built(folder=release, pipeline=pipeline, half=half)


def save_sheet(images: Sequence[Image.Image], request: Request, file: Path) -> None:
    """The samples, to look at, below each what it was made of or told."""
    if request.given:
        sheet = side_by_side([one.picture for one in request.given], images, labels=("given", "made"))
    else:
        told = [request.told(i) for i in range(request.count)]
        sheet = contact_sheet(images, told if any(told) else None)
    file.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(file, pnginfo=provenance())
    print(f"     the samples, to look at: {file}")


def send(what: Publication, release: Path, token: str) -> str:
    """Search what is to be sent for secrets, list it, leave it in --out, and upload it unless this is a dry run."""
    print("4/5  searching every file for keys, tokens and paths of this machine", flush=True)
    files = listed(release)
    home = {str(Path.home()): "the path of your home folder"} if len(str(Path.home())) > 1 else {}
    search_secrets(release, home | ({token: "your token for the hub"} if token else {}))
    for name, about in files.items():
        print(f"     {about['size']:>14,}  {name}")
    if what.out:
        with written_beside(what.out.resolve()) as fresh:
            shutil.copytree(release, fresh, dirs_exist_ok=True)
    if what.dry_run:
        where = f"; it lies in {what.out}" if what.out else ""
        print(f"5/5  a dry run: these files would go to {what.name}, and nothing else{where}")
        return ""
    hub = HubSession(what.name, token)
    print(f"5/5  uploading to {hub.api.endpoint}, in one commit", flush=True)
    address = upload(release, files, hub, private=what.private)
    print(f"published and read back: {address}")
    return address


def require_release(out: Path) -> None:
    """UserError unless a folder is new, empty, or holds an earlier release, which will be replaced."""
    if out.exists() and any(out.iterdir()):
        files = [path.relative_to(out).as_posix() for path in out.rglob("*") if not path.is_dir()]
        if MANIFEST not in files or not all(map(ALLOWED.fullmatch, files)):
            raise UserError(f"{out} holds something else than a release; give an empty folder with --out.")


def no_copies(candidate: Candidate, images: Sequence[Image.Image]) -> Copies | None:
    """What was found, None if nobody looked; UserError if there are copies that the person has not accepted."""
    what, source = candidate.what, candidate.source
    if isinstance(candidate.model.task, Segment):
        return None  # masks are no pictures
    if source is None:
        print(
            f"     copies were not looked for: {candidate.run.data.where} is not at hand; give --data with the "
            "training pictures, or the card says so"
        )
        return None
    copies = find_copies(images, source)
    print(f"     {len(copies.which)} of {copies.total} are copies of one of {copies.compared:,}")
    if copies.which and not what.accept_copies:
        sheet = Path(f"{what.name.split('/')[1]}-copies.png")
        drawn = [images[i] for i in copies.which]
        real = [source.picture(copies.nearest[i], images[0].width) for i in copies.which]
        side_by_side(drawn, real, labels=("drawn", "trained on")).save(sheet, pnginfo=provenance())
        raise UserError(
            f"{len(copies.which)} of {copies.total} drawn pictures are copies of training pictures (see {sheet}), so "
            "nothing was published; train on more pictures or for fewer steps, or give --accept-copies, which the card "
            "records."
        )
    return copies


def verdict(
    images: Sequence[Image.Image], what: Publication, checker: SafetyChecker | None
) -> tuple[str, str]:
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


def parts_of(model: LatentDiffusion) -> list[tuple[str, str, str]]:
    """(folder, class, number of weights) of each network."""
    parts: dict[str, nn.Module] = {"unet": model.unet, "vae": model.autoencoder}
    names = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL"}
    for i, encoder in enumerate(text.encoders if (text := text_of(model.conditioner)) else []):
        parts[f"text_encoder{'_2' * i}"] = encoder
        names[f"text_encoder{'_2' * i}"] = type(encoder).__name__
    return [(k, names[k], f"{sum(p.numel() for p in part.parameters()):,}") for k, part in parts.items()]
