"""A critic that answers elsewhere costs no drawing time: the next pictures are drawn meanwhile, and nothing else changes."""

import threading
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import artaug as aa
from artaug.testing import FixedFilter, SwatchSynthesizer

PROMPTS = [f"prompt {number}" for number in range(12)]
ADVICE = aa.Critique((aa.Suggestion(aa.Box(0, 0, 0.5, 1), "a bright window"),))


@dataclass(frozen=True)
class AnswersWhenMoreIsDrawn(aa.Critic):
    """Answers about a chunk only when the first picture of the next one is drawn: alone, it would wait for ever."""

    drawn: "CountsDrawings"
    max_concurrency: int = 1

    def critique_batch(self, images, prompts):
        last = PROMPTS.index(prompts[-1])
        if last + 1 < len(PROMPTS) and not self.drawn.wait_for(PROMPTS[last + 1]):
            raise AssertionError("the next chunk was not drawn while the critic was asked")
        return [ADVICE] * len(images)

    def critique(self, image, prompt):
        raise NotImplementedError


@dataclass(frozen=True)
class CountsDrawings(aa.Synthesizer):
    seen: set = field(default_factory=set, repr=False)
    changed: threading.Condition = field(default_factory=threading.Condition, repr=False)
    threads: set = field(default_factory=set, repr=False)

    def synthesize(self, plan, *, seed):
        with self.changed:
            self.seen.add(plan.prompt)
            self.threads.add(threading.current_thread())
            self.changed.notify_all()
        return SwatchSynthesizer().synthesize(plan, seed=seed)

    def wait_for(self, prompt):
        with self.changed:
            return self.changed.wait_for(lambda: prompt in self.seen, timeout=20)


@dataclass(frozen=True)
class Answers(aa.Critic):
    """As a function of the prompt, here or in threads."""

    max_concurrency: int = 0

    def critique(self, image, prompt):
        return ADVICE if int(prompt.split()[1]) % 3 else aa.Abstention("every third")


def attempts(*, synthesizer=None, critic, store=None, batch_size=2, on_event=None):
    return list(
        aa.improve(
            PROMPTS,
            synthesizer=synthesizer or SwatchSynthesizer(),
            critic=critic,
            planner=aa.GreedyPlanner(),
            keep=FixedFilter(keep=True),
            seed=0,
            batch_size=batch_size,
            store=store,
            check="arguments",
            on_event=on_event,
        )
    )


@pytest.mark.parametrize("with_store", [False, True])
def test_the_next_chunk_is_drawn_while_the_critic_is_asked_and_by_the_thread_of_the_run(with_store, tmp_path):
    synthesizer = CountsDrawings()
    result = attempts(
        synthesizer=synthesizer,
        critic=AnswersWhenMoreIsDrawn(synthesizer),
        store=tmp_path / "run" if with_store else None,
    )
    assert [type(attempt) for attempt in result] == [aa.Kept] * len(PROMPTS)
    assert synthesizer.threads == {threading.current_thread()}


@given(st.integers(1, 4), st.integers(1, 5))
@settings(max_examples=20)
def test_attempts_and_counts_are_those_of_a_run_that_does_one_thing_after_the_other(threads, batch_size):
    events, plain_events = [], []
    beside = attempts(critic=Answers(max_concurrency=threads), batch_size=batch_size, on_event=events.append)
    plain = attempts(critic=Answers(), batch_size=batch_size, on_event=plain_events.append)
    assert beside == plain

    def done(some):
        progress = [event for event in some if isinstance(event, aa.ProgressEvent)]
        return {
            stage: sum(event.count for event in progress if event.stage == stage)
            for stage in ("draw", "critique", "redraw", "judge")
        }

    assert done(events) == done(plain_events)


def test_what_a_critic_raises_in_its_thread_ends_the_run_and_what_was_answered_stays(tmp_path):
    @dataclass(frozen=True)
    class FailsAtTheFifth(aa.Critic):
        failing: bool = field(default=True, repr=False)
        asked: list = field(default_factory=list, repr=False)
        max_concurrency: int = field(default=1, repr=False)

        def critique(self, image, prompt):
            self.asked.append(prompt)
            if self.failing and prompt == "prompt 5":
                raise ArithmeticError("no")
            return ADVICE

    with pytest.raises(aa.CriticError, match="ArithmeticError: no"):
        attempts(critic=FailsAtTheFifth(), store=tmp_path / "run")
    whole = FailsAtTheFifth(failing=False)
    result = attempts(critic=whole, store=tmp_path / "run")
    assert result == attempts(critic=FailsAtTheFifth(failing=False))
    assert len(whole.asked) <= len(PROMPTS) - 5


def test_a_run_that_is_stopped_does_not_wait_for_a_critic_that_does_not_answer(tmp_path):
    never = threading.Event()

    @dataclass(frozen=True)
    class NeverAnswers(aa.Critic):
        max_concurrency: int = 1

        def critique(self, image, prompt):
            never.wait(60)
            return ADVICE

    def stop(event):
        if isinstance(event, aa.ProgressEvent) and event.stage == "draw" and event.count:
            drawn.append(event.count)
            if len(drawn) == 2:
                raise InterruptedError

    drawn = []
    with pytest.raises(InterruptedError):
        attempts(critic=NeverAnswers(), store=tmp_path / "run", on_event=stop)
    assert not never.is_set()
    never.set()
