"""From what a sample took to what a run will take: the arithmetic of `plan_run`."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from artaug.critique import Critic
from artaug.evaluation.statistics import Interval, paired_bootstrap, wilson_interval
from artaug.run.events import RoundStage
from artaug.run.parts import LearningParts, LoopParts
from artaug.run.planning.cluster_plan import ChunkPlan
from artaug.run.planning.run_plan import CriticPlan, RunPlan, StagePlan, advise
from artaug.run.planning.sampling import SampleCosts, StageTiming
from artaug.run.planning.usage_counts import UsageCount
from artaug.training import Checkpoints
from artaug.training.phases import split_into_phases


@dataclass(frozen=True)
class Extrapolation:
    """From what a sample took to what the run will."""

    parts: LoopParts
    learning: LearningParts
    costs: SampleCosts
    prompts: int
    stored: bool
    """Whether the run has a store: then trainings write checkpoints."""

    @property
    def chunks(self) -> int:
        """Of a round."""
        return math.ceil(self.prompts / self.parts.prompts_per_chunk)

    @property
    def pictures(self) -> int:
        """Drawn in a round, without those that are redrawn."""
        return self.prompts * self.parts.candidate_count

    @property
    def pairs(self) -> float:
        """Kept in a round."""
        return self.prompts * self.costs.kept / self.costs.prompts

    @property
    def pairs_interval(self) -> Interval:
        """Of ``pairs``."""
        return _times(wilson_interval(self.costs.kept, self.costs.prompts), self.prompts)

    @property
    def redrawn(self) -> float:
        """The share of pictures that are redrawn."""
        return self.costs.redrawn / self.costs.pictures

    def plan(self, *, free_bytes: int | None, prices: tuple[float, float] | None) -> RunPlan:
        """All of it."""
        redrawn = _times(wilson_interval(self.costs.redrawn, self.costs.pictures), self.pictures)
        stages = (
            self._loop_stage("draw", "pictures", self.pictures),
            self._loop_stage("critique", "answers", self.pictures),
            self._loop_stage("redraw", "pictures", self.pictures * self.redrawn, redrawn),
            self._loop_stage("judge", "prompts", self.prompts),
            self._training(),
            self._constant_stage("combine", "LoRAs", self.learning.rounds, self.costs.combine_s),
            self._measuring(),
        )
        rounds = self.learning.rounds
        disk = self._disk()
        return RunPlan(
            prompts=self.prompts,
            rounds=rounds,
            sample=self.costs.prompts,
            sample_chunk=self.costs.chunk,
            stages=stages,
            pairs=self.pairs,
            pairs_interval=self.pairs_interval,
            redrawn=self.redrawn,
            chunks=self._chunks(),
            disk=disk,
            free_bytes=free_bytes,
            critic=self._critic(prices),
            scorers=self._scorers(prices),
            advice=tuple(
                advise(
                    stages,
                    prompts=self.prompts,
                    chunk=self.parts.prompts_per_chunk,
                    candidates=self.pictures // self.prompts,
                    concurrency=_concurrency(self.parts.critic),
                    steps_s=rounds * self.learning.trainer.steps * _mean(self.costs.training.step_s),
                    validations_s=sum(map(self._validations_s, range(rounds))),
                )
            ),
            notes=tuple(self._notes(sum(disk.values()), free_bytes)),
        )

    def _loop_stage(self, stage: RoundStage, unit: str, count: float, counts: Interval | None = None) -> StagePlan:
        """A stage that goes through the chunks: seconds of each of ``count`` items a round, and moves of each chunk."""
        each_s, each = self._each_s(stage), self._each_interval(stage)
        moves = self._moves_s(stage) * self.chunks
        slower_s = self.costs.lora_extra_s if stage in {"draw", "redraw"} else 0.0
        later = self.learning.rounds - 1
        seconds = (count * each_s + moves, *[count * (each_s + slower_s) + moves] * later)
        warm_up_s = self._warm_up_s(stage)
        counts = counts or Interval(count, count)
        fixed_s = self.learning.rounds * moves + warm_up_s
        interval = each and Interval(
            *(
                self.learning.rounds * items * seconds_each + later * items * slower_s + fixed_s
                for items, seconds_each in ((counts.low, each.low), (counts.high, each.high))
            )
        )
        return StagePlan(
            stage=stage,
            count=round(count * self.learning.rounds),
            unit=unit,
            seconds_by_round=seconds,
            interval=interval,
            warm_up_seconds=warm_up_s,
            moving_seconds=moves * self.learning.rounds,
            peak_bytes=self.costs.peaks.get(stage),
        )

    def _chunks(self) -> ChunkPlan:
        costs, parts, stop = self.costs, self.parts, self.learning.stop
        return ChunkPlan(
            prompts=min(parts.prompts_per_chunk, self.prompts),
            batch=costs.calls,
            critics=parts.critic.max_concurrency,
            planning_seconds=costs.plan_s,
            # What a chunk writes is in proportion to its prompts.
            filing_seconds=costs.file_s * min(parts.prompts_per_chunk, self.prompts),
            judged_together=parts.keep.needs_all_pairs,
            scoring_seconds=0.0 if stop is None else len(stop.prompts) * costs.measure.each_s,
        )

    def _moves_s(self, stage: RoundStage) -> float:
        """Seconds of moves a chunk; some chunks have nothing to redraw, and no moves for it."""
        moves_s = sum(timing.moving_seconds for timing in self.costs.stages.get(stage, []))
        return moves_s / math.ceil(self.costs.prompts / self.costs.chunk)

    def _chunk_rates(self, stage: RoundStage) -> list[float]:
        """Seconds an item of a stage takes, by chunk."""
        timings = self.costs.stages.get(stage, [])
        if stage == "judge" and self.parts.keep.needs_all_pairs:  # one call at the end, for all prompts
            return [sum(timing.seconds for timing in timings) / self.costs.prompts]
        return [timing.seconds / timing.count for timing in timings if timing.count]

    def _each_s(self, stage: RoundStage) -> float:
        timings: Sequence[StageTiming] = self.costs.stages.get(stage, [])
        if stage == "judge":
            return sum(timing.seconds for timing in timings) / self.costs.prompts
        return sum(timing.seconds for timing in timings) / max(sum(timing.count for timing in timings), 1)

    def _each_interval(self, stage: RoundStage) -> Interval | None:
        rates = self._chunk_rates(stage)
        return _interval(rates, around=self._each_s(stage))

    def _warm_up_s(self, stage: RoundStage) -> float:
        """What the first chunk took longer than the others."""
        warm_up, timings = self.costs.warm_up.get(stage), self.costs.stages.get(stage, [])
        if warm_up is None or not timings:
            return 0.0
        count = self.costs.chunk if stage == "judge" else warm_up.count
        later_s = count * self._each_s(stage) + self._moves_s(stage)
        return max(warm_up.seconds + warm_up.moving_seconds - later_s, 0.0)

    def _training(self) -> StagePlan:
        costs, trainer, rounds = self.costs.training, self.learning.trainer, self.learning.rounds
        step_s = _mean(costs.step_s)
        others = [
            costs.fixed_s
            + (self._phase_count() - 1) * costs.phase_s
            + self.stored * self._checkpoint_count() * costs.checkpoint_s
            + self._validations_s(number)
            for number in range(rounds)
        ]
        seconds = [other + trainer.steps * step_s + self.pairs * costs.encode_s for other in others]
        step = _interval(costs.step_s, around=step_s)
        interval = step and Interval(
            *(
                sum(others) + rounds * (trainer.steps * each_s + pairs * costs.encode_s)
                for each_s, pairs in ((step.low, self.pairs_interval.low), (step.high, self.pairs_interval.high))
            )
        )
        return StagePlan(
            stage="train",
            count=rounds * trainer.steps,
            unit="steps",
            seconds_by_round=tuple(seconds),
            interval=interval,
            warm_up_seconds=0.0,
            moving_seconds=0.0,
            peak_bytes=self.costs.peaks.get("train"),
        )

    def _phase_count(self) -> int:
        """Phases of a training on the pairs of a round."""
        trainer = self.learning.trainer
        plan = trainer.objective.training_plan(max(round(self.pairs), 1))
        return len(split_into_phases(plan, trainer))

    def _validation_count(self) -> int:
        """Validations of a training: one of several phases has only that of its last step."""
        validation = self.learning.validation
        if validation is None:
            return 0
        return 1 if self._phase_count() > 1 else math.ceil(self.learning.trainer.steps / validation.every)

    def _validations_s(self, number: int) -> float:
        """Of the training of a round, from 0."""
        validation = self.learning.validation
        if validation is None:
            return 0.0
        looks = self._validation_count() * len(validation.strengths)
        seconds = self._held_out_s(len(validation.prompts), self.costs.validate, calls=1, has_lora=number > 0)
        return seconds + looks * self._held_out_s(len(validation.prompts), self.costs.validate, calls=1, has_lora=True)

    def _held_out_s(self, pictures: int, scoring: StageTiming, *, calls: int, has_lora: bool) -> float:
        """To draw and score held-out pictures, with so many moves of each model."""
        moves = self._moves_s("draw") + scoring.moving_seconds
        drawing_s = self._each_s("draw") + self.costs.lora_extra_s * has_lora
        return pictures * (drawing_s + scoring.each_s) + calls * moves

    def _checkpoint_count(self) -> int:
        """Checkpoints of a training with a store."""
        checkpoints = self.learning.checkpoints
        every = Checkpoints.every if checkpoints is None else checkpoints.every
        return (
            math.ceil(self.learning.trainer.steps / every) + bool(self.learning.validation) + self._validation_count()
        )

    def _measuring(self) -> StagePlan:
        stop = self.learning.stop
        count = 0 if stop is None else len(stop.prompts)
        calls = math.ceil(count / self.parts.batch_size)
        measure = self.costs.measure
        # A judge has nothing to say of the base's pictures alone.
        of_base = StageTiming(0.0, 0.0, 1) if stop is not None and stop.judges else measure
        base_s, after_s = (
            self._held_out_s(count, scoring, calls=calls, has_lora=has_lora) * (count > 0)
            for scoring, has_lora in ((of_base, False), (measure, True))
        )
        # The first round draws the base, too; each later one is compared with what the round before has drawn.
        pictures = (self.learning.rounds + 1) * count
        return self._constant_stage("measure", "pictures", pictures, [base_s + after_s, after_s])

    def _constant_stage(self, stage: RoundStage, unit: str, count: int, seconds: Sequence[float]) -> StagePlan:
        """A stage that was timed as a whole, in the first round and in each later one as in the last of ``seconds``."""
        rounds = self.learning.rounds
        by_round = [*seconds, *[seconds[-1]] * rounds][:rounds]
        return StagePlan(
            stage=stage,
            count=count,
            unit=unit,
            seconds_by_round=tuple(by_round),
            interval=None,
            warm_up_seconds=0.0,
            moving_seconds=0.0,
            peak_bytes=self.costs.peaks.get(stage) if count else None,
        )

    def _disk(self) -> dict[str, int]:
        costs, rounds = self.costs, self.learning.rounds
        first, second = costs.result_bytes
        checkpoints = self.learning.checkpoints
        keep = Checkpoints.keep if checkpoints is None else checkpoints.keep
        held_out = 0 if self.learning.stop is None else (rounds + 1) * len(self.learning.stop.prompts)
        sizes = {
            "pictures": rounds * self.pictures * (costs.before_bytes + self.redrawn * costs.after_bytes),
            "held-out pictures": held_out * costs.before_bytes,
            "records": rounds * self.prompts * costs.record_bytes,
            "latents": rounds * self.pairs * costs.training.pair_bytes
            + min(self.prompts, rounds * self.pairs) * costs.training.text_bytes,
            # The files of a fuser that only concatenates grow by as much every round.
            "LoRAs": sum(first + number * (second - first) for number in range(rounds)),
            "checkpoints": min(keep, self._checkpoint_count()) * costs.training.checkpoint_bytes,
        }
        return {name: round(size) for name, size in sizes.items()}

    def _critic(self, prices: tuple[float, float] | None) -> CriticPlan | None:
        return _priced(self._per_picture(self.costs.usage), prices)

    def _scorers(self, prices: tuple[float, float] | None) -> CriticPlan | None:
        """Of all scorers and judges: those that choose pairs, and those that look at held-out pictures."""
        stop, validation, rounds = self.learning.stop, self.learning.validation, self.learning.rounds
        # A judge has nothing to say of the base's pictures alone.
        measured = 0 if stop is None else (rounds + (not stop.judges)) * len(stop.prompts)
        looks = 0 if validation is None else 1 + self._validation_count() * len(validation.strengths)
        validated = 0 if validation is None else rounds * looks * len(validation.prompts)
        counts = [
            self._per_picture(self.costs.judging),
            *(
                timing.usage and timing.usage.times(pictures / timing.count)
                for timing, pictures in ((self.costs.measure, measured), (self.costs.validate, validated))
            ),
        ]
        known = [count for count in counts if count is not None]
        return _priced(sum(known, UsageCount()), prices) if known else None

    def _per_picture(self, usage: UsageCount | None) -> UsageCount | None:
        """What was counted in the sample, for all rounds: in proportion to the pictures."""
        return usage and usage.times(self.learning.rounds * self.pictures / self.costs.pictures)

    def _notes(self, disk_bytes: int, free_bytes: int | None) -> Iterator[str]:
        costs, whole = self.costs, self.parts.prompts_per_chunk
        if costs.kept == 0:
            yield f"No pair of {costs.prompts} prompts was kept: a run ends with an error where a first round keeps none."
        if costs.stand_in:
            yield "No prompt made a pair, so the training was timed on a stand-in without regions."
        if costs.chunk < whole and costs.chunk < self.prompts:
            yield (
                f"The run's chunks have {min(whole, self.prompts)} prompts; with sample={2 * min(whole, self.prompts)} the "
                "sample's would have as many."
            )
        if costs.usage is not None and costs.usage.requests == 0:
            yield "The critic's server was not asked, as its answers were in a cache: what it takes is missing here."
        if costs.was_halved:
            yield f"Memory ran out at {self.parts.batch_size} pictures a call; {costs.calls} fit."
        workers = self.parts.synthesizer.max_concurrency
        if workers > 1:
            yield f"Times are those of one worker; RunPlan.on([{workers}]) simulates the {workers} of this synthesizer."
        if free_bytes is not None and disk_bytes > free_bytes:
            yield "The disk of the store has too little room."
        if not costs.peaks:
            yield "GPU memory was not measured: torch used no CUDA device. Of a training, artaug.diffusion.estimate computes it."
        yield "Yield and the critic's speed are taken to be the same in every round, and all rounds and steps to run."


def _priced(usage: UsageCount | None, prices: tuple[float, float] | None) -> CriticPlan | None:
    if usage is None:
        return None
    tokens = usage.input_tokens, usage.output_tokens
    cost = None if prices is None else sum(count * price for count, price in zip(tokens, prices, strict=True)) / 1e6
    return CriticPlan(
        requests=round(usage.requests),
        retries=round(usage.retries),
        input_tokens=round(usage.input_tokens),
        output_tokens=round(usage.output_tokens),
        cost=cost,
        is_lower_bound=usage.uncounted > 0,
    )


def _concurrency(critic: Critic) -> int | None:
    concurrency = getattr(critic, "concurrency", None)
    return concurrency if isinstance(concurrency, int) else None


def _interval(values: Sequence[float], *, around: float) -> Interval | None:
    """Bootstrap interval of a mean of positive numbers; it contains the estimate that is used. None for a single one."""
    if len(values) < 2:
        return None
    interval = paired_bootstrap(values)
    return Interval(max(min(interval.low, around), 0.0), max(interval.high, around))


def _times(interval: Interval, factor: float) -> Interval:
    return Interval(interval.low * factor, interval.high * factor)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / max(len(values), 1)
