"""Every prompt is counted, with a reason where it was lost."""

import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

import artaug as aa
from support.strategies import pair

VERDICT = aa.Verdict(keep=False, reason="Listed rose by 0.1, threshold 0.5", scores={})
skips = st.builds(
    aa.Skipped,
    st.just("a moor"),
    st.just(0),
    st.sampled_from(["dark", "<b>", "nothing"]),
    st.sampled_from(["draw", "critique", "plan"]),
)
kept = st.just(aa.Kept(pair(0, 1), aa.Verdict(keep=True, reason="it rose", scores={})))
dropped = st.sampled_from(["Listed fell by 0.2", "Listed fell by 0.3"]).map(
    lambda reason: aa.Dropped(pair(1, 0), aa.Verdict(keep=False, reason=reason, scores={}))
)
runs = st.lists(skips | kept | dropped, max_size=20)


@given(runs)
def test_every_prompt_is_counted_once(attempts):
    steps = aa.Funnel.of(attempts).steps
    lost = sum(count for step in steps for _, count in step.lost)
    assert [step.name for step in steps] == ["prompts", "drawn", "critiqued", "redrawn", "kept"]
    assert steps[0].count == len(attempts) == steps[-1].count + lost
    assert steps[-1].count == sum(isinstance(attempt, aa.Kept) for attempt in attempts)
    assert steps[3].count == sum(not isinstance(attempt, aa.Skipped) for attempt in attempts)


@given(runs, runs)
def test_two_runs_together_are_the_sum(first_run, second_run):
    runs = (first_run, second_run, first_run + second_run)
    counts = [[step.count for step in aa.Funnel.of(attempts).steps] for attempts in runs]
    assert counts[2] == [first + second for first, second in zip(*counts[:2], strict=True)]


@given(runs)
def test_it_prints_as_text_and_as_html_with_reasons_escaped(attempts):
    funnel = aa.Funnel.of(attempts)
    assert str(funnel).count("#") >= 0
    assert "<b>" not in funnel._repr_html_()
    assert 0 <= funnel.kept_fraction <= 1


def test_reasons_that_differ_only_in_numbers_are_counted_together_and_rare_ones_are_summed():
    attempts = [
        aa.Dropped(pair(0, 1), aa.Verdict(keep=False, reason=f"fell by {number}", scores={})) for number in range(7)
    ]
    attempts += [aa.Skipped("a", 0, reason, "plan") for reason in ("one", "two", "three", "four", "five")]
    funnel = aa.Funnel.of(attempts)
    assert funnel.steps[-1].lost == (("fell by ...", 7),)
    assert "2 for 2 other reasons" in str(funnel)


def test_the_loop_records_the_stage_at_which_it_skipped():
    from artaug.testing import FixedCritic, FixedFilter, SwatchSynthesizer  # noqa: PLC0415 - beside its use

    def run(answer):
        return aa.improve(
            ["a", "b"],
            synthesizer=SwatchSynthesizer(),
            critic=FixedCritic(answer),
            planner=aa.GreedyPlanner(),
            keep=FixedFilter(keep=True),
            seed=0,
        )

    counts = [
        [step.count for step in aa.Funnel.of(run(answer)).steps] for answer in (aa.Abstention("no"), aa.Critique())
    ]
    assert counts == [[2, 2, 0, 0, 0], [2, 2, 2, 0, 0]]


def test_the_figure_has_a_bar_for_each_step(tmp_path):
    pytest.importorskip("matplotlib")
    figure = aa.Funnel.of([aa.Skipped("a", 0, "dark"), aa.Dropped(pair(0, 1), VERDICT)]).figure()
    (axes,) = figure.axes
    assert [bar.get_width() for bar in axes.patches[5:]] == [2, 2, 1, 1, 0]
    figure.savefig(tmp_path / "funnel.png")
    assert (tmp_path / "funnel.png").stat().st_size > 1000


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(aa.MissingExtraError, match=r"Funnel.figure needs the matplotlib package"):
        aa.Funnel.of([]).figure()


def test_lost_prompts_without_a_reason_are_refused():
    with pytest.raises(
        aa.InvalidValueError, match="has 5 prompts and 3 drawn, with reasons for 1 lost: need one for each of the 2"
    ):
        aa.Funnel((aa.FunnelStep("prompts", 5), aa.FunnelStep("drawn", 3, (("lost", 1),))))


def test_attempts_are_gone_through_once_and_not_held():
    class Passing(aa.Skipped):
        """An attempt that notices how many of it there are."""

        alive = most = 0

        def __post_init__(self):
            Passing.alive += 1
            Passing.most = max(Passing.most, Passing.alive)

        def __del__(self):
            Passing.alive -= 1

    stream = (Passing(f"prompt {number}", number, f"too dark by {number}") for number in range(200))
    funnel = aa.Funnel.of(stream)
    assert funnel.steps[2].lost == (("too dark by ...", 200),)
    assert Passing.most <= 3
