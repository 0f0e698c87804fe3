"""The check at the door: what `improve` and `enhance` were given, all of it, before anything is drawn."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from PIL import Image

from artaug._internal.arguments import Faults, argument_error, check_argument, check_count
from artaug._internal.prompts import check_disjoint, check_prompts
from artaug.critique import Critic, run_critic
from artaug.errors import GuideError, ModelError
from artaug.filtering import BestOf, PairFilter
from artaug.geometry import Box
from artaug.lora.fusing import Fuser
from artaug.pairs import ImagePair
from artaug.plan import Plan, Region, RegionPlanner
from artaug.run.stop_rule import StopRule
from artaug.scoring import Scorer, score_images
from artaug.synthesis import Synthesizer
from artaug.training import Checkpoints, DifferentialLoRATrainer, Trainable, Validation

Check: TypeAlias = Literal["arguments", "scorers", "everything"]
"""How far the check before a run goes: ``"arguments"`` calls nothing that was passed but the model, which is not run;
``"scorers"`` lets filters and scorers judge one stand-in picture, too; ``"everything"`` also asks the critic, which may cost."""

_GREYS = ((96, 96, 96), (128, 128, 128))
"""Of the stand-ins for the pictures before and after."""


@dataclass(frozen=True, kw_only=True)
class Learning:
    """What `enhance` is given and `improve` is not."""

    trainer: DifferentialLoRATrainer
    fuser: Fuser
    rounds: int
    validation: Validation | None
    stop: StopRule | None
    checkpoints: Checkpoints | None


def check_run(  # noqa: PLR0913 - what one verb over many nouns was given
    owner: str,
    prompts: Sequence[str],
    *,
    synthesizer: Synthesizer,
    critic: Critic,
    planner: RegionPlanner,
    keep: PairFilter,
    candidates: BestOf | None,
    seed: int,
    batch_size: int,
    on_stage: Callable[..., object] | None = None,
    learning: Learning | None = None,
    check: Check,
) -> None:
    """Refuse a run that could not end well, with one error that lists all that is wrong.

    Args:
        owner: the function that was called.
        prompts: this and the others are its arguments.
        synthesizer: likewise.
        critic: likewise.
        planner: likewise.
        keep: likewise.
        candidates: likewise.
        seed: likewise.
        batch_size: likewise.
        on_stage: likewise.
        learning: the arguments that only `enhance` has.
        check: how far to go.

    Raises:
        ArtAugError: of the class of what is wrong if that is one thing, else an `InvalidValueError`.
    """
    faults = Faults(owner)
    types: list[tuple[str, object, type, bool]] = [
        ("synthesizer", synthesizer, Synthesizer, False),
        ("critic", critic, Critic, False),
        ("planner", planner, RegionPlanner, False),
        ("keep", keep, PairFilter, False),
        ("candidates", candidates, BestOf, True),
    ]
    counts = [("batch_size", batch_size, 1), ("seed", seed, 0)]
    if learning is not None:
        types += [
            ("trainer", learning.trainer, DifferentialLoRATrainer, False),
            ("fuser", learning.fuser, Fuser, False),
            ("validation", learning.validation, Validation, True),
            ("stop", learning.stop, StopRule, True),
            ("checkpoints", learning.checkpoints, Checkpoints, True),
        ]
        counts.append(("rounds", learning.rounds, 1))
    with faults.collected():
        check_prompts(prompts)
    for name, value, of, optional in types:
        with faults.collected():
            check_argument(owner, name, value, of, optional=optional)
    for name, number, least in counts:
        with faults.collected():
            check_count(owner, name, number, least=least)
    with faults.collected():
        if on_stage is not None and not callable(on_stage):
            raise argument_error(owner, "on_stage", on_stage, expected="a function of a StageEvent")
    with faults.collected():
        if check not in get_args(Check):
            raise argument_error(owner, "check", check, expected=f"one of {', '.join(map(repr, get_args(Check)))}")
    with faults.collected():
        _check_guide(planner, synthesizer)
    if learning is not None:
        _check_learning(faults, prompts, synthesizer, learning)
    faults.raise_any()
    if check != "arguments":
        dark, lit = (Image.new("RGB", synthesizer.picture_size, grey) for grey in _GREYS)
        plan = Plan(prompts[0], (Region(Box(0, 0, 0.5, 1), prompts[0]),))
        stand_in = ImagePair(prompt=prompts[0], seed=0, before=dark, after=lit, plan=plan)
        _rehearse(faults, stand_in, keep=keep, candidates=candidates, learning=learning)
        if check == "everything":
            with faults.collected(), _named_rehearsal():
                run_critic(critic, [dark], prompts[:1])
        faults.raise_any()


def _check_guide(planner: RegionPlanner, synthesizer: Synthesizer) -> None:
    if not _is(planner, RegionPlanner) or not _is(synthesizer, Synthesizer):
        return
    if planner.makes_regions and not synthesizer.draws_regions:
        raise GuideError(
            f"{type(planner).__name__} makes plans with regions, and this {type(synthesizer).__name__} has no guide to read "
            "them. Give it one, guide=artaug.RegionalAttention(), or take a planner that only rewrites prompts."
        )


def _is(value: object, of: type) -> bool:
    """Whether a value is of the type that its argument promises; if not, that has been said already."""
    return isinstance(value, of)


def _check_learning(faults: Faults, prompts: Sequence[str], synthesizer: Synthesizer, learning: Learning) -> None:
    """Whether the model can be trained in this way, and judged by prompts that it did not learn from."""
    with faults.collected():
        if _is(synthesizer, Synthesizer):
            model = as_trainable(synthesizer)
            if _is(learning.trainer, DifferentialLoRATrainer):
                # A run that ended because too many pairs were good enough would end after all the drawing.
                learning.trainer.check(model, pairs=max(len(prompts), 1) if _is(prompts, Sequence) else 1)
    stop = learning.stop if _is(learning.stop, StopRule) else None
    validation = learning.validation if _is(learning.validation, Validation) else None
    if _is(prompts, Sequence) and all(_is(prompt, str) for prompt in prompts):
        _check_held_out(faults, prompts, stop=stop, validation=validation)
    with faults.collected():
        if isinstance(learning.checkpoints, Checkpoints):
            learning.checkpoints.check()


def as_trainable(synthesizer: Synthesizer) -> Trainable:
    """Return the synthesizer if it has a model to train, and can draw with what was learned.

    Raises:
        ModelError: if it does not.
    """
    name = type(synthesizer).__name__
    if not isinstance(synthesizer, Trainable):
        raise ModelError(
            f"{name} has no model to train: it has no method training(). Use a DiffusersSynthesizer, or implement "
            "artaug.training.Trainable."
        )
    if type(synthesizer).with_lora is Synthesizer.with_lora:
        raise ModelError(
            f"{name} cannot draw with the LoRA that a round learns: it does not override with_lora. Use a "
            "DiffusersSynthesizer, or override it."
        )
    return synthesizer


def _check_held_out(
    faults: Faults, prompts: Sequence[str], *, stop: StopRule | None, validation: Validation | None
) -> None:
    """Refuse to judge by what was learned from, or by what a step and strength were chosen by."""
    learned = "What is learned from says nothing of other prompts."
    if stop is not None:
        with faults.collected():
            check_disjoint(stop.prompts, prompts, owner="StopRule", are="training prompts", why=learned)
    if validation is not None:
        with faults.collected():
            check_disjoint(validation.prompts, prompts, owner="Validation", are="training prompts", why=learned)
    if stop is not None and validation is not None:
        chosen = "They chose the step and the strength of what they would judge, which flatters it."
        with faults.collected():
            check_disjoint(stop.prompts, validation.prompts, owner="StopRule", are="the Validation's too", why=chosen)


def _rehearse(
    faults: Faults, stand_in: ImagePair, *, keep: PairFilter, candidates: BestOf | None, learning: Learning | None
) -> None:
    """Let the filter and every scorer judge a stand-in, so that one that cannot says so now."""
    with faults.collected(), _named_rehearsal():
        keep.rehearse(stand_in)
    scorers: list[tuple[Scorer, str]] = [] if candidates is None else [(candidates.by, stand_in.prompt)]
    if learning is not None:
        rules = (learning.stop, learning.validation)
        scorers += [(rule.scorer, rule.prompts[0]) for rule in rules if rule is not None]
    for scorer, prompt in scorers:
        with faults.collected(), _named_rehearsal():
            score_images(scorer, [stand_in.after], [prompt])


@contextmanager
def _named_rehearsal() -> Iterator[None]:
    """Add to an exception that it comes from the check before a run."""
    try:
        yield
    except Exception as error:
        error.add_note(
            "Raised by the check before a run, on a plain grey picture; nothing was drawn. If it is right for real pictures, "
            "pass check='arguments'."
        )
        raise
