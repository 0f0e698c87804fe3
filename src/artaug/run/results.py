"""The result of a run: its rounds, how every prompt ended, and the LoRA of the rounds that helped."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain, islice
from typing import Any

from PIL.Image import Image

from artaug._internal.annotations import checked
from artaug._internal.prompts import check_prompts
from artaug._internal.text import duration, short_html, shorten, table_html, table_text
from artaug.errors import NothingToLearnError
from artaug.evaluation.comparison import Comparison, ScoreRow
from artaug.images.html import contact_sheet
from artaug.lora.lora import LoRA
from artaug.pairs import Attempt, Kept, Skipped
from artaug.plan import Plan
from artaug.run.funnel import Funnel
from artaug.synthesis import Synthesizer, draw, picture_seeds
from artaug.training import TrainingResult

_HEADINGS = ("round", "pairs", "steps", "final loss", "held-out gain", "time")
_MAX_ROUNDS = 20
_STRIP_PX = 192
_SHOWN_PAIRS = 3
_LONGEST_STOP_REASON = 120


@checked
@dataclass(frozen=True, kw_only=True)
class Round:
    """One round: pairs made, a LoRA trained on them, combined with the rounds before."""

    number: int
    """Counted from 1."""
    attempts: Sequence[Attempt]
    """How every prompt ended; read from the run's store when they are looked at, if there is one."""
    training: TrainingResult
    """The training of this round alone."""
    lora: LoRA
    """All rounds up to this one, combined."""
    seconds: Mapping[str, float]
    """Wall-clock seconds by stage, see `StageEvent`."""
    gain: ScoreRow | None
    """Held-out gain over the round before, if a stop rule measured it."""
    accepted: bool
    """False for a last round that did not help, which is left out of the result."""
    comparison: Comparison | None = field(default=None, repr=False)
    """All of what ``gain`` is a row of: held-out pictures of the round before, and of this one. It has pictures if the run has
    a store."""

    def __repr__(self) -> str:
        """Its numbers on one line."""
        return (
            f"Round(number={self.number}, kept {self.training.pairs} of {len(self.attempts)} prompts, "
            f"{self.training.steps} steps, accepted={self.accepted})"
        )

    def _repr_html_(self) -> str:
        """Numbers, the curves of the training, funnel and a few kept pairs, for notebooks."""
        return table_html(_HEADINGS, [_table_row(self)]) + self.training._repr_html_() + _attempts_html(self.attempts)


@checked
@dataclass(frozen=True, kw_only=True)
class Enhancement:
    """The result of `enhance`."""

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
        accepted = [finished for finished in self.rounds if finished.accepted]
        if not accepted:
            raise NothingToLearnError(f"no round helped, so there is no result: {self.stop_reason}.")
        return accepted[-1].lora

    def summary(self) -> dict[str, Any]:
        """The run in plain types that JSON takes: prompts by how they ended, and every round with its times."""
        return {
            "prompts": _count_attempts(chain.from_iterable(finished.attempts for finished in self.rounds)),
            "rounds": [
                {
                    "round": finished.number,
                    "prompts": _count_attempts(finished.attempts),
                    "pairs": finished.training.pairs,
                    "steps": finished.training.steps,
                    "final_loss": finished.training.losses[-1],
                    "seconds": dict(finished.seconds),
                    "held_out_gain": None if finished.gain is None else asdict(finished.gain),
                    "accepted": finished.accepted,
                }
                for finished in self.rounds
            ],
            "stop_reason": self.stop_reason,
        }

    def __repr__(self) -> str:
        """Its numbers on one line."""
        kept = sum(finished.training.pairs for finished in self.rounds)
        prompts = sum(len(finished.attempts) for finished in self.rounds)
        accepted = sum(finished.accepted for finished in self.rounds)
        return (
            f"Enhancement({len(self.rounds)} rounds, {accepted} accepted, kept {kept:,} of {prompts:,} prompts, "
            f"stop_reason={shorten(self.stop_reason, _LONGEST_STOP_REASON)!r})"
        )

    def strip(
        self, synthesizer: Synthesizer, prompts: Sequence[str], *, seed: int = 0, scale: int | None = None
    ) -> Image:
        """Draw prompts by the base and by the LoRA of every round, with the same seeds: a row for each prompt.

        Args:
            synthesizer: the base, as it was passed to `enhance`.
            prompts: what to draw, such as some that the run did not learn from.
            seed: each prompt gets a seed of its own from it.
            scale: factor of the enlargement; None for 192 pixels a picture or what comes near.

        Returns:
            One picture: the base in the first column, then the rounds.

        Raises:
            PromptError: if there are no prompts, or one is blank.
            LoRAMismatchError: if the synthesizer is another model than that of the run.
        """
        check_prompts(prompts)
        seeds = picture_seeds(seed, len(prompts))
        arms = {"base": synthesizer}
        for finished in self.rounds:
            name = f"round {finished.number}" + " (left out)" * (not finished.accepted)
            arms[name] = synthesizer.with_lora(finished.lora)
        plans = [Plan(prompt) for prompt in prompts]
        columns = [draw(arm, plans, seeds=seeds) for arm in arms.values()]
        pictures = [picture for row in zip(*columns, strict=True) for picture in row]
        scale = scale or max(_STRIP_PX // max(pictures[0].size), 1)
        return contact_sheet(pictures, columns=len(arms), labels=list(arms) * len(prompts), scale=scale)

    def __str__(self) -> str:
        """A short table: the last rounds, and why the run ended."""
        left_out = len(self.rounds) - _MAX_ROUNDS
        before = f"after {left_out} other rounds\n" if left_out > 0 else ""
        rows = table_text(_HEADINGS, map(_table_row, self.rounds[-_MAX_ROUNDS:]))
        return f"{before}{rows}\nended: {shorten(self.stop_reason, _LONGEST_STOP_REASON)}"

    def _repr_html_(self) -> str:
        """The last rounds, a row each; of the last one the funnel and a few kept pairs: for notebooks."""
        left_out = len(self.rounds) - _MAX_ROUNDS
        rows = table_html(_HEADINGS, map(_table_row, self.rounds[-_MAX_ROUNDS:]))
        before = f"<p>after {left_out} other rounds</p>" if left_out > 0 else ""
        last = f"<p>Round {self.rounds[-1].number}</p>{_attempts_html(self.rounds[-1].attempts)}" if self.rounds else ""
        return f"{before}{rows}<p><small>{short_html(self.stop_reason)}</small></p>{last}"


def _table_row(finished: Round) -> tuple[str, ...]:
    """The cells of a round, under `_HEADINGS`."""
    losses, gain = finished.training.losses, finished.gain
    return (
        str(finished.number) + " (left out)" * (not finished.accepted),
        f"{finished.training.pairs:,} of {len(finished.attempts):,}",
        f"{finished.training.steps:,}",
        f"{losses[-1]:.3g}" if losses else "none",
        f"{gain.scorer} {gain.delta:+.3g} [{gain.ci_low:+.3g}, {gain.ci_high:+.3g}]" if gain else "not measured",
        duration(sum(finished.seconds.values())),
    )


def _attempts_html(attempts: Sequence[Attempt]) -> str:
    """The funnel of a round and its first kept pairs. Pictures are small, and the page does not grow with the round."""
    kept = islice((attempt for attempt in attempts if isinstance(attempt, Kept)), _SHOWN_PAIRS)
    return Funnel.of(attempts)._repr_html_() + "".join(attempt._repr_html_() for attempt in kept)


def _count_attempts(attempts: Iterable[Attempt]) -> dict[str, Any]:
    """Count how prompts ended; total = kept + dropped + skipped."""
    counts: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    for attempt in attempts:
        counts[type(attempt).__name__.lower()] += 1
        if isinstance(attempt, Skipped):
            reasons[attempt.reason] += 1
    return {
        "total": counts.total(),
        "kept": counts["kept"],
        "dropped": counts["dropped"],
        "skipped": counts["skipped"],
        "skipped_because": dict(reasons.most_common()),
    }


def end_of_rounds(finished: Sequence[Round], *, rounds: int) -> str | None:
    """Why a run ends after these rounds, in words; None if there is another one, of at most ``rounds``."""
    if finished and not finished[-1].accepted:
        return f"round {finished[-1].number} did not help on held-out prompts"
    return rounds_ran(rounds) if len(finished) >= rounds else None


def rounds_ran(rounds: int) -> str:
    """Why a run ends whose rounds have all helped."""
    return f"all {rounds} rounds ran" if rounds > 1 else "its one round ran"


def no_pairs_reason(number: int, attempts: Iterable[Attempt]) -> str | None:
    """How the prompts of a round without a kept pair ended, with the most frequent reason; None if one was kept."""
    reasons: Counter[str] = Counter()
    skipped = 0
    for attempt in attempts:
        if isinstance(attempt, Kept):
            return None
        skipped += isinstance(attempt, Skipped)
        reasons[attempt.reason if isinstance(attempt, Skipped) else attempt.verdict.reason] += 1
    total = reasons.total()
    often = f"; most often because {reasons.most_common(1)[0][0]!r}" if reasons else ""
    return f"round {number} kept none of {total} prompts: {total - skipped} dropped, {skipped} skipped{often}"
