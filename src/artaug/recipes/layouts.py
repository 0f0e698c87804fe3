"""Layout first: a language model or a function says what goes where before anything is drawn, and regions draw it so."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias, final

from PIL.Image import Image

from artaug._internal.annotations import checked
from artaug._internal.arguments import check_argument, check_count
from artaug._internal.contracts import check_result
from artaug._internal.prompts import check_prompts
from artaug.critics import parse_reply
from artaug.critique import Abstention, Critique
from artaug.errors import GuideError, PartError
from artaug.plan import GreedyPlanner, Plan, RegionPlanner, run_planner
from artaug.recipes.chat import Chat, replied
from artaug.serving.chat import escape_chat_tokens
from artaug.synthesis import Synthesizer, attempt_seed, draw

LayOut: TypeAlias = Callable[[str], Critique | Abstention]
"""From a prompt to what goes where, as suggestions of a critique; or why there is no layout."""
_PLANNER = GreedyPlanner(max_regions=8, feather=0.05)
_MESSAGE = """\
Lay out a picture before it is drawn. The prompt:
{prompt}

For every object of the prompt, say where it goes and describe it on its own, with its attributes. Boxes must not overlap much. \
Numbers are thousandths of the picture's width and height, from the top left. Reply with JSON only: \
{{"suggestions": [{{"bbox_2d": [left, top, right, bottom], "prompt": "..."}}]}}"""


@checked
@dataclass(frozen=True, kw_only=True, eq=False)
class LaidOut:
    """A prompt, its layout and its picture."""

    plan: Plan
    """Without regions where there was no layout: then the picture is a plain one."""
    seed: int
    image: Image
    reason: str = ""
    """Why there was no layout, or what was repaired in it; empty if nothing was."""


@checked
def layout_first(
    prompts: Sequence[str],
    *,
    synthesizer: Synthesizer,
    lay_out: LayOut,
    planner: RegionPlanner = _PLANNER,
    seed: int = 0,
) -> Iterator[LaidOut]:
    """Lay every prompt out in boxes before its first picture, and draw it with them.

    *From papers:* a language model writes boxes with a description each, and a regional way of drawing holds to them (LLM-grounded
    diffusion, arXiv 2305.13655; RPG, 2401.11708). *Ours:* the regions are those of any guide, such as `RegionalAttention`,
    where LMD moves latents along attention and RPG splits the picture in rows and columns with prompts of their own; no background
    prompt of its own and no chain of thought.

    Args:
        prompts: what to draw.
        synthesizer: draws with regions, so it has a guide.
        lay_out: such as ``ChatLayout(ServedChat(...))``. Where it abstains, the picture is a plain one, with the reason.
        planner: makes regions of the boxes.
        seed: of the run; each prompt gets a seed of its own from it.

    Returns:
        One for each prompt, in their order, drawn when it is asked for. With a `CachedSynthesizer` each picture is drawn once.

    Raises:
        PromptError: if there are no prompts or one is blank.
        GuideError: if the synthesizer draws no regions.

    >>> import artaug as aa
    >>> from artaug.recipes import layout_first
    >>> from artaug.testing import SwatchSynthesizer
    >>> left = aa.Critique((aa.Suggestion(aa.Box(0, 0, 0.5, 1), "a red cone"),))
    >>> (drawn,) = layout_first(["a red cone on the left"], synthesizer=SwatchSynthesizer(), lay_out=lambda prompt: left)
    >>> drawn.plan.regions[0].prompt
    'a red cone'
    """
    check_prompts(prompts)
    check_argument("layout_first", "synthesizer", synthesizer, Synthesizer)
    check_argument("layout_first", "planner", planner, RegionPlanner)
    check_count("layout_first", "seed", seed, least=0)
    if not synthesizer.draws_regions:
        raise GuideError(
            f"layout_first: {type(synthesizer).__name__} has no guide, so the layout would have no effect. Give it one, such "
            "as artaug.RegionalAttention()."
        )
    return _drawn(prompts, synthesizer, lay_out, planner, seed)


def _drawn(
    prompts: Sequence[str], synthesizer: Synthesizer, lay_out: LayOut, planner: RegionPlanner, seed: int
) -> Iterator[LaidOut]:
    for index, prompt in enumerate(prompts):
        layout = lay_out(prompt)
        if isinstance(layout, Abstention):
            plan, reason = Plan(prompt), layout.reason
        else:
            layout = check_result("lay_out", "", layout, of=Critique, inputs=repr(prompt))
            plan, reason = run_planner(planner, prompt, layout), "; ".join(layout.repairs)
        own = attempt_seed(seed, round_number=1, prompt_index=index)
        (image,) = draw(synthesizer, [plan], seeds=[own])
        yield LaidOut(plan=plan, seed=own, image=image, reason=reason)


@checked
@final
@dataclass(frozen=True)
class ChatLayout:
    """Asks a language model for a layout: a ``lay_out`` for `layout_first`. A reply that is none, or no reply, is an abstention."""

    chat: Chat
    """Such as a `ServedChat`."""

    def __call__(self, prompt: str) -> Critique | Abstention:
        """The layout in the reply."""
        try:
            reply = replied(self.chat(_MESSAGE.format(prompt=escape_chat_tokens(prompt))))
        except PartError as error:
            return Abstention(str(error))
        return parse_reply(reply, size=(1000, 1000), coordinates="thousandths")
