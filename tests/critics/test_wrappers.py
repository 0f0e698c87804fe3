"""Ensemble, Cached and Retried: critics around other critics."""

import logging
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import artaug as aa
from artaug._internal.segments import read_segment
from artaug.critics import Cached, Ensemble, PhotometricCritic, Retried
from artaug.critics.wrappers import _CacheEntry
from artaug.testing import FixedCritic, check_critic
from support.strategies import boxes, critiques

PICTURE = Image.new("RGB", (16, 16), "teal")
LEFT, RIGHT = aa.Box(0, 0, 0.5, 1), aa.Box(0.5, 0, 1, 1)
LAMP, DOOR = aa.Suggestion(LEFT, "a lamp", "dark"), aa.Suggestion(RIGHT, "a door", "dull")
ADVICE = aa.Critique((LAMP, DOOR), "fine")
FAILURE = aa.Abstention("the server did not answer")


@dataclass(frozen=True)
class Scripted(aa.Critic):
    """Gives its answers in turn, and records the prompts."""

    answers: tuple
    prompts: list = field(default_factory=list, repr=False)

    def critique(self, image, prompt):
        self.prompts.append(prompt)
        return self.answers[(len(self.prompts) - 1) % len(self.answers)]


def critiques_of(critic, *, count=1):
    return critic.critique_batch([PICTURE] * count, ["a pear"] * count)


# --- Ensemble --------------------------------------------------------------------------------------------------------


@given(critiques)
def test_an_ensemble_of_one_critic_gives_its_critique(critique):
    (answer,) = critiques_of(Ensemble((FixedCritic(critique),), min_votes=1))
    assert answer == critique


@given(
    critiques.filter(
        lambda critique: len({suggestion.box for suggestion in critique.suggestions}) == len(critique.suggestions)
    ),
    st.integers(2, 6),
)
def test_copies_of_one_critic_agree_with_themselves(critique, copies):
    (answer,) = critiques_of(Ensemble((FixedCritic(critique),) * copies, min_votes=copies, iou_threshold=1.0))
    assert answer.suggestions == critique.suggestions


@given(st.lists(critiques, min_size=2, max_size=5), st.floats(0.1, 1))
def test_more_votes_required_never_give_more_suggestions(answers, iou_threshold):
    critics = tuple(map(FixedCritic, answers))
    counts = [
        len(critiques_of(Ensemble(critics, min_votes=min_votes, iou_threshold=iou_threshold))[0].suggestions)
        for min_votes in range(1, len(critics) + 1)
    ]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] <= sum(len(answer.suggestions) for answer in answers)


@given(st.lists(boxes(), min_size=1, max_size=7))
def test_a_combined_box_lies_within_the_suggested_boxes(offsets):
    suggested = [aa.Box(0.4, 0.4, 0.6, 0.6), *(_near_center(offset) for offset in offsets)]
    critics = tuple(FixedCritic(aa.Critique((aa.Suggestion(box, "a lamp"),))) for box in suggested)
    (answer,) = critiques_of(Ensemble(critics, min_votes=1, iou_threshold=0.01))
    for suggestion in answer.suggestions:
        assert min(box.left for box in suggested) <= suggestion.box.left <= max(box.left for box in suggested)
        assert min(box.bottom for box in suggested) <= suggestion.box.bottom <= max(box.bottom for box in suggested)


def _near_center(box):
    """The center box, moved a tenth of the way to ``box``."""
    return aa.Box(*((9 * middle + edge) / 10 for middle, edge in zip((0.4, 0.4, 0.6, 0.6), _edges(box), strict=True)))


def _edges(box):
    return box.left, box.top, box.right, box.bottom


def test_the_box_is_the_median_and_the_prompt_is_the_firsts():
    near = [aa.Box(0, 0, 0.5, 1), aa.Box(0.02, 0, 0.52, 1), aa.Box(0.1, 0, 0.6, 1)]
    critics = tuple(
        FixedCritic(aa.Critique((aa.Suggestion(box, f"lamp {number}", f"reason {number}"),)))
        for number, box in enumerate(near)
    )
    (answer,) = critiques_of(Ensemble(critics, min_votes=2))
    assert answer.suggestions == (aa.Suggestion(near[1], "lamp 0", "reason 0; reason 1; reason 2"),)


def test_suggestions_with_most_votes_come_first():
    first, others = FixedCritic(aa.Critique((LAMP, DOOR))), FixedCritic(aa.Critique((DOOR,)))
    (answer,) = critiques_of(Ensemble((first, others, others), min_votes=1))
    assert [suggestion.prompt for suggestion in answer.suggestions] == ["a door", "a lamp"]


def test_a_critic_that_repeats_a_suggestion_has_one_vote():
    twice = FixedCritic(aa.Critique((LAMP, LAMP)))
    (answer,) = critiques_of(Ensemble((twice, FixedCritic(aa.Critique())), min_votes=2))
    assert answer.suggestions == ()


def test_critics_that_abstain_do_not_count():
    abstaining, answering = FixedCritic(FAILURE), FixedCritic(ADVICE)
    (answer,) = critiques_of(Ensemble((abstaining, answering, answering), min_votes=2))
    assert answer.suggestions == (LAMP, DOOR)


def test_too_few_answers_are_an_abstention_with_the_reasons():
    critics = (FixedCritic(ADVICE), FixedCritic(FAILURE), FixedCritic(aa.Abstention("too dark")))
    (answer,) = critiques_of(Ensemble(critics, min_votes=2))
    assert answer == aa.Abstention("only 1 of 3 critics could tell: the server did not answer; too dark")


def test_repairs_and_summaries_are_joined():
    first, second = (
        aa.Critique((LAMP,), "dim", ("swapped corners",)),
        aa.Critique((LAMP,), "dull", ("truncated texts",)),
    )
    (answer,) = critiques_of(Ensemble((FixedCritic(first), FixedCritic(second))))
    assert (answer.summary, answer.repairs) == ("dim dull", ("swapped corners", "truncated texts"))


def test_every_critic_gets_the_batch_once():
    first, second = Scripted((ADVICE,)), Scripted((ADVICE,))
    assert len(critiques_of(Ensemble((first, second)), count=3)) == 3
    assert first.prompts == second.prompts == ["a pear"] * 3


@pytest.mark.parametrize("options", [{"min_votes": 3}, {"min_votes": 0}, {"iou_threshold": 0}, {"iou_threshold": 1.1}])
def test_an_ensemble_that_could_never_suggest_anything_is_refused(options):
    with pytest.raises(aa.InvalidValueError, match="could never suggest anything"):
        Ensemble((FixedCritic(ADVICE),) * 2, **options)


# --- Cached ----------------------------------------------------------------------------------------------------------


def test_the_same_question_reaches_the_critic_once(tmp_path):
    critic = Scripted((ADVICE,))
    for _ in range(3):
        assert Cached(critic, folder=tmp_path).critique(PICTURE, "a pear") == ADVICE
    assert critic.prompts == ["a pear"]


@given(critiques)
def test_a_stored_answer_equals_the_original(tmp_path_factory, critique):
    folder = tmp_path_factory.mktemp("answers")
    cached = Cached(FixedCritic(critique), folder=folder)
    assert critiques_of(cached) == critiques_of(cached) == [critique]


def test_every_difference_is_another_entry(tmp_path):
    recoloured = PICTURE.quantize(2)
    recoloured.putpalette([9, 9, 9] * 2)
    questions = [
        (PICTURE, "a pear"),
        (PICTURE, "a pear "),
        (Image.new("RGB", (16, 16), "navy"), "a pear"),
        (Image.new("L", (16, 16)), "a pear"),
        (Image.new("L", (8, 32)), "a pear"),
        (recoloured, "a pear"),
    ]
    critic = Scripted((ADVICE,))
    Cached(critic, folder=tmp_path).critique_batch(*zip(*questions, strict=True))
    assert len(critic.prompts) == len(questions)
    assert len(list(tmp_path.rglob("*.json"))) == len(questions)


def test_another_critic_has_other_entries(tmp_path):
    first, second = FixedCritic(ADVICE), FixedCritic(aa.Critique())
    assert critiques_of(Cached(first, folder=tmp_path)) == [ADVICE]
    assert critiques_of(Cached(second, folder=tmp_path)) == [aa.Critique()]
    assert critiques_of(Cached(first, folder=tmp_path, identity="mine")) == [ADVICE]
    assert critiques_of(Cached(second, folder=tmp_path, identity="mine")) == [ADVICE]


def test_a_batch_criticises_only_what_is_missing_and_each_once(tmp_path):
    critic = Scripted((ADVICE,))
    cached = Cached(critic, folder=tmp_path)
    cached.critique(PICTURE, "a pear")

    answers = cached.critique_batch([PICTURE] * 4, ["a fig", "a pear", "a fig", "a plum"])

    assert answers == [ADVICE] * 4
    assert sorted(critic.prompts) == ["a fig", "a pear", "a plum"]


def test_answers_stay_in_order(tmp_path):
    @dataclass(frozen=True)
    class Echo(aa.Critic):
        def critique(self, image, prompt):
            return aa.Critique(summary=prompt)

    prompts = ["b", "a", "b", "c"]
    cached = Cached(Echo(), folder=tmp_path)
    for _ in range(2):
        assert [answer.summary for answer in cached.critique_batch([PICTURE] * 4, prompts)] == prompts


def test_an_abstention_is_not_cached(tmp_path):
    critic = Scripted((FAILURE, ADVICE))
    cached = Cached(critic, folder=tmp_path)
    assert [*critiques_of(cached), *critiques_of(cached), *critiques_of(cached)] == [FAILURE, ADVICE, ADVICE]


def test_an_abstention_can_be_cached(tmp_path):
    critic = Scripted((FAILURE, ADVICE))
    assert [critiques_of(Cached(critic, folder=tmp_path, cache_abstentions=True))[0] for _ in range(2)] == [FAILURE] * 2
    assert critiques_of(Cached(critic, folder=tmp_path)) == [ADVICE]


@pytest.mark.parametrize("damaged", [b"", b"{", b"\xff\x00", b'{"prompt": "a pear", "answer": {"reason": ""}}', b"[]"])
def test_a_damaged_file_is_logged_and_replaced(tmp_path, caplog, damaged):
    critic = Scripted((ADVICE,))
    cached = Cached(critic, folder=tmp_path)
    cached.critique(PICTURE, "a pear")
    (file,) = tmp_path.rglob("*.json")
    file.write_bytes(damaged)

    with caplog.at_level(logging.WARNING, logger="artaug"):
        assert cached.critique(PICTURE, "a pear") == ADVICE

    assert f"{file} is no answer of a critic, or a damaged one: " in caplog.text
    assert "The picture is criticised again" in caplog.text
    assert len(critic.prompts) == 2
    assert cached.critique(PICTURE, "a pear") == ADVICE
    assert len(critic.prompts) == 2


def test_a_failed_write_leaves_no_file(tmp_path, monkeypatch):
    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr("pathlib.Path.replace", full)
    with pytest.raises(OSError, match="no space left"):
        Cached(FixedCritic(ADVICE), folder=tmp_path).critique(PICTURE, "a pear")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_the_files_hold_nothing_about_the_critic(tmp_path):
    Cached(FixedCritic(ADVICE), folder=tmp_path, identity="key sk-123").critique(PICTURE, "a pear")
    (file,) = tmp_path.rglob("*.json")
    assert "sk-123" not in file.read_text()


def test_a_critic_is_recognized_by_what_it_is_made_of(tmp_path):
    class Strict(aa.Critic):
        def __init__(self, limit):
            self.limit = limit

        def critique(self, image, prompt):
            return aa.Critique(summary=f"limit {self.limit}")

    for limit in (1, 2, 1):
        assert critiques_of(Cached(Strict(limit), folder=tmp_path)) == [aa.Critique(summary=f"limit {limit}")]
    assert len(list(tmp_path.rglob("*.json"))) == 2


def test_a_critic_without_an_identity_is_refused(tmp_path):
    class Nameless(aa.Critic):
        def __init__(self):
            self.handle = object()

        def critique(self, image, prompt):
            return ADVICE

    with pytest.raises(aa.InvalidValueError, match=r"critic\.handle: this builtins\.object cannot be distinguished"):
        Cached(Nameless(), folder=tmp_path)
    assert critiques_of(Cached(Nameless(), folder=tmp_path, identity="nameless, 1")) == [ADVICE]


# --- Retried ---------------------------------------------------------------------------------------------------------


def test_a_critic_that_answers_is_called_once():
    critic = Scripted((ADVICE,))
    assert critiques_of(Retried(critic)) == [ADVICE]
    assert len(critic.prompts) == 1


def test_a_critic_that_abstains_is_called_again():
    critic = Scripted((FAILURE, FAILURE, ADVICE))
    assert critiques_of(Retried(critic, max_retries=2)) == [ADVICE]


def test_after_the_last_retry_all_reasons_are_given():
    critic = Scripted((FAILURE, aa.Abstention("no JSON")))
    assert critiques_of(Retried(critic, max_retries=2)) == [
        aa.Abstention("asked 3 times: the server did not answer; no JSON"),
    ]
    assert len(critic.prompts) == 3


def test_only_the_pictures_without_a_critique_are_retried():
    @dataclass(frozen=True)
    class Moody(aa.Critic):
        prompts: list = field(default_factory=list)

        def critique(self, image, prompt):
            self.prompts.append(prompt)
            return aa.Critique(summary=prompt) if self.prompts.count(prompt) == int(prompt) else FAILURE

    critic = Moody()
    answers = Retried(critic, max_retries=2).critique_batch([PICTURE] * 4, ["1", "2", "3", "4"])
    assert [getattr(answer, "summary", None) for answer in answers] == ["1", "2", "3", None]
    assert critic.prompts == ["1", "2", "3", "4", "2", "3", "4", "3", "4"]


def test_less_than_one_retry_is_refused():
    with pytest.raises(aa.InvalidValueError, match="would never try again"):
        Retried(FixedCritic(ADVICE), max_retries=0)


# --- all of them -----------------------------------------------------------------------------------------------------


def test_they_pass_check_critic(tmp_path):
    measuring = PhotometricCritic()
    check_critic(Ensemble((measuring, FixedCritic(ADVICE))))
    check_critic(Cached(measuring, folder=tmp_path))
    check_critic(Retried(measuring))
    check_critic(Cached(Retried(Ensemble((measuring, measuring))), folder=tmp_path))


def test_a_member_that_breaks_its_contract_is_named(tmp_path):
    class Wrong(aa.Critic):
        def critique(self, image, prompt):
            return "brighter"

    for critic in (
        Ensemble((Wrong(), FixedCritic(ADVICE))),
        Cached(Wrong(), folder=tmp_path, identity="wrong"),
        Retried(Wrong()),
    ):
        with pytest.raises(aa.ContractError, match=r"Wrong.critique_batch returned str .* for picture 0 \('a pear'\)"):
            critiques_of(critic)


def test_every_bit_of_a_cached_answer_that_flips_is_noticed(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    scripted = Scripted((ADVICE,))
    critiques_of(Cached(scripted, folder=tmp_path, identity="scripted"))
    (file,) = tmp_path.rglob("*.json")
    content = file.read_bytes()
    for bit in range(8 * len(content)):
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        file.write_bytes(changed)
        with pytest.raises(aa.StorageError):
            read_segment(file, _CacheEntry, what="answer", remedy="")
    asked = len(scripted.prompts)
    assert critiques_of(Cached(scripted, folder=tmp_path, identity="scripted")) == [ADVICE]
    assert len(scripted.prompts) == asked + 1
    assert "is criticised again" in caplog.text
