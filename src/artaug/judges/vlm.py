"""`VLMJudge`: a pairwise judge whose vision-language model of transformers runs in this process."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Self, final

from PIL.Image import Image
from torch import Tensor, nn

from artaug._internal.annotations import checked
from artaug.critique import Abstention
from artaug.errors import InvalidValueError
from artaug.judges.question import ANSWERS, QUESTION, check_question, expected_answer, judge_name, question_text
from artaug.pairwise import PairwiseJudge
from artaug.scorers.loading import (
    DEFAULT_OPTIONS,
    LoadOptions,
    TransformersProcessor,
    batch_slices,
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

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel

_DEFAULT_BATCH_SIZE = 4


@checked
@final
@dataclass(frozen=True, kw_only=True, eq=False)
class VLMJudge(PairwiseJudge):
    """Asks a vision-language model of transformers which of two pictures is better, in batches.

    The model sees both pictures in one message and is to reply with A, B or, for a tie, C. Nothing is generated: the answer is
    computed from the probabilities of these letters as the next token, over the letters alone: 0.5 if C is the likeliest, else
    ``P(A) + P(C) / 2``. So a close choice is a number close to 0.5, and every answer can be read. Where the model has something
    else to say than a letter, the answer is an `Abstention`. The library asks in both orders (`Preference`).

    Raises:
        InvalidValueError: for an empty question, if one of the letters is no token of this model, or ``batch_size`` is below 1.
        ModelError: for a processor without chat template or padding token, or a model in training mode.

    Example:
        >>> from artaug.judges import VLMJudge
        >>> judge = VLMJudge.from_pretrained("Qwen/Qwen3-VL-8B-Instruct")  # doctest: +SKIP
    """

    model: "PreTrainedModel" = field(repr=False)
    """Any model of ``AutoModelForImageTextToText`` that takes two pictures in a message. It is not altered."""
    processor: TransformersProcessor = field(repr=False)
    """Its processor, with a chat template."""
    question: str = QUESTION
    """What to judge by; ``{prompt}`` in it is replaced by the prompt."""
    ties: bool = True
    """Whether the model may call a tie."""
    name: str = ""
    """The name in tables; if not given, the class, the model, and the question unless it is the default."""
    batch_size: int = field(default=_DEFAULT_BATCH_SIZE, repr=False)
    """Questions that go through the model together, with two pictures each."""

    def __post_init__(self) -> None:
        check_model(self, model=self.model, batch_size=self.batch_size)
        check_question(self, self.question)
        check_chat(self.processor)
        if missing := [letter for letter, ids in self._answer_ids.items() if not ids]:
            raise InvalidValueError(
                f"the answers {missing} are no tokens of this model: a VLMJudge needs a model that can reply with one letter."
            )
        if not self.name:
            object.__setattr__(self, "name", judge_name(self, self.model.config.name_or_path, self.question))

    @classmethod
    def from_pretrained(
        cls,
        source: str,
        *,
        question: str = QUESTION,
        ties: bool = True,
        options: LoadOptions = DEFAULT_OPTIONS,
    ) -> Self:
        """Load a model and its processor.

        Args:
            source: a folder that ``save_pretrained`` wrote, or a Hub name like ``"Qwen/Qwen3-VL-8B-Instruct"``.
            question: the field.
            ties: the field.
            options: revision, device, dtype and batch size (4 if None).

        Raises:
            ModelError: if there is no image-text-to-text model at ``source``, or its weights are pickled or incomplete.
        """
        from transformers import AutoModelForImageTextToText, AutoProcessor  # noqa: PLC0415 - slow to load

        return cls(
            processor=load_part(AutoProcessor, source, revision=options.revision),
            model=load_model(AutoModelForImageTextToText, source, options),
            question=question,
            ties=ties,
            batch_size=options.batch_size or _DEFAULT_BATCH_SIZE,
        )

    @property
    def models(self) -> Sequence[nn.Module]:
        return (self.model,)

    def prefer(self, first: Image, second: Image, prompt: str) -> float | Abstention:
        return self.prefer_batch([first], [second], [prompt])[0]

    def prefer_batch(
        self, first: Sequence[Image], second: Sequence[Image], prompts: Sequence[str]
    ) -> list[float | Abstention]:
        shown, other = to_rgb(first), to_rgb(second)
        answers: list[float | Abstention] = []
        for batch in batch_slices(len(prompts), self.batch_size):
            chats = [
                question_chat(pictures, f"{question_text(self.question, prompt)} {self._instruction}")
                for *pictures, prompt in zip(shown[batch], other[batch], prompts[batch], strict=True)
            ]
            answers += map(self._read, next_token_probabilities(self.model, self.processor, chats, self._config))
        return answers

    def _read(self, probabilities: Tensor) -> float | Abstention:
        """The answer in the probabilities of the next token, (vocabulary,)."""
        by_letter = {letter: float(probabilities[ids].sum()) for letter, ids in self._answer_ids.items()}
        answered = sum(by_letter.values())
        if answered < MIN_ANSWERED:
            words = self.processor.tokenizer.decode([int(probabilities.argmax())])
            return Abstention(
                f"the next token after the question is none of {', '.join(by_letter)}, but most likely {words!r}: those have a "
                f"probability of {answered:.0e} together. {THINKS_FIRST}"
            )
        return expected_answer({letter: share / answered for letter, share in by_letter.items()})

    @property
    def _instruction(self) -> str:
        first, second, tie = ANSWERS
        return (
            f"Reply with one letter only: {first} or {second}{f', or {tie} if neither is better' if self.ties else ''}."
        )

    @cached_property
    def _answer_ids(self) -> dict[str, list[int]]:
        letters = list(ANSWERS) if self.ties else list(ANSWERS)[:2]
        return {letter: spelling_ids(self.processor, [letter]) for letter in letters}

    @cached_property
    def _config(self) -> "GenerationConfig":
        return next_token_config(self.model, self.processor)
