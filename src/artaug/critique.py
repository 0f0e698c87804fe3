"""What a critic says about a picture, and the class to subclass for a critic of one's own."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from PIL.Image import Image

from artaug._internal.contracts import check_batch
from artaug._internal.values import value
from artaug.errors import CriticError, InvalidValueError
from artaug.geometry import Box


@value
class Suggestion:
    """One change a critic asks for: where, what should be there, and why.

    Raises:
        InvalidValueError: if the prompt is blank.

    >>> import artaug as aa
    >>> aa.Suggestion(aa.Box(0, 0, 0.5, 0.5), "a brightly lit window", reason="the corner is lost in shadow").prompt
    'a brightly lit window'
    """

    box: Box
    """Where the change belongs."""
    prompt: str
    """What should be seen there: a description, not an order."""
    reason: str = ""
    """Why, in the critic's words."""

    def __post_init__(self) -> None:
        if not self.prompt.strip():
            raise InvalidValueError(f"a Suggestion needs a prompt that says what should be there, received {self!r}.")


@value
class Critique:
    """A critic's answer: the changes it asks for, none if the picture needs nothing."""

    suggestions: tuple[Suggestion, ...] = ()
    summary: str = ""
    """The picture as a whole, in the critic's words."""
    repairs: tuple[str, ...] = ()
    """What had to be mended or left out to read the critic's reply, a sentence each; none where it was read as it was."""


@value
class Abstention:
    """A critic's answer when it could not tell, with the reason. It is a result, never a score of zero."""

    reason: str

    def __post_init__(self) -> None:
        if not self.reason.strip():
            raise InvalidValueError("an Abstention needs a reason: it is what a person will read to understand a skip.")


class Critic(ABC):
    """Looks at a picture and its prompt and says what to improve, and where.

    Subclass it and write `critique`. When the critic cannot tell, return an `Abstention` with the reason; an
    exception stops the run, since it means a bug.

    >>> import artaug as aa
    >>> class LeftCritic(aa.Critic):
    ...     def critique(self, image, prompt):
    ...         if image.width < 16:
    ...             return aa.Abstention(f"the picture is only {image.width} pixels wide")
    ...         return aa.Critique((aa.Suggestion(aa.Box(0, 0, 0.5, 1), f"{prompt}, vivid"),))
    """

    @abstractmethod
    def critique(self, image: Image, prompt: str) -> Critique | Abstention:
        """Say what would improve ``image``, which was drawn from ``prompt``."""

    def critique_batch(self, images: Sequence[Image], prompts: Sequence[str]) -> list[Critique | Abstention]:
        """Criticise many pictures. Override it where a batch is faster than a loop."""
        return [self.critique(image, prompt) for image, prompt in zip(images, prompts, strict=True)]


def run_critic(critic: Critic, images: Sequence[Image], prompts: Sequence[str]) -> list[Critique | Abstention]:
    """Ask a critic about pictures and check that it answered as its seam promises.

    Raises:
        CriticError: if the critic raised; the original exception is its cause.
        ContractError: if it returned too few answers, or something that is neither a `Critique` nor an `Abstention`.
    """
    name = type(critic).__name__
    try:
        answers = critic.critique_batch(images, prompts)
    except MemoryError:
        raise
    except Exception as fault:
        raise CriticError(
            f"{name} raised {type(fault).__name__}: {fault}, while criticising {len(prompts)} picture(s), "
            f"first prompt {next(iter(prompts), None)!r}. A critic that cannot tell returns artaug.Abstention(reason)."
        ) from fault
    checked: list[Critique | Abstention] = check_batch(
        name, "critique_batch", answers, of=(Critique, Abstention), count=len(prompts), per="picture", prompts=prompts
    )
    return checked
