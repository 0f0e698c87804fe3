"""Scorers whose model runs behind any OpenAI-compatible server: the probability of yes, and a grade by a rubric."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, final

from PIL.Image import Image

from artaug._internal.annotations import checked
from artaug.errors import InvalidValueError, ScoringError
from artaug.scorers.loading import check_counts
from artaug.scorers.vqa import QUESTION
from artaug.scoring import Scorer
from artaug.serving.chat import ChatReply, ChatRequest, Message, escape_chat_tokens
from artaug.serving.choices import (
    MAX_TOP_LOGPROBS,
    NO_LOGPROBS,
    check_raw_odds,
    choice_odds,
    choice_schema,
    describe_reply,
    read_choice,
    warn_of_unlisted,
)
from artaug.serving.completion import RequestFailure
from artaug.serving.logprobs import answer_odds
from artaug.serving.model import ServedModel

_GRADES = 100
_QUOTED_TOKENS = 5


class _Reading(NamedTuple):
    score: float
    error: float = 0.0
    """The most that the score may be off, as a share of its range."""


@dataclass(frozen=True, kw_only=True)
class _ServedScorer(ServedModel, Scorer):
    """One request a picture, several at a time; the first one that gets no score ends the batch."""

    name: str = ""
    """The name in tables; if not given, the class, the model and what it is asked."""

    def score(self, image: Image, prompt: str) -> float:
        return self.score_batch([image], [prompt])[0]

    def score_batch(self, images: Sequence[Image], prompts: Sequence[str]) -> list[float]:
        check_counts(images, prompts)
        requests = [
            self._request(self._resized(image), escape_chat_tokens(prompt))
            for image, prompt in zip(images, prompts, strict=True)
        ]
        readings: dict[int, _Reading] = {}
        for index, outcome in self._replies(requests):
            if isinstance(outcome, RequestFailure):
                # The cause says whether the same call may succeed later.
                cause = ConnectionError(outcome.reason) if outcome.retryable else None
                raise self._error(prompts[index], outcome.reason) from cause
            readings[index] = self._read(outcome, prompts[index])
        errors = {f"the picture of {prompts[index]!r}": reading.error for index, reading in readings.items()}
        warn_of_unlisted(self.name, errors)
        return [readings[index].score for index in range(len(prompts))]

    @abstractmethod
    def _request(self, image: Image, prompt: str) -> ChatRequest:
        """What is asked about a picture."""

    @abstractmethod
    def _read(self, reply: ChatReply, prompt: str) -> _Reading:
        """The score in a reply."""

    def _error(self, prompt: str, what: str) -> ScoringError:
        return ScoringError(f"{self.name}: no score for the picture of {prompt!r}: {what}.")


@checked
@final
@dataclass(frozen=True, kw_only=True)
class OpenAIVQAScore(_ServedScorer):
    """The probability that a served model answers yes to a question about a picture, in [0, 1]: VQAScore over HTTP.

    ``P(yes) / (P(yes) + P(no))`` of the first token of the reply, before any sampling. A server lists the ``top_logprobs``
    most likely tokens only. All of them that are the answer count, in any case and with white space or marks around it, so
    it is what `VQAScore` gives for each spelling, added up and divided by the same sum over both answers. An answer that is
    not listed counts as 0. What is not listed has the probability ``u`` in all, so a score is off by less than
    ``u / (u + P(yes) + P(no))``: where that is more than 0.05, a warning says so. A model that is sure of its answer leaves
    ``u`` around 1e-4.

    `ServedModel` has the other fields, and says what is retried.

    Raises:
        InvalidValueError: as `ServedModel`, for equal answers, ``top_logprobs`` below 2, or a temperature that some servers
            divide log-probabilities by.
        ScoringError: by a call, if the server does not answer, gives no log-probabilities, or lists neither answer, as for a
            model that thinks first. It names the prompt.

    Example:
        >>> from artaug.scorers import OpenAIVQAScore
        >>> alignment = OpenAIVQAScore(base_url="http://127.0.0.1:8000/v1", model="Qwen/Qwen3-VL-8B-Instruct")
        >>> alignment.name
        'OpenAIVQAScore (Qwen/Qwen3-VL-8B-Instruct)'
    """

    question: str = QUESTION
    """The question; ``{prompt}`` in it is replaced by the prompt. Without it all pictures get the same question."""
    answer: str = "yes"
    """The answer whose probability is the score, a single token of the model."""
    other_answer: str = "no"
    """The answer that it is weighed against, likewise."""
    top_logprobs: int = MAX_TOP_LOGPROBS
    """The most likely tokens that the server is asked to list. OpenAI allows 20, and so does vLLM unless it is started with
    ``--max-logprobs``; some hosted ones allow 5 or 8."""
    max_new_tokens: int = 1
    """Tokens of a reply, of which the first one counts."""

    def __post_init__(self) -> None:
        check_raw_odds(type(self).__name__, self.temperature, self.top_logprobs)
        if not self.answer.strip() or self.answer.strip().lower() == self.other_answer.strip().lower():
            raise InvalidValueError(
                f"OpenAIVQAScore(answer={self.answer!r}, other_answer={self.other_answer!r}): need two different words."
            )
        if not self.name:
            question = "" if self.question == QUESTION else f", {self.question!r}"
            object.__setattr__(self, "name", f"OpenAIVQAScore ({self.model}{question})")
        super().__post_init__()

    def _request(self, image: Image, prompt: str) -> ChatRequest:
        message = Message("user", self.question.replace("{prompt}", prompt), image)
        return ChatRequest((message,), top_logprobs=self.top_logprobs)

    def _read(self, reply: ChatReply, prompt: str) -> _Reading:
        first = reply.logprobs[0] if reply.logprobs else None
        if first is None or not first.top:
            raise self._error(prompt, NO_LOGPROBS)
        answers = {answer: [answer.strip().lower()] for answer in (self.answer, self.other_answer)}
        odds = answer_odds(first.top, answers)
        if odds is None:
            listed = self._quoted(token for token, _ in first.top[:_QUOTED_TOKENS])
            raise self._error(
                prompt,
                f"neither {self.answer!r} nor {self.other_answer!r} is among the {len(first.top)} most likely tokens, "
                f"which begin with {listed}. A model that thinks before it answers cannot be scored this way: switch that "
                'off, as by extra_body={"chat_template_kwargs": {"enable_thinking": False}}, or take its Instruct version',
            )
        return _Reading(odds.probability[self.answer], odds.error)


@checked
@final
@dataclass(frozen=True, kw_only=True)
class OpenAIRubricScore(_ServedScorer):
    """The grade that a served model gives a picture by a rubric, on a scale of whole numbers.

    The model replies with JSON on a schema, a short reason first, and the score is its grade. With ``expectation``, it is
    the mean of all grades weighed by their probabilities in the place of the grade (G-Eval, Liu et al. 2023, section 2):
    fewer pictures get the same score, and two that get the same grade can be told apart. The probabilities are over the
    grades that the server listed; what that may change is bounded and warned of as in `OpenAIVQAScore`.

    `ServedModel` has the other fields, and says what is retried. If the server refuses the schema, the model is asked for
    free text: one warning is logged.

    Raises:
        InvalidValueError: as `ServedModel`, for an empty rubric, a scale that does not rise or has more than 100 grades, and
            with ``expectation`` for grades of more than one digit, ``top_logprobs`` below 2, or a temperature that some
            servers divide log-probabilities by.
        ScoringError: by a call, if the server does not answer, the reply holds no grade of the scale, or the server gives
            no log-probabilities for it. It names the prompt.

    Example:
        >>> from artaug.scorers import OpenAIRubricScore
        >>> hands = OpenAIRubricScore(
        ...     base_url="http://127.0.0.1:8000/v1",
        ...     model="Qwen/Qwen3-VL-8B-Instruct",
        ...     rubric="How well are the hands drawn? 1: fingers are missing or fused. 5: as in a photograph, or no hands.",
        ...     name="hands",
        ... )
    """

    rubric: str
    """What is graded, and what the grades mean; ``{prompt}`` in it is replaced by the prompt."""
    scale: tuple[int, int] = (1, 5)
    """The lowest grade and the highest, which is the best."""
    explain: bool = True
    """Whether the model writes a short reason first, which helps it and takes more tokens."""
    expectation: bool = False
    """Whether the score is the expected grade, for which the server has to give log-probabilities."""
    top_logprobs: int = MAX_TOP_LOGPROBS
    """For the expectation: the most likely tokens that the server is asked to list; see `OpenAIVQAScore`."""
    structured: bool = True
    """Request JSON on the schema (``response_format``)."""

    def __post_init__(self) -> None:
        low, high = self.scale
        if not self.rubric.strip():
            raise InvalidValueError("OpenAIRubricScore needs a rubric: what is graded, and what the grades mean.")
        if not 0 <= low < high or high - low >= _GRADES:
            raise InvalidValueError(
                f"OpenAIRubricScore(scale={self.scale}): need a lowest grade from 0 up and a higher one, at most {_GRADES} "
                "grades."
            )
        if self.expectation:
            check_raw_odds(type(self).__name__, self.temperature, self.top_logprobs)
            if high > 9:
                raise InvalidValueError(
                    f"OpenAIRubricScore(scale={self.scale}, expectation=True): a grade of two digits is two tokens of many "
                    "models, whose probabilities the reply does not have. Need grades from 0 to 9."
                )
        if not self.name:
            object.__setattr__(self, "name", f"OpenAIRubricScore ({self.model}, {self.rubric!r})")
        super().__post_init__()

    @property
    def _choices(self) -> list[str]:
        low, high = self.scale
        return [str(grade) for grade in range(low, high + 1)]

    def _request(self, image: Image, prompt: str) -> ChatRequest:
        low, high = self.scale
        reason = '"reason": "...", ' if self.explain else ""
        first = " The reason is one short sentence." if self.explain else ""
        rubric = self.rubric.replace("{prompt}", prompt)
        text = (
            f"{rubric}\n\nReply with JSON only, "
            f'{{{reason}"grade": N}}, where N is a whole number from {low}, the worst, to {high}, the best.{first}'
        )
        schema = choice_schema("grade", range(low, high + 1), explain=self.explain) if self.structured else None
        return ChatRequest(
            (Message("user", text, image),), schema, top_logprobs=self.top_logprobs if self.expectation else 0
        )

    def _read(self, reply: ChatReply, prompt: str) -> _Reading:
        grade = read_choice(reply, "grade", self._choices)
        if grade is None:
            raise self._error(
                prompt,
                f"the reply holds no grade from {self.scale[0]} to {self.scale[1]}: {describe_reply(reply)}. If it was cut, "
                "raise max_new_tokens",
            )
        if not self.expectation:
            return _Reading(float(grade))
        if not any(token.top for token in reply.logprobs):
            raise self._error(prompt, NO_LOGPROBS)
        odds = choice_odds(reply, "grade", self._choices)
        if odds is None:
            raise self._error(prompt, f"the grade has no token of its own in the reply {describe_reply(reply)}")
        return _Reading(sum(int(one) * share for one, share in odds.probability.items()), odds.error)
