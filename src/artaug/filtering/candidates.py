"""Several candidates for one prompt, of which the best is judged."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

from artaug._internal.annotations import checked
from artaug._internal.arguments import check_argument, check_count
from artaug.errors import ContractError
from artaug.filtering.deltas import score_deltas
from artaug.pairs import SKIPPING_STAGES, ImagePair, Skipped, Verdict
from artaug.scoring import Scorer

if TYPE_CHECKING:
    from torch import nn


@checked
@final
@dataclass(frozen=True)
class BestOf:
    """Draws every prompt ``count`` times, each with a seed of its own, and keeps the pair that gained most.

    Pass it to `improve` or `enhance` as ``candidates``. Each candidate is a whole pair: drawn, critiqued and redrawn
    with one seed, so that before and after correspond. The prompt still ends as one attempt: that of its best
    candidate, or skipped if none became a pair. A larger ``count`` tries the same seeds and more, so that the gain of
    the best never falls; ``count=1`` is `improve` without candidates.

    Raises:
        InvalidValueError: if ``count`` is no whole number of at least 1, or ``by`` no scorer.

    >>> import artaug as aa
    >>> from artaug.scorers import Photometric
    >>> aa.BestOf(4, by=Photometric()).count
    4
    """

    count: int
    """Candidates for each prompt; drawing and critiques cost this many times as much."""
    by: Scorer
    """The scorer whose gain decides which is best; of equals, the first."""

    def __post_init__(self) -> None:
        check_count("BestOf", "count", self.count)
        check_argument("BestOf", "by", self.by, Scorer)

    @property
    def scorers(self) -> frozenset[str]:
        """Names of the scorers it chooses by; they overrate what it chose, see `PairFilter.scorers`."""
        return self.by.depends_on

    @property
    def models(self) -> "Sequence[nn.Module]":
        """Those of the scorer, see `Scorer.models`."""
        return self.by.models

    def choose(self, outcomes: Sequence[ImagePair | Skipped], *, prompts: int) -> list[ImagePair | Skipped]:
        """Choose one outcome for each prompt.

        Args:
            outcomes: the first candidate of every prompt, then the second of every prompt, and so on.
            prompts: how many prompts.

        Raises:
            ContractError: if there are not ``count`` outcomes for each prompt.
        """
        if len(outcomes) != self.count * prompts:
            raise ContractError(
                f"{self!r:.120} received {len(outcomes)} outcomes for {prompts} prompts: need {self.count} each."
            )
        pairs = [outcome for outcome in outcomes if isinstance(outcome, ImagePair)]
        deltas = iter(score_deltas(self.by, pairs) if pairs else ())
        gains = [next(deltas).gain if isinstance(outcome, ImagePair) else None for outcome in outcomes]
        ranked = list(zip(gains, outcomes, strict=True))
        # Candidate c of prompt p is at c * prompts + p, so the candidates of a prompt lie ``prompts`` apart.
        return [self._best(ranked[index::prompts]) for index in range(prompts)]

    def annotate(self, verdict: Verdict) -> Verdict:
        """The verdict on a chosen pair, with the choice added to its reason."""
        if self.count == 1:
            return verdict
        return Verdict(verdict.keep, f"{verdict.reason} (best of {self.count} by {self.by.name})", verdict.scores)

    def _best(self, candidates: Sequence[tuple[float | None, ImagePair | Skipped]]) -> ImagePair | Skipped:
        """The pair that gained most, or the skip of the candidate that came furthest."""
        pairs = [(gain, outcome) for gain, outcome in candidates if gain is not None]
        if pairs:
            return max(pairs, key=lambda candidate: candidate[0])[1]
        skipped = [outcome for _, outcome in candidates if isinstance(outcome, Skipped)]
        furthest = max(skipped, key=lambda outcome: SKIPPING_STAGES.index(outcome.stage))
        if len({outcome.reason for outcome in skipped}) == 1:
            return furthest
        reason = f"none of {self.count} candidates became a pair; of the one that came furthest, {furthest.reason}"
        transient = any(outcome.transient for outcome in skipped)
        return Skipped(furthest.prompt, furthest.seed, reason, furthest.stage, transient)
