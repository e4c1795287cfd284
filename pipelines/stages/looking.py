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
        if run.due(self.showing.every):
            show(run, self._averaged(), self.showing, self.shown)
        if self.held_out and run.due(self.validation.every):
            model, guidance, trained = self._averaged(), self.showing.guidance, self.trained
            validate(run, self.validation, guidance, model, self.held_out, self.denoiser, trained)

    def _averaged(self) -> LatentDiffusion:
        """The model with the averages of now. What is packed of it goes with it: by the next look they are others."""
        self.ema.gather()
        return replace(self.model)
