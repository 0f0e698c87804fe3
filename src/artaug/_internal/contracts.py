"""The check of what a user's object returned, in one grammar of error text.

Each seam has one function that calls the user's object and checks its answer with the functions here. Everyone else
calls that function, so that a wrong answer is named at its source::

    <object>.<method> returned <received> for <inputs>. Expected <what the seam allows>.

| seam | the function that calls it |
|---|---|
| `Synthesizer` | `artaug.synthesis.draw` |
| `Critic` | `artaug.critique.run_critic`, `artaug.critique.stream_critic` |
| `RegionPlanner` | `artaug.plan.run_planner` |
| `Scorer` | `artaug.scoring.score_images` |
| `PairwiseJudge` | `artaug.pairwise.judge_images` |
| `PairFilter` | `artaug.filtering.judge_pairs` |
| `ImageSimilarity` | `artaug.images.similarity.compare_pairs` |
| `Objective` | `artaug.training.objectives.compute_loss` |
| `Guide` | `artaug.regional.guide.steer`, `artaug.regional.guide.embed` |
| `LatentGuide` | `artaug.regional.latent_guide.LatentMoves` |
| `Fuser` | `artaug.lora.fusing.fuse_loras` |
"""

import math
from collections.abc import Sequence
from typing import Any, TypeVar

from artaug._internal.text import shorten
from artaug.errors import ContractError, NonFiniteError

T = TypeVar("T")

_QUOTED = 120
"""Characters of an answer that an error quotes."""


def contract_error(owner: str, method: str, *, received: str, inputs: str, expected: str) -> ContractError:
    """Make the error that names an object, its method, what it returned, its inputs and what was expected.

    Args:
        owner: what to call the object: its name, or its class.
        method: the method that was called; empty for an object that is a function.
        received: what it returned, in words.
        inputs: what it was called with, in words; left out if empty.
        expected: what the seam allows, in words.

    >>> from artaug._internal.contracts import contract_error
    >>> print(contract_error("MyPlanner", "plan", received="None", inputs="'a pear'", expected="artaug.Plan"))
    MyPlanner.plan returned None for 'a pear'. Expected artaug.Plan.
    """
    called = f"{owner}.{method}" if method else owner
    return ContractError(f"{called} returned {received}{f' for {inputs}' if inputs else ''}. Expected {expected}.")


def check_result(owner: str, method: str, answer: object, *, of: type[T] | tuple[type[T], ...], inputs: str = "") -> T:
    """Return ``answer`` if it is of the type that the seam allows.

    Args:
        owner: see `contract_error`.
        method: see `contract_error`.
        answer: what the object returned.
        of: the type that is allowed, or several.
        inputs: see `contract_error`.

    Raises:
        ContractError: if it is of another type.
    """
    if isinstance(answer, of):
        return answer
    raise contract_error(owner, method, received=_describe_answer(answer), inputs=inputs, expected=_type_names(of))


def check_batch(
    owner: str,
    method: str,
    answers: object,
    *,
    of: type[T] | tuple[type[T], ...],
    count: int,
    per: str,
    prompts: Sequence[str] = (),
) -> list[T]:
    """Return ``answers`` as a list if there is one of the right type for each input.

    Args:
        owner: see `contract_error`.
        method: see `contract_error`.
        answers: what the object returned.
        of: the type that is allowed for one answer, or several.
        count: how many inputs the object got.
        per: what one of them is called, in the singular: "plan", "picture", "pair".
        prompts: the prompt of each, quoted where its answer is of another type.

    Raises:
        ContractError: if ``answers`` is not a list, has another length, or holds something of another type.

    >>> from artaug._internal.contracts import check_batch
    >>> check_batch("MyCritic", "critique_batch", ["dark"], of=str, count=2, per="picture")
    Traceback (most recent call last):
    artaug.ContractError: MyCritic.critique_batch returned 1 answer for 2 pictures. Expected a list of 2, each str.
    """
    items = _check_length(owner, method, answers, count=count, per=per, item_type=_type_names(of))
    for index, item in enumerate(items):
        check_result(owner, method, item, of=of, inputs=_label(per, index, prompts))
    return items


def check_numbers(
    owner: str, method: str, answers: object, *, count: int, per: str, prompts: Sequence[str] = ()
) -> list[float]:
    """Return ``answers`` as plain floats if there is one finite number for each input.

    Numbers of numpy and torch are taken, and arrays of them. The arguments are those of `check_batch`.

    Raises:
        ContractError: if ``answers`` is not a list, has another length, or holds something that is not a number.
        NonFiniteError: if a number is NaN or infinite.
    """
    numbers: list[float] = []
    for index, item in enumerate(_check_length(owner, method, answers, count=count, per=per, item_type="a number")):
        inputs = _label(per, index, prompts)
        try:
            number = float(item)
        except (TypeError, ValueError, RuntimeError):  # torch raises RuntimeError for a tensor of several elements
            raise contract_error(
                owner, method, received=_describe_answer(item), inputs=inputs, expected="a number"
            ) from None
        if not math.isfinite(number):
            called = f"{owner}.{method}" if method else owner
            raise NonFiniteError(f"{called} returned {number} for {inputs}. Expected a finite number.")
        numbers.append(number)
    return numbers


def _check_length(owner: str, method: str, answers: Any, *, count: int, per: str, item_type: str) -> list[Any]:  # noqa: ANN401
    inputs, expected = f"{count} {per}{'s' * (count != 1)}", f"a list of {count}, each {item_type}"
    try:
        length = len(answers)
        items = list(answers)
    except TypeError:  # None, a number, a generator, an array without axes
        raise contract_error(
            owner, method, received=_describe_answer(answers), inputs=inputs, expected=expected
        ) from None
    if length != count:
        received = f"{length} answer{'s' * (length != 1)}"
        raise contract_error(owner, method, received=received, inputs=inputs, expected=expected)
    return items


def _label(per: str, index: int, prompts: Sequence[str]) -> str:
    return f"{per} {index} ({prompts[index]!r})" if prompts else f"{per} {index}"


def _describe_answer(answer: object) -> str:
    return "None" if answer is None else f"{type(answer).__name__} {shorten(repr(answer), _QUOTED)}"


def _type_names(of: type | tuple[type, ...]) -> str:
    types = of if isinstance(of, tuple) else (of,)
    return " or ".join(
        type_.__qualname__ if type_.__module__ == "builtins" else f"{type_.__module__}.{type_.__qualname__}"
        for type_ in types
    )
