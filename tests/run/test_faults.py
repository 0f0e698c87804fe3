"""A critic that fails for a while costs no prompt; one that stays away stops the run with what to do."""

from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

import artaug as aa
from artaug.run.improve import improve
from artaug.testing import FixedFilter, SwatchSynthesizer

ADVICE = aa.Critique((aa.Suggestion(aa.Box(0, 0, 0.5, 1), "a bright window"),))


@dataclass(frozen=True)
class Flaky(aa.Critic):
    """Times out at a prompt as often as ``faults`` says, and records the prompts."""

    faults: dict = field(default_factory=dict)
    prompts: list = field(default_factory=list)

    def critique(self, image, prompt):
        self.prompts.append(prompt)
        if self.prompts.count(prompt) <= self.faults.get(prompt, 0):
            raise TimeoutError("read timed out")
        return ADVICE


def run(prompts, critic, **options):
    parts = {
        "synthesizer": SwatchSynthesizer(),
        "planner": aa.GreedyPlanner(),
        "keep": FixedFilter(keep=True),
        "seed": 0,
        "batch_size": 3,
    }
    return improve(prompts, critic=critic, **{**parts, **options})


def prompt_of(attempt):
    return attempt.prompt if isinstance(attempt, aa.Skipped) else attempt.pair.prompt


@given(st.lists(st.integers(0, 2), min_size=1, max_size=10), st.integers(1, 4))
def test_a_prompt_whose_critic_timed_out_is_asked_again_once_at_the_end(faults, batch_size):
    prompts = [f"a scene {number}" for number in range(len(faults))]
    critic = Flaky(dict(zip(prompts, faults, strict=True)))
    attempts = list(run(prompts, critic, batch_size=batch_size))

    put_off = [prompt for prompt, count in critic.faults.items() if count]
    assert [prompt_of(attempt) for attempt in attempts] == [p for p in prompts if p not in put_off] + put_off
    assert critic.prompts == prompts + put_off
    calm = {prompt_of(attempt): attempt for attempt in run(prompts, Flaky())}
    for attempt in attempts:
        prompt = prompt_of(attempt)
        if critic.faults[prompt] < 2:
            assert attempt.pair.seed == calm[prompt].pair.seed
            assert attempt.pair.after.tobytes() == calm[prompt].pair.after.tobytes()
        else:
            assert attempt == aa.Skipped(
                prompt,
                calm[prompt].pair.seed,
                "the critic abstained: Flaky raised TimeoutError: read timed out",
                transient=True,
            )


def test_an_abstention_that_is_final_is_not_asked_again():
    class Dark(Flaky):
        def critique(self, image, prompt):
            self.prompts.append(prompt)
            return aa.Abstention("too dark")

    critic = Dark()
    (attempt,) = run(["a scene"], critic)
    assert not attempt.transient
    assert critic.prompts == ["a scene"]


def test_a_prompt_waits_for_all_its_candidates():
    @dataclass(frozen=True)
    class Height(aa.Scorer):
        def score(self, image, prompt):
            return float(image.height)

    critic = Flaky({"a scene": 2})  # two of its three candidates
    attempts = list(run(["a scene", "a moor"], critic, candidates=aa.BestOf(3, by=Height())))
    assert [prompt_of(attempt) for attempt in attempts] == ["a moor", "a scene"]
    assert all(isinstance(attempt, aa.Kept) for attempt in attempts)
    assert critic.prompts.count("a scene") == 5  # the third candidate was answered, and is not asked again


@pytest.fixture
def clock(monkeypatch):
    clock = SimpleNamespace(now=0.0)
    fake = SimpleNamespace(monotonic=lambda: clock.now, perf_counter=lambda: clock.now)
    for module in ("chunk_run", "silence"):
        monkeypatch.setattr(f"artaug.run.{module}.time", fake)
    return clock


@dataclass(frozen=True)
class Down(aa.Critic):
    """Answers until a prompt has a number that is among ``down``; each fault takes a time."""

    clock: SimpleNamespace
    down: range
    seconds: float = 100.0

    def critique(self, image, prompt):
        if int(prompt.split()[-1]) in self.down:
            self.clock.now += self.seconds
            raise ConnectionRefusedError("connection refused")
        return ADVICE


def test_a_critic_that_stays_away_stops_the_run_with_what_to_do(clock):
    attempts = []
    with pytest.raises(aa.CriticError) as caught:
        attempts.extend(run([f"scene {number}" for number in range(100)], Down(clock, range(4, 1000))))
    assert str(caught.value) == (
        "Down has not answered for 15 minutes, at 9 pictures in a row; the last time, Down raised ConnectionRefusedError: "
        "connection refused. Make sure that its server runs, then run the same call to go on: what "
        "is in the run's store, or in the folder of artaug.critics.Cached, is not asked again."
    )


def test_what_was_finished_before_the_critic_stayed_away_is_yielded(clock):
    finished, attempts = [], run([f"scene {number}" for number in range(100)], Down(clock, range(4, 1000)))
    with pytest.raises(aa.CriticError):
        finished.extend(attempts)
    assert [prompt_of(attempt) for attempt in finished] == [f"scene {number}" for number in range(4)]


@pytest.mark.parametrize(
    ("down", "seconds"),
    [(range(4, 9), 1000.0), (range(4, 60), 1.0), (range(0, 100, 2), 1000.0)],
    ids=["few in a row", "many in a short time", "never in a row"],
)
def test_a_critic_that_comes_back_does_not_stop_the_run(clock, down, seconds):
    prompts = [f"scene {number}" for number in range(100)]
    attempts = list(run(prompts, Down(clock, down, seconds)))
    assert sorted(map(prompt_of, attempts)) == sorted(prompts)
    assert sum(isinstance(attempt, aa.Kept) for attempt in attempts) == 100 - len(down)


def test_at_the_end_of_the_round_a_critic_that_stays_away_costs_ten_minutes_and_no_attempt(clock):
    prompts = [f"scene {number}" for number in range(100)]
    attempts = list(run(prompts, Down(clock, range(0, 100, 2), seconds=100.0), batch_size=2))
    assert sorted(map(prompt_of, attempts)) == sorted(prompts)
    assert all(attempt.transient for attempt in attempts if isinstance(attempt, aa.Skipped))
    assert clock.now <= 50 * 100 + 1000
