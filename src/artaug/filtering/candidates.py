"""Several tries at one prompt, of which the best goes on to be judged."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from artaug.errors import ContractError, InvalidValueError
from artaug.filtering.deltas import score_deltas
from artaug.pairs import SKIPPING_STAGES, ImagePair, Skipped, Verdict
from artaug.scoring import Scorer


@final
@dataclass(frozen=True)
class BestOf:
    """Draws every prompt ``count`` times, each with a seed of its own, and lets the pair that gained most stand for it.

    Handed to `improve` or `enhance` as ``candidates``. Each candidate is a whole pair: drawn, criticised and redrawn
    with one seed, so that before and after still correspond. The prompt ends as one attempt all the same: as its best
    candidate's, or as skipped if none became a pair. More candidates never gain less, since a larger ``count`` tries
    the same seeds and more; one candidate is what `improve` does without.

    Raises:
        InvalidValueError: if ``count`` is below 1.

    >>> import artaug as aa
    >>> from artaug.scorers import Photometric
    >>> aa.BestOf(4, by=Photometric()).count
    4
    """

    count: int
    """Candidates a prompt; drawing and criticising cost this many times as much."""
    by: Scorer
    """Its gain decides which is best; of equals, the first."""

    def __post_init__(self) -> None:
        if self.count < 1:
            raise InvalidValueError(f"{self!r}: need at least 1 candidate a prompt.")

    @property
    def scorers(self) -> frozenset[str]:
        """Names of the scorers it rests on, by which what it chose looks better than it is; see `PairFilter.scorers`."""
        return self.by.depends_on

    def choose(self, outcomes: Sequence[ImagePair | Skipped], *, prompts: int) -> list[ImagePair | Skipped]:
        """Choose one outcome a prompt.

        Args:
            outcomes: the first candidate of every prompt, then the second of every prompt, and so on.
            prompts: how many prompts.

        Raises:
            ContractError: if there are not ``count`` outcomes a prompt.
        """
        if len(outcomes) != self.count * prompts:
            raise ContractError(
                f"{self!r:.120} received {len(outcomes)} outcomes for {prompts} prompts: need {self.count} each."
            )
        pairs = [outcome for outcome in outcomes if isinstance(outcome, ImagePair)]
        gains = iter(score_deltas(self.by, pairs) if pairs else ())
        ranked = [(next(gains).gain if isinstance(outcome, ImagePair) else None, outcome) for outcome in outcomes]
        return [self._best(ranked[first::prompts]) for first in range(prompts)]

    def annotate(self, verdict: Verdict) -> Verdict:
        """The verdict on a chosen pair, its reason saying what it was chosen from."""
        if self.count == 1:
            return verdict
        return Verdict(verdict.keep, f"{verdict.reason} (best of {self.count} by {self.by.name})", verdict.scores)

    def _best(self, ranked: Sequence[tuple[float | None, ImagePair | Skipped]]) -> ImagePair | Skipped:
        grown = [(gain, outcome) for gain, outcome in ranked if gain is not None]
        if grown:
            return max(grown, key=lambda one: one[0])[1]
        skipped = [outcome for _, outcome in ranked if isinstance(outcome, Skipped)]
        furthest = max(skipped, key=lambda one: SKIPPING_STAGES.index(one.stage))
        if len({one.reason for one in skipped}) == 1:
            return furthest
        reason = f"none of {self.count} candidates became a pair; of the one that came furthest, {furthest.reason}"
        return Skipped(furthest.prompt, furthest.seed, reason, furthest.stage)
