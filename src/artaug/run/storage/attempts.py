"""The attempts and candidates of a round that is on disk: read when they are looked at, one chunk at a time."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from typing import final, overload

from artaug.errors import StorageError
from artaug.pairs import Attempt, Verdict
from artaug.run.storage.records import Candidate, ChunkRecord, End, attempt_of
from artaug.run.storage.round_folder import RoundFolder


@final
@dataclass(frozen=True)
class StoredAttempts(Sequence[Attempt]):
    """The attempts of a finished round, in the order in which `improve` gives them; pairs hold their pictures by reference.

    Iterating reads one file after the other and keeps none. An index reads all files before it. A file that is damaged or
    gone is a `StorageError`.
    """

    folder: RoundFolder
    whole: bool = True
    """Whether all have ended, so that one that is missing is an error; not so of a round under way."""

    def __len__(self) -> int:
        groups = self.folder.groups()
        return 0 if groups is None else groups[-1]

    def __iter__(self) -> Iterator[Attempt]:
        count = 0
        for _, attempt in read_attempts(self.folder):
            count += 1
            yield attempt
        if self.whole and count < len(self):
            raise StorageError(
                f"{self.folder.path} has {count} attempts of {len(self)}: files are gone, of its folder attempts or its "
                "verdicts.json. Put back a copy, or delete its result.safetensors, if there is one, and make the same call "
                "again: it makes what is missing, and trains again."
            )

    @overload
    def __getitem__(self, index: int) -> Attempt: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Attempt]: ...
    def __getitem__(self, index: int | slice) -> Attempt | Sequence[Attempt]:
        places = range(len(self))[index]
        if isinstance(places, range):
            wanted = set(places)
            by_place = {place: attempt for place, attempt in enumerate(self) if place in wanted}
            return tuple(by_place[place] for place in places)
        return next(islice(iter(self), places, None))

    def __repr__(self) -> str:
        return f"<{len(self)} attempts in {str(self.folder.path)!r}>"


def read_attempts(folder: RoundFolder) -> Iterator[tuple[int, Attempt]]:
    """The attempts that a round has so far, each with the index of its prompt.

    Those that wait for the verdicts of the end of the round come last, and are read a second time rather than held.

    Raises:
        StorageError: if a file is damaged.
    """
    waiting: list[str] = []
    for name, chunk, ends in _final_ends(folder):
        judged = [end for end in ends if end.verdict is not None or end.reason]
        yield from _attempts(folder, chunk, [(end, end.verdict) for end in judged])
        if len(judged) < len(ends):
            waiting.append(name)
    if not waiting:
        return
    verdicts = folder.verdicts() or {}  # without them, the round is under way
    for name in waiting:
        chunk = _read(folder, name)
        ends = [end for end in chunk.ends if end.prompt_index in verdicts and not end.reason]
        yield from _attempts(folder, chunk, [(end, verdicts[end.prompt_index]) for end in ends])


def read_candidates(folder: RoundFolder) -> Iterator[Candidate]:
    """All candidates that a round has so far, those that were not chosen among them.

    Raises:
        StorageError: if a file is damaged.
    """
    for _, chunk, ends in _final_ends(folder):
        indices = {end.prompt_index for end in ends}
        for record in chunk.candidates:
            if record.prompt_index in indices:
                yield record.to_candidate(folder.images)


def _final_ends(folder: RoundFolder) -> Iterator[tuple[str, ChunkRecord, Sequence[End]]]:
    """Each chunk, by name, with the ends of its prompts that hold.

    A prompt that was put off ended when its critic was asked again, which is in a chunk of its own; if that has not been yet, it
    comes after the others of its group.
    """
    for _, group in groupby(folder.chunk_names(), key=lambda name: name.partition("-")[0]):
        names = list(group)
        again = [name for name in names if "again" in name]
        asked_again = {end.prompt_index for name in again for end in _read(folder, name).ends}
        left: list[str] = []
        for name in names:
            chunk = _read(folder, name)
            yield name, chunk, [end for end in chunk.ends if not end.transient or name in again]
            if name not in again and any(end.transient and end.prompt_index not in asked_again for end in chunk.ends):
                left.append(name)
        for name in left:
            chunk = _read(folder, name)
            ends = [end for end in chunk.ends if end.transient and end.prompt_index not in asked_again]
            yield name, chunk, ends


def _attempts(
    folder: RoundFolder, chunk: ChunkRecord, ends: Sequence[tuple[End, Verdict | None]]
) -> Iterator[tuple[int, Attempt]]:
    records = {(record.prompt_index, record.candidate): record for record in chunk.candidates}
    for end, verdict in ends:
        candidate = records[end.prompt_index, end.candidate].to_candidate(folder.images)
        yield end.prompt_index, attempt_of(candidate, end, verdict)


def _read(folder: RoundFolder, name: str) -> ChunkRecord:
    chunk = folder.chunk(name)
    if chunk is None:
        raise StorageError(f"the chunk {name} of {folder.path} is gone, while it was read. Read again.")
    return chunk
