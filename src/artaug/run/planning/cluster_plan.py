"""What a run would take on clusters of several sizes, simulated."""

from dataclasses import dataclass

from artaug._internal.text import duration, table_html
from artaug._internal.values import value
from artaug.run.planning.simulation import LoopCosts, LoopPlaces, LoopTime, simulate, simulate_held_out

_HEADINGS = (
    "GPUs",
    "critics",
    "time",
    "load",
    "loop",
    "train",
    "combine",
    "measure",
    "GPU hours",
    "cost",
    "drawing",
    "bottleneck",
)
_PHASES = ("load", "loop", "train", "combine", "measure")


@value
class ChunkPlan:
    """How the prompts of a run go through the loop together, which decides what of it a cluster does at the same time."""

    prompts: int
    """Of a chunk."""
    batch: int
    """Pictures in a call of the synthesizer, at most."""
    critics: int
    """Chunks that the critic answers about at the same time; 0 if it computes in the process that drives the run."""
    planning_seconds: float
    """That the planner takes for one picture."""
    filing_seconds: float
    """That the process that drives the run takes to write what became of a chunk, without its pictures."""
    judged_together: bool
    """Whether the filter judges all pairs of a round at its end."""
    scoring_seconds: float
    """For all held-out pictures of one arm of the stop rule, in the process that drives the run; the rest of measuring is
    drawing."""


@value
class ClusterSize:
    """What a run would take on a cluster of one size, simulated, not run."""

    gpus: int
    """That draw; the training is on one of them."""
    critics: int
    """Chunks that the critic answers about at the same time; 0 if it computes in the process that drives the run."""
    seconds_by_phase: dict[str, float]
    """Wall-clock time of all rounds: ``load``, ``loop`` (draw, critique, redraw, judge), ``train``, ``combine``, ``measure``."""
    busy: dict[str, float]
    """The seconds of the loop in which those are busy that ``draw``, the share of each GPU, and ``critique``, that of each
    critic, and the process that drives the run, by what it does: ``plan``, ``judge``, ``file``, and ``critique`` without critics."""
    cost: float | None
    """Of the GPUs that draw, over the whole time; None without a price."""

    @property
    def seconds(self) -> float:
        """Of everything."""
        return sum(self.seconds_by_phase.values())

    @property
    def gpu_hours(self) -> float:
        """Of the GPUs that draw, over the whole time, also while one of them trains and the others wait."""
        return self.gpus * self.seconds / 3600

    @property
    def drawing(self) -> float:
        """The share of that time in which they draw for the loop."""
        return self.busy["draw"] / max(self.seconds, 1e-12)

    @property
    def bottleneck(self) -> str:
        """Where most of the time goes: a phase, or in the loop ``draw``, ``critique`` or ``driver``, whichever is busiest there."""
        phase = max(self.seconds_by_phase, key=lambda name: self.seconds_by_phase[name])
        if phase != "loop":
            return phase
        here = [name for name in self.busy if name != "draw" and not (name == "critique" and self.critics)]
        places = {"draw": self.busy["draw"], "driver": sum(self.busy[name] for name in here)}
        if self.critics:
            places["critique"] = self.busy["critique"]
        place = max(places, key=lambda name: places[name])
        return max(here, key=lambda name: self.busy[name]) if place == "driver" else place


@value
class ClusterPlan:
    """What a run would take on clusters of several sizes; made by `RunPlan.on`. ``print`` it."""

    prompts: int
    rounds: int
    sizes: tuple[ClusterSize, ...]

    @property
    def rows(self) -> list[tuple[str, ...]]:
        """The table's cells, a row a size."""
        return [
            (
                f"{size.gpus:,}",
                f"{size.critics}" if size.critics else "-",
                duration(size.seconds),
                *(duration(size.seconds_by_phase[phase]) for phase in _PHASES),
                f"{size.gpu_hours:,.2f}",
                "-" if size.cost is None else f"{size.cost:,.2f}",
                f"{size.drawing:.0%}",
                size.bottleneck,
            )
            for size in self.sizes
        ]

    def table(self) -> str:
        """The sizes as a table of text."""
        lines = [_HEADINGS, *self.rows]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join(
            "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
        )

    def __str__(self) -> str:
        """The table, under what it is."""
        return f"{self._headline()}\n\n{self.table()}"

    def __repr__(self) -> str:
        """Its times on one line."""
        times = ", ".join(f"{size.gpus}: {duration(size.seconds)}" for size in self.sizes)
        return f"ClusterPlan({self.prompts:,} prompts, {self.rounds} rounds, simulated; by GPUs {times})"

    def _repr_html_(self) -> str:
        """The table, for notebooks."""
        return f"<p>{self._headline()}</p>{table_html(_HEADINGS, self.rows)}"

    def _headline(self) -> str:
        return (
            f"Simulated, not run: {self.rounds} round{'s' * (self.rounds != 1)} of {self.prompts:,} prompts on a cluster, from "
            "the seconds of one worker"
        )


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Held-out pictures of one LoRA, or of the base."""

    batches: int
    draw_s: float
    """Of all of them, as below."""
    score_s: float

    def seconds_on(self, gpus: int) -> float:
        """Drawn by so many workers."""
        if not self.batches:
            return 0.0
        draw_s, score_s = self.draw_s / self.batches, self.score_s / self.batches
        return simulate_held_out(batches=self.batches, draw_s=draw_s, score_s=score_s, workers=gpus)


@dataclass(frozen=True, kw_only=True)
class ClusterRun:
    """A run to simulate: the loop of each round, and what one worker or the driving process does between them."""

    loops: tuple[LoopCosts, ...]
    """By round."""
    between: dict[str, float]
    """Seconds of all rounds, by phase: ``train`` and ``combine``."""
    arms: tuple[HeldOut, ...]
    """Of held-out pictures, of all rounds."""
    first_s: float
    """What the first calls of a worker take longer than the others."""

    def on(self, gpus: int, *, critics: int, load_s: float, gpu_hour_price: float | None) -> ClusterSize:
        """The run on one size. Rounds of the same costs take the same time, and are simulated once."""
        places = LoopPlaces(workers=gpus, critics=critics)
        times: dict[LoopCosts, LoopTime] = {costs: simulate(costs, places) for costs in set(self.loops)}
        busy = {
            what: sum(times[costs].busy[what] for costs in self.loops)
            / {"draw": gpus, "critique": max(critics, 1)}.get(what, 1)
            for what in times[self.loops[0]].busy
        }
        loop_s = sum(times[costs].seconds for costs in self.loops)
        measure_s = sum(arm.seconds_on(gpus) for arm in self.arms)
        seconds = {"load": load_s + self.first_s, "loop": loop_s, **self.between, "measure": measure_s}
        cost = None if gpu_hour_price is None else gpus * sum(seconds.values()) / 3600 * gpu_hour_price
        return ClusterSize(gpus=gpus, critics=critics, seconds_by_phase=seconds, busy=busy, cost=cost)
