"""The checker of annotations while tests run: beartype, reading them as mypy does."""

from collections.abc import Callable
from typing import Self, TypeVar

from beartype import BeartypeConf, FrozenDict, beartype
from beartype.roar import BeartypeDecorHintPep3119Exception

F = TypeVar("F", bound=Callable)

# An int passes for a float. Self passes unchecked: jaxtyping decorates methods one by one, and beartype reads Self only
# in a class it sees whole (github.com/patrick-kidger/jaxtyping/issues/92).
READING = BeartypeConf(is_pep484_tower=True, hint_overrides=FrozenDict({Self: object}))


def check(function: F) -> F:
    """Check arguments and result on every call, unless one is a Protocol that is not ``runtime_checkable``."""
    try:
        return beartype(conf=READING)(function)
    except BeartypeDecorHintPep3119Exception:
        return function
