"""The trainer: pairs in, a LoRA out, and the model it was trained on left as it was.

`DifferentialLoRATrainer.train` checks everything that can be checked before the first picture is encoded, looks for a
checkpoint, and hands over to `artaug.training.loop`.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from artaug._internal.annotations import checked
from artaug._internal.arguments import Faults, check_argument
from artaug._internal.digests import digest
from artaug._internal.fingerprints import module_fingerprint
from artaug._internal.text import duration, table_html
from artaug.errors import InvalidValueError, NothingToLearnError
from artaug.identity import identity_of
from artaug.images.curves import curves_svg
from artaug.lora.lora import LoRA
from artaug.placement import Placement, Resident
from artaug.synthesis import picture_seeds
from artaug.training.batches import with_distribution
from artaug.training.config import TrainingConfig
from artaug.training.distributed import World
from artaug.training.encoding import find_phrases
from artaug.training.injection import find_target_layers, trainable_layers
from artaug.training.loop import TrainingLoop
from artaug.training.model import DiffusionModel, RemotelyTrainable, Trainable, as_decoder
from artaug.training.objectives import TrainingPlan
from artaug.training.phases import Phase, split_into_phases
from artaug.training.progress import ProgressLog, StepEvent
from artaug.training.samples import TrainingSample, check_needs, check_samples, sample_digest
from artaug.training.state import Checkpoints, TrainingState
from artaug.training.validation import Validation, ValidationResult, best_result

_log = logging.getLogger(__name__)
_RESIDENT = Resident()
_SKIPPED_SHARE = 0.05
"""Share of skipped steps above which there is a warning."""


@checked
@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """The result of a training."""

    lora: LoRA
    losses: tuple[float, ...] = field(repr=False)
    """The loss of every step."""
    pairs: int
    """How many pairs were learned from."""
    steps: int
    """How many were taken: all, unless the validation stopped the training before."""
    seconds: float
    """Wall-clock time, encoding and validations included; of all its runs, if it was resumed."""
    validations: tuple[ValidationResult, ...] = ()
    """Every validation, if there was one."""
    skipped_steps: int = 0
    """Steps of a float16 model whose gradient overflowed, so that they were not taken; they count in ``steps``."""

    @property
    def best_validation(self) -> ValidationResult | None:
        """The validation whose step and strength ``lora`` has, if there was one."""
        return best_result(self.validations) if self.validations else None

    def __repr__(self) -> str:
        """Its numbers on one line."""
        loss = f", final loss {self.losses[-1]:.3g}" if self.losses else ""
        best = self.best_validation
        chosen = (
            ""
            if best is None
            else f", best of {len(self.validations)} validations: win rate {best.win_rate:.0%} at step {best.step}"
        )
        return f"TrainingResult({self.lora!r}, {self.pairs:,} pairs, {self.steps:,} steps{loss}{chosen})"

    def _repr_html_(self) -> str:
        """Numbers, and the curves of loss and validation, for notebooks. What is shown does not grow with the training."""
        best = self.best_validation
        row = [
            f"{self.pairs:,}",
            f"{self.steps:,}" + f" ({self.skipped_steps:,} skipped)" * bool(self.skipped_steps),
            f"{self.losses[-1]:.3g}" if self.losses else "none",
            repr(self.lora),
            "none"
            if best is None
            else f"win rate {best.win_rate:.0%} at step {best.step:,}, strength {best.strength:g}",
            duration(self.seconds),
        ]
        table = table_html(("pairs", "steps", "final loss", "LoRA", "validation", "time"), [row])
        rates = {
            f"strength {strength:g}": [(one.step, one.win_rate) for one in self.validations if one.strength == strength]
            for strength in dict.fromkeys(one.strength for one in self.validations)
        }
        loss = curves_svg({"loss": list(enumerate(self.losses, start=1))}, x="step", y="loss")
        return table + loss + curves_svg(rates, x="step", y="win rate over the base")


@checked
@dataclass(frozen=True, kw_only=True, repr=False)
class DifferentialLoRATrainer(TrainingConfig):
    """Trains a LoRA on what separates the pictures of pairs.

    All pairs are learned jointly unless the objective says otherwise. Factors are float32, whatever the model's own
    precision; alpha equals the rank. The same seed gives the same LoRA, bit for bit on a CPU, also if the training was
    killed and resumed. In several processes (``accelerate launch``) each takes its share of every batch.

    Raises:
        InvalidValueError: for a value out of its range.

    >>> import artaug as aa
    >>> trainer = aa.DifferentialLoRATrainer(rank=8, steps=100, learning_rate=1e-3)
    >>> trainer.objective
    PairedPreference()
    """

    def train(  # noqa: PLR0913 - what a training takes is all here
        self,
        pairs: Sequence[TrainingSample],
        synthesizer: Trainable | RemotelyTrainable,
        *,
        seed: int,
        checkpoints: Checkpoints | None = None,
        validation: Validation | None = None,
        cache: str | Path | None = None,
        placement: Placement = _RESIDENT,
        on_step: Callable[[StepEvent], None] | None = None,
        progress: bool = True,
    ) -> TrainingResult:
        """Learn from pairs. The synthesizer's model is as before afterwards, also after an exception.

        Args:
            pairs: of any sizes the model takes; a batch has pairs of one size. `TrainingPrompt` are prompts without pictures, for
                objectives that read none; they are in batches of their own.
            synthesizer: lends the model; LoRAs it draws with are part of the teacher and stay as they are. One whose model is in
                another process trains there, where ``placement`` does not count.
            seed: decides the start, the order of the pairs, and the noise.
            checkpoints: where to write the state of the training; if its own checkpoints are there, it goes on from the newest.
            validation: chooses the step and strength by pictures; without it the last step counts, at strength 1.
            cache: folder for latents and encoded prompts, named by content and shared by all trainings, which batches read
                their pairs from; without it they are held in memory.
            placement: where the model and the validation's scorer are while the other computes; with `OneAtATime` they
                take turns on the device. While training, VAE and text encoders are in host memory with any.
            on_step: called after every step; an exception it raises ends the training.
            progress: show a progress bar.

        Raises:
            NothingToLearnError: if there is no pair.
            InvalidValueError: if there are fewer steps than the objective needs for this many pairs, a batch cannot
                be shared equally by all processes, ``own_noise`` is set and a pair has no seed, the objective reads pictures that
                are not there, or phrases that a prompt does not hold.
            ModelError: if the pictures are of a size the model does not take, ``validation`` is given and the synthesizer
                draws no pictures, the objective or ``logit_normal`` is for models of another prediction type, or the model is
                loaded in a way that the adapter cannot learn on.
            LoRAMismatchError: if ``targets`` selects no layer.
            StorageError: if a checkpoint cannot be written or belongs to another training, or the cache cannot be written.
            TrainingDivergedError: if a loss or its gradient is not finite; that step is not taken.
        """
        check_samples(pairs)
        if not pairs:
            raise NothingToLearnError(
                "received 0 pairs, and training needs at least one. Ask for more prompts, or loosen the filter."
            )
        if isinstance(synthesizer, RemotelyTrainable):
            if checkpoints is not None:  # whose process may stand in another folder
                checkpoints = replace(checkpoints, folder=Path(checkpoints.folder).absolute())
            cache = None if cache is None else Path(cache).absolute()
            job = _RemoteTraining(self, pairs, seed, checkpoints, validation, cache)
            with ProgressLog(self.steps, on_step, initial=0, show=progress) as log:
                return synthesizer.use(job, on_report=log.report)
        check_argument("train", "synthesizer", synthesizer, Trainable)
        check_argument("train", "checkpoints", checkpoints, Checkpoints, optional=True)
        check_argument("train", "validation", validation, Validation, optional=True)
        check_argument("train", "placement", placement, Placement)
        check_needs(pairs, self.objective, own_noise=self.own_noise)
        scorer = None if validation is None else validation.scorer
        placement.check("train", {"synthesizer": synthesizer, "validation.scorer": scorer})
        plan, phases = self._plan_training(len(pairs))
        *seeds, validation_seed = picture_seeds(seed, len(plan.groups) + 1)
        world = World.current()
        with synthesizer.training() as model:
            self._check_model(model)
            find_phrases(model, pairs, self.objective)
            run_fingerprint: Mapping[str, str] = {}  # without checkpoints, nothing is compared
            if checkpoints is not None:
                weights = f"{module_fingerprint(model.module)} {synthesizer.fingerprint}".rstrip()
                run_fingerprint = {**self._run_fingerprint(pairs, seed, validation), "model": weights}
        _warn_of_unused_pairs(phases, self)
        state = None if checkpoints is None else checkpoints.latest(run_fingerprint=run_fingerprint)
        if state is None:
            state = TrainingState()
        show = progress and world.is_main
        with (
            placement.opened(synthesizer, scorer) as opened,
            ProgressLog(self.steps, on_step, initial=state.step, seconds=state.seconds, show=show) as log,
        ):
            state = TrainingLoop(
                config=self,
                pairs=pairs,
                synthesizer=synthesizer,
                phases=phases,
                seeds=seeds,
                world=world,
                progress=log,
                checkpoints=checkpoints,
                run_fingerprint=run_fingerprint,
                validation=validation,
                validation_seed=validation_seed,
                cache=None if cache is None else Path(cache),
                placement=opened,
            ).run(state)
        if state.best_lora is None:
            lora = state.lora()
        else:
            lora = state.best_lora.scaled(best_result(state.validations).strength)
        skipped_steps = 0 if state.loss_scale is None else state.loss_scale.skipped_steps
        if skipped_steps > _SKIPPED_SHARE * state.step:
            _log.warning(
                "the gradients of %d of %d steps overflowed float16, and these steps were skipped: load the model in "
                "bfloat16, or give it more steps.",
                *(skipped_steps, state.step),
            )
        return TrainingResult(
            lora=lora,
            losses=state.losses,
            pairs=len(pairs),
            steps=state.step,
            seconds=state.seconds,
            validations=state.validations,
            skipped_steps=skipped_steps,
        )

    def check(self, synthesizer: Trainable | RemotelyTrainable, *, pairs: int) -> None:
        """Refuse now what `train` would refuse after the pairs were drawn; nothing is encoded or changed.

        Args:
            synthesizer: what `train` will get.
            pairs: how many pairs there will be, at most.

        Raises:
            InvalidValueError: if there are fewer steps than the objective needs for so many pairs, or a batch cannot be
                shared equally by all processes.
            ModelError: if the model cannot be trained in this way.
            LoRAMismatchError: if ``targets`` selects no layer.
        """
        if isinstance(synthesizer, RemotelyTrainable):
            synthesizer.use(_RemoteCheck(self, pairs), on_report=_nothing)
            return
        faults = Faults("train")
        with faults.collected():
            self._plan_training(pairs)
        with faults.collected(), synthesizer.training() as model:
            self._check_model(model)
        faults.raise_any()

    def _plan_training(self, pairs: int) -> tuple[TrainingPlan, Sequence[Phase]]:
        """What the objective wants done with so many pairs, laid out over the steps."""
        world = World.current()
        if self.batch_size % world.size:  # a sharded model needs all processes in every forward pass
            raise InvalidValueError(
                f"batch_size={self.batch_size} cannot be shared equally by {world.size} processes: make it a multiple."
            )
        plan = self.objective.training_plan(pairs)
        return plan, split_into_phases(plan, self)

    def _check_model(self, model: DiffusionModel) -> None:
        """Everything about a model that raises before anything is encoded."""
        trainable_layers(model.module, self.targets, self.adapter, model.device)
        self.objective.check(model.noise_schedule)
        with_distribution(model.noise_schedule, self)
        if self.objective.decodes:
            as_decoder(model)
        for stage in self.objective.training_plan(1).stages:
            if stage.companion is not None and stage.companion.head is not None:
                find_target_layers(model.module, stage.companion.features)

    def _run_fingerprint(
        self, pairs: Sequence[TrainingSample], seed: int, validation: Validation | None
    ) -> dict[str, str]:
        """What decides the result beside the model, by name: a training is resumed only if all of it is the same."""
        # These two change the memory that a training takes, not its result.
        settings = replace(self, micro_batch_size=None, gradient_checkpointing=False)
        return {
            **identity_of(settings, "trainer"),
            "seed": str(seed),
            "pairs": digest(
                *(sample_digest(pair) for pair in pairs),
                *(str(pair.seed) for pair in pairs if self.own_noise or self.objective.reads_own_noise),
            ),
            "validation": "" if validation is None else validation.fingerprint,
        }


@dataclass(frozen=True)
class _RemoteTraining:
    """A training that another process does: what it is called with there."""

    trainer: DifferentialLoRATrainer
    pairs: Sequence[TrainingSample]
    seed: int
    checkpoints: Checkpoints | None
    validation: Validation | None
    cache: str | Path | None

    def __call__(self, synthesizer: Trainable, report: Callable[[StepEvent], None]) -> TrainingResult:
        return self.trainer.train(
            self.pairs,
            synthesizer,
            seed=self.seed,
            checkpoints=self.checkpoints,
            validation=self.validation,
            cache=self.cache,
            on_step=report,
            progress=False,
        )


@dataclass(frozen=True)
class _RemoteCheck:
    """The check of a training that another process will do."""

    trainer: DifferentialLoRATrainer
    pairs: int

    def __call__(self, synthesizer: Trainable, report: Callable[[StepEvent], None]) -> None:
        self.trainer.check(synthesizer, pairs=self.pairs)


def _nothing(event: object) -> None:
    """What is done with the reports of a check."""


def _warn_of_unused_pairs(phases: Sequence[Phase], config: TrainingConfig) -> None:
    """Warn if the steps do not cover every pair of a group."""
    for group in {phase.group for phase in phases}:
        members = [phase for phase in phases if phase.group == group]
        used = config.batch_size * sum(phase.batches for phase in members)
        if used < len(members[0].pairs):
            steps = sum(phase.steps for phase in members)
            _log.warning(
                "%d steps of %d pairs, each batch %d time(s), use %d of %d pairs: the others are not learned from. Give it "
                "more steps, larger batches or less echo.",
                *(steps, config.batch_size, members[0].echo, used, len(members[0].pairs)),
            )
