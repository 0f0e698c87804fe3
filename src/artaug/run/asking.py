"""Asking the critic about the pictures of a chunk: in this thread, or in another one while this one draws."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from threading import Lock
from typing import NamedTuple

from PIL.Image import Image

from artaug._internal.lanes import Lane
from artaug.critique import Abstention, Answer, Critic, stream_critic
from artaug.image_files import LoadedImages
from artaug.run.flow import Steps
from artaug.run.storage.journal import ChunkJournal
from artaug.run.storage.records import Member, Picture


class Arrival(NamedTuple):
    """An answer that came."""

    member: Member
    answer: Answer
    seconds: float
    """Since the answer before it."""


@dataclass
class Asking:
    """The questions of one chunk; each answer is kept by the thread that has it, as it comes."""

    critic: Critic
    members: Sequence[Member]
    pictures: Sequence[Picture]
    prompts: Sequence[str]
    journal: ChunkJournal
    now_s: Callable[[], float]
    _lock: Lock = field(default_factory=Lock)
    _arrived: deque[Arrival] = field(default_factory=deque)
    _awaited: "Future[None] | None" = None
    _stopped: bool = False

    def here(self) -> Iterator[Arrival]:
        """Ask in this thread."""
        return self._ask([*LoadedImages(self.pictures)])

    def there(self, lane: Lane, on_answer: Callable[[Arrival], None]) -> Steps[None]:
        """Ask in a thread of a lane; ``on_answer`` is called in this one."""
        asked = lane.submit(self._collect)
        asked.add_done_callback(lambda _: self._notify())
        try:
            while not asked.done() or self._arrived:
                yield self._next(asked)
                while self._arrived:
                    on_answer(self._arrived.popleft())
            asked.result()
        finally:  # nothing is kept after the end of a run, whose folder may be another one's by then
            with self._lock:
                self._stopped = True
            asked.cancel()

    def _ask(self, images: Sequence[Image]) -> Iterator[Arrival]:
        last_s = self.now_s()
        for index, answer in stream_critic(self.critic, images, self.prompts):
            with self._lock:
                if self._stopped:
                    return
                if not is_transient(answer):
                    self.journal.add_answer(self.members[index], answer)
            now_s = self.now_s()
            yield Arrival(self.members[index], answer, now_s - last_s)
            last_s = now_s

    def _collect(self) -> None:
        for arrival in self._ask(LoadedImages(self.pictures)):
            self._arrived.append(arrival)
            self._notify()

    def _next(self, asked: "Future[None]") -> "Future[None]":
        """A future that is done when an answer has come, or the last one has."""
        future: Future[None] = Future()
        with self._lock:
            self._awaited = future
        if self._arrived or asked.done():  # since the caller has looked
            self._notify()
        return future

    def _notify(self) -> None:
        with self._lock:
            awaited, self._awaited = self._awaited, None
        if awaited is not None:
            awaited.set_result(None)


def is_transient(answer: Answer) -> bool:
    """Whether the critic may answer later."""
    return isinstance(answer, Abstention) and answer.transient
