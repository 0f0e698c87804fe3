"""Win rates in a comparison: a judge's rows beside those of scorers, ties, position bias, and answers that are missing."""

import json
from dataclasses import dataclass
from zlib import crc32

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy.stats import binomtest

import artaug as aa
from artaug.evaluation.statistics import sign_test
from artaug.scorers import Exposure
from artaug.testing import FixedJudge
from support.judges import Lighter, light
from support.strategies import preferences

PROMPTS = [f"picture {number}" for number in range(24)]


@dataclass(frozen=True)
class Grey(aa.Synthesizer):
    """Flat pictures; ``offset`` lightens those of even prompts, darkens one in three, and leaves the others."""

    offset: int = 0

    def synthesize(self, plan, *, seed):
        number = crc32(plan.prompt.encode())
        change = {0: self.offset, 1: -self.offset // 2}.get(number % 3, 0 if number % 2 else self.offset)
        return Image.new("L", (4, 4), 100 + number % 20 + change + seed % 2)


@dataclass(frozen=True)
class Light(aa.Synthesizer):
    """Flat pictures, all as light."""

    offset: int

    def synthesize(self, plan, *, seed):
        return Image.new("RGB", (4, 4), (128 + self.offset,) * 3)


def compared(*, base=Grey(), candidates=None, judges=None, prompts=PROMPTS, **options):
    candidates = {"round 1": Grey(40)} if candidates is None else candidates
    judges = [Lighter()] if judges is None else judges
    return aa.compare(base, candidates, prompts, judges=judges, progress=False, **options)


def drawn_lights(synthesizer, comparison):
    """The light of each picture that a comparison drew, computed apart from it."""
    draws = zip(comparison.prompts, comparison.seeds, strict=True)
    return [light(synthesizer.synthesize(aa.Plan(prompt), seed=seed)) for prompt, seed in draws]


@given(st.integers(0, 60), st.integers(0, 60))
def test_the_sign_test_is_the_exact_binomial_test(wins, losses):
    expected = binomtest(wins, wins + losses).pvalue if wins + losses else 1.0
    assert sign_test(wins, losses) == pytest.approx(expected)


def test_a_count_below_zero_is_refused():
    with pytest.raises(aa.InvalidValueError, match=r"sign_test\(-1, 2\)"):
        sign_test(-1, 2)


def test_a_row_has_the_wins_ties_and_losses_over_the_base():
    comparison = compared(scorers=[Exposure()])
    differences = np.subtract(drawn_lights(Grey(40), comparison), drawn_lights(Grey(), comparison))
    row = comparison.row("Lighter", "round 1")
    assert (row.judged, row.n, row.base) == (True, len(PROMPTS), 0.5)
    assert row.enhanced == row.win_rate == ((differences > 0) + 0.5 * (differences == 0)).mean()
    assert row.tie_rate == (differences == 0).mean() > 0
    assert -0.5 <= row.ci_low <= row.delta <= row.ci_high <= 0.5
    assert [row.scorer for row in comparison.rows] == ["Exposure", "Lighter"]


def test_exchanging_the_arms_exchanges_wins_and_losses():
    forth = compared().row("Lighter", "round 1")
    back = aa.compare(Grey(40), {"base it was": Grey()}, PROMPTS, judges=[Lighter()], progress=False).rows[0]
    assert back.win_rate == pytest.approx(1 - forth.win_rate)
    assert back.tie_rate == forth.tie_rate


def test_equal_arms_tie_on_every_prompt():
    row = compared(candidates={"same": Grey()}).rows[0]
    assert (row.win_rate, row.tie_rate, row.delta, row.significant) == (0.5, 1.0, 0.0, False)


def test_a_judge_that_always_says_first_gives_ties_only_and_is_reported(caplog):
    comparison = compared(judges=[FixedJudge(1.0)])
    row = comparison.rows[0]
    (bias,) = comparison.position_bias
    assert (row.win_rate, row.tie_rate) == (0.5, 1.0)
    assert (bias.pairs, bias.first, bias.second, bias.consistency) == (24, 24, 0, 0.0)
    assert bias.significant
    assert "FixedJudge has a position bias" in comparison.table()
    assert "FixedJudge has a position bias" in caplog.text


def test_a_consistent_judge_has_no_bias_and_says_so_in_the_table(caplog):
    comparison = compared()
    assert "Lighter answered consistently about all 24 pairs" in comparison.table()
    assert comparison.position_bias[0].p_value == 1.0
    assert caplog.records == []


def test_the_scores_of_scorers_are_the_same_with_judges_as_without():
    with_judge, without = compared(scorers=[Exposure()]), compared(scorers=[Exposure()], judges=())
    assert with_judge.candidates["round 1"].scores["Exposure"] == without.candidates["round 1"].scores["Exposure"]
    assert with_judge.base.images == without.base.images


def test_the_size_of_batches_and_further_candidates_change_no_answer():
    one, many = compared(batch_size=1), compared(candidates={"other": Grey(7), "round 1": Grey(40)}, batch_size=11)
    assert one.candidates["round 1"].judgments == many.candidates["round 1"].judgments


def test_several_pictures_of_a_prompt_count_by_their_mean():
    comparison = compared(images_per_prompt=2)
    scores = np.reshape(comparison.candidates["round 1"].scores["Lighter"], (2, len(PROMPTS)))
    assert comparison.rows[0].enhanced == pytest.approx(scores.mean())
    assert comparison.rows[0].n == len(PROMPTS)


def test_a_comparison_with_judges_is_the_same_after_json():
    comparison = compared(judges=[Lighter(silent=frozenset(PROMPTS[:2])), FixedJudge(0.25)], scorers=[Exposure()])
    again = aa.Comparison.from_dict(json.loads(json.dumps(comparison.to_dict())))
    assert again.rows == comparison.rows
    assert again.position_bias == comparison.position_bias
    assert again.candidates["round 1"].judgments == comparison.candidates["round 1"].judgments
    assert again.table() == comparison.table()


def test_a_comparison_that_was_written_before_there_were_judges_is_read():
    content = compared(scorers=[Exposure()], judges=()).to_dict()
    del content["judgments"]
    for row in content["rows"]:
        del row["judged"]
    assert aa.Comparison.from_dict(content).position_bias == ()


def test_a_prompt_without_an_answer_is_left_out_and_said():
    silent = Lighter(silent=frozenset(PROMPTS[:5]))
    comparison = compared(judges=[silent])
    assert comparison.rows[0].n == len(PROMPTS) - 5
    assert comparison.position_bias[0].unanswered == 5
    assert "it had no answer about 5 more, which are left out: the reply 'both!' to 'picture 0'" in comparison.table()
    assert comparison.rows[0].win_rate == compared(prompts=PROMPTS[5:]).rows[0].win_rate


def test_a_judge_without_any_answer_is_an_error_with_its_reason():
    with pytest.raises(aa.ScoringError, match=r"had no answer about 24 of 24 pictures of 'round 1'.*names no picture"):
        compared(judges=[Lighter(silent=frozenset(PROMPTS))])


def test_a_judge_that_raises_on_some_pictures_loses_no_other_answer():
    broken = Lighter(broken=frozenset(PROMPTS[:2]))
    with pytest.raises(
        aa.ScoringError, match=r"Lighter raised on 2 pictures, first on round 1's of 'picture 0'"
    ) as caught:
        compared(judges=[broken])
    comparison = caught.value.comparison
    assert comparison.rows[0].n == len(PROMPTS) - 2
    assert comparison.candidates["round 1"].judgments["Lighter"][:3].count(None) == 2
    assert [failure.scorer for failure in comparison.failures] == ["Lighter"] * 2


def test_a_judge_that_raises_on_every_picture_raises_at_once():
    broken = Lighter(broken=frozenset(PROMPTS))
    with pytest.raises(aa.ScoringError, match=r"the judge 'Lighter' raised KeyError"):
        compared(judges=[broken], batch_size=4)
    assert len(broken.asked) < 2 * len(PROMPTS)


def test_the_verdict_says_win_rates():
    comparison = compared(candidates={"lighter": Light(60), "darker": Light(-60), "same": Light(0)}, base=Light(0))
    assert comparison.verdict("lighter").startswith("Lighter prefers it, win rate 100.0% [")
    assert comparison.verdict("darker").startswith("Lighter prefers the base, win rate 0.0% [")
    assert comparison.verdict("same").startswith("Lighter without a clear preference: win rate 50.0% [")


def test_a_win_on_every_one_of_few_prompts_has_no_interval_of_one_point():
    row = compared(candidates={"lighter": Light(60)}, base=Light(0), prompts=PROMPTS[:6]).rows[0]
    assert row.ci_low + 0.5 == pytest.approx(0.5407, abs=1e-3)  # Clopper and Pearson's of 6 of 6
    assert row.ci_high == 0.5


def test_a_row_of_a_judge_that_filtered_the_pairs_is_marked():
    comparison = compared(filtered_by=[aa.Preferred(Lighter())])
    assert comparison.rows[0].filtered_by
    assert "Lighter *" in comparison.table()


def test_a_judge_and_a_scorer_of_one_name_are_refused():
    class Same(aa.Scorer):
        name = "Lighter"

        def score(self, image, prompt):
            return 0.0

    with pytest.raises(aa.InvalidValueError, match=r"scorers and judges named \['Lighter', 'Lighter'\]"):
        compared(scorers=[Same()])


def test_what_is_no_judge_is_refused():
    with pytest.raises(aa.InvalidValueError, match=r"judges\[0\]=.*expected an instance of artaug.PairwiseJudge"):
        compared(judges=[Exposure()])


@given(st.lists(preferences(), max_size=30))
def test_bias_counts_only_pairs_whose_answers_do_not_agree(judgments):
    bias = aa.PositionBias.of("judge", judgments)
    swapped = aa.PositionBias.of("judge", [judgment.swapped for judgment in judgments])
    assert bias == swapped
    assert bias.first + bias.second == sum(judgment.position != 0 for judgment in judgments)
    assert all(judgment.winner == "tie" for judgment in judgments if judgment.position)
