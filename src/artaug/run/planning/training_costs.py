"""What a training takes: a short one on a few pairs, timed for `plan_run`."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from artaug.errors import InvalidValueError
from artaug.lora.lora import LoRA
from artaug.pairs import ImagePair
from artaug.run.checking import as_trainable
from artaug.run.parts import LoopParts
from artaug.training import Checkpoints, DifferentialLoRATrainer, RemotelyTrainable, StepEvent, Trainable
from artaug.training.batches import EncodedPairs
from artaug.training.phases import split_into_phases


@dataclass(frozen=True)
class TrainingCosts:
    """What a training takes, in seconds and bytes."""

    fixed_s: float
    """A training, whatever its length: fingerprints, moves, the adapter."""
    phase_s: float
    """The start of each phase after the first, see `artaug.training.phases`."""
    encode_s: float
    """A pair, its prompt included."""
    step_s: Sequence[float]
    """Each step that was timed; the first ones, which warm up, left out."""
    checkpoint_s: float
    """A checkpoint."""
    checkpoint_bytes: int
    pair_bytes: float
    """In the cache of latents."""
    text_bytes: float
    """A prompt in that cache."""
    lora: LoRA
    """What was learned."""


@dataclass(frozen=True)
class _EncodingTimer:
    """Times the encoding of pairs, twice, where the model is."""

    pairs: Sequence[ImagePair]
    micro_batch_size: int
    warm_up: Path
    latents: Path

    def __call__(self, synthesizer: Trainable, report: Callable[[object], None]) -> tuple[float, float]:
        encode = partial(EncodedPairs.encode, micro_batch_size=self.micro_batch_size)
        with synthesizer.training() as model, model.without_denoiser(), torch.no_grad():
            encode(model, self.pairs[:1], cache=self.warm_up)
            new, again = (elapsed(lambda: encode(model, self.pairs, cache=self.latents)) for _ in range(2))
        return new, again


def _nothing(report: object) -> None:
    """What is done with reports of an encoding, which has none."""


def time_training(
    trainer: DifferentialLoRATrainer,
    pairs: Sequence[ImagePair],
    parts: LoopParts,
    *,
    seed: int,
    steps: int,
    folder: Path,
) -> TrainingCosts:
    """Time encoding, steps and a checkpoint of a training on some pairs, kept or not: it takes as long on either."""
    synthesizer, latents = as_trainable(parts.synthesizer), folder / "latents"
    micro_batch_size = trainer.micro_batch_size or trainer.batch_size
    encoding = _EncodingTimer(pairs, micro_batch_size, folder / "warm-up-latents", latents)
    with parts.placement.stage(synthesizer):
        if isinstance(synthesizer, RemotelyTrainable):
            new, again = synthesizer.use(encoding, on_report=_nothing)
        else:
            new, again = encoding(synthesizer, _nothing)
    # The steps of a training on few pairs would use each batch less often.
    echo = trainer.echo or trainer.objective.recommended_echo
    trainer = replace(trainer, echo=echo)
    timed = pairs[: trainer.batch_size * math.ceil(steps / echo)]
    if len(trainer.objective.training_plan(len(timed)).groups) > 1:  # each pair is learned by itself
        timed = timed[:2]
    steps, starts = _phase_starts(trainer, steps, echo=echo, pairs=len(timed))
    events: list[StepEvent] = []
    checkpoints = Checkpoints(folder=folder / "checkpoints", every=math.ceil(steps / 2))
    start = time.perf_counter()
    result = replace(trainer, steps=steps).train(
        timed,
        synthesizer,
        seed=seed,
        checkpoints=checkpoints,
        cache=latents,
        placement=parts.placement,
        on_step=events.append,
        progress=False,
    )
    total_s = time.perf_counter() - start
    durations = [trainer.batch_size / event.pairs_per_second for event in events]
    # The first step of a phase, and the one after a checkpoint, build adapter and optimizer anew: part of what those take.
    after = checkpoints.every  # its index
    steady = [duration for index, duration in enumerate(durations) if index not in {*starts, after}]
    steady = steady or durations[1:] or durations
    step_s = sum(steady) / len(steady)
    later = [max(durations[start] - step_s, 0.0) for start in starts[1:] if start != after]
    phase_s, checkpoint_s = sum(later) / max(len(later), 1), 0.0
    if after < len(events):
        writing_s = events[after].seconds - events[after - 1].seconds - durations[after]
        checkpoint_s = max(writing_s + durations[after] - step_s - phase_s * (after in starts), 0.0)
    written = math.ceil(steps / checkpoints.every)
    others_s = steps * step_s + written * checkpoint_s + (len(starts) - 1) * phase_s
    return TrainingCosts(
        fixed_s=max(total_s - others_s, 0.0),
        phase_s=phase_s,
        encode_s=max(new - again, 0.0) / len(pairs),
        step_s=steady,
        checkpoint_s=checkpoint_s,
        checkpoint_bytes=max(file.stat().st_size for file in Path(checkpoints.folder).glob("*.safetensors")),
        pair_bytes=_mean_size(latents / "pairs"),
        text_bytes=_mean_size(latents / "prompts"),
        lora=result.lora,
    )


def _phase_starts(trainer: DifferentialLoRATrainer, steps: int, *, echo: int, pairs: int) -> tuple[int, list[int]]:
    """How many steps to time, as many as phases and echo need at least, and after which of them each phase starts."""
    plan = trainer.objective.training_plan(pairs)
    # Two steps a phase, so that one of them is not its first.
    steps = max(steps, min(max(2 * echo, 2 * len(plan.groups) * len(plan.stages)), trainer.steps))
    while True:  # the trainer's own are enough: the check at the door has found so, for no fewer pairs
        try:
            return steps, [phase.start for phase in split_into_phases(plan, replace(trainer, steps=steps))]
        except InvalidValueError:
            if steps >= trainer.steps:
                raise
            steps = min(2 * steps, trainer.steps)


def _mean_size(folder: Path) -> float:
    sizes = [file.stat().st_size for file in folder.glob("*.safetensors")]
    return sum(sizes) / max(len(sizes), 1)


def elapsed(function: Callable[[], object]) -> float:
    """Seconds that a call takes."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start
