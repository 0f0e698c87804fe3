"""The call of a user's object: what passes by itself is tried again, and what does not names the object and its prompts."""

import logging
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from artaug._internal.memory import is_out_of_memory
from artaug._internal.transient import DEADLINE_S, TransientErrors, backoff_delay_s
from artaug.errors import ArtAugError, ContractError, PartError

T = TypeVar("T")

_LOG = logging.getLogger(__name__)
_RAISED_BY = "Raised by"


def call_part(
    function: Callable[[], T],
    *,
    owner: str,
    inputs: str,
    error_class: type[PartError] = PartError,
    retry: bool = True,
) -> T:
    """Call a user's object, again with exponential backoff while what it raises is transient, for ten minutes.

    Args:
        function: calls the object's method.
        owner: what to call the object, as in ``contract_error``.
        inputs: what it is called with, in words; see `describe_inputs`.
        error_class: of the error that wraps what the object raised.
        retry: whether the same call may be made again.

    Raises:
        PartError: of ``error_class``, if the object raised; its exception is the cause.
        ArtAugError: the object's own, with a note that names the object and its inputs, unless it names a source itself.
        MemoryError, RuntimeError: the object's own, with such a note, where memory ran out.

    >>> from artaug._internal.calls import call_part
    >>> call_part(lambda: {}["boxes"], owner="MyPlanner", inputs="prompt 'a pear'")
    Traceback (most recent call last):
    artaug.PartError: MyPlanner raised KeyError: 'boxes', for prompt 'a pear'.
    """
    start_s, attempt = time.monotonic(), 0
    while True:
        attempt += 1
        try:
            return function()
        except (PartError, ContractError):
            raise  # it names its source
        except Exception as error:
            if isinstance(error, ArtAugError) or is_out_of_memory(error):
                if not any(note.startswith(_RAISED_BY) for note in getattr(error, "__notes__", ())):
                    error.add_note(f"{_RAISED_BY} {owner}, for {inputs}.")  # not by what called it in its turn
                raise
            raised = f"{type(error).__name__}: {error}"
            if not retry or not TransientErrors().matches(error):
                raise error_class(f"{owner} raised {raised}, for {inputs}.") from error
            delay_s, waited_s = backoff_delay_s(attempt), time.monotonic() - start_s
            if waited_s + delay_s > DEADLINE_S:
                raise error_class(
                    f"{owner} has not answered for {waited_s / 60:.0f} minutes, after {attempt} tries for {inputs}; the last "
                    f"one raised {raised}. Make sure that what it calls is up, then run the same call to go on."
                ) from error
        if attempt == 1:
            _LOG.warning(
                "%s raised %s, for %s; it is tried again for up to %.0f minutes", owner, raised, inputs, DEADLINE_S / 60
            )
        time.sleep(delay_s)


def stays_away(error: Exception) -> bool:
    """Whether an error of `call_part` says that a part has not answered for ten minutes: others would wait as long again."""
    return isinstance(error, PartError) and TransientErrors().matches(error.__cause__)


def describe_inputs(per: str, prompts: Sequence[str]) -> str:
    """Name the inputs of a call in a few words.

    >>> from artaug._internal.calls import describe_inputs
    >>> describe_inputs("plan", ["a pear"]), describe_inputs("plan", ["a pear", "a fig"])
    ("the plan of 'a pear'", "2 plans, first prompt 'a pear'")
    """
    if len(prompts) == 1:
        return f"the {per} of {prompts[0]!r}"
    return f"{len(prompts)} {per}s" + (f", first prompt {prompts[0]!r}" if prompts else "")
