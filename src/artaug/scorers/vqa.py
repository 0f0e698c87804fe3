"""VQAScore: how sure a vision-language model is that a picture shows what its prompt says."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self, final

import torch
from PIL.Image import Image
from torch import Tensor

from artaug.errors import InvalidValueError, ModelError
from artaug.scorers.loading import Processor, checked, load_model, matched, shown, slices
from artaug.scoring import Scorer

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel

QUESTION = 'Does this figure show "{prompt}"? Please answer yes or no.'
"""The question of Lin et al. (2024)."""


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class VQAScore(Scorer):
    """``P("Yes" | picture, question)``: the probability of the next token, in [0, 1] (Lin et al. 2024, eq. 1).

    The probability is taken over the whole vocabulary, at no temperature, of the token right after the question. Of two
    models the surer one scores higher without being the better judge: compare scores of one model only.

    Raises:
        InvalidValueError: if ``answer`` is not one token to this model, or ``batch_size`` is below 1.
        ModelError: for a processor without chat template or padding token, or a model in training mode.

    Example:
        >>> from artaug.scorers import VQAScore
        >>> whole = VQAScore.from_pretrained(  # doctest: +SKIP
        ...     "Qwen/Qwen3-VL-8B-Instruct", question="Are all hands in this picture well drawn? Answer Yes or No."
        ... )
    """

    model: "PreTrainedModel" = field(repr=False)
    """Any model of ``AutoModelForImageTextToText``. It is not altered."""
    processor: Processor = field(repr=False)
    """Its processor, with a chat template."""
    question: str = QUESTION
    """What to ask; ``{prompt}`` in it stands for the prompt, and without it all pictures get the same question."""
    answer: str = "Yes"
    """The answer whose probability is the score, as this model would write it."""
    name: str = ""
    """What tables call it; the model, and the question if it is one of your own, if not given."""
    batch_size: int = field(default=8, repr=False)
    """Pictures the model looks at together."""

    def __post_init__(self) -> None:
        checked(self, model=self.model, batch_size=self.batch_size)
        processor = type(self.processor).__name__
        if getattr(self.processor, "chat_template", None) is None:
            raise ModelError(f"{processor} has no chat template, so there is no way to talk to the model. Set one.")
        if self.processor.tokenizer.pad_token_id is None:
            raise ModelError(f"the tokenizer of {processor} has no padding token. Set processor.tokenizer.pad_token.")
        if len(self._answer) != 1:
            pieces = self.processor.tokenizer.convert_ids_to_tokens(self._answer)
            raise InvalidValueError(
                f"the answer {self.answer!r} is {len(pieces)} tokens to this model, {pieces}: need exactly one."
            )
        if not self.name:
            model = self.model.config.name_or_path
            asked = "" if self.question == QUESTION else f", {self.question!r}"
            object.__setattr__(self, "name", f"VQAScore ({model}{asked})")

    @classmethod
    def from_pretrained(
        cls,
        source: str,
        *,
        question: str = QUESTION,
        answer: str = "Yes",
        revision: str = "main",
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.bfloat16,
        batch_size: int = 8,
    ) -> Self:
        """Load a model and its processor.

        Args:
            source: a folder that ``save_pretrained`` wrote, or a Hub name like ``"Qwen/Qwen3-VL-8B-Instruct"``.
            question: the field.
            answer: the field.
            revision: branch, tag or commit on the Hub.
            device: where to put the model; None for the CPU.
            dtype: of the weights.
            batch_size: the field.

        Raises:
            ModelError: if there is no image-text-to-text model at ``source``, or its weights are pickled or incomplete.
        """
        from transformers import AutoModelForImageTextToText, AutoProcessor  # noqa: PLC0415 - slow to load

        try:
            processor = AutoProcessor.from_pretrained(source, revision=revision)
        except (OSError, ValueError) as fault:
            raise ModelError(f"{source!r} has no processor: {fault}") from fault
        return cls(
            processor=processor,
            model=load_model(AutoModelForImageTextToText, source, revision=revision, device=device, dtype=dtype),
            question=question,
            answer=answer,
            batch_size=batch_size,
        )

    def score(self, image: Image, prompt: str) -> float:
        return self.score_batch([image], [prompt])[0]

    def score_batch(self, images: Sequence[Image], prompts: Sequence[str]) -> list[float]:
        matched(images, prompts)
        pictures, chances = shown(images), []
        for part in slices(len(pictures), self.batch_size):
            chances += self._chances(pictures[part], prompts[part])
        return chances

    @torch.inference_mode()
    def _chances(self, images: Sequence[Image], prompts: Sequence[str]) -> list[float]:
        inputs = self.processor.apply_chat_template(
            [
                _turn(image, self.question.replace("{prompt}", prompt))
                for image, prompt in zip(images, prompts, strict=True)
            ],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            enable_thinking=False,  # where a template knows it
            processor_kwargs={"padding": True, "padding_side": "left"},
        ).to(self.model.device, self.model.dtype)
        # generate, not the model itself, knows the positions of every architecture behind padding on the left.
        said = self.model.generate(**inputs, generation_config=self._one_token)
        logits: Tensor = said.logits[0]
        return [float(chance) for chance in logits.float().softmax(dim=-1)[:, self._answer[0]]]

    @cached_property
    def _answer(self) -> list[int]:
        encoded: list[int] = self.processor.tokenizer.encode(self.answer, add_special_tokens=False)
        return encoded

    @cached_property
    def _one_token(self) -> "GenerationConfig":
        config = copy.deepcopy(self.model.generation_config)
        config.do_sample, config.num_beams, config.num_return_sequences = False, 1, 1
        config.temperature = config.top_p = config.top_k = config.max_length = None
        config.max_new_tokens, config.pad_token_id = 1, self.processor.tokenizer.pad_token_id
        config.output_logits = config.return_dict_in_generate = True  # logits, not scores: before any processor
        return config


def _turn(image: Image, question: str) -> list[dict[str, Any]]:
    content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
    return [{"role": "user", "content": content}]
