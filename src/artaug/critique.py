"""`Critique` and `Abstention`, the answers of a critic; `Critic`, the class to subclass; and the call that checks it."""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NoReturn, TypeAlias

from PIL.Image import Image, Resampling

from artaug._internal.annotations import Seam
from artaug._internal.calls import describe_inputs
from artaug._internal.contracts import check_batch, check_result, contract_error
from artaug._internal.images import as_rgb
from artaug._internal.memory import FittingBatches, is_out_of_memory
from artaug._internal.text import short_html, short_repr, shorten, table_html
from artaug._internal.transient import TransientErrors
from artaug._internal.values import value
from artaug.drawing import Area, draw_areas
from artaug.errors import ContractError, CriticError, InvalidValueError, StorageError
from artaug.geometry import Box
from artaug.image_files import select_images

if TYPE_CHECKING:
    from torch import nn

_PREVIEW_PX = 512
_MAX_ROWS = 20
_LONGEST_CELL = 300
"""Of a critique in a notebook, which shows the first suggestions; characters of a cell."""


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

    __repr__ = short_repr

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

    __repr__ = short_repr

    def preview(self, image: Image, *, scale: int | None = None) -> Image:
        """Draw the boxes, numbered, over a copy of the picture, and below it what should be seen there.

        Args:
            image: the picture that was critiqued.
            scale: pixels of the copy for each pixel of ``image``; None for 512 pixels or what comes near.

        >>> import artaug as aa
        >>> from PIL import Image
        >>> critique = aa.Critique((aa.Suggestion(aa.Box(0, 0, 0.5, 1), "a brightly lit window"),))
        >>> critique.preview(Image.new("RGB", (64, 48))).width
        512
        """
        factor = scale or max(_PREVIEW_PX // max(image.size), 1)
        large = as_rgb(image).resize((image.width * factor, image.height * factor), Resampling.BICUBIC)
        areas = [
            Area(shape=one.box, text=f"{one.prompt} ({one.reason})" if one.reason else one.prompt)
            for one in self.suggestions
        ]
        return draw_areas(large, areas, heading=self.summary)

    def _repr_html_(self) -> str:
        """Its suggestions as a table, for notebooks; with the picture, see `preview` and ``artaug.images.html.CritiqueView``."""
        rows = [
            (", ".join(f"{edge:.2f}" for edge in (box.left, box.top, box.right, box.bottom)), prompt, reason)
            for box, prompt, reason in ((item.box, item.prompt, item.reason) for item in self.suggestions[:_MAX_ROWS])
        ]
        rest = len(self.suggestions) - len(rows)
        table = table_html(
            ("box", "prompt", "reason"), [[shorten(cell, _LONGEST_CELL) for cell in row] for row in rows]
        )
        return (
            f"<p>{short_html(self.summary)}</p>" * bool(self.summary) + table + f"<p>and {rest} more</p>" * (rest > 0)
        )


@value
class Abstention:
    """A critic's answer if it cannot judge the picture, with the reason. It is a result of its own, not a score of zero."""

    reason: str
    transient: bool = False
    """Whether the same call may succeed later, as after a timeout. `improve` puts such a prompt off to the end of the round."""

    __repr__ = short_repr

    def __post_init__(self) -> None:
        if not self.reason.strip():
            raise InvalidValueError(
                "an Abstention needs a reason: reports show it as the reason why a prompt was skipped."
            )


class Critic(Seam):
    """Suggests what to improve in a picture, and where, given its prompt.

    Subclass it and write `critique`. If the critic cannot judge a picture, return an `Abstention` with the reason. An
    exception is a bug and stops the run, unless it is transient (see `artaug.critics.TransientErrors`), such as a timeout:
    then the picture is without an answer for now.

    >>> import artaug as aa
    >>> class LeftCritic(aa.Critic):
    ...     def critique(self, image, prompt):
    ...         if image.width < 16:
    ...             return aa.Abstention(f"the picture is only {image.width} pixels wide")
    ...         return aa.Critique((aa.Suggestion(aa.Box(0, 0, 0.5, 1), f"{prompt}, vivid"),))
    """

    @property
    def models(self) -> "Sequence[nn.Module]":
        """What it computes with on a device, for `OneAtATime`, which moves these; whatever is not named stays where it is."""
        return ()

    @property
    def max_concurrency(self) -> int:
        """How many calls a run may make at the same time, each in a thread of its own, while it draws.

        0, of one that computes in this process: the run's own thread makes them, one after the other.
        """
        return 0

    @abstractmethod
    def critique(self, image: Image, prompt: str) -> Critique | Abstention:
        """Suggest what would improve ``image``, which was drawn from ``prompt``."""

    def critique_batch(self, images: Sequence[Image], prompts: Sequence[str]) -> list[Critique | Abstention]:
        """Criticise many pictures. Override it if a batch is faster than a loop."""
        return [self.critique(image, prompt) for image, prompt in zip(images, prompts, strict=True)]


Answer: TypeAlias = Critique | Abstention


class StreamingCritic(Critic):
    """A critic that gives each answer of a batch as soon as it has it, so that none is lost if a later one fails."""

    @abstractmethod
    def critique_stream(self, images: Sequence[Image], prompts: Sequence[str]) -> Iterator[tuple[int, Answer]]:
        """Criticise many pictures: the index of each and its answer, in any order."""

    def critique(self, image: Image, prompt: str) -> Answer:
        return self.critique_batch([image], [prompt])[0]

    def critique_batch(self, images: Sequence[Image], prompts: Sequence[str]) -> list[Answer]:
        answers = dict(self.critique_stream(images, prompts))
        return [answers[index] for index in range(len(prompts))]


def run_critic(critic: Critic, images: Sequence[Image], prompts: Sequence[str]) -> list[Answer]:
    """Call a critic and check that it answered as its seam promises: an answer for each picture, in their order.

    See `stream_critic`, which gives the same answers as they come, for what it raises.
    """
    answers = dict(stream_critic(critic, images, prompts))
    return [answers[index] for index in range(len(prompts))]


def stream_critic(
    critic: Critic,
    images: Sequence[Image],
    prompts: Sequence[str],
    *,
    transient: TransientErrors = TransientErrors(),  # noqa: B008 - a frozen value
) -> Iterator[tuple[int, Answer]]:
    """Call a critic and check each answer as it comes: the index of a picture, and the answer.

    Every call of a critic goes through this function. A critic without a `Critic.critique_batch` of its own is called
    picture by picture. A transient exception is an `Abstention` for the pictures of the call that have no answer yet. Where
    memory runs out, those are criticised in batches of half as many.

    Raises:
        InvalidValueError: if there is not one picture for each prompt; then the critic is not called.
        CriticError: if the critic raised; the original exception is its cause. Where memory runs out at one picture, that
            error is raised.
        ContractError: if it returned too few answers, or something that is neither a `Critique` nor an `Abstention`.
        StorageError: if a critic that stores its answers could not.
    """
    name = type(critic).__name__
    if len(images) != len(prompts):
        raise InvalidValueError(
            f"received {len(images)} picture(s) for {len(prompts)} prompt(s), so {name} was not called: "
            "need one picture for each prompt."
        )
    batches = FittingBatches(1 if type(critic).critique_batch is Critic.critique_batch else max(len(prompts), 1))
    remaining = list(range(len(prompts)))
    while remaining:
        members = remaining[: batches.largest]
        pending, out_of_memory = list(members), ""  # without an answer
        try:
            for position, answer in _ask(critic, select_images(images, members), [prompts[i] for i in members]):
                pending.remove(members[position])
                yield members[position], answer
        except Exception as error:  # noqa: BLE001 - it is raised again, unless it passes
            waiting = [prompts[i] for i in pending]
            if is_out_of_memory(error) and len(waiting) > 1:
                out_of_memory = (
                    f"{type(error).__name__}: {error}"  # its text alone: the error holds the frames' tensors
                )
            else:
                fault = _transient_fault(error, transient)
                if fault is None:
                    _raise_named(error, name, waiting)
                yield from ((index, Abstention(f"{name} raised {fault}", transient=True)) for index in pending)
        remaining = remaining[len(members) :]
        if out_of_memory:
            remaining = pending + remaining
            batches.halve(len(pending), owner=name, item="picture", what=out_of_memory)


def _transient_fault(error: Exception, transient: TransientErrors) -> str | None:
    """What a critic raised, in words, if that may pass; None if it does not."""
    cause = error.__cause__ if isinstance(error, CriticError) else error
    return f"{type(cause).__name__}: {cause}" if transient.matches(cause) and not is_out_of_memory(error) else None


def _raise_named(error: Exception, name: str, prompts: Sequence[str]) -> NoReturn:
    """Raise what a critic raised, in an error that names it and its first prompt without an answer."""
    if is_out_of_memory(error):
        error.add_note(f"Raised by {name}, for {describe_inputs('picture', prompts)}.")
        raise error
    if isinstance(error, CriticError | ContractError | StorageError):
        raise error  # it names its source
    raise CriticError(
        f"{name} raised {type(error).__name__}: {error}, while criticising {len(prompts)} picture(s), "
        f"first prompt {next(iter(prompts), None)!r}. A critic that cannot tell returns artaug.Abstention(reason)."
    ) from error


def _ask(critic: Critic, images: Sequence[Image], prompts: Sequence[str]) -> Iterator[tuple[int, Answer]]:
    """The checked answers of one call."""
    name, count = type(critic).__name__, len(prompts)
    if not isinstance(critic, StreamingCritic):
        answers = critic.critique_batch(images, prompts)
        yield from enumerate(
            check_batch(
                name, "critique_batch", answers, of=(Critique, Abstention), count=count, per="picture", prompts=prompts
            )
        )
        return
    each, pictures = "one answer to each picture", f"{count} picture(s)"
    waiting = set(range(count))
    for index, answer in critic.critique_stream(images, prompts):
        if index not in waiting:
            received = f"a further answer to picture {index}"
            raise contract_error(name, "critique_stream", received=received, inputs=pictures, expected=each)
        waiting.remove(index)
        check_result(name, "critique_stream", answer, of=(Critique, Abstention), inputs=repr(prompts[index]))
        yield index, answer
    if waiting:
        received = f"no answer to pictures {sorted(waiting)}"
        raise contract_error(name, "critique_stream", received=received, inputs=pictures, expected=each)
