"""Stage 1: train an autoencoder that turns pictures into latents and back.

    python train_vae.py --config configs/scenes/vae.yaml [--data.path FOLDER] [--run.out DIR] [--run.steps N]
        [--dry-run]

Run the same command again to go on with a run that was stopped. The result lies in OUT/model: a stock
`AutoencoderKL` folder whose latents have mean 0 and standard deviation 1 per channel, or a stock `VQModel` folder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from autoencoder.adversarial import Adversary
from autoencoder.discriminator import Discriminator
from autoencoder.equivariance import draw
from autoencoder.files import written_beside
from autoencoder.latents import LatentStatistics, fold
from autoencoder.losses import Objective
from autoencoder.metrics import likeness
from autoencoder.perceptual import Perceptual
from autoencoder.presets import KINDS
from autoencoder.store import load_config
from autoencoder.vq import CodeUse, Quantized, VQModel, codebook_usage, count_codes
from ldm import random
from ldm.checkpoint import writing
from ldm.config import DRY_RUN, UserError, command, load, without
from ldm.contract import Contract
from ldm.data import Source, open_source, shown_source
from ldm.dry_run import rehearse
from ldm.ema import EMA
from ldm.estimate import undertake
from ldm.faults import explain
from ldm.inspection import inspected
from ldm.optim import as_judged, make_optimizer
from ldm.pictures import to_images, to_tensor
from ldm.sampling import Pixels, epochs
from ldm.training import Run
from pipelines.doctor.readiness import Budget, report
from pipelines.sheets import side_by_side
from pipelines.stages.stage_one import autoencoder_folder
from pipelines.stages.vae_recipe import NETWORKS, Recipe, hurried

LATENT_KEYS = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")


@command("train_vae.py", explain)
def main(argv: Sequence[str]) -> None:
    argv, dry = without(DRY_RUN, argv)
    recipe = settled(load(Recipe, argv, prog="train_vae.py"))
    if dry:
        rehearse(recipe, rehearsed)
    else:
        undertake(recipe, train, rehearsed)


def rehearsed(recipe: Recipe, run: Run) -> None:
    """`train`, as a dry run does it."""
    train(hurried(recipe), run)


def train(recipe: Recipe, run: Run) -> None:
    """From the data to OUT/model, from wherever `run` stands."""
    if run.finished():
        return
    lpips = new_lpips(run, recipe)  # whose weights may be missing: before all pictures are looked at
    source = open_source(recipe.data)
    run.say(source.describe())
    source = inspected(source, run)
    contract = Contract({"set of pictures": source.fingerprint})
    contract.keep(run)
    originals, split = pixels_to_show(recipe, run, source)

    run.seed("autoencoder")
    network = run.place(new_autoencoder(run, recipe))
    ema = EMA(recipe.ema_decay, autoencoder=network)
    autoencoder, optimizer = run.prepare(network, make_optimizer(recipe.optimizer, [network]))
    adversary = new_adversary(run, recipe)
    objective = Objective(recipe.loss, lpips, adversary, network.decoder.conv_out.weight)
    codes = new_code_use(run, recipe) if recipe.kind == "vq" else None
    parts = (adversary.parts() if adversary else {}) | ({"codes": codes} if codes else {})
    averaged = ema["autoencoder"]
    run.resume(averaged, contract=contract, autoencoder=autoencoder, ema=ema, optimizer=optimizer, **parts)

    networks = {"EMA": averaged, "raw": network}
    if run.fresh:  # what would fail at hour nine fails now
        show(run, networks, originals, lpips, adversary)
        run.save()

    trained = [autoencoder, adversary.wrapped] if adversary else [autoencoder]
    pictures = Pixels(source, recipe.data, recipe.run.seed)
    for batch in run.batches(pictures, epochs(source, recipe.data, recipe.run.batch_size), recipe.workers):
        with run.accelerator.accumulate(*trained):
            step = run.step
            pixels, made, latent = reconstructed(run, recipe, autoencoder, batch)
            loss, terms = objective(pixels, made, latent, step)
            run.update(loss, optimizer, recipe.optimizer)
            run.note(**terms)
            if adversary and adversary.learns(step):
                loss, figures = adversary.discriminator_loss(pixels, made, step)
                run.update(loss, adversary.optimizer, recipe.gan_optimizer, "discriminator")
                run.note(**figures)
            if codes:
                codes.count(latent.indices)
        if run.accelerator.sync_gradients:
            with as_judged(optimizer):
                ema.update(run.step, autoencoder=network)
            if codes:
                revive(run, recipe, codes, latent, [network, averaged])
        if run.due(recipe.show.every):
            show(run, networks, originals, lpips, adversary)
        if run.due(recipe.run.log_every):
            if adversary and (warning := adversary.verdict(run.step)):
                run.say(warning)
            run.log()
        if run.due(recipe.run.save_every):
            run.save()
    final = finish(run, averaged, source, recipe)
    made, _ = reconstruct(final, originals)
    conclude(run, likeness(made, originals, lpips), f"{len(originals)} pictures of split {split}", split)
    look_back(run, recipe, final, originals, made)


def conclude(run: Run, quality: dict[str, float], shown: str, split: str) -> None:
    """Say and keep what came of it."""
    told = ", ".join(f"{name} {value:.4g}" for name, value in quality.items())
    run.tell(f"{told} on {shown}; the model is in {run.out}/model")
    run.end(**{name: round(value, 4) for name, value in quality.items()}, psnr_split=split)


def settled(recipe: Recipe) -> Recipe:
    """With the shape of the autoencoder to start from, if there is one."""
    if recipe.start is None:
        return recipe
    folder = autoencoder_folder(recipe.start)
    stock: Any = load_config(folder, KINDS[recipe.kind], NETWORKS[recipe.kind].__name__)
    return replace(recipe, network=recipe.network.filled(recipe.kind, recipe.data.size, stock))


def new_autoencoder(run: Run, recipe: Recipe) -> Any:
    """An autoencoder of the recipe's shape, with the weights to start from or random ones."""
    config = recipe.network.config(recipe.kind)
    if recipe.start is None:
        network = NETWORKS[recipe.kind](config)
    else:
        network = NETWORKS[recipe.kind].from_pretrained(autoencoder_folder(recipe.start)).train()
        applied = {k: getattr(network.config, k, None) for k in LATENT_KEYS}
        told = ", ".join(f"{key} {value}" for key, value in applied.items() if value not in (None, 0.0, 1.0))
        lost = f"; what it said of its latents no longer applies: {told}" if told else ""
        run.say(f"going on from {recipe.start}{lost}")
        network.config = config
    weights = sum(p.numel() for p in network.parameters())
    run.say(f"autoencoder of kind {recipe.kind}: {weights:,} weights, factor {config.factor}")
    return network


def new_lpips(run: Run, recipe: Recipe) -> Perceptual | None:
    """The perceptual distance, if the recipe wants it."""
    return Perceptual(recipe.loss.lpips, run.device) if recipe.loss.lpips.weight else None


def new_adversary(run: Run, recipe: Recipe) -> Adversary | None:
    """The discriminator, wrapped, with its optimizer, if the recipe wants it."""
    if not recipe.loss.gan.weight:
        return None
    if run.accelerator.scaler and recipe.run.accumulate > 1:
        raise UserError(
            "Gradients of two networks that are added up over run.accumulate batches can't share the scale that fp16 "
            "needs; set run.accumulate to 1, run.precision to bf16 or no, or loss.gan.weight to 0."
        )
    gan = recipe.loss.gan
    network = run.place(Discriminator(gan.channels, gan.layers))
    weights = sum(p.numel() for p in network.parameters())
    run.say(f"discriminator: {weights:,} weights, learns from step {gan.start - gan.head_start}")
    wrapped, optimizer = run.prepare(network, make_optimizer(recipe.gan_optimizer, [network]))
    return Adversary(gan, wrapped, optimizer, network, lambda x: run.accelerator.reduce(x, "mean"))


def new_code_use(run: Run, recipe: Recipe) -> CodeUse | None:
    """Counts of codes, if unused ones are to be revived."""
    if not recipe.loss.codebook.revive_every:
        return None
    assert recipe.network.num_vq_embeddings is not None  # filled in
    return CodeUse(recipe.network.num_vq_embeddings, run.device, lambda x: run.accelerator.reduce(x, "sum"))


def reconstructed(
    run: Run, recipe: Recipe, autoencoder: Any, batch: dict[str, Tensor]
) -> tuple[Tensor, Tensor, Any]:
    """Originals, what the autoencoder makes of them, and the latents between; all shrunk and turned in some steps."""
    pixels = batch["pixels"].contiguous(memory_format=torch.channels_last)
    if recipe.kind == "vq":
        return pixels, *autoencoder(pixels)
    assert recipe.network.factor and recipe.network.latent_channels  # filled in
    height, width = (side // recipe.network.factor for side in pixels.shape[2:])
    noise = run.normal("posterior", batch, (recipe.network.latent_channels, height, width))
    uniforms = random.stream(recipe.run.seed, "equivariance", run.step).random(
        3
    )  # of the step, not the sample
    turned = draw(recipe.equivariance, uniforms.tolist())
    made, posterior = autoencoder(pixels, noise, turned)
    return pixels if turned is None else turned(pixels, recipe.network.factor), made, posterior


def revive(run: Run, recipe: Recipe, codes: CodeUse, latent: Quantized, networks: Sequence[VQModel]) -> None:
    """Every so often, note how much of the codebook is in use, and start unused codes again."""
    every = recipe.loss.codebook.revive_every
    if run.step % every or run.step == recipe.run.steps:
        return
    usage = codebook_usage(codes.counts)
    latents = run.accelerator.gather(latent.unquantized)
    drawn = random.stream(recipe.run.seed, "revival", run.step)
    revived = codes.revive([network.quantize.embedding for network in networks], latents, drawn)
    run.note(codebook_usage=usage.fraction, perplexity=usage.perplexity, revived=revived)


def pixels_to_show(recipe: Recipe, run: Run, trained: Source) -> tuple[Tensor, str]:
    """[N,3,S,S] pictures that reconstructions are judged on, and the split that they are from."""
    source, split = shown_source(recipe.data, recipe.show.split)
    source = trained if split == recipe.data.split else inspected(source, run, split)
    count = min(recipe.show.count, len(source))
    chosen = [i * len(source) // count for i in range(count)]
    originals = torch.stack([to_tensor(source.picture(i, recipe.data.size)) for i in chosen])
    return originals.to(run.device), split


@torch.no_grad()
def reconstruct(autoencoder: Any, originals: Tensor) -> tuple[Tensor, dict[str, float]]:
    """[N,3,S,S] => the same, through the posterior's mean, clipped to [-1, 1]; and figures of the latents."""
    pairs = [autoencoder(x.contiguous(memory_format=torch.channels_last)) for x in originals.split(16)]
    made = torch.cat([made for made, _ in pairs]).float().clamp(-1, 1)
    if isinstance(pairs[0][1], Quantized):
        codes = autoencoder.quantize.embedding.num_embeddings
        usage = codebook_usage(count_codes(torch.cat([latent.indices for _, latent in pairs]), codes))
        return made, {"codebook_usage": usage.fraction, "perplexity": usage.perplexity}
    kl = torch.cat([latent.kl() for _, latent in pairs]) / originals[0].numel()
    return made, {"kl": kl.mean().item()}


def show(
    run: Run,
    networks: dict[str, nn.Module],
    originals: Tensor,
    lpips: Perceptual | None,
    adversary: Adversary | None,
) -> None:
    """Note figures of the first of `networks`, and save originals above the reconstructions of each."""
    if not run.main:
        return
    made, figures = zip(*[reconstruct(network, originals) for network in networks.values()], strict=True)
    alike = likeness(made[0], originals, lpips)
    run.remark(psnr_db=alike.pop("psnr_db"))
    logits = adversary.logits(originals, made[0]) if adversary and adversary.learns(run.step - 1) else {}
    run.remark(**{f"held_out_{name}": value for name, value in (alike | figures[0] | logits).items()})
    rows = [to_images(pixels[:32]) for pixels in (originals, *made)]
    run.picture(side_by_side(*rows, labels=["original", *networks]), "reconstructions")


@torch.no_grad()
def finish(run: Run, autoencoder: Any, source: Source, recipe: Recipe) -> Any:
    """Write OUT/model, and return what lies there.

    The statistics of the latents of the whole training set are folded into an AutoencoderKL.
    """
    if recipe.kind == "kl":
        statistics = LatentStatistics(autoencoder.config.latent_channels)
        with torch.no_grad():
            for pixels in run.shares(source, "latent statistics"):
                statistics.update(autoencoder.encode(pixels))
        if run.accelerator.num_processes > 1:
            statistics.sums = run.accelerator.reduce(statistics.sums.to(run.device)).cpu()
        autoencoder = fold(autoencoder, statistics)
    if run.main:
        with writing(run.out / "model"), written_beside(run.out / "model") as fresh:
            autoencoder.save_pretrained(fresh)
    return autoencoder


def look_back(run: Run, recipe: Recipe, autoencoder: Any, originals: Tensor, made: Tensor) -> None:
    """Write OUT/reconstructions.png and, of kind kl, the report on the latents."""
    if not run.main:
        return
    sheet = side_by_side(to_images(originals[:32]), to_images(made[:32]), labels=["original", "made"])
    with writing(run.out / "reconstructions.png"):
        sheet.save(run.out / "reconstructions.png")
    if recipe.kind == "kl" and recipe.readiness.pictures:
        budget = Budget(pictures=recipe.readiness.pictures, probe_steps=recipe.readiness.probe_steps)
        try:
            (found,) = report({run.out.name: autoencoder}, recipe.data, run.out / "readiness.html", budget)
        except (UserError, ValueError, OSError) as problem:  # the model is trained and saved all the same
            run.say(f"there is no report on the latents: {problem}")
        else:
            run.tell(f"{found.sentence} Why: {run.out}/readiness.html")


if __name__ == "__main__":
    main()
