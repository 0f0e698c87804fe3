"""The algebra of filters, and what their verdicts say."""

import math
import operator
import weakref
from dataclasses import dataclass
from fractions import Fraction

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import artaug as aa
from artaug.filtering import judge_pairs
from artaug.image_files import ImageFile
from artaug.scorers import Exposure
from artaug.testing import check_filter
from support.strategies import Listed, pair, pairs

thresholds = st.floats(-20, 20)
fractions = st.floats(0.01, 1)
simple = (
    st.builds(aa.Gain, st.just(Listed()), thresholds)
    | st.builds(aa.Floor, st.just(Listed("Other")), thresholds)
    | st.builds(aa.TopFraction, st.just(Listed("Third")), fractions)
)
filters = st.recursive(
    simple,
    lambda inner: (
        st.builds(operator.and_, inner, inner)
        | st.builds(operator.or_, inner, inner)
        | st.builds(operator.invert, inner)
    ),
    max_leaves=5,
)
pair_lists = st.lists(pairs, min_size=1, max_size=8)


def kept(keep, pairs):
    return [verdict.keep for verdict in judge_pairs(keep, pairs)]


@given(filters, filters, pair_lists)
def test_de_morgan(first, second, pairs):
    assert kept(~(first & second), pairs) == kept(~first | ~second, pairs)
    assert kept(~(first | second), pairs) == kept(~first & ~second, pairs)


@given(filters, filters, pair_lists)
def test_order_does_not_matter(first, second, pairs):
    assert kept(first & second, pairs) == kept(second & first, pairs)
    assert kept(first | second, pairs) == kept(second | first, pairs)


@given(filters, filters, filters, pair_lists)
def test_grouping_does_not_matter(first, second, third, pairs):
    assert kept((first & second) & third, pairs) == kept(first & (second & third), pairs)
    assert kept(first & (second | third), pairs) == kept((first & second) | (first & third), pairs)


@given(filters, pair_lists)
def test_twice_not_is_nothing(keep, pairs):
    assert kept(~~keep, pairs) == kept(keep, pairs)
    assert kept(keep & keep, pairs) == kept(keep | keep, pairs) == kept(keep, pairs)
    assert not any(kept(keep & ~keep, pairs))
    assert all(kept(keep | ~keep, pairs))


@given(filters, filters, pair_lists)
def test_a_verdict_carries_every_number_and_a_reason(left, right, pairs):
    alone = zip(judge_pairs(left, pairs), judge_pairs(right, pairs), strict=True)
    for (first, second), combined in zip(alone, judge_pairs(left & right, pairs), strict=True):
        assert combined.scores == first.scores | second.scores
        assert combined.reason
        assert all(verdict.reason in combined.reason for verdict in (first, second) if verdict.keep == combined.keep)


@given(filters, filters)
def test_a_filter_names_the_scorers_it_decides_by(left, right):
    assert (left & right).scorers == (left | right).scorers == (~left).scorers | right.scorers
    assert (left & right).scorers == left.scorers | right.scorers


@given(thresholds, pair_lists)
def test_gain_and_floor_keep_exactly_the_pairs_at_or_above_the_threshold(at_least, pairs):
    scores = [(Listed().score(pair.before, ""), Listed().score(pair.after, "")) for pair in pairs]
    assert kept(aa.Gain(Listed(), at_least), pairs) == [after - before >= at_least for before, after in scores]
    assert kept(aa.Floor(Listed(), at_least), pairs) == [after >= at_least for _, after in scores]


@given(fractions, pair_lists)
@example(0.1, [pair(0, level) for level in range(30)])
def test_the_top_fraction_is_exact_and_the_best(fraction, pairs):
    gains = [pair.after.getpixel((0, 0)) - pair.before.getpixel((0, 0)) for pair in pairs]
    keeps = kept(aa.TopFraction(Listed(), fraction), pairs)
    assert sum(keeps) == math.ceil(Fraction(str(fraction)) * len(pairs))
    best = [gain for gain, keep in zip(gains, keeps, strict=True) if keep]
    rest = [gain for gain, keep in zip(gains, keeps, strict=True) if not keep]
    assert not rest or min(best) >= max(rest)


@dataclass(frozen=True)
class Table(aa.Scorer):
    """Scores a grey picture by a number for its grey level, to the last bit."""

    numbers: tuple[float, ...]

    def score(self, image, prompt):
        return self.numbers[image.getpixel((0, 0))]


LEAST = math.ulp(0.0)
"""The smallest number above 0."""


@pytest.mark.parametrize(
    ("scores", "at_least", "keep"),
    [
        ((0.0, 1.0), 1.0, True),
        ((0.0, 1.0), math.nextafter(1.0, 2), False),
        ((0.0, 0.0), 0.0, True),
        ((LEAST, 0.0), 0.0, False),
        ((0.0, 0.0), LEAST, False),
        ((1.0, 0.0), -1.0, True),
        ((1.0, 0.0), math.nextafter(-1.0, 0), False),
    ],
)
def test_a_gain_of_exactly_the_threshold_is_kept_and_the_next_number_below_is_not(scores, at_least, keep):
    assert aa.Gain(Table(scores), at_least).judge(pair(0, 1)).keep is keep
    assert aa.Floor(Table(scores[1:] * 2), at_least).judge(pair(0, 1)).keep is (scores[1] >= at_least)


def test_a_level_of_exactly_the_floor_is_kept_and_the_next_number_below_is_not():
    for at_least, keep in ((0.3, True), (math.nextafter(0.3, 1), False)):
        assert aa.Floor(Table((9.0, 0.3)), at_least).judge(pair(0, 1)).keep is keep


def test_the_smallest_fall_is_a_fall_and_no_change_is_a_rise_by_zero():
    assert aa.Gain(Table((LEAST, 0.0))).judge(pair(0, 1)).reason.startswith("Table fell by ")
    assert aa.Gain(Table((0.0, 0.0))).judge(pair(0, 1)).reason == "Table rose by 0, threshold 0"


@pytest.mark.parametrize(
    ("fraction", "count", "kept_count"),
    [(0.5, 1, 1), (0.5, 2, 1), (0.5, 3, 2), (0.1, 10, 1), (0.1, 11, 2), (0.1, 30, 3), (1, 7, 7), (0.001, 7, 1)],
)
def test_the_top_fraction_is_rounded_up(fraction, count, kept_count):
    assert sum(kept(aa.TopFraction(Listed(), fraction), [pair(0, level) for level in range(count)])) == kept_count


def test_of_equal_gains_the_first_pairs_are_kept():
    assert kept(aa.TopFraction(Listed(), 0.5), [pair(0, level) for level in (3, 5, 3, 5, 3, 3)]) == [
        *(True, True, False),
        *(True, False, False),
    ]


def test_ranks_are_counted_from_the_highest_gain():
    verdicts = aa.TopFraction(Listed(), 0.5).judge_batch([pair(0, 10), pair(0, 30), pair(0, 20)])
    assert [verdict.reason for verdict in verdicts] == [
        "Listed rose by 1, rank 3 of 3, keeps the best 2",
        "Listed rose by 3, rank 1 of 3, keeps the best 2",
        "Listed rose by 2, rank 2 of 3, keeps the best 2",
    ]


def test_a_tenth_of_thirty_is_three():
    assert sum(kept(aa.TopFraction(Listed(), 0.1), [pair(0, level) for level in range(30)])) == 3


def test_a_pair_judged_alone_is_the_best_there_is():
    assert aa.TopFraction(Listed(), 0.01).judge(pair(9, 0)).keep


def test_a_verdict_names_the_numbers_behind_it():
    verdict = aa.Gain(Listed(), at_least=0.5).judge(pair(10, 22))
    assert verdict == aa.Verdict(
        keep=True,
        reason="Listed rose by 1.2, threshold 0.5",
        scores={"Listed before": 1.0, "Listed after": 2.2, "Listed gain": 2.2 - 1.0},
    )
    assert aa.Gain(Listed()).judge(pair(22, 10)).reason == "Listed fell by 1.2, threshold 0"
    assert aa.Floor(Listed(), 2).judge(pair(0, 10)).reason == "Listed is 1, threshold 2"
    assert aa.TopFraction(Listed(), 0.5).judge(pair(0, 10)).reason == "Listed rose by 1, rank 1 of 1, keeps the best 1"
    assert (~aa.Floor(Listed(), 2)).judge(pair(0, 10)).reason == "not (Listed is 1, threshold 2)"


def test_the_reason_is_that_of_the_filters_that_decided():
    keep = aa.Gain(Listed("A"), at_least=0.5) & aa.Floor(Listed("B"), at_least=9)
    assert keep.judge(pair(0, 10)).reason == "B is 1, threshold 9"
    assert keep.judge(pair(0, 100)).reason == "A rose by 10, threshold 0.5 and B is 10, threshold 9"


def test_two_scorers_of_one_name_both_keep_their_numbers():
    @dataclass(frozen=True)
    class Doubled(aa.Scorer):
        name = "Listed"

        def score(self, image, prompt):
            return 2 * Listed().score(image, prompt)

    verdict = (aa.Floor(Listed(), 0) & aa.Floor(Doubled(), 0)).judge(pair(0, 10))
    assert verdict.scores == {"Listed after": 1.0, "Listed after (2)": 2.0}


def test_both_pictures_are_scored_in_one_call():
    calls = []

    class Counting(aa.Scorer):
        def score(self, image, prompt):
            raise NotImplementedError

        def score_batch(self, images, prompts):
            calls.append(len(images))
            return [0.0] * len(images)

    judge_pairs(aa.Gain(Counting()), [pair(0, 1)] * 5)
    assert calls == [10]


def test_filters_print_as_they_were_written():
    keep = aa.Gain(Exposure(), at_least=0.2) & ~aa.Floor(Exposure(), 0.9) | aa.TopFraction(Exposure(), 0.5)
    assert repr(keep) == (
        "((Gain(scorer=Exposure(), at_least=0.2) & ~Floor(scorer=Exposure(), at_least=0.9)) | "
        "TopFraction(scorer=Exposure(), fraction=0.5))"
    )


def test_and_or_not_are_refused_since_python_would_drop_a_filter():
    with pytest.raises(aa.ContractError, match=r"Combine filters with &, \| and ~, not and, or and not\."):
        aa.Gain(Listed()) and aa.Floor(Listed(), 0)


@pytest.mark.parametrize("fraction", [0, -0.5, 1.5, float("nan")])
def test_a_fraction_out_of_range_is_refused(fraction):
    with pytest.raises(aa.InvalidValueError, match=r"need a fraction in \(0, 1\]"):
        aa.TopFraction(Listed(), fraction)


@pytest.mark.parametrize("kind", [aa.Gain, aa.Floor])
def test_a_threshold_that_is_not_finite_is_refused(kind):
    with pytest.raises(aa.InvalidValueError, match=r"at_least=nan\): expected a finite number"):
        kind(Listed(), float("nan"))


class Scripted(aa.PairFilter):
    def __init__(self, *answers):
        self.answers = answers

    def __repr__(self):
        return "Scripted()"

    def judge(self, pair):
        return self.answers[0]

    def judge_batch(self, pairs):
        return list(self.answers)


def test_too_few_verdicts_are_counted():
    with pytest.raises(
        aa.ContractError, match=r"Scripted\(\)\.judge_batch returned 0 answers for 1 pair\. Expected a list of 1"
    ):
        judge_pairs(Scripted(), [pair(0, 1)])


def test_an_answer_that_is_no_verdict_is_quoted_inside_a_combination_too():
    for keep in (Scripted(True), ~Scripted(True), aa.Gain(Listed()) & Scripted(True)):
        with pytest.raises(
            aa.ContractError,
            match=r"Scripted\(\)\.judge_batch returned bool True for pair 0 \('a pear'\)\. Expected artaug\.Verdict",
        ):
            judge_pairs(keep, [pair(0, 1)])


def test_no_pairs_no_verdicts():
    assert judge_pairs(Scripted(), []) == []
    assert aa.TopFraction(Listed(), 0.5).judge_batch([]) == []


def test_a_filter_without_scorers_names_none_and_judges_one_by_one():
    class Seeded(aa.PairFilter):
        def judge(self, pair):
            return aa.Verdict(keep=pair.seed > 0, reason=f"the seed is {pair.seed}", scores={"seed": pair.seed})

    assert Seeded().scorers == frozenset()
    assert kept(Seeded() & ~~Seeded(), [pair(0, 0, seed=0), pair(0, 0, seed=1)]) == [False, True]


@pytest.mark.parametrize(
    "keep",
    [
        aa.Gain(Exposure()),
        aa.Floor(Exposure(), 0.5),
        aa.TopFraction(Exposure(), 0.5),
        aa.Gain(Exposure(), 0.1) & ~aa.Floor(Exposure(), 0.9) | aa.TopFraction(Exposure(), 0.3),
    ],
    ids=repr,
)
def test_every_filter_passes_its_check(keep):
    check_filter(keep)


class Holder:
    """Lives as long as its picture, and can be counted: a PIL image is not hashable."""


class CountingBrightness(aa.Scorer):
    """Brightness, and the most pictures that were in memory together while it was called."""

    def __init__(self, living):
        self.living, self.most = living, 0

    def score(self, image, prompt):
        return self.score_batch([image], [prompt])[0]

    def score_batch(self, images, prompts):
        self.most = max(self.most, len(self.living))
        return [float(image.convert("L").getpixel((0, 0))) for image in images]


def test_a_filter_that_compares_many_pairs_on_disk_holds_few_pictures_at_once(tmp_path, monkeypatch):
    living, load = weakref.WeakSet(), ImageFile.load

    def counted(file):
        image = load(file)
        image.holder = Holder()
        living.add(image.holder)
        return image

    monkeypatch.setattr(ImageFile, "load", counted)
    in_memory = [pair(number % 50, 10 + number % 90, seed=number) for number in range(300)]
    folder = aa.ImageFolder(tmp_path)
    on_disk = [one.stored_in(folder) for one in in_memory]
    scorer = CountingBrightness(living)
    similar = aa.Similarity(aa.StructuralSimilarity(), at_least=-1)
    keep = aa.TopFraction(scorer, 0.5) & aa.Floor(scorer, at_least=20) & similar
    assert judge_pairs(keep, on_disk) == judge_pairs(keep, in_memory)
    assert 0 < scorer.most <= 256
