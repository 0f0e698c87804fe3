"""The FLUX.1 family: packed latents, a CLIP vector and T5 tokens as the prompt, velocity as the prediction."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from diffusers import FluxPipeline
from PIL.Image import Image
from torch import Tensor, nn

from artaug._internal.truncation import warn_if_truncated
from artaug.diffusion.families import common
from artaug.diffusion.families.base import Family
from artaug.diffusion.families.flux.attention import RegionalFluxProcessor
from artaug.errors import GuideError, ModelError
from artaug.regional.denoiser import (
    AttentionFn,
    AttentionSite,
    AttentiveDenoiser,
    Branches,
    Conditioning,
    Denoiser,
    EncodedPrompt,
    ForwardKwargs,
    Span,
)
from artaug.training.noise_schedule import FlowMatching

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
        common.check_parts(self.pipeline, _PARTS)
        common.check_size(self.pipeline, width=self.width, height=self.height, multiple=self._token_px)
        common.check_true_cfg(self.negative_prompt, self.true_cfg_scale)
        if self.guidance_scale is not None and not self._takes_guidance:
            raise ModelError(
                f"guidance_scale={self.guidance_scale} would be ignored: this FLUX model is without guidance "
                "(config.guidance_embeds is False, as in schnell). Leave it out, or set negative_prompt and "
                "true_cfg_scale."
            )
        if not 1 <= self.max_sequence_length <= _LONGEST_PROMPT:
            raise ModelError(f"max_sequence_length={self.max_sequence_length}: FLUX reads 1 to 512 tokens of a prompt.")

    @property
    def negative(self) -> str | None:
        return self.negative_prompt

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        for prompt in prompts:
            self._warn_of_cuts(prompt)
        embeds, pooled, _ = self.pipeline.encode_prompt(list(prompts), max_sequence_length=self.max_sequence_length)
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}

    def token_slices(self, prompts: Sequence[str]) -> list[slice]:
        tokens = self.pipeline.tokenizer_2(list(prompts), truncation=True, max_length=self.max_sequence_length)
        return [slice(0, len(one)) for one in tokens.input_ids]

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
        return FluxDenoiser(module=self.module, grid=self._grid, prompt_embeds=conditioning["prompt_embeds"])

    @property
    def module(self) -> nn.Module:
        transformer: nn.Module = self.pipeline.transformer
        return transformer

    @property
    def noise_schedule(self) -> FlowMatching:
        """Velocity at sigmas shifted as this scheduler shifts them at this size."""
        return common.shifted_flow(self.pipeline.scheduler.config, tokens=math.prod(self._grid))

    @torch.no_grad()
    def encode_images(self, images: Sequence[Image]) -> Tensor:
        latents = common.vae_latents(self.pipeline, images, width=self.width, height=self.height)
        packed: Tensor = self.pipeline._pack_latents(latents, *latents.shape)  # noqa: SLF001 - diffusers' trainers do
        return packed

    def encode_masks(self, masks: Tensor) -> Tensor:
        latents = common.latent_masks(self.pipeline, masks, width=self.width, height=self.height)
        packed: Tensor = self.pipeline._pack_latents(latents, *latents.shape)  # noqa: SLF001 - as the latents are
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

    def _warn_of_cuts(self, prompt: str) -> None:
        pipeline = self.pipeline
        for reader, tokenizer, limit, remedy in (
            ("CLIP", pipeline.tokenizer, pipeline.tokenizer_max_length, "Shorten it; T5 still reads it further."),
            ("T5", pipeline.tokenizer_2, self.max_sequence_length, "Shorten it, or raise max_sequence_length."),
        ):
            warn_if_truncated(prompt, reader=reader, tokenizer=tokenizer, limit=limit, remedy=remedy)


@dataclass(frozen=True, kw_only=True, eq=False)
class FluxDenoiser(AttentiveDenoiser):
    """A FLUX transformer in one run, as a guide sees it."""

    prompt_embeds: Tensor
    """The very tensor the pipeline was given: that is how the plans' branch is told from the negative one."""

    def branches(self, kwargs: ForwardKwargs) -> Branches:
        rows = range(len(kwargs["hidden_states"]))
        if kwargs["encoder_hidden_states"] is self.prompt_embeds:
            return Branches(cond=rows)
        return Branches(cond=range(0), uncond=rows)

    def with_prompt_embeds(
        self, kwargs: ForwardKwargs, rows: Sequence[int], prompts: Sequence[EncodedPrompt]
    ) -> dict[str, Any]:
        some = list(rows)
        of_rows = {
            name: kwargs[name][some] for name in ("hidden_states", "timestep", "guidance") if kwargs[name] is not None
        }
        given = [text.conditioning for text in prompts]
        return {
            **kwargs,
            **of_rows,
            "encoder_hidden_states": torch.cat([one["prompt_embeds"] for one in given]),
            "pooled_projections": torch.cat([one["pooled_prompt_embeds"] for one in given]),
        }

    @property
    def sites(self) -> Sequence[AttentionSite]:
        model: Any = self.module
        layers = (*model.transformer_blocks, *model.single_transformer_blocks)
        return [AttentionSite(layer.attn, block) for block, layer in enumerate(layers)]

    def noise_level(self, kwargs: ForwardKwargs) -> float:
        return float(kwargs["timestep"][0])

    def append_prompts(
        self, kwargs: ForwardKwargs, prompts: Sequence[Sequence[EncodedPrompt]], *, trim_padding: bool
    ) -> tuple[dict[str, Any], list[tuple[Span, ...]]]:
        # Every FLUX prompt is at position 0 of the image's grid, so more of them need no positions of their own.
        base = kwargs["encoder_hidden_states"]
        joined, spans = common.joined_texts(base, prompts, name="prompt_embeds", trim_padding=trim_padding, ahead=True)
        image = Span("image", math.prod(self.grid))
        more = kwargs["txt_ids"].new_zeros(joined.shape[1], kwargs["txt_ids"].shape[-1])
        return (
            {**kwargs, "encoder_hidden_states": joined, "txt_ids": more},
            [(*of_row, image) for of_row in spans],
        )

    def token_stream(self, layer: str) -> Literal["image", "text", "joint"] | None:
        if "norm" in layer or layer.startswith("time_"):
            return None
        if layer.startswith("single_transformer_blocks"):
            return "joint"
        of_prompt = ("context_embedder", ".ff_context.", ".add_q_proj", ".add_k_proj", ".add_v_proj", ".to_add_out")
        return "text" if any(part in layer for part in of_prompt) else "image"

    def processor(self, site: AttentionSite, attention_fn: AttentionFn) -> RegionalFluxProcessor:
        return RegionalFluxProcessor.like(site.attention, attention_fn)
