"""VQAScore: the probability that a vision-language model answers yes to a question about a picture and its prompt."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Self, final

from PIL.Image import Image
from torch import Tensor, nn

from artaug._internal.annotations import checked
from artaug.errors import InvalidValueError
from artaug.scorers.loading import (
    DEFAULT_OPTIONS,
    LoadOptions,
    TransformersProcessor,
    batch_slices,
    check_counts,
    check_model,
    load_model,
    load_part,
    to_rgb,
)
from artaug.scorers.next_token import (
    MIN_ANSWERED,
    THINKS_FIRST,
    check_chat,
    next_token_config,
    next_token_probabilities,
    question_chat,
    spelling_ids,
)
from artaug.scoring import Scorer

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel

QUESTION = 'Does this figure show "{prompt}"? Please answer yes or no.'
"""The question of Lin et al. (2024)."""
_DEFAULT_BATCH_SIZE = 8


@checked
@final
@dataclass(frozen=True, kw_only=True, eq=False)
class VQAScore(Scorer):
    """``P("Yes" | picture, question)``: the probability of the next token, in [0, 1] (Lin et al. 2024, eq. 1).

    The probability is over the whole vocabulary, at temperature 1, of the token right after the question. A more confident
    model scores higher without being more accurate: compare scores of one model only. A model that reasons before it
    answers gives nothing to either answer; a warning says so.

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
        check_chat(self.processor)
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
            options: revision, device, dtype and batch size (8 if None).

        Raises:
            ModelError: if there is no image-text-to-text model at ``source``, or its weights are pickled or incomplete.
        """
        from transformers import AutoModelForImageTextToText, AutoProcessor  # noqa: PLC0415 - slow to load

        return cls(
            processor=load_part(AutoProcessor, source, revision=options.revision),
            model=load_model(AutoModelForImageTextToText, source, options),
            question=question,
            answer=answer,
            batch_size=options.batch_size or _DEFAULT_BATCH_SIZE,
        )

    @property
    def models(self) -> Sequence[nn.Module]:
        return (self.model,)

    def score(self, image: Image, prompt: str) -> float:
        return self.score_batch([image], [prompt])[0]

    def score_batch(self, images: Sequence[Image], prompts: Sequence[str]) -> list[float]:
        check_counts(images, prompts)
        rgb, probabilities = to_rgb(images), []
        for batch in batch_slices(len(rgb), self.batch_size):
            chats = [
                question_chat([image], self.question.replace("{prompt}", prompt))
                for image, prompt in zip(rgb[batch], prompts[batch], strict=True)
            ]
            next_token = next_token_probabilities(self.model, self.processor, chats, self._config)
            self._warn_unless_answered(next_token)
            probabilities += next_token[:, self._answer_ids[0]].tolist()
        return probabilities

    def _warn_unless_answered(self, next_token: Tensor) -> None:
        """Warn where neither yes nor no may follow the question, as after the template of a model that thinks first."""
        answered = next_token[:, list(self._yes_no_ids)].sum(dim=-1)  # (pictures,)
        if len(answered) and float(answered.max()) < MIN_ANSWERED:
            words = self.processor.tokenizer.decode([int(next_token[0].argmax())])
            warnings.warn(
                f"{self.name}: the next token after the question is not an answer, but most likely {words!r}: yes and no "
                f"have a probability of {float(answered.max()):.0e} together, so the scores say nothing. {THINKS_FIRST}",
                stacklevel=2,
            )

    @cached_property
    def _yes_no_ids(self) -> frozenset[int]:
        """The tokens that are yes or no in any spelling, and the answer."""
        words = ("Yes", "yes", "YES", "No", "no", "NO")
        return frozenset({*self._answer_ids, *spelling_ids(self.processor, words)})

    @cached_property
    def _answer_ids(self) -> list[int]:
        ids: list[int] = self.processor.tokenizer.encode(self.answer, add_special_tokens=False)
        return ids

    @cached_property
    def _config(self) -> "GenerationConfig":
        return next_token_config(self.model, self.processor)
