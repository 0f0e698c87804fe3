"""The stages of a round: draw, critique, plan, redraw, judge, chunk by chunk. Every prompt ends as one attempt.

What a stage has made is handed to a journal at once, and what the journal has is not made again: a run without a store goes
through the same lines as one that is resumed.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from PIL.Image import Image

from artaug.critique import Abstention, Critic, Critique, stream_critic
from artaug.errors import CriticError
from artaug.filtering import judge_pairs
from artaug.image_files import ImageFile
from artaug.pairs import Attempt, ImagePair, Skipped, Verdict
from artaug.plan import Plan, run_planner
from artaug.run.events import AttemptEvent, ProgressEvent, Stage, StageClock
from artaug.run.journal import ChunkJournal, RoundJournal
from artaug.run.parts import LoopParts
from artaug.run.records import Candidate, Chunk, DrawingStage, End, Member, Picture
from artaug.synthesis import attempt_seed, draw_in_calls

_MAX_SILENCE_S, _MANY_PICTURES = 600.0, 8
"""A critic that has not answered for so long, at so many pictures in a row, stops the run: the prompts to come would all be
drawn for nothing."""


@dataclass
class Silence:
    """How long, and at how many pictures in a row, a critic has had transient faults only."""

    since_s: float = 0.0
    pictures: int = 0
    reason: str = ""

    def note(self, answers: Sequence[Critique | Abstention], *, start_s: float) -> None:
        """Note the answers of a call that began at ``start_s``."""
        faults = [answer.reason for answer in answers if isinstance(answer, Abstention) and answer.transient]
        if len(faults) < len(answers):
            self.pictures = 0
            return
        if not faults:
            return
        if not self.pictures:
            self.since_s = start_s
        self.pictures += len(faults)
        self.reason = faults[-1]

    @property
    def is_long(self) -> bool:
        """Whether the critic, or its server, is probably down: one picture alone may be what it fails at."""
        return self.pictures >= _MANY_PICTURES and time.monotonic() - self.since_s >= _MAX_SILENCE_S

    def error(self, critic: Critic) -> CriticError:
        """The error that ends the run."""
        return CriticError(
            f"{type(critic).__name__} has not answered for {(time.monotonic() - self.since_s) / 60:.0f} minutes, at "
            f"{self.pictures} pictures in a row; the last time, {self.reason}. Make sure that its server runs, then run the "
            "same call to go on: what is in the run's store, or in the folder of artaug.critics.Cached, is not asked again."
        )


@dataclass(frozen=True)
class RoundStages:
    """The stages of one round."""

    parts: LoopParts
    journal: RoundJournal
    clock: StageClock
    seed: int
    """Of the run."""
    batch_size: int
    """The most pictures in a call of the synthesizer."""
    poll: Callable[[], None]
    """Called where a run can stop without losing anything; raises to stop it."""
    silence: Silence = field(default_factory=Silence)

    def attempts(self, prompts: Sequence[str], groups: Sequence[int], *, chunk_size: int) -> Iterator[Attempt]:
        """Bring each prompt to its one attempt; those whose critic failed for a while come last.

        Args:
            prompts: of the round.
            groups: the numbers of prompts that the run was called with, the last one all of them: prompts that came later
                make chunks of their own.
            chunk_size: prompts in a chunk.
        """
        waiting: list[tuple[Chunk, End]] = []  # pairs for a filter that compares them all
        for chunk, end in self._ends(prompts, groups, chunk_size):
            if end.verdict is None and not end.reason:
                waiting.append((chunk, end))
            else:
                yield self._report(chunk, end)
        verdicts = self._judge_waiting(waiting)
        for chunk, end in waiting:
            yield self._report(chunk, end, verdicts[end.prompt_index])

    def _ends(self, prompts: Sequence[str], groups: Sequence[int], chunk_size: int) -> Iterator[tuple[Chunk, End]]:
        """How each prompt ends, group after group, and in each those that were put off last."""
        start = 0
        for number, stop in enumerate(groups):
            put_off: dict[int, tuple[Chunk, End]] = {}
            for place, indices in enumerate(_slices(range(start, stop), chunk_size)):
                chunk = self._run_chunk(f"{number}-{place:05d}", self._candidates(prompts, indices))
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
                candidates = [
                    _ask_again(candidate)
                    for index in indices
                    for candidate in put_off[index][0].candidates.values()
                    if candidate.member.prompt_index == index
                ]
                chunk = self._run_chunk(name, candidates)
                yield from ((chunk, end) for end in chunk.ends)
            start = stop

    def _candidates(self, prompts: Sequence[str], indices: Sequence[int]) -> list[Candidate]:
        """The first candidate of every prompt, then the second of every prompt, and so on."""
        count = 1 if self.parts.candidates is None else self.parts.candidates.count
        return [
            Candidate(
                Member(index, candidate),
                prompts[index],
                attempt_seed(
                    self.seed, round_number=self.clock.round_number, prompt_index=index, candidate=candidate
                ),
            )
            for candidate in range(count)
            for index in indices
        ]

    def _run_chunk(self, name: str, candidates: Sequence[Candidate]) -> Chunk:
        """Bring the candidates of some prompts through all stages, one stage after the other."""
        finished = self.journal.finished(name)
        if finished is not None:
            for stage, count in (("draw", len(candidates)), ("critique", len(candidates)), ("judge", len(finished.ends))):
                self._progress(stage, count, resumed=True)
            return finished
        self.poll()
        journal = self.journal.begin(name)
        start_s = dict(self.clock.seconds)
        self._draw("draw", [(each, Plan(each.prompt)) for each in candidates if each.before is None], journal)
        self._critique(candidates, journal)
        for candidate in candidates:
            if isinstance(candidate.answer, Critique):
                plan = run_planner(self.parts.planner, candidate.prompt, candidate.answer)
                candidate.plan = None if plan == Plan(candidate.prompt) else plan
        changes = [(each, each.plan) for each in candidates if each.plan is not None and each.after is None]
        self._draw("redraw", changes, journal)
        ends = self._judge(candidates)
        seconds = {stage: total - start_s.get(stage, 0.0) for stage, total in self.clock.seconds.items()}
        return journal.finish(Chunk({candidate.member: candidate for candidate in candidates}, ends, seconds))

    def _draw(
        self, stage: DrawingStage, wanted: Sequence[tuple[Candidate, Plan]], journal: ChunkJournal
    ) -> None:
        """Draw what is not drawn yet, one call of the synthesizer after the other."""
        drawn = dict(journal.drawn(stage))
        missing = [(candidate, plan) for candidate, plan in wanted if candidate.member not in drawn]
        self._progress(stage, len(wanted) - len(missing), resumed=True)
        with self.clock.stage(stage, len(missing)):
            plans, seeds = [plan for _, plan in missing], [candidate.seed for candidate, _ in missing]
            limit = min(self.batch_size, self.journal.call_limit or self.batch_size)
            for call in draw_in_calls(self.parts.synthesizer, plans, seeds=seeds, limit=limit):
                members = [missing[index][0].member for index in call.indices]
                journal.add_call(stage, members, call.images, limit=call.limit)
                drawn.update(zip(members, call.images, strict=True))
                self._progress(stage, len(members))
                self.poll()
        for candidate, _ in wanted:
            setattr(candidate, "before" if stage == "draw" else "after", drawn[candidate.member])

    def _critique(self, candidates: Sequence[Candidate], journal: ChunkJournal) -> None:
        """Ask the critic about what it has not answered yet, and keep each answer as it comes."""
        kept = journal.answers()
        for candidate in candidates:
            candidate.answer = kept.get(candidate.member, candidate.answer)
        missing = [candidate for candidate in candidates if candidate.answer is None]
        self._progress("critique", len(candidates) - len(missing), resumed=True)
        if not missing:
            return
        start_s = time.monotonic()
        with self.clock.stage("critique", len(missing)):
            images = [load(candidate.before) for candidate in missing]
            for index, answer in stream_critic(self.parts.critic, images, [each.prompt for each in missing]):
                missing[index].answer = answer
                if not (isinstance(answer, Abstention) and answer.transient):
                    journal.add_answer(missing[index].member, answer)
                self._progress("critique", 1)
                self.poll()
        self.silence.note([each.answer for each in missing if each.answer is not None], start_s=start_s)

    def _judge(self, candidates: Sequence[Candidate]) -> list[End]:
        """How each prompt of a chunk ends; without a verdict for a pair whose filter compares the pairs of a round."""
        outcomes = [candidate.outcome() for candidate in candidates]
        members = {id(outcome): candidate.member for outcome, candidate in zip(outcomes, candidates, strict=True)}
        seeds = {(candidate.member.prompt_index, candidate.seed): candidate.member for candidate in candidates}
        prompts = list(dict.fromkeys(candidate.member.prompt_index for candidate in candidates))
        # A prompt waits for all its candidates: the best of those that happened to be answered is not the best of all.
        waiting = {
            candidate.member.prompt_index: outcome
            for outcome, candidate in zip(outcomes, candidates, strict=True)
            if isinstance(outcome, Skipped) and outcome.transient
        }
        outcomes = [
            waiting.get(candidate.member.prompt_index, outcome)
            for outcome, candidate in zip(outcomes, candidates, strict=True)
        ]
        with self.clock.stage("judge", len(prompts)):
            if self.parts.candidates is not None:
                outcomes = self.parts.candidates.choose(outcomes, prompts=len(prompts))
            verdicts = iter(self._judge_now([outcome for outcome in outcomes if isinstance(outcome, ImagePair)]))
        ends = []
        for prompt_index, outcome in zip(prompts, outcomes, strict=True):
            if isinstance(outcome, ImagePair):
                ends.append(End(prompt_index, members[id(outcome)].candidate, next(verdicts)))
            else:
                chosen = seeds[prompt_index, outcome.seed].candidate
                ends.append(
                    End(prompt_index, chosen, None, outcome.reason, outcome.stage, outcome.transient)
                )
        self._progress("judge", len(prompts))
        return ends

    def _judge_now(self, pairs: Sequence[ImagePair]) -> list[Verdict | None]:
        if self.parts.keep.compares_pairs:
            return [None] * len(pairs)
        return [self._annotate(verdict) for verdict in judge_pairs(self.parts.keep, pairs)]

    def _judge_waiting(self, waiting: Sequence[tuple[Chunk, End]]) -> Mapping[int, Verdict]:
        """The verdicts of a filter that compares the pairs of a round, by the index of the prompt."""
        kept = self.journal.verdicts()
        indices = [end.prompt_index for _, end in waiting]
        if kept is not None and set(kept) == set(indices):
            return kept
        pairs = []
        for chunk, end in waiting:
            pair = chunk.candidates[Member(end.prompt_index, end.candidate)].outcome()
            assert isinstance(pair, ImagePair)
            pairs.append(pair)
        with self.clock.stage("judge", len(pairs)):
            verdicts = dict(zip(indices, map(self._annotate, judge_pairs(self.parts.keep, pairs)), strict=True))
        self.journal.add_verdicts(verdicts)
        return verdicts

    def _annotate(self, verdict: Verdict) -> Verdict:
        return verdict if self.parts.candidates is None else self.parts.candidates.annotate(verdict)

    def _report(self, chunk: Chunk, end: End, verdict: Verdict | None = None) -> Attempt:
        attempt = chunk.attempt(end, verdict)
        self.clock.emit(
            AttemptEvent(round_number=self.clock.round_number, prompt_index=end.prompt_index, attempt=attempt)
        )
        return attempt

    def _progress(self, stage: Stage, count: int, *, resumed: bool = False) -> None:
        if count:
            self.clock.emit(
                ProgressEvent(round_number=self.clock.round_number, stage=stage, count=count, resumed=resumed)
            )


def load(picture: Picture | None) -> Image:
    """The picture, from memory or from disk."""
    assert picture is not None
    return picture.load() if isinstance(picture, ImageFile) else picture


def _ask_again(candidate: Candidate) -> Candidate:
    """The candidate with what it has, but without the critic's answer where that was a transient fault."""
    answer = candidate.answer
    return replace(candidate, answer=None if isinstance(answer, Abstention) and answer.transient else answer)


def _slices(indices: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    return (indices[start : start + size] for start in range(0, len(indices), size))
