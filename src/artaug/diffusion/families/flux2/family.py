"""The FLUX.2 family: packed and normalized latents, layers of a language model as the prompt, velocity as the prediction."""

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from diffusers import Flux2Pipeline
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu, format_input
from PIL.Image import Image
from torch import Tensor, nn

from artaug.diffusion.families import common, llm_encoders
from artaug.diffusion.families.base import Family
from artaug.diffusion.families.flux2.attention import (
    RegionalFlux2ParallelProcessor,
    RegionalFlux2Processor,
    regional_processor,
)
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

_PARTS = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
_LONGEST_PROMPT = 512
GUIDANCE_SCALE = 4.0
"""What both pipelines recommend."""
_STEPS = 50


@dataclass(frozen=True, kw_only=True, eq=False)
class Flux2Family(Family):
    """What dev and klein have in common: all but the language model, and what guidance is."""

    def __post_init__(self) -> None:
        common.check_parts(self.pipeline, _PARTS)
        common.check_size(self.pipeline, width=self.width, height=self.height, multiple=self._token_px)
        if not 1 <= self.max_sequence_length <= _LONGEST_PROMPT:
            raise ModelError(
                f"max_sequence_length={self.max_sequence_length}: FLUX.2 reads 1 to {_LONGEST_PROMPT} tokens of a chat."
            )

    @abstractmethod
    def _chats(self, prompts: Sequence[str]) -> list[list[int]]:
        """The tokens of each prompt and the chat around it, none cut."""

    @property
    @abstractmethod
    def _distilled_guidance(self) -> float | None:
        """What the model takes as an input, if it does."""

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        for prompt, chat in zip(prompts, self._chats(prompts), strict=True):
            llm_encoders.warn_if_chat_truncated(
                prompt, chat, reader="FLUX.2", tokenizer=self._tokenizer, limit=self.max_sequence_length
            )
        embeds, _ = self.pipeline.encode_prompt(list(prompts), max_sequence_length=self.max_sequence_length)
        return {"prompt_embeds": embeds}

    def token_slices(self, prompts: Sequence[str]) -> list[slice]:
        longest = self.max_sequence_length
        lengths = [min(len(chat), longest) for chat in self._chats(prompts)]
        if self._tokenizer.padding_side == "left":
            return [slice(longest - length, longest) for length in lengths]
        return [slice(0, length) for length in lengths]

    @property
    def module(self) -> nn.Module:
        transformer: nn.Module = self.pipeline.transformer
        return transformer

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
        pixels = llm_encoders.checked_pixels(self.pipeline, images, width=self.width, height=self.height)
        latents = self.pipeline._patchify_latents(  # noqa: SLF001 - diffusers' own trainers do
            vae.encode(pixels).latent_dist.mode().float()
        )
        mean, variance = (one.float().view(1, -1, 1, 1) for one in (vae.bn.running_mean, vae.bn.running_var))
        normalized = (latents - mean) / (variance + vae.config.batch_norm_eps).sqrt()
        packed: Tensor = self.pipeline._pack_latents(normalized)  # noqa: SLF001 - likewise
        return packed

    def encode_masks(self, masks: Tensor) -> Tensor:
        latents = common.latent_masks(self.pipeline, masks, width=self.width, height=self.height)
        packed: Tensor = self.pipeline._pack_latents(  # noqa: SLF001 - as the latents are
            self.pipeline._patchify_latents(latents)  # noqa: SLF001 - likewise
        )
        return packed

    def predict(self, noisy: Tensor, sigmas: Tensor, conditioning: Conditioning) -> Tensor:
        embeds = conditioning["prompt_embeds"]
        guidance = self._distilled_guidance
        places = self.pipeline._prepare_latent_ids(  # noqa: SLF001 - diffusers' own trainers do
            noisy.new_empty(noisy.shape[0], 1, *self._grid)
        )
        orders = self.pipeline._prepare_text_ids(embeds)  # noqa: SLF001 - likewise
        velocity: Tensor = self.module(
            hidden_states=noisy.to(embeds),
            timestep=sigmas.to(embeds),
            guidance=None if guidance is None else torch.full((len(noisy),), guidance, device=embeds.device),
            encoder_hidden_states=embeds,
            txt_ids=orders.to(embeds.device),
            img_ids=places.to(embeds.device),
            return_dict=False,
        )[0]
        return velocity.to(noisy)

    @property
    def _tokenizer(self) -> common.Tokenizer:
        """The tokenizer itself, which dev wraps in a processor."""
        return getattr(self.pipeline.tokenizer, "tokenizer", self.pipeline.tokenizer)

    @property
    def _token_px(self) -> int:
        """Pixels on a side of one image token: what the VAE shrinks, times the 2 x 2 packing."""
        return 2 * int(self.pipeline.vae_scale_factor)

    @property
    def _grid(self) -> tuple[int, int]:
        return self.height // self._token_px, self.width // self._token_px


@dataclass(frozen=True, kw_only=True, eq=False)
class Flux2(Flux2Family):
    """FLUX.2 dev and what was made from it.

    ``guidance_scale`` is the distilled guidance the model takes as an input, 4 unless told otherwise. Its pipeline has
    no classifier-free guidance. Training predicts at the same guidance as drawing.

    Raises:
        ModelError: for a pipeline that lacks a part, a size that is not whole image tokens, a negative prompt or scale
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

    def arguments(self, conditioning: Conditioning, negative: Conditioning | None) -> Mapping[str, Any]:
        return {**conditioning, "guidance_scale": self._scale}

    def denoiser(self, conditioning: Conditioning) -> Denoiser:
        llm_encoders.check_no_cache(self.module)
        return Flux2Denoiser(module=self.module, grid=self._grid)

    def _chats(self, prompts: Sequence[str]) -> list[list[int]]:
        messages = format_input(list(prompts), system_message=self.pipeline.system_message)
        chats = (
            self.pipeline.tokenizer.apply_chat_template([one], tokenize=True, return_dict=True) for one in messages
        )
        return [[int(token) for token in chat["input_ids"][0]] for chat in chats]  # a processor gives tensors

    @property
    def _takes_guidance(self) -> bool:
        return bool(self.pipeline.transformer.config.guidance_embeds)

    @property
    def _scale(self) -> float:
        return GUIDANCE_SCALE if self.guidance_scale is None else self.guidance_scale

    @property
    def _distilled_guidance(self) -> float:
        return self._scale


@dataclass(frozen=True, kw_only=True, eq=False)
class Flux2Denoiser(AttentiveDenoiser):
    """A FLUX.2 transformer in one run, as a guide sees it."""

    prompt_embeds: Tensor | None = None
    """The plans' prompts, where there is a negative prompt to tell them from: the pipeline copies both."""

    def branches(self, kwargs: ForwardKwargs) -> Branches:
        rows = range(len(kwargs["hidden_states"]))
        if self.prompt_embeds is None or torch.equal(kwargs["encoder_hidden_states"], self.prompt_embeds):
            return Branches(cond=rows)
        return Branches(cond=range(0), uncond=rows)

    def with_prompt_embeds(
        self, kwargs: ForwardKwargs, rows: Sequence[int], prompts: Sequence[EncodedPrompt]
    ) -> dict[str, Any]:
        some = list(rows)
        by_row = ("hidden_states", "timestep", "guidance", "img_ids", "txt_ids")
        of_rows = {name: kwargs[name][some] for name in by_row if kwargs[name] is not None}
        return {
            **kwargs,
            **of_rows,
            "encoder_hidden_states": torch.cat([text.conditioning["prompt_embeds"] for text in prompts]),
        }

    @property
    def sites(self) -> Sequence[AttentionSite]:
        transformer: Any = self.module
        layers = (*transformer.transformer_blocks, *transformer.single_transformer_blocks)
        return [AttentionSite(layer.attn, block) for block, layer in enumerate(layers)]

    def noise_level(self, kwargs: ForwardKwargs) -> float:
        return float(kwargs["timestep"][0])

    def append_prompts(
        self, kwargs: ForwardKwargs, prompts: Sequence[Sequence[EncodedPrompt]], *, trim_padding: bool
    ) -> tuple[dict[str, Any], list[tuple[Span, ...]]]:
        # A token's place in its prompt is the last of four coordinates, and all rows of a batch share the first row's.
        slots = llm_encoders.slotted(
            kwargs["encoder_hidden_states"], prompts, name="prompt_embeds", trim_padding=trim_padding
        )
        places = kwargs["txt_ids"].new_zeros(*slots.tokens.shape[:2], kwargs["txt_ids"].shape[-1])
        places[..., -1] = slots.positions
        image = Span("image", math.prod(self.grid))
        return (
            {**kwargs, "encoder_hidden_states": slots.tokens, "txt_ids": places},
            [(*of_row, image) for of_row in slots.spans],
        )

    def token_stream(self, layer: str) -> Literal["image", "text", "joint"] | None:
        if "norm" in layer or "modulation" in layer or layer.startswith("time_"):
            return None
        if layer.startswith("single_transformer_blocks"):
            return "joint"
        of_prompt = ("context_embedder", ".ff_context.", ".add_q_proj", ".add_k_proj", ".add_v_proj", ".to_add_out")
        return "text" if any(part in layer for part in of_prompt) else "image"

    def processor(
        self, site: AttentionSite, attention_fn: AttentionFn
    ) -> RegionalFlux2Processor | RegionalFlux2ParallelProcessor:
        return regional_processor(site.attention, attention_fn)
