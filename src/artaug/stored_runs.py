"""`Run`: a run that is in a folder, looked at while it goes, after it was killed, and when it has ended."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from html import escape
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import final

from artaug._internal.annotations import checked
from artaug._internal.arguments import check_argument
from artaug._internal.text import table_html
from artaug.errors import InvalidValueError, StorageError
from artaug.evaluation.comparison import Comparison
from artaug.lora.lora import LoRA
from artaug.pairs import Attempt, ImagePair, Kept
from artaug.report import write_report
from artaug.report.image_store import ImagePlacement
from artaug.run.funnel import Funnel
from artaug.run.results import Enhancement, Round, end_of_rounds, no_pairs_reason
from artaug.run.storage.attempts import StoredAttempts, read_attempts, read_candidates
from artaug.run.storage.lock import LockOwner, describe_owner, read_owner
from artaug.run.storage.records import Candidate
from artaug.run.storage.store import RunCall, RunFolder, RunRecord
from artaug.run.storage.stored_rounds import read_comparison, read_round


@checked
@final
@dataclass(frozen=True, repr=False)
class Run:
    """A run of `improve` or `enhance` that has a store: what its folder holds so far. Nothing is written to it.

    It needs no lock, so a run can be looked at while another process is in the middle of it: every property and method reads
    the folder as it is then. Attempts come one after the other, with their pictures by reference, so that memory does not
    grow with the number of prompts.

    >>> import tempfile
    >>> import artaug as aa
    >>> from artaug.testing import FixedCritic, FixedFilter, SwatchSynthesizer
    >>> advice = aa.Critique((aa.Suggestion(aa.Box(0, 0, 0.5, 1), "a bright window"),))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     attempts = aa.improve(
    ...         ["a kitchen", "a pond"],
    ...         synthesizer=SwatchSynthesizer(),
    ...         critic=FixedCritic(advice),
    ...         planner=aa.GreedyPlanner(),
    ...         keep=FixedFilter(keep=True),
    ...         seed=0,
    ...         store=folder,
    ...     )
    ...     first = next(attempts)
    ...     attempts.close()
    ...     run = aa.Run.open(folder)
    ...     [pair.prompt for pair in run.pairs()], run.is_running
    (['a kitchen', 'a pond'], False)
    """

    folder: Path
    """See `Store`."""

    @classmethod
    def open(cls, folder: str | Path) -> "Run":
        """Open the folder of a run.

        Args:
            folder: the ``store`` that was passed to `improve` or `enhance`.

        Raises:
            StorageError: if there is no run in it, if its ``run.json`` is damaged, or if a later version has written it.
        """
        if not isinstance(folder, str | Path):
            check_argument("Run.open", "folder", folder, Path)
        run = cls(Path(folder))
        run._record()
        return run

    @property
    def calls(self) -> tuple[RunCall, ...]:
        """The calls that worked on this run, where they differ: settings of all parts, versions, number of prompts."""
        return self._record().calls

    @property
    def owner(self) -> str | None:
        """The process that runs in the folder, in words; None if `is_running` is False.

        Raises:
            StorageError: if that cannot be read.
        """
        owner = self._owner()
        return None if owner is None or self.is_running is False else describe_owner(owner)

    @property
    def is_running(self) -> bool | None:
        """Whether a process runs in the folder now; None if that cannot be found out, as of one on another machine.

        Raises:
            StorageError: if that cannot be read.
        """
        owner = self._owner()
        return False if owner is None else owner.process.is_running()

    @property
    def begun_rounds(self) -> tuple[int, ...]:
        """The numbers of the rounds that have begun, from 1; the last one may be under way."""
        return tuple(self._files.begun_rounds())

    def attempts(self, round_number: int | None = None) -> Iterator[Attempt]:
        """How every prompt ended so far, one after the other: of all rounds, or of one.

        Attempts of a chunk appear when the whole chunk is finished. They are those of `improve`, in the same order.

        Args:
            round_number: counted from 1; a run of `improve` is round 1.

        Raises:
            InvalidValueError: if that round has not begun.
            StorageError: if a file is damaged.
        """
        return chain.from_iterable(
            (attempt for _, attempt in read_attempts(self._files.round(number))) for number in self._begun(round_number)
        )

    def pairs(self, round_number: int | None = None) -> Iterator[ImagePair]:
        """The kept pairs so far, of all rounds or of one; see `attempts`."""
        return (attempt.pair for attempt in self.attempts(round_number) if isinstance(attempt, Kept))

    def candidates(self, round_number: int | None = None) -> Iterator[Candidate]:
        """Every picture that was drawn for a prompt, with the critic's answer, the plan and the picture after it.

        With `BestOf` a prompt has several, of which one became its attempt. See `attempts` for the argument and errors.
        """
        return chain.from_iterable(read_candidates(self._files.round(number)) for number in self._begun(round_number))

    def funnel(self, round_number: int | None = None) -> Funnel:
        """How far the prompts got so far, in all rounds or in one; see `attempts`."""
        return Funnel.of(self.attempts(round_number))

    @property
    def rounds(self) -> tuple[Round, ...]:
        """The finished rounds of `enhance`, with their LoRAs."""
        return tuple(self._finished())

    def round(self, number: int) -> Round:
        """One finished round, counted from 1.

        Raises:
            InvalidValueError: if that round is not finished.
            StorageError: if a file of it is damaged.
        """
        finished = read_round(self._files.round(number), number) if number in self._begun() else None
        if finished is None:
            done = [str(begun) for begun in self._begun() if self._files.round(begun).is_finished]
            raise InvalidValueError(
                f"{self.folder} has no finished round {number!r}. Finished: {', '.join(done) or 'none'}."
            )
        return finished

    def comparison(self, number: int) -> Comparison | None:
        """The comparison of a round with the one before on held-out prompts; None if no stop rule asked for one.

        Raises:
            InvalidValueError: if that round has not begun.
            StorageError: if the file is damaged.
        """
        (begun,) = self._begun(number)
        return read_comparison(self._files.round(begun))

    @property
    def lora(self) -> LoRA:
        """The LoRA of all accepted rounds so far.

        Raises:
            NothingToLearnError: if there is none.
        """
        return self.result.lora

    @property
    def result(self) -> Enhancement:
        """What `enhance` returned, or would return if it ended with the rounds that are finished now.

        Raises:
            StorageError: if a file is damaged.
        """
        rounds = self.rounds
        return Enhancement(rounds=rounds, stop_reason=self._stop_reason(rounds))

    def report(
        self,
        path: str | Path,
        *,
        comparison: Comparison | None = None,
        title: str = "What the model learned",
        about: Mapping[str, object] = MappingProxyType({}),
        max_pairs: int = 48,
        images: ImagePlacement = "auto",
    ) -> Path:
        """Write a page about the run so far, the round that is under way included: see `write_report`.

        Raises:
            MissingExtraError: if jinja2 is not installed.
            StorageError: if the system cannot write it, or a file of the run is damaged.
        """
        result = self.result
        under_way = len(result.rounds) + 1
        return write_report(
            path,
            result=result,
            attempts=StoredAttempts(self._files.round(under_way), whole=False) if under_way in self._begun() else (),
            comparison=comparison,
            title=title,
            about=about,
            max_pairs=max_pairs,
            images=images,
        )

    def __repr__(self) -> str:
        """The folder, and how far it is."""
        return f"Run({str(self.folder)!r}, {self._state()})"

    def _repr_html_(self) -> str:
        """A row for each round, and the funnel of the newest, for notebooks."""
        rows, html = [], ""
        for number in self.begun_rounds:
            funnel, folder = self.funnel(number), self._files.round(number)
            total = (folder.groups() or (0,))[-1]
            state = "finished" if folder.is_finished else "not finished"
            rows.append((str(number), f"{funnel.steps[0].count:,} of {total:,}", f"{funnel.steps[-1].count:,}", state))
            html = funnel._repr_html_()
        return f"<p>{escape(repr(self))}</p>{table_html(('round', 'prompts', 'kept', 'state'), rows)}{html}"

    @property
    def _files(self) -> RunFolder:
        return RunFolder(self.folder)

    def _owner(self) -> LockOwner | None:
        try:
            return read_owner(self.folder)
        except (OSError, InvalidValueError) as error:
            raise StorageError(f"who runs in {self.folder} cannot be read: {error}. Look again.") from error

    def _record(self) -> RunRecord:
        record = self._files.read() if (self.folder / "run.json").exists() else None
        if record is None:
            raise StorageError(f"{self.folder} holds no run: it has no run.json. {_hint(self.folder)}")
        return record

    def _begun(self, number: int | None = None) -> tuple[int, ...]:
        """The numbers of the rounds that have begun, or the only one that is meant."""
        begun = self.begun_rounds
        if number is None:
            return begun
        if number not in begun:
            raise InvalidValueError(
                f"{self.folder} has no round {number!r}. Begun: {', '.join(map(str, begun)) or 'none'}."
            )
        return (number,)

    def _finished(self) -> Iterator[Round]:
        for number in self._begun():
            finished = read_round(self._files.round(number), number)
            if finished is None:
                return
            yield finished

    def _stop_reason(self, rounds: tuple[Round, ...]) -> str:
        """Why the run ended, as `enhance` says it, or that it has not."""
        settings = self.calls[-1].settings
        if "rounds" not in settings:
            return "improve was called, which trains nothing"
        planned = int(settings["rounds"])
        if (reason := end_of_rounds(rounds, rounds=planned)) is not None:
            return reason
        number = len(rounds) + 1
        if number in self.begun_rounds:
            folder = self._files.round(number)
            ended = sum(1 for _ in read_attempts(folder))
            if ended == (folder.groups() or (0,))[-1]:
                reason = no_pairs_reason(number, (attempt for _, attempt in read_attempts(folder)))
                if reason is not None:
                    return reason
        if self.is_running:
            return f"round {number} is under way"
        return f"round {number} is not finished: the same call on {self.folder} goes on there"

    def _state(self) -> str:
        """How far the run is, in a few words; no attempt is read."""
        begun = self.begun_rounds
        finished = sum(self._files.round(number).is_finished for number in begun)
        where = f"{finished} of {len(begun)} begun rounds finished"
        running = {True: "running", False: "not running", None: "perhaps running on another machine"}[self.is_running]
        return f"{self.calls[-1].settings['function']}, {where}, {running}"


def _hint(folder: Path) -> str:
    """What to open instead."""
    inside = sorted(path.parent.name for path in folder.glob("*/run.json"))
    if inside:
        return f"There are runs in it: {', '.join(inside[:8])}."
    if not folder.is_dir():
        return "There is no such folder. Pass the store of improve or enhance."
    return "Pass the folder that was the store of improve or enhance."
