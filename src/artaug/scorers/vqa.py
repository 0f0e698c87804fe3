"""VQAScore: the probability that a vision-language model answers yes to a question about a picture and its prompt."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self, final

import torch
from PIL.Image import Image
from torch import Tensor

from artaug.errors import InvalidValueError, ModelError
from artaug.scorers.loading import (
    DEFAULT_OPTIONS,
    LoadOptions,
    TransformersProcessor,
    batch_slices,
    check_counts,
    check_model,
    load_model,
    to_rgb,
)
from artaug.scoring import Scorer

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel

QUESTION = 'Does this figure show "{prompt}"? Please answer yes or no.'
"""The question of Lin et al. (2024)."""
_DEFAULT_BATCH_SIZE = 8


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class VQAScore(Scorer):
    """``P("Yes" | picture, question)``: the probability of the next token, in [0, 1] (Lin et al. 2024, eq. 1).

    The probability is over the whole vocabulary, at temperature 1, of the token right after the question. A more confident
    model scores higher without being more accurate: compare scores of one model only.

    Raises:
        InvalidValueError: if ``answer`` is not one token of this model, or ``batch_size`` is below 1.
        ModelError: for a processor without chat template or padding token, or a model in training mode.

    Example:
        >>> from artaug.scorers import VQAScore
        >>> hands = VQAScore.from_pretrained(  # doctest: +SKIP
        ...     "Qwen/Qwen3-VL-8B-Instruct", question="Are all hands in this picture well drawn? Answer Yes or No."
        ... )
    """

    model: "PreTrainedModel" = field(repr=False)
    """Any model of ``AutoModelForImageTextToText``. It is not altered."""
    processor: TransformersProcessor = field(repr=False)
    """Its processor, with a chat template."""
    question: str = QUESTION
    """The question; ``{prompt}`` in it is replaced by the prompt. Without it all pictures get the same question."""
    answer: str = "Yes"
    """The answer whose probability is the score, as this model writes it."""
    name: str = ""
    """The name in tables; if not given, the model, and the question unless it is the default."""
    batch_size: int = field(default=_DEFAULT_BATCH_SIZE, repr=False)
    """Pictures that go through the model together."""

    def __post_init__(self) -> None:
        check_model(self, model=self.model, batch_size=self.batch_size)
        processor = type(self.processor).__name__
        if getattr(self.processor, "chat_template", None) is None:
            raise ModelError(f"{processor} has no chat template, without which the model gets no question. Set one.")
        if self.processor.tokenizer.pad_token_id is None:
            raise ModelError(f"the tokenizer of {processor} has no padding token. Set processor.tokenizer.pad_token.")
        if len(self._answer_ids) != 1:
            tokens = self.processor.tokenizer.convert_ids_to_tokens(self._answer_ids)
            raise InvalidValueError(
                f"the answer {self.answer!r} is {len(tokens)} tokens of this model, {tokens}: need exactly one."
            )
        if not self.name:
            model = self.model.config.name_or_path
            question = "" if self.question == QUESTION else f", {self.question!r}"
            object.__setattr__(self, "name", f"VQAScore ({model}{question})")

    @classmethod
    def from_pretrained(
        cls,
        source: str,
        *,
        question: str = QUESTION,
        answer: str = "Yes",
        options: LoadOptions = DEFAULT_OPTIONS,
    ) -> Self:
        """Load a model and its processor.

        Args:
            source: a folder that ``save_pretrained`` wrote, or a Hub name like ``"Qwen/Qwen3-VL-8B-Instruct"``.
            question: the field.
            answer: the field.
            options: revision, device, dtype (bfloat16 if None) and batch size (8 if None).

        Raises:
            ModelError: if there is no image-text-to-text model at ``source``, or its weights are pickled or incomplete.
        """
        from transformers import AutoModelForImageTextToText, AutoProcessor  # noqa: PLC0415 - slow to load

        try:
            processor = AutoProcessor.from_pretrained(source, revision=options.revision)
        except (OSError, ValueError) as error:
            raise ModelError(f"{source!r} has no processor: {error}") from error
        return cls(
            processor=processor,
            model=load_model(AutoModelForImageTextToText, source, options, default_dtype=torch.bfloat16),
            question=question,
            answer=answer,
            batch_size=options.batch_size or _DEFAULT_BATCH_SIZE,
        )

    def score(self, image: Image, prompt: str) -> float:
        return self.score_batch([image], [prompt])[0]

    def score_batch(self, images: Sequence[Image], prompts: Sequence[str]) -> list[float]:
        check_counts(images, prompts)
        rgb, probabilities = to_rgb(images), []
        for batch in batch_slices(len(rgb), self.batch_size):
            probabilities += self._probabilities(rgb[batch], prompts[batch])
        return probabilities

    @torch.inference_mode()
    def _probabilities(self, images: Sequence[Image], prompts: Sequence[str]) -> list[float]:
        inputs = self.processor.apply_chat_template(
            [
                _conversation(image, self.question.replace("{prompt}", prompt))
                for image, prompt in zip(images, prompts, strict=True)
            ],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            enable_thinking=False,  # ignored by templates that do not know it
            processor_kwargs={"padding": True, "padding_side": "left"},
        ).to(self.model.device, self.model.dtype)
        # By generate, not a forward call: it computes the position ids of every architecture under left padding.
        output = self.model.generate(**inputs, generation_config=self._single_token_config)
        logits: Tensor = output.logits[0]  # of the first new token: (pictures, vocabulary)
        return [float(probability) for probability in logits.float().softmax(dim=-1)[:, self._answer_ids[0]]]

    @cached_property
    def _answer_ids(self) -> list[int]:
        ids: list[int] = self.processor.tokenizer.encode(self.answer, add_special_tokens=False)
        return ids

    @cached_property
    def _single_token_config(self) -> "GenerationConfig":
        config = copy.deepcopy(self.model.generation_config)
        config.do_sample, config.num_beams, config.num_return_sequences = False, 1, 1
        config.temperature = config.top_p = config.top_k = config.max_length = None
        config.max_new_tokens, config.pad_token_id = 1, self.processor.tokenizer.pad_token_id
        config.output_logits = config.return_dict_in_generate = (
            True  # logits: before any logits processor, unlike scores
        )
        return config


def _conversation(image: Image, question: str) -> list[dict[str, Any]]:
    content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
    return [{"role": "user", "content": content}]
