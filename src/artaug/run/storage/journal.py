"""What a round remembers of its chunks: the seam between the stages and where their results are kept."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

from PIL.Image import Image

from artaug.critique import Abstention, Critique
from artaug.image_files import ImageFolder
from artaug.pairs import Verdict
from artaug.plan import Plan
from artaug.run.storage.records import Chunk, DrawingStage, Member, Picture


class ChunkJournal(ABC):
    """What is kept of the chunk under way, as it comes."""

    def drawn(self, stage: DrawingStage, plans: Mapping[Member, Plan]) -> Mapping[Member, Image]:
        """The pictures of these plans that are kept already, by member; one of another plan is none of them."""
        return {}

    def answers(self) -> Mapping[Member, Critique | Abstention]:
        """The critic's answers that are kept already, by member."""
        return {}

    @abstractmethod
    def add_call(
        self, stage: DrawingStage, plans: Mapping[Member, Plan], images: Sequence[Picture], *, limit: int | None
    ) -> None:
        """Keep the pictures of one call of the synthesizer, one for each plan, in their order.

        They may be written behind: an error of the one call is then raised by the next, or by `finish`. ``limit`` is the
        most pictures that a call has room for, if memory has run out.
        """

    @abstractmethod
    def add_answer(self, member: Member, answer: Critique | Abstention) -> None:
        """Keep one answer of the critic."""

    @abstractmethod
    def finish(self, chunk: Chunk) -> Chunk:
        """Keep the whole chunk: the same, with its pictures where they stay."""


class RoundJournal(ABC):
    """What is kept of a round."""

    call_limit: int | None = None
    """The most pictures that a call of the synthesizer has room for, if this round has run out of memory."""
    images: ImageFolder | None = None
    """Where its pictures are, for those that write them elsewhere; None if it holds them in memory."""
    writes_behind: bool = False
    """Whether pictures are still being written when `ChunkJournal.add_call` returns; `ChunkJournal.finish` waits for them."""

    def finished(self, name: str) -> Chunk | None:
        """The chunk of this name, if it is finished."""
        return None

    @abstractmethod
    def begin(self, name: str) -> ChunkJournal:
        """Begin a chunk, or go on with it."""

    def verdicts(self) -> Mapping[int, Verdict] | None:
        """Those of the end of the round by the index of the prompt, if they are kept."""
        return None

    @abstractmethod
    def add_verdicts(self, verdicts: Mapping[int, Verdict]) -> None:
        """Keep the verdicts of the end of the round."""

    def close(self) -> None:  # noqa: B027 - most have nothing to wait for
        """Wait for what is still being written, whatever ended the round."""
