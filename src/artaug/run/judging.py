"""The last stage of a chunk: the best candidate of each prompt, and the verdict of the filter on it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from artaug.errors import WorkerDiedError
from artaug.filtering import judge_pairs
from artaug.pairs import ImagePair, Skipped, Verdict
from artaug.run.events import StageClock
from artaug.run.parts import LoopParts
from artaug.run.storage.journal import RoundJournal
from artaug.run.storage.records import Candidate, Chunk, End, Member


@dataclass(frozen=True)
class Judging:
    """Chooses and judges, chunk by chunk, or all pairs of a round together if its filter needs that."""

    parts: LoopParts
    journal: RoundJournal
    clock: StageClock

    def judge(self, candidates: Sequence[Candidate], indices: Sequence[int]) -> list[End]:
        """How each prompt of a chunk ends; without a verdict for a pair whose filter judges the pairs of a round together."""
        outcomes = [candidate.outcome() for candidate in candidates]
        places = {
            id(outcome): candidate.member.candidate for outcome, candidate in zip(outcomes, candidates, strict=True)
        }
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
        start_s = self.clock.now_s()
        if self.parts.candidates is not None:
            with self.parts.placement.stage(self.parts.candidates):
                outcomes = self.parts.candidates.choose(outcomes, prompts=len(indices))
        verdicts = iter(self._judge_now([outcome for outcome in outcomes if isinstance(outcome, ImagePair)]))
        decided = sum(map(self._is_decided, outcomes))
        self.clock.progress("judge", decided, seconds=self.clock.now_s() - start_s)
        by_seed = {candidate.seed: candidate.member.candidate for candidate in candidates}
        return [
            End(index, by_seed[outcome.seed], None, outcome.reason, outcome.stage, outcome.transient)
            if isinstance(outcome, Skipped)
            else End(index, places[id(outcome)], next(verdicts))
            for index, outcome in zip(indices, outcomes, strict=True)
        ]

    def _judge_now(self, pairs: Sequence[ImagePair]) -> list[Verdict | None]:
        if self.parts.keep.needs_all_pairs:
            return [None] * len(pairs)
        return [*self._verdicts(pairs)]

    def _verdicts(self, pairs: Sequence[ImagePair]) -> list[Verdict]:
        if not pairs:
            return []
        with self.parts.placement.stage(self.parts.keep):
            try:
                verdicts = judge_pairs(self.parts.keep, pairs)
            except WorkerDiedError:
                if self.parts.keep.needs_all_pairs:
                    raise
                verdicts = [self._judge_alone(pair) for pair in pairs]
        return [self._annotate(verdict) for verdict in verdicts]

    def _judge_alone(self, pair: ImagePair) -> Verdict:
        """The verdict on one of some pairs at which a worker has died: it may be the one."""
        try:
            return judge_pairs(self.parts.keep, [pair])[0]
        except WorkerDiedError as error:
            return Verdict(keep=False, reason=f"it could not be judged, alone and with others: {error}", scores={})

    def judge_waiting(self, waiting: Sequence[tuple[Chunk, End]]) -> Mapping[int, Verdict]:
        """The verdicts of a filter that compares the pairs of a round, by the index of the prompt."""
        if not waiting:
            return {}
        kept = self.journal.verdicts()
        indices = [end.prompt_index for _, end in waiting]
        if kept is not None and set(kept) == set(indices):
            self.clock.resume("judge", len(kept))
            return kept
        outcomes = [chunk.candidates[Member(end.prompt_index, end.candidate)].outcome() for chunk, end in waiting]
        pairs = [outcome for outcome in outcomes if isinstance(outcome, ImagePair)]
        start_s = self.clock.now_s()
        with self.clock.stage("judge", len(pairs)):
            verdicts = dict(zip(indices, self._verdicts(pairs), strict=True))
            self.clock.progress("judge", len(pairs), seconds=self.clock.now_s() - start_s)
        self.journal.add_verdicts(verdicts)
        return verdicts

    def _annotate(self, verdict: Verdict) -> Verdict:
        return verdict if self.parts.candidates is None else self.parts.candidates.annotate(verdict)

    def _is_decided(self, outcome: ImagePair | Skipped) -> bool:
        """Whether nothing is left to judge: not of a prompt that is put off, or a pair that waits for the others."""
        return not outcome.transient if isinstance(outcome, Skipped) else not self.parts.keep.needs_all_pairs
