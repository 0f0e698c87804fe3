"""Ways of doing one thing timed in turn, and what a choice among them costs over the best of them: its regret."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median, quantiles
from typing import TypeAlias

Seconds: TypeAlias = Mapping[str, Sequence[float]]
"""The seconds of each way, one number a round."""

TOLERANCE = 1.05
"""A choice is good if it takes at most so much more than the best."""


def interleaved(ways: Mapping[str, Callable[[], float]], *, rounds: int) -> dict[str, list[float]]:
    """Seconds of every way in every round. A round takes each once, each time beginning with another one.

    Args:
        ways: what to call by name; each returns its seconds.
        rounds: at least 1.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    names = list(ways)
    for number in range(rounds):
        for name in (*names[number % len(names) :], *names[: number % len(names)]):
            seconds[name].append(ways[name]())
    return seconds


def ratios(seconds: Seconds, name: str, over: str) -> list[float]:
    """The time of one way over another's, within each round."""
    return [own / other for own, other in zip(seconds[name], seconds[over], strict=True)]


def spread(name: str, numbers: Sequence[float]) -> dict[str, float]:
    """The quartiles, as columns; of a single number, itself."""
    low, _, high = quantiles(numbers, n=4, method="inclusive") if len(numbers) > 1 else [numbers[0]] * 3
    return {f"{name}_low": low, f"{name}_high": high}


def timed_columns(seconds: Seconds, name: str, *, over: str = "plain") -> dict[str, float]:
    """Columns of one way: the median of its seconds, and of its time over another's within rounds, with quartiles."""
    own, relative = seconds[name], ratios(seconds, name, over)
    return {
        "rounds": len(own),
        "seconds": median(own),
        **spread("seconds", own),
        f"ratio_to_{over}": median(relative),
        **spread("ratio", relative),
    }


@dataclass(frozen=True)
class Regret:
    """What a choice cost, over the best of what it could have chosen."""

    best: str
    """The way with the least time, by the median over rounds of its time over the chooser's."""
    ratio: float
    """The chooser's time over the best way's: the median over rounds. Below 1 it is faster than all, or noise."""
    ratio_low: float
    ratio_high: float
    """Quartiles."""
    choice_ratio: float | None
    """The time of the way that it took, measured by itself, over the best way's: exactly 1 if it took the best, without the
    noise of measuring the same twice. None if it took none of them."""

    @property
    def columns(self) -> dict[str, object]:
        """Columns of the chooser's row."""
        return {
            "best": self.best,
            "regret": self.ratio,
            "regret_low": self.ratio_low,
            "regret_high": self.ratio_high,
            "choice_regret": self.choice_ratio,
        }


def regret(seconds: Seconds, chooser: str, *, among: Iterable[str], choice: str | None = None) -> Regret:
    """The regret of ``chooser``, which does the same as one of the others.

    Args:
        seconds: of all ways, measured in the same rounds.
        chooser: the way that chooses.
        among: the ways that it can choose from, at least one of which was measured.
        choice: the one that it chose, if known.
    """
    candidates = [name for name in among if name in seconds]
    best = min(candidates, key=lambda name: median(ratios(seconds, name, chooser)))
    over_best = ratios(seconds, chooser, best)
    quartiles = spread("ratio", over_best)
    return Regret(
        best=best,
        ratio=median(over_best),
        choice_ratio=None if choice is None else median(ratios(seconds, choice, best)),
        **quartiles,
    )


def summary(regrets: Sequence[float]) -> dict[str, float]:
    """The largest and the median regret of many points, and the share of points within `TOLERANCE`."""
    return {
        "points": len(regrets),
        "max": max(regrets),
        "median": median(regrets),
        "within_5_percent": sum(number <= TOLERANCE for number in regrets) / len(regrets),
    }
