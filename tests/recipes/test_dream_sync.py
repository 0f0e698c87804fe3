"""DreamSync: which candidate of a prompt is learned from, and rounds that give the same LoRA however they are run."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import artaug as aa
from artaug import playground
from artaug.diffusion import DiffusersSynthesizer
from artaug.filtering import judge_pairs
from artaug.recipes import dreamsync
from artaug.recipes.draws import PromptDraws, RecipeFolder
from artaug.recipes.dream_sync import _attempts
from artaug.scorers import Exposure, FunctionScorer, Photometric
from artaug.testing import SwatchSynthesizer
from support.recording_trainer import same_lora, tiny_trainer

PROMPTS = playground.prompts(3, seed=0)
BASE = playground.synthesizer(steps=1)
ANY = -1.0
_TINY = tiny_trainer()


def run(trainer=_TINY, **options):
    arguments = {
        "synthesizer": BASE,
        "faithful": aa.Floor(playground.Accuracy("color"), at_least=ANY),
        "beautiful": aa.Floor(Photometric(), at_least=ANY),
        "trainer": trainer,
        "candidates": 2,
        "rounds": 2,
        "progress": False,
    }
    return dreamsync(**{"prompts": PROMPTS, **arguments, **options})


def channel(index, name):
    return FunctionScorer(function=lambda image, _: image.getpixel((0, 0))[index] / 10, name=name)


@given(st.lists(st.lists(st.tuples(*[st.integers(0, 10)] * 2), min_size=1, max_size=4), min_size=1, max_size=3))
def test_the_most_beautiful_candidate_of_those_that_pass_both_thresholds_is_kept(scores):
    draws = [
        PromptDraws(
            prompt=f"prompt {number}",
            seeds=tuple(range(len(mine))),
            images=tuple(Image.new("RGB", (4, 4), (*pair, 0)) for pair in mine),
        )
        for number, mine in enumerate(scores)
    ]
    keep = aa.Floor(channel(0, "true"), at_least=0.5) & aa.Floor(channel(1, "pretty"), at_least=0.3)

    attempts = list(_attempts(iter(draws), keep, "pretty after", RecipeFolder(None)))

    assert [attempt.pair.prompt for attempt in attempts] == [several.prompt for several in draws]
    for attempt, mine in zip(attempts, scores, strict=True):
        passing = [(true, pretty) for true, pretty in mine if true >= 5 and pretty >= 3]
        assert isinstance(attempt, aa.Kept if passing else aa.Dropped)
        assert attempt.verdict.scores["pretty after"] == max(pretty for _, pretty in passing or mine) / 10
        assert attempt.verdict.reason.startswith(f"{len(passing)} of {len(mine)} candidates pass")
        assert attempt.pair.after.getpixel((0, 0))[:2] == mine[attempt.pair.seed]


def test_every_prompt_of_every_round_is_accounted_for_and_what_is_learned_from_has_passed():
    trainer = tiny_trainer()
    faithful = aa.Floor(playground.Accuracy("color"), at_least=1.0)

    result = run(trainer, faithful=faithful)

    for finished, learned in zip(result.rounds, trainer.given, strict=True):
        assert [attempt.pair.prompt for attempt in finished.attempts] == PROMPTS
        assert learned == [attempt.pair for attempt in finished.attempts if isinstance(attempt, aa.Kept)]
        assert all(verdict.keep for verdict in judge_pairs(faithful, learned))
        assert all(pair.before == pair.after for pair in learned)
    assert result.stop_reason == "all 2 rounds ran"
    first, second = ({attempt.pair.seed for attempt in finished.attempts} for finished in result.rounds)
    assert first.isdisjoint(second)


def test_a_round_draws_and_trains_with_what_the_rounds_before_have_learned():
    trainer = tiny_trainer(learning_rate=0.05, steps=8)
    result = run(trainer)

    for pair in trainer.given[1]:
        drawn = {
            lora is None: (BASE if lora is None else BASE.with_lora(lora)) for lora in (None, result.rounds[0].lora)
        }
        pictures = {plain: one.synthesize(aa.Plan(pair.prompt), seed=pair.seed) for plain, one in drawn.items()}
        assert abs_difference(pair.after, pictures[False]) < abs_difference(pair.after, pictures[True])
    total = {name: layer.rank for name, layer in result.lora.layers.items()}
    assert set(total.values()) == {4}


def abs_difference(one, other):
    return sum(abs(a - b) for a, b in zip(one.tobytes(), other.tobytes(), strict=True))


@pytest.fixture(scope="module")
def whole():
    """A run that is not interrupted."""
    return run()


def test_the_same_arguments_give_the_same_lora_with_and_without_a_folder(whole, tmp_path):
    assert same_lora(whole.lora, run(folder=tmp_path).lora)
    assert not same_lora(whole.rounds[0].lora, run(seed=1, rounds=1).lora)


def test_an_interrupted_run_goes_on_and_ends_with_the_same_lora_and_draws_nothing_twice(whole, tmp_path, monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        run(tiny_trainer(fails_at=2), folder=tmp_path)
    drawn = []
    draw = DiffusersSynthesizer.synthesize_batch
    monkeypatch.setattr(
        DiffusersSynthesizer,
        "synthesize_batch",
        lambda self, plans, *, seeds: drawn.extend(plans) or draw(self, plans, seeds=seeds),
    )

    resumed = run(folder=tmp_path)

    assert drawn == []
    assert same_lora(resumed.lora, whole.lora)
    assert [finished.attempts for finished in resumed.rounds] == [finished.attempts for finished in whole.rounds]


def test_more_prompts_leave_what_was_drawn_of_the_others_as_it_was():
    few, more = (run(prompts=PROMPTS[:count], rounds=1).rounds[0].attempts for count in (2, 3))

    assert [attempt.pair for attempt in few] == [attempt.pair for attempt in more][:2]


def test_a_first_round_in_which_nothing_passes_is_an_error_that_counts_the_prompts():
    with pytest.raises(aa.NothingToLearnError, match=r"round 1 kept none of 3 prompts: 3 dropped.*Lower a threshold"):
        run(beautiful=aa.Floor(Photometric(), at_least=2.0))


def test_a_later_round_in_which_nothing_passes_is_the_end():
    seen = []

    def until_the_second_round(_, prompt):
        seen.append(prompt)
        return float(len(seen) <= 6)

    scorer = FunctionScorer(function=until_the_second_round)
    result = run(beautiful=aa.Floor(scorer, at_least=0.5), rounds=3)

    assert len(result.rounds) == 1
    assert result.stop_reason.startswith("round 2 kept none of 3 prompts")


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"prompts": []}, "no prompts"),
        ({"candidates": 0}, "candidates=0"),
        ({"rounds": 0}, "rounds=0"),
        ({"faithful": Exposure()}, "faithful"),
        ({"beautiful": aa.Floor(playground.Accuracy("color"), at_least=0)}, "two different ones"),
        ({"objective": aa.NegativeAware()}, "objective"),
        ({"trainer": None}, "trainer"),
        ({"synthesizer": SwatchSynthesizer()}, "no model to train"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_is_wrong_is_refused_before_the_first_picture(wrong, named):
    with pytest.raises(aa.ArtAugError, match=named):
        run(**{"trainer": tiny_trainer(), **wrong})
