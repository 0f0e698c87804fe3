"""`OpenAIJudge`: a pairwise judge whose model runs behind any OpenAI-compatible server."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from PIL.Image import Image

from artaug._internal.annotations import checked
from artaug.critique import Abstention
from artaug.judges.question import ANSWERS, QUESTION, check_question, expected_answer, judge_name, question_text
from artaug.pairwise import PairwiseJudge
from artaug.serving.chat import ChatReply, ChatRequest, Message
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
from artaug.serving.model import ServedModel

_FIRST, _SECOND, _TIE = ANSWERS


@checked
@final
@dataclass(frozen=True, kw_only=True)
class OpenAIJudge(ServedModel, PairwiseJudge):
    """Asks a model behind an OpenAI-compatible server which of two pictures is better, several requests at a time.

    The model sees both pictures in one message and replies with JSON on a schema: a short reason, then A, B or, for a tie,
    C. With ``expectation``, the answer is ``P(A) + P(C) / 2`` of the tokens in the place of that letter, or 0.5 if C is the
    likeliest of them: a close choice is a number close to 0.5 then. The probabilities are over the letters that the server
    listed; what that may change is bounded and warned of as in `OpenAIVQAScore`. The library asks in both orders
    (`Preference`).

    `ServedModel` has the other fields, and says what is retried. A question that is left without an answer is an
    `Abstention`, which is transient if the error is. If the server refuses the schema, the model is asked for free text: one
    warning is logged. Two pictures need a server that takes two: ``--limit-mm-per-prompt '{"image": 2}'`` of vLLM.

    Raises:
        InvalidValueError: as `ServedModel`, for an empty question, and with ``expectation`` for ``top_logprobs`` below 2, or
            a temperature that some servers divide log-probabilities by.

    Example:
        >>> from artaug.judges import OpenAIJudge
        >>> judge = OpenAIJudge(base_url="http://127.0.0.1:8000/v1", model="Qwen/Qwen3-VL-8B-Instruct")
        >>> judge.name
        'OpenAIJudge (Qwen/Qwen3-VL-8B-Instruct)'
    """

    question: str = QUESTION
    """What to judge by; ``{prompt}`` in it is replaced by the prompt."""
    ties: bool = True
    """Whether the model may call a tie."""
    explain: bool = True
    """Whether the model writes a short reason first, which helps it and takes more tokens."""
    expectation: bool = False
    """Whether the answer is weighed by probabilities, for which the server has to give log-probabilities."""
    top_logprobs: int = MAX_TOP_LOGPROBS
    """For the expectation: the most likely tokens that the server is asked to list; see `OpenAIVQAScore`."""
    structured: bool = True
    """Request JSON on the schema (``response_format``)."""
    name: str = ""
    """The name in tables; if not given, the class, the model, and the question unless it is the default."""

    def __post_init__(self) -> None:
        check_question(self, self.question)
        if self.expectation:
            check_raw_odds(type(self).__name__, self.temperature, self.top_logprobs)
        if not self.name:
            object.__setattr__(self, "name", judge_name(self, self.model, self.question))
        super().__post_init__()

    def prefer(self, first: Image, second: Image, prompt: str) -> float | Abstention:
        return self.prefer_batch([first], [second], [prompt])[0]

    def prefer_batch(
        self, first: Sequence[Image], second: Sequence[Image], prompts: Sequence[str]
    ) -> list[float | Abstention]:
        # A picture is resized and encoded once for both orders.
        resized = {id(image): self._resized(image) for image in (*first, *second)}
        requests = [
            self._request(resized[id(one)], resized[id(other)], prompt)
            for one, other, prompt in zip(first, second, prompts, strict=True)
        ]
        answers: dict[int, float | Abstention] = {}
        errors: dict[int, float] = {}
        for index, outcome in self._replies(requests, {}):
            if isinstance(outcome, RequestFailure):
                answers[index] = Abstention(outcome.reason, outcome.retryable)
            else:
                answers[index], errors[index] = self._read(outcome)
        warn_of_unlisted(self.name, {f"the pictures of {prompts[index]!r}": error for index, error in errors.items()})
        return [answers[index] for index in range(len(prompts))]

    @property
    def _choices(self) -> list[str]:
        return [_FIRST, _SECOND, _TIE] if self.ties else [_FIRST, _SECOND]

    def _request(self, first: Image, second: Image, prompt: str) -> ChatRequest:
        reason = '"reason": "...", ' if self.explain else ""
        tie = f', or "{_TIE}" if neither is better' if self.ties else ""
        text = (
            f"{question_text(self.question, prompt)} "
            f'Reply with JSON only, {{{reason}"better": "..."}}, with "{_FIRST}" or "{_SECOND}"{tie}.'
        )
        schema = choice_schema("better", self._choices, explain=self.explain) if self.structured else None
        logprobs = self.top_logprobs if self.expectation else 0
        return ChatRequest((Message("user", text, first, (second,)),), schema, top_logprobs=logprobs)

    def _read(self, reply: ChatReply) -> tuple[float | Abstention, float]:
        """The answer in a reply, and the most that it may be off."""
        choice = read_choice(reply, "better", self._choices)
        if choice is None:
            return Abstention(f"the reply holds none of {', '.join(self._choices)}: {describe_reply(reply)}"), 0.0
        if not self.expectation:
            return ANSWERS[choice], 0.0
        odds = choice_odds(reply, "better", self._choices)
        if odds is None:
            missing = (
                "the choice has no token of its own" if any(token.top for token in reply.logprobs) else NO_LOGPROBS
            )
            return Abstention(f"{missing}; the reply is {describe_reply(reply)}"), 0.0
        return expected_answer(odds.probability), odds.error
