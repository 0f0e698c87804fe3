"""The axes of the ablation: which cells there are. A cell is one training, or one way to draw without any."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from benchmarks._ablation_arms import ARMS, DEFAULT, ON_THE_FRONT, PLAIN, steps_of_equal_passes

AXES = ("front", "rounds", "cost", "control", "noise", "yield", "pairs")
"""In the order they are measured."""
KINDS = ("RegionalAttention", "OutputMix")
"""The guides that the pairs are redrawn by."""
CONTROLS = ("nothing", "words added", "critic's words added", "regional redraw")
"""Ways to draw that need no training."""
TUNED_WITH = 1000
"""The seed of ``--tune``: pairs and prompts of which no result has any."""
LEARNING_RATES = (1e-3, 2e-3, 4e-3)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The size of the ablation; one budget for all arms."""

    kinds: tuple[str, ...] = KINDS
    strengths: tuple[float, ...] = (0.5, 1.0, 1.5, 2.0, 3.0, 5.0)
    """Of the LoRA: every training of the axes front and rounds is drawn with at all of them. A new one is drawn with the LoRAs
    that were kept, without training again."""
    usual: int = 32
    """Pairs, unless an axis says otherwise."""
    pairs: tuple[int, ...] = (8, 128, 512)
    """Other numbers of pairs."""
    few: int = 8
    """Pairs on the axis of the yield."""
    rounds: int = 3
    yields: tuple[float, ...] = (0.01, 0.05, 0.25, 1.0)
    noises: tuple[float, ...] = (0.0, 0.1, 0.25, 0.5)
    shares: tuple[float, ...] = (0.25, 0.5)
    """Of the passes, on the axis of the cost."""
    steps: int = 64
    """Of the arm whose passes are the budget."""
    batch_size: int = 8
    rank: int = 8
    sampling_steps: int = 6
    prompts: int = 16
    """Held-out prompts of a seed's evaluation: two pictures of each, and one with words that leave nothing to improve."""

    @property
    def of_rows(self) -> dict[str, str]:
        """What a row depends on besides its cell: rows of one journal have the same."""
        names = ("batch_size", "rank", "sampling_steps", "prompts")
        return {name: repr(getattr(self, name)) for name in names}


QUICK = Settings(
    kinds=("OutputMix",),
    strengths=(1.0, 3.0),
    usual=2,
    pairs=(3,),
    few=2,
    rounds=2,
    yields=(0.5, 1.0),
    noises=(0.0, 0.5),
    shares=(0.5,),
    steps=2,
    batch_size=2,
    sampling_steps=1,
    prompts=2,
)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One row to measure."""

    axis: str
    arm: str
    seed: int
    kind: str = KINDS[0]
    pairs: int = 0
    steps: int = 0
    """Of each training."""
    rounds: int = 1
    share: float | None = None
    """The share of the candidates that is learned from, the best ones; None: those that the usual filter keeps."""
    noise: float = 0.0
    learning_rate: float | None = None
    """None: that of the arm."""

    @property
    def name(self) -> str:
        """A name for its files."""
        parts = {
            "": "-".join((self.axis, self.kind, "".join(c if c.isalnum() or c == "." else "_" for c in self.arm))),
            "pairs": self.pairs,
            "steps": self.steps,
            "seed": self.seed,
            "round": self.rounds if self.axis == "rounds" else None,
            "share": self.share,
            "noise": self.noise or None,
            "rate": self.learning_rate,
        }
        return "-".join(f"{name}{part}" for name, part in parts.items() if part is not None)


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Which part of the ablation to measure; the rest can be measured later, or by another process."""

    axes: Sequence[str] = AXES
    kinds: Sequence[str] | None = None
    """None: all of the settings. Other axes than front, rounds and cost have the first of `KINDS`."""
    budgets: Sequence[str] = ("passes", "steps")
    """What is equal for all arms on the front."""
    arms: Sequence[str] | None = None
    """None: all of them, and those on the front for the axes rounds and cost."""


def cells(settings: Settings, seed: int, selection: Selection) -> Iterator[Cell]:
    """The cells of one seed that were selected, the axes in their order."""
    axes = {
        "front": _front,
        "rounds": _rounds,
        "cost": _cost,
        "control": _controls,
        "noise": _noises,
        "yield": _yields,
        "pairs": _pairs,
    }
    for axis in selection.axes:
        for cell in axes[axis](settings, seed, selection):
            if selection.arms is None or axis == "control" or cell.arm in selection.arms:
                yield cell


def _front(settings: Settings, seed: int, selection: Selection) -> Iterator[Cell]:
    """Every arm in one round; where both budgets give an arm the same steps, one training answers for both."""
    for kind in selection.kinds or settings.kinds:
        for name, arm in ARMS.items():
            by_budget = {"passes": steps_of_equal_passes(arm, settings.steps), "steps": settings.steps}
            for steps in dict.fromkeys(by_budget[budget] for budget in selection.budgets):
                yield Cell(axis="front", arm=name, seed=seed, kind=kind, pairs=settings.usual, steps=steps)


def _rounds(settings: Settings, seed: int, selection: Selection) -> Iterator[Cell]:
    """Several rounds at equal passes, and the default arm with the pairs and steps of all of them in one."""
    for kind in selection.kinds or settings.kinds:
        for name in selection.arms or ON_THE_FRONT:
            steps = steps_of_equal_passes(ARMS[name], settings.steps)
            for number in range(1, settings.rounds + 1):
                yield Cell(
                    axis="rounds", arm=name, seed=seed, kind=kind, pairs=settings.usual, steps=steps, rounds=number
                )
        pairs, steps = settings.usual * settings.rounds, settings.steps * settings.rounds
        yield Cell(axis="one long round", arm=DEFAULT, seed=seed, kind=kind, pairs=pairs, steps=steps)


def _cost(settings: Settings, seed: int, selection: Selection) -> Iterator[Cell]:
    """Shorter trainings, for the passes that a gain takes; the whole one is on the front."""
    for kind in selection.kinds or settings.kinds:
        for name in selection.arms or ON_THE_FRONT:
            for share in settings.shares:
                steps = max(2, round(share * steps_of_equal_passes(ARMS[name], settings.steps)))
                yield Cell(axis="cost", arm=name, seed=seed, kind=kind, pairs=settings.usual, steps=steps)


def _controls(_: Settings, seed: int, __: Selection) -> Iterator[Cell]:
    yield from (Cell(axis="control", arm=name, seed=seed) for name in CONTROLS)


def _noises(settings: Settings, seed: int, _: Selection) -> Iterator[Cell]:
    for noise in settings.noises:
        for share in (None, 1.0):
            yield Cell(
                axis="noise",
                arm=DEFAULT,
                seed=seed,
                pairs=settings.usual,
                steps=settings.steps,
                noise=noise,
                share=share,
            )


def _yields(settings: Settings, seed: int, _: Selection) -> Iterator[Cell]:
    for share in sorted(settings.yields, reverse=True):
        for name in (DEFAULT, PLAIN):
            yield Cell(axis="yield", arm=name, seed=seed, pairs=settings.few, steps=settings.steps, share=share)


def _pairs(settings: Settings, seed: int, _: Selection) -> Iterator[Cell]:
    for count in sorted({settings.usual, *settings.pairs}):
        for name in (DEFAULT, PLAIN):
            yield Cell(axis="pairs", arm=name, seed=seed, pairs=count, steps=settings.steps)


def trials(settings: Settings, selection: Selection) -> Iterator[Cell]:
    """The learning rates to choose from, the same for all arms, at equal passes."""
    for kind in selection.kinds or settings.kinds:
        for name in selection.arms or ARMS:
            for rate in LEARNING_RATES:
                yield Cell(
                    axis="tuning",
                    arm=name,
                    seed=TUNED_WITH,
                    kind=kind,
                    pairs=settings.usual,
                    steps=steps_of_equal_passes(ARMS[name], settings.steps),
                    learning_rate=rate,
                )
