"""Round after round: improve, train, combine, until it stops helping."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tqdm.auto import tqdm

from artaug.critique import Critic
from artaug.errors import InvalidValueError, ModelError, NothingToLearnError
from artaug.evaluation.comparison import ScoreRow, compare
from artaug.filtering import BestOf, PairFilter
from artaug.lora.fusing import ConcatFuser, Fuser
from artaug.pairs import Attempt, Dropped, Kept, Skipped
from artaug.plan import RegionPlanner
from artaug.run.improve import StageEvent, improve, stopwatch
from artaug.run.results import Enhancement, Round
from artaug.scoring import Scorer
from artaug.synthesis import Synthesizer, picture_seeds
from artaug.training import Checkpoints, DifferentialLoRATrainer, Trainable, Validation


@dataclass(frozen=True)
class StopRule:
    """When a round has not helped: its pictures of held-out prompts score no higher than those of the round before.

    A round is accepted only if the whole 95% interval of the paired difference lies above ``at_least``; otherwise
    the loop ends there and the round is left out of the result.
    """

    scorer: Scorer
    """Judges progress. For an honest stop, not one that the pairs are filtered by."""
    prompts: Sequence[str]
    """Drawn before and after each round; best held out from the prompts learned from."""
    at_least: float = 0.0
    """The gain, in the scorer's units, that the interval has to clear."""


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
) -> Enhancement:
    """Improve, train and combine, round after round, until it stops helping.

    Every round draws all prompts with new seeds, wearing what was learned so far, and learns only what the critic
    still finds to improve. The base model is never changed.

    Args:
        prompts: what to draw and learn from.
        synthesizer: draws, and lends its model to the trainer.
        critic: see `improve`.
        planner: see `improve`.
        keep: see `improve`.
        trainer: learns a LoRA from the kept pairs of a round.
        fuser: combines the LoRAs of all rounds into one.
        rounds: at most this many, at least 1.
        candidates: see `improve`.
        validation: chooses each round's step and strength by pictures; without it the last step counts, at strength 1.
        stop: ends the loop when a round has not helped on held-out prompts; without it all rounds run.
        checkpoints: where trainings write down where they stand, each round in a folder of its own. A run that was killed
            draws its pictures again, and its trainings go on or are over at once.
        seed: of the run; the same arguments give the same LoRA.
        batch_size: prompts a chunk, see `improve`.
        progress: show progress bars.

    Returns:
        The rounds and why they ended; ``.lora`` combines those that helped.

    Raises:
        NothingToLearnError: if the first round keeps no pair; the message counts what happened to the prompts.
        PromptError: if there are no prompts.
        ModelError: if the synthesizer lends no model to train.
        StorageError: if a checkpoint cannot be written, or belongs to a run with other arguments or other pictures.
    """
    if rounds < 1:
        raise InvalidValueError(f"enhance(rounds={rounds}) would do nothing: need at least 1.")
    _lender(synthesizer)
    crew = _RoundCrew(
        synthesizer=synthesizer,
        critic=critic,
        planner=planner,
        keep=keep,
        candidates=candidates,
        trainer=trainer,
        fuser=fuser,
        validation=validation,
        stop=stop,
        checkpoints=checkpoints,
        batch_size=batch_size,
        progress=progress,
    )
    done: list[Round] = []
    for number, round_seed in enumerate(picture_seeds(seed, rounds), start=1):
        current = synthesizer.with_lora(done[-1].lora) if done else synthesizer
        outcome = crew.go_round(prompts, current, done, seed=round_seed)
        if isinstance(outcome, str):
            return Enhancement(rounds=tuple(done), stop_reason=outcome)
        done.append(outcome)
        if not outcome.accepted:
            return Enhancement(rounds=tuple(done), stop_reason=f"round {number} did not help on held-out prompts")
    return Enhancement(rounds=tuple(done), stop_reason=f"all {rounds} rounds ran")


@dataclass(frozen=True)
class _RoundCrew:
    """Who works on a round: the same from round to round."""

    synthesizer: Synthesizer
    critic: Critic
    planner: RegionPlanner
    keep: PairFilter
    candidates: BestOf | None
    trainer: DifferentialLoRATrainer
    fuser: Fuser
    validation: Validation | None
    stop: StopRule | None
    checkpoints: Checkpoints | None
    batch_size: int
    progress: bool

    def go_round(
        self, prompts: Sequence[str], current: Synthesizer, done: Sequence[Round], *, seed: int
    ) -> Round | str:
        """Go one round beyond those ``done``; or say in words why there is nothing to learn in it."""
        seconds: defaultdict[str, float] = defaultdict(float)

        def add(event: StageEvent) -> None:
            seconds[event.stage] += event.seconds

        number, timed = len(done) + 1, stopwatch(add)
        attempts = tuple(
            tqdm(
                improve(
                    prompts,
                    synthesizer=current,
                    critic=self.critic,
                    planner=self.planner,
                    keep=self.keep,
                    seed=seed,
                    candidates=self.candidates,
                    batch_size=self.batch_size,
                    on_stage=add,
                ),
                total=len(prompts),
                desc=f"round {number}: improve",
                disable=not self.progress,
            )
        )
        pairs = [attempt.pair for attempt in attempts if isinstance(attempt, Kept)]
        if not pairs:
            return _nothing_kept(number, attempts)
        with timed("train"):
            training = self.trainer.train(
                pairs,
                _lender(current),
                seed=seed,
                checkpoints=self._checkpoints_of(number),
                validation=self.validation,
                progress=self.progress,
            )
        with timed("combine"):
            lora = self.fuser.fuse([*(one.training.lora for one in done), training.lora])
        with timed("measure"):
            gain = self._gain(current, self.synthesizer.with_lora(lora), seed=seed)
        return Round(
            number=number,
            attempts=attempts,
            training=training,
            lora=lora,
            seconds=dict(seconds),
            gain=gain,
            accepted=gain is None or self.stop is None or gain.ci_low > self.stop.at_least,
        )

    def _checkpoints_of(self, number: int) -> Checkpoints | None:
        """Those of a round, in a folder of its own."""
        if self.checkpoints is None:
            return None
        return replace(self.checkpoints, folder=Path(self.checkpoints.folder) / f"round-{number}")

    def _gain(self, before: Synthesizer, after: Synthesizer, *, seed: int) -> ScoreRow | None:
        if self.stop is None:
            return None
        comparison = compare(
            before,
            {"after": after},
            self.stop.prompts,
            scorers=[self.stop.scorer],
            filtered_by=[self.keep] if self.candidates is None else [self.keep, self.candidates],
            seed=seed,
            batch_size=self.batch_size,
            keep_images=0,
            progress=self.progress,
        )
        return comparison.rows[0]


def _lender(synthesizer: Synthesizer) -> Trainable:
    """The synthesizer, if it has a model to train."""
    if not isinstance(synthesizer, Trainable):
        raise ModelError(
            f"{type(synthesizer).__name__} lends no model to train: it has no method training(). "
            "Use a DiffusersSynthesizer, or implement artaug.training.Trainable."
        )
    return synthesizer


def _nothing_kept(number: int, attempts: Sequence[Attempt]) -> str:
    """Say what became of the prompts of a round that kept no pair; in the first round that is an error."""
    reasons = Counter(one.reason if isinstance(one, Skipped) else one.verdict.reason for one in attempts)
    dropped = sum(isinstance(one, Dropped) for one in attempts)
    story = (
        f"round {number} kept none of {len(attempts)} prompts: {dropped} dropped, {len(attempts) - dropped} skipped; "
        f"most often because {reasons.most_common(1)[0][0]!r}"
    )
    if number == 1:
        raise NothingToLearnError(f"{story}. Look at what the critic answers, or loosen the filter.")
    return story
