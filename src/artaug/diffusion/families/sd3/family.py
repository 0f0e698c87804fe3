"""Stable Diffusion 3 and 3.5 (Esser et al. 2024, "Scaling Rectified Flow Transformers"): the first MMDiT.

Text: the tokens of two CLIPs, side by side on the channel axis, then those of T5 XXL on the token axis; CLIP's pooled vectors
join the timestep in the modulation. Guidance: classifier-free, both branches in one batch; turbo models have none. Attention:
double-stream blocks only, the image's tokens before the text's; only image tokens have positions. SD3.5 normalizes queries
and keys, SD3 does not. Noise: velocity at shifted sigmas. Latents are not packed: the model itself makes patches.
"""

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal, final

import torch
from diffusers import StableDiffusion3Img2ImgPipeline, StableDiffusion3InpaintPipeline, StableDiffusion3Pipeline
from PIL.Image import Image
from torch import Tensor

from artaug.diffusion.encodings import kept_encoding
from artaug.diffusion.families import common
from artaug.diffusion.families.base import Family
from artaug.diffusion.families.sd3.attention import RegionalSD3Processor
from artaug.diffusion.families.tokenized import TokenizedPrompt, tokenize_prompt
from artaug.errors import ModelError
from artaug.lora.formats import SD3, KeyMap
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

_COMPONENTS = ("transformer", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "scheduler")
_MAX_SEQUENCE_LENGTH = 512
_GUIDANCE_SCALE = 7.0


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class StableDiffusion3(Family):
    """SD3 and SD3.5: medium, large, turbo, and what was made from them.

    ``guidance_scale`` is classifier-free guidance, 7 by default; at 1 and below (as for turbo) there is none. A pipeline
    without T5 (``text_encoder_3=None``) works: SD3 was trained to do without, and reads zeros in place of T5's tokens, so
    of a prompt it reads only what CLIP reads. Skip-layer guidance is not offered.

    A prompt's own tokens are all of CLIP's, since the padding has attended to the words before it, and T5's up to their
    end.

    Raises:
        ModelError: for a pipeline that lacks a component, a size that is not whole image tokens or more than the model has
            positions for, a negative prompt without guidance, or a ``max_sequence_length`` outside [1, 512].
    """

    pipeline_class: ClassVar[type] = StableDiffusion3Pipeline
    image_to_image_class: ClassVar[type | None] = StableDiffusion3Img2ImgPipeline
    inpainting_class: ClassVar[type | None] = StableDiffusion3InpaintPipeline
    key_map: ClassVar[KeyMap | None] = SD3
    text_encoders: ClassVar[Mapping[str, str]] = {
        "clip_l": "text_encoder",
        "clip_g": "text_encoder_2",
        "t5xxl": "text_encoder_3",
    }
    rows_are_independent: ClassVar[bool] = True
    default_max_sequence_length: ClassVar[int] = 256

    def __post_init__(self) -> None:
        common.check_components(self.pipeline, _COMPONENTS)
        common.check_no_ip_adapter(self.module)
        if self._has_t5:
            common.check_components(self.pipeline, ["tokenizer_3"])
        common.check_size(self.pipeline, width=self.width, height=self.height, multiple=self._token_px)
        common.check_no_true_cfg(self.pipeline, self.true_cfg_scale)
        common.check_negative_has_effect(
            self.pipeline, self.negative_prompt, is_guided=self._guidance > 1, scale=self._guidance
        )
        max_side = self.pipeline.transformer.config.pos_embed_max_size
        if max(self._token_grid) > max_side:
            raise ModelError(
                f"a picture of {self.width} x {self.height} pixels is larger than this SD3 has positions for: "
                f"at most {max_side * self._token_px} pixels on a side."
            )
        if not 1 <= self.max_sequence_length <= _MAX_SEQUENCE_LENGTH:
            raise ModelError(f"max_sequence_length={self.max_sequence_length}: SD3 reads 1 to 512 tokens of T5's.")

    @property
    def negative(self) -> str | None:
        return (self.negative_prompt or "") if self._guidance > 1 else None

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        pipeline, tokens = self.pipeline, self._tokens(prompts)

        encode = partial(self.encode_differentiably, prompts)
        return kept_encoding(pipeline, (type(self), self.max_sequence_length, tokens), encode)

    def encode_differentiably(self, prompts: Sequence[str]) -> Conditioning:
        embeds, _, pooled, _ = self.pipeline.encode_prompt(
            list(prompts),
            None,
            None,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
        )
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}

    def token_slices(self, prompts: Sequence[str]) -> list[slice]:
        clip_length = self.pipeline.tokenizer_max_length
        if not self._has_t5:
            return [slice(0, clip_length)] * len(prompts)
        tokens = self.pipeline.tokenizer_3(list(prompts), truncation=True, max_length=self.max_sequence_length)
        return [slice(0, clip_length + len(t5_tokens)) for t5_tokens in tokens.input_ids]

    def tokenized(self, prompt: str) -> list[TokenizedPrompt]:
        # Both CLIPs have one vocabulary, and stand side by side on the channel axis.
        clip_length = self.pipeline.tokenizer_max_length
        clip = tokenize_prompt(self.pipeline.tokenizer, prompt, limit=clip_length)
        if not self._has_t5:
            return [clip]
        t5 = tokenize_prompt(self.pipeline.tokenizer_3, prompt, limit=self.max_sequence_length, offset=clip_length)
        return [clip, t5]

    def pipeline_kwargs(self, conditioning: Conditioning, negative: Conditioning | None) -> Mapping[str, Any]:
        return {**common.prompt_kwargs(conditioning, negative), "guidance_scale": self._guidance}

    def denoiser(self, conditioning: Conditioning) -> Denoiser:
        rows, columns = self._token_grid
        patch = self.pipeline.transformer.config.patch_size
        return StableDiffusion3Denoiser(
            module=self.module,
            grid=(rows * patch, columns * patch),
            isolation=self.isolation,
            patch=patch,
            pictures=len(conditioning["prompt_embeds"]),
            timesteps=self._timesteps,
        )

    def text_shapes(self) -> Mapping[str, tuple[int, ...]]:
        config, clip_length = self.pipeline.transformer.config, self.pipeline.tokenizer_max_length
        return {
            "prompt_embeds": (clip_length + self.max_sequence_length, config.joint_attention_dim),
            "pooled_prompt_embeds": (config.pooled_projection_dim,),
        }

    @property
    def noise_schedule(self) -> FlowMatching:
        """Velocity at sigmas shifted as this scheduler shifts them at this size."""
        return common.shifted_flow(self.pipeline.scheduler.config, tokens=math.prod(self._token_grid))

    def encode_images(self, images: Sequence[Image]) -> Tensor:
        return common.vae_latents(self.pipeline, images, width=self.width, height=self.height)

    def decode_latents(self, latents: Tensor) -> Tensor:
        return common.vae_pictures(self.pipeline, latents)

    def encode_masks(self, masks: Tensor) -> Tensor:
        return common.latent_masks(self.pipeline, masks, width=self.width, height=self.height)

    def predict(self, noisy: Tensor, sigmas: Tensor, conditioning: Conditioning) -> Tensor:
        embeds = conditioning["prompt_embeds"]
        velocity: Tensor = self.pipeline.transformer(
            hidden_states=noisy.to(embeds),
            timestep=sigmas.to(embeds.device, torch.float32) * self._timesteps,
            encoder_hidden_states=embeds,
            pooled_projections=conditioning["pooled_prompt_embeds"],
            return_dict=False,
        )[0]
        return velocity.to(noisy)

    @property
    def _token_px(self) -> int:
        """Pixels on a side of one image token: the VAE's factor times the patch."""
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

    def _tokens(self, prompts: Sequence[str]) -> tuple[Hashable, ...]:
        # Both CLIPs share one vocabulary and are cut at one length, so one warning serves for both.
        pipeline, clip_length = self.pipeline, self.pipeline.tokenizer_max_length
        remedy = "Shorten it; T5 still reads it further." if self._has_t5 else "Shorten it."
        clips = (
            common.prompt_tokens(prompts, pipeline.tokenizer, reader="CLIP", limit=clip_length, remedy=remedy),
            common.prompt_tokens(prompts, pipeline.tokenizer_2, reader=None, limit=clip_length),
        )
        if not self._has_t5:
            return clips
        remedy = "Shorten it, or raise max_sequence_length."
        t5 = common.prompt_tokens(
            prompts, pipeline.tokenizer_3, reader="T5", limit=self.max_sequence_length, remedy=remedy
        )
        return *clips, t5


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class StableDiffusion3Denoiser(AttentiveDenoiser):
    """An SD3 transformer in one run, as a guide sees it."""

    patch: int
    """Latent pixels on a side of an image token."""
    pictures: int
    """How many pictures the run draws."""
    timesteps: int
    """The timestep of noise level 1."""

    def branches(self, kwargs: ForwardKwargs) -> Branches:
        return common.batched_branches(len(kwargs["hidden_states"]), pictures=self.pictures)

    def with_prompt_embeds(
        self, kwargs: ForwardKwargs, rows: Sequence[int], prompts: Sequence[EncodedPrompt]
    ) -> dict[str, Any]:
        selected = list(rows)
        return {
            **kwargs,
            **{name: kwargs[name][selected] for name in ("hidden_states", "timestep")},
            "encoder_hidden_states": torch.cat([prompt.conditioning["prompt_embeds"] for prompt in prompts]),
            "pooled_projections": torch.cat([prompt.conditioning["pooled_prompt_embeds"] for prompt in prompts]),
        }

    def latents_in(self, kwargs: ForwardKwargs) -> Tensor:
        return common.latent_pictures(self, kwargs["hidden_states"], kwargs)

    def broadcast_weights(self, weights: Tensor) -> Tensor:
        return weights  # (channels, rows, columns) is what they multiply

    @property
    def token_grid(self) -> tuple[int, int]:
        rows, columns = self.grid
        return rows // self.patch, columns // self.patch

    @property
    def sites(self) -> Sequence[AttentionSite]:
        # Some blocks of SD3.5 have a second attention, among image tokens only: it reads no prompt, so it stays as it is.
        transformer: Any = self.module
        return [AttentionSite(layer.attn, block) for block, layer in enumerate(transformer.transformer_blocks)]

    def noise_level(self, kwargs: ForwardKwargs) -> float:
        return float(kwargs["timestep"][0]) / self.timesteps

    def append_prompts(
        self, kwargs: ForwardKwargs, prompts: Sequence[Sequence[EncodedPrompt]], *, trim_padding: bool
    ) -> tuple[dict[str, Any], list[tuple[Span, ...]]]:
        # Only image tokens have positions in SD3, so more prompts need none.
        base = kwargs["encoder_hidden_states"]
        joined, spans = common.join_prompts(
            base, prompts, name="prompt_embeds", trim_padding=trim_padding, prepend=False
        )
        image = Span("image", math.prod(self.token_grid))
        return {**kwargs, "encoder_hidden_states": joined}, [(image, *row_spans) for row_spans in spans]

    def token_stream(self, layer: str) -> Literal["image", "text", "joint"] | None:
        return common.mmdit_stream(layer)

    def processor(self, site: AttentionSite, attention_fn: AttentionFn) -> RegionalSD3Processor:
        return RegionalSD3Processor.for_layer(site.attention, attention_fn)
