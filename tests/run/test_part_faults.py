"""Faults of the parts of a run: a bug names whose it is and at which prompt, what passes is waited for, NaN is refused."""

import pytest

import artaug as aa
from artaug.testing import FixedCritic, FixedFilter, SwatchSynthesizer
from support.clock import FakeTime

PROMPTS = ["a hill", "a pear", "a barn"]
ADVICE = aa.Critique((aa.Suggestion(aa.Box(0, 0, 0.5, 1), "a bright window"),))


def fail_at_the_pear(prompt):
    if prompt == "a pear":
        raise KeyError("boxes")


class BrokenSynthesizer(aa.Synthesizer):
    def synthesize(self, plan, *, seed):
        fail_at_the_pear(plan.prompt)
        return SwatchSynthesizer().synthesize(plan, seed=seed)


class BrokenCritic(aa.Critic):
    def critique(self, image, prompt):
        fail_at_the_pear(prompt)
        return ADVICE


class BrokenPlanner(aa.RegionPlanner):
    def plan(self, prompt, critique):
        fail_at_the_pear(prompt)
        return aa.GreedyPlanner().plan(prompt, critique)


class BrokenFilter(aa.PairFilter):
    def __repr__(self):
        return "BrokenFilter"

    def judge(self, pair):
        fail_at_the_pear(pair.prompt)
        return aa.Verdict(True, "fine", {})


class BrokenScorer(aa.Scorer):
    def score(self, image, prompt):
        fail_at_the_pear(prompt)
        return 1.0


def run(**options):
    parts = {
        "synthesizer": SwatchSynthesizer(),
        "critic": FixedCritic(ADVICE),
        "planner": aa.GreedyPlanner(),
        "keep": FixedFilter(keep=True),
        "seed": 0,
        "check": "arguments",
    }
    return list(aa.improve(PROMPTS, **{**parts, **options}))


BROKEN = {
    "BrokenSynthesizer": {"synthesizer": BrokenSynthesizer()},
    "BrokenCritic": {"critic": BrokenCritic()},
    "BrokenPlanner": {"planner": BrokenPlanner()},
    "BrokenFilter": {"keep": BrokenFilter()},
    "the scorer 'BrokenScorer'": {"keep": aa.Gain(BrokenScorer(), at_least=0)},
}
BROKEN_TOO = {
    "in a filter of filters": {"keep": ~aa.Gain(BrokenScorer(), at_least=0) & FixedFilter(keep=True)},
    "among candidates": {"candidates": aa.BestOf(2, by=BrokenScorer())},
}


@pytest.mark.parametrize(
    ("owner", "parts"),
    [*BROKEN.items(), *(("the scorer 'BrokenScorer'", parts) for parts in BROKEN_TOO.values())],
    ids=[*BROKEN, *BROKEN_TOO],
)
def test_a_bug_of_any_part_names_it_and_the_prompt_and_is_wrapped_once(owner, parts):
    with pytest.raises(aa.PartError) as caught:
        run(**parts)
    assert str(caught.value).startswith(f"{owner} raised KeyError: 'boxes'")
    assert "'a pear'" in str(caught.value)
    assert isinstance(caught.value.__cause__, KeyError)
    assert caught.value.__cause__.__cause__ is None


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("as_candidates", [False, True])
def test_a_score_that_is_not_finite_is_refused_and_names_scorer_and_prompt(number, as_candidates):
    class Undefined(aa.Scorer):
        def score(self, image, prompt):
            return number if prompt == "a pear" else 1.0

    by = Undefined()
    parts = {"candidates": aa.BestOf(2, by=by)} if as_candidates else {"keep": aa.Gain(by, at_least=0)}
    with pytest.raises(aa.NonFiniteError, match=rf"Undefined.score_batch returned {number} for picture 0 \('a pear'\)"):
        run(**parts)


def test_a_filter_whose_own_number_is_nan_names_it_and_the_pair():
    class Undefined(aa.PairFilter):
        def __repr__(self):
            return "Undefined()"

        def judge(self, pair):
            return aa.Verdict(True, "fine", {"share": float("nan")})

    with pytest.raises(aa.InvalidValueError) as caught:
        run(keep=Undefined())
    assert caught.value.__notes__ == ["Raised by Undefined(), for the pair of 'a hill'."]


def test_parts_that_are_away_for_a_while_change_no_attempt(monkeypatch):
    clock = FakeTime()
    monkeypatch.setattr("artaug._internal.calls.time", clock)

    def away_twice(method):
        calls = []

        def call(*args, **options):
            calls.append(args)
            if len(calls) in {2, 3}:
                raise ConnectionRefusedError("connection refused")
            return method(*args, **options)

        return call

    class Away(aa.Synthesizer):
        draw = staticmethod(away_twice(SwatchSynthesizer().synthesize))

        def synthesize(self, plan, *, seed):
            return self.draw(plan, seed=seed)

    class AwayScorer(aa.Scorer):
        measure = staticmethod(away_twice(lambda image, _: float(image.getpixel((0, 0))[0])))

        def score(self, image, prompt):
            return self.measure(image, prompt)

    class Red(aa.Scorer):
        def score(self, image, prompt):
            return float(image.getpixel((0, 0))[0])

    def ends(attempts):
        return [(type(end), end.pair.prompt, end.pair.seed, end.pair.after.tobytes()) for end in attempts]

    away = run(synthesizer=Away(), keep=aa.Gain(AwayScorer(), at_least=0))
    assert ends(away) == ends(run(keep=aa.Gain(Red(), at_least=0)))
    assert len(clock.slept) == 4


def test_a_run_whose_synthesizer_stays_away_ends_in_order(monkeypatch):
    clock = FakeTime()
    monkeypatch.setattr("artaug._internal.calls.time", clock)

    class Down(aa.Synthesizer):
        def synthesize(self, plan, *, seed):
            raise ConnectionRefusedError("connection refused")

    with pytest.raises(aa.PartError, match=r"Down has not answered for 10 minutes.*run the same call to go on"):
        run(synthesizer=Down())
    assert sum(clock.slept) <= 600
