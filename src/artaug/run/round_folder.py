"""The folder of one round: finished chunks, the chunk under way, and the round's result."""

import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeVar

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
from artaug.run.journal import ChunkJournal, RoundJournal
from artaug.run.records import (
    AnswerRecord,
    CallRecord,
    Candidate,
    Chunk,
    ChunkRecord,
    DrawingStage,
    Member,
    VerdictRecord,
    VerdictsRecord,
)
from artaug.training.state import lora_from_tensors, lora_to_tensors

_log = logging.getLogger(__name__)
T = TypeVar("T")

_REMEDY = "What the run has finished is complete: run the same call to go on once the folder can be written to."
_DAMAGED = "Restore it from a copy, or delete it, and what it holds is made again."


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
        record = self._read("round.json", RoundRecord, what="record of a round")
        return None if record is None else record.groups

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
        chunks = (name.removesuffix(".json") for name in names if fnmatchcase(name, "*-*.json"))
        return sorted(chunks, key=lambda name: (int(name.partition("-")[0]), name))

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


class FolderJournal(RoundJournal):
    """Keeps a round in its folder. One thread writes the pictures of a call, while the next ones are drawn."""

    writes_behind = True

    def __init__(self, folder: RoundFolder) -> None:
        self._folder = folder
        self.writer = ThreadPoolExecutor(1, thread_name_prefix="artaug-store")

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
        self._calls = [record for _, record in self._read_all("call", CallRecord)]
        self._files: dict[tuple[str, Member], ImageFile] = {}
        self._kept: dict[tuple[str, Member], Image] = {}
        self._pending: Future[None] | None = None
        self._load_pictures()

    def drawn(self, stage: DrawingStage) -> Mapping[Member, Image]:
        return {member: image for (made_in, member), image in self._kept.items() if made_in == stage}

    def answers(self) -> Mapping[Member, Critique | Abstention]:
        records = (record for _, record in self._read_all("answer", AnswerRecord))
        return {Member(record.prompt_index, record.candidate): record.answer for record in records}

    def add_call(self, stage: DrawingStage, members: Sequence[Member], images: Sequence[Image], *, limit: int) -> None:
        self._settle()
        number, threads = len(self._calls), torch.get_num_threads()

        def write() -> None:
            files = self._folder.images.add_all(images)
            record = CallRecord(
                stage,
                tuple((member.prompt_index, member.candidate) for member in members),
                tuple(map(image_digest, files)),
                images[0].size,
                limit,
                threads,
            )
            self._write(f"call-{number:05d}", record)
            self._calls.append(record)
            self._files.update({(stage, member): file for member, file in zip(members, files, strict=True)})

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
        self._write(f"answer-{member.prompt_index}-{member.candidate}", AnswerRecord(*member, answer))

    def finish(self, chunk: Chunk) -> Chunk:
        self._settle()
        candidates = {member: self._by_reference(candidate) for member, candidate in chunk.candidates.items()}
        chunk = replace(chunk, candidates=candidates)
        self._folder.write_chunk(self._name, ChunkRecord.of(chunk, self._calls))
        shutil.rmtree(self._path, ignore_errors=True)
        return chunk

    def _by_reference(self, candidate: Candidate) -> Candidate:
        before = self._files.get(("draw", candidate.member), candidate.before)
        return replace(candidate, before=before, after=self._files.get(("redraw", candidate.member), candidate.after))

    def _load_pictures(self) -> None:
        """Read the pictures of the chunk; a call with one that is damaged did not happen, and none after it."""
        for place, call in enumerate(self._calls):
            members = [Member(*member) for member in call.members]
            files = [self._folder.images.get(digest, size=call.size) for digest in call.images]
            try:
                images = [file.load() for file in files]
            except StorageError as error:
                _log.warning("a drawing call of the chunk under way is done again: %s", error)
                for later in range(place, len(self._calls)):
                    (self._path / f"call-{later:05d}.json").unlink(missing_ok=True)
                del self._calls[place:]
                return
            self._files.update({(call.stage, member): file for member, file in zip(members, files, strict=True)})
            self._kept.update({(call.stage, member): image for member, image in zip(members, images, strict=True)})
            self._journal.call_limit = call.limit

    def _read_all(self, kind: str, of: type[T]) -> Iterator[tuple[str, T]]:
        """The files of a kind, in the order of their names; after a power failure the last ones may be damaged."""
        for file in sorted(self._path.glob(f"{kind}-*.json")):
            try:
                yield file.name, read_segment(file, of, what="file of the chunk under way", remedy="It is made again.")
            except StorageError as error:
                _log.warning("%s", error)
                if kind == "call":
                    return

    def _write(self, name: str, record: object) -> None:
        write_provisional(self._path / f"{name}.json", record, what="the chunk under way", remedy=_REMEDY)
