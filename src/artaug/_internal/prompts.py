"""When two prompts count as the same: one sample in statistics, and no held-out prompt if the other is learned from."""

import re
import unicodedata
from collections.abc import Iterable, Sequence

import numpy as np

from artaug._internal.text import shorten
from artaug.errors import PromptError

_NAMED = 3


def prompt_key(prompt: str) -> str:
    """What two prompts that count as the same have in common.

    Letter case, the width and composition of characters (Unicode NFKC), blanks, and punctuation at either end do not
    tell prompts apart. CLIP's tokenizer ignores case and blanks, T5's composition and blanks; a picture of "A red cone."
    says next to nothing new beside one of "a red cone".

    >>> from artaug._internal.prompts import prompt_key
    >>> prompt_key(" A  red cone.") == prompt_key("a red cone")
    True
    """
    folded = " ".join(unicodedata.normalize("NFKC", prompt).casefold().split())
    return re.sub(r"^[\W_]+|[\W_]+$", "", folded) or folded


def prompt_clusters(prompts: Iterable[str]) -> np.ndarray:
    """A number for each prompt, the same for those that count as the same, counted up from 0 as they first appear.

    >>> from artaug._internal.prompts import prompt_clusters
    >>> prompt_clusters(["a hill", "a pond", "A hill."]).tolist()
    [0, 1, 0]
    """
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(prompt_key(prompt), len(numbers)) for prompt in prompts], dtype=int)


def check_prompts(prompts: object) -> None:
    """Refuse what is no list of prompts.

    Raises:
        PromptError: if there are none, one is blank, or it is one string, or a generator, which can be read once only.
    """
    if isinstance(prompts, str):
        raise PromptError(f"expected a list of prompts, received one string: {prompts!r}. Write [{prompts!r}].")
    if not isinstance(prompts, Sequence):
        raise PromptError(
            f"expected a list of prompts, received {type(prompts).__name__} {shorten(repr(prompts), 60)}. Write "
            "list(prompts)."
        )
    if not prompts:
        raise PromptError("there are no prompts: received an empty list, need at least one prompt.")
    for index, prompt in enumerate(prompts):
        if not isinstance(prompt, str) or not prompt.strip():
            raise PromptError(f"prompts[{index}] is {prompt!r}: expected a text that says what to draw.")


def check_sample(owner: str, prompts: Sequence[str]) -> None:
    """Refuse what is no list of two different prompts or more, of which an interval can be given.

    Raises:
        PromptError: as `check_prompts`, or for too few.
    """
    check_prompts(prompts)
    if len(set(prompt_clusters(prompts))) < 2:
        raise PromptError(
            f"{owner} needs at least 2 prompts, received {len(prompts)}{', all the same' * (len(prompts) > 1)}. More "
            "prompts narrow the interval."
        )


def check_disjoint(prompts: Sequence[str], others: Sequence[str], *, owner: str, are: str, why: str) -> None:
    """Refuse prompts that are also among ``others``.

    Args:
        prompts: the prompts of ``owner``.
        others: those they have to differ from.
        owner: what the prompts belong to, for the message.
        are: what ``others`` are, for the message.
        why: what is wrong with that, as a sentence.

    Raises:
        PromptError: naming the first few that are the same.
    """
    taken = {prompt_key(prompt) for prompt in others}
    shared = list(dict.fromkeys(prompt for prompt in prompts if prompt_key(prompt) in taken))
    if shared:
        named = ", ".join(repr(shorten(prompt, 60)) for prompt in shared[:_NAMED])
        more = f" and {len(shared) - _NAMED} more" if len(shared) > _NAMED else ""
        raise PromptError(
            f"{owner} has {len(shared)} prompts that are {are}: {named}{more}. {why} Give it other prompts; those that differ "
            "only in case, blanks or punctuation at the ends count as the same."
        )
