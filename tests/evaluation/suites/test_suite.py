"""Suites as values, and the rule of dependent questions."""

from copy import deepcopy

import pytest
from hypothesis import given
from hypothesis import strategies as st

import artaug as aa
from artaug._internal.values import from_json, to_json
from artaug.evaluation.suites import Case, Clause, ObjectCheck, Question, QuestionCheck, Suite


@st.composite
def answered_questions(draw):
    """Questions whose parents come before them, and answers to them."""
    count = draw(st.integers(1, 7))
    parents = [draw(st.sets(st.integers(1, max(index, 1)), max_size=index)) for index in range(count)]
    questions = tuple(Question(index + 1, f"q{index}", tuple(sorted(parents[index]))) for index in range(count))
    return questions, draw(st.lists(st.booleans(), min_size=count, max_size=count))


@given(answered_questions())
def test_a_question_without_its_parents_yes_counts_as_wrong(questions_and_answers):
    questions, answers = questions_and_answers
    scores = dict(zip([question.number for question in questions], answers, strict=True))
    after = deepcopy(scores)
    for question in questions:  # the reference of DSG: parents as they were answered
        if any(not scores[parent] for parent in question.parents):
            after[question.number] = False
    assert QuestionCheck(questions).apply_dependencies(answers) == tuple(after.values())


@given(answered_questions())
def test_with_cascade_a_question_counts_as_wrong_down_to_its_grandchildren(questions_and_answers):
    questions, answers = questions_and_answers
    scores = dict(zip([question.number for question in questions], answers, strict=True))
    for question in questions:  # the reference of DPG-Bench: as DSG, but written into the dict it reads
        if any(not scores[parent] for parent in question.parents):
            scores[question.number] = False
    assert QuestionCheck(questions, cascade=True).apply_dependencies(answers) == tuple(scores.values())


@given(answered_questions())
def test_dependencies_only_ever_lower_the_score(questions_and_answers):
    questions, answers = questions_and_answers
    plain, cascaded = (
        sum(QuestionCheck(questions, cascade=cascade).apply_dependencies(answers)) for cascade in (False, True)
    )
    assert cascaded <= plain <= sum(answers)


WRONG = {
    "nothing": (lambda: ObjectCheck(()), "passed by every picture"),
    "relative-to-nothing": (
        lambda: ObjectCheck((Clause("dog", position=("above", 0)),)),
        "relative to an earlier clause",
    ),
    "relative-to-itself": (
        lambda: ObjectCheck((Clause("cat"), Clause("dog", position=("above", 1)))),
        "relative to an earlier clause",
    ),
    "color-of-nothing": (lambda: ObjectCheck((), (Clause("dog", color="red"),)), "only a count"),
    "none-of-it": (lambda: Clause("dog", 0), "greater than 0"),
    "no-side": (lambda: Clause("dog", position=("beside", 0)), "expected one of 'left of'"),
    "no-question": (lambda: QuestionCheck(()), r"numbered \[\]"),
    "one-number-twice": (lambda: QuestionCheck((Question(1, "a"), Question(1, "b"))), r"numbered \[1, 1\]"),
    "no-parent": (
        lambda: QuestionCheck((Question(1, "a", (2,)),)),
        "has parents that are not among the other questions",
    ),
    "its-own-parent": (
        lambda: QuestionCheck((Question(1, "a", (1,)),)),
        "has parents that are not among the other questions",
    ),
}


@pytest.mark.parametrize(("build", "text"), WRONG.values(), ids=WRONG)
def test_checks_without_meaning_are_refused(build, text):
    with pytest.raises(aa.InvalidValueError, match=text):
        build()


def test_a_suite_knows_its_prompts_and_their_checks():
    suite = Suite("mine", (Case("a dog", ObjectCheck((Clause("dog"),)), "one"), Case("a cat", CAT, "two")))
    assert (tuple(suite.prompts), suite.prompts.categories) == (("a dog", "a cat"), ("one", "two"))
    assert suite.case("a cat").check == CAT
    assert repr(suite) == "Suite('mine', 2 prompts)"
    with pytest.raises(aa.PromptError, match="of 'a cow': it does not have it"):
        suite.case("a cow")


def test_a_prompt_may_come_twice_unless_its_checks_differ():
    twice = Suite("mine", (Case("a cat", CAT, "one"), Case("a cat", CAT, "two")))
    assert twice.case("a cat").check == CAT
    with pytest.raises(aa.PromptError, match="has 2 cases of it, with different checks"):
        Suite("mine", (Case("a cat", CAT), Case("a cat", ObjectCheck((Clause("cat", 2),))))).case("a cat")


def test_a_suite_without_cases_and_a_blank_prompt_are_refused():
    with pytest.raises(aa.PromptError, match="need at least one case"):
        Suite("mine", ())
    with pytest.raises(aa.PromptError, match="need a text"):
        Case(" ", CAT)


def test_a_case_survives_json():
    for check in (
        ObjectCheck((Clause("dog"), Clause("cat", 2, "red", ("left of", 0)))),
        QuestionCheck((Question(1, "?"),)),
    ):
        case = Case("a dog", check, "one")
        assert from_json(Case, to_json(case)) == case


CAT = ObjectCheck((Clause("cat"),))
