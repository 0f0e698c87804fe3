"""Differential training: pairs in, a LoRA out, and the model it was trained on left as it was."""

import logging
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor, nn

from artaug._internal.digests import digest
from artaug.errors import InvalidValueError, NothingToLearnError
from artaug.lora.lora import LoRA
from artaug.pairs import ImagePair, pair_digest
from artaug.synthesis import picture_seeds
from artaug.training.config import TrainingConfig
from artaug.training.distributed import World
from artaug.training.loop import Run
from artaug.training.model import Trainable
from artaug.training.phases import Phase, split_into_phases
from artaug.training.progress import Log, StepEvent
from artaug.training.quantized import is_quantized
from artaug.training.state import Checkpoints, TrainingState
from artaug.training.student import trainable_layers
from artaug.training.validation import Validation, ValidationResult, best

_log = logging.getLogger(__name__)
_SMALL = 4096
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
"""What differs from process to process in the repr of an object that has none of its own."""


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """What a training gave."""

    lora: LoRA
    losses: tuple[float, ...] = field(repr=False)
    """The loss of every step."""
    pairs: int
    """How many pairs were learned from."""
    steps: int
    """How many were taken: all, unless held-out pictures stopped getting better before."""
    seconds: float
    """Wall-clock time, encoding included; of the last run only, if it was resumed."""
    validations: tuple[ValidationResult, ...] = ()
    """What held-out pictures said, if they were looked at."""

    @property
    def best_validation(self) -> ValidationResult | None:
        """The look whose step and strength ``lora`` has, if held-out pictures chose it."""
        return best(self.validations) if self.validations else None


@dataclass(frozen=True, kw_only=True)
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
    PairedDifference(outside_weight=1.0, composite=False)
    """

    def train(
        self,
        pairs: Sequence[ImagePair],
        synthesizer: Trainable,
        *,
        seed: int,
        checkpoints: Checkpoints | None = None,
        validation: Validation | None = None,
        cache: str | Path | None = None,
        on_step: Callable[[StepEvent], None] | None = None,
        progress: bool = True,
    ) -> TrainingResult:
        """Learn from pairs. The synthesizer's model is as before afterwards, also after an exception.

        Args:
            pairs: of any sizes the model takes; a batch has pairs of one size.
            synthesizer: lends the model; LoRAs it draws with are part of the teacher and stay as they are.
            seed: decides the start, the order of the pairs, and the noise.
            checkpoints: where to write down where the training stands; if it was there before, it goes on from there.
            validation: chooses the step and strength by pictures; without it the last step counts, at strength 1.
            cache: folder for latents and encoded prompts, named by content and shared by any trainings; without it they
                are held in memory.
            on_step: called after every step; an exception it raises ends the training.
            progress: show a progress bar.

        Raises:
            NothingToLearnError: if there is no pair.
            InvalidValueError: if there are fewer steps than the objective needs for this many pairs, or a batch cannot
                be shared equally by all processes.
            ModelError: if the pictures are of a size the model does not take, ``validation`` is given and the synthesizer
                draws no pictures, or the model is loaded in a way that the adapter cannot learn on.
            LoRAMismatchError: if ``targets`` selects no layer.
            StorageError: if a checkpoint cannot be written or belongs to another training, or the cache cannot be written.
            TrainingDivergedError: if a loss or its gradient is not finite; that step is not taken.
        """
        if not pairs:
            raise NothingToLearnError(
                "received 0 pairs, and training needs at least one. Ask for more prompts, or loosen the filter."
            )
        training_plan = self.objective.training_plan(len(pairs))
        legs = split_into_phases(training_plan, self.steps, self.objective)
        *seeds, validation_seed = picture_seeds(seed, len(training_plan.groups) + 1)
        processes = _sharing(self.batch_size)
        with synthesizer.training() as model:
            trainable_layers(
                model.module, self.targets, self.adapter, model.device
            )  # or say so before anything is encoded
            named = f"{_known_as(model.module)} {synthesizer.fingerprint}".rstrip()
            run_fingerprint = {**self._made_of(pairs, seed, validation), "model": named}
        _warn_of_unseen(legs, self)
        found = None if checkpoints is None else checkpoints.newest(run_fingerprint=run_fingerprint)
        state = TrainingState() if found is None else found
        with Log(self.steps, on_step, begun=state.step, shown=progress and processes.first) as log:
            state = Run(
                config=self,
                pairs=pairs,
                synthesizer=synthesizer,
                legs=legs,
                seeds=seeds,
                processes=processes,
                log=log,
                checkpoints=checkpoints,
                run_fingerprint=run_fingerprint,
                validation=validation,
                cache=None if cache is None else Path(cache),
                validation_seed=validation_seed,
            ).finished(state)
        return TrainingResult(
            lora=state.lora() if state.best is None else state.best.scaled(best(state.validations).strength),
            losses=state.losses,
            pairs=len(pairs),
            steps=state.step,
            seconds=log.seconds,
            validations=state.validations,
        )

    def _made_of(self, pairs: Sequence[ImagePair], seed: int, validation: Validation | None) -> dict[str, str]:
        """What decides the result, by name: a training is resumed only by one made of the same."""
        data = digest(*(pair_digest(pair, include_plan=True) for pair in pairs))
        told = replace(
            self, micro_batch_size=None, gradient_checkpointing=False
        )  # which change memory, and not the result
        return {
            "trainer": _said(told),
            "seed": str(seed),
            "pairs": data,
            "validation": "" if validation is None else validation.fingerprint,
        }


def _said(value: object) -> str:
    """A value in words that are the same in every process: by what it holds, where its repr tells an address."""
    told = repr(value)
    if not _ADDRESS.search(told):
        return told
    held = sorted(getattr(value, "__dict__", {}).items())
    return f"{type(value).__qualname__}({', '.join(f'{name}={_said(one)}' for name, one in held)})"


def _warn_of_unseen(legs: Sequence[Phase], config: TrainingConfig) -> None:
    """Say so where a group of pairs has fewer places in its batches than members."""
    for group in {leg.group for leg in legs}:
        mine = [leg for leg in legs if leg.group == group]
        seen = config.batch_size * sum(math.ceil(leg.steps / config.echo) for leg in mine)
        if seen < len(mine[0].members):
            _log.warning(
                "%d steps of %d pairs, each batch %d time(s), see %d of %d pairs: the others are not learned from. Give it "
                "more steps, larger batches or less echo.",
                *(sum(leg.steps for leg in mine), config.batch_size, config.echo, seen, len(mine[0].members)),
            )


def _known_as(module: nn.Module) -> str:
    """A name for a model's weights: its class and a digest of the small ones, which every fine-tuning moves, too."""
    parts: list[str | Tensor] = []
    for name, one in module.named_parameters():
        if is_quantized(one):  # bitsandbytes lays its weights out anew when it draws on a CPU
            parts += [name, type(one).__name__]
            continue
        parts += [name, str(tuple(one.shape))]
        if one.numel() <= _SMALL and one.device.type != "meta":
            parts.append(one.full_tensor() if hasattr(one, "full_tensor") else one)  # sharded: a part is no weight
    return f"{type(module).__name__} {digest(*parts)[:16]}"


def _sharing(batch_size: int) -> World:
    """The processes of this training, each with the same share of a batch: sharded models compute in step."""
    processes = World.current()
    if batch_size % processes.count:
        raise InvalidValueError(
            f"batch_size={batch_size} cannot be shared equally by {processes.count} processes: make it a multiple."
        )
    return processes
