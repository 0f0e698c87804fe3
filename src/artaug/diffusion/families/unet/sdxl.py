"""The SDXL family: a UNet, two CLIPs side by side, and the size of the picture as a condition."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline
from PIL.Image import Image
from torch import Tensor

from artaug.diffusion.families.unet.family import UNetFamily
from artaug.regional.denoiser import Conditioning


@dataclass(frozen=True, kw_only=True, eq=False)
class StableDiffusionXL(UNetFamily):
    """SDXL: base, turbo, and what was made from them.

    ``guidance_scale`` is classifier-free guidance, 5 unless told otherwise. Without a negative prompt it leads away from
    what the pipeline's own rule says: from zeros, or from the empty prompt if ``force_zeros_for_empty_prompt`` is off.

    Raises:
        ModelError: for a pipeline that lacks a part (as the refiner), a size that is no multiple of 8 pixels, a negative
            prompt without guidance, or a ``max_sequence_length`` below what CLIP reads.
    """

    pipeline_class: ClassVar[type] = StableDiffusionXLPipeline

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        for prompt in prompts:
            self._warn_of_cuts(prompt)
        embeds, _, pooled, _ = self.pipeline.encode_prompt(list(prompts), do_classifier_free_guidance=False)
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}

    def arguments(self, conditioning: Conditioning, negative: Conditioning | None) -> Mapping[str, Any]:
        said = negative if self.negative_prompt is not None else None
        against = {f"negative_{name}": tensor for name, tensor in (said or {}).items()}
        return {**conditioning, **against, "guidance_scale": self._guidance}

    @torch.no_grad()
    def encode_images(self, images: Sequence[Image]) -> Tensor:
        with _upcast_if_it_overflows(self.pipeline.vae):
            latents: Tensor = super().encode_images(images)
        config = self.pipeline.vae.config
        mean, spread = (config.get(name) for name in ("latents_mean", "latents_std"))
        if mean is None or spread is None:
            return latents
        mean, spread = (torch.tensor(one, device=latents.device).view(1, -1, 1, 1) for one in (mean, spread))
        normalized: Tensor = (latents - mean * config.scaling_factor) / spread
        return normalized

    @property
    def _parts(self) -> Sequence[str]:
        return ("unet", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "scheduler")

    @property
    def _recommended_guidance(self) -> float:
        return 5.0

    def _added_conditions(self, conditioning: Conditioning) -> Mapping[str, Tensor] | None:
        pooled = conditioning["pooled_prompt_embeds"]
        size = (self.height, self.width)
        told: Tensor = self.pipeline._get_add_time_ids(  # noqa: SLF001 - diffusers' own trainers do
            size, (0, 0), size, dtype=pooled.dtype, text_encoder_projection_dim=pooled.shape[-1]
        )
        return {"text_embeds": pooled, "time_ids": told.to(pooled.device).repeat(len(pooled), 1)}


@contextmanager
def _upcast_if_it_overflows(vae: AutoencoderKL) -> Iterator[None]:
    """A float16 VAE that is known to overflow in float32 meanwhile, as the pipeline has it when it decodes."""
    overflows = vae.dtype == torch.float16 and vae.config.force_upcast
    if overflows:
        vae.to(torch.float32)
    try:
        yield
    finally:
        if overflows:
            vae.to(torch.float16)
