"""FLUX.2 klein (Black Forest Labs, 2026): FLUX.2 with Qwen3 as its text encoder.

Guidance: a base model has classifier-free guidance in two calls of the transformer; a distilled one has none.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, final

from diffusers import Flux2KleinPipeline

from artaug.diffusion.families import common, llm_encoders
from artaug.diffusion.families.flux2.family import GUIDANCE_SCALE, Flux2Denoiser, Flux2Family
from artaug.errors import ModelError
from artaug.regional.denoiser import Conditioning, Denoiser


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
        common.check_no_cache(self.module)
        denoiser = Flux2Denoiser(module=self.module, grid=self._grid, isolation=self.isolation)
        if self.negative is None:
            return denoiser
        embeds = conditioning["prompt_embeds"]
        negative_embeds = self.encode_prompts([self.negative] * len(embeds))["prompt_embeds"]
        llm_encoders.check_prompts_differ(embeds, negative_embeds, self.negative)
        return replace(denoiser, prompt_embeds=embeds)

    def _chat_tokens(self, prompts: Sequence[str]) -> list[list[int]]:
        tokenizer = self.pipeline.tokenizer
        chats = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True, enable_thinking=False
            )
            for prompt in prompts
        ]
        return [list(tokenizer(chat, verbose=False).input_ids) for chat in chats]

    @property
    def _is_distilled(self) -> bool:
        return bool(self.pipeline.config.is_distilled)

    @property
    def _scale(self) -> float:
        if self._is_distilled:
            return 1.0
        return GUIDANCE_SCALE if self.guidance_scale is None else self.guidance_scale

    @property
    def _distilled_guidance(self) -> None:
        return None
