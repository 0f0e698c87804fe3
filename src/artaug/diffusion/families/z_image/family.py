"""The Z-Image family: unpacked latents, prompts as long as they are, the opposite of a velocity as the prediction."""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from diffusers import ZImagePipeline
from PIL.Image import Image
from torch import Tensor, nn

from artaug.diffusion.families import common, llm_encoders
from artaug.diffusion.families.base import Family
from artaug.diffusion.families.z_image.attention import (
    Captions,
    RegionalZImageProcessor,
    captions_in_place,
    padded,
    regional_processor,
)
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
    Output,
    Span,
)
from artaug.training.noise_schedule import FlowMatching

_PARTS = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
_GUIDANCE = 5.0


@dataclass(frozen=True, kw_only=True, eq=False)
class ZImage(Family):
    """Z-Image, base and Turbo.

    ``guidance_scale`` is classifier-free guidance against ``negative_prompt`` or the empty prompt, 5 unless told
    otherwise, and it counts from 0: the prediction moves by so many times its distance to the negative one. 0 is none,
    and what Turbo is made for.

    Raises:
        ModelError: for a pipeline that lacks a part, a size that is not whole image tokens or beyond the model's
            positions, a negative prompt or scale that would be ignored, or a ``max_sequence_length`` beyond the
            positions.
    """

    pipeline_class: ClassVar[type] = ZImagePipeline

    def __post_init__(self) -> None:
        common.check_parts(self.pipeline, _PARTS)
        common.check_size(self.pipeline, width=self.width, height=self.height, multiple=2 * self._latent_px)
        common.check_no_true_cfg(self.pipeline, self.true_cfg_scale)
        if self.negative_prompt is not None and self.negative is None:
            raise ModelError(
                f"negative_prompt={self.negative_prompt!r} would be ignored: guidance_scale={self.guidance_scale} is no "
                "guidance. Leave it out, or set a guidance_scale above 0."
            )
        text, rows, columns = self.pipeline.transformer.config.axes_lens
        # The image is at the place behind its prompt, and that has places from 1.
        longest = (text - 2) // padded(1) * padded(1)
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
        for prompt, chat in zip(prompts, self._chats(prompts), strict=True):
            llm_encoders.warn_if_chat_truncated(
                prompt, chat, reader="Z-Image", tokenizer=self.pipeline.tokenizer, limit=self.max_sequence_length
            )
        rows, _ = self.pipeline.encode_prompt(
            list(prompts), do_classifier_free_guidance=False, max_sequence_length=self.max_sequence_length
        )
        embeds, mask = llm_encoders.stacked(rows)
        return {"prompt_embeds": embeds, "prompt_embeds_mask": mask}

    def token_slices(self, prompts: Sequence[str]) -> list[slice]:
        return [slice(0, min(len(chat), self.max_sequence_length)) for chat in self._chats(prompts)]

    def arguments(self, conditioning: Conditioning, negative: Conditioning | None) -> Mapping[str, Any]:
        return {
            "prompt_embeds": _captions(conditioning),
            "negative_prompt_embeds": None if negative is None else _captions(negative),
            "guidance_scale": self._scale,
        }

    def denoiser(self, conditioning: Conditioning) -> Denoiser:
        return ZImageDenoiser(module=self.module, grid=self._grid, pictures=len(conditioning["prompt_embeds"]))

    @property
    def module(self) -> nn.Module:
        transformer: nn.Module = self.pipeline.transformer
        return transformer

    @property
    def noise_schedule(self) -> FlowMatching:
        """Velocity at sigmas shifted as this scheduler shifts them at this size."""
        return common.shifted_flow(self.pipeline.scheduler.config, tokens=math.prod(self._grid) // 4)

    @torch.no_grad()
    def encode_images(self, images: Sequence[Image]) -> Tensor:
        return common.vae_latents(self.pipeline, images, width=self.width, height=self.height)

    def encode_masks(self, masks: Tensor) -> Tensor:
        return common.latent_masks(self.pipeline, masks, width=self.width, height=self.height)

    def predict(self, noisy: Tensor, sigmas: Tensor, conditioning: Conditioning) -> Tensor:
        """The velocity: the opposite of the model's output, as the pipeline takes it."""
        captions = _captions(conditioning)
        images = noisy.to(captions[0].device, self.pipeline.transformer.dtype).unsqueeze(2)
        cleanness = (1000 - 1000 * sigmas.to(images.device, torch.float32)) / 1000  # in the pipeline's own steps
        against = self.module(list(images.unbind(0)), cleanness, captions, return_dict=False)[0]
        return -torch.stack(against).squeeze(2).to(noisy)

    def _chats(self, prompts: Sequence[str]) -> list[list[int]]:
        """The tokens of each prompt and the chat around it, none cut."""
        tokenizer = self.pipeline.tokenizer
        chats = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True, enable_thinking=True
            )
            for prompt in prompts
        ]
        return [list(tokenizer(chat, verbose=False).input_ids) for chat in chats]

    @property
    def _latent_px(self) -> int:
        """Pixels on a side of one latent pixel; an image token is 2 x 2 of them."""
        return int(self.pipeline.vae_scale_factor)

    @property
    def _grid(self) -> tuple[int, int]:
        return self.height // self._latent_px, self.width // self._latent_px

    @property
    def _scale(self) -> float:
        return _GUIDANCE if self.guidance_scale is None else self.guidance_scale


@dataclass(frozen=True, kw_only=True, eq=False)
class ZImageDenoiser(AttentiveDenoiser):
    """A Z-Image transformer in one run, as a guide sees it. Its predictions are of latent pixels."""

    pictures: int
    """Of the run: where a call has twice as many rows, the later half is for the negative prompt."""

    def branches(self, kwargs: ForwardKwargs) -> Branches:
        return Branches(cond=range(self.pictures), uncond=range(self.pictures, len(kwargs["x"])))

    def with_prompt_embeds(
        self, kwargs: ForwardKwargs, rows: Sequence[int], prompts: Sequence[EncodedPrompt]
    ) -> dict[str, Any]:
        some = list(rows)
        return {
            **kwargs,
            "x": [kwargs["x"][row] for row in some],
            "t": kwargs["t"][some],
            "cap_feats": [_words(text) for text in prompts],
        }

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
        of_texts = [
            AttentionSite(layer.attention, block, "text") for block, layer in enumerate(transformer.context_refiner)
        ]
        of_both = [
            AttentionSite(layer.attention, len(of_texts) + block) for block, layer in enumerate(transformer.layers)
        ]
        return [*of_texts, *of_both]

    def noise_level(self, kwargs: ForwardKwargs) -> float:
        return 1 - float(kwargs["t"][0])

    @contextmanager
    def patched(self) -> Iterator[None]:
        """Let the transformer take what `append_prompts` makes of a call; needed wherever such a call is made."""
        with captions_in_place(self.module):
            yield

    def append_prompts(
        self, kwargs: ForwardKwargs, prompts: Sequence[Sequence[EncodedPrompt]], *, trim_padding: bool
    ) -> tuple[dict[str, Any], list[tuple[Span, ...]]]:
        """As the seam says; what is not ``trim_padding`` has the padding to whole 32 tokens that the model gives a prompt."""
        captions = [
            Captions(own, tuple(_words(text).to(own) for text in of_row), whole=not trim_padding)
            for own, of_row in zip(kwargs["cap_feats"], prompts, strict=True)
        ]
        self._check_positions(captions)
        longest = max(sum(caption.lengths) for caption in captions)
        captions = [dataclasses.replace(caption, filler=longest - sum(caption.lengths)) for caption in captions]
        return {**kwargs, "cap_feats": captions}, [self._spans(caption) for caption in captions]

    def token_stream(self, layer: str) -> Literal["image", "text", "joint"] | None:
        # The layers before the refiners take all rows of a batch as one long sequence, which no row's spans describe.
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
        return regional_processor(site.attention, attention_fn)

    def _spans(self, captions: Captions) -> tuple[Span, ...]:
        count = math.prod(self.token_grid)
        beside = padded(count) - count
        return (
            Span("image", count),
            *([Span("reference", beside)] if beside else []),  # padding that the model sees as it sees the image
            *(Span("text", length, number) for number, length in enumerate(captions.lengths)),
            *([Span("padding", captions.filler)] if captions.filler else []),
        )

    def _check_positions(self, captions: Sequence[Captions]) -> None:
        transformer: Any = self.module
        room = int(transformer.config.axes_lens[0]) - 1
        longest = max((length for one in captions for length in one.lengths), default=0)
        if longest > room:
            raise GuideError(
                f"a prompt of {longest} tokens is longer than the {room} positions of this model. "
                "Shorten it, or lower max_sequence_length."
            )


def _captions(conditioning: Conditioning) -> list[Tensor]:
    """Encoded prompts as Z-Image takes them: each as long as it is."""
    lengths = conditioning["prompt_embeds_mask"].sum(dim=1).tolist()
    return [row[:length] for row, length in zip(conditioning["prompt_embeds"], lengths, strict=True)]


def _words(text: EncodedPrompt) -> Tensor:
    words: Tensor = text.conditioning["prompt_embeds"][0][text.token_slice]
    return words
