"""The training loop: phase after phase from any state on, with validations and checkpoints between steps.

The steps of a training are cut several times. Phases (`artaug.training.phases`) cut them where a new LoRA begins, and their
cycles where batches are new, validations where pictures are drawn, checkpoints where the state is written. `TrainingLoop.run`
goes from validation to validation, `_run_until` from one cut to the next, `_run_phase` takes the steps between two cuts. What
lies between two cuts is a `TrainingState`, so a training resumed from a checkpoint takes the same way as one that was never
stopped.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from artaug.errors import ModelError
from artaug.lora.applied import check_called
from artaug.placement import Placement
from artaug.synthesis import Synthesizer
from artaug.training.batches import EncodedPairs, StepBatch, init_generator
from artaug.training.config import TrainingConfig
from artaug.training.distributed import SINGLE_PROCESS, World
from artaug.training.injection import inject_adapter
from artaug.training.learners import AdapterStudent
from artaug.training.loss_scale import LossScale, computes_in_float16
from artaug.training.model import DiffusionModel, Trainable, as_decoder
from artaug.training.objectives import Companion
from artaug.training.optimizer_loop import OptimizerLoop
from artaug.training.phases import Phase
from artaug.training.progress import ProgressLog
from artaug.training.samples import TrainingSample
from artaug.training.state import Checkpoints, CompanionState, TrainingState
from artaug.training.teacher_cache import TeacherCache
from artaug.training.unused_layers import UnusedLayerCheck
from artaug.training.validation import Validation, best_result


@dataclass(kw_only=True, eq=False)
class TrainingLoop:
    """All that a training needs beside its `TrainingState`."""

    config: TrainingConfig
    pairs: Sequence[TrainingSample]
    synthesizer: Trainable
    phases: Sequence[Phase]
    seeds: Sequence[int]
    """One per group of pairs."""
    world: World
    progress: ProgressLog
    checkpoints: Checkpoints | None
    run_fingerprint: Mapping[str, str]
    """What decides the result, by name; it is written into checkpoints."""
    validation: Validation | None
    validation_seed: int
    cache: Path | None
    """Folder of the latent cache."""
    placement: Placement
    """Opened by the caller."""
    _encoded: EncodedPairs | None = field(default=None, init=False)
    _teacher_caches: dict[int, TeacherCache] = field(default_factory=dict, init=False)
    """Of the current cycle, by its first step."""
    _unused_layers: UnusedLayerCheck = field(default_factory=UnusedLayerCheck, init=False)

    def run(self, state: TrainingState) -> TrainingState:
        """Train from ``state`` to the last step, or until the scores of held-out pictures stop rising."""
        if self.validation is not None and not state.base_scores:
            scores, _ = self.validation.score(self._renderer(), seed=self.validation_seed, placement=self.placement)
            state = self._save(replace(state, base_scores=scores))
        while not self._is_done(state):
            state = self._run_until(self._next_validation(state.step), state)
            if self.validation is not None:
                # Due or not: pictures were drawn for it, and a training that is over has to be found so.
                state = self._save(self._validate(state, self.validation))
        self._unused_layers.finish()
        return state

    def _is_done(self, state: TrainingState) -> bool:
        if state.step < self.phases[-1].stop:
            return self.validation is not None and self.validation.should_stop(state.validations)
        # A training killed in its last validation has all its steps, and that validation is still due.
        return self.validation is None or bool(state.validations and state.validations[-1].step == state.step)

    def _next_validation(self, step: int) -> int:
        """The step of the next validation, or the last step: a training of several phases is validated at its end only."""
        last = self.phases[-1].stop
        if self.validation is None or len(self.phases) > 1:
            return last
        return min(last, _next_multiple(step, self.validation.every))

    def _run_until(self, last: int, state: TrainingState) -> TrainingState:
        """Borrow the model and train up to step ``last``, writing checkpoints when they are due."""
        with (
            self.placement.stage(self.synthesizer),
            self.synthesizer.training() as model,
            ExitStack() as offloaded,
        ):
            if self._encoded is None:
                self._encoded = self._encode_pairs(model, offloaded, world=self.world)
            else:
                offloaded.enter_context(self._encoders_away(model))
            # A process that finds a file damaged is alone with it: the others go on.
            encode_again = partial(self._encode_pairs, model, offloaded, world=SINGLE_PROCESS)
            encoded = replace(self._encoded, encode_again=encode_again)
            while state.step < last:
                phase = next(phase for phase in self.phases if state.step < phase.stop)
                stop = min(last, phase.cycle(state.step + 1)[-1])
                if self.checkpoints is not None:
                    stop = min(stop, _next_multiple(state.step, self.checkpoints.every))
                self.progress.reset_timer()
                state = self._run_phase(model, encoded, phase, state, stop, export=stop in {last, phase.stop})
                # A validation that is due comes before the checkpoint: a kill in between would lose it, and its choice.
                if stop < last or self.validation is None:
                    state = self._save(state, is_due=stop == self.phases[-1].stop)
        return state

    @torch.no_grad()
    def _encode_pairs(self, model: DiffusionModel, offloaded: ExitStack, *, world: World) -> EncodedPairs:
        """Encode the pairs while the denoiser makes room; the encoders do so from then on, until ``offloaded`` is left."""
        offloaded.close()
        with model.without_denoiser():
            encoded = EncodedPairs.encode(
                model,
                self.pairs,
                micro_batch_size=self.config.micro_batch_size or self.config.batch_size,
                objective=self.config.objective,
                cache=self.cache,
                world=world,
            )
            # Entered here, so that the encoders make room before the denoiser is back.
            offloaded.enter_context(self._encoders_away(model))
        return encoded

    def _encoders_away(self, model: DiffusionModel) -> AbstractContextManager[None]:
        """A ``with`` block for the steps: nothing is encoded any more, and decoded if the objective looks at pictures."""
        return as_decoder(model).decoding() if self.config.objective.decodes else model.without_encoders()

    def _run_phase(
        self,
        model: DiffusionModel,
        encoded: EncodedPairs,
        phase: Phase,
        state: TrainingState,
        stop: int,
        *,
        export: bool,
    ) -> TrainingState:
        """Take the steps of one phase up to ``stop``, on top of the LoRAs of the group's earlier stages.

        Adapter and optimizer are built anew and restored from ``state``, also where the phase goes on in this process:
        so there is one way through a phase, whether a checkpoint lies in it or not.
        """
        config, seed = self.config, self.seeds[phase.group]
        with ExitStack() as injected:
            for lora in state.stage_loras:
                injected.enter_context(lora.applied_to(model.module))
            student = injected.enter_context(
                inject_adapter(
                    model,
                    rank=config.rank,
                    targets=config.targets,
                    generator=init_generator(seed, phase.stage),
                    adapter=config.adapter,
                    teacher_cache=self._teacher_cache(phase, state.step + 1),
                    companion=phase.companion,
                    companion_generator=init_generator(seed, phase.stage, of_companion=True),
                )
            )
            injected.enter_context(_gradient_checkpointing(model.module, enable=config.gradient_checkpointing))
            optimizer = config.optimizer.build(student.parameters(), learning_rate=config.learning_rate)
            half = computes_in_float16(model.module, model.device)
            loss_scale = (state.loss_scale or LossScale()) if half else None
            optimizer_loop = OptimizerLoop(student, optimizer, ema=config.ema, loss_scale=loss_scale)
            if state.adapter:
                optimizer_loop.restore(state.adapter, state.ema, state.optimizer, ema_updates=state.ema_updates)
            companion = self._companion_loop(student, phase, state, half=half)
            losses = self._take_steps(optimizer_loop, companion, encoded, model, phase, range(state.step + 1, stop + 1))
            snapshot = optimizer_loop.snapshot(export=export)
            companion_state = None if companion is None else _companion_state(companion)
        state = replace(state, step=stop, losses=(*state.losses, *losses), loss_scale=snapshot.loss_scale)
        if stop == phase.stop and snapshot.lora is not None:
            return state.after_phase(snapshot.lora, is_last_stage=phase.is_last_stage)
        return replace(
            state,
            adapter=snapshot.adapter,
            ema=snapshot.ema,
            ema_updates=snapshot.ema_updates,
            optimizer=snapshot.optimizer,
            companion=companion_state,
            current_lora=snapshot.lora,
        )

    def _companion_loop(
        self, student: AdapterStudent, phase: Phase, state: TrainingState, *, half: bool
    ) -> OptimizerLoop | None:
        """The optimizer of what learns beside the student, restored from ``state`` if the phase goes on."""
        if phase.companion is None or student.companion is None:
            return None
        rate = phase.companion.learning_rate or self.config.learning_rate
        optimizer = self.config.optimizer.build(student.companion.parameters(), learning_rate=rate)
        saved = state.companion
        loss_scale = (LossScale() if saved is None else saved.loss_scale) if half else None
        loop = OptimizerLoop(student, optimizer, ema=None, loss_scale=loss_scale, companion=student.companion)
        if saved is not None:
            loop.restore(saved.tensors, {}, saved.optimizer, ema_updates=0)
        return loop

    def _teacher_cache(self, phase: Phase, step: int) -> TeacherCache | None:
        """The cache of a step's cycle if batches are used several times; another cycle has other batches, or another teacher.

        Beside a companion the teacher is asked for what the student draws, which is another picture in every step.
        """
        if phase.echo == 1 or phase.companion is not None:
            return None
        first = phase.cycle(step).start
        if first not in self._teacher_caches:
            self._teacher_caches = {first: TeacherCache(self.world, folder=self.cache)}
        return self._teacher_caches[first]

    def _take_steps(
        self,
        optimizer_loop: OptimizerLoop,
        companion_loop: OptimizerLoop | None,
        encoded: EncodedPairs,
        model: DiffusionModel,
        phase: Phase,
        steps: range,
    ) -> list[float]:
        """Take steps by their numbers, and return their losses."""
        config, companion = self.config, phase.companion
        batches = encoded.batches(
            model,
            phase.pairs,
            config,
            seed=self.seeds[phase.group],
            indices=[phase.batch_index(step) for step in steps],
            companion_updates=0 if companion is None else companion.updates,
            world=self.world,
        )
        losses: list[float] = []
        with torch.enable_grad():
            for step, batch in zip(steps, batches, strict=True):
                learning_rate = config.learning_rate_at(step - phase.start, steps=phase.steps)
                companion_loss = None
                if companion is not None and companion_loop is not None:
                    companion_loss = self._step_companion(companion, companion_loop, batch, step, learning_rate)
                result = optimizer_loop.step(
                    batch,
                    phase.loss,
                    number=step,
                    learning_rate=learning_rate,
                    max_grad_norm=config.max_grad_norm,
                    world=self.world,
                )
                if not losses:
                    check_called(model.module)  # the LoRAs of the teacher and of earlier stages
                losses.append(result.loss)
                if self.world.is_main and not result.is_skipped:
                    self._unused_layers.observe(optimizer_loop.trained, gradient_norm=result.gradient_norm)
                self.progress.log_step(
                    step,
                    loss=result.loss,
                    gradient_norm=result.gradient_norm,
                    learning_rate=learning_rate,
                    pairs=config.batch_size,
                    loss_scale=result.loss_scale,
                    is_skipped=result.is_skipped,
                    companion_loss=companion_loss,
                )
        return losses

    def _step_companion(
        self, companion: Companion, loop: OptimizerLoop, batch: StepBatch, step: int, learning_rate: float
    ) -> float:
        """Take the companion's steps before a step of the student, and return their mean loss."""
        ratio = 1.0 if companion.learning_rate is None else companion.learning_rate / self.config.learning_rate
        losses = [
            loop.step(
                update,
                companion.loss,
                number=step,
                learning_rate=learning_rate * ratio,
                max_grad_norm=self.config.max_grad_norm,
                world=self.world,
            ).loss
            for update in batch.for_companion
        ]
        return sum(losses) / len(losses)

    def _validate(self, state: TrainingState, validation: Validation) -> TrainingState:
        """Evaluate what would be exported now, and keep it if no earlier LoRA was better."""
        lora, step = state.lora(), state.step
        results = validation.evaluate(
            lora,
            self._renderer(),
            state.base_scores,
            step=step,
            seed=self.validation_seed,
            placement=self.placement,
        )
        validations = (*state.validations, *results)
        is_best = best_result(validations).step == step
        return replace(state, validations=validations, best_lora=lora if is_best else state.best_lora)

    def _renderer(self) -> Synthesizer:
        if not isinstance(self.synthesizer, Synthesizer):
            raise ModelError(
                f"validation draws pictures, and {type(self.synthesizer).__name__} cannot draw any. "
                "Give train an artaug.Synthesizer, or leave validation out."
            )
        return self.synthesizer

    def _save(self, state: TrainingState, *, is_due: bool = True) -> TrainingState:
        """Write a checkpoint if it is due, always or by its step: the main process writes, the others wait."""
        state = replace(state, seconds=self.progress.seconds)
        if self.checkpoints is not None:
            if self.world.is_main and (is_due or state.step % self.checkpoints.every == 0):
                self.checkpoints.write(state, run_fingerprint=self.run_fingerprint)
            self.world.barrier()
        return state


def _companion_state(loop: OptimizerLoop) -> CompanionState:
    snapshot = loop.snapshot(export=False)
    return CompanionState(tensors=snapshot.adapter, optimizer=snapshot.optimizer, loss_scale=snapshot.loss_scale)


def _next_multiple(step: int, every: int) -> int:
    """The first multiple of ``every`` after ``step``."""
    return (step // every + 1) * every


@contextmanager
def _gradient_checkpointing(module: Any, *, enable: bool) -> Iterator[None]:  # noqa: ANN401 - diffusers' ModelMixin
    """Switch gradient checkpointing on inside the block, unless it is on already."""
    if not enable or getattr(module, "is_gradient_checkpointing", False):
        yield
        return
    if not hasattr(module, "enable_gradient_checkpointing"):
        raise ModelError(f"{type(module).__name__} offers no gradient checkpointing. Train with it off.")
    module.enable_gradient_checkpointing()
    try:
        yield
    finally:
        module.disable_gradient_checkpointing()
