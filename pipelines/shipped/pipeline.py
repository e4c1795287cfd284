"""Draws with a latent diffusion model of classes, or of nothing. Needs diffusers and torch, nothing else.

All parts are stock ones; what is here is only the loop that no stock pipeline has for them. Licence: Apache-2.0.

    from diffusers import DiffusionPipeline
    model = DiffusionPipeline.from_pretrained(NAME, custom_pipeline=NAME, trust_remote_code=True)
    model("name of a class", num_inference_steps=30, guidance_scale=4.0).images[0]
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    ImagePipelineOutput,
    SchedulerMixin,
    UNet2DConditionModel,
)
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor


class LatentDiffusionPipeline(DiffusionPipeline):
    """A U-Net told a class label, or nothing, that diffuses in the latents of an autoencoder.

    `id2label` names the classes; without it the model draws without being told anything.
    """

    model_cpu_offload_seq = "unet->vae"

    def __init__(
        self,
        unet: UNet2DConditionModel,
        vae: AutoencoderKL,
        scheduler: SchedulerMixin,
        id2label: dict[str, str] | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(unet=unet, vae=vae, scheduler=scheduler)
        self.register_to_config(id2label=id2label)
        self.labels = {name: int(number) for number, name in (id2label or {}).items()}
        self.factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.factor)

    def numbers(self, prompt: str | int | list[str | int] | None) -> list[int]:
        """Names or numbers of classes => numbers; ValueError for one that the model does not know."""
        if not self.labels:
            if prompt is not None:
                raise ValueError("This model draws without being told anything: leave the prompt out.")
            return []
        asked = [] if prompt is None else prompt if isinstance(prompt, list) else [prompt]
        numbers = [self.labels.get(name, -1) if isinstance(name, str) else int(name) for name in asked]
        if not numbers or any(not 0 <= number < len(self.labels) for number in numbers):
            raise ValueError(f"prompt is {prompt!r}, but must name classes: {', '.join(self.labels)}")
        return numbers

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | int | list[str | int] | None = None,
        *,
        num_images_per_prompt: int = 1,
        num_inference_steps: int = 30,
        guidance_scale: float = 4.0,
        height: int | None = None,
        width: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> Any:
        """Draw a picture, or several, for each class.

        Args:
            prompt: names or numbers of classes; None for a model that is told nothing.
            guidance_scale: of classifier-free guidance; 1 is none. Without effect if the model is told nothing.
            height, width: in pixels; by default those of training.
            generator: one for all pictures, or a list with one for each.
        """
        device = self._execution_device
        numbers = [number for number in self.numbers(prompt) for _ in range(num_images_per_prompt)]
        several = len(generator) if isinstance(generator, list) else 1
        count = len(numbers) or max(num_images_per_prompt, several)
        labels = torch.tensor(numbers, device=device) if numbers else None
        guided = labels is not None and guidance_scale != 1
        if guided:
            labels = torch.cat([torch.full_like(labels, len(self.labels)), labels])

        self.scheduler.set_timesteps(num_inference_steps, device=device)
        side = self.unet.config.sample_size
        sides = [side, side] if isinstance(side, int) else list(side)
        sides = [
            given // self.factor if given else usual
            for given, usual in zip((height, width), sides, strict=True)
        ]
        shape = (count, self.unet.config.in_channels, *sides)
        latents = randn_tensor(shape, generator=generator, device=device, dtype=self.unet.dtype)
        latents = latents * self.scheduler.init_noise_sigma
        takes = inspect.signature(self.scheduler.step).parameters
        more = {"generator": generator} if "generator" in takes else {}
        for t in self.progress_bar(self.scheduler.timesteps):
            noisy = self.scheduler.scale_model_input(torch.cat([latents] * 2) if guided else latents, t)
            output = self.unet(noisy, t, encoder_hidden_states=None, class_labels=labels).sample
            if guided:
                away, to = output.chunk(2)
                output = away + guidance_scale * (to - away)
            latents = self.scheduler.step(output, t, latents, **more).prev_sample

        config = self.vae.config
        latents = latents / config.scaling_factor + (config.shift_factor or 0.0)
        pixels = self.vae.decode(latents).sample
        images = self.image_processor.postprocess(pixels, output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)
