"""The stages of a round: draw, critique, plan, redraw, judge, chunk by chunk. Every prompt ends as one attempt.

What a stage has made is handed to a journal at once, and what the journal has is not made again: a run without a store goes
through the same lines as one that is resumed.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from artaug._internal.memory import FittingBatches
from artaug.errors import StorageError
from artaug.pairs import Attempt, Verdict
from artaug.run.chunk_run import ChunkRun, Lanes, is_answered, note_unplanned
from artaug.run.events import AttemptEvent, StageClock
from artaug.run.flow import Steps, chunks_under_way, run_in_order
from artaug.run.judging import Judging
from artaug.run.parts import LoopParts
from artaug.run.silence import Silence
from artaug.run.storage.journal import RoundJournal
from artaug.run.storage.records import Candidate, Chunk, End, Member
from artaug.synthesis import attempt_seed


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
        """Bring chunks through all stages, and yield them in their order.

        Several are under way at once where that costs nothing: while another thread writes the last pictures of a chunk,
        or a server answers about them, the next one is drawn.

        Args:
            prompts: of the round.
            chunks: of each, its name, the indices of its prompts, and the candidates of prompts that were put off: what
                they have is not made again.
        """
        with Lanes.opened(self.parts.synthesizer, self.parts.critic) as lanes:
            tasks = (self._chunk(lanes, prompts, name, indices, known) for name, indices, known in chunks)
            depth = chunks_under_way(
                drawing=self.parts.synthesizer.max_concurrency,
                asking=self.parts.critic.max_concurrency,
                writes_behind=self.journal.writes_behind,
            )
            yield from run_in_order(tasks, depth=depth, poll=self.poll)

    def _chunk(
        self,
        lanes: Lanes,
        prompts: Sequence[str],
        name: str,
        indices: Sequence[int],
        known: Mapping[Member, Candidate],
    ) -> Steps[Chunk]:
        """The task that makes one chunk, or reads it if it is finished."""
        finished = self.journal.finished(name)
        if finished is not None:
            _check_prompts_of(finished, name, indices)
            self._report_resumed(finished, known)
            return finished
        # The first candidate of every prompt is drawn first, then the second of every prompt, and so on.
        seeds = {
            Member(index, candidate): attempt_seed(
                self.seed, round_number=self.clock.round_number, prompt_index=index, candidate=candidate
            )
            for candidate in range(self.parts.candidate_count)
            for index in indices
        }
        run = ChunkRun(
            parts=self.parts,
            clock=self.clock,
            judging=self.judging,
            batches=self.batches,
            silence=self.silence,
            lanes=lanes,
            poll=self.poll,
            round_journal=self.journal,
            journal=self.journal.begin(name),
            prompts={index: prompts[index] for index in indices},
            seeds=seeds,
            known=known,
        )
        return (yield from run.steps())

    def _report(self, chunk: Chunk, end: End, verdict: Verdict | None = None) -> Attempt:
        attempt = chunk.attempt(end, verdict)
        self.clock.emit(
            AttemptEvent(round_number=self.clock.round_number, prompt_index=end.prompt_index, attempt=attempt)
        )
        return attempt

    def _report_resumed(self, chunk: Chunk, known: Mapping[Member, Candidate]) -> None:
        """Report a chunk that was finished before, without what it had from another chunk, and count the time it took."""
        self.clock.add_seconds(chunk.seconds)
        candidates = chunk.candidates
        answers = {member: candidate.answer for member, candidate in candidates.items()}
        note_unplanned(self.clock, {member: candidate.plan for member, candidate in candidates.items()}, answers, known)
        self.clock.resume("draw", len(candidates.keys() - known.keys()))
        answered = sum(is_answered(candidate) for candidate in candidates.values())
        self.clock.resume("critique", answered - sum(map(is_answered, known.values())))
        redrawn = sum(candidate.plan is not None for candidate in candidates.values())  # or could not be
        self.clock.resume("redraw", redrawn - sum(candidate.plan is not None for candidate in known.values()))
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


def _slices(indices: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    return (indices[start : start + size] for start in range(0, len(indices), size))
