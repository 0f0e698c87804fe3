"""What was scored and what was not: a scorer that raises on one picture does not take the others with it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import isfinite, nan

from PIL.Image import Image

from artaug.errors import ScoringError
from artaug.evaluation.comparison.rows import Fault
from artaug.scoring import Scorer, scored


@dataclass(frozen=True)
class Ledger:
    """Every score of a comparison, and every fault."""

    scores: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    """By arm and scorer, NaN for what is not there, or not yet."""
    faults: list[Fault] = field(default_factory=list)
    raised: list[Exception] = field(default_factory=list)
    """What the faults came from."""

    def scored(
        self, scorer: Scorer, images: Sequence[Image], prompts: Sequence[str], *, seeds: Sequence[int], arm: str
    ) -> list[float]:
        """Score a batch; if that raises, picture by picture, with NaN for those that raise alone too.

        Raises:
            ScoringError: if none can be scored after others were; it holds those.
            Exception: the scorer's own, if none can be scored and none was.
        """
        try:
            return scored(scorer, images, prompts)
        except Exception as fault:  # noqa: BLE001 - whatever it is, it is raised in the end
            together = fault
        numbers = []
        for image, prompt, seed in zip(images, prompts, seeds, strict=True):
            try:
                numbers += scored(scorer, [image], [prompt])
            except Exception as fault:  # noqa: BLE001 - likewise
                numbers.append(nan)
                self._note(fault, Fault(scorer.name, arm, prompt, seed, _told(fault)))
        if all(map(isfinite, numbers)):
            what = f"{_told(together)}, though each picture alone is scored: lower batch_size"
            self._note(together, Fault(scorer.name, arm, prompts[0], seeds[0], what))
        elif not any(map(isfinite, numbers)):
            if not any(isfinite(one) for judges in self.scores.values() for many in judges.values() for one in many):
                raise together
            raise self.error(None) from together
        return numbers

    def error(self, comparison: object) -> ScoringError:
        """The error that holds what was scored."""
        first = self.faults[0]
        return ScoringError(
            f"{first.scorer} raised on {len(self.faults)} pictures, first on {first.arm}'s of {first.prompt!r}, seed "
            f"{first.seed}: {first.what}. Nothing that was scored is lost: see .comparison and .scores of this error.",
            comparison=comparison,
            scores=self.scores,
        )

    def _note(self, fault: Exception, where: Fault) -> None:
        self.raised.append(fault)
        self.faults.append(where)


def _told(fault: Exception) -> str:
    return f"{type(fault).__name__}: {fault}"
