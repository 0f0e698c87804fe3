"""Critics made of critics: they agree, remember and ask again, and answer like any other."""

import logging
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import artaug as aa
from artaug.critics import Cached, Ensemble, PhotometricCritic, Retried
from artaug.testing import FixedCritic, check_critic
from support.strategies import boxes, critiques

PICTURE = Image.new("RGB", (16, 16), "teal")
LEFT, RIGHT = aa.Box(0, 0, 0.5, 1), aa.Box(0.5, 0, 1, 1)
LAMP, DOOR = aa.Suggestion(LEFT, "a lamp", "dark"), aa.Suggestion(RIGHT, "a door", "dull")
ADVICE = aa.Critique((LAMP, DOOR), "fine")
SILENCE = aa.Abstention("the server did not answer")


@dataclass(frozen=True)
class Scripted(aa.Critic):
    """Gives its answers one after the other, and notes what it was asked."""

    answers: tuple
    asked: list = field(default_factory=list, repr=False)

    def critique(self, image, prompt):
        self.asked.append(prompt)
        return self.answers[(len(self.asked) - 1) % len(self.answers)]


def ask(critic, *, times=1):
    return critic.critique_batch([PICTURE] * times, ["a pear"] * times)


# --- Ensemble --------------------------------------------------------------------------------------------------------


@given(critiques)
def test_an_ensemble_of_one_asks_for_what_it_asks_for(critique):
    (answer,) = ask(Ensemble((FixedCritic(critique),), agree=1))
    assert answer == critique


@given(
    critiques.filter(lambda one: len({said.box for said in one.suggestions}) == len(one.suggestions)), st.integers(2, 6)
)
def test_copies_of_one_critic_agree_with_themselves(critique, copies):
    (answer,) = ask(Ensemble((FixedCritic(critique),) * copies, agree=copies, overlap=1.0))
    assert answer.suggestions == critique.suggestions


@given(st.lists(critiques, min_size=2, max_size=5), st.floats(0.1, 1))
def test_asking_for_more_agreement_never_gives_more(answers, overlap):
    critics = tuple(map(FixedCritic, answers))
    counts = [
        len(ask(Ensemble(critics, agree=needed, overlap=overlap))[0].suggestions)
        for needed in range(1, len(critics) + 1)
    ]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] <= sum(len(answer.suggestions) for answer in answers)


@given(st.lists(boxes(), min_size=1, max_size=7))
def test_what_is_agreed_on_lies_within_what_was_asked_for(places):
    same = [aa.Box(0.4, 0.4, 0.6, 0.6), *(_towards(place) for place in places)]
    critics = tuple(FixedCritic(aa.Critique((aa.Suggestion(box, "a lamp"),))) for box in same)
    (answer,) = ask(Ensemble(critics, agree=1, overlap=0.01))
    for suggestion in answer.suggestions:
        assert min(box.left for box in same) <= suggestion.box.left <= max(box.left for box in same)
        assert min(box.bottom for box in same) <= suggestion.box.bottom <= max(box.bottom for box in same)


def _towards(box):
    """A box near the middle, a little off as ``box`` is."""
    return aa.Box(*((9 * middle + edge) / 10 for middle, edge in zip((0.4, 0.4, 0.6, 0.6), _edges(box), strict=True)))


def _edges(box):
    return box.left, box.top, box.right, box.bottom


def test_the_box_is_the_median_and_the_words_are_the_firsts():
    near = [aa.Box(0, 0, 0.5, 1), aa.Box(0.02, 0, 0.52, 1), aa.Box(0.1, 0, 0.6, 1)]
    critics = tuple(
        FixedCritic(aa.Critique((aa.Suggestion(box, f"lamp {number}", f"reason {number}"),)))
        for number, box in enumerate(near)
    )
    (answer,) = ask(Ensemble(critics, agree=2))
    assert answer.suggestions == (aa.Suggestion(near[1], "lamp 0", "reason 0; reason 1; reason 2"),)


def test_what_most_critics_ask_for_comes_first():
    first, others = FixedCritic(aa.Critique((LAMP, DOOR))), FixedCritic(aa.Critique((DOOR,)))
    (answer,) = ask(Ensemble((first, others, others), agree=1))
    assert [one.prompt for one in answer.suggestions] == ["a door", "a lamp"]


def test_one_critic_that_says_a_thing_twice_does_not_agree_with_itself():
    twice = FixedCritic(aa.Critique((LAMP, LAMP)))
    (answer,) = ask(Ensemble((twice, FixedCritic(aa.Critique())), agree=2))
    assert answer.suggestions == ()


def test_critics_that_abstain_do_not_count():
    silent, speaking = FixedCritic(SILENCE), FixedCritic(ADVICE)
    (answer,) = ask(Ensemble((silent, speaking, speaking), agree=2))
    assert answer.suggestions == (LAMP, DOOR)


def test_too_few_answers_are_an_abstention_with_the_reasons():
    critics = (FixedCritic(ADVICE), FixedCritic(SILENCE), FixedCritic(aa.Abstention("too dark")))
    (answer,) = ask(Ensemble(critics, agree=2))
    assert answer == aa.Abstention("only 1 of 3 critics could tell: the server did not answer; too dark")


def test_repairs_and_summaries_are_all_told():
    one, other = aa.Critique((LAMP,), "dim", ("swapped corners",)), aa.Critique((LAMP,), "dull", ("cut texts",))
    (answer,) = ask(Ensemble((FixedCritic(one), FixedCritic(other))))
    assert (answer.summary, answer.repairs) == ("dim dull", ("swapped corners", "cut texts"))


def test_every_critic_is_asked_once_about_a_whole_batch():
    one, other = Scripted((ADVICE,)), Scripted((ADVICE,))
    assert len(ask(Ensemble((one, other)), times=3)) == 3
    assert one.asked == other.asked == ["a pear"] * 3


@pytest.mark.parametrize("options", [{"agree": 3}, {"agree": 0}, {"overlap": 0}, {"overlap": 1.1}])
def test_an_ensemble_that_cannot_agree_is_refused(options):
    with pytest.raises(aa.InvalidValueError, match="cannot agree on anything"):
        Ensemble((FixedCritic(ADVICE),) * 2, **options)


# --- Cached ----------------------------------------------------------------------------------------------------------


def test_the_same_question_is_asked_once(tmp_path):
    critic = Scripted((ADVICE,))
    for _ in range(3):
        assert Cached(critic, folder=tmp_path).critique(PICTURE, "a pear") == ADVICE
    assert critic.asked == ["a pear"]


@given(critiques)
def test_a_kept_answer_is_the_answer(tmp_path_factory, critique):
    folder = tmp_path_factory.mktemp("answers")
    cached = Cached(FixedCritic(critique), folder=folder)
    assert ask(cached) == ask(cached) == [critique]


def test_what_differs_is_asked_anew(tmp_path):
    palette = PICTURE.quantize(2)
    recoloured = palette.copy()
    recoloured.putpalette([9, 9, 9] * 2)
    questions = [
        (PICTURE, "a pear"),
        (PICTURE, "a pear "),
        (Image.new("RGB", (16, 16), "navy"), "a pear"),
        (Image.new("L", (16, 16)), "a pear"),
        (Image.new("L", (8, 32)), "a pear"),
        (palette, "a pear"),
        (recoloured, "a pear"),
    ]
    critic = Scripted((ADVICE,))
    Cached(critic, folder=tmp_path).critique_batch(*zip(*questions, strict=True))
    assert len(critic.asked) == len(questions)
    assert len(list(tmp_path.rglob("*.json"))) == len(questions)


def test_another_critic_has_answers_of_its_own(tmp_path):
    first, second = FixedCritic(ADVICE), FixedCritic(aa.Critique())
    assert ask(Cached(first, folder=tmp_path)) == [ADVICE]
    assert ask(Cached(second, folder=tmp_path)) == [aa.Critique()]
    assert ask(Cached(second, folder=tmp_path, identity=repr(first))) == [ADVICE]


def test_a_batch_asks_only_for_what_is_missing_and_each_once(tmp_path):
    critic = Scripted((ADVICE,))
    cached = Cached(critic, folder=tmp_path)
    cached.critique(PICTURE, "a pear")

    answers = cached.critique_batch([PICTURE] * 4, ["a fig", "a pear", "a fig", "a plum"])

    assert answers == [ADVICE] * 4
    assert sorted(critic.asked) == ["a fig", "a pear", "a plum"]


def test_answers_stay_in_order(tmp_path):
    @dataclass(frozen=True)
    class Echo(aa.Critic):
        def critique(self, image, prompt):
            return aa.Critique(summary=prompt)

    prompts = ["b", "a", "b", "c"]
    cached = Cached(Echo(), folder=tmp_path)
    for _ in range(2):
        assert [one.summary for one in cached.critique_batch([PICTURE] * 4, prompts)] == prompts


def test_an_abstention_is_asked_again(tmp_path):
    critic = Scripted((SILENCE, ADVICE))
    cached = Cached(critic, folder=tmp_path)
    assert [*ask(cached), *ask(cached), *ask(cached)] == [SILENCE, ADVICE, ADVICE]


def test_an_abstention_may_be_kept(tmp_path):
    critic = Scripted((SILENCE, ADVICE))
    assert [ask(Cached(critic, folder=tmp_path, abstentions=True))[0] for _ in range(2)] == [SILENCE] * 2
    assert ask(Cached(critic, folder=tmp_path)) == [ADVICE]


@pytest.mark.parametrize("spoilt", [b"", b"{", b"\xff\x00", b'{"prompt": "a pear", "answer": {"reason": ""}}', b"[]"])
def test_a_spoilt_file_is_said_asked_again_and_replaced(tmp_path, caplog, spoilt):
    critic = Scripted((ADVICE,))
    cached = Cached(critic, folder=tmp_path)
    cached.critique(PICTURE, "a pear")
    (file,) = tmp_path.rglob("*.json")
    file.write_bytes(spoilt)

    with caplog.at_level(logging.WARNING, logger="artaug"):
        assert cached.critique(PICTURE, "a pear") == ADVICE

    assert f"{file} holds no answer of a critic and is asked for again" in caplog.text
    assert len(critic.asked) == 2
    assert cached.critique(PICTURE, "a pear") == ADVICE
    assert len(critic.asked) == 2


def test_a_write_that_fails_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr("pathlib.Path.replace", full)
    with pytest.raises(OSError, match="no space left"):
        Cached(FixedCritic(ADVICE), folder=tmp_path).critique(PICTURE, "a pear")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_the_files_say_nothing_of_the_critic(tmp_path):
    Cached(FixedCritic(ADVICE), folder=tmp_path, identity="key sk-123").critique(PICTURE, "a pear")
    (file,) = tmp_path.rglob("*.json")
    assert "sk-123" not in file.read_text()


def test_a_critic_without_an_identity_is_refused(tmp_path):
    class Nameless(aa.Critic):
        def critique(self, image, prompt):
            return ADVICE

    with pytest.raises(aa.InvalidValueError, match="cannot be told from another Nameless"):
        Cached(Nameless(), folder=tmp_path)
    assert ask(Cached(Nameless(), folder=tmp_path, identity="nameless, 1")) == [ADVICE]


# --- Retried ---------------------------------------------------------------------------------------------------------


def test_a_critic_that_answers_is_asked_once():
    critic = Scripted((ADVICE,))
    assert ask(Retried(critic)) == [ADVICE]
    assert len(critic.asked) == 1


def test_a_critic_that_abstains_is_asked_again():
    critic = Scripted((SILENCE, SILENCE, ADVICE))
    assert ask(Retried(critic, times=2)) == [ADVICE]


def test_it_is_asked_no_more_often_than_said_and_all_reasons_are_given():
    critic = Scripted((SILENCE, aa.Abstention("no JSON")))
    assert ask(Retried(critic, times=2)) == [
        aa.Abstention("asked 3 times: the server did not answer; no JSON"),
    ]
    assert len(critic.asked) == 3


def test_only_the_pictures_without_an_answer_are_asked_about_again():
    @dataclass(frozen=True)
    class Moody(aa.Critic):
        asked: list = field(default_factory=list)

        def critique(self, image, prompt):
            self.asked.append(prompt)
            return aa.Critique(summary=prompt) if self.asked.count(prompt) == int(prompt) else SILENCE

    critic = Moody()
    answers = Retried(critic, times=2).critique_batch([PICTURE] * 4, ["1", "2", "3", "4"])
    assert [getattr(one, "summary", None) for one in answers] == ["1", "2", "3", None]
    assert critic.asked == ["1", "2", "3", "4", "2", "3", "4", "3", "4"]


def test_no_second_time_is_refused():
    with pytest.raises(aa.InvalidValueError, match="asks no second time"):
        Retried(FixedCritic(ADVICE), times=0)


# --- all of them -----------------------------------------------------------------------------------------------------


def test_they_are_critics_like_any_other(tmp_path):
    measuring = PhotometricCritic()
    check_critic(Ensemble((measuring, FixedCritic(ADVICE))))
    check_critic(Cached(measuring, folder=tmp_path))
    check_critic(Retried(measuring))
    check_critic(Cached(Retried(Ensemble((measuring, measuring))), folder=tmp_path))


def test_a_member_that_breaks_its_promise_is_named(tmp_path):
    class Wrong(aa.Critic):
        def critique(self, image, prompt):
            return "brighter"

    for critic in (
        Ensemble((Wrong(), FixedCritic(ADVICE))),
        Cached(Wrong(), folder=tmp_path, identity="wrong"),
        Retried(Wrong()),
    ):
        with pytest.raises(aa.ContractError, match=r"Wrong.critique_batch returned str .* for picture 0 \('a pear'\)"):
            ask(critic)
