"""`improve`: draw, critique, plan, redraw, judge. Every prompt ends as one attempt, with a reason."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from artaug._internal.memory import FittingBatches
from artaug.critique import Critic
from artaug.filtering import BestOf, PairFilter
from artaug.pairs import Attempt
from artaug.placement import Placement, Resident
from artaug.plan import RegionPlanner
from artaug.run.bars import RunBars
from artaug.run.checking import Check, check_run
from artaug.run.events import OnEvent, RunEvent, StageClock, ignore_event
from artaug.run.parts import LoopParts
from artaug.run.session import open_session
from artaug.run.stages import RoundStages
from artaug.run.storage.store import Store
from artaug.synthesis import Synthesizer
from artaug.training.distributed import World


def improve(  # noqa: PLR0913 - one verb over many nouns, as `enhance`
    prompts: Sequence[str],
    *,
    synthesizer: Synthesizer,
    critic: Critic,
    planner: RegionPlanner,
    keep: PairFilter,
    seed: int,
    candidates: BestOf | None = None,
    store: Store | str | Path | None = None,
    batch_size: int = 8,
    chunk_size: int | None = None,
    placement: Placement = Resident(),  # noqa: B008 - a frozen value
    on_event: OnEvent | None = None,
    progress: bool = True,
    check: Check = "scorers",
) -> Iterator[Attempt]:
    """Draw every prompt, critique the picture, redraw it by the critic's plan and judge the pair.

    Lazy: a chunk of prompts runs when its first attempt is requested, one stage after the other. Every prompt ends as
    exactly one attempt, with a reason.

    With a ``store``, everything is kept in a folder as it comes: each call of the synthesizer, each answer of the critic, each
    finished chunk. The same call on the same folder goes on where it stopped, and ends to the bit as if it never had. While
    another thread writes the last pictures of a chunk, the first ones of the next chunk are drawn.

    Args:
        prompts: what to draw.
        synthesizer: draws before and after, with the same seed.
        critic: says what to improve; where it abstains, the prompt is skipped. Where that is transient, as after a timeout,
            the prompt is put off: asked again at the end, in a chunk of its own, and skipped if that fails too.
        planner: turns the critique into a plan; where the plan changes nothing, the prompt is skipped.
        keep: decides which pairs got better. Filters that compare pairs, like `TopFraction`, judge all of them at the end.
        seed: of the run; each prompt gets a seed of its own from it, see `artaug.synthesis.attempt_seed`.
        candidates: tries every prompt several times and keeps the best pair of it; once if not given.
        store: the folder that keeps the run, see `Store`; without it pictures are held in memory while they are few, and
            else in a temporary folder.
        batch_size: the most pictures that are drawn at once; halved for the rest of the run where memory runs out.
        chunk_size: prompts in a chunk; None for ``batch_size``.
        placement: where the models of synthesizer, critic and scorers are. `OneAtATime` brings them to the device for their
            stage of a chunk, so that it needs memory for the largest only; give it a large ``chunk_size``.
        on_event: called with every `RunEvent`.
        progress: show progress bars.
        check: how far to check before the first picture. ``"arguments"``: that all is of the right type and fits together;
            ``"scorers"``: also that the filter and every scorer can judge a plain grey picture; ``"everything"``: also
            that the critic answers, which may cost, as that of a server does.

    Returns:
        An iterator over one `Kept`, `Dropped` or `Skipped` for each prompt, in the order of the prompts; those that were
        put off come last.

    Raises:
        PromptError: at once, if there are no prompts or one is blank.
        CriticError: if the critic raises (one that cannot tell abstains), or has had transient faults only, for 10 minutes
            and at 8 pictures or more.
        GuideError: at once, if the planner makes regions and the synthesizer has no guide.
        ModelError: at once, if ``placement`` is to move a model that cannot be moved.
        StorageError: if the store cannot be written to, belongs to a run with other arguments, or is in use.
        InvalidValueError: at once, if an argument is of another type or out of its range; with a line for each thing if
            several are wrong.
        ContractError: if the synthesizer, critic, planner or filter returns something its seam does not allow.
    """
    parts = LoopParts(
        synthesizer=synthesizer,
        critic=critic,
        planner=planner,
        keep=keep,
        candidates=candidates,
        batch_size=batch_size,
        chunk_size=chunk_size,
        placement=placement,
    )
    check_run("improve", prompts, parts, seed=seed, store=store, on_event=on_event, progress=progress, check=check)
    return _attempts(
        prompts,
        parts,
        seed=seed,
        store=None if store is None else Store.of(store),
        on_event=on_event or ignore_event,
        progress=progress,
    )


def _attempts(
    prompts: Sequence[str], parts: LoopParts, *, seed: int, store: Store | None, on_event: OnEvent, progress: bool
) -> Iterator[Attempt]:
    with (
        RunBars(rounds=None, show=progress and World.current().is_main) as bars,
        open_session("improve", prompts, parts, seed=seed, store=store) as session,
        parts.placement.opened(*parts.by_name().values()) as placement,
    ):

        def emit(event: RunEvent) -> None:
            bars.on_event(event)
            on_event(event)

        stages = RoundStages(
            replace(parts, placement=placement),
            session.journal(1),
            StageClock(1, emit),
            seed=seed,
            batches=FittingBatches(parts.batch_size),
            poll=session.poll,
        )
        yield from stages.attempts(prompts, groups=session.groups(1, prompts))
