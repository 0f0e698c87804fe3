"""What judges by model have in common: the question about two pictures, its answers, and what their odds say."""

from collections.abc import Mapping

from artaug.errors import InvalidValueError
from artaug.serving.chat import escape_chat_tokens

QUESTION = 'Both pictures were drawn from the prompt "{prompt}". Which one answers it better, and is drawn better?'
"""The question of a judge, unless it is given another one."""
ANSWERS = {"A": 1.0, "B": 0.0, "C": 0.5}
"""By letter, what it says: the picture shown first, the other one, a tie."""


def check_question(owner: object, question: str) -> None:
    """Refuse a question that asks nothing.

    Raises:
        InvalidValueError: if it is blank.
    """
    if not question.strip():
        raise InvalidValueError(f"{type(owner).__name__} needs a question: what the pictures are judged by.")


def judge_name(owner: object, model: str, question: str) -> str:
    """The name of a judge in tables: its class, its model, and its question unless that is the default."""
    return f"{type(owner).__name__} ({model}{'' if question == QUESTION else f', {question!r}'})"


def question_text(question: str, prompt: str) -> str:
    """The question about two pictures of a prompt, which are sent before it, without what to reply."""
    first, second, _ = ANSWERS
    asked = question.replace("{prompt}", escape_chat_tokens(prompt))
    return (
        f"There are two pictures: {first} is the first one, {second} the second. {asked}\n\nTheir order says nothing."
    )


def expected_answer(odds: Mapping[str, float]) -> float:
    """How likely the picture shown first is better, by the probabilities of the answers, which add up to 1.

    Where a tie is the likeliest answer, it is the answer: else a judge that calls nearly everything a tie would still prefer one
    of the pictures by a little.

    >>> from artaug.judges.question import expected_answer
    >>> expected_answer({"A": 0.5, "B": 0.25, "C": 0.25}), expected_answer({"A": 0.1, "B": 0.0, "C": 0.9})
    (0.625, 0.5)
    """
    first, second, tie = (odds.get(letter, 0.0) for letter in ANSWERS)
    return 0.5 if tie > max(first, second) else first + tie / 2
