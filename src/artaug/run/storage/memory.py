"""The journal of a run without a store: pictures stay in memory while they are few, others go to a temporary folder."""

import logging
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from PIL.Image import Image

from artaug.critique import Abstention, Critique
from artaug.image_files import ImageFile, ImageFolder
from artaug.pairs import Verdict
from artaug.plan import Plan
from artaug.run.storage.journal import ChunkJournal, RoundJournal
from artaug.run.storage.records import Candidate, Chunk, DrawingStage, Member, Picture

_log = logging.getLogger(__name__)

_BUDGET = 256 * 2**20
"""Bytes of pictures in memory, beside those of the chunk under way."""
_BYTES_PER_PIXEL = 4
"""PIL keeps RGB in four bytes."""


class PictureMemory:
    """Holds the pictures of attempts: in memory up to a budget, and from there on in a temporary folder.

    Only pictures that somebody still holds count. The folder goes when the last picture of it does.
    """

    def __init__(self, budget: int = _BUDGET) -> None:
        self._budget = budget
        self._held = 0
        self._counted: set[int] = set()
        self._folder: _TemporaryFolder | None = None

    def keep(self, picture: Picture) -> Picture:
        """The same picture, where it stays."""
        if isinstance(picture, ImageFile) or id(picture) in self._counted:
            return picture
        size = picture.width * picture.height * _BYTES_PER_PIXEL
        if self._held + size > self._budget:
            return self._to_disk(picture)
        self._held += size
        self._counted.add(id(picture))
        weakref.finalize(picture, self._release, id(picture), size)
        return picture

    def _release(self, counted: int, size: int) -> None:
        self._held -= size
        self._counted.discard(counted)

    def _to_disk(self, picture: Image) -> ImageFile:
        if self._folder is None:
            self._folder = _TemporaryFolder()
            _log.info(
                "more than %d MiB of pictures: the others are in %s as long as they are used. With store='runs/first' a run "
                "keeps everything in a folder of its own.",
                *(self._budget // 2**20, self._folder.path),
            )
        file = ImageFolder(self._folder.path).add(picture)
        weakref.finalize(file, _keep_alive, self._folder)
        return file


class _TemporaryFolder:
    """Goes when nothing refers to it, without a word: Python's own warns of that."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="artaug-"))
        weakref.finalize(self, _remove, self.path, os.getpid())


def _remove(folder: Path, owner: int) -> None:
    if os.getpid() == owner:  # a forked child that ends leaves it to its parent
        shutil.rmtree(folder, ignore_errors=True)


def _keep_alive(folder: _TemporaryFolder) -> None:
    """Hold a temporary folder."""


class MemoryJournal(RoundJournal):
    """Remembers what the stages need, and nothing after the end of the process."""

    def __init__(self, memory: PictureMemory) -> None:
        self._memory = memory

    def begin(self, name: str) -> ChunkJournal:
        return _MemoryChunk(self, self._memory)

    def add_verdicts(self, verdicts: Mapping[int, Verdict]) -> None:
        pass


class _MemoryChunk(ChunkJournal):
    def __init__(self, round_journal: RoundJournal, memory: PictureMemory) -> None:
        self._round = round_journal
        self._memory = memory

    def add_call(
        self, stage: DrawingStage, plans: Mapping[Member, Plan], images: Sequence[Picture], *, limit: int | None
    ) -> None:
        self._round.call_limit = limit

    def add_answer(self, member: Member, answer: Critique | Abstention) -> None:
        pass

    def finish(self, chunk: Chunk) -> Chunk:
        """Keep the pictures of the candidates that were chosen, and of the prompts that are put off."""
        return replace(chunk, candidates=dict(self._kept(chunk)))

    def _kept(self, chunk: Chunk) -> Iterator[tuple[Member, Candidate]]:
        put_off = {end.prompt_index for end in chunk.ends if end.transient}
        chosen = {Member(end.prompt_index, end.candidate): end for end in chunk.ends}
        for member, candidate in chunk.candidates.items():
            if member.prompt_index in put_off or (member in chosen and not chosen[member].reason):
                after = None if candidate.after is None else self._memory.keep(candidate.after)
                before = None if candidate.before is None else self._memory.keep(candidate.before)
                plan = candidate.plan
                if plan is not None and plan.canvas is not None:
                    pictures = [self._memory.keep(picture) for picture in plan.canvas.pictures]
                    plan = replace(plan, canvas=plan.canvas.holding(pictures))
                yield member, replace(candidate, before=before, after=after, plan=plan)
            elif member in chosen:
                yield member, candidate
