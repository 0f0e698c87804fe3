"""Qwen-Image (Qwen team, 2025): an MMDiT with a vision-language model as its text encoder.

Text: the last hidden states of Qwen2.5-VL of the prompt in a chat template, without the template's own first tokens; a
prompt is as long as it is, and a mask hides the padding of a batch. Guidance: classifier-free (``true_cfg_scale``) in two
calls of the transformer. Attention: double-stream blocks only, the text's tokens before the image's; the text's positions
begin where the image's end. Noise: velocity at sigmas shifted by picture size and stretched to end early. Latents are
normalized channel by channel; an image token is a 2 x 2 patch of them.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal, final

import torch
from diffusers import (
    QwenImageEditPipeline,
    QwenImageImg2ImgPipeline,
    QwenImageInpaintPipeline,
    QwenImagePipeline,
)
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit as upstream
from einops import rearrange
from PIL.Image import Image
from torch import Tensor

from artaug.canvas import Canvas
from artaug.diffusion.encodings import kept_encoding
from artaug.diffusion.families import common, llm_encoders
from artaug.diffusion.families.base import Family
from artaug.diffusion.families.canvases import PipelineCall, start_images
from artaug.diffusion.families.qwen_image.attention import RegionalQwenImageProcessor
from artaug.diffusion.families.tokenized import TokenizedPrompt, tokenize_chat
from artaug.errors import GuideError, ModelError
from artaug.lora.formats import QWEN_IMAGE, KeyMap
from artaug.plan import Plan
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
_MAX_SEQUENCE_LENGTH = 1024
_READ_PX = 1024 * 1024
"""Pixels to which the pipeline of Qwen-Image-Edit brings every picture, in its own aspect."""


@dataclass(frozen=True, kw_only=True, eq=False)
class QwenImageFamily(Family):
    """What the model that draws and the one that edits have in common."""

    key_map: ClassVar[KeyMap | None] = QWEN_IMAGE

    def __post_init__(self) -> None:
        common.check_components(self.pipeline, _COMPONENTS)
        common.check_size(self.pipeline, width=self.width, height=self.height, multiple=self._token_px)
        common.check_true_cfg(self.negative_prompt, self.true_cfg_scale)
        if self.guidance_scale is not None:
            raise ModelError(
                f"guidance_scale={self.guidance_scale} would be ignored: Qwen-Image takes none as an input. Leave it "
                "out, and set negative_prompt and true_cfg_scale."
            )
        if not 1 <= self.max_sequence_length <= _MAX_SEQUENCE_LENGTH:
            raise ModelError(
                f"max_sequence_length={self.max_sequence_length}: Qwen-Image reads 1 to {_MAX_SEQUENCE_LENGTH} tokens."
            )

    @property
    def negative(self) -> str | None:
        return self.negative_prompt

    def token_slices(self, prompts: Sequence[str]) -> list[slice]:
        start = self.pipeline.prompt_template_encode_start_idx
        return [slice(0, min(len(chat) - start, self.max_sequence_length)) for chat in self._chat_tokens(prompts)]

    def tokenized(self, prompt: str) -> list[TokenizedPrompt]:
        pipeline = self.pipeline
        chat = tokenize_chat(
            pipeline.tokenizer,
            prompt,
            pipeline.prompt_template_encode.format,
            limit=self.max_sequence_length,
            start=pipeline.prompt_template_encode_start_idx,
        )
        return [chat]

    def pipeline_kwargs(self, conditioning: Conditioning, negative: Conditioning | None) -> Mapping[str, Any]:
        return {
            **common.prompt_kwargs(conditioning, negative),
            "true_cfg_scale": self.true_cfg_scale,
            "max_sequence_length": self.max_sequence_length,  # the pipeline also cuts prompts that are encoded
        }

    def denoiser(self, conditioning: Conditioning) -> Denoiser:
        denoiser = QwenImageDenoiser(module=self.module, grid=self._grid, isolation=self.isolation)
        if self.negative is None:
            return denoiser
        embeds = conditioning["prompt_embeds"]
        negative_embeds = self.encode_prompts([self.negative] * len(embeds))["prompt_embeds"]
        llm_encoders.check_prompts_differ(embeds, negative_embeds, self.negative)
        return replace(denoiser, prompt_embeds=embeds)

    def text_shapes(self) -> Mapping[str, tuple[int, ...]]:
        longest = self.max_sequence_length
        return {
            "prompt_embeds": (longest, self.pipeline.transformer.config.joint_attention_dim),
            "prompt_embeds_mask": (longest,),
        }

    @property
    def noise_schedule(self) -> FlowMatching:
        """Velocity at sigmas shifted, and stretched to end early, as this scheduler does at this size."""
        return common.shifted_flow(self.pipeline.scheduler.config, tokens=math.prod(self._grid))

    @torch.no_grad()
    def encode_images(self, images: Sequence[Image]) -> Tensor:
        vae = self.pipeline.vae
        pixels = common.image_pixels(self.pipeline, images, width=self.width, height=self.height)
        # The VAE is one of videos: (batch, channels, frames, rows, columns), here with one frame.
        latents = vae.encode(pixels.unsqueeze(2)).latent_dist.mode().float().squeeze(2)
        mean, std = self._channel_statistics(latents)
        return common.pack_latents((latents - mean) / std)

    def decode_latents(self, latents: Tensor) -> Tensor:
        mean, std = self._channel_statistics(latents)
        unscaled = common.unpack_latents(latents, *self._grid) * std + mean
        return common.decode(self.pipeline, unscaled.unsqueeze(2)).squeeze(2)  # one frame

    def _channel_statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the VAE's latents: (channels, 1, 1)."""
        config = self.pipeline.vae.config
        mean, std = (like.new_tensor(channels) for channels in (config.latents_mean, config.latents_std))
        return rearrange(mean, "c -> c 1 1"), rearrange(std, "c -> c 1 1")

    def encode_masks(self, masks: Tensor) -> Tensor:
        latents = common.latent_masks(self.pipeline, masks, width=self.width, height=self.height)
        return common.pack_latents(latents)

    def predict(self, noisy: Tensor, sigmas: Tensor, conditioning: Conditioning) -> Tensor:
        embeds = conditioning["prompt_embeds"]
        velocity: Tensor = self.pipeline.transformer(
            hidden_states=noisy.to(embeds),
            timestep=sigmas.to(embeds),
            encoder_hidden_states=embeds,
            encoder_hidden_states_mask=_drop_full_mask(conditioning["prompt_embeds_mask"]),
            img_shapes=[[(1, *self._grid)]] * len(noisy),
            return_dict=False,
        )[0]
        return velocity.to(noisy)

    def _chat_tokens(self, prompts: Sequence[str]) -> list[list[int]]:
        """The tokens of each prompt in its chat template, before any cut."""
        chats = [self.pipeline.prompt_template_encode.format(prompt) for prompt in prompts]
        return [list(self.pipeline.tokenizer(chat, verbose=False).input_ids) for chat in chats]

    @property
    def _token_px(self) -> int:
        """Pixels on a side of one image token: the VAE's factor times the 2 x 2 packing."""
        return 2 * int(self.pipeline.vae_scale_factor)

    @property
    def _grid(self) -> tuple[int, int]:
        return self.height // self._token_px, self.width // self._token_px


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class QwenImage(QwenImageFamily):
    """Qwen-Image, drawing from a prompt.

    Guidance is classifier-free, by ``negative_prompt`` and ``true_cfg_scale``; the model's authors recommend ``" "``
    and 4. There is no ``guidance_scale``.

    Prompts of regions are encoded one by one: the encoder pads a batch to its longest prompt, so that the length of one
    region's prompt would decide how the others are rounded.

    Raises:
        ModelError: for a pipeline that lacks a component, a size that is not whole image tokens, a guidance scale, a negative
            prompt or a ``true_cfg_scale`` that would be ignored, or a ``max_sequence_length`` outside [1, 1024].
    """

    pipeline_class: ClassVar[type] = QwenImagePipeline
    image_to_image_class: ClassVar[type | None] = QwenImageImg2ImgPipeline
    inpainting_class: ClassVar[type | None] = QwenImageInpaintPipeline
    text_encoders: ClassVar[Mapping[str, str]] = {"qwen25_7b": "text_encoder"}

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        pipeline, limit = self.pipeline, self.max_sequence_length
        tokens = llm_encoders.chat_tokens(
            prompts,
            self._chat_tokens(prompts),
            pipeline.tokenizer,
            reader="Qwen-Image",
            limit=limit,
            start=pipeline.prompt_template_encode_start_idx,
        )

        encode = partial(self.encode_differentiably, prompts)
        return kept_encoding(pipeline, (type(self), pipeline.tokenizer_max_length, tokens), encode)

    def encode_differentiably(self, prompts: Sequence[str]) -> Conditioning:
        embeds, mask = self.pipeline.encode_prompt(list(prompts), max_sequence_length=self.max_sequence_length)
        return {"prompt_embeds": embeds, "prompt_embeds_mask": _full_mask(embeds) if mask is None else mask}


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class QwenImageEdit(QwenImageFamily):
    """Qwen-Image-Edit: edits the picture of a canvas as the prompt says; a plan without one is refused.

    Its language model reads the picture with the prompt, and the tokens of the picture follow those of the noise. The pipeline of diffusers
    brings every picture to about a megapixel: only canvases that have such a size already are taken (1024 x 1024, 1184 x 896, ...),
    since the result would be shifted against any other.

    Guidance is that of `QwenImage`.

    Raises:
        ModelError: as `QwenImage`.
    """

    pipeline_class: ClassVar[type] = QwenImageEditPipeline
    edits: ClassVar[bool] = True
    needs_canvas: ClassVar[bool] = True

    def canvas_steps(self, canvas: Canvas, steps: int) -> int:
        width, height = canvas.size or (self.width, self.height)
        read_width, read_height, _ = upstream.calculate_dimensions(_READ_PX, width / height)
        if (read_width, read_height) != (width, height):
            raise ModelError(
                f"{canvas!r} is of {width} x {height} pixels, and Qwen-Image-Edit would bring it to {read_width} x {read_height}, so "
                "that the result is shifted against it. Resize it, and set the synthesizer's width and height to that."
            )
        return super().canvas_steps(canvas, steps)

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """A prompt is read with the picture that it edits.

        Raises:
            ModelError: always; see `encode_plans`.
        """
        raise ModelError("Qwen-Image-Edit reads a prompt with its picture. Pass plans with canvases to encode_plans.")

    def encode_plans(self, plans: Sequence[Plan]) -> Conditioning:
        return self._encode([plan.prompt for plan in plans], plans)

    def encode_negative(self, plans: Sequence[Plan]) -> Conditioning | None:
        return None if self.negative is None else self._encode([self.negative] * len(plans), plans)

    def pipeline_call(self, canvases: Sequence[Canvas]) -> PipelineCall:
        pictures = start_images(canvases)
        return PipelineCall(self.pipeline, {"width": self.width, "height": self.height, "image": pictures})

    @torch.no_grad()
    def _encode(self, prompts: Sequence[str], plans: Sequence[Plan]) -> Conditioning:
        pictures = start_images([plan.canvas for plan in plans if plan.canvas is not None])
        embeds, mask = self.pipeline.encode_prompt(list(prompts), image=pictures)
        return {"prompt_embeds": embeds, "prompt_embeds_mask": _full_mask(embeds) if mask is None else mask}


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class QwenImageDenoiser(AttentiveDenoiser):
    """A Qwen-Image transformer in one run, as a guide sees it."""

    prompt_embeds: Tensor | None = None
    """The plans' prompts, if the run has a negative prompt. The pipeline copies both, so their values tell the branches."""

    def branches(self, kwargs: ForwardKwargs) -> Branches:
        is_cond = self.prompt_embeds is None or torch.equal(kwargs["encoder_hidden_states"], self.prompt_embeds)
        return common.separate_branches(len(kwargs["hidden_states"]), is_cond=is_cond)

    def with_prompt_embeds(
        self, kwargs: ForwardKwargs, rows: Sequence[int], prompts: Sequence[EncodedPrompt]
    ) -> dict[str, Any]:
        selected = list(rows)
        embeds, mask = llm_encoders.pad_rows(
            [text.conditioning["prompt_embeds"][0][text.token_slice] for text in prompts]
        )
        return {
            **kwargs,
            "hidden_states": kwargs["hidden_states"][selected],
            "timestep": kwargs["timestep"][selected],
            "encoder_hidden_states": embeds,
            "encoder_hidden_states_mask": _drop_full_mask(mask),
            "img_shapes": [kwargs["img_shapes"][row] for row in selected],
        }

    @property
    def sites(self) -> Sequence[AttentionSite]:
        transformer: Any = self.module
        return [AttentionSite(layer.attn, block) for block, layer in enumerate(transformer.transformer_blocks)]

    def noise_level(self, kwargs: ForwardKwargs) -> float:
        return float(kwargs["timestep"][0])

    def append_prompts(
        self, kwargs: ForwardKwargs, prompts: Sequence[Sequence[EncodedPrompt]], *, trim_padding: bool
    ) -> tuple[dict[str, Any], list[tuple[Span, ...]]]:
        mask = kwargs["encoder_hidden_states_mask"]
        slots = llm_encoders.slot_padded(
            kwargs["encoder_hidden_states"],
            prompts,
            name="prompt_embeds",
            trim_padding=trim_padding,
            lengths=None if mask is None else mask.sum(dim=1).tolist(),
        )
        self._check_positions(slots.positions)
        image = Span("image", math.prod(self.grid))
        changed = {
            **kwargs,
            "encoder_hidden_states": slots.tokens,
            "encoder_hidden_states_mask": None,
            "attention_kwargs": {**(kwargs.get("attention_kwargs") or {}), "text_positions": slots.positions},
        }
        return changed, [(*row_spans, image) for row_spans in slots.spans]

    def token_stream(self, layer: str) -> Literal["image", "text", "joint"] | None:
        if "norm" in layer or "_mod." in layer or layer.startswith("time_"):
            return None
        text_layers = ("txt_", ".add_q_proj", ".add_k_proj", ".add_v_proj", ".to_add_out")
        return "text" if any(part in layer for part in text_layers) else "image"

    def processor(self, site: AttentionSite, attention_fn: AttentionFn) -> RegionalQwenImageProcessor:
        return RegionalQwenImageProcessor.for_layer(site.attention, attention_fn)

    def _check_positions(self, positions: Tensor) -> None:
        """Refuse a prompt beyond the model's positions: text begins half the image's larger side from its middle."""
        transformer: Any = self.module
        available = len(transformer.pos_embed.pos_freqs) - max(self.grid) // 2
        if len(positions) and (longest := int(positions.max()) + 1) > available:
            raise GuideError(
                f"a prompt of {longest} tokens is longer than the {available} positions this model has left beside "
                f"{self.grid[0]} x {self.grid[1]} image tokens. Shorten it, or lower max_sequence_length."
            )


def _full_mask(embeds: Tensor) -> Tensor:
    """The mask that the pipeline does not make, since it would hide nothing."""
    return torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device)


def _drop_full_mask(mask: Tensor) -> Tensor | None:
    """A mask as the pipeline passes it on: None where it would hide nothing."""
    return None if mask.all() else mask
