"""Every prompt ends as one attempt, with a reason; a part that breaks its contract is named."""

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import artaug as aa
from artaug.run.improve import improve
from artaug.testing import FixedCritic, FixedFilter, SwatchSynthesizer

HALF = aa.Box(0, 0, 0.5, 1)
ADVICE = aa.Critique((aa.Suggestion(HALF, "a bright window"),))


def attempts(prompts, *, synthesizer=None, critic=None, planner=None, keep=None, seed=0, batch_size=3, on_event=None):
    return list(
        improve(
            prompts,
            synthesizer=synthesizer or SwatchSynthesizer(),
            critic=critic or FixedCritic(ADVICE),
            planner=planner or aa.GreedyPlanner(),
            keep=FixedFilter(keep=True) if keep is None else keep,
            seed=seed,
            batch_size=batch_size,
            on_event=on_event,
        )
    )


@dataclass(frozen=True)
class AnswersByLetter(aa.Critic):
    """Answers by the first letter of the prompt."""

    def critique(self, image, prompt):
        answers = {"a": ADVICE, "b": aa.Abstention("too dark to tell"), "c": aa.Critique()}
        return answers[prompt[0]]


@dataclass(frozen=True)
class KeepsOddLengths(aa.PairFilter):
    def judge(self, pair):
        return aa.Verdict(keep=len(pair.prompt) % 2 == 1, reason="by the length of the prompt", scores={})


@given(st.lists(st.from_regex(r"[abc][xyz]{0,3}", fullmatch=True), min_size=1, max_size=12), st.integers(1, 5))
def test_every_prompt_ends_as_exactly_one_attempt_in_order_and_with_a_reason(prompts, batch_size):
    result = attempts(prompts, critic=AnswersByLetter(), keep=KeepsOddLengths(), batch_size=batch_size)

    assert [attempt.prompt if isinstance(attempt, aa.Skipped) else attempt.pair.prompt for attempt in result] == prompts
    for prompt, attempt in zip(prompts, result, strict=True):
        match prompt[0]:
            case "a":
                assert isinstance(attempt, aa.Kept if len(prompt) % 2 else aa.Dropped)
                assert attempt.verdict.reason == "by the length of the prompt"
            case "b":
                assert isinstance(attempt, aa.Skipped)
                assert attempt.reason == "the critic abstained: too dark to tell"
            case "c":
                assert isinstance(attempt, aa.Skipped)
                assert attempt.reason == "the critic suggested nothing"


@given(st.integers(0, 2**32), st.integers(1, 7))
def test_the_chunk_size_changes_nothing(seed, batch_size):
    prompts = [f"a scene {number}" for number in range(5)]
    in_chunks, default = attempts(prompts, seed=seed, batch_size=batch_size), attempts(prompts, seed=seed)
    for attempt, other in zip(in_chunks, default, strict=True):
        assert attempt.pair.seed == other.pair.seed
        assert attempt.pair.before.tobytes() == other.pair.before.tobytes()
        assert attempt.pair.after.tobytes() == other.pair.after.tobytes()


def test_before_and_after_are_drawn_with_the_same_seed_from_the_plain_prompt_and_the_plan():
    (attempt,) = attempts(["a scene"])
    synthesizer = SwatchSynthesizer()
    assert attempt.pair.before.tobytes() == synthesizer.synthesize(aa.Plan("a scene"), seed=attempt.pair.seed).tobytes()
    assert attempt.pair.after.tobytes() == synthesizer.synthesize(attempt.pair.plan, seed=attempt.pair.seed).tobytes()
    assert attempt.pair.plan == aa.Plan("a scene", (aa.Region(HALF, "a bright window"),))


def test_equal_prompts_get_pictures_of_their_own():
    first, second = attempts(["a scene", "a scene"])
    assert first.pair.before.tobytes() != second.pair.before.tobytes()


def test_it_is_lazy_chunk_by_chunk():
    stages = []
    iterator = improve(
        ["a"] * 6,
        synthesizer=SwatchSynthesizer(),
        critic=FixedCritic(ADVICE),
        planner=aa.GreedyPlanner(),
        keep=FixedFilter(keep=True),
        seed=0,
        batch_size=2,
        on_event=lambda event: stages.append(event.stage) if isinstance(event, aa.StageEvent) else None,
    )
    assert stages == []
    next(iterator)
    assert stages == ["draw", "critique", "redraw", "judge"]
    list(iterator)
    assert stages == ["draw", "critique", "redraw", "judge"] * 3


def stages_of(prompts, **options):
    events = []
    attempts(
        prompts, on_event=lambda event: events.append(event) if isinstance(event, aa.StageEvent) else None, **options
    )
    return [event.stage for event in events]


def test_a_chunk_has_at_most_batch_size_prompts_and_at_least_one():
    chunk = ["draw", "critique", "redraw", "judge"]
    assert stages_of(["a"] * 4, batch_size=4) == chunk
    assert stages_of(["a"] * 5, batch_size=4) == chunk * 2
    assert stages_of(["a"] * 2, batch_size=1) == chunk * 2
    with pytest.raises(aa.InvalidValueError, match=r"improve\(batch_size=0\): expected a whole number of at least 1"):
        attempts(["a"], batch_size=0)


@pytest.mark.parametrize(("count", "chunks"), [(8, 1), (9, 2)])
def test_by_default_a_chunk_has_eight_prompts(count, chunks):
    events = []
    list(
        improve(
            ["a"] * count,
            synthesizer=SwatchSynthesizer(),
            critic=FixedCritic(ADVICE),
            planner=aa.GreedyPlanner(),
            keep=FixedFilter(keep=True),
            seed=0,
            on_event=lambda event: events.append(event) if isinstance(event, aa.StageEvent) else None,
        )
    )
    assert [event.stage for event in events].count("draw") == chunks


def test_a_stage_takes_as_long_as_the_clock_says(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("artaug.run.events.time.perf_counter", lambda: now[0])

    class Slow(aa.Critic):
        def critique(self, image, prompt):
            now[0] += 3
            return ADVICE

    events = []
    attempts(["a", "b"], critic=Slow(), on_event=events.append)
    ended = [(event.stage, event.seconds, event.count) for event in events if isinstance(event, aa.StageEvent)]
    assert ended == [("draw", 0, 2), ("critique", 6, 2), ("redraw", 0, 2), ("judge", 0, 2)]
    answers = [event for event in events if isinstance(event, aa.ProgressEvent) and event.stage == "critique"]
    assert [(event.count, event.seconds, event.total) for event in answers] == [(0, 0, 2), (1, 3, 2), (1, 3, 2)]


def test_suggestions_that_the_planner_leaves_out_are_a_reason_of_their_own():
    tiny = FixedCritic(aa.Critique((aa.Suggestion(aa.Box(0, 0, 0.01, 0.01), "a speck"),)))
    assert attempts(["a scene"], critic=tiny)[0].reason == "the planner kept no suggestion"


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "there are no prompts"),
        (["a scene", "  "], "prompts\\[1\\] is '  '"),
        (["a scene", None], "prompts\\[1\\] is None"),
        ("a scene", r"expected a list of prompts, received one string: 'a scene'. Write \['a scene'\]"),
    ],
)
def test_illegal_prompts_are_refused_at_once(prompts, message):
    with pytest.raises(aa.PromptError, match=message):
        improve(
            prompts,
            synthesizer=SwatchSynthesizer(),
            critic=FixedCritic(ADVICE),
            planner=aa.GreedyPlanner(),
            keep=FixedFilter(keep=True),
            seed=0,
        )


def test_a_critic_that_raises_stops_the_run_and_is_named_with_the_prompt_and_the_way_out():
    class Broken(aa.Critic):
        def critique(self, image, prompt):
            return {}["boxes"]

    with pytest.raises(aa.CriticError, match=r"Broken raised KeyError: 'boxes'.*'a scene'.*Abstention") as caught:
        attempts(["a scene"], critic=Broken())
    assert isinstance(caught.value.__cause__, KeyError)


def test_running_out_of_memory_is_not_reported_as_an_error_of_the_critic():
    class OutOfMemory(aa.Critic):
        def critique(self, image, prompt):
            raise MemoryError

    with pytest.raises(MemoryError):
        attempts(["a scene"], critic=OutOfMemory())


def test_a_critic_that_returns_the_wrong_type_is_named_with_what_it_returned():
    class Sloppy(aa.Critic):
        def critique(self, image, prompt):
            return "make it pop"

    with pytest.raises(
        aa.ContractError,
        match=r"Sloppy.critique_batch returned str 'make it pop' for picture 0 \('a scene'\). Expected artaug",
    ):
        attempts(["a scene"], critic=Sloppy())


def test_a_planner_that_returns_the_wrong_type_is_named():
    class Sloppy(aa.RegionPlanner):
        def plan(self, prompt, critique):
            return prompt

    with pytest.raises(
        aa.ContractError, match=r"Sloppy.plan returned str 'a scene' for 'a scene'\. Expected artaug\.Plan"
    ):
        attempts(["a scene"], planner=Sloppy())


class LosesOne(aa.Synthesizer):
    def synthesize(self, plan, *, seed):
        return SwatchSynthesizer().synthesize(plan, seed=seed)

    def synthesize_batch(self, plans, *, seeds):
        return super().synthesize_batch(plans, seeds=seeds)[:-1]


class ReturnsNone(aa.Synthesizer):
    def synthesize(self, plan, *, seed):
        return SwatchSynthesizer().synthesize(plan, seed=seed)

    def synthesize_batch(self, plans, *, seeds):
        return None


class ReturnsPath(aa.Synthesizer):
    def synthesize(self, plan, *, seed):
        return "a path.png"


class LosesRedrawn(LosesOne):
    """Loses a picture only where a plan has regions."""

    def synthesize_batch(self, plans, *, seeds):
        pictures = [self.synthesize(plan, seed=seed) for plan, seed in zip(plans, seeds, strict=True)]
        return pictures[1:] if plans[0].regions else pictures


@pytest.mark.parametrize(
    ("synthesizer", "message"),
    [
        (LosesOne(), "LosesOne.synthesize_batch returned 1 answer for 2 plans"),
        (ReturnsNone(), "ReturnsNone.synthesize_batch returned None for 2 plans"),
        (
            ReturnsPath(),
            r"ReturnsPath.synthesize_batch returned str 'a path.png' for plan 0 \('a'\). Expected PIL.Image",
        ),
        (LosesRedrawn(), "LosesRedrawn.synthesize_batch returned 1 answer for 2 plans"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, aa.Synthesizer) else "",
)
def test_a_synthesizer_that_breaks_its_contract_is_named_and_never_the_critic(synthesizer, message):
    with pytest.raises(aa.ContractError, match=message):
        attempts(["a", "b"], synthesizer=synthesizer)


def test_a_synthesizer_whose_second_picture_has_another_size_is_caught():
    class Growing(aa.Synthesizer):
        def synthesize(self, plan, *, seed):
            return Image.new("RGB", (64, 64 + len(plan.regions)))

    with pytest.raises(aa.InvalidValueError, match=r"before \(64, 64\), after \(64, 65\)"):
        list(
            improve(
                ["a scene"],
                synthesizer=Growing(),
                critic=FixedCritic(ADVICE),
                planner=aa.GreedyPlanner(),
                keep=FixedFilter(keep=True),
                seed=0,
            )
        )
