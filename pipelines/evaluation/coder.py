"""What an autoencoder gives back of real pictures."""

from __future__ import annotations

from torch import Tensor

from autoencoder.store import weight_hash
from ldm.config import UserError
from ldm.pictures import to_images
from pipelines.evaluation.bench import SHOWN, Bench, Result
from pipelines.evaluation.fidelity import of_pictures, of_sets
from pipelines.evaluation.generation import bytes_of, images_of
from pipelines.evaluation.references import features_of, pixels_of, seen_of
from pipelines.evaluation.scores import likeness, perceptual
from pipelines.evaluation.subjects import reconstructed
from pipelines.latent_diffusion import LatentDiffusion
from pipelines.sheets import side_by_side


def of_reconstructions(bench: Bench) -> Result:
    """What an autoencoder gives back of real pictures, compared with them one by one, and as a set."""
    coder, share, state = bench.subject.model, bench.share, bench.state
    assert not isinstance(coder, LatentDiffusion)
    side = bench.what.size or coder.config.sample_size
    if bench.count > len(bench.source):
        raise UserError(
            f"--n is {bench.count:,}, but there are only {len(bench.source):,} pictures to give back."
        )
    result = Result()
    lpips, reason = perceptual(bench.what.lpips, side, state.device)
    if reason:
        result.left_out["lpips"] = reason
    names: list[str] = []

    def make(rows: range) -> list[Tensor]:
        originals = pixels_of(bench.source, [bench.indices[i] for i in rows], (side, side)).to(state.device)
        x = originals.float() / 127.5 - 1
        made = reconstructed(coder, x)
        found = likeness(made, x, lpips)
        names[:] = found
        return [bytes_of(to_images(made)), *found.values()]

    pixels, *columns = share.made(make, "giving back")
    result.figures = {name: of_pictures(share.whole(own)) for name, own in zip(names, columns, strict=True)}
    if "ssim" not in names:
        result.left_out["ssim"] = f"SSIM needs 11 pixels, and the pictures have {side}"
    looks = [
        (seen_of(pixels, one, share), features_of(bench.source, (side, side), one, state, bench.what.cache))
        for one in bench.extractors
    ]
    shown = range(min(SHOWN, bench.count))
    back = images_of(share.whole(pixels, shown))
    originals = [bench.source.picture(bench.indices[i], side) for i in shown]
    result.pictures["reconstructions"] = side_by_side(originals, back, labels=("original", "given back"))
    stamp = lpips and {
        "network": bench.what.lpips.network,
        "weights_sha256": weight_hash(lpips.network.state_dict()),
    }
    latent = "nearest codes" if bench.subject.about["kind"] == "VQModel" else "mean of the posterior"
    result.protocol = bench.protocol("reconstructed", (side, side), lpips=stamp, latent=latent)
    if state.is_main_process:
        for extractor, (made, real) in zip(bench.extractors, looks, strict=True):
            found = of_sets(made, real.rows(bench.indices), paired=True)
            name = "rfid" if extractor.name == "inception" else "rfd"
            result.figures[bench.named(name, extractor)] = found["frechet"]
            result.figures[bench.named("rkid", extractor)] = found["kid"]
    return result
