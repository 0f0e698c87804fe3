"""What a run ends with: its rounds, what became of every prompt, and the LoRA of those that helped."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from typing import Any

from artaug._internal.text import duration, table_html
from artaug.errors import NothingToLearnError
from artaug.evaluation.comparison import ScoreRow
from artaug.lora.lora import LoRA
from artaug.pairs import Attempt, Skipped
from artaug.run.funnel import Funnel
from artaug.training import TrainingResult

_HEADINGS = ("round", "pairs", "steps", "final loss", "held-out gain", "time")


@dataclass(frozen=True, kw_only=True)
class Round:
    """One pass: pairs made, a LoRA trained on them, combined with the rounds before."""

    number: int
    """Counted from 1."""
    attempts: tuple[Attempt, ...]
    """How every prompt ended."""
    training: TrainingResult
    """What was learned in this round alone."""
    lora: LoRA
    """All rounds up to this one, combined."""
    seconds: Mapping[str, float]
    """Wall-clock time by stage."""
    gain: ScoreRow | None
    """Held-out gain over the round before, if a stop rule measured it."""
    accepted: bool
    """False for a last round that did not help, which is left out of the result."""

    def _repr_html_(self) -> str:
        """Numbers and funnel for notebooks."""
        return table_html(_HEADINGS, [_line(self)]) + Funnel.of(self.attempts)._repr_html_()


@dataclass(frozen=True, kw_only=True)
class Enhancement:
    """What a run ends with."""

    rounds: tuple[Round, ...]
    """Every round that trained; the last one possibly not accepted."""
    stop_reason: str
    """Why the loop ended, in words."""

    @property
    def lora(self) -> LoRA:
        """All accepted rounds in one LoRA: the result.

        Raises:
            NothingToLearnError: if no round was accepted; the LoRAs that did not help are in ``rounds``.
        """
        accepted = [one for one in self.rounds if one.accepted]
        if not accepted:
            raise NothingToLearnError(f"no round helped, so there is no result: {self.stop_reason}.")
        return accepted[-1].lora

    def summary(self) -> dict[str, Any]:
        """What happened, in plain types that JSON takes: prompts by how they ended, and every round with its times."""
        every = [attempt for one in self.rounds for attempt in one.attempts]
        return {
            "prompts": _endings(every),
            "rounds": [
                {
                    "round": one.number,
                    "prompts": _endings(one.attempts),
                    "pairs": one.training.pairs,
                    "steps": one.training.steps,
                    "final_loss": one.training.losses[-1],
                    "seconds": dict(one.seconds),
                    "held_out_gain": None if one.gain is None else asdict(one.gain),
                    "accepted": one.accepted,
                }
                for one in self.rounds
            ],
            "stop_reason": self.stop_reason,
        }

    def _repr_html_(self) -> str:
        """A line a round, for notebooks."""
        return table_html(_HEADINGS, map(_line, self.rounds)) + f"<small>{escape(self.stop_reason)}</small>"


def _line(one: Round) -> tuple[str, ...]:
    """A round in a few words, as `_HEADINGS` calls them."""
    losses, gain = one.training.losses, one.gain
    return (
        str(one.number) + " (left out)" * (not one.accepted),
        f"{one.training.pairs:,} of {len(one.attempts):,}",
        f"{one.training.steps:,}",
        f"{losses[-1]:.3g}" if losses else "none",
        f"{gain.scorer} {gain.delta:+.3g} [{gain.ci_low:+.3g}, {gain.ci_high:+.3g}]" if gain else "not measured",
        duration(sum(one.seconds.values())),
    )


def _endings(attempts: Sequence[Attempt]) -> dict[str, Any]:
    """Count how prompts ended; total = kept + dropped + skipped."""
    counts = Counter(type(one).__name__.lower() for one in attempts)
    reasons = Counter(one.reason for one in attempts if isinstance(one, Skipped))
    return {
        "total": len(attempts),
        "kept": counts["kept"],
        "dropped": counts["dropped"],
        "skipped": counts["skipped"],
        "skipped_because": dict(reasons.most_common()),
    }
