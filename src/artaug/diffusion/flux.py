"""The FLUX.1 family: packed latents, a CLIP vector and T5 tokens as the prompt, velocity as the prediction."""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers import FluxPipeline
from PIL.Image import Image
from torch import Tensor, nn

from artaug.diffusion.family import Family
from artaug.errors import GuideError, ModelError
from artaug.regional.guide import Conditioning, Denoiser
from artaug.training.noising import FlowMatching

_PARTS = ("transformer", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "scheduler")
_LONGEST_PROMPT = 512


@dataclass(frozen=True, kw_only=True, eq=False)
class Flux(Family):
    """FLUX.1: dev, schnell, and what was made from them.

    ``guidance_scale`` is the distilled guidance a dev model takes as an input (3.5 unless told otherwise); a schnell
    model takes none. Training predicts at the same guidance as drawing.

    Raises:
        ModelError: for a pipeline that lacks a part, a size that is not whole image tokens, a guidance scale for a
            model without guidance, or a ``max_sequence_length`` outside [1, 512].
    """

    pipeline_class: ClassVar[type] = FluxPipeline

    def __post_init__(self) -> None:
        missing = [name for name in _PARTS if getattr(self.pipeline, name) is None]
        if missing:
            raise ModelError(f"this FluxPipeline was loaded without {missing}. Drawing and training need all parts.")
        if min(self.width, self.height) < 1 or self.width % self._token_px or self.height % self._token_px:
            raise ModelError(
                f"a picture of {self.width} x {self.height} pixels is not whole image tokens: "
                f"this FluxPipeline needs positive multiples of {self._token_px}."
            )
        if self.guidance_scale is not None and not self._takes_guidance:
            raise ModelError(
                f"guidance_scale={self.guidance_scale} would be ignored: this FLUX model is without guidance "
                "(config.guidance_embeds is False, as in schnell). Leave it out, or set negative_prompt and "
                "true_cfg_scale."
            )
        if not 1 <= self.max_sequence_length <= _LONGEST_PROMPT:
            raise ModelError(f"max_sequence_length={self.max_sequence_length}: FLUX reads 1 to 512 tokens of a prompt.")

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        for prompt in prompts:
            self._warn_of_cuts(prompt)
        embeds, pooled, _ = self.pipeline.encode_prompt(list(prompts), max_sequence_length=self.max_sequence_length)
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}

    def arguments(self, conditioning: Conditioning, negative: Conditioning | None) -> Mapping[str, Any]:
        guidance = {} if self._guidance is None else {"guidance_scale": self._guidance}
        against = {f"negative_{name}": tensor for name, tensor in (negative or {}).items()}
        return {**conditioning, **against, **guidance, "true_cfg_scale": self.true_cfg_scale}

    def denoiser(self, conditioning: Conditioning) -> Denoiser:
        if self.module.is_cache_enabled:
            raise GuideError(
                "this transformer caches predictions from step to step (enable_cache), which cannot tell a region's "
                "prompt from the plan's. Call pipeline.transformer.disable_cache() before drawing with a guide."
            )
        return FluxDenoiser(self.module, self._grid, conditioning["prompt_embeds"])

    @property
    def module(self) -> nn.Module:
        transformer: nn.Module = self.pipeline.transformer
        return transformer

    @property
    def noising(self) -> FlowMatching:
        """Velocity at sigmas shifted as this scheduler shifts them at this size."""
        config = self.pipeline.scheduler.config
        if not config.get("use_dynamic_shifting"):
            return FlowMatching(shift=float(config.get("shift", 1.0)))
        few, many = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
        low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
        mu = low + (high - low) * (math.prod(self._grid) - few) / (many - few)
        return FlowMatching(shift=mu if config.get("time_shift_type") == "linear" else math.exp(mu))

    @torch.no_grad()
    def encode_images(self, images: Sequence[Image]) -> Tensor:
        for image in images:
            if image.size != (self.width, self.height):
                raise ModelError(
                    f"a picture of {image.width} x {image.height} pixels cannot be encoded at {self.width} x "
                    f"{self.height}. Resize it, or set the synthesizer's width and height."
                )
        pixels = self.pipeline.image_processor.preprocess([image.convert("RGB") for image in images])
        vae = self.pipeline.vae
        latents = vae.encode(pixels.to(self._device, vae.dtype)).latent_dist.mode().float()
        latents = (latents - vae.config.shift_factor) * vae.config.scaling_factor
        packed: Tensor = self.pipeline._pack_latents(latents, *latents.shape)  # noqa: SLF001 - diffusers' trainers do
        return packed

    def predict(self, noisy: Tensor, sigmas: Tensor, conditioning: Conditioning) -> Tensor:
        embeds, pooled = conditioning["prompt_embeds"], conditioning["pooled_prompt_embeds"]
        batch = noisy.shape[0]
        places = self.pipeline._prepare_latent_image_ids(  # noqa: SLF001 - diffusers' own trainers do
            batch, *self._grid, embeds.device, embeds.dtype
        )
        velocity: Tensor = self.module(
            hidden_states=noisy.to(embeds),
            timestep=sigmas.to(embeds),
            guidance=None if self._guidance is None else torch.full((batch,), self._guidance, device=embeds.device),
            pooled_projections=pooled,
            encoder_hidden_states=embeds,
            txt_ids=torch.zeros(embeds.shape[1], 3, device=embeds.device, dtype=embeds.dtype),
            img_ids=places,
            return_dict=False,
        )[0]
        return velocity.to(noisy)

    @property
    def _token_px(self) -> int:
        """Pixels on a side of one image token: what the VAE shrinks, times the 2 x 2 packing."""
        return 2 * int(self.pipeline.vae_scale_factor)

    @property
    def _grid(self) -> tuple[int, int]:
        return self.height // self._token_px, self.width // self._token_px

    @property
    def _takes_guidance(self) -> bool:
        return bool(self.pipeline.transformer.config.guidance_embeds)

    @property
    def _guidance(self) -> float | None:
        if not self._takes_guidance:
            return None
        return 3.5 if self.guidance_scale is None else self.guidance_scale

    @property
    def _device(self) -> torch.device:
        device: torch.device = self.pipeline._execution_device  # noqa: SLF001 - .device is wrong under offload
        return device

    def _warn_of_cuts(self, prompt: str) -> None:
        """Say what an encoder will not see: diffusers logs it in a place few look at, and for T5 the wrong words."""
        pipeline = self.pipeline
        for encoder, tokenizer, limit, remedy in (
            ("CLIP", pipeline.tokenizer, pipeline.tokenizer_max_length, "Shorten it; T5 still reads it further."),
            ("T5", pipeline.tokenizer_2, self.max_sequence_length, "Shorten it, or raise max_sequence_length."),
        ):
            tokens = tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids
            room = limit - tokenizer.num_special_tokens_to_add()
            if len(tokens) > room:
                warnings.warn(
                    f"{encoder} reads {limit} tokens and the prompt {prompt!r} has {len(tokens) + limit - room}: "
                    f"cut off is {tokenizer.decode(tokens[room:])!r}. {remedy}",
                    stacklevel=2,
                )


@dataclass(frozen=True, eq=False)
class FluxDenoiser:
    """A FLUX transformer in one run, as a guide sees it."""

    module: nn.Module
    grid: tuple[int, int]
    prompt_embeds: Tensor
    """The very tensor the pipeline was given: that is how the plan's branch is told from the negative one."""

    def is_guided(self, call: Mapping[str, Any]) -> bool:
        return call.get("encoder_hidden_states") is self.prompt_embeds

    def recondition(self, call: Mapping[str, Any], rows: Sequence[int], conditioning: Conditioning) -> dict[str, Any]:
        some = list(rows)
        of_rows = {
            name: call[name][some] for name in ("hidden_states", "timestep", "guidance") if call[name] is not None
        }
        return {
            **call,
            **of_rows,
            "encoder_hidden_states": conditioning["prompt_embeds"],
            "pooled_projections": conditioning["pooled_prompt_embeds"],
        }
