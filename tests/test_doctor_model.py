"""`ldm doctor model` tells what a model is, and finds the one that is not sound."""

from pathlib import Path

import pytest
import torch

from ldm.config import UserError
from pipelines import LatentDiffusion
from pipelines.doctor.model import described, doctor_model


def test_a_sound_model_is_described(chain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    doctor_model(str(chain / "ldm"))
    said = capsys.readouterr().out
    about = described(LatentDiffusion.from_pretrained(chain / "ldm"))
    assert all(value in said for value in about.values())
    assert "in stock diffusers DPMSolverMultistepScheduler" in said and "float16:        safe" in said


def test_weights_that_overflow_are_found(chain: Path, tmp_path: Path) -> None:
    model = LatentDiffusion.from_pretrained(chain / "ldm")
    with torch.no_grad():
        model.unet.mid_block.resnets[0].conv1.bias[0] = 3e38
        model.unet.mid_block.resnets[0].conv1.weight.mul_(1e38)
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match="is not sound: what comes out of unet"):
        doctor_model(str(tmp_path / "model"))
