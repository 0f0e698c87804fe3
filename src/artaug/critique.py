"""`Critique` and `Abstention`, the answers of a critic; `Critic`, the class to subclass; and the call that checks it."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from PIL.Image import Image

from artaug._internal.contracts import check_batch
from artaug._internal.memory import is_out_of_memory
from artaug._internal.values import value
from artaug.errors import CriticError, InvalidValueError
from artaug.geometry import Box


@value
class Suggestion:
    """One change that a critic suggests: where, what should be there, and why.

    Raises:
        InvalidValueError: if the prompt is blank.

    >>> import artaug as aa
    >>> aa.Suggestion(aa.Box(0, 0, 0.5, 0.5), "a brightly lit window", reason="the corner is lost in shadow").prompt
    'a brightly lit window'
    """

    box: Box
    """Where the change belongs."""
    prompt: str
    """A description of what should be seen there, not an instruction."""
    reason: str = ""
    """Why, in free text."""

    def __post_init__(self) -> None:
        if not self.prompt.strip():
            raise InvalidValueError(f"a Suggestion needs a prompt that says what should be there, received {self!r}.")


@value
class Critique:
    """A critic's answer: the changes it suggests, none if the picture needs none."""

    suggestions: tuple[Suggestion, ...] = ()
    summary: str = ""
    """A remark on the whole picture, in free text."""
    repairs: tuple[str, ...] = ()
    """What was repaired or dropped to parse the reply of the critic's model, one sentence each."""


@value
class Abstention:
    """A critic's answer if it cannot judge the picture, with the reason. It is a result of its own, not a score of zero."""

    reason: str

    def __post_init__(self) -> None:
        if not self.reason.strip():
            raise InvalidValueError(
                "an Abstention needs a reason: reports show it as the reason why a prompt was skipped."
            )


class Critic(ABC):
    """Suggests what to improve in a picture, and where, given its prompt.

    Subclass it and write `critique`. If the critic cannot judge a picture, return an `Abstention` with the reason. An
    exception is a bug and stops the run.

    >>> import artaug as aa
    >>> class LeftCritic(aa.Critic):
    ...     def critique(self, image, prompt):
    ...         if image.width < 16:
    ...             return aa.Abstention(f"the picture is only {image.width} pixels wide")
    ...         return aa.Critique((aa.Suggestion(aa.Box(0, 0, 0.5, 1), f"{prompt}, vivid"),))
    """

    @abstractmethod
    def critique(self, image: Image, prompt: str) -> Critique | Abstention:
        """Suggest what would improve ``image``, which was drawn from ``prompt``."""

    def critique_batch(self, images: Sequence[Image], prompts: Sequence[str]) -> list[Critique | Abstention]:
        """Criticise many pictures. Override it if a batch is faster than a loop."""
        return [self.critique(image, prompt) for image, prompt in zip(images, prompts, strict=True)]


def run_critic(critic: Critic, images: Sequence[Image], prompts: Sequence[str]) -> list[Critique | Abstention]:
    """Call a critic and check that it answered as its seam promises.

    Every call of a critic goes through this function.

    Raises:
        InvalidValueError: if there is not one picture for each prompt; then the critic is not called.
        CriticError: if the critic raised; the original exception is its cause. Where memory ran out, that error is raised.
        ContractError: if it returned too few answers, or something that is neither a `Critique` nor an `Abstention`.
    """
    name = type(critic).__name__
    if len(images) != len(prompts):
        raise InvalidValueError(
            f"received {len(images)} picture(s) for {len(prompts)} prompt(s), so {name} was not called: "
            "need one picture for each prompt."
        )
    try:
        answers = critic.critique_batch(images, prompts)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise CriticError(
            f"{name} raised {type(error).__name__}: {error}, while criticising {len(prompts)} picture(s), "
            f"first prompt {next(iter(prompts), None)!r}. A critic that cannot tell returns artaug.Abstention(reason)."
        ) from error
    checked: list[Critique | Abstention] = check_batch(
        name, "critique_batch", answers, of=(Critique, Abstention), count=len(prompts), per="picture", prompts=prompts
    )
    return checked
