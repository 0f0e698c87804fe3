"""A checklist: the prompt becomes requirements, each is verified in the picture, and only what fails is drawn again."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeAlias, final

from PIL.Image import Image

from artaug._internal.annotations import checked
from artaug._internal.arguments import Faults, argument_error, check_argument, check_count, check_finite_number
from artaug._internal.contracts import check_batch, check_result, contract_error
from artaug._internal.lanes import Lane
from artaug._internal.progress_bar import ProgressBar
from artaug._internal.prompts import check_prompts
from artaug.plan import Plan
from artaug.recipes.chat import Chat, answer_of, replied, without_bullet
from artaug.run.flow import Steps, awaited, chunks_under_way, run_in_order
from artaug.scoring import Scorer, score_images
from artaug.serving.chat import escape_chat_tokens
from artaug.synthesis import Synthesizer, attempt_seed, draw

Requirements: TypeAlias = Callable[[str], Sequence[str]]
"""From a prompt to what a picture of it has to show, each a statement that can be verified alone."""
Redraw: TypeAlias = Callable[[str, Sequence[str], Image], Plan]
"""From a prompt, the requirements that its best picture fails, and that picture, to what is drawn next."""
_MOST = 32
_MESSAGE = """\
List what a picture has to show to be true to this prompt, one requirement in a line: every object, its number, its attributes, its \
place and how it stands to the others. Each line must be clear on its own. Reply with the lines alone.
The prompt: {prompt}"""


@checked
@dataclass(frozen=True, kw_only=True, eq=False)
class Checked:
    """How a prompt ended: its best picture, and what of its checklist that picture fails."""

    prompt: str
    plan: Plan
    """What the best picture was drawn from."""
    seed: int
    image: Image
    scores: dict[str, float]
    """Of the best picture, by requirement."""
    failed: tuple[str, ...]
    """Requirements that it does not meet; none if all is well."""
    pictures: int
    """How many were drawn."""


def checklist(  # noqa: PLR0913 - one verb over many nouns, as `enhance`
    prompts: Sequence[str],
    *,
    synthesizer: Synthesizer,
    requirements: Requirements,
    verify: Scorer,
    at_least: float = 0.5,
    redraw: Redraw = lambda prompt, *_: Plan(prompt),
    turns: int = 4,
    seed: int = 0,
    progress: bool = True,
) -> list[Checked]:
    """Draw every prompt until its picture meets all requirements, and spend further pictures only on those that fail.

    *The paper's* (RAISE, arXiv 2603.00483): requirements from the prompt, each verified, computation only where one is unsatisfied. *Ours:*
    one candidate a turn, by new noise and, with ``redraw``, another prompt, regions, or an edit of the picture; RAISE keeps a population,
    and its verifier has captions, boxes and depth. Nothing is learned. Where pictures are drawn elsewhere, as many prompts are under
    way as that takes.

    Args:
        prompts: what to draw.
        synthesizer: draws; with a `CachedSynthesizer` each picture is drawn once, also after a stop.
        requirements: such as ``ChatRequirements(ServedChat(...))``. A prompt without any is its own only one.
        verify: scores a picture with a requirement in the place of the prompt, such as `VQAScore`.
        at_least: a requirement is met from this score on.
        redraw: makes the plan of every further turn from what fails in the best picture so far; a plain picture if not given.
        turns: at most this many pictures of a prompt.
        seed: of the run; each picture gets a seed of its own from it.
        progress: show a progress bar.

    Returns:
        One for each prompt, in their order, with the picture that fails least; of equals, the first.

    Raises:
        PromptError: if there are no prompts or one is blank.
        InvalidValueError: if an argument is of another type or out of its range.

    >>> from artaug.recipes import checklist
    >>> from artaug.testing import FixedScorer, SwatchSynthesizer
    >>> (met,) = checklist(
    ...     ["a red cone"],
    ...     synthesizer=SwatchSynthesizer(),
    ...     requirements=lambda prompt: [prompt],
    ...     verify=FixedScorer(1.0),
    ...     progress=False,
    ... )
    >>> met.pictures, met.failed
    (1, ())
    """
    faults = Faults("checklist")
    with faults.collected():
        check_prompts(prompts)
    with faults.collected():
        check_argument("checklist", "synthesizer", synthesizer, Synthesizer)
    with faults.collected():
        check_argument("checklist", "verify", verify, Scorer)
    with faults.collected():
        check_argument("checklist", "progress", progress, bool)
    with faults.collected():
        check_finite_number("checklist", "at_least", at_least)
    for name, function in (("requirements", requirements), ("redraw", redraw)):
        with faults.collected():
            if not callable(function):
                raise argument_error("checklist", name, function, expected="a function")
    for name, count, least in (("turns", turns, 1), ("seed", seed, 0)):
        with faults.collected():
            check_count("checklist", name, count, least=least)
    faults.raise_any()
    drawing = synthesizer.max_concurrency
    with (
        Lane(drawing, name="draw") if drawing else nullcontext() as lane,
        ProgressBar("checklist", total=len(prompts), unit="prompt", show=progress) as bar,
    ):
        work = _Checking(synthesizer, requirements, verify, at_least, redraw, lane)
        tasks = (
            work.steps(
                prompt,
                [attempt_seed(seed, round_number=1, prompt_index=index, candidate=turn) for turn in range(turns)],
            )
            for index, prompt in enumerate(prompts)
        )
        depth = chunks_under_way(drawing=drawing, asking=0, writes_behind=False)
        ended = []
        for checked in run_in_order(tasks, depth=depth, poll=lambda: None):
            ended.append(checked)
            bar.advance()
    return ended


@dataclass(frozen=True)
class _Checking:
    """What all prompts share."""

    synthesizer: Synthesizer
    requirements: Requirements
    verify: Scorer
    at_least: float
    redraw: Redraw
    lane: Lane | None

    def steps(self, prompt: str, seeds: Sequence[int]) -> Steps[Checked]:
        """Draw one prompt until nothing fails, or the turns are over."""
        required, tried = _listed(self.requirements, prompt), list[Checked]()
        for seed in seeds:
            plan = Plan(prompt)
            if tried:
                best = _best(tried)
                plan = check_result(
                    "redraw", "", self.redraw(prompt, best.failed, best.image), of=Plan, inputs=repr(prompt)
                )
            (image,) = yield from awaited(self.lane, partial(draw, self.synthesizer, [plan], seeds=[seed]))
            scores = dict(zip(required, score_images(self.verify, [image] * len(required), required), strict=True))
            failed = tuple(requirement for requirement, score in scores.items() if score < self.at_least)
            number = len(tried) + 1
            tried.append(
                Checked(prompt=prompt, plan=plan, seed=seed, image=image, scores=scores, failed=failed, pictures=number)
            )
            if not failed:
                break
        return replace(_best(tried), pictures=len(tried))


def _best(tried: Sequence[Checked]) -> Checked:
    """The first of those that fail least."""
    return min(tried, key=lambda checked: len(checked.failed))


def _listed(requirements: Requirements, prompt: str) -> list[str]:
    """The different requirements of a prompt that say something."""
    listed = requirements(prompt)
    if isinstance(listed, str) or not isinstance(listed, Sequence):  # a text is a sequence of letters, to Python
        raise contract_error("requirements", "", received=repr(listed), inputs=repr(prompt), expected="a list of str")
    texts = check_batch("requirements", "", listed, of=str, count=len(listed), per="requirement")
    return list(dict.fromkeys(text.strip() for text in texts if text.strip())) or [prompt]


@checked
@final
@dataclass(frozen=True)
class ChatRequirements:
    """Asks a language model for the checklist of a prompt: ``requirements`` for `checklist`."""

    chat: Chat
    """Such as a `ServedChat`."""

    def __call__(self, prompt: str) -> list[str]:
        """The lines of the reply, without bullets and numbers; at most 32."""
        lines = answer_of(replied(self.chat(_MESSAGE.format(prompt=escape_chat_tokens(prompt))))).splitlines()
        return [text for line in lines if (text := without_bullet(line))][:_MOST]
