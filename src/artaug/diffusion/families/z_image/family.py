"""Z-Image (Alibaba Tongyi, 2025): a single-stream transformer, base and Turbo.

Text: hidden states of Qwen3 of the prompt in a chat template; a prompt is as long as it is, padded to a multiple of 32 tokens.
Guidance: classifier-free, both branches in one batch, the positive first; its scale counts from 0. Attention: two refiners,
of the image's tokens and of the text's, then layers of both, the image's tokens first; positions have three axes, of which the
first counts the tokens of a prompt and places the image behind it. Noise: the output is the negative of a velocity, and the
time input is 1 - sigma. Latents are lists of pictures, not packed.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal, final

import torch
from diffusers import ZImageImg2ImgPipeline, ZImageInpaintPipeline, ZImagePipeline
from PIL.Image import Image
from torch import Tensor

from artaug.diffusion.encodings import kept_encoding
from artaug.diffusion.families import common, llm_encoders
from artaug.diffusion.families.base import Family
from artaug.diffusion.families.tokenized import TokenizedPrompt, tokenize_chat
from artaug.diffusion.families.z_image.attention import (
    JoinedCaptions,
    RegionalZImageProcessor,
    accept_joined_captions,
    padded_length,
)
from artaug.errors import GuideError, ModelError
from artaug.lora.formats import Z_IMAGE, KeyMap
from artaug.regional.denoiser import (
    AttentionFn,
    AttentionSite,
    AttentiveDenoiser,
    Branches,
    Conditioning,
    Denoiser,
    EncodedPrompt,
    ForwardKwargs,
    Output,
    Span,
)
from artaug.training.noise_schedule import FlowMatching

_COMPONENTS = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
_GUIDANCE_SCALE = 5.0


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class ZImage(Family):
    """Z-Image, base and Turbo.

    ``guidance_scale`` is classifier-free guidance against ``negative_prompt`` or the empty prompt, 5 by default. It counts
    from 0: the prediction is ``cond + guidance_scale * (cond - uncond)``. 0 is none, as Turbo expects.

    Raises:
        ModelError: for a pipeline that lacks a component, a size that is not whole image tokens or beyond the model's
            positions, a negative prompt or scale that would be ignored, or a ``max_sequence_length`` beyond the
            positions.
    """

    pipeline_class: ClassVar[type] = ZImagePipeline
    image_to_image_class: ClassVar[type | None] = ZImageImg2ImgPipeline
    inpainting_class: ClassVar[type | None] = ZImageInpaintPipeline
    key_map: ClassVar[KeyMap | None] = Z_IMAGE
    text_encoders: ClassVar[Mapping[str, str]] = {"qwen3_4b": "text_encoder"}
    rows_are_independent: ClassVar[bool] = True

    def __post_init__(self) -> None:
        common.check_components(self.pipeline, _COMPONENTS)
        common.check_size(self.pipeline, width=self.width, height=self.height, multiple=2 * self._latent_px)
        common.check_no_true_cfg(self.pipeline, self.true_cfg_scale)
        if self.negative_prompt is not None and self.negative is None:
            raise ModelError(
                f"negative_prompt={self.negative_prompt!r} would be ignored: guidance_scale={self.guidance_scale} is no "
                "guidance. Leave it out, or set a guidance_scale above 0."
            )
        text_positions, rows, columns = self.pipeline.transformer.config.axes_lens
        # A prompt's positions count from 1, and the image takes the position behind them.
        longest = (text_positions - 2) // padded_length(1) * padded_length(1)
        if not 1 <= self.max_sequence_length <= longest:
            raise ModelError(
                f"max_sequence_length={self.max_sequence_length}: this Z-Image reads 1 to {longest} tokens of a chat."
            )
        if self._grid[0] > 2 * rows or self._grid[1] > 2 * columns:
            raise ModelError(
                f"a picture of {self.width} x {self.height} pixels has more image tokens than this Z-Image has "
                f"positions: at most {2 * self._latent_px * columns} x {2 * self._latent_px * rows} pixels."
            )

    @property
    def negative(self) -> str | None:
        return (self.negative_prompt or "") if self._scale > 0 else None

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        pipeline, limit = self.pipeline, self.max_sequence_length
        chats = self._chat_tokens(prompts)
        tokens = llm_encoders.chat_tokens(prompts, chats, pipeline.tokenizer, reader="Z-Image", limit=limit)

        return kept_encoding(pipeline, (type(self), tokens), partial(self.encode_differentiably, prompts))

    def encode_differentiably(self, prompts: Sequence[str]) -> Conditioning:
        rows, _ = self.pipeline.encode_prompt(
            list(prompts), do_classifier_free_guidance=False, max_sequence_length=self.max_sequence_length
        )
        embeds, mask = llm_encoders.pad_rows(rows)
        return {"prompt_embeds": embeds, "prompt_embeds_mask": mask}

    def select_prompt(self, conditioning: Conditioning, row: int) -> Conditioning:
        length = int(conditioning["prompt_embeds_mask"][row].sum())
        return {name: column[row : row + 1, :length] for name, column in conditioning.items()}

    def token_slices(self, prompts: Sequence[str]) -> list[slice]:
        return [slice(0, min(len(chat), self.max_sequence_length)) for chat in self._chat_tokens(prompts)]

    def tokenized(self, prompt: str) -> list[TokenizedPrompt]:
        return [tokenize_chat(self.pipeline.tokenizer, prompt, self._chat, limit=self.max_sequence_length)]

    def pipeline_kwargs(self, conditioning: Conditioning, negative: Conditioning | None) -> Mapping[str, Any]:
        return {
            "prompt_embeds": _unpad(conditioning),
            "negative_prompt_embeds": None if negative is None else _unpad(negative),
            "guidance_scale": self._scale,
        }

    def denoiser(self, conditioning: Conditioning) -> Denoiser:
        return ZImageDenoiser(
            module=self.module,
            grid=self._grid,
            isolation=self.isolation,
            pictures=len(conditioning["prompt_embeds"]),
        )

    def text_shapes(self) -> Mapping[str, tuple[int, ...]]:
        longest = self.max_sequence_length
        return {
            "prompt_embeds": (longest, self.pipeline.transformer.config.cap_feat_dim),
            "prompt_embeds_mask": (longest,),
        }

    @property
    def noise_schedule(self) -> FlowMatching:
        """Velocity at sigmas shifted as this scheduler shifts them at this size."""
        return common.shifted_flow(self.pipeline.scheduler.config, tokens=math.prod(self._grid) // 4)

    @torch.no_grad()
    def encode_images(self, images: Sequence[Image]) -> Tensor:
        return common.vae_latents(self.pipeline, images, width=self.width, height=self.height)

    def decode_latents(self, latents: Tensor) -> Tensor:
        return common.vae_pictures(self.pipeline, latents)

    def encode_masks(self, masks: Tensor) -> Tensor:
        return common.latent_masks(self.pipeline, masks, width=self.width, height=self.height)

    @torch.no_grad()
    def initial_noise(self, seeds: Sequence[int], conditioning: Conditioning) -> Tensor:
        # Whatever the type of its prompts is, the pipeline draws in float32.
        return common.prepared_noise(self.pipeline, seeds, width=self.width, height=self.height, dtype=torch.float32)

    def predict(self, noisy: Tensor, sigmas: Tensor, conditioning: Conditioning) -> Tensor:
        """The velocity, which is the negative of the model's output."""
        captions = _unpad(conditioning)
        images = noisy.to(captions[0].device, self.pipeline.transformer.dtype).unsqueeze(2)
        timestep = (1000 - 1000 * sigmas.to(images.device, torch.float32)) / 1000  # rounded as the pipeline rounds it
        outputs = self.pipeline.transformer(list(images.unbind(0)), timestep, captions, return_dict=False)[0]
        return -torch.stack(outputs).squeeze(2).to(noisy)

    def _chat_tokens(self, prompts: Sequence[str]) -> list[list[int]]:
        """The tokens of each prompt in its chat template, before any cut."""
        tokenizer = self.pipeline.tokenizer
        return [list(tokenizer(self._chat(prompt), verbose=False).input_ids) for prompt in prompts]

    def _chat(self, prompt: str) -> str:
        chat: str = self.pipeline.tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True, enable_thinking=True
        )
        return chat

    @property
    def _latent_px(self) -> int:
        """Pixels on a side of one latent pixel; an image token is 2 x 2 latent pixels."""
        return int(self.pipeline.vae_scale_factor)

    @property
    def _grid(self) -> tuple[int, int]:
        return self.height // self._latent_px, self.width // self._latent_px

    @property
    def _scale(self) -> float:
        return _GUIDANCE_SCALE if self.guidance_scale is None else self.guidance_scale


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class ZImageDenoiser(AttentiveDenoiser):
    """A Z-Image transformer in one run, as a guide sees it. Its predictions are of latent pixels."""

    latents_name: ClassVar[str] = "x"
    pictures: int
    """How many pictures the run draws. The second half of a call with twice as many rows has the negative prompt."""

    def branches(self, kwargs: ForwardKwargs) -> Branches:
        return Branches(cond=range(self.pictures), uncond=range(self.pictures, len(kwargs["x"])))

    def with_prompt_embeds(
        self, kwargs: ForwardKwargs, rows: Sequence[int], prompts: Sequence[EncodedPrompt]
    ) -> dict[str, Any]:
        selected = list(rows)
        return {
            **kwargs,
            "x": [kwargs["x"][row] for row in selected],
            "t": kwargs["t"][selected],
            "cap_feats": [_prompt_tokens(prompt) for prompt in prompts],
        }

    def latents_in(self, kwargs: ForwardKwargs) -> Tensor:
        return torch.stack(kwargs["x"][: self.pictures]).squeeze(2)

    def with_latents(self, kwargs: ForwardKwargs, latents: Tensor) -> dict[str, Any]:
        pictures = latents.to(kwargs["x"][0]).unsqueeze(2)
        return {**kwargs, "x": list(pictures.unbind(0)) * (len(kwargs["x"]) // len(latents))}

    def select_rows(self, kwargs: ForwardKwargs, rows: range) -> dict[str, Any]:
        selected = slice(rows.start, rows.stop)
        return {**kwargs, **{name: kwargs[name][selected] for name in ("x", "t", "cap_feats")}}

    def prediction(self, output: Output) -> Tensor:
        return torch.stack(output[0])

    def with_prediction(self, output: Output, prediction: Tensor) -> Output:
        rows = list(prediction.unbind(0))
        if isinstance(output, tuple):
            return (rows, *output[1:])
        return dataclasses.replace(output, sample=rows)

    def broadcast_weights(self, weights: Tensor) -> Tensor:
        return weights

    @property
    def token_grid(self) -> tuple[int, int]:
        rows, columns = self.grid
        return rows // 2, columns // 2

    @property
    def sites(self) -> Sequence[AttentionSite]:
        transformer: Any = self.module
        refiner = [
            AttentionSite(layer.attention, block, "text") for block, layer in enumerate(transformer.context_refiner)
        ]
        joint = [AttentionSite(layer.attention, len(refiner) + block) for block, layer in enumerate(transformer.layers)]
        return [*refiner, *joint]

    def noise_level(self, kwargs: ForwardKwargs) -> float:
        return 1 - float(kwargs["t"][0])

    @contextmanager
    def patched(self) -> Iterator[None]:
        """Let the transformer take the joined captions of `append_prompts`; such a call works only in this block."""
        with accept_joined_captions(self.module):
            yield

    def append_prompts(
        self, kwargs: ForwardKwargs, prompts: Sequence[Sequence[EncodedPrompt]], *, trim_padding: bool
    ) -> tuple[dict[str, Any], list[tuple[Span, ...]]]:
        # With their padding, regions' prompts are as long as the model makes its own: a multiple of 32 tokens.
        captions = [
            JoinedCaptions(
                caption,
                tuple(_prompt_tokens(prompt).to(caption) for prompt in row_prompts),
                pad_regions=not trim_padding,
            )
            for caption, row_prompts in zip(kwargs["cap_feats"], prompts, strict=True)
        ]
        self._check_positions(captions)
        longest = max(sum(caption.lengths) for caption in captions)
        captions = [dataclasses.replace(caption, filler=longest - sum(caption.lengths)) for caption in captions]
        return {**kwargs, "cap_feats": captions}, [self._spans(caption) for caption in captions]

    def token_stream(self, layer: str) -> Literal["image", "text", "joint"] | None:
        # The layers before the refiners take all rows of a batch as one long sequence, so no row's spans fit them.
        if "norm" in layer or "adaLN" in layer:
            return None
        streams: dict[str, Literal["image", "text", "joint"]] = {
            "noise_refiner": "image",
            "context_refiner": "text",
            "layers": "joint",
            "all_final_layer": "joint",
        }
        return streams.get(layer.partition(".")[0])

    def processor(self, site: AttentionSite, attention_fn: AttentionFn) -> RegionalZImageProcessor:
        return RegionalZImageProcessor.for_layer(site.attention, attention_fn)

    def _spans(self, caption: JoinedCaptions) -> tuple[Span, ...]:
        count = math.prod(self.token_grid)
        image_padding = padded_length(count) - count
        return (
            Span("image", count),
            *([Span("reference", image_padding)] if image_padding else []),  # the model attends to it as to the image
            *(Span("text", length, number) for number, length in enumerate(caption.lengths)),
            *([Span("padding", caption.filler)] if caption.filler else []),
        )

    def _check_positions(self, captions: Sequence[JoinedCaptions]) -> None:
        transformer: Any = self.module
        available = int(transformer.config.axes_lens[0]) - 1
        longest = max((length for caption in captions for length in caption.lengths), default=0)
        if longest > available:
            raise GuideError(
                f"a prompt of {longest} tokens is longer than the {available} positions of this model. "
                "Shorten it, or lower max_sequence_length."
            )


def _unpad(conditioning: Conditioning) -> list[Tensor]:
    """Encoded prompts as Z-Image takes them: a list, each as long as it is."""
    lengths = conditioning["prompt_embeds_mask"].sum(dim=1).tolist()
    return [row[:length] for row, length in zip(conditioning["prompt_embeds"], lengths, strict=True)]


def _prompt_tokens(prompt: EncodedPrompt) -> Tensor:
    tokens: Tensor = prompt.conditioning["prompt_embeds"][0][prompt.token_slice]
    return tokens
