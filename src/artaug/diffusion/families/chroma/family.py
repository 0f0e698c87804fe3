"""Chroma (lodestones, Chroma1-HD, 2025): FLUX.1 schnell's transformer, smaller, not distilled.

Text: T5 XXL alone; its padding is masked in T5, and all but the first padding token in the transformer, in diffusers' way (see
`artaug.diffusion.families.chroma.attention`). Guidance: classifier-free in two calls of the transformer. Attention: FLUX's
double-stream and single-stream blocks, the text's tokens before the image's; all text tokens have position 0. Modulation
comes from one small network, the approximator, in place of a layer in every block. Noise: velocity at sigmas as the scheduler
shifts them. An image token is a 2 x 2 patch of latent pixels.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal, final

import torch
from diffusers import ChromaImg2ImgPipeline, ChromaPipeline
from PIL.Image import Image
from torch import Tensor, nn

from artaug._internal.modules import outside_graphs
from artaug.diffusion.encodings import kept_encoding
from artaug.diffusion.families import common
from artaug.diffusion.families.base import Family
from artaug.diffusion.families.chroma.attention import RegionalChromaProcessor
from artaug.diffusion.families.tokenized import TokenizedPrompt, tokenize_prompt
from artaug.errors import ModelError
from artaug.lora.formats import FLUX1, Format, KeyMap, KeyRow
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
    bind_forward_args,
)
from artaug.training.noise_schedule import FlowMatching

_COMPONENTS = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
_MAX_SEQUENCE_LENGTH = 512
_GUIDANCE_SCALE = 5.0
_APPROXIMATOR = "distilled_guidance_layer"

_APPROXIMATOR_ROWS = (
    *KeyRow.unchanged(f"{_APPROXIMATOR}.in_proj", f"{_APPROXIMATOR}.out_proj"),
    *KeyRow.renamed(
        f"{_APPROXIMATOR}.layers.{{}}",
        f"{_APPROXIMATOR}.layers.{{}}",
        {"in_layer": "linear_1", "out_layer": "linear_2"},
    ),
)
# diffusers reads Chroma's LoRAs with FLUX's converters, which do not know the approximator.
_UNSUPPORTED = frozenset(row.original for row in _APPROXIMATOR_ROWS)

CHROMA = KeyMap(
    name="Chroma",
    rows=(
        *(row for row in FLUX1.rows if not any("norm" in name or "time_" in name for name in row.diffusers)),
        *_APPROXIMATOR_ROWS,
    ),
    key_formats={
        name: key_format
        if name is Format.PEFT
        else replace(key_format, unsupported=key_format.unsupported | _UNSUPPORTED)
        for name, key_format in FLUX1.key_formats.items()
    },
)
"""Chroma's layers: FLUX.1's without modulation, and the approximator."""


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Chroma1(Family):
    """Chroma, drawing from a prompt.

    ``guidance_scale`` is classifier-free guidance against ``negative_prompt`` or the empty prompt, 5 by default; at 1 and
    below there is none.

    Raises:
        ModelError: for a pipeline that lacks a component, a size that is not whole image tokens, a negative prompt or scale
            that would be ignored, or a ``max_sequence_length`` outside [1, 512].
    """

    pipeline_class: ClassVar[type] = ChromaPipeline
    image_to_image_class: ClassVar[type | None] = (
        ChromaImg2ImgPipeline  # its inpainting asks for a guidance input, which Chroma has not
    )
    key_map: ClassVar[KeyMap | None] = CHROMA
    text_encoders: ClassVar[Mapping[str, str]] = {"t5xxl": "text_encoder"}
    rows_are_independent: ClassVar[bool] = True

    def __post_init__(self) -> None:
        common.check_components(self.pipeline, _COMPONENTS)
        common.check_size(self.pipeline, width=self.width, height=self.height, multiple=self._token_px)
        common.check_no_true_cfg(self.pipeline, self.true_cfg_scale)
        common.check_negative_has_effect(
            self.pipeline, self.negative_prompt, is_guided=self._guidance > 1, scale=self._guidance
        )
        if not 1 <= self.max_sequence_length <= _MAX_SEQUENCE_LENGTH:
            raise ModelError(
                f"max_sequence_length={self.max_sequence_length}: Chroma reads 1 to 512 tokens of a prompt."
            )

    @property
    def negative(self) -> str | None:
        return (self.negative_prompt or "") if self._guidance > 1 else None

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        pipeline, limit = self.pipeline, self.max_sequence_length
        tokens = common.prompt_tokens(
            prompts, pipeline.tokenizer, reader="T5", limit=limit, remedy="Shorten it, or raise max_sequence_length."
        )

        return kept_encoding(pipeline, (type(self), tokens), partial(self.encode_differentiably, prompts))

    def encode_differentiably(self, prompts: Sequence[str]) -> Conditioning:
        embeds, _, mask, *_ = self.pipeline.encode_prompt(
            list(prompts), do_classifier_free_guidance=False, max_sequence_length=self.max_sequence_length
        )
        return {"prompt_embeds": embeds, "prompt_attention_mask": mask}

    def token_slices(self, prompts: Sequence[str]) -> list[slice]:
        # The first padding token counts as the prompt's: Chroma was trained with it unmasked.
        limit = self.max_sequence_length
        tokens = self.pipeline.tokenizer(list(prompts), truncation=True, max_length=limit)
        return [slice(0, min(len(prompt_tokens) + 1, limit)) for prompt_tokens in tokens.input_ids]

    def tokenized(self, prompt: str) -> list[TokenizedPrompt]:
        tokenizer = self.pipeline.tokenizer
        convert = partial(self.pipeline.maybe_convert_prompt, tokenizer=tokenizer)
        return [tokenize_prompt(tokenizer, prompt, limit=self.max_sequence_length, convert=convert)]

    def pipeline_kwargs(self, conditioning: Conditioning, negative: Conditioning | None) -> Mapping[str, Any]:
        return {**common.prompt_kwargs(conditioning, negative), "guidance_scale": self._guidance}

    def denoiser(self, conditioning: Conditioning) -> Denoiser:
        return ChromaDenoiser(
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
        embeds = conditioning["prompt_embeds"]
        attention_mask = _add_image(conditioning["prompt_attention_mask"].to(embeds), math.prod(self._grid))
        img_ids = self.pipeline._prepare_latent_image_ids(  # noqa: SLF001 - diffusers' own trainers do
            len(noisy), *self._grid, embeds.device, embeds.dtype
        )
        with _checkpointing_keeps_masks(self.module):
            velocity: Tensor = self.pipeline.transformer(
                hidden_states=noisy.to(embeds),
                timestep=sigmas.to(embeds),
                encoder_hidden_states=embeds,
                txt_ids=torch.zeros(embeds.shape[1], 3, device=embeds.device, dtype=embeds.dtype),
                img_ids=img_ids,
                attention_mask=attention_mask,
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
    def _guidance(self) -> float:
        return _GUIDANCE_SCALE if self.guidance_scale is None else self.guidance_scale


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class ChromaDenoiser(AttentiveDenoiser):
    """A Chroma transformer in one run, as a guide sees it."""

    prompt_embeds: Tensor
    """The tensor that the pipeline was given. The pipeline passes it on, not a copy, which tells the branches apart."""

    def with_gradients(self) -> AbstractContextManager[None]:
        return _checkpointing_keeps_masks(self.module)

    def branches(self, kwargs: ForwardKwargs) -> Branches:
        is_cond = kwargs["encoder_hidden_states"] is self.prompt_embeds
        return common.separate_branches(len(kwargs["hidden_states"]), is_cond=is_cond)

    def with_prompt_embeds(
        self, kwargs: ForwardKwargs, rows: Sequence[int], prompts: Sequence[EncodedPrompt]
    ) -> dict[str, Any]:
        selected = list(rows)
        text_mask = torch.cat([prompt.conditioning["prompt_attention_mask"] for prompt in prompts])
        return {
            **kwargs,
            **{name: kwargs[name][selected] for name in ("hidden_states", "timestep")},
            "encoder_hidden_states": torch.cat([prompt.conditioning["prompt_embeds"] for prompt in prompts]),
            "attention_mask": _add_image(text_mask, math.prod(self.grid)),
        }

    @property
    def sites(self) -> Sequence[AttentionSite]:
        return common.double_and_single_sites(self.module)

    def noise_level(self, kwargs: ForwardKwargs) -> float:
        return float(kwargs["timestep"][0])

    def append_prompts(
        self, kwargs: ForwardKwargs, prompts: Sequence[Sequence[EncodedPrompt]], *, trim_padding: bool
    ) -> tuple[dict[str, Any], list[tuple[Span, ...]]]:
        # Every text token is at position 0 of the image's grid, so more of them need no positions of their own.
        text = kwargs["encoder_hidden_states"]
        joined, spans = common.join_prompts(
            text, prompts, name="prompt_embeds", trim_padding=trim_padding, prepend=True
        )
        # The mask is joined in the same way as the tokens, with one channel instead of theirs.
        masks = [
            [
                replace(prompt, conditioning={"mask": prompt.conditioning["prompt_attention_mask"][..., None]})
                for prompt in row
            ]
            for row in prompts
        ]
        text_mask = kwargs["attention_mask"][:, : text.shape[1], None]
        text_mask, _ = common.join_prompts(text_mask, masks, name="mask", trim_padding=trim_padding, prepend=True)
        token_mask = _add_image(text_mask[..., 0], math.prod(self.grid))
        image = Span("image", math.prod(self.grid))
        changed = {
            **kwargs,
            "encoder_hidden_states": joined,
            "txt_ids": kwargs["txt_ids"].new_zeros(joined.shape[1], kwargs["txt_ids"].shape[-1]),
            "attention_mask": None,
            "joint_attention_kwargs": {**(kwargs.get("joint_attention_kwargs") or {}), "token_mask": token_mask},
        }
        return changed, [(*row_spans, image) for row_spans in spans]

    def token_stream(self, layer: str) -> Literal["image", "text", "joint"] | None:
        return None if layer.startswith(_APPROXIMATOR) else common.mmdit_stream(layer)

    def processor(self, site: AttentionSite, attention_fn: AttentionFn) -> RegionalChromaProcessor:
        return RegionalChromaProcessor.for_layer(site.attention, attention_fn)


def _add_image(text_mask: Tensor, image_tokens: int) -> Tensor:
    """The mask of a sequence from that of its text: every image token counts."""
    return torch.cat([text_mask, text_mask.new_ones(len(text_mask), image_tokens)], dim=1)


@contextmanager
def _checkpointing_keeps_masks(transformer: Any) -> Iterator[None]:  # noqa: ANN401 - untyped
    """Hand masks to blocks that recompute their activations: diffusers 0.42 leaves out that of single-stream blocks, and ours.

    Without them, a prediction with gradient checkpointing would be another one than that of drawing. Guides that change a call
    have to be applied before.
    """
    if not transformer.gradient_checkpointing:
        yield
        return
    checkpoint: Callable[..., Any] = transformer._gradient_checkpointing_func  # noqa: SLF001 - the only way in
    single_blocks = set(transformer.single_transformer_blocks)
    call: dict[str, Any] = {}

    def note_call(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call.update(bind_forward_args(transformer, args, kwargs))

    def masked_checkpoint(block: Any, *inputs: Any) -> Any:  # noqa: ANN401 - as diffusers calls it
        kept = ["joint_attention_kwargs", *(["attention_mask"] if block in single_blocks else [])]
        return checkpoint(partial(block, **{name: call.get(name) for name in kept}), *inputs)

    transformer._gradient_checkpointing_func = masked_checkpoint  # noqa: SLF001 - likewise
    try:
        with transformer.register_forward_pre_hook(outside_graphs(note_call), with_kwargs=True):
            yield
    finally:
        transformer._gradient_checkpointing_func = checkpoint  # noqa: SLF001 - likewise
