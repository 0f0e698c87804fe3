"""The Stable Diffusion family: 1.x and 2.x, a UNet and one CLIP."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from artaug.diffusion.families.unet.family import UNetFamily
from artaug.regional.denoiser import Conditioning


@dataclass(frozen=True, kw_only=True, eq=False)
class StableDiffusion(UNetFamily):
    """Stable Diffusion 1.5, its kin, and 2.x, which differs in nothing but its configs.

    ``guidance_scale`` is classifier-free guidance, 7.5 unless told otherwise.

    Raises:
        ModelError: for a pipeline that lacks a part, a size that is no multiple of 8 pixels, a negative prompt without
            guidance, or a ``max_sequence_length`` below what CLIP reads.
    """

    pipeline_class: ClassVar[type] = StableDiffusionPipeline

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        for prompt in prompts:
            self._warn_of_cuts(prompt)
        device = self.pipeline._execution_device  # noqa: SLF001 - .device is wrong under offload
        embeds, _ = self.pipeline.encode_prompt(
            list(prompts), device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return {"prompt_embeds": embeds}

    def arguments(self, conditioning: Conditioning, negative: Conditioning | None) -> Mapping[str, Any]:
        against = {f"negative_{name}": tensor for name, tensor in (negative or {}).items()}
        return {**conditioning, **against, "guidance_scale": self._guidance}

    @property
    def _parts(self) -> Sequence[str]:
        return ("unet", "vae", "text_encoder", "tokenizer", "scheduler")

    @property
    def _recommended_guidance(self) -> float:
        return 7.5

    def _added_conditions(self, conditioning: Conditioning) -> Mapping[str, Tensor] | None:
        return None
