"""`enhance`: rounds of the loop, improve, train, combine, until a round does not help."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from artaug._internal.memory import FittingBatches
from artaug.critique import Critic
from artaug.errors import NothingToLearnError
from artaug.evaluation.comparison import Arm, Comparison
from artaug.evaluation.comparison.evaluator import Evaluator, scorer_names
from artaug.filtering import BestOf, PairFilter
from artaug.lora.fusing import ConcatFuser, Fuser, fuse_loras
from artaug.lora.lora import LoRA
from artaug.pairs import Kept
from artaug.placement import Placement, Resident
from artaug.plan import RegionPlanner
from artaug.run.bars import RunBars
from artaug.run.checking import Check, as_trainable, check_run
from artaug.run.events import OnEvent, RoundEvent, RunEvent, StageClock
from artaug.run.interruption import GracefulStop
from artaug.run.parts import LearningParts, LoopParts
from artaug.run.results import Enhancement, Round, end_of_rounds, no_pairs_reason
from artaug.run.session import RunSession, open_session
from artaug.run.stages import RoundStages
from artaug.run.stop_rule import StopRule
from artaug.run.storage.cached_synthesizer import CachedSynthesizer
from artaug.run.storage.store import Store
from artaug.run.storage.stored_rounds import read_round, write_round
from artaug.synthesis import Synthesizer, held_out_seed, picture_seeds
from artaug.training import (
    Checkpoints,
    DifferentialLoRATrainer,
    StepEvent,
    Validation,
)
from artaug.training.distributed import World

_KEPT_IMAGES = 12
"""Held-out pictures of a round that its comparison refers to, where there is a store."""


def enhance(  # noqa: PLR0913 - one verb over many nouns, each with a good default or none possible
    prompts: Sequence[str],
    *,
    synthesizer: Synthesizer,
    critic: Critic,
    planner: RegionPlanner,
    keep: PairFilter,
    trainer: DifferentialLoRATrainer,
    fuser: Fuser = ConcatFuser(),  # noqa: B008 - a frozen value
    rounds: int = 3,
    candidates: BestOf | None = None,
    validation: Validation | None = None,
    stop: StopRule | None = None,
    store: Store | str | Path | None = None,
    checkpoints: Checkpoints | None = None,
    seed: int = 0,
    batch_size: int = 8,
    chunk_size: int | None = None,
    placement: Placement = Resident(),  # noqa: B008 - a frozen value
    progress: bool = True,
    on_event: OnEvent | None = None,
    on_step: Callable[[StepEvent], None] | None = None,
    check: Check = "scorers",
) -> Enhancement:
    """Improve, train and combine, round after round, until a round does not help.

    Every round draws all prompts with new seeds and with the LoRA of the rounds before, and learns only what the
    critic still finds to improve. The base model is never changed.

    With a ``store``, everything is kept in a folder as it comes. Whatever ended a call, a kill, Ctrl-C, a full disk or an
    error: the same call on the same folder goes on where it was, draws and asks nothing again, and ends with the same
    attempts and the same LoRA to the bit.

    Args:
        prompts: what to draw and learn from.
        synthesizer: draws, and gives its model to the trainer.
        critic: see `improve`.
        planner: see `improve`.
        keep: see `improve`.
        trainer: learns a LoRA from the kept pairs of a round.
        fuser: combines the LoRA of each round with that of the rounds before, which it was learned on.
        rounds: at most this many, at least 1.
        candidates: see `improve`.
        validation: chooses each round's step and strength by pictures; without it the last step counts, at strength 1.
        stop: ends the loop when a round has not helped on held-out prompts; without it all rounds run.
        store: the folder that keeps the run, see `Store`; without it a run is held in memory, and nothing of it outlives an
            error but the rounds before, as the error's ``result``.
        checkpoints: how often a training saves its state, and how many of them stay. With a ``store`` they are in its folder,
            and ``folder`` does not count; without one, ``folder`` is the store.
        seed: of the run; the same arguments give the same LoRA.
        batch_size: see `improve`.
        chunk_size: see `improve`.
        placement: see `improve`; trainings and the measuring of a round keep to it, too.
        progress: show progress bars.
        on_event: called with every `RunEvent`, the steps of the trainings among them.
        on_step: called after every step of a training, such as ``tracker.log_step``.
        check: how far to check before the first picture, see `improve`.

    Returns:
        The rounds and why they ended; ``.lora`` combines those that helped.

    Raises:
        InvalidValueError: before anything is drawn, as all that follow but the last two: if an argument is of another type
            or out of its range, if there would be fewer steps than the objective needs should every prompt become a pair,
            or, with a line for each, if several things are wrong.
        PromptError: if there are no prompts, or if those of ``stop`` or ``validation`` are not held out: a training
            prompt is among them, or both of them have the same.
        GuideError: if the planner makes regions and the synthesizer has no guide.
        ModelError: if the synthesizer has no model to train, or one that cannot be trained in this way, or ``placement`` is to
            move a model that cannot be moved.
        LoRAMismatchError: if the trainer's targets select no layer of the model.
        StorageError: if the store cannot be written to, belongs to a run with other arguments, or is in use.
        NothingToLearnError: if the first round keeps no pair; the message counts what happened to the prompts.
        CriticError: if the critic raises or stays away, see `improve`.

    Whatever a round raises, also the ``KeyboardInterrupt`` of a run that is stopped, has the rounds before it as its
    ``result``. A first Ctrl-C or SIGTERM stops the run at the next safe point, a second one at once.
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
    learning = LearningParts(
        trainer=trainer,
        fuser=fuser,
        rounds=rounds,
        validation=validation,
        stop=stop,
        checkpoints=checkpoints,
        on_step=on_step,
    )
    if store is None and isinstance(checkpoints, Checkpoints):
        store = checkpoints.folder
    check_run(
        "enhance", prompts, parts, learning, seed=seed, store=store, on_event=on_event, progress=progress, check=check
    )
    place = None if store is None else Store.of(store)
    with (
        RunBars(rounds=rounds, show=progress and World.current().is_main) as bars,
        GracefulStop() as stop_signal,
        open_session("enhance", prompts, parts, learning, seed=seed, store=place, stop=stop_signal) as session,
        placement.opened(*parts.by_name().values(), *learning.by_name().values()) as opened,
    ):

        def emit(event: RunEvent) -> None:
            bars.on_event(event)
            if on_event is not None:
                on_event(event)

        parts = replace(parts, placement=opened)
        result = _Rounds(parts, learning, session, seed=seed, progress=progress, emit=emit).run(prompts)
    return result  # noqa: RET504 - for mypy, a with block may swallow what is raised in it


@dataclass(frozen=True)
class _Rounds:
    """The rounds of one call: improve, train, combine, measure, the same every time."""

    parts: LoopParts
    """Its synthesizer is the base, without a LoRA."""
    learning: LearningParts
    session: RunSession
    seed: int
    progress: bool
    emit: OnEvent
    measured: dict[int, Arm] = field(default_factory=dict)
    """By number, the last round that this call has measured: its scores are the base's of the round after it."""

    def run(self, prompts: Sequence[str]) -> Enhancement:
        """Run rounds until one of them is the last."""
        finished: list[Round] = []
        while True:
            number = len(finished) + 1
            try:
                outcome = self._run_round(prompts, finished, number=number)
            except BaseException as error:  # the rounds before took hours; what stops the run carries them
                reason = f"round {number} stopped with {type(error).__name__}: {error}"
                error.result = Enhancement(rounds=tuple(finished), stop_reason=reason)  # type: ignore[attr-defined]
                raise
            if isinstance(outcome, str):
                return Enhancement(rounds=tuple(finished), stop_reason=outcome)
            finished.append(outcome)
            if (end := end_of_rounds(finished, rounds=self.learning.rounds)) is not None:
                return Enhancement(rounds=tuple(finished), stop_reason=end)

    def _run_round(self, prompts: Sequence[str], finished: Sequence[Round], *, number: int) -> Round | str:
        """Run a round, or read it from the store; the answer is a reason, in words, where no pair was kept."""
        groups = self.session.groups(number, prompts)
        folder = self.session.round_folder(number)
        stored = None if folder is None else read_round(folder, number)
        steps_before = sum(before.training.steps for before in finished)
        if stored is not None:
            self.emit(RoundEvent(round=stored, run_step=steps_before + stored.training.steps, resumed=True))
            return stored
        current = self.parts.synthesizer.with_lora(finished[-1].lora) if finished else self.parts.synthesizer
        clock = StageClock(number, self.emit)
        parts = replace(self.parts, synthesizer=current)
        stages = RoundStages(
            parts,
            self.session.journal(number),
            clock,
            seed=self.seed,
            batches=FittingBatches(parts.batch_size),
            poll=self.session.poll,
        )
        stream = stages.attempts(prompts, groups=groups)
        attempts = self.session.collected(number, stream)
        pairs = [attempt.pair for attempt in attempts if isinstance(attempt, Kept)]
        reason = no_pairs_reason(number, attempts)
        if reason is not None:
            if number == 1:
                raise NothingToLearnError(f"{reason}. Look at what the critic answers, or loosen the filter.")
            return reason
        seed = picture_seeds(self.seed, number)[-1]
        with clock.stage("train", len(pairs)):
            training = self.learning.trainer.train(
                pairs,
                as_trainable(current),
                seed=seed,
                checkpoints=self._checkpoints(number, prompts=groups[-1]),
                validation=self.learning.validation,
                cache=None if self.session.folder is None else self.session.folder.latents,
                placement=self.parts.placement,
                on_step=partial(self._on_step, number, steps_before),
                progress=self.progress,
            )
        with clock.stage("combine", number):
            # A training learns what is missing to what it draws with: the base and the LoRA of the round before, as that
            # was fused. So that LoRA, not the trainings behind it, is what its update is added to. Without loss the sums
            # are the same, the paper's; a fuser that cuts ranks would else leave out twice what it left out once.
            lora = fuse_loras(self.learning.fuser, [*(before.lora for before in finished[-1:]), training.lora])
        with clock.stage("measure", 0 if self.learning.stop is None else len(self.learning.stop.prompts)):
            comparison, accepted = self._measure_gain(finished, lora)
        result = Round(
            number=number,
            attempts=attempts,
            training=training,
            lora=lora,
            seconds=clock.seconds,
            gain=None if comparison is None else comparison.rows[0],
            accepted=accepted,
            comparison=None if comparison is None else _with_first_images(comparison, self._kept_images),
        )
        if folder is not None:
            result = write_round(folder, result)
        if comparison is not None and result.comparison is not None:
            # A judge compares all pictures of this round with those of the next one.
            has_judge = self.learning.stop is not None and bool(self.learning.stop.judges)
            self.measured.clear()
            self.measured[number] = (comparison if has_judge else result.comparison).candidates["after"]
        self.emit(RoundEvent(round=result, run_step=steps_before + training.steps))
        return result

    def _on_step(self, number: int, steps_before: int, event: StepEvent) -> None:
        event = replace(event, round_number=number, steps_before=steps_before)
        self.emit(event)
        if self.learning.on_step is not None:
            self.learning.on_step(event)
        self.session.poll()

    def _checkpoints(self, number: int, *, prompts: int) -> Checkpoints | None:
        """In the store, a folder for the training of so many prompts: more prompts are another training."""
        folder = self.session.round_folder(number)
        if folder is None:
            return None
        place = folder.path / f"checkpoints-{prompts}"
        given = self.learning.checkpoints
        return Checkpoints(folder=place) if given is None else replace(given, folder=place)

    def _measure_gain(self, finished: Sequence[Round], lora: LoRA) -> tuple[Comparison | None, bool]:
        """The comparison with the round before on held-out prompts, and whether the gain is enough.

        All rounds draw the same held-out pictures, so what is compared with is what the round before has drawn.
        """
        stop = self.learning.stop
        if stop is None:
            return None, True
        seed = held_out_seed(picture_seeds(self.seed, 1)[0])
        evaluator = Evaluator(
            prompts=tuple(stop.prompts),
            seeds=tuple(picture_seeds(seed, len(stop.prompts))),
            scorers=stop.scorers,
            judges=stop.judges,
            diversity=None,
            batch_size=self.parts.batch_size,
            keep_images=len(stop.prompts) if stop.judges else self._kept_images,
        )
        before = self.measured.get(len(finished))
        comparison = evaluator.compare(
            {
                "base": self._held_out_artist(finished[-1].lora if finished else None) if before is None else before,
                "after": self._held_out_artist(lora),
            },
            seed=seed,
            filtered_by=scorer_names(
                [self.parts.keep] if self.parts.candidates is None else [self.parts.keep, self.parts.candidates]
            ),
            placement=self.parts.placement,
            progress=self.progress,
        )
        return comparison, stop.accepts(comparison, seed=seed)

    @property
    def _kept_images(self) -> int:
        """Held-out pictures of a round that its comparison refers to."""
        return 0 if self.session.folder is None else _KEPT_IMAGES

    def _held_out_artist(self, lora: LoRA | None) -> Synthesizer:
        """What draws held-out pictures; with a store, each call of it once, also after a kill."""
        base = self.parts.synthesizer
        artist = base if lora is None else base.with_lora(lora)
        folder = self.session.folder
        return artist if folder is None else CachedSynthesizer(artist, folder=folder.measure, images=folder.images)


def _with_first_images(comparison: Comparison, count: int) -> Comparison:
    """The comparison with the first pictures of each arm."""
    candidates = {name: replace(arm, images=arm.images[:count]) for name, arm in comparison.candidates.items()}
    return replace(
        comparison, base=replace(comparison.base, images=comparison.base.images[:count]), candidates=candidates
    )
