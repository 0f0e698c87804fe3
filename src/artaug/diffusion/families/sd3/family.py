"""The SD3 family: two CLIPs and T5 as one prompt, MMDiT joint attention, velocity as the prediction."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from diffusers import StableDiffusion3Pipeline
from PIL.Image import Image
from torch import Tensor, nn

from artaug._internal.truncation import warn_if_truncated
from artaug.diffusion.families import common
from artaug.diffusion.families.base import Family
from artaug.diffusion.families.cfg import batched_branches, check_negative_is_read
from artaug.diffusion.families.sd3.attention import RegionalSD3Processor
from artaug.errors import ModelError
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
_GUIDANCE_SCALE = 7.0


@dataclass(frozen=True, kw_only=True, eq=False)
class StableDiffusion3(Family):
    """SD3 and SD3.5: medium, large, turbo, and what was made from them.

    ``guidance_scale`` is classifier-free guidance, 7 unless told otherwise; at 1 and below (as for turbo) there is none.
    A pipeline without T5 (``text_encoder_3=None``) is welcome: SD3 was trained to do without, and then reads zeros in
    its place and of a prompt only what CLIP reads. Skip-layer guidance is not offered.

    A prompt's own tokens are all of CLIP's, whose padding has read the words before it, and T5's up to their end.

    Raises:
        ModelError: for a pipeline that lacks a part, a size that is not whole image tokens or more than the model has
            positions for, a negative prompt without guidance, or a ``max_sequence_length`` outside [1, 512].
    """

    pipeline_class: ClassVar[type] = StableDiffusion3Pipeline
    usual_length: ClassVar[int] = 256  # as its pipeline recommends

    def __post_init__(self) -> None:
        common.check_parts(self.pipeline, _PARTS)
        if self._has_t5:
            common.check_parts(self.pipeline, ["tokenizer_3"])
        common.check_size(self.pipeline, width=self.width, height=self.height, multiple=self._token_px)
        common.check_no_true_cfg(self.pipeline, self.true_cfg_scale)
        check_negative_is_read(self.pipeline, self.negative_prompt, is_guided=self._guidance > 1, scale=self._guidance)
        longest = self.pipeline.transformer.config.pos_embed_max_size
        if max(self._token_grid) > longest:
            raise ModelError(
                f"a picture of {self.width} x {self.height} pixels is larger than this SD3 has positions for: "
                f"at most {longest * self._token_px} pixels on a side."
            )
        if not 1 <= self.max_sequence_length <= _LONGEST_PROMPT:
            raise ModelError(f"max_sequence_length={self.max_sequence_length}: SD3 reads 1 to 512 tokens of T5's.")

    @property
    def negative(self) -> str | None:
        return (self.negative_prompt or "") if self._guidance > 1 else None

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        for prompt in prompts:
            self._warn_of_cuts(prompt)
        embeds, _, pooled, _ = self.pipeline.encode_prompt(
            list(prompts),
            None,
            None,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
        )
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}

    def token_slices(self, prompts: Sequence[str]) -> list[slice]:
        of_clip = self.pipeline.tokenizer_max_length
        if not self._has_t5:
            return [slice(0, of_clip)] * len(prompts)
        tokens = self.pipeline.tokenizer_3(list(prompts), truncation=True, max_length=self.max_sequence_length)
        return [slice(0, of_clip + len(one)) for one in tokens.input_ids]

    def arguments(self, conditioning: Conditioning, negative: Conditioning | None) -> Mapping[str, Any]:
        against = {f"negative_{name}": tensor for name, tensor in (negative or {}).items()}
        return {**conditioning, **against, "guidance_scale": self._guidance}

    def denoiser(self, conditioning: Conditioning) -> Denoiser:
        rows, columns = self._token_grid
        patch = self.pipeline.transformer.config.patch_size
        return StableDiffusion3Denoiser(
            module=self.module,
            grid=(rows * patch, columns * patch),
            patch=patch,
            pictures=len(conditioning["prompt_embeds"]),
            timesteps=self._timesteps,
        )

    @property
    def module(self) -> nn.Module:
        transformer: nn.Module = self.pipeline.transformer
        return transformer

    @property
    def noise_schedule(self) -> FlowMatching:
        """Velocity at sigmas shifted as this scheduler shifts them at this size."""
        return common.shifted_flow(self.pipeline.scheduler.config, tokens=math.prod(self._token_grid))

    def encode_images(self, images: Sequence[Image]) -> Tensor:
        return common.vae_latents(self.pipeline, images, width=self.width, height=self.height)

    def encode_masks(self, masks: Tensor) -> Tensor:
        return common.latent_masks(self.pipeline, masks, width=self.width, height=self.height)

    def predict(self, noisy: Tensor, sigmas: Tensor, conditioning: Conditioning) -> Tensor:
        embeds = conditioning["prompt_embeds"]
        velocity: Tensor = self.module(
            hidden_states=noisy.to(embeds),
            timestep=sigmas.to(embeds.device, torch.float32) * self._timesteps,
            encoder_hidden_states=embeds,
            pooled_projections=conditioning["pooled_prompt_embeds"],
            return_dict=False,
        )[0]
        return velocity.to(noisy)

    @property
    def _token_px(self) -> int:
        """Pixels on a side of one image token: what the VAE shrinks, times the patch."""
        return int(self.pipeline.vae_scale_factor * self.pipeline.transformer.config.patch_size)

    @property
    def _token_grid(self) -> tuple[int, int]:
        return self.height // self._token_px, self.width // self._token_px

    @property
    def _has_t5(self) -> bool:
        return self.pipeline.text_encoder_3 is not None

    @property
    def _guidance(self) -> float:
        return _GUIDANCE_SCALE if self.guidance_scale is None else self.guidance_scale

    @property
    def _timesteps(self) -> int:
        return int(self.pipeline.scheduler.config.num_train_timesteps)

    def _warn_of_cuts(self, prompt: str) -> None:
        # Both CLIPs share one vocabulary and are cut at one length, so one warning serves for both.
        pipeline, limit = self.pipeline, self.max_sequence_length
        further = "Shorten it; T5 still reads it further." if self._has_t5 else "Shorten it."
        warn_if_truncated(
            prompt, reader="CLIP", tokenizer=pipeline.tokenizer, limit=pipeline.tokenizer_max_length, remedy=further
        )
        if self._has_t5:
            remedy = "Shorten it, or raise max_sequence_length."
            warn_if_truncated(prompt, reader="T5", tokenizer=pipeline.tokenizer_3, limit=limit, remedy=remedy)


@dataclass(frozen=True, kw_only=True, eq=False)
class StableDiffusion3Denoiser(AttentiveDenoiser):
    """An SD3 transformer in one run, as a guide sees it."""

    patch: int
    """Latent pixels on a side of an image token."""
    pictures: int
    """How many the run draws."""
    timesteps: int
    """What a noise level of 1 is called."""

    def branches(self, kwargs: ForwardKwargs) -> Branches:
        return batched_branches(len(kwargs["hidden_states"]), pictures=self.pictures)

    def with_prompt_embeds(
        self, kwargs: ForwardKwargs, rows: Sequence[int], prompts: Sequence[EncodedPrompt]
    ) -> dict[str, Any]:
        some = list(rows)
        given = [text.conditioning for text in prompts]
        return {
            **kwargs,
            **{name: kwargs[name][some] for name in ("hidden_states", "timestep")},
            "encoder_hidden_states": torch.cat([one["prompt_embeds"] for one in given]),
            "pooled_projections": torch.cat([one["pooled_prompt_embeds"] for one in given]),
        }

    def broadcast_weights(self, weights: Tensor) -> Tensor:
        return weights  # (channels, rows, columns) is what they multiply

    @property
    def token_grid(self) -> tuple[int, int]:
        rows, columns = self.grid
        return rows // self.patch, columns // self.patch

    @property
    def sites(self) -> Sequence[AttentionSite]:
        # SD3.5 has in some blocks a second attention, of the image alone: nothing to keep apart there but the image.
        transformer: Any = self.module
        return [AttentionSite(layer.attn, block) for block, layer in enumerate(transformer.transformer_blocks)]

    def noise_level(self, kwargs: ForwardKwargs) -> float:
        return float(kwargs["timestep"][0]) / self.timesteps

    def append_prompts(
        self, kwargs: ForwardKwargs, prompts: Sequence[Sequence[EncodedPrompt]], *, trim_padding: bool
    ) -> tuple[dict[str, Any], list[tuple[Span, ...]]]:
        # SD3 gives positions to image tokens alone, so more prompts need none of their own.
        base = kwargs["encoder_hidden_states"]
        joined, spans = common.joined_texts(base, prompts, name="prompt_embeds", trim_padding=trim_padding, ahead=False)
        image = Span("image", math.prod(self.token_grid))
        return {**kwargs, "encoder_hidden_states": joined}, [(image, *of_row) for of_row in spans]

    def token_stream(self, layer: str) -> Literal["image", "text", "joint"] | None:
        if "norm" in layer or layer.startswith("time_"):
            return None
        of_prompt = ("context_embedder", ".ff_context.", ".add_q_proj", ".add_k_proj", ".add_v_proj", ".to_add_out")
        return "text" if any(part in layer for part in of_prompt) else "image"

    def processor(self, site: AttentionSite, attention_fn: AttentionFn) -> RegionalSD3Processor:
        return RegionalSD3Processor.like(site.attention, attention_fn)
