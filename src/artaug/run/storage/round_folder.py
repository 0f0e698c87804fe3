"""The folder of one round: finished chunks, the chunk under way, and the round's result."""

import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from PIL.Image import Image

from artaug._internal.files import atomic_write
from artaug._internal.sealed import open_sealed, save_sealed
from artaug._internal.segments import read_segment, write_provisional, write_segment
from artaug._internal.values import from_json, to_json, value
from artaug.critique import Abstention, Critique
from artaug.errors import LoRAError, StorageError
from artaug.evaluation.comparison import ScoreRow
from artaug.image_files import ImageFile, ImageFolder, image_digest
from artaug.lora.lora import LoRA
from artaug.pairs import Verdict
from artaug.plan import Plan, plan_digest
from artaug.run.storage.journal import ChunkJournal, RoundJournal
from artaug.run.storage.records import (
    AnswerRecord,
    CallRecord,
    Candidate,
    Chunk,
    ChunkRecord,
    DrawingStage,
    Member,
    Picture,
    VerdictRecord,
    VerdictsRecord,
)
from artaug.training.state import lora_from_tensors, lora_to_tensors

_log = logging.getLogger(__name__)
T = TypeVar("T")

_REMEDY = "What the run has finished is complete: run the same call to go on once the folder can be written to."
_DAMAGED = "Restore it from a copy, or delete it, and what it holds is made again."
_NOT_MADE_AGAIN = "Restore it from a copy, or move the folder that it is in away, and the round is made again."
_UNDER_WAY = "the chunk under way"


@value
class RoundRecord:
    """How many prompts a round has."""

    groups: tuple[int, ...]
    """The numbers of prompts of the calls that added some, the last one all of them."""


@value
class ValidationRecord:
    """A `ValidationResult` as it is written."""

    step: int
    strength: float
    win_rate: float
    gain: float


@value
class ResultRecord:
    """The numbers of a finished round."""

    losses: tuple[float, ...]
    pairs: int
    steps: int
    training_seconds: float
    validations: tuple[ValidationRecord, ...]
    skipped_steps: int
    seconds: dict[str, float]
    gain: ScoreRow | None
    accepted: bool


@value
class ImageRecord:
    """A picture of the run's folder."""

    digest: str
    size: tuple[int, int]
    """Width and height."""


@value
class ComparisonRecord:
    """The content of ``comparison.json``."""

    comparison: dict[str, Any]
    """See `Comparison.to_dict`."""
    images: dict[str, tuple[ImageRecord, ...]]
    """By arm, ``base`` and the names of the candidates, the pictures of the first prompts."""


@dataclass(frozen=True)
class RoundFolder:
    """The folder of one round."""

    path: Path
    images: ImageFolder

    def groups(self) -> tuple[int, ...] | None:
        """See `RoundRecord`; None if the round has not begun."""
        path = self.path / "round.json"
        try:
            return read_segment(path, RoundRecord, what="record of a round", remedy=_NOT_MADE_AGAIN).groups
        except FileNotFoundError:
            if self.chunk_names():
                raise StorageError(f"{path} is gone, and the round has attempts. {_NOT_MADE_AGAIN}") from None
            return None

    def begin(self, groups: Sequence[int]) -> None:
        """Begin the round, or open it again for more prompts: then what was learned from fewer is no result of it."""
        for name in ("result.safetensors", "comparison.json"):
            (self.path / name).unlink(missing_ok=True)
        self._write("round.json", RoundRecord(tuple(groups)), what="the record of the round")

    def journal(self) -> "FolderJournal":
        """The journal of its chunks."""
        return FolderJournal(self)

    def chunk_names(self) -> list[str]:
        """The names of its finished chunks, in the order in which they were run."""
        try:
            names = os.listdir(self.path / "attempts")  # noqa: PTH208 - 10,000 names, and no path of each
        except FileNotFoundError:
            return []
        return sorted((name.removesuffix(".json") for name in names if fnmatchcase(name, "*-*.json")), key=_chunk_order)

    def chunk(self, name: str) -> ChunkRecord | None:
        """A finished chunk as it is written; None if it is not finished."""
        return self._read(f"attempts/{name}.json", ChunkRecord, what="chunk of a run")

    def write_chunk(self, name: str, record: ChunkRecord) -> None:
        """Finish a chunk: from here on it is never done again."""
        self._write(f"attempts/{name}.json", record, what="the finished chunk")

    def verdicts(self) -> dict[int, Verdict] | None:
        """Those of a filter that compares the pairs of a round, by the index of the prompt; None if there are none yet."""
        record = self._read("verdicts.json", VerdictsRecord, what="record of verdicts")
        return None if record is None else {item.prompt_index: item.verdict for item in record.verdicts}

    def write_verdicts(self, verdicts: Mapping[int, Verdict]) -> None:
        """Keep the verdicts of the end of the round."""
        record = VerdictsRecord(tuple(VerdictRecord(index, verdict) for index, verdict in verdicts.items()))
        self._write("verdicts.json", record, what="the verdicts of the round")

    def comparison(self) -> ComparisonRecord | None:
        """The comparison of the round with the one before; None if none was made."""
        return self._read("comparison.json", ComparisonRecord, what="comparison of a round")

    def write_comparison(self, record: ComparisonRecord) -> None:
        """Keep the comparison of the round with the one before."""
        self._write("comparison.json", record, what="the comparison of the round")

    @property
    def is_finished(self) -> bool:
        """Whether the round has its result."""
        return (self.path / "result.safetensors").exists()

    def result(self) -> tuple[ResultRecord, LoRA, LoRA] | None:
        """The numbers of the round, what was learned in it, and all rounds up to it combined; None if it is not finished."""
        path = self.path / "result.safetensors"
        if not self.is_finished:
            return None
        with open_sealed(path, what="result of a round", remedy=_DAMAGED) as file:
            tensors = {name: file.read(name).clone() for name in file.names}
            record = from_json(ResultRecord, file.metadata["result"])
        return record, lora_from_tensors(tensors, "learned"), lora_from_tensors(tensors, "combined")

    def write_result(self, record: ResultRecord, *, learned: LoRA, combined: LoRA) -> None:
        """Finish the round."""
        try:
            combined.save(self.path / "lora.safetensors")
        except LoRAError as error:  # of a family whose key map only its owner knows
            _log.warning("%s: the LoRA of the round is in result.safetensors only: %s", self.path, error)
        tensors = lora_to_tensors("learned", learned) | lora_to_tensors("combined", combined)
        with atomic_write(self.path / "result.safetensors", what="the result of the round", remedy=_REMEDY) as partial:
            save_sealed(tensors, partial, {"result": to_json(record)})

    def remove_checkpoints(self) -> None:
        """Remove the states of a training that is finished."""
        for folder in self.path.glob("checkpoints-*"):
            shutil.rmtree(folder, ignore_errors=True)

    def _read(self, name: str, of: type[T], *, what: str) -> T | None:
        try:
            return read_segment(self.path / name, of, what=what, remedy=_DAMAGED)
        except FileNotFoundError:
            return None

    def _write(self, name: str, record: object, *, what: str) -> None:
        write_segment(self.path / name, record, what=what, remedy=_REMEDY)


def _chunk_order(name: str) -> tuple[int, bool, int]:
    """Of ``3-00012`` or ``3-again-00001``: by group, those that were asked again last, by place."""
    group, *again, place = name.split("-")
    return int(group), bool(again), int(place)


class FolderJournal(RoundJournal):
    """Keeps a round in its folder. One thread writes the pictures of a call, while the next ones are drawn."""

    call_limit: int | None = None
    writes_behind: bool = True

    def __init__(self, folder: RoundFolder) -> None:
        self._folder = folder
        self.images: ImageFolder | None = folder.images
        self.writer: ThreadPoolExecutor = ThreadPoolExecutor(1, thread_name_prefix="artaug-store")

    def finished(self, name: str) -> Chunk | None:
        record = self._folder.chunk(name)
        if record is None:
            return None
        if record.calls:
            self.call_limit = record.calls[-1].limit
        shutil.rmtree(self._folder.path / "work" / name, ignore_errors=True)  # left by a kill between both
        return record.to_chunk(self._folder.images)

    def begin(self, name: str) -> ChunkJournal:
        return _ChunkFolder(self, self._folder, name)

    def verdicts(self) -> Mapping[int, Verdict] | None:
        return self._folder.verdicts()

    def add_verdicts(self, verdicts: Mapping[int, Verdict]) -> None:
        self._folder.write_verdicts(verdicts)

    def close(self) -> None:
        self.writer.shutdown()


class _Drawn(NamedTuple):
    """A picture of the chunk under way, and what it was drawn from."""

    plan: str
    file: ImageFile


class _ChunkFolder(ChunkJournal):
    """The chunk under way: a file for each call of the synthesizer and each answer of the critic."""

    def __init__(self, journal: FolderJournal, folder: RoundFolder, name: str) -> None:
        self._journal = journal
        self._folder = folder
        self._name = name
        self._path = folder.path / "work" / name
        try:
            self._path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(
                f"the folder of the chunk under way, {self._path}, could not be made: {error}. {_REMEDY}"
            ) from error
        self._calls: list[CallRecord] = []
        self._drawn: dict[tuple[str, Member], _Drawn] = {}
        self._pending: Future[None] | None = None
        self._read_calls()

    def drawn(self, stage: DrawingStage, plans: Mapping[Member, Plan]) -> Mapping[Member, Image]:
        kept = ((member, plan_digest(plan), self._drawn.get((stage, member))) for member, plan in plans.items())
        # An answer that was lost is asked for anew, and its plan may be another one.
        return {member: drawn.file.load() for member, plan, drawn in kept if drawn is not None and drawn.plan == plan}

    def answers(self) -> Mapping[Member, Critique | Abstention]:
        answers = {}
        for file in sorted(self._path.glob("answer-*.json")):
            record = self._read(file, AnswerRecord)
            if record is not None:
                answers[Member(record.prompt_index, record.candidate)] = record.answer
        return answers

    def add_call(
        self, stage: DrawingStage, plans: Mapping[Member, Plan], images: Sequence[Picture], *, limit: int | None
    ) -> None:
        self._settle()
        path, threads = self._call_path(len(self._calls)), torch.get_num_threads()

        def write() -> None:
            canvases = [plan.canvas for plan in plans.values() if plan.canvas is not None]
            pictures = [*images, *(picture for canvas in canvases for picture in canvas.pictures)]
            files = self._folder.images.add_all(pictures)[: len(images)]
            record = CallRecord(
                stage,
                tuple((member.prompt_index, member.candidate) for member in plans),
                tuple(map(plan_digest, plans.values())),
                tuple(map(image_digest, files)),
                limit,
                threads,
            )
            write_provisional(path, record, what=_UNDER_WAY, remedy=_REMEDY)
            self._note_call(record, files)

        # After a kill, the pictures that were being written are drawn again: the call is not on record.
        self._pending = self._journal.writer.submit(write)
        self._journal.call_limit = limit

    def _settle(self) -> None:
        """Wait until the call before is written.

        Raises:
            StorageError: if it could not be.
        """
        if self._pending is not None:
            self._pending.result()
            self._pending = None

    def add_answer(self, member: Member, answer: Critique | Abstention) -> None:
        path = self._path / f"answer-{member.prompt_index}-{member.candidate}.json"
        write_provisional(path, AnswerRecord(*member, answer), what=_UNDER_WAY, remedy=_REMEDY)

    def finish(self, chunk: Chunk) -> Chunk:
        self._settle()
        candidates = {member: self._by_reference(candidate) for member, candidate in chunk.candidates.items()}
        chunk = replace(chunk, candidates=candidates)
        self._folder.write_chunk(self._name, ChunkRecord.of(chunk, self._calls))
        shutil.rmtree(self._path, ignore_errors=True)
        return chunk

    def _by_reference(self, candidate: Candidate) -> Candidate:
        before, after = (self._drawn.get((stage, candidate.member)) for stage in ("draw", "redraw"))
        plan = candidate.plan
        if plan is not None:
            # What was drawn has its canvas in the folder already.
            images = self._folder.images
            plan = plan.stored_in(images) if after is None else plan.found_in(images)
        return replace(
            candidate,
            plan=plan,
            before=candidate.before if before is None else before.file,
            after=candidate.after if after is None or candidate.after is None else after.file,
        )

    def _read_calls(self) -> None:
        """Read the calls and look at their pictures: one that is damaged did not happen, and none after it."""
        while (path := self._call_path(len(self._calls))).exists():
            record = self._read(path, CallRecord)
            if record is None:
                break
            try:
                files = [self._folder.images.get(digest) for digest in record.images]
                for file in files:
                    file.load()
            except StorageError as error:
                _log.warning("a drawing call of the chunk under way is made again: %s", error)
                break
            self._note_call(record, files)
            self._journal.call_limit = record.limit
        for path in self._path.glob("call-*.json"):
            if path not in {self._call_path(number) for number in range(len(self._calls))}:
                path.unlink(missing_ok=True)

    def _note_call(self, record: CallRecord, files: Sequence[ImageFile]) -> None:
        self._calls.append(record)
        for member, plan, file in zip(record.members, record.plans, files, strict=True):
            self._drawn[record.stage, Member(*member)] = _Drawn(plan, file)

    def _call_path(self, number: int) -> Path:
        return self._path / f"call-{number:05d}.json"

    def _read(self, path: Path, of: type[T]) -> T | None:
        """A file of the chunk; None for one that a power failure has damaged."""
        try:
            return read_segment(path, of, what="file of the chunk under way", remedy="It is made again.")
        except StorageError as error:
            _log.warning("%s", error)
            return None
