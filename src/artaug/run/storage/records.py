"""What a run keeps of its prompts: candidates with their pictures, how each prompt ended, and both as they are written."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal, NamedTuple, TypeAlias

from PIL.Image import Image
from pydantic import Field

from artaug._internal.values import value
from artaug.critique import Abstention, Critique
from artaug.image_files import ImageFile, ImageFolder, image_digest
from artaug.pairs import Attempt, Dropped, ImagePair, Kept, Skipped, Verdict
from artaug.plan import Plan

Picture: TypeAlias = Image | ImageFile
"""In memory, or on disk."""
DrawingStage: TypeAlias = Literal["draw", "redraw"]


def load_picture(picture: Picture) -> Image:
    """The picture, from memory or from disk."""
    return picture.load() if isinstance(picture, ImageFile) else picture


StoredAnswer: TypeAlias = Annotated[Critique | Abstention, Field(union_mode="left_to_right")]
"""Their fields have no name in common, so the first that fits is it; trying both takes a sixth of the time to read a run."""


class Member(NamedTuple):
    """Which picture of a round: the key of all that is kept about it."""

    prompt_index: int
    """The prompt's place in the list, from 0."""
    candidate: int
    """From 0, see `BestOf`."""


@dataclass(frozen=True)
class Candidate:
    """One picture of one prompt that went through the stages."""

    member: Member
    prompt: str
    seed: int
    before: Picture | None
    """None where it could not be drawn."""
    answer: Critique | Abstention
    plan: Plan | None
    """None where the critic abstained, or nothing would change."""
    after: Picture | None
    """None where there is no plan, or where it could not be drawn."""
    undrawn: str = ""
    """Why a picture of it could not be drawn."""

    def outcome(self) -> ImagePair | Skipped:
        """The pair, or why there is none."""
        if self.undrawn or self.before is None:
            return Skipped(self.prompt, self.seed, self.undrawn, "draw")
        if isinstance(self.answer, Abstention):
            reason = f"the critic abstained: {self.answer.reason}"
            return Skipped(self.prompt, self.seed, reason, "critique", self.answer.transient)
        if self.plan is None or self.after is None:
            why = "the planner kept no suggestion" if self.answer.suggestions else "the critic suggested nothing"
            return Skipped(self.prompt, self.seed, why, "plan")
        return ImagePair(prompt=self.prompt, seed=self.seed, before=self.before, after=self.after, plan=self.plan)


@value
class End:
    """How a prompt ended: the verdict on the pair of one candidate, or why it was skipped."""

    prompt_index: int
    candidate: int
    """That was chosen; of a prompt that was skipped, the one that came furthest."""
    verdict: Verdict | None = None
    """None for a prompt that was skipped, and for a pair that waits for the end of the round to be judged."""
    reason: str = ""
    """Why it was skipped; empty for a pair."""
    stage: Literal["draw", "critique", "plan"] = "critique"
    """Where it was skipped."""
    transient: bool = False
    """Whether the critic may answer later."""


@dataclass(frozen=True)
class Chunk:
    """Prompts that went through the stages together."""

    candidates: Mapping[Member, Candidate]
    ends: Sequence[End]
    """One for each prompt, in their order."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """By stage, of this chunk."""

    def attempt(self, end: End, verdict: Verdict | None = None) -> Attempt:
        """The attempt of a prompt of this chunk; ``verdict`` for a pair that was judged at the end of the round."""
        return attempt_of(self.candidates[Member(end.prompt_index, end.candidate)], end, verdict or end.verdict)


def attempt_of(candidate: Candidate, end: End, verdict: Verdict | None) -> Attempt:
    """The attempt of a prompt, from the candidate that was chosen for it."""
    outcome = candidate.outcome()
    if verdict is None or isinstance(outcome, Skipped):
        return Skipped(candidate.prompt, candidate.seed, end.reason, end.stage, end.transient)
    return Kept(outcome, verdict) if verdict.keep else Dropped(outcome, verdict)


@value
class CallRecord:
    """One call of the synthesizer: which pictures were drawn together, since that decides their last bits."""

    stage: DrawingStage
    members: tuple[tuple[int, int], ...]
    """In their order in the call."""
    plans: tuple[str, ...]
    """The digests of what they were drawn from, see `artaug.plan.plan_digest`."""
    images: tuple[str, ...]
    """The digests of their pictures."""
    limit: int | None
    """The most pictures that a call had room for, if memory had run out before."""
    threads: int
    """Of torch, on the CPU."""


@value
class AnswerRecord:
    """An answer of the critic, while its chunk is under way."""

    prompt_index: int
    candidate: int
    answer: StoredAnswer


@value
class CandidateRecord:
    """A `Candidate` with the digests of its pictures."""

    prompt_index: int
    candidate: int
    prompt: str
    seed: int
    before: str | None
    answer: StoredAnswer
    plan: Plan | None
    after: str | None
    size: tuple[int, int]
    """Width and height of both pictures; zeros if there is none."""
    undrawn: str = ""

    @classmethod
    def of(cls, candidate: Candidate) -> "CandidateRecord":
        """Of a candidate whose pictures are on disk."""
        return cls(
            *candidate.member,
            candidate.prompt,
            candidate.seed,
            None if candidate.before is None else image_digest(candidate.before),
            candidate.answer,
            candidate.plan,
            None if candidate.after is None else image_digest(candidate.after),
            (0, 0) if candidate.before is None else candidate.before.size,
            candidate.undrawn,
        )

    def to_candidate(self, images: ImageFolder) -> Candidate:
        """The candidate, with references to its pictures."""
        return Candidate(
            Member(self.prompt_index, self.candidate),
            self.prompt,
            self.seed,
            None if self.before is None else images.get(self.before, size=self.size),
            self.answer,
            None if self.plan is None else self.plan.found_in(images),
            None if self.after is None else images.get(self.after, size=self.size),
            self.undrawn,
        )


@value
class ChunkRecord:
    """A `Chunk` as it is written."""

    candidates: tuple[CandidateRecord, ...]
    ends: tuple[End, ...]
    calls: tuple[CallRecord, ...]
    seconds: dict[str, float]

    @classmethod
    def of(cls, chunk: Chunk, calls: Sequence[CallRecord]) -> "ChunkRecord":
        """Of a chunk whose pictures are on disk."""
        candidates = tuple(map(CandidateRecord.of, chunk.candidates.values()))
        return cls(candidates, tuple(chunk.ends), tuple(calls), dict(chunk.seconds))

    def to_chunk(self, images: ImageFolder) -> Chunk:
        """The chunk, with references to its pictures."""
        candidates = (record.to_candidate(images) for record in self.candidates)
        return Chunk({candidate.member: candidate for candidate in candidates}, self.ends, self.seconds)


@value
class VerdictRecord:
    """The verdict on a pair that was judged at the end of its round."""

    prompt_index: int
    verdict: Verdict


@value
class VerdictsRecord:
    """The verdicts of a filter that compares the pairs of a round."""

    verdicts: tuple[VerdictRecord, ...]
