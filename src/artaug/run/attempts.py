"""The attempts of a round that is on disk: read when they are looked at, one chunk at a time."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from typing import final, overload

from artaug.errors import StorageError
from artaug.pairs import Attempt
from artaug.run.records import Chunk, End
from artaug.run.round_folder import RoundFolder


@final
@dataclass(frozen=True)
class StoredAttempts(Sequence[Attempt]):
    """The attempts of a finished round, in the order in which `improve` gives them; pairs hold their pictures by reference.

    Iterating reads one file after the other and keeps none. An index reads all files before it.
    """

    folder: RoundFolder

    def __len__(self) -> int:
        groups = self.folder.groups()
        return 0 if groups is None else groups[-1]

    def __iter__(self) -> Iterator[Attempt]:
        return (attempt for _, attempt in read_attempts(self.folder))

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

    Raises:
        StorageError: if a file is damaged.
    """
    waiting: list[tuple[Chunk, End]] = []
    for _, names in groupby(folder.chunk_names(), key=lambda name: name.partition("-")[0]):
        for chunk, end in _ends_of_group(folder, list(names)):
            if end.verdict is None and not end.reason:
                waiting.append((chunk, end))
            else:
                yield end.prompt_index, chunk.attempt(end)
    verdicts = folder.verdicts() or {}
    for chunk, end in waiting:
        if end.prompt_index in verdicts:  # otherwise the round is under way
            yield end.prompt_index, chunk.attempt(end, verdicts[end.prompt_index])


def _ends_of_group(folder: RoundFolder, names: Sequence[str]) -> Iterator[tuple[Chunk, End]]:
    """How the prompts of a group ended: those that were put off last, by the last time that their critic was asked."""
    again = [name for name in names if "again" in name]
    asked_again = {end.prompt_index for name in again for end in _read(folder, name).ends}
    left: list[tuple[Chunk, End]] = []
    for name in names:
        chunk = _read(folder, name)
        for end in chunk.ends:
            if not end.transient or name in again:
                yield chunk, end
            elif end.prompt_index not in asked_again:
                left.append((chunk, end))
    yield from left


def _read(folder: RoundFolder, name: str) -> Chunk:
    record = folder.chunk(name)
    if record is None:
        raise StorageError(f"the chunk {name} of {folder.path} is gone, while it was read. Read again.")
    return record.to_chunk(folder.images)
