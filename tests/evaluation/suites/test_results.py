"""Results of suites: from the playground's drawings to scores by category, and against a base."""

import json
from dataclasses import dataclass

import numpy as np
import pytest

import artaug as aa
from artaug import playground
from artaug.evaluation.statistics import holm, paired_bootstrap, share_bootstrap, sign_flip
from artaug.evaluation.suites import (
    Case,
    Clause,
    ObjectCheck,
    ObjectScore,
    Outcome,
    Question,
    QuestionCheck,
    QuestionScore,
    Suite,
    SuiteResult,
    SuiteScorer,
    by_category,
    evaluate,
)
from artaug.scorers import FunctionScorer
from artaug.synthesis import picture_seeds
from support.playground_eyes import PlaygroundEyes


@dataclass(frozen=True)
class Painter(aa.Synthesizer):
    """Draws the prompt, or, for some seeds, another one."""

    fails_from: int = 10

    def synthesize(self, plan, *, seed):
        right = seed % 10 < self.fails_from
        return playground.render(plan.prompt if right else "a purple ring at noon", seed=seed % 1000)


def shapes(count=12):
    """A suite of the playground: objects in the middle, and objects to the left of others."""
    single = [
        Case(f"a {color} {shape} in the middle at noon", ObjectCheck((Clause(shape, 1, color),)), "single")
        for shape in ("ball", "cube", "cone")
        for color in ("red", "blue")
    ]
    double = [
        Case(
            f"a {ball} ball on the left and a {cone} cone on the right at noon",
            ObjectCheck((Clause("cone", 1, cone), Clause("ball", 1, ball, ("left of", 0)))),
            "position",
        )
        for ball in ("red", "green")
        for cone in ("blue", "orange", "yellow")
    ]
    return Suite("shapes", tuple([*single, *double][:count]), mean_over="categories")


def object_score(suite):
    return ObjectScore(suite=suite, detector=PlaygroundEyes())


def outcome(score, *category_results):
    return Outcome(score, (), category_results)


def test_the_playground_is_scored_from_drawing_to_categories():
    scorer = object_score(shapes())
    good, poor = (evaluate(scorer, Painter(fails), images_per_prompt=2, seed=3, progress=False) for fails in (10, 6))

    assert good.overall.score > 0.9
    assert poor.overall.score < 0.7
    assert [(row.category, row.n) for row in good.categories] == [("single", 6), ("position", 6)]
    assert [len(outcomes) for outcomes in good.outcomes] == [2] * 12
    assert poor.overall.ci_low < poor.overall.score < poor.overall.ci_high
    means = [np.mean([outcome.score for outcome in outcomes]) for outcomes in poor.outcomes]
    assert poor.overall.score == pytest.approx((np.mean(means[:6]) + np.mean(means[6:])) / 2)
    wrong = next(outcome for outcomes in poor.outcomes for outcome in outcomes if not outcome.score)
    assert wrong.reasons[0].startswith("expected 1 ")


def test_the_pictures_are_those_of_a_comparison():
    suite, drawn = shapes(4), []

    class Recording(Painter):
        def synthesize(self, plan, *, seed):
            drawn.append((plan.prompt, seed))
            return super().synthesize(plan, seed=seed)

    result = evaluate(object_score(suite), Recording(7), seed=5, images_per_prompt=2, batch_size=3, progress=False)
    comparison = aa.compare(
        Painter(7),
        {"x": Painter()},
        suite.prompts,
        scorers=[object_score(suite)],
        seed=5,
        images_per_prompt=2,
        progress=False,
    )

    assert sorted(drawn) == sorted(zip([*suite.prompts] * 2, picture_seeds(5, 8), strict=True))
    scores = comparison.base.scores["shapes (PlaygroundEyes)"]
    assert [[outcome.score for outcome in outcomes] for outcomes in result.outcomes] == np.reshape(
        scores, (2, 4)
    ).T.tolist()


@pytest.mark.parametrize("batch_size", [1, 5, 100])
def test_the_batch_size_changes_nothing(batch_size):
    scorer = object_score(shapes(6))
    batched = evaluate(scorer, Painter(7), batch_size=batch_size, progress=False)
    assert batched == evaluate(scorer, Painter(7), progress=False)


def question_score(mean_over="prompts"):
    questions = (Question(1, "a?", (), "entity"), Question(2, "b?", (1,), "attribute"), Question(3, "c?", (), "entity"))
    cases = (Case("x", QuestionCheck(questions)), Case("y", QuestionCheck(questions[:1])))
    vqa = FunctionScorer(function=lambda *_: 1.0, name="yes")
    return QuestionScore(suite=Suite("asked", cases, mean_over=mean_over), vqa=vqa)


def test_questions_are_counted_by_their_own_categories_and_the_suite_by_prompts():
    x = [outcome(1 / 3, ("entity", True), ("attribute", False), ("entity", False))]
    y = [outcome(1.0, ("entity", True))]
    result = SuiteResult.of(question_score(), [x, y])

    assert result.overall.score == pytest.approx((1 / 3 + 1) / 2)
    assert [(row.category, row.score, row.n) for row in result.categories] == [
        ("entity", pytest.approx(2 / 3), 2),
        ("attribute", 0.0, 1),
    ]
    interval = share_bootstrap([np.array([[1, 1], [2, 1]])])
    assert (result.categories[0].ci_low, result.categories[0].ci_high) == (interval.low, interval.high)


def test_the_text_and_the_dict_hold_scores_and_reasons():
    result = SuiteResult.of(
        question_score(), [[outcome(0.5, ("entity", True))], [Outcome(0.0, ("no to 'a?'",), (("entity", False),))]]
    )
    lines = str(result).splitlines()
    assert lines[0] == "asked (yes): share right, 95% interval, 1 picture a prompt"
    assert lines[1].split() == ["entity", "50.0%", "0.0%", "to", "100.0%", "2", "prompts"]
    assert lines[2].split()[:2] == ["overall", "25.0%"]
    read = json.loads(json.dumps(result.to_dict()))
    assert read["prompts"][1] == {"prompt": "y", "pictures": [{"score": 0.0, "reasons": ["no to 'a?'"]}]}
    assert read["overall"]["n"] == 2


def test_a_suite_without_categories_has_one_line():
    suite = Suite("plain", (Case("x", ObjectCheck((Clause("dog"),))),) * 2)
    result = SuiteResult.of(object_score(suite), [[outcome(1.0, ("", True))], [outcome(0.0, ("", False))]])
    assert len(str(result).splitlines()) == 2


def test_every_case_needs_an_outcome():
    with pytest.raises(aa.InvalidValueError, match="1 lists of outcomes for 2 cases"):
        SuiteResult.of(question_score(), [[outcome(1.0)]])
    with pytest.raises(aa.InvalidValueError, match="need one each, not empty"):
        SuiteResult.of(question_score(), [[outcome(1.0)], []])


@pytest.mark.parametrize("wrong", [{"images_per_prompt": 0}, {"batch_size": 0}], ids=str)
def test_nothing_to_draw_is_refused(wrong):
    with pytest.raises(aa.InvalidValueError, match="need at least 1 of each"):
        evaluate(question_score(), Painter(), progress=False, **wrong)


def test_a_synthesizer_that_draws_too_little_is_named():
    class Empty(Painter):
        def synthesize_batch(self, plans, *, seeds):
            return []

    with pytest.raises(aa.ContractError, match=r"Empty\.synthesize_batch returned 0 answers for 8 plans"):
        evaluate(object_score(shapes()), Empty(), progress=False)


def test_a_scorer_that_checks_too_few_pictures_is_named():
    @dataclass(frozen=True)
    class Empty(SuiteScorer):
        suite: Suite

        def check_images(self, images, cases):
            return []

    with pytest.raises(aa.ContractError, match=r"Empty\.check_images returned 0 answers for 8 pictures"):
        evaluate(Empty(shapes()), Painter(), progress=False)


def test_a_comparison_is_taken_apart_by_category():
    suite = shapes()
    comparison = aa.compare(
        Painter(5),
        {"better": Painter()},
        suite.prompts,
        scorers=[object_score(suite)],
        seed=1,
        filtered_by=(),
        progress=False,
    )
    rows = by_category(comparison, suite.prompts, seed=1)

    base, better = (
        arm.by_prompt("shapes (PlaygroundEyes)", 12) for arm in (comparison.base, comparison.candidates["better"])
    )
    assert [row.scorer for row in rows] == ["shapes (PlaygroundEyes): single", "shapes (PlaygroundEyes): position"]
    raw = [sign_flip((better - base)[members], seed=1) for members in (slice(6), slice(6, 12))]
    assert [row.p_value for row in rows] == holm(raw)
    for row, members in zip(rows, (slice(6), slice(6, 12)), strict=True):
        interval = paired_bootstrap((better - base)[members], seed=1)
        assert (row.delta, row.ci_low, row.ci_high) == ((better - base)[members].mean(), interval.low, interval.high)
        assert row.n == 6


def test_a_prompt_that_a_suite_lists_twice_is_one_sample_of_its_intervals_and_two_cases_of_its_scores():
    check = ObjectCheck((Clause("dog"),))
    cases = tuple(Case(prompt, check, "dogs") for prompt in ("a dog", "A dog.", "two dogs", "a black dog"))
    right = (True, False, True, True)
    results = [[outcome(float(one), ("dogs", one))] for one in right]
    result = SuiteResult.of(object_score(Suite("dogs", cases)), results)
    interval = share_bootstrap([np.array([[1, 1, 1], [2, 1, 1]])])
    for score in (result.overall, *result.categories):
        assert (score.score, score.n) == (0.75, 3)
        assert (score.ci_low, score.ci_high) == (interval.low, interval.high)


def test_a_category_of_one_prompt_listed_twice_has_no_spread():
    captions = ("a red cone at noon", "a red cone at noon", "a red ball at noon", "a blue ball at noon")
    prompts = aa.PromptSet(captions, ("cones", "cones", "balls", "balls"))
    scorer = FunctionScorer(function=lambda *_: 1.0, name="one")
    comparison = aa.compare(Painter(), {"same": Painter()}, prompts, scorers=[scorer], progress=False)
    with pytest.raises(aa.InvalidValueError, match=r"\['cones'\] have a single prompt"):
        by_category(comparison, prompts)


def test_a_category_of_one_prompt_has_no_spread():
    suite = shapes(7)
    comparison = aa.compare(
        Painter(), {"same": Painter()}, suite.prompts, scorers=[object_score(suite)], progress=False
    )
    with pytest.raises(aa.InvalidValueError, match=r"\['position'\] have a single prompt"):
        by_category(comparison, suite.prompts)
    with pytest.raises(aa.InvalidValueError, match="drew other prompts"):
        by_category(comparison, shapes().prompts)


def test_prompts_that_a_scorer_raised_on_are_left_out_of_their_category():
    suite = shapes()
    prompts = [*suite.prompts]

    def brittle(_image, prompt):
        if prompt in broken:
            raise OSError(prompt)
        return 1.0

    broken = prompts[:1]
    scorer = FunctionScorer(function=brittle)
    with pytest.raises(aa.ScoringError) as caught:
        aa.compare(Painter(), {"same": Painter()}, suite.prompts, scorers=[scorer], progress=False)
    assert [row.n for row in by_category(caught.value.comparison, suite.prompts)] == [5, 6]

    broken = prompts[:5]
    with pytest.raises(aa.ScoringError) as caught:
        aa.compare(Painter(), {"same": Painter()}, suite.prompts, scorers=[scorer], progress=False)
    with pytest.raises(aa.InvalidValueError, match="brittle raised on all but 1 prompts of 'single'"):
        by_category(caught.value.comparison, suite.prompts)
