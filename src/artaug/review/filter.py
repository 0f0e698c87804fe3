"""A person as a filter: pairs are kept or dropped by hand, on a small local page, once and for all."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import final

from artaug.errors import InvalidValueError, UndecidedError
from artaug.filtering.algebra import PairFilter, judge_pairs
from artaug.pairs import ImagePair, Verdict, pair_digest
from artaug.review.decisions import read_decisions
from artaug.review.session import serve_pairs


def open_in_browser(address: str) -> None:
    """Open the page in this machine's browser."""
    import webbrowser  # noqa: PLC0415 - not everybody has a person at hand

    webbrowser.open(address)


@final
@dataclass(frozen=True)
class ReviewProgress:
    """How far a person has got with some pairs."""

    kept: int
    dropped: int
    undecided: int


@final
@dataclass(frozen=True)
class RecordedDecisions(PairFilter):
    """Keeps the pairs that a person kept, as `ManualReview` wrote it down; it never asks.

    Raises:
        UndecidedError: when asked to judge a pair on which nobody has decided yet, rather than to drop it unseen.
        StorageError: for a file with a line that is no decision.
    """

    path: str | Path
    """The file of decisions."""

    def judge(self, pair: ImagePair) -> Verdict:
        return self.judge_batch([pair])[0]

    def judge_batch(self, pairs: Sequence[ImagePair]) -> list[Verdict]:
        decided = read_decisions(Path(self.path))
        answers = [decided.get(pair_digest(pair)) for pair in pairs]
        if undecided := answers.count(None):
            raise UndecidedError(undecided, total=len(answers), path=str(self.path))
        return [Verdict(bool(keep), f"{'kept' if keep else 'dropped'} by hand", {}) for keep in answers]


@final
@dataclass(frozen=True)
class ManualReview(PairFilter):
    """Asks a person about pairs, on a page at 127.0.0.1: keys keep, drop, undo and flip between before and after.

    Every decision is on the disk before the page shows the next pair, by what the pair shows (its prompt and pixels): a
    kill loses none, and a pair is asked about once, whatever run it comes up in. The page has an address nobody can
    guess, listens on this machine only and needs no network; from another machine, forward its port through ssh.

    Judging as a filter shows the page if there are undecided pairs and waits. Where that is not wanted, call `serve` when
    it suits and judge by `RecordedDecisions`.

    Raises:
        UndecidedError: by judging, if the person finished before all was decided. What is decided stays.
        StorageError: for a file with a line that is no decision.

    >>> import artaug as aa
    >>> keep = aa.ManualReview("runs/first/by-hand.jsonl", among=aa.Gain(Taste(), at_least=0.2))  # doctest: +SKIP
    """

    path: str | Path
    """The file of decisions, a line each, to which is only ever added."""
    among: PairFilter | None = field(default=None, kw_only=True)
    """Asks only about pairs that this filter keeps; the others are dropped for its reasons."""
    announce: Callable[[str], object] = field(default=open_in_browser, kw_only=True, repr=False)
    """Called with the address of the page when it is there; ``print`` where there is no browser."""

    @property
    def scorers(self) -> frozenset[str]:
        return frozenset() if self.among is None else self.among.scorers

    def standing(self, pairs: Sequence[ImagePair]) -> ReviewProgress:
        """How many of these pairs are kept, dropped and undecided."""
        decided = read_decisions(Path(self.path))
        answers = [decided.get(pair_digest(pair)) for pair in pairs]
        return ReviewProgress(answers.count(True), answers.count(False), answers.count(None))

    def serve(self, pairs: Sequence[ImagePair], *, review: bool = False, port: int = 0) -> ReviewProgress:
        """Show the page and wait until the person has finished. An interrupt ends it too, and loses nothing.

        Pairs that show the same are one. The first undecided one is shown first.

        Args:
            pairs: what to ask about.
            review: show the page even if all is decided, to look again.
            port: of the page; 0 for any that is free.

        Returns:
            How the pairs stand then.

        Raises:
            InvalidValueError: for a port that is none.
            OSError: if the port is taken.
        """
        if not 0 <= port <= 65535:
            raise InvalidValueError(f"ManualReview.serve(port={port}): need 0 (any) to 65535.")
        if pairs and (review or self.standing(pairs).undecided):
            serve_pairs(pairs, Path(self.path), announce=self.announce, port=port)
        return self.standing(pairs)

    def judge(self, pair: ImagePair) -> Verdict:
        return self.judge_batch([pair])[0]

    def judge_batch(self, pairs: Sequence[ImagePair]) -> list[Verdict]:
        first = [None] * len(pairs) if self.among is None else judge_pairs(self.among, pairs)
        asked = [pair for pair, verdict in zip(pairs, first, strict=True) if verdict is None or verdict.keep]
        self.serve(asked)
        answers = iter(RecordedDecisions(self.path).judge_batch(asked))
        return [
            verdict if verdict is not None and not verdict.keep else _after(verdict, next(answers)) for verdict in first
        ]


def _after(first: Verdict | None, answer: Verdict) -> Verdict:
    return answer if first is None else Verdict(answer.keep, f"{first.reason}; {answer.reason}", first.scores)
