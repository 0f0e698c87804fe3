"""Stable Diffusion 1.x and 2.x (Rombach et al. 2022): a UNet that reads one CLIP; 2.x may predict v."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from artaug.diffusion.families import common
from artaug.diffusion.families.unet.family import UNetFamily
from artaug.lora.formats import SD15, KeyMap
from artaug.regional.denoiser import Conditioning


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class StableDiffusion(UNetFamily):
    """Stable Diffusion 1.5, what was made from it, and 2.x, which differs only in its configs.

    ``guidance_scale`` is classifier-free guidance, 7.5 by default.

    Raises:
        ModelError: for a pipeline that lacks a component, a size that is no multiple of 8 pixels, a negative prompt without
            guidance, or a ``max_sequence_length`` below what CLIP reads.
    """

    pipeline_class: ClassVar[type] = StableDiffusionPipeline
    key_map: ClassVar[KeyMap | None] = SD15
    _components: ClassVar[Sequence[str]] = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
    _default_guidance_scale: ClassVar[float] = 7.5

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        for prompt in prompts:
            self._warn_if_truncated(prompt)
        device = self.pipeline._execution_device  # noqa: SLF001 - .device is wrong under offload
        embeds, _ = self.pipeline.encode_prompt(
            list(prompts), device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return {"prompt_embeds": embeds}

    def text_shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {"prompt_embeds": (self._clip_length, self.pipeline.unet.config.cross_attention_dim)}

    def pipeline_kwargs(self, conditioning: Conditioning, negative: Conditioning | None) -> Mapping[str, Any]:
        return {**common.prompt_kwargs(conditioning, negative), "guidance_scale": self._guidance}

    def _added_conditions(self, conditioning: Conditioning) -> Mapping[str, Tensor] | None:
        return None
