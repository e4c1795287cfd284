"""Draws with a latent diffusion model that no stock pipeline draws with: told classes, or classes and captions, or
nothing, or trained to make pictures from pictures.

Needs diffusers and torch, and transformers for captions, nothing else. All parts are stock ones; what is here is only
the loop that no stock pipeline has for them. Licence: Apache-2.0.

    from diffusers import DiffusionPipeline
    model = DiffusionPipeline.from_pretrained(NAME, custom_pipeline=NAME, trust_remote_code=True)
    model("name of a class", num_inference_steps=30, guidance_scale=4.0).images[0]
    model("a caption", class_labels="name of a class").images[0]  # where it is told both
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

Told = dict[str, torch.Tensor]  # tokens [N,L,D], pooled [N,P], label [N]: those that the U-Net reads
Names = str | int | list[str | int] | None


class LatentDiffusionPipeline(DiffusionPipeline):
    """A U-Net told captions, classes, both or nothing, that diffuses in the latents of an autoencoder.

    `id2label` names the classes. `task` says what it was trained to make of pictures: inpaint, upscale by a `factor`,
    restore, or segment, which makes pictures in the `colors` of the `classes`. What it is given of a picture joins the
    channels of the latents. Two text encoders, or one with a projection, are read as `StableDiffusionXLPipeline` does;
    `force_zeros_for_empty_prompt` is of that, too.
    """

    model_cpu_offload_seq = "text_encoder->text_encoder_2->unet->vae"
    _optional_components = ["text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"]  # noqa: RUF012

    def __init__(
        self,
        unet: UNet2DConditionModel,
        vae: AutoencoderKL,
        scheduler: SchedulerMixin,
        text_encoder: Any = None,
        tokenizer: Any = None,
        text_encoder_2: Any = None,
        tokenizer_2: Any = None,
        id2label: dict[str, str] | None = None,
        task: dict[str, Any] | None = None,
        force_zeros_for_empty_prompt: bool = False,
    ) -> None:
        super().__init__()
        self.register_modules(unet=unet, vae=vae, scheduler=scheduler)
        self.register_modules(text_encoder=text_encoder, tokenizer=tokenizer)
        self.register_modules(text_encoder_2=text_encoder_2, tokenizer_2=tokenizer_2)
        self.register_to_config(
            id2label=id2label, task=task, force_zeros_for_empty_prompt=force_zeros_for_empty_prompt
        )
        self.task = task or {"kind": None}
        self.grows = self.task["factor"] if self.task["kind"] == "upscale" else 1
        self.labels = {name: int(number) for number, name in (id2label or {}).items()}
        self.factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.factor)

    @torch.no_grad()
    def __call__(
        self,
        prompt: Names = None,
        *,
        class_labels: Names = None,
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
        """Draw a picture, or several, for each prompt.

        Args:
            prompt: captions; for a model without, names or numbers of classes; None if it is told nothing.
            class_labels: names or numbers of classes, one or as many as captions.
            image: a PIL image, if the model's task begins with one, of any size.
            mask_image: of its size; white is the hole that is filled, black is kept.
            guidance_scale: of classifier-free guidance; 1 is none. Without effect if the model is told nothing.
            height, width: in pixels; by default those of training.
            generator: one for all pictures, or a list with one for each.
        """
        self.check_pictures(image, mask_image)
        told, away = self.conditions(prompt, class_labels, num_images_per_prompt)
        several = len(generator) if isinstance(generator, list) else 1
        count = len(next(iter(told.values()))) if told else max(num_images_per_prompt, several)
        if image is not None:
            height, width = image.height * self.grows, image.width * self.grows
        self.scheduler.set_timesteps(num_inference_steps, device=self._execution_device)
        latents = self.noise(count, height, width, generator)
        given = None if image is None else self.given(image, mask_image, generator, count)
        if not told or guidance_scale == 1:
            away = None
        latents = self.sampled(latents, given, told, away, guidance_scale, generator)

        config = self.vae.config
        pixels = self.vae.decode(latents / config.scaling_factor + (config.shift_factor or 0.0)).sample
        if image is not None:
            pixels = pixels[:, :, :height, :width]
        if mask_image is not None:  # what is known comes back as it was
            hole = (self.pixels(mask_image, "L") >= 0.5).to(pixels)
            pixels = pixels * hole + (self.pixels(image, "RGB") * 2 - 1) * (1 - hole)
        images = self.image_processor.postprocess(pixels, output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def check_pictures(self, image: Any, mask_image: Any) -> None:
        """ValueError unless there are those that the task begins with, and no others."""
        kind = self.task["kind"]
        if (image is None) != (kind is None) or (mask_image is None) != (kind != "inpaint"):
            raise ValueError(f"The task of this model is {kind}: give image and mask_image as it asks.")

    def conditions(self, prompt: Names, class_labels: Names, copies: int) -> tuple[Told, Told]:
        """What the U-Net is told of each picture, and what it is guided away from."""
        captions, names = (
            [] if x is None else x if isinstance(x, list) else [x] for x in (prompt, class_labels)
        )
        text = self.tokenizer is not None or self.tokenizer_2 is not None
        if not text:  # then classes are its prompts
            captions, names = [], captions + names
        if bool(captions) != text or bool(names) != bool(self.labels):
            reads = [word for word, read in (("captions", text), ("classes", self.labels)) if read]
            raise ValueError(
                f"This model is told {' and '.join(reads) or 'nothing'}: give that, and nothing else."
            )
        if captions and len(names) == 1:
            names = names * len(captions)
        if captions and names and len(captions) != len(names):
            raise ValueError(f"There are {len(names)} classes for {len(captions)} captions.")
        told = self.read(captions, self.numbers(names))
        null = self.read([""] * text, [len(self.labels)] if self.labels else [])
        if self.config.force_zeros_for_empty_prompt:
            null |= {key: torch.zeros_like(value) for key, value in null.items() if key != "label"}
        told = {key: value.repeat_interleave(copies, dim=0) for key, value in told.items()}
        return told, {key: null[key].expand_as(value) for key, value in told.items()}

    def numbers(self, names: list[str | int]) -> list[int]:
        """Names or numbers of classes => numbers; ValueError for one that the model does not know."""
        numbers = [self.labels.get(name, -1) if isinstance(name, str) else int(name) for name in names]
        if any(not 0 <= number < len(self.labels) for number in numbers):
            raise ValueError(
                f"There is no such class as one of {names!r}; there are {', '.join(self.labels)}."
            )
        return numbers

    def read(self, captions: list[str], numbers: list[int]) -> Told:
        """Captions and numbers of classes as the U-Net is told them."""
        device = self._execution_device
        told = {"label": torch.tensor(numbers, device=device)} if numbers else {}
        if not captions:
            return told
        pools = self.text_encoder_2
        pairs, said = ((self.tokenizer, self.text_encoder), (self.tokenizer_2, pools)), []
        for tokenizer, encoder in pairs:
            if tokenizer is not None:
                limit = {"max_length": tokenizer.model_max_length, "truncation": True}
                ids = tokenizer(captions, padding="max_length", return_tensors="pt", **limit).to(device)
                masked = pools is None and getattr(encoder.config, "use_attention_mask", False)
                mask = ids.attention_mask if masked else None
                said.append(encoder(ids.input_ids, attention_mask=mask, output_hidden_states=True))
        if pools is None:
            return told | {"tokens": said[0].last_hidden_state}
        tokens = torch.cat([one.hidden_states[-2] for one in said], dim=-1)
        return told | {"tokens": tokens, "pooled": said[-1].text_embeds}

    def noise(self, count: int, height: int | None, width: int | None, generator: Any) -> torch.Tensor:
        """What sampling begins with, [count,C,h,w], for pictures of at least that size."""
        side = self.unet.config.sample_size
        usual = [side, side] if isinstance(side, int) else list(side)
        sides = [-(-x // self.factor) if x else y for x, y in zip((height, width), usual, strict=True)]
        shape = (count, self.vae.config.latent_channels, *sides)
        latents = randn_tensor(
            shape, generator=generator, device=self._execution_device, dtype=self.unet.dtype
        )
        return latents * self.scheduler.init_noise_sigma

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

    def sampled(
        self,
        latents: torch.Tensor,
        given: torch.Tensor | None,
        told: Told,
        away: Told | None,
        scale: float,
        generator: Any,
    ) -> torch.Tensor:
        """Noise [N,C,h,w] => latents of pictures, guided away from `away` if there is such."""
        height, width = (side * self.factor for side in latents.shape[2:])
        if away:
            told = {key: torch.cat([away[key], value]) for key, value in told.items()}
        more: dict[str, Any] = {
            "encoder_hidden_states": told.get("tokens"),
            "class_labels": told.get("label"),
        }
        if "pooled" in told:
            ids = told["pooled"].new_tensor([height, width, 0, 0, height, width])
            time_ids = ids.expand(len(told["pooled"]), -1)
            more["added_cond_kwargs"] = {"text_embeds": told["pooled"], "time_ids": time_ids}
        noisy = {"generator": generator}
        noisy = noisy if "generator" in inspect.signature(self.scheduler.step).parameters else {}
        for t in self.progress_bar(self.scheduler.timesteps):
            x = self.scheduler.scale_model_input(latents, t)
            x = x if given is None else torch.cat([x, given], dim=1)
            output = self.unet(torch.cat([x] * 2) if away else x, t, **more).sample
            if away:
                null, to = output.chunk(2)
                output = null + scale * (to - null)
            latents = self.scheduler.step(output, t, latents, **noisy).prev_sample
        return latents
