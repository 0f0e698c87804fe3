"""One call of `improve` or `enhance` while it runs: its folder, if it has one, locked, and when it is to stop."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from artaug.errors import InvalidValueError, StorageError
from artaug.identity import identity_of
from artaug.pairs import Attempt
from artaug.run.interruption import GracefulStop
from artaug.run.parts import LearningParts, LoopParts
from artaug.run.storage.attempts import StoredAttempts
from artaug.run.storage.journal import RoundJournal
from artaug.run.storage.lock import RunLock
from artaug.run.storage.memory import MemoryJournal, PictureMemory
from artaug.run.storage.metadata import METADATA, write_metadata
from artaug.run.storage.round_folder import RoundFolder
from artaug.run.storage.store import RunCall, RunFolder, Store, describe_call
from artaug.training.distributed import World


@dataclass(frozen=True)
class RunSession:
    """What the stages of a call keep their results in."""

    folder: RunFolder | None
    """None for a run in memory."""
    poll: Callable[[], None]
    """Raises if the run is to stop."""
    _memory: PictureMemory = field(default_factory=PictureMemory)

    def journal(self, number: int) -> RoundJournal:
        """Where the chunks of a round are kept."""
        return MemoryJournal(self._memory) if self.folder is None else self.folder.round(number).journal()

    def groups(self, number: int, prompts: Sequence[str]) -> tuple[int, ...]:
        """The numbers of prompts that a round has had, the last one all of it; see `RunFolder.groups`."""
        return (len(prompts),) if self.folder is None else self.folder.groups(number, len(prompts))

    def round_folder(self, number: int) -> RoundFolder | None:
        """The folder of a round, if there is a store."""
        return None if self.folder is None else self.folder.round(number)

    def collected(self, number: int, attempts: Iterator[Attempt]) -> Sequence[Attempt]:
        """All attempts of a round: in memory, or read from its folder when they are looked at."""
        if self.folder is None:
            return tuple(attempts)
        for _ in attempts:
            pass
        write_metadata(self.folder)  # before hours of training
        return StoredAttempts(self.folder.round(number))


@contextmanager
def open_session(
    function: str,
    prompts: Sequence[str],
    parts: LoopParts,
    learning: LearningParts | None = None,
    *,
    seed: int,
    store: Store | None,
    stop: GracefulStop | None = None,
) -> Iterator[RunSession]:
    """Open the folder of a run for one call, for a ``with`` block.

    Args:
        function: that was called.
        prompts: of the run.
        parts: that draw and judge.
        learning: that learn, in `enhance`.
        seed: of the run.
        store: its folder; None to hold it in memory.
        stop: asked at safe points whether a signal has come.

    Raises:
        StorageError: if another process runs in the folder, or it belongs to a run with other arguments.
    """
    if store is None:
        yield RunSession(None, poll=lambda: _stop_if_requested(stop, "It has no store, so its pictures are not kept."))
        return
    folder, call = check_store(store, function, prompts, parts, learning, seed=seed)
    folder.make()
    with RunLock(folder.path, take_over=store.take_over) as lock, _damage_explained(folder):
        # Again, since another process may have run here between the check at the door and the lock.
        folder.check(call, prompts, allow=store.allow)
        folder.begin(call)

        def poll() -> None:
            lock.check()
            _stop_if_requested(stop, f"All that was finished is in {folder.path}: make the same call again to go on.")

        yield RunSession(folder, poll=poll)
        if function == "improve" or not (folder.path / METADATA).exists():  # `enhance` writes it round by round
            write_metadata(folder)


@contextmanager
def _damage_explained(folder: RunFolder) -> Iterator[None]:
    """Add to an error of a picture of the run which chunk it belongs to, and how that is made again."""
    try:
        yield
    except StorageError as error:
        for path in folder.segments_naming(str(error)):
            error.add_note(
                f"The picture belongs to {path}. Without a copy of it, delete that file: the same call draws the prompts of "
                "this chunk again, and asks the critic again."
            )
        raise


def _stop_if_requested(stop: GracefulStop | None, kept: str) -> None:
    if stop is not None:
        stop.raise_if_requested(kept)


def check_store(
    store: Store,
    function: str,
    prompts: Sequence[str],
    parts: LoopParts,
    learning: LearningParts | None,
    *,
    seed: int,
) -> tuple[RunFolder, RunCall]:
    """Refuse a store that this call would not go on in; nothing is written.

    Raises:
        StorageError: see `RunFolder.check`.
        InvalidValueError: for a part that nothing distinguishes from another one.
    """
    processes = World.current().size
    if processes > 1:
        raise InvalidValueError(
            f"{function} with a store runs in one process, and this is one of {processes}. Draw and judge in one process, and "
            "train in several with DifferentialLoRATrainer.train, or leave the store out."
        )
    folder = RunFolder(Path(store.folder))
    call = describe_call(call_settings(function, parts, learning, seed=seed), prompts)
    folder.check(call, prompts, allow=store.allow)
    return folder, call


def call_settings(function: str, parts: LoopParts, learning: LearningParts | None, *, seed: int) -> Mapping[str, str]:
    """All arguments of a call that may decide its result, by dotted name.

    Raises:
        InvalidValueError: for a part that nothing distinguishes from another one.
    """
    settings: dict[str, object] = {
        "function": function,
        "seed": seed,
        "batch_size": parts.batch_size,
        "chunk_size": parts.prompts_per_chunk,
        "synthesizer": parts.synthesizer,
        "critic": parts.critic,
        "planner": parts.planner,
        "keep": parts.keep,
        "candidates": parts.candidates,
    }
    if learning is not None:
        settings |= {
            # These two change the memory that a training takes, not its result.
            "trainer": replace(learning.trainer, micro_batch_size=None, gradient_checkpointing=False),
            "fuser": learning.fuser,
            "rounds": learning.rounds,
            "validation": learning.validation,
            "stop": learning.stop,
        }
    return {name: text for key, value in settings.items() for name, text in identity_of(value, key).items()}
