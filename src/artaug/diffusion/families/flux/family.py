"""FLUX.1 (Black Forest Labs, 2024): a rectified flow transformer.

Text: T5 XXL gives the tokens of a prompt, CLIP ViT-L one pooled vector, which joins the timestep in the modulation.
Guidance: dev is distilled and takes the guidance scale as an input, schnell takes none; classifier-free guidance against a
negative prompt, which diffusers calls true CFG, is a second call of the transformer. Attention: 19 double-stream blocks, then
38 single-stream blocks, the text's tokens before the image's; all text tokens have position 0. Noise: velocity at
sigmas shifted by picture size (dev) or not at all (schnell). An image token is a 2 x 2 patch of latent pixels.
"""

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal, final

import torch
from diffusers import (
    FluxControlNetPipeline,
    FluxImg2ImgPipeline,
    FluxInpaintPipeline,
    FluxKontextPipeline,
    FluxPipeline,
)
from PIL.Image import Image
from torch import Tensor

from artaug.canvas import Canvas
from artaug.diffusion.encodings import kept_encoding
from artaug.diffusion.families import common
from artaug.diffusion.families.base import Family
from artaug.diffusion.families.canvases import PipelineCall, start_images
from artaug.diffusion.families.flux.attention import RegionalFluxProcessor
from artaug.diffusion.families.tokenized import TokenizedPrompt, tokenize_prompt
from artaug.errors import ModelError
from artaug.lora.formats import FLUX1, KeyMap
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


@dataclass(frozen=True, kw_only=True, eq=False)
class FluxFamily(Family):
    """What the models that draw and the one that edits have in common: all but how they read a picture."""

    key_map: ClassVar[KeyMap | None] = FLUX1
    rows_are_independent: ClassVar[bool] = True
    text_encoders: ClassVar[Mapping[str, str]] = {"clip_l": "text_encoder", "t5xxl": "text_encoder_2"}

    def __post_init__(self) -> None:
        common.check_components(self.pipeline, _COMPONENTS)
        common.check_reads_latents_alone(self.pipeline, self.pipeline.transformer, packing=4)
        common.check_no_ip_adapter(self.module)
        common.check_size(self.pipeline, width=self.width, height=self.height, multiple=self._token_px)
        common.check_true_cfg(self.negative_prompt, self.true_cfg_scale)
        if self.guidance_scale is not None and not self._takes_guidance:
            raise ModelError(
                f"guidance_scale={self.guidance_scale} would be ignored: this FLUX model is without guidance "
                "(config.guidance_embeds is False, as in schnell). Leave it out, or set negative_prompt and "
                "true_cfg_scale."
            )
        if not 1 <= self.max_sequence_length <= _MAX_SEQUENCE_LENGTH:
            raise ModelError(f"max_sequence_length={self.max_sequence_length}: FLUX reads 1 to 512 tokens of a prompt.")

    @property
    def negative(self) -> str | None:
        return self.negative_prompt

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        pipeline, limit = self.pipeline, self.max_sequence_length
        clip, remedy = pipeline.tokenizer, "Shorten it; T5 still reads it further."
        tokens = (
            common.prompt_tokens(prompts, clip, reader="CLIP", limit=pipeline.tokenizer_max_length, remedy=remedy),
            common.prompt_tokens(
                prompts,
                pipeline.tokenizer_2,
                reader="T5",
                limit=limit,
                remedy="Shorten it, or raise max_sequence_length.",
            ),
        )

        return kept_encoding(pipeline, (type(self), tokens), partial(self.encode_differentiably, prompts))

    def encode_differentiably(self, prompts: Sequence[str]) -> Conditioning:
        embeds, pooled, _ = self.pipeline.encode_prompt(list(prompts), max_sequence_length=self.max_sequence_length)
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}

    def token_slices(self, prompts: Sequence[str]) -> list[slice]:
        tokens = self.pipeline.tokenizer_2(list(prompts), truncation=True, max_length=self.max_sequence_length)
        return [slice(0, len(prompt_tokens)) for prompt_tokens in tokens.input_ids]

    def tokenized(self, prompt: str) -> list[TokenizedPrompt]:
        # CLIP gives one vector of the whole prompt, and no tokens.
        pipeline, tokenizer = self.pipeline, self.pipeline.tokenizer_2
        # The words of a textual inversion, which the pipeline with a ControlNet does not know.
        knows = hasattr(pipeline, "maybe_convert_prompt")
        convert = partial(pipeline.maybe_convert_prompt, tokenizer=tokenizer) if knows else str
        return [tokenize_prompt(tokenizer, prompt, limit=self.max_sequence_length, convert=convert)]

    def text_shapes(self) -> Mapping[str, tuple[int, ...]]:
        config = self.pipeline.transformer.config
        return {
            "prompt_embeds": (self.max_sequence_length, config.joint_attention_dim),
            "pooled_prompt_embeds": (config.pooled_projection_dim,),
        }

    def pipeline_kwargs(self, conditioning: Conditioning, negative: Conditioning | None) -> Mapping[str, Any]:
        guidance = {} if self._guidance is None else {"guidance_scale": self._guidance}
        return {
            **common.prompt_kwargs(conditioning, negative),
            **guidance,
            "true_cfg_scale": self.true_cfg_scale,
        }

    @abstractmethod
    def pipeline_call(self, canvases: Sequence[Canvas]) -> PipelineCall:
        return super().pipeline_call(canvases)

    def denoiser(self, conditioning: Conditioning) -> Denoiser:
        return FluxDenoiser(
            module=self.module, grid=self._grid, isolation=self.isolation, prompt_embeds=conditioning["prompt_embeds"]
        )

    @property
    def noise_schedule(self) -> FlowMatching:
        """Velocity at sigmas shifted as this scheduler shifts them at this size."""
        return common.shifted_flow(self.pipeline.scheduler.config, tokens=math.prod(self._grid))

    def encode_images(self, images: Sequence[Image]) -> Tensor:
        latents = common.vae_latents(self.pipeline, images, width=self.width, height=self.height)
        return common.pack_latents(latents)

    def decode_latents(self, latents: Tensor) -> Tensor:
        return common.vae_pictures(self.pipeline, common.unpack_latents(latents, *self._grid))

    def encode_masks(self, masks: Tensor) -> Tensor:
        latents = common.latent_masks(self.pipeline, masks, width=self.width, height=self.height)
        return common.pack_latents(latents)

    def predict(self, noisy: Tensor, sigmas: Tensor, conditioning: Conditioning) -> Tensor:
        embeds, pooled = conditioning["prompt_embeds"], conditioning["pooled_prompt_embeds"]
        batch = noisy.shape[0]
        img_ids = self.pipeline._prepare_latent_image_ids(  # noqa: SLF001 - diffusers' own trainers do
            batch, *self._grid, embeds.device, embeds.dtype
        )
        velocity: Tensor = self.pipeline.transformer(
            hidden_states=noisy.to(embeds),
            timestep=sigmas.to(embeds),
            guidance=None if self._guidance is None else torch.full((batch,), self._guidance, device=embeds.device),
            pooled_projections=pooled,
            encoder_hidden_states=embeds,
            txt_ids=torch.zeros(embeds.shape[1], 3, device=embeds.device, dtype=embeds.dtype),
            img_ids=img_ids,
            return_dict=False,
        )[0]
        return velocity.to(noisy)

    @property
    def _token_px(self) -> int:
        """Pixels on a side of one image token: the VAE's factor times the 2 x 2 packing."""
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


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Flux(FluxFamily):
    """FLUX.1: dev, schnell, and what was made from them.

    ``guidance_scale`` is the distilled guidance that a dev model takes as an input, 3.5 by default; a schnell model takes
    none. Training predicts at the same guidance as drawing.

    Raises:
        ModelError: for a pipeline that lacks a component, a size that is not whole image tokens, a guidance scale for a
            model without guidance, or a ``max_sequence_length`` outside [1, 512].
    """

    pipeline_class: ClassVar[type] = FluxPipeline
    image_to_image_class: ClassVar[type | None] = FluxImg2ImgPipeline
    inpainting_class: ClassVar[type | None] = FluxInpaintPipeline
    control_class: ClassVar[type | None] = FluxControlNetPipeline
    control_argument: ClassVar[str] = "control_image"

    def pipeline_call(self, canvases: Sequence[Canvas]) -> PipelineCall:
        return super().pipeline_call(canvases)


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class FluxKontext(FluxFamily):
    """FLUX.1 Kontext: edits the picture of a canvas as the prompt says, and draws without one.

    The tokens of the picture follow those of the noise. The picture is read at its own size, where the pipeline of diffusers would
    bring it to one of the 17 sizes of its training, so that the result would be shifted against it: with these sizes, about a
    megapixel (1024 x 1024, 880 x 1184, ...), it works best.

    Raises:
        ModelError: as `Flux`.
    """

    pipeline_class: ClassVar[type] = FluxKontextPipeline
    edits: ClassVar[bool] = True

    def pipeline_call(self, canvases: Sequence[Canvas]) -> PipelineCall:
        # By its default of max_area, the pipeline would draw a megapixel whatever the size.
        kwargs: dict[str, Any] = {"width": self.width, "height": self.height, "max_area": self.width * self.height}
        if canvases:
            kwargs |= {"image": start_images(canvases), "_auto_resize": False}
        return PipelineCall(self.pipeline, kwargs)

    @torch.no_grad()
    def initial_noise(self, seeds: Sequence[int], conditioning: Conditioning) -> Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        channels, dtype = self.pipeline.latent_channels, conditioning["prompt_embeds"].dtype
        latents: Tensor = self.pipeline.prepare_latents(
            None, len(seeds), channels, self.height, self.width, dtype, self.device, generators
        )[0]
        return latents.float()


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class FluxDenoiser(AttentiveDenoiser):
    """A FLUX transformer in one run, as a guide sees it."""

    prompt_embeds: Tensor
    """The tensor that the pipeline was given. The pipeline passes it on, not a copy, which tells the branches apart."""

    def branches(self, kwargs: ForwardKwargs) -> Branches:
        is_cond = kwargs["encoder_hidden_states"] is self.prompt_embeds
        return common.separate_branches(len(kwargs["hidden_states"]), is_cond=is_cond)

    def with_prompt_embeds(
        self, kwargs: ForwardKwargs, rows: Sequence[int], prompts: Sequence[EncodedPrompt]
    ) -> dict[str, Any]:
        selected = list(rows)
        by_row = ("hidden_states", "timestep", "guidance")
        by_block = ("controlnet_block_samples", "controlnet_single_block_samples")
        return {
            **kwargs,
            **{name: [block[selected] for block in kwargs[name]] for name in by_block if kwargs.get(name) is not None},
            **{name: kwargs[name][selected] for name in by_row if kwargs[name] is not None},
            "encoder_hidden_states": torch.cat([prompt.conditioning["prompt_embeds"] for prompt in prompts]),
            "pooled_projections": torch.cat([prompt.conditioning["pooled_prompt_embeds"] for prompt in prompts]),
        }

    @property
    def sites(self) -> Sequence[AttentionSite]:
        return common.double_and_single_sites(self.module)

    def noise_level(self, kwargs: ForwardKwargs) -> float:
        return float(kwargs["timestep"][0])

    def append_prompts(
        self, kwargs: ForwardKwargs, prompts: Sequence[Sequence[EncodedPrompt]], *, trim_padding: bool
    ) -> tuple[dict[str, Any], list[tuple[Span, ...]]]:
        # Every text token of FLUX is at position 0 of the image's grid, so more of them need no positions of their own.
        joined, spans = common.join_prompts(
            kwargs["encoder_hidden_states"], prompts, name="prompt_embeds", trim_padding=trim_padding, prepend=True
        )
        txt_ids = kwargs["txt_ids"].new_zeros(joined.shape[1], kwargs["txt_ids"].shape[-1])
        image = Span("image", math.prod(self.grid))
        return (
            {**kwargs, "encoder_hidden_states": joined, "txt_ids": txt_ids},
            [(*row_spans, image) for row_spans in spans],
        )

    def token_stream(self, layer: str) -> Literal["image", "text", "joint"] | None:
        return common.mmdit_stream(layer)

    def processor(self, site: AttentionSite, attention_fn: AttentionFn) -> RegionalFluxProcessor:
        return RegionalFluxProcessor.for_layer(site.attention, attention_fn)
