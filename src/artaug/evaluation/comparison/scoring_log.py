"""What was scored and what was not: a scorer that raises on one picture does not take the others with it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import isfinite, nan

from PIL.Image import Image

from artaug.errors import ScoringError
from artaug.evaluation.comparison.rows import ScoringFailure
from artaug.scoring import Scorer, score_images


@dataclass(frozen=True)
class ScoringLog:
    """Every score of a comparison, and every fault."""

    scores: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    """By arm and scorer, NaN for what is not there, or not yet."""
    failures: list[ScoringFailure] = field(default_factory=list)
    raised: list[Exception] = field(default_factory=list)
    """What the faults came from."""

    def score_images(
        self, scorer: Scorer, images: Sequence[Image], prompts: Sequence[str], *, seeds: Sequence[int], arm: str
    ) -> list[float]:
        """Score a batch; if that raises, picture by picture, with NaN for those that raise alone too.

        Raises:
            ScoringError: if none can be scored after others were; it holds those.
            Exception: the scorer's own, if none can be scored and none was.
        """
        try:
            return score_images(scorer, images, prompts)
        except Exception as fault:  # noqa: BLE001 - whatever it is, it is raised in the end
            together = fault
        numbers = []
        for image, prompt, seed in zip(images, prompts, seeds, strict=True):
            try:
                numbers += score_images(scorer, [image], [prompt])
            except Exception as fault:  # noqa: BLE001 - likewise
                numbers.append(nan)
                self._note(fault, ScoringFailure(scorer.name, arm, prompt, seed, _told(fault)))
        if all(map(isfinite, numbers)):
            error = f"{_told(together)}, though each picture alone is scored: lower batch_size"
            self._note(together, ScoringFailure(scorer.name, arm, prompts[0], seeds[0], error))
        elif not any(map(isfinite, numbers)):
            if not any(isfinite(one) for judges in self.scores.values() for many in judges.values() for one in many):
                raise together
            raise self.error(None) from together
        return numbers

    def error(self, comparison: object) -> ScoringError:
        """The error that holds what was scored."""
        first = self.failures[0]
        return ScoringError(
            f"{first.scorer} raised on {len(self.failures)} pictures, first on {first.arm}'s of {first.prompt!r}, seed "
            f"{first.seed}: {first.error}. Nothing that was scored is lost: see .comparison and .scores of this error.",
            comparison=comparison,
            scores=self.scores,
        )

    def _note(self, fault: Exception, where: ScoringFailure) -> None:
        self.raised.append(fault)
        self.failures.append(where)


def _told(fault: Exception) -> str:
    return f"{type(fault).__name__}: {fault}"
