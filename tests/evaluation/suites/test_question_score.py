"""Questions about pictures, answered by fixed answers and by a real vision-language model."""

from dataclasses import dataclass

import pytest
from PIL import Image

import artaug as aa
from artaug import playground
from artaug.evaluation.suites import Case, Clause, ObjectCheck, Question, QuestionCheck, QuestionScore, Suite
from artaug.scorers import FunctionScorer, VQAScore
from support.tiny_llava import tiny_llava

QUESTIONS = (
    Question(1, "Is there a dog?", (), "entity"),
    Question(2, "Is the dog red?", (1,), "attribute"),
    Question(3, "Does the red dog sleep?", (2,), "attribute"),
    Question(4, "Is it night?", (), "global"),
)


@dataclass(frozen=True)
class FixedAnswers(aa.Scorer):
    """Says yes to some questions, and records all."""

    yes: tuple = ()
    requests: list | None = None

    def score(self, image, prompt):
        if self.requests is not None:
            self.requests.append((image.size, prompt))
        return 0.9 if prompt in self.yes else 0.2


def question_score(vqa, *, cascade=False, **options):
    case = Case("a red dog sleeps", QuestionCheck(QUESTIONS, cascade=cascade), "animals")
    return QuestionScore(suite=Suite("asked", (case,)), vqa=vqa, **options)


def outcome_of(vqa, **options):
    scorer = question_score(vqa, **options)
    return scorer.check_images([Image.new("RGB", (8, 8))], scorer.suite.cases)[0]


def test_the_score_is_the_share_that_counts_as_right():
    outcome = outcome_of(FixedAnswers(("Is there a dog?", "Is it night?", "Is the dog red?")))
    assert outcome.score == 0.75
    assert outcome.reasons == ("no to 'Does the red dog sleep?'",)


def test_yes_to_a_child_of_a_no_counts_for_nothing_in_the_score_and_as_answered_in_the_categories():
    outcome = outcome_of(FixedAnswers(("Is the dog red?", "Does the red dog sleep?", "Is it night?")))
    assert outcome.score == 0.5
    assert outcome.reasons == ("no to 'Is there a dog?'", "yes to 'Is the dog red?' does not count: a parent is no")
    assert outcome.category_results == (("entity", False), ("attribute", True), ("attribute", True), ("global", True))


def test_with_cascade_it_takes_the_grandchildren_too():
    assert (
        outcome_of(FixedAnswers(("Is the dog red?", "Does the red dog sleep?", "Is it night?")), cascade=True).score
        == 0.25
    )


@pytest.mark.parametrize(("threshold", "score"), [(0.5, 0.0), (0.2, 1.0), (0.9, 0.0)])
def test_an_answer_is_yes_from_the_threshold_on(threshold, score):
    assert outcome_of(FixedAnswers(), threshold=threshold).score == score


def test_all_pictures_and_questions_go_to_the_vqa_in_one_batch():
    class Batched(FixedAnswers):
        def score_batch(self, images, prompts):
            self.requests.append(len(prompts))
            return [1.0] * len(prompts)

    requests = []
    scorer = question_score(Batched((), requests))
    assert scorer.score_batch([Image.new("RGB", (8, 8))] * 3, ["a red dog sleeps"] * 3) == [1.0] * 3
    assert requests == [12]
    assert scorer.score_batch([], []) == []


def test_a_comparison_knows_what_it_depends_on():
    vqa = FunctionScorer(function=lambda *_: 1.0, name="oracle")
    assert question_score(vqa).depends_on == {"asked (oracle)", "oracle"}
    assert question_score(vqa).name == "asked (oracle)"


def test_an_answer_that_is_not_finite_is_caught():
    with pytest.raises(
        aa.NonFiniteError, match=r"oracle.score_batch returned nan for picture \d+ \('Is there a dog\?'\)"
    ):
        outcome_of(FunctionScorer(function=lambda *_: float("nan"), name="oracle"))


def test_object_checks_and_thresholds_out_of_range_are_refused():
    objects = Case("x", ObjectCheck((Clause("dog"),)))
    with pytest.raises(aa.InvalidValueError, match="Use ObjectScore"):
        QuestionScore(suite=Suite("mine", (objects,)), vqa=FixedAnswers())
    with pytest.raises(aa.InvalidValueError, match="Use ObjectScore"):
        question_score(FixedAnswers()).check_images([Image.new("RGB", (8, 8))], [objects])
    with pytest.raises(aa.InvalidValueError, match=r"need a probability in \(0, 1\]"):
        question_score(FixedAnswers(), threshold=0)


def test_the_playground_answers_questions_about_its_pictures():
    def answer(image, question):
        return float(
            all(
                word in " ".join(f"{thing.color} {thing.shape}" for thing in playground.detect(image))
                for word in question.split()
            )
        )

    case = Case("a red cone at noon", QuestionCheck((Question(1, "cone"), Question(2, "red cone", (1,)))))
    score = QuestionScore(suite=Suite("asked", (case,)), vqa=FunctionScorer(function=answer))
    assert score.score(playground.render("a red cone at noon", seed=0), case.prompt) == 1
    assert score.score(playground.render("a blue cone at noon", seed=0), case.prompt) == 0.5
    assert score.score(playground.render("a red ball at noon", seed=0), case.prompt) == 0


def test_a_vision_language_model_answers_with_its_own_probability_of_yes():
    model, processor = tiny_llava()
    vqa = VQAScore(model=model, processor=processor, question="{prompt}", answer="Y", name="tiny")
    picture = playground.render("a red cone at noon", seed=0)
    probabilities = vqa.score_batch([picture] * 4, [question.text for question in QUESTIONS])
    threshold = sorted(probabilities)[2]
    scorer = question_score(vqa, threshold=threshold)
    expected = QuestionCheck(QUESTIONS).apply_dependencies([p >= threshold for p in probabilities])
    assert scorer.score(picture, "a red dog sleeps") == sum(expected) / 4
