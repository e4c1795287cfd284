"""Draws with a latent diffusion model of classes or of nothing, or makes pictures from pictures if trained for it.

Needs diffusers and torch, nothing else. All parts are stock ones; what is here is only the loop that no stock pipeline
has for them. Licence: Apache-2.0.

    from diffusers import DiffusionPipeline
    model = DiffusionPipeline.from_pretrained(NAME, custom_pipeline=NAME, trust_remote_code=True)
    model("name of a class", num_inference_steps=30, guidance_scale=4.0).images[0]
    model(image=small, num_inference_steps=30).images[0]  # where config.task is upscale, restore or segment
    model(image=picture, mask_image=hole, num_inference_steps=30).images[0]  # where it is inpaint
"""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
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

    `id2label` names the classes; without it the model draws without being told anything. `task` says what it was
    trained to make of pictures: inpaint, upscale by a `factor`, restore, or segment, which makes pictures in the
    `colors` of the `classes`. What it is given of a picture joins the channels of the latents.
    """

    model_cpu_offload_seq = "unet->vae"

    def __init__(
        self,
        unet: UNet2DConditionModel,
        vae: AutoencoderKL,
        scheduler: SchedulerMixin,
        id2label: dict[str, str] | None = None,
        task: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(unet=unet, vae=vae, scheduler=scheduler)
        self.register_to_config(id2label=id2label, task=task)
        self.task = task or {"kind": None}
        self.grows = self.task["factor"] if self.task["kind"] == "upscale" else 1
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

    def pixels(self, image: Any, mode: str, multiple: int = 1) -> torch.Tensor:
        """A PIL image as [1,C,H,W] in [0, 1], edge pixels repeated until `multiple` divides the sides."""
        values = torch.from_numpy(np.array(image.convert(mode), dtype=np.float32) / 255)
        values = values.permute(2, 0, 1)[None] if mode == "RGB" else values[None, None]
        right, below = (-side % multiple for side in (values.shape[3], values.shape[2]))
        return F.pad(values, (0, right, 0, below), mode="replicate").to(
            self._execution_device, self.unet.dtype
        )

    def given(self, image: Any, mask_image: Any, generator: Any, count: int) -> torch.Tensor:
        """What the network is given of a picture, [count,C',h,w]."""
        picture = self.pixels(image, "RGB", max(1, self.factor // self.grows)) * 2 - 1
        if self.task["kind"] == "inpaint":
            hole = (self.pixels(mask_image, "L", self.factor) >= 0.5).to(picture)
            known = (picture * (1 - hole)).expand(count, -1, -1, -1)
            config = self.vae.config
            latents = self.vae.encode(known).latent_dist.sample(generator)
            latents = (latents - (config.shift_factor or 0.0)) * config.scaling_factor
            hole = F.interpolate(hole, size=latents.shape[2:]).expand(count, -1, -1, -1)
            return torch.cat([hole, latents], dim=1)
        if self.factor >= self.grows:  # pixels that share a place become channels
            folded = F.pixel_unshuffle(picture, self.factor // self.grows)
        else:
            folded = F.interpolate(picture, scale_factor=self.grows // self.factor)
        if self.task["kind"] == "upscale":  # a plane says how much noise was added to the small picture: none
            folded = torch.cat([folded, torch.zeros_like(folded[:, :1])], dim=1)
        return folded.expand(count, -1, -1, -1)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | int | list[str | int] | None = None,
        *,
        image: Any = None,
        mask_image: Any = None,
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
            image: a PIL image, if the model's task begins with one, of any size.
            mask_image: of its size; white is the hole that is filled, black is kept.
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
        if (image is None) != (self.task["kind"] is None) or (mask_image is None) != (
            self.task["kind"] != "inpaint"
        ):
            raise ValueError(
                f"The task of this model is {self.task['kind']}: give image and mask_image as it asks."
            )
        if guided:
            labels = torch.cat([torch.full_like(labels, len(self.labels)), labels])

        self.scheduler.set_timesteps(num_inference_steps, device=device)
        side = self.unet.config.sample_size
        sides = [side, side] if isinstance(side, int) else list(side)
        if image is not None:
            height, width = image.height * self.grows, image.width * self.grows
        sides = [
            -(-asked // self.factor) if asked else usual
            for asked, usual in zip((height, width), sides, strict=True)
        ]
        shape = (count, self.vae.config.latent_channels, *sides)
        latents = randn_tensor(shape, generator=generator, device=device, dtype=self.unet.dtype)
        latents = latents * self.scheduler.init_noise_sigma
        given = [] if image is None else [self.given(image, mask_image, generator, count)]
        takes = inspect.signature(self.scheduler.step).parameters
        more = {"generator": generator} if "generator" in takes else {}
        for t in self.progress_bar(self.scheduler.timesteps):
            noisy = self.scheduler.scale_model_input(torch.cat([latents] * 2) if guided else latents, t)
            noisy = torch.cat([noisy, *(torch.cat([part] * 2) if guided else part for part in given)], dim=1)
            output = self.unet(noisy, t, encoder_hidden_states=None, class_labels=labels).sample
            if guided:
                away, to = output.chunk(2)
                output = away + guidance_scale * (to - away)
            latents = self.scheduler.step(output, t, latents, **more).prev_sample

        config = self.vae.config
        latents = latents / config.scaling_factor + (config.shift_factor or 0.0)
        pixels = self.vae.decode(latents).sample
        if image is not None:
            pixels = pixels[:, :, :height, :width]
        if mask_image is not None:  # what is known comes back as it was
            hole = (self.pixels(mask_image, "L") >= 0.5).to(pixels)
            pixels = pixels * hole + (self.pixels(image, "RGB") * 2 - 1) * (1 - hole)
        images = self.image_processor.postprocess(pixels, output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)
