"""One chunk of prompts on its way through the stages: draw, critique, plan, redraw, judge."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

from PIL.Image import Image

from artaug._internal.images import as_rgb
from artaug._internal.lanes import Lane
from artaug._internal.memory import FittingBatches
from artaug.critique import Abstention, Answer, Critic
from artaug.plan import Plan, check_storable, run_planner
from artaug.run.asking import Arrival, Asking, is_transient
from artaug.run.events import RoundStage, StageClock
from artaug.run.flow import GiveWay, Steps
from artaug.run.judging import Judging
from artaug.run.parts import LoopParts
from artaug.run.silence import Silence
from artaug.run.storage.journal import ChunkJournal, RoundJournal
from artaug.run.storage.records import Candidate, Chunk, DrawingStage, Member, Picture
from artaug.synthesis import DrawingCall, Synthesizer, Undrawn, draw_in_calls

_STAGES: tuple[RoundStage, ...] = ("draw", "critique", "redraw", "judge")


@dataclass(frozen=True)
class Lanes:
    """The threads of the parts that compute elsewhere; None for a part that this thread calls itself."""

    draw: Lane | None
    critique: Lane | None

    @classmethod
    @contextmanager
    def opened(cls, synthesizer: Synthesizer, critic: Critic) -> Iterator["Lanes"]:
        """The lanes of two parts, for a ``with`` block."""
        drawing, asking = synthesizer.max_concurrency, critic.max_concurrency
        with ExitStack() as stack:
            yield cls(
                stack.enter_context(Lane(drawing, name="draw")) if drawing else None,
                stack.enter_context(Lane(asking, name="critique")) if asking else None,
            )


@dataclass(frozen=True)
class ChunkRun:
    """What a chunk needs on its way. Of the fields, the first are shared with the other chunks of the round."""

    parts: LoopParts
    clock: StageClock
    judging: Judging
    batches: FittingBatches
    silence: Silence
    lanes: Lanes
    poll: Callable[[], None]
    round_journal: RoundJournal
    journal: ChunkJournal
    prompts: Mapping[int, str]
    """By index, those of this chunk, in their order."""
    seeds: Mapping[Member, int]
    """Of all its members, in their order."""
    known: Mapping[Member, Candidate]
    """Candidates of prompts that were put off: what they have is not made again."""
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(_STAGES, 0.0))
    """By stage, what this chunk has taken."""
    undrawn: dict[Member, str] = field(default_factory=dict)
    """Why pictures could not be drawn."""

    def steps(self) -> Steps[Chunk]:
        """All stages: a task of `artaug.run.flow`."""
        self.poll()
        before = {member: made.before for member, made in self.known.items() if made.before is not None}
        fresh = {member: Plan(self.prompts[member.prompt_index]) for member in self.seeds if member not in before}
        before |= yield from self._draw("draw", fresh)
        yield GiveWay.OLDER
        answers = {member: made.answer for member, made in self.known.items() if not is_transient(made.answer)}
        asked = {member: before[member] for member in self.seeds if member in before and member not in answers}
        answers |= yield from self._critique(asked)
        self.clock.totals["critique"] -= len(self.undrawn)
        answers |= {member: Abstention(f"there is no picture of it: {why}") for member, why in self.undrawn.items()}
        plans = {member: self._plan(member, answers[member], before.get(member)) for member in self.seeds}
        after = {member: made.after for member, made in self.known.items() if made.after is not None}
        changes = {member: plan for member, plan in plans.items() if plan is not None and member not in after}
        note_unplanned(self.clock, plans, answers, self.known)
        after |= yield from self._draw("redraw", changes)
        candidates = {
            member: Candidate(
                member,
                self.prompts[member.prompt_index],
                seed,
                before.get(member),
                answers[member],
                plans[member],
                after.get(member),
                self.undrawn.get(member, ""),
            )
            for member, seed in self.seeds.items()
        }
        start_s = self.clock.now_s()
        ends = self.judging.judge(list(candidates.values()), list(self.prompts))
        self._end("judge", seconds=self.clock.now_s() - start_s, count=len(self.prompts))
        chunk = Chunk(candidates, ends, dict(self.seconds))
        try:
            if self.round_journal.writes_behind:
                yield GiveWay.NEXT  # whose first pictures are drawn while the last of this one are written
        finally:  # also if another chunk raises: all of this one is done
            chunk = self.journal.finish(chunk)
        return chunk

    def _draw(self, stage: DrawingStage, plans: Mapping[Member, Plan]) -> Steps[dict[Member, Picture]]:
        """Draw what is not drawn yet; what cannot be is noted."""
        drawn: dict[Member, Picture] = dict(self.journal.drawn(stage, plans))
        missing = [member for member in plans if member not in drawn]
        self.clock.resume(stage, len(drawn))
        if not missing:
            return drawn
        if self.round_journal.call_limit is not None:
            self.batches.largest = min(self.round_journal.call_limit, self.parts.batch_size)
        if self.lanes.draw is None:
            drawn |= self._draw_here(stage, missing, plans)
        else:
            drawn |= yield from self._draw_there(stage, missing, plans, self.lanes.draw)
        return drawn

    def _draw_here(
        self, stage: DrawingStage, missing: Sequence[Member], plans: Mapping[Member, Plan]
    ) -> dict[Member, Picture]:
        """Draw in this thread, one call of the synthesizer after the other."""
        drawn: dict[Member, Picture] = {}
        last_s = start_s = self.clock.now_s()
        with self.parts.placement.stage(self.parts.synthesizer):
            calls = draw_in_calls(
                self.parts.synthesizer,
                [plans[member] for member in missing],
                seeds=[self.seeds[member] for member in missing],
                batches=self.batches,
            )
            for call in calls:
                drawn |= self._keep_call(stage, [missing[index] for index in call.members], plans, call)
                now_s = self.clock.now_s()
                self.clock.progress(stage, len(call.members), seconds=now_s - last_s)
                last_s = now_s
                self.poll()
        self._end(stage, seconds=self.clock.now_s() - start_s, count=len(missing))
        return drawn

    def _draw_there(
        self, stage: DrawingStage, missing: Sequence[Member], plans: Mapping[Member, Plan], lane: Lane
    ) -> Steps[dict[Member, Picture]]:
        """Draw where the synthesizer computes: all calls are on their way at once, each in a thread that waits for it."""
        drawn: dict[Member, Picture] = {}
        size = self.batches.largest
        parts = [missing[start : start + size] for start in range(0, len(missing), size)]

        def call(members: Sequence[Member]) -> tuple[list[DrawingCall], int, float]:
            start_s, batches = self.clock.now_s(), FittingBatches(size)
            made = draw_in_calls(
                self.parts.synthesizer,
                [plans[member] for member in members],
                seeds=[self.seeds[member] for member in members],
                batches=batches,
                folder=self.round_journal.images,
            )
            return list(made), batches.largest, self.clock.now_s() - start_s

        futures = [lane.submit(lambda members=members: call(members)) for members in parts]  # type: ignore[misc]
        took_s = 0.0
        try:
            for members, future in zip(parts, futures, strict=True):
                yield future
                calls, largest, seconds = future.result()
                self.batches.largest = min(self.batches.largest, largest)
                for made in calls:
                    drawn |= self._keep_call(stage, [members[index] for index in made.members], plans, made)
                self.clock.progress(stage, len(members), seconds=seconds)
                took_s += seconds
        finally:
            for future in futures:
                future.cancel()
        self._end(stage, seconds=took_s, count=len(missing))
        return drawn

    def _keep_call(
        self, stage: DrawingStage, members: Sequence[Member], plans: Mapping[Member, Plan], call: DrawingCall
    ) -> dict[Member, Picture]:
        """Hand what a call drew to the journal."""
        drawn: dict[Member, Picture] = {}
        for member, picture in zip(members, call.images, strict=True):
            if isinstance(picture, Undrawn):
                self.undrawn[member] = picture.reason
            elif isinstance(picture, Image) and picture.mode != "RGB":
                drawn[member] = as_rgb(picture)  # as it is stored
            else:
                drawn[member] = picture
        largest = self.batches.largest
        if drawn:
            self.journal.add_call(
                stage,
                {member: plans[member] for member in drawn},
                list(drawn.values()),
                limit=largest if largest < self.parts.batch_size else None,
            )
        return drawn

    def _critique(self, pictures: Mapping[Member, Picture]) -> Steps[dict[Member, Answer]]:
        """Ask the critic about what it has not answered yet, and keep each answer as it comes."""
        answers = {member: answer for member, answer in self.journal.answers().items() if member in pictures}
        missing = [member for member in pictures if member not in answers]
        self.clock.resume("critique", len(answers))
        if not missing:
            return answers
        texts = [self.prompts[member.prompt_index] for member in missing]
        asking = Asking(
            self.parts.critic, missing, [pictures[member] for member in missing], texts, self.journal, self.clock.now_s
        )
        start_s = time.monotonic()
        took_s = 0.0

        def note(arrival: Arrival) -> None:
            nonlocal took_s
            answers[arrival.member] = arrival.answer
            took_s += arrival.seconds
            self.clock.progress("critique", int(not is_transient(arrival.answer)), seconds=arrival.seconds)

        if self.lanes.critique is None:
            last_s = self.clock.now_s()
            with self.parts.placement.stage(self.parts.critic):
                for arrival in asking.here():
                    now_s = self.clock.now_s()
                    note(arrival._replace(seconds=now_s - last_s))  # with what brought the model to the device
                    last_s = now_s
                    self.poll()
            took_s += self.clock.now_s() - last_s
        else:
            yield from asking.there(self.lanes.critique, note)
        self._end("critique", seconds=took_s, count=len(missing))
        self.silence.note([answers[member] for member in missing], start_s=start_s)
        return answers

    def _end(self, stage: RoundStage, *, seconds: float, count: int) -> None:
        """Report the end of a stage of this chunk."""
        self.seconds[stage] += seconds
        self.clock.end(stage, seconds=seconds, count=count)

    def _plan(self, member: Member, answer: Answer, before: Picture | None) -> Plan | None:
        """The plan for a picture; None where the critic abstained, or nothing would change."""
        if isinstance(answer, Abstention):
            return None
        prompt = self.prompts[member.prompt_index]
        plan = run_planner(self.parts.planner, prompt, answer, image=before)
        if self.round_journal.images is not None:
            check_storable(plan)
        return None if plan == Plan(prompt) else plan


def note_unplanned(
    clock: StageClock,
    plans: Mapping[Member, Plan | None],
    answers: Mapping[Member, Answer],
    known: Mapping[Member, Candidate],
) -> None:
    """Take what was answered and will not be redrawn out of the redraws to come."""
    clock.totals["redraw"] -= sum(
        plan is None and not is_transient(answers[member]) and not is_answered(known.get(member))
        for member, plan in plans.items()
    )


def is_answered(candidate: Candidate | None) -> bool:
    """Whether the critic has answered about it, for good."""
    return candidate is not None and not is_transient(candidate.answer)
