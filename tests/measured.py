"""Losses of a trained model on held-out pictures, on however many processes this is started: MODEL OUT SHARD."""

import json
import sys
from pathlib import Path

from ldm.data import DataConfig, ScenesConfig, open_source
from ldm.denoiser import Denoiser
from ldm.optim import OptimizerConfig, make_optimizer
from ldm.run_config import RunConfig
from ldm.training import Run
from ldm.validation import ValidationConfig, hold_out, losses
from pipelines import LatentDiffusion

if __name__ == "__main__":
    model, out, shard = LatentDiffusion.from_pretrained(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] == "true"
    config = RunConfig(out=out, steps=1, batch_size=4, precision="no", tracker="none", shard=shard)
    run = Run(config, {})
    data = DataConfig(size=16, scenes=ScenesConfig(count=24))
    held_out = hold_out(ValidationConfig(count=19), data, open_source(data), model, run)
    model.unet.requires_grad_(True).train()
    run.prepare(model.unet, make_optimizer(OptimizerConfig(), [model.unet]))
    assert held_out is not None
    found = losses(run, held_out, Denoiser(model.unet, model.path, model.prediction), model.conditioner, 2, 3)
    assert model.unet.training
    if run.main:
        (out / "found.json").write_text(json.dumps(found.tolist()))
    run.accelerator.end_training()
