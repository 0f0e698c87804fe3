"""What `benchmarks.online` measures: one cell is one arm, after some rounds, on a base of some spread."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from benchmarks._online_arms import DENSE, IN_ROUNDS, LOOP, NO_CHOICE, ON_THE_CURVE, SELECTIONS

BASE = "base"
"""The cell that measures a base itself."""
AXES = ("spread", "draws", "rounds", "boxes")
"""In the order they are measured."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The size of the benchmark; one budget for all arms."""

    spreads: tuple[float, ...] = (0.0, 0.25, 0.5)
    """Chances that a draw has an adjective, each of four."""
    draws: tuple[int, ...] = (2, 4, 8)
    usual_draws: int = 4
    rounds: int = 2
    spreads_in_rounds: tuple[float, ...] = (0.0, 0.5)
    pictures: int = 128
    """Drawn in each round, by every arm."""
    passes: int = 2048
    """Of the denoiser, for the training of each round: backward passes count as two."""
    strengths: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0)
    """Of the LoRA."""
    batch_size: int = 8
    rank: int = 8
    sampling_steps: int = 6
    prompts: int = 16
    """Held-out prompts of a seed's evaluation."""


QUICK = Settings(
    spreads=(0.0, 0.5),
    draws=(2, 4),
    usual_draws=2,
    spreads_in_rounds=(0.5,),
    pictures=8,
    passes=32,
    strengths=(1.0,),
    batch_size=2,
    sampling_steps=1,
    prompts=2,
)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One row to measure."""

    arm: str
    """`BASE` for the base itself."""
    seed: int
    spread: float = 0.0
    draws: int = 1
    """Of each prompt, without those that a critic has redrawn."""
    rounds: int = 1

    @property
    def name(self) -> str:
        """A name for its files."""
        arm = "".join(c if c.isalnum() else "_" for c in self.arm)
        return f"{arm}-spread{self.spread:g}-draws{self.draws}-rounds{self.rounds}-seed{self.seed}"


@dataclass(frozen=True, kw_only=True)
class Selected:
    """Which part to measure; the rest can be measured later, or by another process."""

    axes: Sequence[str] = AXES
    spreads: Sequence[float] | None = None
    """None: all of the settings."""
    arms: Sequence[str] | None = None
    """None: all."""


def cells(settings: Settings, seed: int, selected: Selected) -> Iterator[Cell]:
    """The cells of one seed that were selected, the axes in their order; axes share cells."""
    axes = {"spread": _spreads, "draws": _draws, "rounds": _rounds, "boxes": _boxes}
    for axis in selected.axes:
        for cell in axes[axis](settings, seed):
            wanted_arm = selected.arms is None or cell.arm == BASE or cell.arm in selected.arms
            if wanted_arm and (selected.spreads is None or cell.spread in selected.spreads):
                yield cell


def _spreads(settings: Settings, seed: int) -> Iterator[Cell]:
    """Every arm, on every base."""
    for spread in settings.spreads:
        yield Cell(arm=BASE, seed=seed, spread=spread, draws=max(settings.draws))
        for name in (LOOP, *SELECTIONS, NO_CHOICE):
            yield _cell(settings, name, seed, spread)


def _draws(settings: Settings, seed: int) -> Iterator[Cell]:
    """More and fewer draws of fewer and more prompts."""
    for spread in settings.spreads:
        for count in settings.draws:
            for name in ON_THE_CURVE:
                yield Cell(arm=name, seed=seed, spread=spread, draws=count)


def _rounds(settings: Settings, seed: int) -> Iterator[Cell]:
    for spread in settings.spreads_in_rounds:
        for name in IN_ROUNDS:
            for number in range(1, settings.rounds + 1):
                yield _cell(settings, name, seed, spread, rounds=number)


def _boxes(settings: Settings, seed: int) -> Iterator[Cell]:
    yield from (_cell(settings, name, seed, settings.spreads[0]) for name in DENSE)


def _cell(settings: Settings, name: str, seed: int, spread: float, *, rounds: int = 1) -> Cell:
    draws = settings.usual_draws if name in SELECTIONS else 1
    return Cell(arm=name, seed=seed, spread=spread, draws=draws, rounds=rounds)
