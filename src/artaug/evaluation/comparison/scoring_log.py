"""Every score of a comparison and every failure, so that one failing picture does not discard the others."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import TypeVar

from artaug._internal.calls import stays_away
from artaug._internal.memory import is_out_of_memory
from artaug.errors import ScoringError
from artaug.evaluation.comparison.rows import ScoringFailure

T = TypeVar("T")


@dataclass(frozen=True)
class ScoringLog:
    """What scorers and judges gave, and what they raised."""

    scores: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    """By arm and scorer, one score a picture; NaN where it failed or was not scored yet."""
    failures: list[ScoringFailure] = field(default_factory=list)
    exceptions: list[BaseException] = field(default_factory=list)
    """The exception behind each failure, in the same order."""

    def ask(
        self, name: str, call: Callable[[slice], Sequence[T]], prompts: Sequence[str], *, seeds: Sequence[int], arm: str
    ) -> list[T | None]:
        """Score a batch. If that raises, score its pictures one by one, and give None to those that fail alone too.

        Args:
            name: of the scorer or judge.
            call: scores a part of the batch.
            prompts: of the pictures of the batch.
            seeds: likewise.
            arm: whose pictures they are.

        Raises:
            ScoringError: if no picture of the batch can be scored, or the scorer stays away; it holds the scores of earlier
                ones.
            Exception: where nothing was scored yet, what ``call`` raised; also if memory ran out for a single picture.
        """
        try:
            return list(call(slice(None)))
        except Exception as error:  # noqa: BLE001 - a user's scorer may raise anything; compare raises it at the end
            batch_error = error
        self._raise_if_lasting(batch_error)
        answers: list[T | None] = []
        for index, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
            try:
                answers += call(slice(index, index + 1))
            except Exception as error:  # noqa: BLE001 - as above
                self._raise_if_lasting(error)
                answers.append(None)
                self._add(error, ScoringFailure(name, arm, prompt, seed, _describe(error)))
        if None not in answers:
            message = f"{_describe(batch_error)}, though each picture alone is scored: lower batch_size"
            self._add(batch_error, ScoringFailure(name, arm, prompts[0], seeds[0], message))
        elif all(answer is None for answer in answers):
            if not self._has_scores():
                raise batch_error
            raise self.error(None) from batch_error
        return answers

    def error(self, comparison: object) -> ScoringError:
        """The error that tells the user of the failures and holds what was scored."""
        first = self.failures[0]
        return ScoringError(
            f"{first.scorer} raised on {len(self.failures)} pictures, first on {first.arm}'s of {first.prompt!r}, seed "
            f"{first.seed}: {first.error}. All other scores are kept: see .comparison and .scores of this error.",
            comparison=comparison,
            scores=self.scores,
        )

    def _raise_if_lasting(self, error: Exception) -> None:
        """Raise what would happen to the pictures after it too."""
        if isinstance(error, ScoringError) and stays_away(error):
            error.scores = self.scores
            raise error
        if is_out_of_memory(error):
            raise error

    def _has_scores(self) -> bool:
        return any(isfinite(score) for arm in self.scores.values() for scores in arm.values() for score in scores)

    def _add(self, exception: Exception, failure: ScoringFailure) -> None:
        self.exceptions.append(_original(exception))
        self.failures.append(failure)


def _original(error: BaseException) -> BaseException:
    """What the scorer raised: the error that wraps it names the scorer and the prompt, which a `ScoringFailure` does too."""
    return error.__cause__ if isinstance(error, ScoringError) and error.__cause__ is not None else error


def _describe(error: Exception) -> str:
    original = _original(error)
    return f"{type(original).__name__}: {original}"
