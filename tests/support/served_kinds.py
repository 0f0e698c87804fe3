"""What is built on a served model, each in one form: how to make it, ask it, and what a server says to it."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

import artaug as aa
from artaug.critics import Conversation, OpenAICritic
from artaug.judges import OpenAIJudge
from artaug.scorers import OpenAIRubricScore, OpenAIVQAScore
from support.faulty_server import completion
from support.tiny_llava import suggestion_json


@dataclass(frozen=True)
class Failure:
    """Why there is no answer."""

    reason: str
    transient: bool


@dataclass(frozen=True)
class Kind:
    """A class on a served model."""

    make: Callable[..., Any]
    ask: Callable[[Any, list, list], list]
    """Answers for pictures and prompts, or failures; of a scorer, the failure alone."""
    body: Callable[[int], bytes]
    """The response of a server that makes it answer by a number from 1 to 5."""
    answer: Callable[[int], Any]
    """That answer."""
    has_schema: bool = True

    def good(self, exchange) -> None:
        """A behavior of `support.faulty_server.faulty_server`: the answer 4."""
        exchange.send(self.body(4))


def _make(cls, **own):
    def make(url, **options):
        return cls(**{"base_url": url, "model": "tiny", "timeout_s": 5.0, "max_attempts": 3, **own, **options})

    return make


def _scores(scorer, images, prompts):
    try:
        return scorer.score_batch(images, prompts)
    except aa.ScoringError as error:
        return [Failure(str(error), isinstance(error.__cause__, ConnectionError))]


def _failures(answers):
    return [
        Failure(answer.reason, answer.transient) if isinstance(answer, aa.Abstention) else answer for answer in answers
    ]


def _odds_of_yes(number):
    document = json.loads(completion("Yes"))
    top = [{"token": "Yes", "logprob": math.log(number / 8)}, {"token": "No", "logprob": math.log(1 - number / 8)}]
    document["choices"][0]["logprobs"] = {"content": [{"token": "Yes", "top_logprobs": top}]}
    return json.dumps(document).encode()


def _advice(number):
    suggestion = aa.Suggestion(aa.Box(0, 0, 0.5, 1), f"number {number}", "dark")
    return aa.Critique((suggestion,), "dull")


KINDS = {
    "critic": Kind(
        _make(OpenAICritic, conversation=Conversation()),
        lambda critic, images, prompts: _failures(critic.critique_batch(images, prompts)),
        lambda number: completion(suggestion_json(prompt=f"number {number}")),
        _advice,
    ),
    "yes": Kind(
        _make(OpenAIVQAScore), _scores, _odds_of_yes, lambda number: pytest.approx(number / 8), has_schema=False
    ),
    "rubric": Kind(
        _make(OpenAIRubricScore, rubric='How well does it show "{prompt}"?'),
        _scores,
        lambda number: completion(json.dumps({"reason": "odd", "grade": number})),
        float,
    ),
    "judge": Kind(
        _make(OpenAIJudge),
        lambda judge, images, prompts: _failures(judge.prefer_batch(images, images, prompts)),
        lambda number: completion(json.dumps({"reason": "odd", "better": "ABC"[number % 3]})),
        lambda number: (1.0, 0.0, 0.5)[number % 3],
    ),
}
