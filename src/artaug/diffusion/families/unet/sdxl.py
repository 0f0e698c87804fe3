"""SDXL (Podell et al. 2023): a UNet that reads two CLIPs side by side, their pooled vector and the picture's size."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline
from PIL.Image import Image
from torch import Tensor

from artaug.diffusion.families import common
from artaug.diffusion.families.unet.family import UNetFamily
from artaug.lora.formats import SDXL, KeyMap
from artaug.regional.denoiser import Conditioning


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class StableDiffusionXL(UNetFamily):
    """SDXL: base, turbo, and what was made from them.

    ``guidance_scale`` is classifier-free guidance, 5 by default. Without a negative prompt, the pipeline itself chooses what
    it leads away from: zeros, or the empty prompt if ``force_zeros_for_empty_prompt`` is off.

    Raises:
        ModelError: for a pipeline that lacks a component (as the refiner), a size that is no multiple of 8 pixels, a negative
            prompt without guidance, or a ``max_sequence_length`` below what CLIP reads.
    """

    pipeline_class: ClassVar[type] = StableDiffusionXLPipeline
    key_map: ClassVar[KeyMap | None] = SDXL
    _components: ClassVar[Sequence[str]] = (
        "unet",
        "vae",
        "text_encoder",
        "tokenizer",
        "text_encoder_2",
        "tokenizer_2",
        "scheduler",
    )
    _default_guidance_scale: ClassVar[float] = 5.0

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        for prompt in prompts:
            self._warn_if_truncated(prompt)
        embeds, _, pooled, _ = self.pipeline.encode_prompt(list(prompts), do_classifier_free_guidance=False)
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}

    def text_shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {
            "prompt_embeds": (self._clip_length, self.pipeline.unet.config.cross_attention_dim),
            "pooled_prompt_embeds": (self.pipeline.text_encoder_2.config.projection_dim,),
        }

    def pipeline_kwargs(self, conditioning: Conditioning, negative: Conditioning | None) -> Mapping[str, Any]:
        explicit = negative if self.negative_prompt is not None else None
        return {**common.prompt_kwargs(conditioning, explicit), "guidance_scale": self._guidance}

    @torch.no_grad()
    def encode_images(self, images: Sequence[Image]) -> Tensor:
        with _float32_if_it_overflows(self.pipeline.vae):
            latents: Tensor = super().encode_images(images)
        config = self.pipeline.vae.config
        mean, std = (config.get(name) for name in ("latents_mean", "latents_std"))
        if mean is None or std is None:
            return latents
        mean, std = (torch.tensor(channels, device=latents.device).view(1, -1, 1, 1) for channels in (mean, std))
        normalized: Tensor = (latents - mean * config.scaling_factor) / std
        return normalized

    def _added_conditions(self, conditioning: Conditioning) -> Mapping[str, Tensor] | None:
        pooled = conditioning["pooled_prompt_embeds"]
        size = (self.height, self.width)
        time_ids: Tensor = self.pipeline._get_add_time_ids(  # noqa: SLF001 - diffusers' own trainers do
            size, (0, 0), size, dtype=pooled.dtype, text_encoder_projection_dim=pooled.shape[-1]
        )
        return {"text_embeds": pooled, "time_ids": time_ids.to(pooled.device).repeat(len(pooled), 1)}


@contextmanager
def _float32_if_it_overflows(vae: AutoencoderKL) -> Iterator[None]:
    """Keep a float16 VAE that is known to overflow in float32 for a ``with`` block, as the pipeline does to decode."""
    overflows = vae.dtype == torch.float16 and vae.config.force_upcast
    if overflows:
        vae.to(torch.float32)
    try:
        yield
    finally:
        if overflows:
            vae.to(torch.float16)
