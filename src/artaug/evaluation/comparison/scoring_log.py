"""The scores of a comparison as they come in, and the pictures that a scorer failed on."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import isfinite, nan

from PIL.Image import Image

from artaug.errors import ScoringError
from artaug.evaluation.comparison.rows import ScoringFailure
from artaug.scoring import Scorer, score_images


@dataclass(frozen=True)
class ScoringLog:
    """Every score of a comparison and every failure, so that one failing picture does not discard the others."""

    scores: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    """By arm and scorer, one score a picture; NaN where it failed or was not scored yet."""
    failures: list[ScoringFailure] = field(default_factory=list)
    exceptions: list[Exception] = field(default_factory=list)
    """The exception behind each failure, in the same order."""

    def score(
        self, scorer: Scorer, images: Sequence[Image], prompts: Sequence[str], *, seeds: Sequence[int], arm: str
    ) -> list[float]:
        """Score a batch. If that raises, score its pictures one by one and give NaN to those that fail alone too.

        Raises:
            ScoringError: if no picture of the batch can be scored, but earlier ones were; it holds their scores.
            Exception: the scorer's own, if nothing was scored yet.
        """
        try:
            return score_images(scorer, images, prompts)
        except Exception as error:  # noqa: BLE001 - a user's scorer may raise anything; compare raises it at the end
            batch_error = error
        scores = []
        for image, prompt, seed in zip(images, prompts, seeds, strict=True):
            try:
                scores += score_images(scorer, [image], [prompt])
            except Exception as error:  # noqa: BLE001 - likewise
                scores.append(nan)
                self._add(error, ScoringFailure(scorer.name, arm, prompt, seed, _describe(error)))
        if all(map(isfinite, scores)):
            message = f"{_describe(batch_error)}, though each picture alone is scored: lower batch_size"
            self._add(batch_error, ScoringFailure(scorer.name, arm, prompts[0], seeds[0], message))
        elif not any(map(isfinite, scores)):
            if not self._has_scores():
                raise batch_error
            raise self.error(None) from batch_error
        return scores

    def error(self, comparison: object) -> ScoringError:
        """The error that tells the user of the failures and holds what was scored."""
        first = self.failures[0]
        return ScoringError(
            f"{first.scorer} raised on {len(self.failures)} pictures, first on {first.arm}'s of {first.prompt!r}, seed "
            f"{first.seed}: {first.error}. All other scores are kept: see .comparison and .scores of this error.",
            comparison=comparison,
            scores=self.scores,
        )

    def _has_scores(self) -> bool:
        return any(isfinite(score) for arm in self.scores.values() for scores in arm.values() for score in scores)

    def _add(self, exception: Exception, failure: ScoringFailure) -> None:
        self.exceptions.append(exception)
        self.failures.append(failure)


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
