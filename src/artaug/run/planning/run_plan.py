"""The plan of a run: what it will take, by stage, and how that compares with what it took."""

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from artaug._internal.arguments import argument_error, check_count
from artaug._internal.segments import read_segment, write_segment
from artaug._internal.text import duration, table_html
from artaug._internal.values import to_json, value
from artaug.evaluation.statistics import Interval
from artaug.run.events import RoundStage
from artaug.run.planning.cluster_plan import ChunkPlan, ClusterPlan, ClusterRun, HeldOut
from artaug.run.planning.simulation import LoopCosts
from artaug.run.results import Enhancement

_HEADINGS = ("stage", "count", "time", "95% interval", "share", "moves", "GPU memory")
_MANY_MOVES, _FEW_MOVES = 0.1, 0.05
"""Shares of the time that moving models takes: above the first it is worth a word, and the second is the aim."""


@value
class StagePlan:
    """What one stage of a run will take."""

    stage: RoundStage
    count: int
    """Of ``unit``, over all rounds."""
    unit: str
    seconds_by_round: tuple[float, ...]
    """Wall-clock time in each round, moves of models included."""
    interval: Interval | None
    """95% interval of ``seconds``, from the spread between the chunks or steps of the sample; None if there was but one."""
    warm_up_seconds: float
    """What the first call took longer than the others, as compiling does: paid once a process."""
    moving_seconds: float
    """Over all rounds, for models to come to the device and leave it."""
    peak_bytes: int | None
    """Most memory that torch held on one CUDA device during the stage; None if it was not measured."""

    @property
    def seconds(self) -> float:
        """All rounds, and the warm-up."""
        return sum(self.seconds_by_round) + self.warm_up_seconds


@value
class CriticPlan:
    """What a critic that counts its usage, as `artaug.critics.OpenAICritic` does, will use in the whole run.

    The same of scorers and judges, such as `artaug.scorers.OpenAIVQAScore`, all together.
    """

    requests: int
    """Repeated ones included."""
    retries: int
    input_tokens: int
    output_tokens: int
    cost: float | None
    """In the currency of the prices; None without prices."""
    is_lower_bound: bool
    """Whether the server left out the tokens of some replies."""


@value
class RunPlan:
    """What a run of `enhance` will take, extrapolated by `plan_run` from a few prompts: time, memory, critic and disk.

    ``print(plan)`` shows it as a table.
    """

    prompts: int
    rounds: int
    sample: int
    """Prompts that were timed."""
    sample_chunk: int
    """Prompts that went through the stages together there."""
    stages: tuple[StagePlan, ...]
    pairs: float
    """Pairs kept a round, as often as in the sample."""
    pairs_interval: Interval
    """Wilson's 95% interval of that number."""
    redrawn: float
    """Share of the pictures that are redrawn."""
    chunks: ChunkPlan
    disk: dict[str, int]
    """Bytes of a run with a store, by what they are for; the checkpoints go when their round is finished."""
    free_bytes: int | None
    """Room on the disk of the store when the plan was made; None without a store."""
    critic: CriticPlan | None
    """None for a critic that counts nothing."""
    scorers: CriticPlan | None
    """Of the scorers and judges of the filter, the candidates, the validation and the stop rule; None if none counts."""
    advice: tuple[str, ...]
    """What would help, where it follows from the numbers."""
    notes: tuple[str, ...]
    """What limits the plan."""

    @property
    def seconds(self) -> float:
        """Of all stages."""
        return sum(stage.seconds for stage in self.stages)

    @property
    def interval(self) -> Interval | None:
        """Both ends of all stages added, which is wide rather than narrow; None if the sample was a single chunk."""
        if self.stages[0].interval is None:
            return None
        ends = [stage.interval or Interval(stage.seconds, stage.seconds) for stage in self.stages]
        return Interval(sum(end.low for end in ends), sum(end.high for end in ends))

    @property
    def disk_bytes(self) -> int:
        """Of everything at once."""
        return sum(self.disk.values())

    @property
    def bottleneck(self) -> StagePlan:
        """The stage that takes the most time."""
        return max(self.stages, key=lambda stage: stage.seconds)

    def on(
        self,
        gpus: Sequence[int],
        *,
        critics: int | Sequence[int] | None = None,
        load_s: float = 0.0,
        gpu_hour_price: float | None = None,
    ) -> ClusterPlan:
        """What the run would take on clusters, see ``artaug.scale``, with a worker on each GPU and a store that all of them reach.

        Simulated, not run: its chunks go through the scheduler of a run in simulated time. Pictures are drawn on all workers
        at the same time, the critic answers beside them, and the process that drives the run plans, judges and writes, one
        thing after the other. Held-out pictures are drawn on all workers, a training and its validations are on one while the
        others wait. All seconds are those of the sample, so of one worker, and moves of models are left out, since each part has its place.
        What Ray takes for a call and what a file system takes under load are not in it.

        Args:
            gpus: sizes, each at least 1.
            critics: chunks that the critic answers about at the same time, each as fast as in the sample; one number, or one
                for each size. None for as many as the plan's critic; 0 if it computes in the process that drives the run.
            load_s: seconds until a worker has its model.
            gpu_hour_price: of one GPU that draws. Those of a critic, and its tokens, are not in the cost.

        Raises:
            InvalidValueError: for sizes or critics that are no such numbers, or not as many critics as sizes.

        >>> plan = aa.RunPlan.load("runs/first-plan.json")  # doctest: +SKIP
        >>> print(plan.on([1, 8, 64, 512], critics=[1, 1, 8, 64], gpu_hour_price=2.5))  # doctest: +SKIP
        """
        owner = "RunPlan.on"
        sizes = _counts(owner, "gpus", gpus, least=1)
        critics = self.chunks.critics if critics is None else critics
        asking = _counts(owner, "critics", [critics] * len(sizes) if isinstance(critics, int) else critics, least=0)
        if len(asking) != len(sizes):
            raise argument_error(owner, "critics", critics, expected=f"one number, or {len(sizes)}: one for each size")
        _check_amount(owner, "load_s", load_s)
        _check_amount(owner, "gpu_hour_price", 0.0 if gpu_hour_price is None else gpu_hour_price)
        run = self._cluster_run()
        return ClusterPlan(
            prompts=self.prompts,
            rounds=self.rounds,
            sizes=tuple(
                run.on(size, critics=count, load_s=load_s, gpu_hour_price=gpu_hour_price)
                for size, count in zip(sizes, asking, strict=True)
            ),
        )

    def _cluster_run(self) -> ClusterRun:
        stages = {stage.stage: stage for stage in self.stages}
        chunks, pictures = self.chunks, stages["critique"].count // self.rounds

        def each_s(name: RoundStage, number: int, count: float) -> float:
            stage = stages[name]
            return max(stage.seconds_by_round[number] - stage.moving_seconds / self.rounds, 0.0) / max(count, 1e-12)

        loops = tuple(
            LoopCosts(
                prompts=self.prompts,
                chunk=chunks.prompts,
                candidates=pictures // self.prompts,
                batch=chunks.batch,
                redrawn=self.redrawn,
                draw_s=each_s("draw", number, pictures),
                critique_s=each_s("critique", number, pictures),
                plan_s=chunks.planning_seconds,
                redraw_s=each_s("redraw", number, pictures * self.redrawn),
                judge_s=each_s("judge", number, self.prompts),
                file_s=chunks.filing_seconds,
                judged_together=chunks.judged_together,
            )
            for number in range(self.rounds)
        )
        first_s = stages["draw"].warm_up_seconds + stages["redraw"].warm_up_seconds
        between = {name: stages[name].seconds for name in ("train", "combine")}
        return ClusterRun(loops=loops, between=between, arms=tuple(self._held_out(stages["measure"])), first_s=first_s)

    def _held_out(self, measure: StagePlan) -> Iterator[HeldOut]:
        """What is measured in each round: the LoRA of the round, and in the first one the base, too."""
        batches = math.ceil(measure.count / (self.rounds + 1) / self.chunks.batch)
        for number, seconds in enumerate(measure.seconds_by_round):
            arms = 1 if number else 2
            score_s = min(self.chunks.scoring_seconds, seconds / arms)
            yield from [HeldOut(batches=batches, draw_s=seconds / arms - score_s, score_s=score_s)] * arms

    @property
    def rows(self) -> list[tuple[str, ...]]:
        """The table's cells, a row a stage and one for all of them."""
        total, interval = self.seconds, self.interval
        moves = sum(stage.moving_seconds for stage in self.stages)
        peaks = [stage.peak_bytes for stage in self.stages if stage.peak_bytes is not None]
        last = (
            *("all", "", duration(total), _span(interval), "100%", duration(moves) if moves >= 1 else "-"),
            _size(max(peaks)) if peaks else "-",
        )
        return [*(self._row(stage) for stage in self.stages), last]

    def _row(self, stage: StagePlan) -> tuple[str, ...]:
        return (
            stage.stage,
            f"{stage.count:,} {stage.unit}",
            duration(stage.seconds),
            _span(stage.interval),
            f"{stage.seconds / max(self.seconds, 1e-12):.0%}",
            duration(stage.moving_seconds) if stage.moving_seconds >= 1 else "-",
            "-" if stage.peak_bytes is None else _size(stage.peak_bytes),
        )

    def table(self) -> str:
        """The stages as a table of text."""
        lines = [_HEADINGS, *self.rows]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
        )

    def __str__(self) -> str:
        """The table, and the numbers that are not about stages."""
        return "\n".join([self._headline(), "", self.table(), "", *self._lines()])

    def __repr__(self) -> str:
        """Its numbers on one line."""
        return (
            f"RunPlan({self.prompts:,} prompts, {self.rounds} rounds, {duration(self.seconds)}, "
            f"{_size(self.disk_bytes)} on disk, bottleneck={self.bottleneck.stage!r})"
        )

    def _repr_html_(self) -> str:
        """The table and the other numbers, for notebooks."""
        items = table_html(("", ""), [line.partition(": ")[::2] for line in self._lines()])
        return f"<p>{self._headline()}</p>{table_html(_HEADINGS, self.rows)}{items}"

    def _headline(self) -> str:
        return (
            f"Plan of {self.rounds} round{'s' * (self.rounds != 1)} of {self.prompts:,} prompts, from {self.sample} prompts "
            f"in chunks of {self.sample_chunk}"
        )

    def _lines(self) -> Iterator[str]:
        share = self.bottleneck.seconds / max(self.seconds, 1e-12)
        yield f"bottleneck: {self.bottleneck.stage}, {share:.0%} of the time"
        low, high = self.pairs_interval.low, self.pairs_interval.high
        yield f"pairs: {self.pairs:,.0f} kept a round ({low:,.0f} to {high:,.0f}), {self.redrawn:.0%} of pictures redrawn"
        for name, use in (("critic", self.critic), ("scorers", self.scorers)):
            if use is not None:
                bound = "at least " if use.is_lower_bound else ""
                cost = "" if use.cost is None else f", cost {bound}{use.cost:,.2f}"
                yield (
                    f"{name}: {use.requests:,} requests, {bound}{use.input_tokens:,} input and {use.output_tokens:,} output "
                    f"tokens{cost}"
                )
        parts = ", ".join(f"{name} {_size(size)}" for name, size in self.disk.items() if size)
        free = "" if self.free_bytes is None else f"; {_size(self.free_bytes)} are free"
        yield f"disk: {_size(self.disk_bytes)} with a store: {parts}{free}"
        yield from (f"advice: {line}" for line in self.advice)
        yield from (f"note: {line}" for line in self.notes)

    def to_dict(self) -> dict[str, Any]:
        """The plan in plain types that JSON takes, with the totals."""
        fields: dict[str, Any] = json.loads(to_json(self))
        return {
            **fields,
            "seconds": self.seconds,
            "disk_bytes": self.disk_bytes,
            "bottleneck": self.bottleneck.stage,
        }

    def against(self, result: Enhancement) -> list[tuple[str, float, float]]:
        """What was planned beside what happened in a run, or in the rounds of it that ran.

        Returns:
            For each stage its name, the seconds that the plan has for so many rounds, and those that it took. Of a run that
            was resumed, the latter are those of the calls that finished its rounds.
        """
        rounds = len(result.rounds)
        return [
            (
                stage.stage,
                sum(stage.seconds_by_round[:rounds]) + stage.warm_up_seconds * (rounds > 0),
                sum(finished.seconds.get(stage.stage, 0.0) for finished in result.rounds),
            )
            for stage in self.stages
        ]

    def save(self, path: str | Path) -> None:
        """Write the plan to a file, to compare a run with it later.

        Raises:
            StorageError: if it cannot be written.
        """
        write_segment(Path(path), self, what="the plan", remedy="Choose a folder that can be written to.")

    @classmethod
    def load(cls, path: str | Path) -> "RunPlan":
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: if there is no such file.
            StorageError: if it is damaged, or no plan.
        """
        return read_segment(Path(path), cls, what="plan of a run", remedy="Make it again with artaug.plan_run.")


def _counts(owner: str, name: str, counts: object, *, least: int) -> Sequence[int]:
    """Whole numbers of at least ``least``, at least one of them."""
    if not isinstance(counts, Sequence) or isinstance(counts, str) or not counts:
        raise argument_error(owner, name, counts, expected=f"a list of whole numbers of at least {least}")
    for count in counts:
        check_count(owner, name, count, least=least)
    return counts


def _check_amount(owner: str, name: str, number: object) -> None:
    if isinstance(number, bool) or not isinstance(number, int | float) or not 0 <= number < math.inf:
        raise argument_error(owner, name, number, expected="a number from 0 up")


def _span(interval: Interval | None) -> str:
    return "-" if interval is None else f"{duration(interval.low)} to {duration(interval.high)}"


def _size(count: float) -> str:
    """Bytes in a unit that fits them."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB"


def advise(
    plan_stages: tuple[StagePlan, ...],
    *,
    prompts: int,
    chunk: int,
    candidates: int,
    concurrency: int | None,
    steps_s: float,
    validations_s: float,
) -> list[str]:
    """What would help, where it follows from the numbers.

    Args:
        plan_stages: of the plan.
        prompts: of the run.
        chunk: prompts in a chunk of the run.
        candidates: of each prompt.
        concurrency: requests that the critic sends at a time, if it says so.
        steps_s: seconds of all training steps.
        validations_s: seconds of all validations.
    """
    seconds = {stage.stage: stage.seconds for stage in plan_stages}
    total = max(sum(seconds.values()), 1e-12)
    moves = sum(stage.moving_seconds for stage in plan_stages)
    bottleneck = max(seconds, key=lambda name: seconds[name])
    advice = []
    if moves > _MANY_MOVES * total and chunk < prompts:
        # The moves go with the number of chunks: n of c chunks take m n / c beside a rest of t - m.
        chunks, rest = math.ceil(prompts / chunk), total - moves
        fewer = max(math.floor(chunks * _FEW_MOVES * rest / ((1 - _FEW_MOVES) * moves)), 1)
        larger, share = math.ceil(prompts / fewer), moves * fewer / chunks
        advice.append(
            f"Moving models takes {moves / total:.0%} of the time; with chunk_size={larger} in place of {chunk} it would be "
            f"{share / (rest + share):.0%}."
        )
    if bottleneck == "critique" and concurrency is not None and concurrency > chunk * candidates:
        advice.append(
            f"The critic may send {concurrency} requests at a time, and a chunk has {chunk * candidates} pictures: give it a "
            f"chunk_size of at least {-(-concurrency // candidates)}."
        )
    if candidates > 1 and bottleneck in {"draw", "critique", "redraw"}:
        each = sum(seconds.get(name, 0.0) for name in ("draw", "critique", "redraw")) / candidates
        advice.append(f"Each candidate of BestOf({candidates}) takes {duration(each)}.")
    if bottleneck == "train" and validations_s > steps_s:
        advice.append(
            f"Validations take {duration(validations_s)}, the steps {duration(steps_s)}: validate less often, or at fewer "
            "strengths or prompts."
        )
    return advice
