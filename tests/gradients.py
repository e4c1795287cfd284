"""train_vae.py, which writes the gradients of its first step beside the run: started by tests on several processes."""

import os
import sys
from pathlib import Path

from accelerate import Accelerator
from safetensors.torch import save_file

import train_vae

out = Path(sys.argv[1])
clip = Accelerator.clip_grad_norm_
seen = []


def clip_grad_norm_(accelerator, parameters, *rest):
    if len(seen) < 2 and accelerator.is_main_process:
        gradients = {f"{len(seen)}.{i}": p.grad.contiguous() for i, p in enumerate(parameters)}
        save_file(gradients, out / f"gradients-{os.environ.get('WORLD_SIZE', 1)}-{len(seen)}.safetensors")
    seen.append(len(parameters))
    return clip(accelerator, parameters, *rest)


Accelerator.clip_grad_norm_ = clip_grad_norm_
train_vae.main(sys.argv[2:])
