"""What is looked at every so often while stage 2 trains."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ldm.denoiser import Denoiser
from ldm.ema import EMA
from ldm.training import Run
from ldm.validation import HeldOut, ValidationConfig
from pipelines.latent_diffusion import LatentDiffusion
from pipelines.stages.showing import ShowConfig, Shown, show
from pipelines.stages.validating import validate


@dataclass(frozen=True)
class Look:
    """Pictures to see, and figures of held-out pictures: where they are due, before the first step too."""

    showing: ShowConfig
    validation: ValidationConfig
    model: LatentDiffusion
    shown: Shown
    held_out: HeldOut | None
    denoiser: Denoiser
    ema: EMA
    trained: Mapping[str, Any]

    def __call__(self, run: Run) -> None:
        model = replace(self.model)  # what is packed goes with it: by the next look weights are others
        if run.due(self.showing.every):
            self.ema.gather()
            show(run, model, self.showing, self.shown)
        if self.held_out and run.due(self.validation.every):
            self.ema.gather()
            guidance, trained = self.showing.guidance, self.trained
            validate(run, self.validation, guidance, model, self.held_out, self.denoiser, trained)
