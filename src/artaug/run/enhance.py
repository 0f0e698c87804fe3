"""Rounds of the loop: improve, train, combine, until a round does not help."""

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tqdm.auto import tqdm

from artaug.critique import Critic
from artaug.errors import ArtAugError, NothingToLearnError
from artaug.evaluation.comparison import ScoreRow, compare
from artaug.filtering import BestOf, PairFilter
from artaug.lora.fusing import ConcatFuser, Fuser, fuse_loras
from artaug.pairs import Attempt, Dropped, Kept, Skipped
from artaug.plan import RegionPlanner
from artaug.run.checking import Check, as_trainable, check_run
from artaug.run.improve import StageEvent, improve, stage_timer
from artaug.run.parts import LearningParts, LoopParts
from artaug.run.results import Enhancement, Round
from artaug.run.stop_rule import StopRule
from artaug.synthesis import Synthesizer, held_out_seed, picture_seeds
from artaug.training import Checkpoints, DifferentialLoRATrainer, Validation


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
    checkpoints: Checkpoints | None = None,
    seed: int = 0,
    batch_size: int = 8,
    progress: bool = True,
    check: Check = "scorers",
) -> Enhancement:
    """Improve, train and combine, round after round, until a round does not help.

    Every round draws all prompts with new seeds and with the LoRA of the rounds before, and learns only what the
    critic still finds to improve. The base model is never changed.

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
        checkpoints: where trainings save their state, each round in a folder of its own. A run that was killed draws
            its pictures again; its trainings resume, or return at once if they had finished.
        seed: of the run; the same arguments give the same LoRA.
        batch_size: prompts in a chunk, see `improve`.
        progress: show progress bars.
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
        ModelError: if the synthesizer has no model to train, or one that cannot be trained in this way.
        LoRAMismatchError: if the trainer's targets select no layer of the model.
        StorageError: if a checkpoint cannot be written, or belongs to a run with other arguments or other pictures.
        NothingToLearnError: if the first round keeps no pair; the message counts what happened to the prompts.
        CriticError: if the critic raises or stays away, see `improve`.

    Every `ArtAugError` that a round raises has the rounds before it as its ``result``.
    """
    parts = LoopParts(synthesizer=synthesizer, critic=critic, planner=planner, keep=keep, candidates=candidates)
    learning = LearningParts(
        trainer=trainer, fuser=fuser, rounds=rounds, validation=validation, stop=stop, checkpoints=checkpoints
    )
    check_run("enhance", prompts, parts, learning, seed=seed, batch_size=batch_size, check=check)
    stages = _RoundStages(parts, learning, batch_size=batch_size, progress=progress)
    finished: list[Round] = []
    for number, round_seed in enumerate(picture_seeds(seed, rounds), start=1):
        try:
            outcome = stages.run_round(prompts, finished, seed=round_seed)
        except ArtAugError as error:  # the rounds before took hours; the error carries them
            reason = f"round {number} stopped with {type(error).__name__}: {error}"
            error.result = Enhancement(rounds=tuple(finished), stop_reason=reason)
            raise
        if isinstance(outcome, str):
            return Enhancement(rounds=tuple(finished), stop_reason=outcome)
        finished.append(outcome)
        if not outcome.accepted:
            reason = f"round {number} did not help on held-out prompts"
            return Enhancement(rounds=tuple(finished), stop_reason=reason)
    return Enhancement(rounds=tuple(finished), stop_reason=f"all {rounds} rounds ran")


@dataclass(frozen=True)
class _RoundStages:
    """The stages of a round, the same in every round: improve, train, combine, measure."""

    parts: LoopParts
    """Its synthesizer is the base, without a LoRA."""
    learning: LearningParts
    batch_size: int
    progress: bool

    def run_round(self, prompts: Sequence[str], finished: Sequence[Round], *, seed: int) -> Round | str:
        """Run the round after those ``finished``; the answer is a reason, in words, where no pair was kept."""
        number = len(finished) + 1
        current = self.parts.synthesizer.with_lora(finished[-1].lora) if finished else self.parts.synthesizer
        seconds: defaultdict[str, float] = defaultdict(float)

        def add(event: StageEvent) -> None:
            seconds[event.stage] += event.seconds

        timed = stage_timer(add)
        attempts = self._improve(prompts, current, number=number, seed=seed, on_stage=add)
        pairs = [attempt.pair for attempt in attempts if isinstance(attempt, Kept)]
        if not pairs:
            reason = _no_pairs_reason(number, attempts)
            if number == 1:
                raise NothingToLearnError(f"{reason}. Look at what the critic answers, or loosen the filter.")
            return reason
        with timed("train"):
            training = self.learning.trainer.train(
                pairs,
                as_trainable(current),
                seed=seed,
                checkpoints=self._round_checkpoints(number),
                validation=self.learning.validation,
                progress=self.progress,
            )
        with timed("combine"):
            # A training learns what is missing to what it draws with: the base and the LoRA of the round before, as that
            # was fused. So that LoRA, not the trainings behind it, is what its update is added to. Without loss the sums
            # are the same, the paper's; a fuser that cuts ranks would else leave out twice what it left out once.
            lora = fuse_loras(self.learning.fuser, [*(before.lora for before in finished[-1:]), training.lora])
        with timed("measure"):
            gain, accepted = self._measure_gain(
                current, self.parts.synthesizer.with_lora(lora), seed=held_out_seed(seed)
            )
        return Round(
            number=number,
            attempts=attempts,
            training=training,
            lora=lora,
            seconds=dict(seconds),
            gain=gain,
            accepted=accepted,
        )

    def _improve(
        self,
        prompts: Sequence[str],
        synthesizer: Synthesizer,
        *,
        number: int,
        seed: int,
        on_stage: Callable[[StageEvent], None],
    ) -> tuple[Attempt, ...]:
        attempts = improve(
            prompts,
            synthesizer=synthesizer,
            critic=self.parts.critic,
            planner=self.parts.planner,
            keep=self.parts.keep,
            seed=seed,
            candidates=self.parts.candidates,
            batch_size=self.batch_size,
            on_stage=on_stage,
            check="arguments",  # the scorers have been heard
        )
        return tuple(tqdm(attempts, total=len(prompts), desc=f"round {number}: improve", disable=not self.progress))

    def _round_checkpoints(self, number: int) -> Checkpoints | None:
        if self.learning.checkpoints is None:
            return None
        return replace(self.learning.checkpoints, folder=Path(self.learning.checkpoints.folder) / f"round-{number}")

    def _measure_gain(self, before: Synthesizer, after: Synthesizer, *, seed: int) -> tuple[ScoreRow | None, bool]:
        """The gain on held-out prompts, and whether it is enough."""
        if self.learning.stop is None:
            return None, True
        comparison = compare(
            before,
            {"after": after},
            self.learning.stop.prompts,
            scorers=[self.learning.stop.scorer],
            filtered_by=[self.parts.keep]
            if self.parts.candidates is None
            else [self.parts.keep, self.parts.candidates],
            seed=seed,
            batch_size=self.batch_size,
            keep_images=0,
            progress=self.progress,
        )
        return comparison.rows[0], self.learning.stop.accepts(comparison, seed=seed)


def _no_pairs_reason(number: int, attempts: Sequence[Attempt]) -> str:
    """Say how the prompts of a round without a kept pair ended, with the most frequent reason."""
    reasons = Counter(
        attempt.reason if isinstance(attempt, Skipped) else attempt.verdict.reason for attempt in attempts
    )
    dropped = sum(isinstance(attempt, Dropped) for attempt in attempts)
    return (
        f"round {number} kept none of {len(attempts)} prompts: {dropped} dropped, {len(attempts) - dropped} skipped; "
        f"most often because {reasons.most_common(1)[0][0]!r}"
    )
