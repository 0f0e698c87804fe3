"""FLUX.2 (Black Forest Labs): dev (2025), which reads with Mistral Small 3, and klein (2026), which reads with Qwen3.

Text: hidden states of three layers of one language model, side by side, of the prompt in a chat template. Guidance: dev
is distilled and takes the guidance scale as an input; it has no negative prompt. Of klein, a base model has classifier-free
guidance in two calls of the transformer, a distilled one has none. Attention: double-stream blocks, then parallel
single-stream blocks (one projection for q, k, v and MLP), the text's tokens before the image's; positions have four axes, of
which the last counts the tokens of a prompt. Noise: velocity at sigmas shifted by picture size and number of steps. Latents
are 2 x 2 patches, normalized by the VAE's batch norm.
"""

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal, final

import torch
from diffusers import Flux2KleinPipeline, Flux2Pipeline
from diffusers.models.transformers.transformer_flux2 import Flux2ParallelSelfAttention
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu, format_input
from einops import rearrange
from PIL.Image import Image
from torch import Tensor

from artaug.diffusion.encodings import kept_encoding
from artaug.diffusion.families import common, llm_encoders
from artaug.diffusion.families.base import Family
from artaug.diffusion.families.flux2.attention import RegionalFlux2ParallelProcessor, RegionalFlux2Processor
from artaug.diffusion.families.tokenized import TokenizedPrompt, tokenize_chat
from artaug.errors import ModelError
from artaug.lora.formats import FLUX2, KeyMap
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

_COMPONENTS = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
_MAX_SEQUENCE_LENGTH = 512
_GUIDANCE_SCALE = 4.0
"""The default of both pipelines."""
_STEPS = 50
"""For which the sigmas of training are shifted: the pipelines' default."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Flux2Family(Family):
    """What dev and klein have in common: all but the language model and the meaning of guidance."""

    key_map: ClassVar[KeyMap | None] = FLUX2
    rows_are_independent: ClassVar[bool] = True

    def __post_init__(self) -> None:
        common.check_components(self.pipeline, _COMPONENTS)
        common.check_size(self.pipeline, width=self.width, height=self.height, multiple=self._token_px)
        if not 1 <= self.max_sequence_length <= _MAX_SEQUENCE_LENGTH:
            raise ModelError(
                f"max_sequence_length={self.max_sequence_length}: FLUX.2 reads 1 to {_MAX_SEQUENCE_LENGTH} tokens of a chat."
            )

    @abstractmethod
    def _chat_tokens(self, prompts: Sequence[str]) -> list[list[int]]:
        """The tokens of each prompt in its chat template, before any cut."""

    @abstractmethod
    def _chat(self, prompt: str) -> str:
        """The text of the whole chat around a prompt."""

    def _adds_special_tokens(self, chat: str) -> bool:
        """Whether the pipeline has the tokenizer add its own tokens to a chat."""
        return True

    @property
    @abstractmethod
    def _distilled_guidance(self) -> float | None:
        """The guidance scale that the model takes as an input; None if it takes none."""

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        limit, chats = self.max_sequence_length, self._chat_tokens(prompts)
        tokens = llm_encoders.chat_tokens(prompts, chats, self._tokenizer, reader="FLUX.2", limit=limit)

        return kept_encoding(self.pipeline, (type(self), tokens), partial(self.encode_differentiably, prompts))

    def encode_differentiably(self, prompts: Sequence[str]) -> Conditioning:
        embeds, _ = self.pipeline.encode_prompt(list(prompts), max_sequence_length=self.max_sequence_length)
        return {"prompt_embeds": embeds}

    def token_slices(self, prompts: Sequence[str]) -> list[slice]:
        limit = self.max_sequence_length
        lengths = [min(len(chat), limit) for chat in self._chat_tokens(prompts)]
        if self._tokenizer.padding_side == "left":
            return [slice(limit - length, limit) for length in lengths]
        return [slice(0, length) for length in lengths]

    def tokenized(self, prompt: str) -> list[TokenizedPrompt]:
        tokenizer = self._tokenizer
        chat = tokenize_chat(
            tokenizer,
            prompt,
            self._chat,
            limit=self.max_sequence_length,
            pads_left=tokenizer.padding_side == "left",
            add_special_tokens=self._adds_special_tokens(self._chat(prompt)),
        )
        return [chat]

    def text_shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {"prompt_embeds": (self.max_sequence_length, self.pipeline.transformer.config.joint_attention_dim)}

    @property
    def noise_schedule(self) -> FlowMatching:
        """Velocity at sigmas shifted as the pipeline shifts them at this size.

        FLUX.2 shifts them by the number of steps, too, up to 4300 image tokens: this is the shift of 50 steps.
        """
        tokens = math.prod(self._grid)
        shift = compute_empirical_mu(image_seq_len=tokens, num_steps=_STEPS)
        config = {**self.pipeline.scheduler.config, "base_shift": shift, "max_shift": shift}
        return common.shifted_flow(config, tokens=tokens)

    @torch.no_grad()
    def encode_images(self, images: Sequence[Image]) -> Tensor:
        vae = self.pipeline.vae
        pixels = common.image_pixels(self.pipeline, images, width=self.width, height=self.height)
        latents = _patchify(vae.encode(pixels).latent_dist.mode().float())
        mean, std = self._patch_statistics()
        return _to_tokens((latents - mean) / std)

    def decode_latents(self, latents: Tensor) -> Tensor:
        mean, std = self._patch_statistics()
        patches = rearrange(latents, "b (h w) c -> b c h w", h=self._grid[0])
        return common.decode(self.pipeline, _unpatchify(patches * std.to(latents) + mean.to(latents)))

    def _patch_statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each channel of a patch: float32, (channels * 4, 1, 1)."""
        vae = self.pipeline.vae
        mean = rearrange(vae.bn.running_mean.float(), "c -> c 1 1")
        variance = rearrange(vae.bn.running_var.float(), "c -> c 1 1")
        return mean, (variance + vae.config.batch_norm_eps).sqrt()

    def encode_masks(self, masks: Tensor) -> Tensor:
        latents = common.latent_masks(self.pipeline, masks, width=self.width, height=self.height)
        return _to_tokens(_patchify(latents))

    def predict(self, noisy: Tensor, sigmas: Tensor, conditioning: Conditioning) -> Tensor:
        embeds = conditioning["prompt_embeds"]
        guidance = self._distilled_guidance
        img_ids = self.pipeline._prepare_latent_ids(  # noqa: SLF001 - diffusers' own trainers do
            noisy.new_empty(noisy.shape[0], 1, *self._grid)
        )
        txt_ids = self.pipeline._prepare_text_ids(embeds)  # noqa: SLF001 - likewise
        velocity: Tensor = self.pipeline.transformer(
            hidden_states=noisy.to(embeds),
            timestep=sigmas.to(embeds),
            guidance=None if guidance is None else torch.full((len(noisy),), guidance, device=embeds.device),
            encoder_hidden_states=embeds,
            txt_ids=txt_ids.to(embeds.device),
            img_ids=img_ids.to(embeds.device),
            return_dict=False,
        )[0]
        return velocity.to(noisy)

    @property
    def _tokenizer(self) -> common.Tokenizer:
        """The tokenizer itself, which dev's processor wraps."""
        return getattr(self.pipeline.tokenizer, "tokenizer", self.pipeline.tokenizer)

    @property
    def _token_px(self) -> int:
        """Pixels on a side of one image token: the VAE's factor times the 2 x 2 packing."""
        return 2 * int(self.pipeline.vae_scale_factor)

    @property
    def _grid(self) -> tuple[int, int]:
        return self.height // self._token_px, self.width // self._token_px


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Flux2(Flux2Family):
    """FLUX.2 dev and what was made from it.

    ``guidance_scale`` is the distilled guidance that the model takes as an input, 4 by default. Its pipeline has
    no classifier-free guidance. Training predicts at the same guidance as drawing.

    Raises:
        ModelError: for a pipeline that lacks a component, a size that is not whole image tokens, a negative prompt or scale
            that would be ignored, or a ``max_sequence_length`` outside [1, 512].
    """

    pipeline_class: ClassVar[type] = Flux2Pipeline

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.negative_prompt is not None or self.true_cfg_scale != 1:
            raise ModelError(
                f"negative_prompt={self.negative_prompt!r} and true_cfg_scale={self.true_cfg_scale} would be ignored: "
                "Flux2Pipeline has no classifier-free guidance. Leave them out; guidance_scale is the model's own."
            )
        if self.guidance_scale is not None and not self._takes_guidance:
            raise ModelError(
                f"guidance_scale={self.guidance_scale} would be ignored: this FLUX.2 model is without guidance "
                "(config.guidance_embeds is False). Leave it out."
            )

    @property
    def negative(self) -> None:
        return None

    def pipeline_kwargs(self, conditioning: Conditioning, negative: Conditioning | None) -> Mapping[str, Any]:
        return {**conditioning, "guidance_scale": self._scale}

    def denoiser(self, conditioning: Conditioning) -> Denoiser:
        return Flux2Denoiser(module=self.module, grid=self._grid, isolation=self.isolation)

    def _chat_tokens(self, prompts: Sequence[str]) -> list[list[int]]:
        messages = format_input(list(prompts), system_message=self.pipeline.system_message)
        chats = (
            self.pipeline.tokenizer.apply_chat_template([message], tokenize=True, return_dict=True)
            for message in messages
        )
        return [[int(token) for token in chat["input_ids"][0]] for chat in chats]  # a processor gives tensors

    def _chat(self, prompt: str) -> str:
        (message,) = format_input([prompt], system_message=self.pipeline.system_message)
        chats: list[str] = self.pipeline.tokenizer.apply_chat_template([message], tokenize=False)
        return chats[0]

    def _adds_special_tokens(self, chat: str) -> bool:
        # A processor adds them to a chat that does not begin with one, a tokenizer adds none.
        beginning = self._tokenizer.bos_token
        return self._tokenizer is not self.pipeline.tokenizer and not (beginning and chat.startswith(beginning))

    @property
    def _takes_guidance(self) -> bool:
        return bool(self.pipeline.transformer.config.guidance_embeds)

    @property
    def _scale(self) -> float:
        return _GUIDANCE_SCALE if self.guidance_scale is None else self.guidance_scale

    @property
    def _distilled_guidance(self) -> float:
        return self._scale


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Flux2Klein(Flux2Family):
    """FLUX.2 klein, base and distilled.

    ``guidance_scale`` of a base model is classifier-free guidance, 4 by default, against ``negative_prompt``
    or the empty prompt; 1 is none. A distilled model has none.

    Raises:
        ModelError: for a pipeline that lacks a component, a size that is not whole image tokens, a negative prompt or scale
            that would be ignored, or a ``max_sequence_length`` outside [1, 512].
    """

    pipeline_class: ClassVar[type] = Flux2KleinPipeline

    def __post_init__(self) -> None:
        super().__post_init__()
        common.check_no_true_cfg(self.pipeline, self.true_cfg_scale)
        if self._is_distilled and (self.guidance_scale or 1) > 1:
            raise ModelError(
                f"guidance_scale={self.guidance_scale} would be ignored: this FLUX.2 klein is distilled. Leave it out."
            )
        if self.negative_prompt is not None and self.negative is None:
            raise ModelError(
                f"negative_prompt={self.negative_prompt!r} would be ignored: this run has no classifier-free guidance. "
                "Leave it out, or set a guidance_scale above 1 with a FLUX.2 klein that is not distilled."
            )

    @property
    def negative(self) -> str | None:
        return (self.negative_prompt or "") if self._scale > 1 else None

    def pipeline_kwargs(self, conditioning: Conditioning, negative: Conditioning | None) -> Mapping[str, Any]:
        return {**common.prompt_kwargs(conditioning, negative), "guidance_scale": self._scale}

    def denoiser(self, conditioning: Conditioning) -> Denoiser:
        denoiser = Flux2Denoiser(module=self.module, grid=self._grid, isolation=self.isolation)
        if self.negative is None:
            return denoiser
        embeds = conditioning["prompt_embeds"]
        negative_embeds = self.encode_prompts([self.negative] * len(embeds))["prompt_embeds"]
        llm_encoders.check_prompts_differ(embeds, negative_embeds, self.negative)
        return replace(denoiser, prompt_embeds=embeds)

    def _chat_tokens(self, prompts: Sequence[str]) -> list[list[int]]:
        tokenizer = self.pipeline.tokenizer
        return [list(tokenizer(self._chat(prompt), verbose=False).input_ids) for prompt in prompts]

    def _chat(self, prompt: str) -> str:
        chat: str = self.pipeline.tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        return chat

    @property
    def _is_distilled(self) -> bool:
        return bool(self.pipeline.config.is_distilled)

    @property
    def _scale(self) -> float:
        if self._is_distilled:
            return 1.0
        return _GUIDANCE_SCALE if self.guidance_scale is None else self.guidance_scale

    @property
    def _distilled_guidance(self) -> None:
        return None


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Flux2Denoiser(AttentiveDenoiser):
    """A FLUX.2 transformer in one run, as a guide sees it."""

    prompt_embeds: Tensor | None = None
    """The plans' prompts, if the run has a negative prompt. The pipeline copies both, so their values tell the branches."""

    def branches(self, kwargs: ForwardKwargs) -> Branches:
        is_cond = self.prompt_embeds is None or torch.equal(kwargs["encoder_hidden_states"], self.prompt_embeds)
        return common.separate_branches(len(kwargs["hidden_states"]), is_cond=is_cond)

    def with_prompt_embeds(
        self, kwargs: ForwardKwargs, rows: Sequence[int], prompts: Sequence[EncodedPrompt]
    ) -> dict[str, Any]:
        selected = list(rows)
        by_row = ("hidden_states", "timestep", "guidance", "img_ids", "txt_ids")
        row_kwargs = {name: kwargs[name][selected] for name in by_row if kwargs[name] is not None}
        return {
            **kwargs,
            **row_kwargs,
            "encoder_hidden_states": torch.cat([prompt.conditioning["prompt_embeds"] for prompt in prompts]),
        }

    @property
    def sites(self) -> Sequence[AttentionSite]:
        return common.double_and_single_sites(self.module)

    def noise_level(self, kwargs: ForwardKwargs) -> float:
        return float(kwargs["timestep"][0])

    def append_prompts(
        self, kwargs: ForwardKwargs, prompts: Sequence[Sequence[EncodedPrompt]], *, trim_padding: bool
    ) -> tuple[dict[str, Any], list[tuple[Span, ...]]]:
        # A token's place in its prompt is the last of four axes, and all rows of a batch share the first row's positions.
        slots = llm_encoders.slot_padded(
            kwargs["encoder_hidden_states"], prompts, name="prompt_embeds", trim_padding=trim_padding
        )
        txt_ids = kwargs["txt_ids"].new_zeros(*slots.tokens.shape[:2], kwargs["txt_ids"].shape[-1])
        txt_ids[..., -1] = slots.positions
        image = Span("image", math.prod(self.grid))
        return (
            {**kwargs, "encoder_hidden_states": slots.tokens, "txt_ids": txt_ids},
            [(*row_spans, image) for row_spans in slots.spans],
        )

    def token_stream(self, layer: str) -> Literal["image", "text", "joint"] | None:
        return common.mmdit_stream(layer)

    def processor(
        self, site: AttentionSite, attention_fn: AttentionFn
    ) -> RegionalFlux2Processor | RegionalFlux2ParallelProcessor:
        if isinstance(site.attention, Flux2ParallelSelfAttention):
            return RegionalFlux2ParallelProcessor.for_layer(site.attention, attention_fn)
        return RegionalFlux2Processor.for_layer(site.attention, attention_fn)


def _patchify(latents: Tensor) -> Tensor:
    """The channels of each 2 x 2 patch of latent pixels side by side: (batch, channels * 4, rows / 2, columns / 2)."""
    patches: Tensor = rearrange(latents, "b c (h ph) (w pw) -> b (c ph pw) h w", ph=2, pw=2)
    return patches


def _unpatchify(patches: Tensor) -> Tensor:
    """The inverse of `_patchify`."""
    latents: Tensor = rearrange(patches, "b (c ph pw) h w -> b c (h ph) (w pw)", ph=2, pw=2)
    return latents


def _to_tokens(patches: Tensor) -> Tensor:
    tokens: Tensor = rearrange(patches, "b c h w -> b (h w) c")
    return tokens
