"""When the loop ends: the gain, or the win rate, on held-out prompts that a round has to show."""

from collections.abc import Sequence
from dataclasses import dataclass

from artaug._internal.annotations import checked
from artaug._internal.arguments import argument_error, check_finite_number
from artaug._internal.prompts import check_prompts, prompt_clusters
from artaug.errors import PromptError, ScoringError
from artaug.evaluation.comparison import Comparison
from artaug.evaluation.comparison.rows import FEWEST_PROMPTS, exceeds
from artaug.pairwise import PairwiseJudge
from artaug.scoring import Scorer


@checked
@dataclass(frozen=True)
class StopRule:
    """Ends the loop when a round does not raise the scores of pictures of held-out prompts.

    A round is accepted only if a comparison to the round before would call it a gain above ``at_least``: if the whole 95%
    interval of the paired difference lies above it, and the sign-flip p-value is below 0.05. A round without effect is so
    accepted at most 1 time in 40. Otherwise the loop ends there and the round is left out of the result.

    By a `PairwiseJudge`, a round has to win against the round before: the gain is its win rate less a half, with a tie for every
    pair on which the two orders do not agree.

    It needs at least 6 different prompts, as no p-value of fewer can be below 0.05. To accept 8 of 10 rounds that gain d
    standard deviations of the difference, it needs about ``8 / d**2`` of them: 32 for half a standard deviation.

    Raises:
        InvalidValueError: for what is neither scorer nor judge, or a gain that is not finite.
        PromptError: for fewer than 6 different prompts, a blank one, or one string in place of a list.
    """

    scorer: Scorer | PairwiseJudge
    """Measures progress. It should not be one that the pairs are filtered by."""
    prompts: Sequence[str]
    """Drawn by the base and after each round, with the same seeds, which no training picture has; no training prompts."""
    at_least: float = 0.0
    """The gain, in the scorer's units, that the whole interval has to exceed; 0.05 for a win rate above 55%."""

    def __post_init__(self) -> None:
        if not isinstance(self.scorer, Scorer | PairwiseJudge):
            raise argument_error(
                "StopRule",
                "scorer",
                self.scorer,
                expected="an instance of artaug.Scorer or artaug.PairwiseJudge",
                advice=f"Make one of the class: {self.scorer.__name__}(...)."
                if isinstance(self.scorer, type)
                else "Such as a scorer of artaug.scorers, or an object of a subclass of yours.",
            )
        check_prompts(self.prompts)
        check_finite_number("StopRule", "at_least", self.at_least)
        different = len(set(prompt_clusters(self.prompts)))
        if different < FEWEST_PROMPTS:
            raise PromptError(
                f"a StopRule received {different} different prompts and needs at least {FEWEST_PROMPTS}: with fewer no p-value "
                "can be below 0.05, and no round would be accepted. Small gains need 30 or more."
            )

    @property
    def scorers(self) -> tuple[Scorer, ...]:
        """The scorer, if it is one."""
        return (self.scorer,) if isinstance(self.scorer, Scorer) else ()

    @property
    def judges(self) -> tuple[PairwiseJudge, ...]:
        """The judge, if it is one."""
        return (self.scorer,) if isinstance(self.scorer, PairwiseJudge) else ()

    def accepts(self, comparison: Comparison, *, seed: int) -> bool:
        """Whether the only candidate of a comparison gained enough; ``seed`` is that of the statistics.

        Raises:
            ScoringError: if a judge had an answer about fewer than 6 prompts.
        """
        (candidate,) = comparison.candidates
        base, enhanced = comparison.paired_scores(self.scorer.name, candidate)
        if len(base) < FEWEST_PROMPTS:
            raise ScoringError(
                f"the stop rule needs an answer about at least {FEWEST_PROMPTS} prompts, and got one about {len(base)}. "
                f"{' '.join(map(str, comparison.position_bias))}".rstrip(),
                comparison=comparison,
            )
        return exceeds(base, enhanced, self.at_least, seed=seed, judged=bool(self.judges))
