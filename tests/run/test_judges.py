"""A judge in the loop: as the filter, as the stop rule and in the comparison, on tiny models and on the playground."""

import itertools
from dataclasses import dataclass, field

import pytest

import artaug as aa
from artaug import playground
from artaug.critics import PhotometricCritic
from artaug.diffusion import DiffusersSynthesizer
from artaug.scorers import Photometric
from artaug.testing import FixedCritic, FixedFilter, FixedJudge, SwatchSynthesizer
from support.judges import Lighter
from support.tiny_flux import TINY_SIZE, tiny_flux

ADVICE = FixedCritic(aa.Critique((aa.Suggestion(aa.Box(0, 0, 0.5, 1), "a bright window"),)))
PROMPTS = ["a kitchen", "a harbour", "a garden"]
HELD_OUT = [f"held-out picture {number}" for number in range(6)]
TRAINER = aa.DifferentialLoRATrainer(rank=2, steps=2, batch_size=2, learning_rate=1e-2)
SWATCHES = SwatchSynthesizer()
WON, LOST, TIED, FIRST = (1, 0), (0, 1), (0.5, 0.5), (1, 1)
"""What a judge answers about a pair in both orders."""


@dataclass
class ScriptedJudge(aa.PairwiseJudge):
    """Answers about each pair by the next two numbers of a list."""

    answers: list[float | aa.Abstention]
    seen: list[tuple[bytes, bytes]] = field(default_factory=list, repr=False)
    identity = "scripted"

    @classmethod
    def of(cls, *pairs):
        return cls([*itertools.chain(*pairs)])

    def prefer(self, first, second, prompt):
        self.seen.append((first.tobytes(), second.tobytes()))
        return self.answers.pop(0)


@pytest.fixture(scope="module")
def flux():
    size = {"width": TINY_SIZE, "height": TINY_SIZE, "steps": 2, "max_sequence_length": 32}
    return DiffusersSynthesizer(pipeline=tiny_flux(), guide=aa.OutputMix(), **size)


def enhanced(synthesizer, *, judge, at_least=0.0, rounds=1, **options):
    return aa.enhance(
        PROMPTS,
        synthesizer=synthesizer,
        critic=ADVICE,
        planner=aa.GreedyPlanner(),
        keep=FixedFilter(keep=True),
        trainer=TRAINER,
        stop=aa.StopRule(judge, HELD_OUT, at_least=at_least),
        rounds=rounds,
        batch_size=2,
        **{"progress": False, "check": "arguments", **options},
    )


@pytest.mark.parametrize(
    ("pairs", "at_least", "accepted"),
    [
        ([WON] * 6, 0.0, True),
        ([WON] * 6, 0.1, False),  # of 6 wins in 6, the interval begins at a win rate of 54%
        ([WON] * 5 + [LOST], 0.0, False),
        ([WON] * 5 + [TIED], 0.0, False),
        ([FIRST] * 6, 0.0, False),
        ([LOST] * 6, 0.0, False),
    ],
    ids=["all won", "by too little", "one lost", "one tied", "by position", "all lost"],
)
def test_a_round_counts_only_if_it_wins_against_the_round_before(pairs, at_least, accepted):
    stop = aa.StopRule(ScriptedJudge.of(*pairs), HELD_OUT, at_least=at_least)
    comparison = aa.compare(SWATCHES, {"after": SWATCHES}, HELD_OUT, judges=stop.judges, progress=False)
    assert stop.accepts(comparison, seed=0) is accepted
    assert comparison.rows[0].win_rate == sum({WON: 1, LOST: 0}.get(pair, 0.5) for pair in pairs) / 6


@pytest.mark.parametrize("stored", [False, True], ids=["in memory", "store"])
def test_each_round_is_judged_against_the_pictures_of_the_round_before(flux, tmp_path, stored):
    judge = ScriptedJudge.of(*[WON] * 12, *[FIRST] * 6)
    result = enhanced(flux, judge=judge, rounds=4, store=tmp_path / "run" if stored else None)

    assert [finished.accepted for finished in result.rounds] == [True, True, False]
    assert result.stop_reason == "round 3 did not help on held-out prompts"
    assert result.lora is result.rounds[1].lora or stored
    by_round = [judge.seen[start : start + 12 : 2] for start in (0, 12, 24)]
    for before, after in itertools.pairwise(by_round):
        assert [picture for picture, _ in before] == [picture for _, picture in after]
    for finished in result.rounds:
        assert finished.gain.judged
        assert len(finished.comparison.base.images) == (6 if stored else 0)
        assert finished.comparison.base.scores["ScriptedJudge"] == (0.5,) * 6


def test_a_resumed_run_judges_as_one_that_was_not_interrupted(flux, tmp_path):
    def run(rounds, judge):
        store = aa.Store(tmp_path / "run", allow={"rounds"})
        return enhanced(flux, judge=judge, rounds=rounds, at_least=-1, store=store)

    run(1, Lighter(0.25))
    again = Lighter(0.25)
    resumed = run(2, again)
    whole = enhanced(flux, judge=Lighter(0.25), rounds=2, at_least=-1)
    assert len(again.asked) == 2 * len(HELD_OUT)
    for one, other in zip(resumed.rounds, whole.rounds, strict=True):
        assert one.gain == other.gain
        assert one.comparison.to_dict()["judgments"] == other.comparison.to_dict()["judgments"]
    assert aa.Run(tmp_path / "run").rounds[1].comparison.position_bias == whole.rounds[1].comparison.position_bias


def test_too_few_answers_for_a_decision_are_an_error_with_the_reason():
    silent = aa.Abstention("'both!' names no picture")
    stop = aa.StopRule(ScriptedJudge.of(*[WON] * 5, (silent, silent)), HELD_OUT)
    comparison = aa.compare(SWATCHES, {"after": SWATCHES}, HELD_OUT, judges=stop.judges, progress=False)
    with pytest.raises(aa.ScoringError, match=r"at least 6 prompts, and got one about 5.*'both!' names no picture"):
        stop.accepts(comparison, seed=0)


def test_a_judge_that_cannot_answer_is_found_before_anything_is_drawn(flux):
    class Broken(aa.PairwiseJudge):
        def prefer(self, first, second, prompt):
            raise KeyError("weights")

    with pytest.raises(aa.ScoringError, match=r"the judge 'Broken' raised KeyError") as caught:
        enhanced(flux, judge=Broken(), check="scorers")
    assert "the check before a run" in caught.value.__notes__[0]


def test_what_is_neither_scorer_nor_judge_is_refused():
    with pytest.raises(
        aa.InvalidValueError, match=r"artaug.Scorer or artaug.PairwiseJudge, received a Comparison|an int"
    ):
        aa.StopRule(3, HELD_OUT)
    with pytest.raises(aa.InvalidValueError, match=r"Make one of the class: Lighter\(\.\.\.\)"):
        aa.StopRule(Lighter, HELD_OUT)


@dataclass(frozen=True)
class Brighter(aa.PairwiseJudge):
    """Prefers the picture with the better light and color, and calls it a tie where they hardly differ."""

    margin: float = 0.005

    def prefer(self, first, second, prompt):
        difference = Photometric().score(first, prompt) - Photometric().score(second, prompt)
        return 0.5 if abs(difference) < self.margin else float(difference > 0)


def test_on_the_playground_a_judge_filters_stops_and_compares(tmp_path):
    prompts, held_out = playground.prompts(6, seed=0), playground.prompts(8, seed=0, held_out=True)
    synthesizer = playground.synthesizer(guide=aa.OutputMix())
    result = aa.enhance(
        prompts,
        synthesizer=synthesizer,
        critic=PhotometricCritic(),
        planner=aa.GreedyPlanner(),
        keep=aa.Preferred(Brighter()) & ~aa.Preferred(FixedJudge(1.0)),
        trainer=aa.DifferentialLoRATrainer(rank=4, steps=16, batch_size=4, learning_rate=8e-3),
        stop=aa.StopRule(Brighter(), held_out),
        rounds=1,
        store=tmp_path / "run",
        progress=False,
    )
    (only,) = result.rounds
    assert only.accepted
    assert only.gain.win_rate > 0.9
    kept = [attempt for attempt in only.attempts if isinstance(attempt, aa.Kept)]
    assert kept
    assert all("Brighter prefers after in both orders" in attempt.verdict.reason for attempt in kept)

    comparison = aa.compare(
        synthesizer,
        {"round 1": synthesizer.with_lora(result.lora)},
        held_out,
        scorers=[Photometric()],
        judges=[Brighter(), FixedJudge(1.0)],
        filtered_by=[aa.Preferred(Brighter())],
        seed=1,
        progress=False,
    )
    judged, scored = comparison.row("Brighter", "round 1"), comparison.row("Photometric", "round 1")
    assert judged.filtered_by
    assert (judged.direction, scored.direction) == (1, 1)
    assert comparison.row("FixedJudge", "round 1").tie_rate == 1.0
    table = comparison.table()
    assert "Brighter answered consistently about all 8 pairs." in table
    assert "FixedJudge has a position bias: it contradicts itself about 8 of 8 pairs" in table
    aa.write_report(tmp_path / "report.html", comparison=comparison, result=result)
    assert "FixedJudge has a position bias" in (tmp_path / "report.html").read_text(encoding="utf-8")
