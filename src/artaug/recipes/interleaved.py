"""Interleaved reasoning: a model thinks, draws, reflects on its picture in words, and draws again from what it has written."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from artaug._internal.annotations import checked
from artaug.critique import Critic
from artaug.recipes.reflections import ReflectionPlanner
from artaug.run.refine import refine_each
from artaug.run.turn_rules import Budget, TurnRule
from artaug.synthesis import Synthesizer
from artaug.trajectories import Think, Trajectory


@checked
def irg(  # noqa: PLR0913 - one verb over many nouns, as `enhance`
    prompts: Sequence[str],
    *,
    synthesizer: Synthesizer,
    think: Think,
    reflect: Critic,
    contexts: bool = False,
    turns: int = 2,
    stop: TurnRule | None = None,
    budget: Budget | None = None,
    seed: int = 0,
    folder: str | Path | None = None,
    progress: bool = True,
) -> Iterator[Trajectory]:
    r"""Think, draw, reflect and draw again (Interleaving Reasoning Generation, arXiv 2509.06945).

    *The paper's:* a thought before the first picture, a reflection on it in three parts, a second picture, and guidance by several
    contexts. *Ours:* a language model and a drawing model, where the paper has one model (BAGEL) that was trained to do both; the
    wording of the messages; more turns, and a rule that ends them; the prompt, without the first thought, as the context without a
    reflection. What its training needs is exported by `irgl_conversations`; what a LoRA needs, by `Trajectory.pairs`.

    Args:
        prompts: what to draw.
        synthesizer: draws every turn, each prompt from one seed.
        think: before the first picture, such as ``ChatThought(ServedChat(...))``.
        reflect: on every picture but the last, such as ``ChatReflection(ServedChat(...))``. Its newest suggestion is drawn next.
        contexts: draw further turns by two contexts, with and without the reflection; the synthesizer's guide is a `ContextGuidance`.
        turns: at most this many pictures of a prompt; two are the paper's.
        stop: see `artaug.refine`.
        budget: see `artaug.refine`.
        seed: of the run; each prompt gets a seed of its own from it.
        folder: see `artaug.refine_each`.
        progress: show a progress bar.

    Returns:
        One trajectory for each prompt, in their order, drawn when it is asked for.

    Raises:
        ArtAugError: see `artaug.refine_each`.

    >>> import artaug as aa
    >>> from artaug.recipes import ChatReflection, ChatThought, irg
    >>> from artaug.testing import SwatchSynthesizer
    >>> (trajectory,) = irg(
    ...     ["a cone"],
    ...     synthesizer=SwatchSynthesizer(),
    ...     think=ChatThought(lambda message: "<think>It is plain.</think> a red cone"),
    ...     reflect=ChatReflection(lambda message, image: "It is dark.\nFinal prompt: a red cone, lit by a lamp"),
    ...     progress=False,
    ... )
    >>> [turn.plan.prompt for turn in trajectory.turns]
    ['a red cone', 'a red cone, lit by a lamp']
    """
    return refine_each(
        prompts,
        synthesizer=synthesizer,
        critic=reflect,
        planner=ReflectionPlanner(contexts=contexts),
        think=think,
        turns=turns,
        stop=stop,
        budget=budget,
        seed=seed,
        folder=folder,
        progress=progress,
    )
