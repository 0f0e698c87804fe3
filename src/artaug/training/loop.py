"""A training on its way: leg after leg, wherever it stands when it begins, with looks and checkpoints in between."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from artaug.errors import ModelError
from artaug.pairs import ImagePair
from artaug.synthesis import Synthesizer
from artaug.training.batches import EncodedPairs, init_generator
from artaug.training.config import TrainingConfig
from artaug.training.distributed import World
from artaug.training.model import DiffusionModel, Trainable
from artaug.training.optimizer_loop import OptimizerLoop
from artaug.training.phases import Phase
from artaug.training.progress import Log
from artaug.training.state import Checkpoints, TrainingState
from artaug.training.student import inject_adapter
from artaug.training.teacher_cache import TeacherCache
from artaug.training.validation import Validation, best


@dataclass(frozen=True, kw_only=True, eq=False)
class Run:
    """One training: what it is made of, and who helps."""

    config: TrainingConfig
    pairs: Sequence[ImagePair]
    synthesizer: Trainable
    legs: Sequence[Phase]
    seeds: Sequence[int]
    """One a group."""
    processes: World
    log: Log
    checkpoints: Checkpoints | None
    run_fingerprint: dict[str, str]
    validation: Validation | None
    cache: Path | None
    validation_seed: int
    """Of the held-out pictures."""
    _encoded: list[EncodedPairs] = field(default_factory=list)
    _memories: dict[int, TeacherCache] = field(default_factory=dict)
    """Of the leg under way, by where it begins."""

    def finished(self, state: TrainingState) -> TrainingState:
        """Go on from ``state`` to the end, or to where held-out pictures stop getting better."""
        if self.validation is not None and not state.base_scores:
            scores, _ = self.validation.scores(self._artist(), seed=self.validation_seed)
            state = replace(state, base_scores=scores)
        while not self._done(state):
            stop = self._next_look(state.step)
            with self.synthesizer.training() as model, ExitStack() as learning:
                with model.without_denoiser() if not self._encoded else nullcontext():
                    encoded = self._pairs_of(model)
                    learning.enter_context(model.without_encoders())  # which make room before the denoiser is back
                state = self._walked(model, encoded, state, stop)
            if self.validation is not None:
                state = self._looked(state, self.validation)
                self._write(state)
        return state

    def _done(self, state: TrainingState) -> bool:
        if state.step < self.legs[-1].ends:
            return self.validation is not None and self.validation.should_stop(state.validations)
        return self.validation is None or bool(state.validations and state.validations[-1].step == state.step)

    def _next_look(self, step: int) -> int:
        end = self.legs[-1].ends
        if self.validation is None or len(self.legs) > 1:
            return end
        return min(end, step - step % self.validation.every + self.validation.every)

    def _pairs_of(self, model: DiffusionModel) -> EncodedPairs:
        """The pairs, encoded the first time they are asked for."""
        if not self._encoded:
            micro_batch_size = self.config.micro_batch_size or self.config.batch_size
            encoded = EncodedPairs.encode(
                model, self.pairs, micro_batch_size=micro_batch_size, cache=self.cache, processes=self.processes
            )
            self._encoded.append(encoded)
        return self._encoded[0]

    def _walked(self, model: DiffusionModel, encoded: EncodedPairs, state: TrainingState, until: int) -> TrainingState:
        """Take steps up to ``until``, writing checkpoints when they are due."""
        while state.step < until:
            leg = next(leg for leg in self.legs if state.step < leg.ends)
            stop = min(until, leg.ends)
            if self.checkpoints is not None:
                stop = min(stop, state.step - state.step % self.checkpoints.every + self.checkpoints.every)
            self.log.rest()
            state = self._advanced(model, encoded, leg, state, stop, export=stop in {until, leg.ends})
            # A look that is due comes before the checkpoint: a kill in between would lose it, and what it chooses.
            if stop < until or self.validation is None:
                self._write(state)
        return state

    def _advanced(
        self, model: DiffusionModel, encoded: EncodedPairs, leg: Phase, state: TrainingState, stop: int, *, export: bool
    ) -> TrainingState:
        """Take steps of one leg, on top of what the group's earlier legs have learned."""
        config, seed = self.config, self.seeds[leg.group]
        with ExitStack() as worn:
            for lora in state.under:
                worn.enter_context(lora.applied_to(model.module))
            student = worn.enter_context(
                inject_adapter(
                    model,
                    rank=config.rank,
                    targets=config.targets,
                    generator=init_generator(seed, leg.stage),
                    adapter=config.adapter,
                    teacher_cache=self._memory_of(leg),
                )
            )
            worn.enter_context(_recomputing(model.module, wanted=config.gradient_checkpointing))
            optimizer = config.optimizer.build(student.parameters(), learning_rate=config.learning_rate)
            optimization = OptimizerLoop(student, optimizer, ema=config.ema)
            if state.layers:
                optimization.resume(state.layers, state.average, state.optimizer)
            losses = self._steps(optimization, encoded, model, leg, range(state.step + 1, stop + 1))
            now = optimization.captured(export=export)
        state = replace(state, step=stop, losses=(*state.losses, *losses))
        if stop == leg.ends and now.learned is not None:
            return state.past(now.learned, last=leg.last)
        return replace(state, layers=now.layers, average=now.average, optimizer=now.optimizer, learned=now.learned)

    def _memory_of(self, leg: Phase) -> TeacherCache | None:
        """What the teacher has said in this leg, if batches come again: every leg has a teacher of its own."""
        if self.config.echo == 1:
            return None
        if leg.begins not in self._memories:
            self._memories.clear()
            self._memories[leg.begins] = TeacherCache(self.processes)
        return self._memories[leg.begins]

    def _steps(
        self, optimization: OptimizerLoop, encoded: EncodedPairs, model: DiffusionModel, leg: Phase, steps: range
    ) -> list[float]:
        config = self.config
        turns = encoded.turns(
            model,
            leg.members,
            config,
            seed=self.seeds[leg.group],
            numbers=[leg.batch_at(step, echo=config.echo) for step in steps],
            processes=self.processes,
        )
        losses = []
        with torch.enable_grad():
            for step in steps:
                rate = config.learning_rate_at(step - leg.begins, steps=leg.steps)
                done = optimization.step(
                    next(turns),
                    leg.loss,
                    number=step,
                    learning_rate=rate,
                    max_grad_norm=config.max_grad_norm,
                    processes=self.processes,
                )
                losses.append(done.loss)
                self.log.record(
                    step,
                    loss=done.loss,
                    gradient_norm=done.gradient_norm,
                    learning_rate=rate,
                    pairs=config.batch_size,
                )
        return losses

    def _looked(self, state: TrainingState, validation: Validation) -> TrainingState:
        """ValidationResult at what would be exported now, and keep it if nothing before was better."""
        lora, step = state.lora(), state.step
        found = validation.evaluate(lora, self._artist(), state.base_scores, step=step, seed=self.validation_seed)
        looks = (*state.validations, *found)
        return replace(state, validations=looks, best=lora if best(looks).step == step else state.best)

    def _artist(self) -> Synthesizer:
        if not isinstance(self.synthesizer, Synthesizer):
            raise ModelError(
                f"held-out pictures were asked for, and {type(self.synthesizer).__name__} draws none. "
                "Give train an artaug.Synthesizer, or leave validation out."
            )
        return self.synthesizer

    def _write(self, state: TrainingState) -> None:
        """Write a checkpoint if one is due; one process does."""
        if self.checkpoints is None:
            return
        if self.processes.first and (state.step % self.checkpoints.every == 0 or state.step == self.legs[-1].ends):
            self.checkpoints.write(state, run_fingerprint=self.run_fingerprint)
        self.processes.wait()


@contextmanager
def _recomputing(module: Any, *, wanted: bool) -> Iterator[None]:  # noqa: ANN401 - diffusers' ModelMixin has the methods
    """Have the model compute activations again in the backward pass, if it does not already."""
    if not wanted or getattr(module, "is_gradient_checkpointing", False):
        yield
        return
    if not hasattr(module, "enable_gradient_checkpointing"):
        raise ModelError(f"{type(module).__name__} offers no gradient checkpointing. Train with it off.")
    module.enable_gradient_checkpointing()
    try:
        yield
    finally:
        module.disable_gradient_checkpointing()
