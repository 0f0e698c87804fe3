"""The check at the door: what `improve` and `enhance` were given, all of it, before anything is drawn."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, TypeAlias, get_args

from PIL import Image

from artaug._internal.arguments import Faults, argument_error, check_argument, check_count
from artaug._internal.files import check_disk_space
from artaug._internal.prompts import check_disjoint, check_prompts
from artaug.critique import Critic, run_critic
from artaug.errors import GuideError, ModelError, StorageError
from artaug.filtering import BestOf, PairFilter
from artaug.geometry import Box
from artaug.lora.fusing import Fuser
from artaug.pairs import ImagePair
from artaug.pairwise import PairwiseJudge, judge_images
from artaug.placement import Placement
from artaug.plan import Plan, Region, RegionPlanner
from artaug.run.events import OnEvent
from artaug.run.parts import LearningParts, LoopParts
from artaug.run.session import check_store
from artaug.run.stop_rule import StopRule
from artaug.run.storage.store import RunFolder, Store
from artaug.scoring import Scorer, score_images
from artaug.synthesis import Synthesizer
from artaug.training import Checkpoints, DifferentialLoRATrainer, RemotelyTrainable, Trainable, Validation

Check: TypeAlias = Literal["arguments", "scorers", "everything"]
"""How far the check before a run goes: ``"arguments"`` calls nothing that was passed but the model, which is not run;
``"scorers"`` lets filters and scorers judge one stand-in picture, too; ``"everything"`` also asks the critic, which may cost."""

_PROMPT = "a picture"
"""Of the plans that stand for those to come."""

_GREYS = ((96, 96, 96), (128, 128, 128))
"""Of the stand-ins for the pictures before and after."""


def check_run(  # noqa: PLR0913 - what a run takes
    owner: str,
    prompts: Sequence[str],
    parts: LoopParts,
    learning: LearningParts | None = None,
    *,
    seed: int,
    store: Store | str | Path | None,
    on_event: OnEvent | None,
    progress: bool = True,
    check: object,
) -> None:
    """Refuse a run that could not end well, with one error that lists all that is wrong.

    Args:
        owner: the function that was called.
        prompts: its prompts, as those that follow.
        parts: that draw and judge.
        learning: that learn, in `enhance`.
        seed: of the run.
        store: that keeps it.
        on_event: called with every event.
        progress: whether a bar is shown.
        check: how far to go.

    Raises:
        ArtAugError: of the class of what is wrong if that is one thing, else an `InvalidValueError`.
    """
    faults = Faults(owner)
    with faults.collected():
        check_prompts(prompts)
    for name, value, of, optional in _types(parts, learning):
        with faults.collected():
            check_argument(owner, name, value, of, optional=optional)
    for name, number, least in _counts(parts, learning, seed=seed):
        with faults.collected():
            check_count(owner, name, number, least=least)
    _check_callbacks(faults, owner, on_event=on_event, on_step=None if learning is None else learning.on_step)
    with faults.collected():
        check_argument(owner, "progress", progress, bool)
    with faults.collected():
        store = None if store is None else Store.of(store)
    with faults.collected():
        if not isinstance(check, str) or check not in get_args(Check):
            raise argument_error(owner, "check", check, expected=f"one of {', '.join(map(repr, get_args(Check)))}")
    with faults.collected():
        if _is(parts.placement, Placement):
            # A part of another type, which has been said already, has no models.
            parts.placement.check(owner, {**parts.by_name(), **({} if learning is None else learning.by_name())})
    with faults.collected():
        check_planner_guide(parts.planner, parts.synthesizer)
    if learning is not None:
        _check_learning(faults, prompts, parts.synthesizer, learning)
    faults.raise_any()
    if store is not None:
        with faults.collected():
            folder, _ = check_store(Store.of(store), owner, prompts, parts, learning, seed=seed)
            _check_room(folder, parts, pictures=2 * len(prompts) * (1 if learning is None else learning.rounds))
        faults.raise_any()
    if check == "arguments":
        return
    dark, lit = (Image.new("RGB", parts.synthesizer.picture_size, grey) for grey in _GREYS)
    plan = Plan(prompts[0], (Region(Box(0, 0, 0.5, 1), prompts[0]),))
    stand_in = ImagePair(prompt=prompts[0], seed=0, before=dark, after=lit, plan=plan)
    _rehearse(faults, stand_in, parts, learning)
    if check == "everything":
        with faults.collected(), _named_rehearsal(), parts.placement.stage(parts.critic):
            run_critic(parts.critic, [dark], prompts[:1])
    faults.raise_any()


def _check_room(folder: RunFolder, parts: LoopParts, *, pictures: int) -> None:
    """Refuse a disk that the pictures to come do not fit on.

    Args:
        folder: of the run.
        parts: that draw.
        pictures: that the run takes, should every prompt become a pair, of one candidate.
    """
    count = 1 if parts.candidates is None else parts.candidates.count
    width, height = parts.synthesizer.picture_size
    # Photos of three bytes a pixel are 0.7 to 0.75 of that as lossless WebP: 2.2 MB for 1,024 x 1,024 pixels.
    expected = round(pictures * count * width * height * 3 * 0.75)
    what = f"a run with {pictures * count} pictures of {width} x {height} pixels"
    try:
        check_disk_space(folder.path, expected, what=what)
    except StorageError:
        # Only now, since there may be 40,000 files.
        present = sum(path.stat().st_size for path in folder.images.path.glob("*/*"))
        check_disk_space(folder.path, expected - present, what=f"the rest of {what}" if present else what)


def _types(parts: LoopParts, learning: LearningParts | None) -> Iterator[tuple[str, object, type, bool]]:
    """The name of each part, the part, its class, and whether it may be None."""
    yield "synthesizer", parts.synthesizer, Synthesizer, False
    yield "critic", parts.critic, Critic, False
    yield "planner", parts.planner, RegionPlanner, False
    yield "keep", parts.keep, PairFilter, False
    yield "candidates", parts.candidates, BestOf, True
    yield "placement", parts.placement, Placement, False
    if learning is not None:
        yield "trainer", learning.trainer, DifferentialLoRATrainer, False
        yield "fuser", learning.fuser, Fuser, False
        yield "validation", learning.validation, Validation, True
        yield "stop", learning.stop, StopRule, True
        yield "checkpoints", learning.checkpoints, Checkpoints, True


def _check_callbacks(faults: Faults, owner: str, *, on_event: object, on_step: object) -> None:
    for name, function, event in (("on_event", on_event, "RunEvent"), ("on_step", on_step, "StepEvent")):
        with faults.collected():
            if function is not None and not callable(function):
                raise argument_error(owner, name, function, expected=f"a function of a {event}")


def _counts(parts: LoopParts, learning: LearningParts | None, *, seed: int) -> Iterator[tuple[str, int, int]]:
    """The name of each number, the number, and the least that it may be."""
    yield "seed", seed, 0
    yield "batch_size", parts.batch_size, 1
    if parts.chunk_size is not None:
        yield "chunk_size", parts.chunk_size, 1
    if learning is not None:
        yield "rounds", learning.rounds, 1


def check_planner_guide(planner: RegionPlanner, synthesizer: Synthesizer) -> None:
    """Refuse a planner whose plans the synthesizer cannot draw, and a synthesizer that draws no plain picture.

    Raises:
        GuideError: for regions that it would not read, or a guide that cannot act in the drawing.
        ModelError: as `Synthesizer.check_plan` says it.
    """
    if not _is(planner, RegionPlanner) or not _is(synthesizer, Synthesizer):
        return
    if planner.makes_regions and not synthesizer.draws_regions:
        raise GuideError(
            f"{type(planner).__name__} makes plans with regions, and this {type(synthesizer).__name__} has no guide to read "
            "them. Give it one, guide=artaug.RegionalAttention(), or take a planner that only rewrites prompts."
        )
    synthesizer.check_plan(Plan(_PROMPT))
    canvas = planner.canvas_over(Image.new("RGB", synthesizer.picture_size, _GREYS[0]))
    if canvas is not None:
        regions = (Region(Box(0, 0, 1, 1), _PROMPT),) if planner.makes_regions else ()
        synthesizer.check_plan(Plan(_PROMPT, regions, canvas))


def _is(value: object, of: type) -> bool:
    """Whether a value is of the type that its argument promises; if not, that has been said already."""
    return isinstance(value, of)


def _check_learning(faults: Faults, prompts: Sequence[str], synthesizer: Synthesizer, learning: LearningParts) -> None:
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


def as_trainable(synthesizer: Synthesizer) -> Trainable | RemotelyTrainable:
    """Return the synthesizer if it has a model to train, and can draw with what was learned.

    Raises:
        ModelError: if it does not.
    """
    name = type(synthesizer).__name__
    if not isinstance(synthesizer, Trainable | RemotelyTrainable):
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


def _rehearse(faults: Faults, stand_in: ImagePair, parts: LoopParts, learning: LearningParts | None) -> None:
    """Let the filter and every scorer judge a stand-in, so that one that cannot says so now."""
    with faults.collected(), _named_rehearsal(), parts.placement.stage(parts.keep):
        parts.keep.rehearse(stand_in)
    scorers: list[tuple[Scorer | PairwiseJudge, str]] = (
        [] if parts.candidates is None else [(parts.candidates.by, stand_in.prompt)]
    )
    if learning is not None:
        rules = (learning.stop, learning.validation)
        scorers += [(rule.scorer, rule.prompts[0]) for rule in rules if rule is not None]
    for scorer, prompt in scorers:
        with faults.collected(), _named_rehearsal(), parts.placement.stage(scorer):
            if isinstance(scorer, PairwiseJudge):
                judge_images(scorer, [stand_in.after], [stand_in.before], [prompt])
            else:
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
