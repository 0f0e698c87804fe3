"""The Qwen-Image family: packed and normalized latents, prompts as long as they are, velocity as the prediction."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from diffusers import QwenImagePipeline
from PIL.Image import Image
from torch import Tensor, nn

from artaug.diffusion.families import common, llm_encoders
from artaug.diffusion.families.base import Family
from artaug.diffusion.families.qwen_image.attention import RegionalQwenImageProcessor, regional_processor
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

_PARTS = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
_LONGEST_PROMPT = 1024


@dataclass(frozen=True, kw_only=True, eq=False)
class QwenImage(Family):
    """Qwen-Image, drawing from a prompt.

    Guidance is classifier-free, by ``negative_prompt`` and ``true_cfg_scale``; the model's authors recommend ``" "`` and
    4. There is no ``guidance_scale``.

    Raises:
        ModelError: for a pipeline that lacks a part, a size that is not whole image tokens, a guidance scale, a negative
            prompt or a ``true_cfg_scale`` that would be ignored, or a ``max_sequence_length`` outside [1, 1024].
    """

    pipeline_class: ClassVar[type] = QwenImagePipeline

    def __post_init__(self) -> None:
        common.check_parts(self.pipeline, _PARTS)
        common.check_size(self.pipeline, width=self.width, height=self.height, multiple=self._token_px)
        common.check_true_cfg(self.negative_prompt, self.true_cfg_scale)
        if self.guidance_scale is not None:
            raise ModelError(
                f"guidance_scale={self.guidance_scale} would be ignored: Qwen-Image takes none as an input. Leave it "
                "out, and set negative_prompt and true_cfg_scale."
            )
        if not 1 <= self.max_sequence_length <= _LONGEST_PROMPT:
            raise ModelError(
                f"max_sequence_length={self.max_sequence_length}: Qwen-Image reads 1 to {_LONGEST_PROMPT} tokens."
            )

    @property
    def negative(self) -> str | None:
        return self.negative_prompt

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        start = self.pipeline.prompt_template_encode_start_idx
        for prompt, chat in zip(prompts, self._chats(prompts), strict=True):
            llm_encoders.warn_if_chat_truncated(
                prompt,
                chat[start:],
                reader="Qwen-Image",
                tokenizer=self.pipeline.tokenizer,
                limit=self.max_sequence_length,
            )
        embeds, mask = self.pipeline.encode_prompt(list(prompts), max_sequence_length=self.max_sequence_length)
        whole = torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device)
        return {"prompt_embeds": embeds, "prompt_embeds_mask": whole if mask is None else mask}

    def token_slices(self, prompts: Sequence[str]) -> list[slice]:
        start = self.pipeline.prompt_template_encode_start_idx
        return [slice(0, min(len(chat) - start, self.max_sequence_length)) for chat in self._chats(prompts)]

    def arguments(self, conditioning: Conditioning, negative: Conditioning | None) -> Mapping[str, Any]:
        against = {f"negative_{name}": tensor for name, tensor in (negative or {}).items()}
        return {
            **conditioning,
            **against,
            "true_cfg_scale": self.true_cfg_scale,
            "max_sequence_length": self.max_sequence_length,  # the pipeline cuts what is encoded, too
        }

    def denoiser(self, conditioning: Conditioning) -> Denoiser:
        llm_encoders.check_no_cache(self.module)
        own = conditioning["prompt_embeds"]
        if self.negative is None:
            return QwenImageDenoiser(module=self.module, grid=self._grid)
        against = self.encode_prompts([self.negative] * len(own))["prompt_embeds"]
        llm_encoders.check_apart(own, against, self.negative)
        return QwenImageDenoiser(module=self.module, grid=self._grid, prompt_embeds=own)

    @property
    def module(self) -> nn.Module:
        transformer: nn.Module = self.pipeline.transformer
        return transformer

    @property
    def noise_schedule(self) -> FlowMatching:
        """Velocity at sigmas shifted, and stretched to end early, as this scheduler does at this size."""
        return common.shifted_flow(self.pipeline.scheduler.config, tokens=math.prod(self._grid))

    @torch.no_grad()
    def encode_images(self, images: Sequence[Image]) -> Tensor:
        vae = self.pipeline.vae
        pixels = llm_encoders.checked_pixels(self.pipeline, images, width=self.width, height=self.height)
        latents = vae.encode(pixels.unsqueeze(2)).latent_dist.mode().float().squeeze(2)
        mean, deviation = (
            latents.new_tensor(one).view(1, -1, 1, 1) for one in (vae.config.latents_mean, vae.config.latents_std)
        )
        normalized = (latents - mean) / deviation
        packed: Tensor = self.pipeline._pack_latents(normalized, *normalized.shape)  # noqa: SLF001 - diffusers' trainers do
        return packed

    def encode_masks(self, masks: Tensor) -> Tensor:
        latents = common.latent_masks(self.pipeline, masks, width=self.width, height=self.height)
        packed: Tensor = self.pipeline._pack_latents(latents, *latents.shape)  # noqa: SLF001 - as the latents are
        return packed

    def predict(self, noisy: Tensor, sigmas: Tensor, conditioning: Conditioning) -> Tensor:
        embeds = conditioning["prompt_embeds"]
        velocity: Tensor = self.module(
            hidden_states=noisy.to(embeds),
            timestep=sigmas.to(embeds),
            encoder_hidden_states=embeds,
            encoder_hidden_states_mask=_unless_whole(conditioning["prompt_embeds_mask"]),
            img_shapes=[[(1, *self._grid)]] * len(noisy),
            return_dict=False,
        )[0]
        return velocity.to(noisy)

    def _chats(self, prompts: Sequence[str]) -> list[list[int]]:
        """The tokens of each prompt and the chat around it, none cut."""
        chats = [self.pipeline.prompt_template_encode.format(prompt) for prompt in prompts]
        return [list(self.pipeline.tokenizer(chat, verbose=False).input_ids) for chat in chats]

    @property
    def _token_px(self) -> int:
        """Pixels on a side of one image token: what the VAE shrinks, times the 2 x 2 packing."""
        return 2 * int(self.pipeline.vae_scale_factor)

    @property
    def _grid(self) -> tuple[int, int]:
        return self.height // self._token_px, self.width // self._token_px


@dataclass(frozen=True, kw_only=True, eq=False)
class QwenImageDenoiser(AttentiveDenoiser):
    """A Qwen-Image transformer in one run, as a guide sees it."""

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
        embeds, mask = llm_encoders.stacked(
            [text.conditioning["prompt_embeds"][0][text.token_slice] for text in prompts]
        )
        return {
            **kwargs,
            "hidden_states": kwargs["hidden_states"][some],
            "timestep": kwargs["timestep"][some],
            "encoder_hidden_states": embeds,
            "encoder_hidden_states_mask": _unless_whole(mask),
            "img_shapes": [kwargs["img_shapes"][row] for row in some],
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
        slots = llm_encoders.slotted(
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
            "attention_kwargs": {**(kwargs["attention_kwargs"] or {}), "text_positions": slots.positions},
        }
        return changed, [(*of_row, image) for of_row in slots.spans]

    def token_stream(self, layer: str) -> Literal["image", "text", "joint"] | None:
        if "norm" in layer or "_mod." in layer or layer.startswith("time_"):
            return None
        of_prompt = ("txt_", ".add_q_proj", ".add_k_proj", ".add_v_proj", ".to_add_out")
        return "text" if any(part in layer for part in of_prompt) else "image"

    def processor(self, site: AttentionSite, attention_fn: AttentionFn) -> RegionalQwenImageProcessor:
        return regional_processor(site.attention, attention_fn)

    def _check_positions(self, positions: Tensor) -> None:
        """Texts begin where the image ends, half its larger side from its middle, and there are so many places."""
        transformer: Any = self.module
        room = len(transformer.pos_embed.pos_freqs) - max(self.grid) // 2
        if len(positions) and (longest := int(positions.max()) + 1) > room:
            raise GuideError(
                f"a prompt of {longest} tokens is longer than the {room} positions this model has left beside "
                f"{self.grid[0]} x {self.grid[1]} image tokens. Shorten it, or lower max_sequence_length."
            )


def _unless_whole(mask: Tensor) -> Tensor | None:
    """A mask as the pipeline passes it on: not where it hides nothing."""
    return None if mask.all() else mask
