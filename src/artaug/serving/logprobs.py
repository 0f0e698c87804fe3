"""The log-probabilities of a reply's tokens: how servers write them, and the odds of the answers that they give."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from artaug.serving.chat import TokenLogprobs

_MAX_TOKENS = 4096
"""Of a reply; the log-probabilities of more are not read."""
_ROUNDING = 0.01  # above 0, which no log-probability is
_LEAST = -1e4  # what servers write for none at all; no float has the exponential of less
_AROUND = " \t\r\n\u2581\u0120\u010a\"'`*.,:;!(){}[]"
"""Stripped from a token before it is compared: white space, also as SentencePiece and byte-level BPE write it, marks."""


@dataclass(frozen=True)
class AnswerOdds:
    """How likely each of some answers is in one place of a reply, of what a server listed there."""

    probability: Mapping[str, float]
    """Of each answer, over the answers alone: they add up to 1."""
    answered: float
    """What all tokens that are an answer have together, of the whole vocabulary."""
    unlisted: float
    """What the tokens have together that the server did not list, of which some may be answers too."""

    @property
    def error(self) -> float:
        """The most that a probability may be off, should all that is not listed belong to one answer, in [0, 1)."""
        return self.unlisted / (self.answered + self.unlisted)


def answer_odds(top: Sequence[tuple[str, float]], answers: Mapping[str, Sequence[str]]) -> AnswerOdds | None:
    """The odds of answers among the most likely tokens; None if no token is one.

    A token is an answer in any case, and with white space or marks around it. An answer without a token counts as 0.

    Args:
        top: texts of tokens and their log-probabilities.
        answers: the texts of each answer, in lower case.

    >>> from artaug.serving.logprobs import answer_odds
    >>> odds = answer_odds([("Yes", -0.5), (" no", -1.5), ("It", -3.0)], {"yes": ["yes"], "no": ["no"]})
    >>> round(odds.probability["yes"], 3), round(odds.unlisted, 3), round(odds.error, 3)
    (0.731, 0.121, 0.127)
    """
    answer_of = {text: answer for answer, texts in answers.items() for text in texts}
    sums, listed = dict.fromkeys(answers, 0.0), 0.0
    for token, logprob in top:
        probability = math.exp(logprob)
        listed += probability
        if (answer := answer_of.get(token.strip(_AROUND).lower())) is not None:
            sums[answer] += probability
    answered = sum(sums.values())
    if not answered:
        return None
    return AnswerOdds({answer: total / answered for answer, total in sums.items()}, answered, max(1 - listed, 0.0))


def parse_logprobs(document: object) -> tuple[TokenLogprobs, ...]:
    """Read the ``logprobs`` of a choice, as OpenAI writes them for a chat, or for a completion; empty for none.

    Entries that are no log-probabilities are left out: NaN, numbers above 0, other types.
    """
    if not isinstance(document, Mapping):
        return ()
    content = document.get("content")
    if isinstance(content, list):
        return tuple(_of_chat(entry) for entry in content[:_MAX_TOKENS])
    tokens, tops = document.get("tokens"), document.get("top_logprobs")
    if not isinstance(tokens, list) or not isinstance(tops, list):
        return ()
    return tuple(
        TokenLogprobs(str(token), tuple(_valid(top.items() if isinstance(top, dict) else ())))
        for token, top in zip(tokens[:_MAX_TOKENS], tops, strict=False)
    )


def _of_chat(entry: object) -> TokenLogprobs:
    fields = entry if isinstance(entry, Mapping) else {}
    top = fields.get("top_logprobs")
    pairs = [
        (item.get("token"), item.get("logprob"))
        for item in (top if isinstance(top, list) else [])
        if isinstance(item, dict)
    ]
    return TokenLogprobs(str(fields.get("token", "")), tuple(_valid(pairs)))


def _valid(pairs: Iterable[tuple[object, object]]) -> Iterator[tuple[str, float]]:
    for token, logprob in pairs:
        if isinstance(token, str) and isinstance(logprob, int | float) and logprob <= _ROUNDING:
            yield token, float(min(max(logprob, _LEAST), 0.0))
