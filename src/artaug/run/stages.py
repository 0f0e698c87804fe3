"""The stages of a round: draw, critique, plan, redraw, judge, chunk by chunk. Every prompt ends as one attempt.

What a stage has made is handed to a journal at once, and what the journal has is not made again: a run without a store goes
through the same lines as one that is resumed.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from PIL.Image import Image

from artaug._internal.images import as_rgb
from artaug._internal.memory import FittingBatches
from artaug.critique import Abstention, Answer, stream_critic
from artaug.errors import StorageError
from artaug.pairs import Attempt, Verdict
from artaug.plan import Plan, run_planner
from artaug.run.events import AttemptEvent, StageClock
from artaug.run.judging import Judging
from artaug.run.parts import LoopParts
from artaug.run.silence import Silence
from artaug.run.storage.journal import ChunkJournal, RoundJournal
from artaug.run.storage.records import Candidate, Chunk, DrawingStage, End, Member, Picture, load_picture
from artaug.synthesis import attempt_seed, draw_in_calls


@dataclass(frozen=True)
class _Begun:
    """A chunk whose first pictures are drawn."""

    indices: Sequence[int]
    """Of its prompts."""
    known: Mapping[Member, Candidate]
    seeds: Mapping[Member, int]
    """Of all its members, in their order."""
    before: Mapping[Member, Picture]
    journal: ChunkJournal
    start_s: Mapping[str, float]
    """What the clock's stages had taken before it."""


@dataclass(frozen=True)
class _UnderWay:
    """A chunk that went through all stages; its last pictures may not be written yet."""

    journal: ChunkJournal
    chunk: Chunk

    def finish(self) -> Chunk:
        return self.journal.finish(self.chunk)


@dataclass(frozen=True)
class RoundStages:
    """The stages of one round."""

    parts: LoopParts
    journal: RoundJournal
    clock: StageClock
    seed: int
    """Of the run."""
    batches: FittingBatches
    """How many pictures a call of the synthesizer has; halved where memory runs out."""
    poll: Callable[[], None]
    """Called where a run can stop without losing anything; raises to stop it."""
    silence: Silence = field(default_factory=Silence)

    @property
    def judging(self) -> Judging:
        """The last of the stages."""
        return Judging(self.parts, self.journal, self.clock)

    def attempts(self, prompts: Sequence[str], *, groups: Sequence[int]) -> Iterator[Attempt]:
        """Bring each prompt to its one attempt; those whose critic failed for a while come last.

        Args:
            prompts: of the round.
            groups: the numbers of prompts that the run was called with, the last one all of them: prompts that came later
                make chunks of their own.
        """
        pictures = groups[-1] * self.parts.candidate_count
        self.clock.begin({"draw": pictures, "critique": pictures, "redraw": pictures, "judge": groups[-1]})
        try:
            yield from self._attempts(prompts, groups)
        finally:
            self.journal.close()

    def _attempts(self, prompts: Sequence[str], groups: Sequence[int]) -> Iterator[Attempt]:
        waiting: list[tuple[Chunk, End]] = []  # pairs for a filter that compares them all
        for chunk, end in self._ends(prompts, groups):
            if end.verdict is None and not end.reason:
                waiting.append((chunk, end))
            else:
                yield self._report(chunk, end)
        verdicts = self.judging.judge_waiting(waiting)
        for chunk, end in waiting:
            yield self._report(chunk, end, verdicts[end.prompt_index])

    def _ends(self, prompts: Sequence[str], groups: Sequence[int]) -> Iterator[tuple[Chunk, End]]:
        """How each prompt ends, group after group, and in each those that were put off last."""
        start, chunk_size = 0, self.parts.prompts_per_chunk
        for number, stop in enumerate(groups):
            put_off: dict[int, tuple[Chunk, End]] = {}
            slices = enumerate(_slices(range(start, stop), chunk_size))
            for chunk in self._run_chunks(
                prompts, ((f"{number}-{place:05d}", indices, {}) for place, indices in slices)
            ):
                for end in chunk.ends:
                    if end.transient:
                        put_off[end.prompt_index] = (chunk, end)
                    else:
                        yield chunk, end
                if self.silence.is_long:
                    raise self.silence.error(self.parts.critic)
            for place, indices in enumerate(_slices(list(put_off), chunk_size)):
                name = f"{number}-again-{place:05d}"
                if self.silence.is_long and self.journal.finished(name) is None:
                    # After a long silence here, the round is complete but for these: they are left as they are.
                    yield from (put_off[index] for index in indices)
                    continue
                known = {
                    member: candidate
                    for index in indices
                    for member, candidate in put_off[index][0].candidates.items()
                    if member.prompt_index == index
                }
                for chunk in self._run_chunks(prompts, [(name, indices, known)]):
                    yield from ((chunk, end) for end in chunk.ends)
            start = stop

    def _run_chunks(
        self, prompts: Sequence[str], chunks: Iterable[tuple[str, Sequence[int], Mapping[Member, Candidate]]]
    ) -> Iterator[Chunk]:
        """Bring chunks through all stages, one after the other.

        The pictures that a store writes are many megabytes. So a chunk is finished when the first ones of the next chunk
        are drawn: until then they are written by another thread.

        Args:
            prompts: of the round.
            chunks: of each, its name, the indices of its prompts, and the candidates of prompts that were put off: what
                they have is not made again.
        """
        written: _UnderWay | None = None
        for name, indices, known in chunks:
            finished = self.journal.finished(name)
            if finished is not None:
                _check_prompts_of(finished, name, indices)
            else:
                try:
                    begun = self._begin_chunk(name, prompts, indices, known)
                finally:  # also if that raises: all of the chunk before is done
                    done = None if written is None else written.finish()
                if done is not None:
                    yield done
                written = self._judge_chunk(begun, prompts)
                if self.journal.writes_behind:
                    continue
            if written is not None:
                yield written.finish()
                written = None
            if finished is not None:
                self._report_resumed(finished, known)
                yield finished
        if written is not None:
            yield written.finish()

    def _begin_chunk(
        self, name: str, prompts: Sequence[str], indices: Sequence[int], known: Mapping[Member, Candidate]
    ) -> "_Begun":
        """Draw the first candidate of every prompt, then the second of every prompt, and so on."""
        self.poll()
        start_s = dict(self.clock.seconds)
        seeds = {
            Member(index, candidate): attempt_seed(
                self.seed, round_number=self.clock.round_number, prompt_index=index, candidate=candidate
            )
            for candidate in range(self.parts.candidate_count)
            for index in indices
        }
        journal = self.journal.begin(name)
        before: dict[Member, Picture] = {member: candidate.before for member, candidate in known.items()}
        fresh = {member: Plan(prompts[member.prompt_index]) for member in seeds if member not in before}
        before |= self._draw("draw", fresh, seeds, journal)
        return _Begun(indices, known, seeds, before, journal, start_s)

    def _judge_chunk(self, begun: "_Begun", prompts: Sequence[str]) -> "_UnderWay":
        """Critique, plan, redraw and judge."""
        candidates = self._make_candidates(begun, prompts)
        ends = self.judging.judge(list(candidates.values()), begun.indices)
        seconds = {stage: total - begun.start_s.get(stage, 0.0) for stage, total in self.clock.seconds.items()}
        return _UnderWay(begun.journal, Chunk(candidates, ends, seconds))

    def _make_candidates(self, begun: "_Begun", prompts: Sequence[str]) -> dict[Member, Candidate]:
        """Critique, plan and redraw."""
        known, journal, members = begun.known, begun.journal, list(begun.seeds)
        answers = {
            member: candidate.answer for member, candidate in known.items() if not _is_transient(candidate.answer)
        }
        asked = {member: begun.before[member] for member in members if member not in answers}
        answers |= self._critique(asked, prompts, journal)
        plans = {member: self._plan(prompts[member.prompt_index], answers[member]) for member in members}
        after = {member: candidate.after for member, candidate in known.items() if candidate.after is not None}
        changes = {member: plan for member, plan in plans.items() if plan is not None and member not in after}
        self._note_unplanned(plans, answers, known)
        after |= self._draw("redraw", changes, begun.seeds, journal)
        return {
            member: Candidate(
                member,
                prompts[member.prompt_index],
                begun.seeds[member],
                begun.before[member],
                answers[member],
                plans[member],
                after.get(member),
            )
            for member in members
        }

    def _draw(
        self, stage: DrawingStage, plans: Mapping[Member, Plan], seeds: Mapping[Member, int], journal: ChunkJournal
    ) -> dict[Member, Image]:
        """Draw what is not drawn yet, one call of the synthesizer after the other."""
        drawn = dict(journal.drawn(stage, plans))
        missing = [member for member in plans if member not in drawn]
        self.clock.resume(stage, len(drawn))
        if not missing:
            return drawn
        if self.journal.call_limit is not None:
            self.batches.largest = min(self.journal.call_limit, self.parts.batch_size)
        with self.clock.stage(stage, len(missing)), self.parts.placement.stage(self.parts.synthesizer):
            calls = draw_in_calls(
                self.parts.synthesizer,
                [plans[member] for member in missing],
                seeds=[seeds[member] for member in missing],
                batches=self.batches,
            )
            for call in calls:
                members = [missing[index] for index in call.members]
                images = [image if image.mode == "RGB" else as_rgb(image) for image in call.images]  # as it is stored
                largest = self.batches.largest
                journal.add_call(
                    stage,
                    {member: plans[member] for member in members},
                    images,
                    limit=largest if largest < self.parts.batch_size else None,
                )
                drawn.update(zip(members, images, strict=True))
                self.clock.progress(stage, len(members))
                self.poll()
        return drawn

    def _critique(
        self, pictures: Mapping[Member, Picture], prompts: Sequence[str], journal: ChunkJournal
    ) -> dict[Member, Answer]:
        """Ask the critic about what it has not answered yet, and keep each answer as it comes."""
        answers = {member: answer for member, answer in journal.answers().items() if member in pictures}
        missing = [member for member in pictures if member not in answers]
        self.clock.resume("critique", len(answers))
        if not missing:
            return answers
        start_s = time.monotonic()
        with self.clock.stage("critique", len(missing)), self.parts.placement.stage(self.parts.critic):
            images = [load_picture(pictures[member]) for member in missing]
            asked = [prompts[member.prompt_index] for member in missing]
            for index, answer in stream_critic(self.parts.critic, images, asked):
                answers[missing[index]] = answer
                if not _is_transient(answer):
                    journal.add_answer(missing[index], answer)
                    self.clock.progress("critique", 1)
                self.poll()
        self.silence.note([answers[member] for member in missing], start_s=start_s)
        return answers

    def _plan(self, prompt: str, answer: Answer) -> Plan | None:
        """The plan for a prompt; None where the critic abstained, or nothing would change."""
        if isinstance(answer, Abstention):
            return None
        plan = run_planner(self.parts.planner, prompt, answer)
        return None if plan == Plan(prompt) else plan

    def _report(self, chunk: Chunk, end: End, verdict: Verdict | None = None) -> Attempt:
        attempt = chunk.attempt(end, verdict)
        self.clock.emit(
            AttemptEvent(round_number=self.clock.round_number, prompt_index=end.prompt_index, attempt=attempt)
        )
        return attempt

    def _note_unplanned(
        self,
        plans: Mapping[Member, Plan | None],
        answers: Mapping[Member, Answer],
        known: Mapping[Member, Candidate],
    ) -> None:
        """Take what was answered and will not be redrawn out of the redraws to come."""
        self.clock.totals["redraw"] -= sum(
            plan is None and not _is_transient(answers[member]) and not _is_answered(known.get(member))
            for member, plan in plans.items()
        )

    def _report_resumed(self, chunk: Chunk, known: Mapping[Member, Candidate]) -> None:
        """Report a chunk that was finished before, without what it had from another chunk, and count the time it took."""
        self.clock.add_seconds(chunk.seconds)
        candidates = chunk.candidates
        answers = {member: candidate.answer for member, candidate in candidates.items()}
        self._note_unplanned({member: candidate.plan for member, candidate in candidates.items()}, answers, known)
        self.clock.resume("draw", len(candidates.keys() - known.keys()))
        answered = sum(_is_answered(candidate) for candidate in candidates.values())
        self.clock.resume("critique", answered - sum(map(_is_answered, known.values())))
        redrawn = sum(candidate.after is not None for candidate in candidates.values())
        self.clock.resume("redraw", redrawn - sum(candidate.after is not None for candidate in known.values()))
        decided = [end for end in chunk.ends if end.reason or end.verdict is not None]
        self.clock.resume("judge", sum(not end.transient for end in decided))


def _check_prompts_of(chunk: Chunk, name: str, indices: Sequence[int]) -> None:
    """Refuse a chunk of other prompts than those that are to be in it now: some would be there twice, and some not at all."""
    held = [end.prompt_index for end in chunk.ends]
    if held != list(indices):
        raise StorageError(
            f"the chunk {name} on disk has {len(held)} prompts, from number {held[0] if held else 0} on, and this call makes "
            f"it of {len(indices)}, from number {indices[0]} on. Restore the folder of the run from a copy, or take another one."
        )


def _is_answered(candidate: Candidate | None) -> bool:
    return candidate is not None and not _is_transient(candidate.answer)


def _is_transient(answer: Answer) -> bool:
    return isinstance(answer, Abstention) and answer.transient


def _slices(indices: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    return (indices[start : start + size] for start in range(0, len(indices), size))
