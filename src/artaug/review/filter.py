"""`ManualReview`, a filter whose verdicts a person gives on a local page, and `RecordedDecisions`, which reads them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, final

from artaug._internal.annotations import checked
from artaug._internal.arguments import check_argument
from artaug.errors import InvalidValueError, UndecidedError
from artaug.filtering.algebra import PairFilter, judge_pairs
from artaug.pairs import ImagePair, Verdict, pair_digest
from artaug.review.decisions import read_decisions
from artaug.review.session import serve_pairs

if TYPE_CHECKING:
    from torch import nn

_MAX_PORT = 65535


@checked
@final
@dataclass(frozen=True)
class ReviewProgress:
    """The number of pairs that are kept, dropped and undecided."""

    kept: int
    dropped: int
    undecided: int


@checked
@final
@dataclass(frozen=True)
class RecordedDecisions(PairFilter):
    """Keeps the pairs that a person kept in a `ManualReview`, as its file says. It never shows the page.

    Raises:
        UndecidedError: by judging, for pairs without a decision: to drop them, or with ``~`` to keep them, would be a
            guess.
        StorageError: for a file with a line that is not a decision.
    """

    path: str | Path
    """The file of decisions."""

    def rehearse(self, pair: ImagePair) -> None:
        read_decisions(Path(self.path))  # nobody has decided on a stand-in

    def judge(self, pair: ImagePair) -> Verdict:
        return self.judge_batch([pair])[0]

    def judge_batch(self, pairs: Sequence[ImagePair]) -> list[Verdict]:
        decisions = _decisions_on(pairs, self.path)
        if undecided := decisions.count(None):
            raise UndecidedError(undecided, total=len(decisions), path=str(self.path))
        return [Verdict(bool(keep), f"{'kept' if keep else 'dropped'} by hand", {}) for keep in decisions]


@checked
@final
@dataclass(frozen=True)
class ManualReview(PairFilter):
    """Lets a person keep or drop pairs on a page at 127.0.0.1, with keys to keep, drop, undo and flip before and after.

    A decision belongs to what the pair shows (its prompt and pixels), and is flushed to the disk before the page shows
    the next pair. So a kill loses none, and a pair is shown once even if several runs produce it. The page has a secret
    address, listens on this machine only and needs no network; from another machine, forward its port with ssh.

    Judging shows the page if there are undecided pairs, and waits. To choose the time yourself, call `serve` and judge
    with `RecordedDecisions`.

    Raises:
        UndecidedError: by judging, if the person finished before all pairs were decided. The decisions are kept.
        StorageError: for a file with a line that is not a decision.

    >>> import artaug as aa
    >>> keep = aa.ManualReview("runs/first/by-hand.jsonl", prefilter=aa.Gain(Taste(), at_least=0.2))  # doctest: +SKIP
    """

    path: str | Path
    """The file of decisions, one line each, which is only ever appended to."""
    prefilter: PairFilter | None = field(default=None, kw_only=True)
    """Only pairs that this filter keeps are shown; the others are dropped with its verdicts."""
    announce: Callable[[str], object] | None = field(default=None, kw_only=True, repr=False)
    """Called with the address of the page when it is ready: ``print`` on a machine without a browser. None opens the page in
    this machine's browser, by a file in the folder of ``path`` that only this user can read."""

    def __post_init__(self) -> None:
        check_argument("ManualReview", "prefilter", self.prefilter, PairFilter, optional=True)

    def rehearse(self, pair: ImagePair) -> None:
        read_decisions(Path(self.path))
        if self.prefilter is not None:  # a person is not asked about a stand-in
            self.prefilter.rehearse(pair)

    @property
    def needs_all_pairs(self) -> bool:
        """A person is asked once a round."""
        return True

    @property
    def scorers(self) -> frozenset[str]:
        return frozenset() if self.prefilter is None else self.prefilter.scorers

    @property
    def models(self) -> "Sequence[nn.Module]":
        return () if self.prefilter is None else self.prefilter.models

    def progress(self, pairs: Sequence[ImagePair]) -> ReviewProgress:
        """How many of these pairs are kept, dropped and undecided."""
        decisions = _decisions_on(pairs, self.path)
        return ReviewProgress(decisions.count(True), decisions.count(False), decisions.count(None))

    def serve(self, pairs: Sequence[ImagePair], *, revisit: bool = False, port: int = 0) -> ReviewProgress:
        """Show the page and wait until the person has finished. An interrupt ends it too; no decision is lost.

        Pairs that show the same appear once. The page begins with the first undecided pair.

        Args:
            pairs: the pairs to decide on.
            revisit: show the page even if all pairs are decided, to change decisions.
            port: the port of the page; 0 for a free one.

        Returns:
            The progress at the end.

        Raises:
            InvalidValueError: for a port outside 0 to 65535.
            OSError: if the port is in use.
        """
        if not 0 <= port <= _MAX_PORT:
            raise InvalidValueError(f"ManualReview.serve(port={port}): need 0 (a free port) to {_MAX_PORT}.")
        if pairs and (revisit or self.progress(pairs).undecided):
            serve_pairs(pairs, Path(self.path), announce=self.announce, port=port)
        return self.progress(pairs)

    def judge(self, pair: ImagePair) -> Verdict:
        return self.judge_batch([pair])[0]

    def judge_batch(self, pairs: Sequence[ImagePair]) -> list[Verdict]:
        if self.prefilter is None:
            self.serve(pairs)
            return RecordedDecisions(self.path).judge_batch(pairs)
        prior = judge_pairs(self.prefilter, pairs)
        shown = [pair for pair, verdict in zip(pairs, prior, strict=True) if verdict.keep]
        self.serve(shown)
        manual = iter(RecordedDecisions(self.path).judge_batch(shown))
        return [_combine_verdicts(verdict, next(manual)) if verdict.keep else verdict for verdict in prior]


def _decisions_on(pairs: Sequence[ImagePair], path: str | Path) -> list[bool | None]:
    """The decision on each pair; None for an undecided one."""
    decisions = read_decisions(Path(path))
    return [decisions.get(pair_digest(pair)) for pair in pairs]


def _combine_verdicts(prior: Verdict, manual: Verdict) -> Verdict:
    """The verdict on a pair that the prefilter kept: the person's, with the reasons and the scores of both."""
    return Verdict(manual.keep, f"{prior.reason}; {manual.reason}", prior.scores)
