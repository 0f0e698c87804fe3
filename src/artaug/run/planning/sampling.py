"""What a few prompts take: the stages of a round, timed on a sample in a temporary folder, for `plan_run` to extrapolate."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from PIL import ImageOps
from PIL.Image import Image

from artaug._internal.images import as_rgb
from artaug._internal.memory import FittingBatches
from artaug._internal.progress_bar import ProgressBar
from artaug.critique import Critique
from artaug.image_files import ImageFile
from artaug.lora.fusing import fuse_loras
from artaug.lora.lora import LoRA
from artaug.pairs import Attempt, ImagePair, Kept, Skipped
from artaug.pairwise import PairwiseJudge, judge_images
from artaug.placement import Placement
from artaug.plan import Plan, run_planner
from artaug.run.events import RoundStage, RunEvent, StageClock, StageEvent
from artaug.run.parts import LearningParts, LoopParts
from artaug.run.planning.training_costs import TrainingCosts, elapsed, time_training
from artaug.run.planning.usage_counts import UsageCount, count_usage, counted_since
from artaug.run.stages import RoundStages
from artaug.run.stop_rule import StopRule
from artaug.run.storage.attempts import read_candidates
from artaug.run.storage.metadata import write_metadata
from artaug.run.storage.records import Candidate, Member, load_picture
from artaug.run.storage.round_folder import ResultRecord, RoundFolder
from artaug.run.storage.store import RunFolder
from artaug.scoring import score_images
from artaug.synthesis import draw, held_out_seed, picture_seeds
from artaug.training import Validation


@dataclass(frozen=True)
class StageTiming:
    """A stage on one chunk."""

    seconds: float
    """Without the moves."""
    moving_seconds: float
    count: int
    usage: UsageCount | None = None
    """What the servers of its scorers counted, where that was measured."""

    @property
    def each_s(self) -> float:
        """Seconds an item, without the moves."""
        return self.seconds / self.count


@dataclass(frozen=True)
class SampleCosts:
    """All that was measured."""

    prompts: int
    chunk: int
    """Prompts in a chunk of the sample."""
    calls: int
    """The most pictures in a call of the synthesizer."""
    was_halved: bool
    """Whether memory ran out at calls of the size that was requested."""
    stages: dict[RoundStage, list[StageTiming]]
    """By chunk; without the chunk that warmed up."""
    warm_up: dict[RoundStage, StageTiming]
    peaks: dict[RoundStage, int]
    """Bytes on a CUDA device."""
    kept: int
    pictures: int
    """All candidates."""
    redrawn: int
    """Of them."""
    stand_in: bool
    """Whether no prompt made a pair, and the training was timed on a stand-in."""
    usage: UsageCount | None
    """Of the critic."""
    judging: UsageCount | None
    """Of the filter, and of what chooses among candidates."""
    before_bytes: float
    after_bytes: float
    """Of a picture on disk."""
    record_bytes: float
    """Of a prompt, beside its pictures."""
    plan_s: float
    """That the planner takes for a picture."""
    file_s: float
    """To write what became of a prompt whose pictures are stored already."""
    training: TrainingCosts
    lora_extra_s: float
    """What a picture takes longer with the LoRA of a round."""
    combine_s: tuple[float, float]
    """In the first round, and in one of those that follow."""
    result_bytes: tuple[int, int]
    """Of the files of a round's LoRAs, likewise."""
    validate: StageTiming
    measure: StageTiming
    """Of scoring pictures for a validation, and for the stop rule."""


@dataclass
class TimedPlacement(Placement):
    """Another placement, with a clock for the moves."""

    placement: Placement
    seconds: float = 0.0

    @contextmanager
    def opened(self, *owners: object) -> Iterator[Placement]:
        with self.placement.opened(*owners) as opened:
            yield replace(self, placement=opened)

    @contextmanager
    def stage(self, *owners: object) -> Iterator[None]:
        start = time.perf_counter()
        with self.placement.stage(*owners):
            self.seconds += time.perf_counter() - start
            yield
            start = time.perf_counter()
        self.seconds += time.perf_counter() - start

    def check(self, owner: str, owners: Mapping[str, object]) -> None:
        self.placement.check(owner, owners)


@dataclass
class Sampler:
    """Runs the stages of a round on some prompts and times them."""

    parts: LoopParts
    """Its placement opened."""
    learning: LearningParts
    seed: int
    steps: int
    """Of training to time."""
    folder: Path
    """For all that is written; removed by the caller."""
    progress: bool
    _peaks: dict[RoundStage, int] = field(default_factory=dict)

    def measure(self, prompts: Sequence[str], *, chunk: int) -> SampleCosts:
        """Time everything: a chunk that warms up, then the prompts in chunks, then the training on their pairs."""
        run_folder = RunFolder(self.folder / "sample")
        batches = FittingBatches(self.parts.batch_size)
        # Noise of its own: neither the run's nor that of the other part of the sample.
        seed, warm_up_seed = picture_seeds(held_out_seed(self.seed), 2)
        warm_up_folder = RunFolder(self.folder / "warm-up")
        warm_up, warm_attempts = self._run_stages(prompts[:chunk], warm_up_folder, batches, chunk, seed=warm_up_seed)
        choosing = (self.parts.keep, self.parts.candidates)
        critic_before, choosing_before = count_usage(self.parts.critic), count_usage(*choosing)
        stages, attempts = self._run_stages(prompts, run_folder, batches, chunk, seed=seed)
        usage = counted_since(critic_before, self.parts.critic)
        judging = counted_since(choosing_before, *choosing)
        candidates = list(read_candidates(run_folder.round(1)))
        pairs = [attempt.pair for attempt in attempts if not isinstance(attempt, Skipped)]
        pairs = pairs or [attempt.pair for attempt in warm_attempts if not isinstance(attempt, Skipped)]
        stand_in = not pairs
        images = [load_picture(made.before) for made in candidates[:chunk] if made.before is not None]
        if stand_in:
            after = ImageOps.invert(as_rgb(images[0]))
            pairs = [ImagePair(prompt=prompts[0], seed=0, before=images[0], after=after, plan=Plan(prompts[0]))]
        training = time_training(
            self.learning.trainer,
            pairs,
            self.parts,
            seed=self.seed,
            steps=self.steps,
            folder=self.folder,
        )
        self._note_peak("train")
        before_bytes, after_bytes, record_bytes = _bytes_on_disk(run_folder, candidates, prompts=len(prompts))
        combine_s, result_bytes = self._time_combining(training.lora, run_folder)
        stop, validation = self.learning.stop, self.learning.validation
        return SampleCosts(
            prompts=len(prompts),
            chunk=chunk,
            calls=batches.largest,
            was_halved=batches.largest < self.parts.batch_size,
            stages=stages,
            warm_up={stage: _sum(timings) for stage, timings in warm_up.items()},
            peaks=self._peaks,
            kept=sum(isinstance(attempt, Kept) for attempt in attempts),
            pictures=len(candidates),
            redrawn=sum(candidate.after is not None for candidate in candidates),
            stand_in=stand_in,
            usage=usage,
            judging=judging,
            before_bytes=before_bytes,
            after_bytes=after_bytes,
            record_bytes=record_bytes,
            plan_s=_time_planner(self.parts, candidates),
            file_s=_time_filing(run_folder.round(1), self.folder / "filed", prompts=len(prompts)),
            training=training,
            lora_extra_s=self._time_lora(training.lora, prompts, min(batches.largest, chunk)),
            combine_s=combine_s,
            result_bytes=result_bytes,
            validate=self._time_scoring(validation, images, prompts),
            measure=self._time_scoring(stop, images, prompts),
        )

    def _run_stages(
        self, prompts: Sequence[str], folder: RunFolder, batches: FittingBatches, chunk: int, *, seed: int
    ) -> tuple[dict[RoundStage, list[StageTiming]], list[Attempt]]:
        """Draw, critique, redraw and judge some prompts; the timings of each stage, and how the prompts ended."""
        timings: dict[RoundStage, list[StageTiming]] = {}
        placement = TimedPlacement(self.parts.placement)
        moved = 0.0

        def note(event: RunEvent) -> None:
            nonlocal moved
            if isinstance(event, StageEvent):
                moving, moved = placement.seconds - moved, placement.seconds
                timing = StageTiming(max(event.seconds - moving, 0.0), moving, event.count)
                timings.setdefault(event.stage, []).append(timing)
                self._note_peak(event.stage)

        stages = RoundStages(
            replace(self.parts, placement=placement, chunk_size=chunk),
            folder.round(1).journal(),
            StageClock(1, note),
            seed=seed,
            batches=batches,
            poll=lambda: None,
        )
        _take_peak()
        attempts = []
        with ProgressBar("plan", total=len(prompts), unit="prompt", show=self.progress) as bar:
            for attempt in stages.attempts(prompts, groups=[len(prompts)]):
                attempts.append(attempt)
                bar.advance()
        return timings, attempts

    def _note_peak(self, stage: RoundStage) -> None:
        peak = _take_peak()
        if peak is not None:
            self._peaks[stage] = max(peak, self._peaks.get(stage, 0))

    def _time_lora(self, lora: LoRA, prompts: Sequence[str], count: int) -> float:
        """How much longer a picture takes with a LoRA, warmed up."""
        if self.learning.rounds == 1 and self.learning.stop is None and self.learning.validation is None:
            return 0.0
        plain = self.parts.synthesizer
        plans, seeds = [Plan(prompt) for prompt in prompts[:count]], picture_seeds(self.seed, len(prompts[:count]))
        tuned = plain.with_lora(lora)
        with self.parts.placement.stage(plain):
            draw(tuned, plans, seeds=seeds)
            plain_s, tuned_s = (elapsed(partial(draw, one, plans, seeds=seeds)) for one in (plain, tuned))
        self._note_peak("measure")
        return max(tuned_s - plain_s, 0.0) / len(plans)

    def _time_scoring(
        self, rule: Validation | StopRule | None, images: Sequence[Image], prompts: Sequence[str]
    ) -> StageTiming:
        """Let the scorer or judge of a rule look at some pictures, after a call that warms it up."""
        if rule is None:
            return StageTiming(0.0, 0.0, 1)
        images = images[: len(prompts)]
        placement = TimedPlacement(self.parts.placement)
        with placement.stage(rule.scorer):
            if isinstance(rule.scorer, PairwiseJudge):
                # Of another picture each, since answers about equal ones may come from a cache, or sooner.
                score: Callable[[], object] = partial(
                    judge_images, rule.scorer, images, [*images[1:], images[0]], prompts[: len(images)]
                )
            else:
                score = partial(score_images, rule.scorer, images, prompts[: len(images)])
            score()
            before = count_usage(rule)
            seconds = elapsed(score)
        return StageTiming(seconds, placement.seconds, len(images), counted_since(before, rule))

    def _time_combining(self, lora: LoRA, folder: RunFolder) -> tuple[tuple[float, float], tuple[int, int]]:
        """Seconds to combine the LoRA of the first round and of one after it, and the bytes of their files."""
        seconds, sizes = [], []
        for number, loras in ((1, [lora]), (2, [lora, lora])):
            start = time.perf_counter()
            combined = fuse_loras(self.learning.fuser, loras)
            seconds.append(time.perf_counter() - start)
            place = folder.round(number)
            place.write_result(
                ResultRecord((0.0,) * self.learning.trainer.steps, 0, 0, 0.0, (), 0, {}, None, accepted=True),
                learned=lora,
                combined=combined,
            )
            sizes.append(sum(file.stat().st_size for file in place.path.glob("*.safetensors")))
        return (seconds[0], seconds[1]), (sizes[0], sizes[1])


def _sum(timings: Sequence[StageTiming]) -> StageTiming:
    return StageTiming(
        sum(timing.seconds for timing in timings),
        sum(timing.moving_seconds for timing in timings),
        sum(timing.count for timing in timings),
    )


def _bytes_on_disk(folder: RunFolder, candidates: Sequence[Candidate], *, prompts: int) -> tuple[float, float, float]:
    """Bytes of a picture before and of one after, and of a prompt's records."""
    before = {candidate.before.path for candidate in candidates if isinstance(candidate.before, ImageFile)}
    # A picture that was redrawn to the same pixels is stored once.
    after = {candidate.after.path for candidate in candidates if isinstance(candidate.after, ImageFile)} - before
    redrawn = sum(candidate.after is not None for candidate in candidates)
    sizes = [sum(path.stat().st_size for path in paths) for paths in (before, after)]
    write_metadata(folder)
    records = sum(file.stat().st_size for file in folder.path.rglob("*.json*"))
    return sizes[0] / len(candidates), sizes[1] / max(redrawn, 1), records / prompts


def _time_planner(parts: LoopParts, candidates: Sequence[Candidate]) -> float:
    """Seconds of the planner for a picture."""

    def plan_all() -> None:
        for made in candidates:
            if isinstance(made.answer, Critique):
                run_planner(parts.planner, made.prompt, made.answer, image=made.before)

    return elapsed(plan_all) / len(candidates)


def _time_filing(made: RoundFolder, folder: Path, *, prompts: int) -> float:
    """Seconds to write a prompt's records once more, with pictures that are stored already, as workers of a cluster do that."""
    journal = RoundFolder(folder, made.images).journal()
    records = {name: record for name in made.chunk_names() if (record := made.chunk(name)) is not None}
    files = {
        digest: made.images.get(digest)
        for record in records.values()
        for call in record.calls
        for digest in call.images
    }

    def write_all() -> None:
        for name, record in records.items():
            chunk, again = record.to_chunk(made.images), journal.begin(name)
            for call in record.calls:
                members = [Member(*member) for member in call.members]
                plans = {member: chunk.candidates[member].plan or Plan("") for member in members}
                again.add_call(call.stage, plans, [files[digest] for digest in call.images], limit=call.limit)
            again.finish(chunk)

    seconds = elapsed(write_all) / prompts
    journal.close()
    return seconds


def _take_peak() -> int | None:
    """The most memory that torch has held on a CUDA device since the last call; None where there is none in use."""
    if not torch.cuda.is_initialized():
        return None
    devices = range(torch.cuda.device_count())
    peak = max(torch.cuda.max_memory_allocated(device) for device in devices)
    for device in devices:
        torch.cuda.reset_peak_memory_stats(device)
    return peak
