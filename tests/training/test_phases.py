"""A training plan laid out over the steps: whole steps, by shares, and batches that every step can name."""

import math
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from artaug.errors import InvalidValueError
from artaug.training import PairedDifference, Stage, SupervisedFineTuning, TrainingPlan, TwoStage
from artaug.training.config import TrainingConfig
from artaug.training.phases import split_into_phases

OBJECTIVE = PairedDifference()
SHARES = st.lists(st.floats(0.05, 20.0), min_size=1, max_size=4)


def plan_of(groups, shares):
    return TrainingPlan(
        tuple((index,) for index in range(groups)), tuple(Stage(OBJECTIVE.loss, share) for share in shares)
    )


def phases_of(plan, steps, *, objective=OBJECTIVE, **options):
    return split_into_phases(plan, TrainingConfig(steps=steps, objective=objective, **options))


def boundaries_of(plan, steps):
    phases = phases_of(plan, steps)
    return [phases[0].start, *(phase.stop for phase in phases)]


@given(groups=st.integers(1, 4), shares=SHARES, steps=st.integers(1, 200))
def test_phases_follow_each_other_without_a_gap_and_take_all_steps(groups, shares, steps):
    plan = plan_of(groups, shares)
    try:
        phases = phases_of(plan, steps)
    except InvalidValueError:
        assume(False)
    assert (phases[0].start, phases[-1].stop) == (0, steps)
    assert all(first.stop == second.start for first, second in pairwise(phases))
    assert [(phase.group, phase.stage) for phase in phases] == [
        (group, stage) for group in range(groups) for stage in range(len(shares))
    ]
    assert [phase.is_last_stage for phase in phases] == [phase.stage == len(shares) - 1 for phase in phases]
    assert all(phase.pairs == plan.groups[phase.group] for phase in phases)
    assert all(phase.group_start == phases[phase.group * len(shares)].start for phase in phases)


@given(groups=st.integers(1, 4), shares=SHARES, steps=st.integers(1, 200))
def test_a_boundary_is_the_cumulative_share_to_the_nearest_step(groups, shares, steps):
    plan = plan_of(groups, shares)
    try:
        boundaries = boundaries_of(plan, steps)
    except InvalidValueError:
        assume(False)
    shares = [share for _ in range(groups) for share in shares]
    for index, boundary in enumerate(boundaries):
        assert abs(boundary - steps * math.fsum(shares[:index]) / math.fsum(shares)) <= 0.5 + 1e-9


@pytest.mark.parametrize(
    ("shares", "steps", "boundaries"),
    [
        ((1, 1), 10, [0, 5, 10]),
        ((1, 1), 5, [0, 2, 5]),  # 2.5: a half goes to the even number
        ((1, 1), 7, [0, 4, 7]),  # 3.5: likewise
        ((3, 7), 8, [0, 2, 8]),  # 2.4
        ((3, 7), 9, [0, 3, 9]),  # 2.7
        ((1, 1, 1), 10, [0, 3, 7, 10]),  # 3.33 and 6.67: cumulative shares are rounded, not shares
        ((0.5, 0.5), 2, [0, 1, 2]),
    ],
)
def test_boundaries_are_rounded_at_the_cumulative_shares(shares, steps, boundaries):
    assert boundaries_of(plan_of(1, shares), steps) == boundaries


@pytest.mark.parametrize(("steps", "fits"), [(3, False), (4, True), (5, True)])
def test_each_stage_of_each_group_needs_a_step(steps, fits):
    plan = TwoStage().training_plan(2)
    if fits:
        assert min(phase.steps for phase in phases_of(plan, steps, objective=TwoStage())) >= 1
        return
    with pytest.raises(InvalidValueError, match=r"steps=3 are too few for TwoStage.*2 group\(s\).*2 stage\(s\)"):
        phases_of(plan, steps, objective=TwoStage())


@given(steps=st.integers(1, 40), echo=st.integers(1, 5))
def test_a_batch_comes_again_only_when_all_others_have_come(steps, echo):
    (phase,) = phases_of(plan_of(1, (1,)), steps, echo=echo)
    indices = [phase.batch_index(step) for step in range(1, steps + 1)]
    distinct = -(-steps // echo)
    assert indices == [number % distinct for number in range(steps)]
    assert max(indices.count(index) for index in indices) <= echo


@given(shares=st.lists(st.floats(0.5, 2.0), min_size=2, max_size=3), steps=st.integers(30, 60), echo=st.integers(1, 4))
def test_stages_of_a_group_have_batches_of_their_own(shares, steps, echo):
    phases = phases_of(plan_of(2, shares), steps, echo=echo)
    for group in range(2):
        batches = [
            {phase.batch_index(step) for step in range(phase.start + 1, phase.stop + 1)}
            for phase in phases
            if phase.group == group
        ]
        assert min(batches[0]) == 0  # every group counts from its own start
        assert len(set().union(*batches)) == sum(len(indices) for indices in batches)


def test_batches_of_two_stages_with_echo():
    objective = TwoStage(per_pair=False)
    first, second = phases_of(objective.training_plan(2), 10, objective=objective, echo=2)
    steps = [(phase, step) for phase in (first, second) for step in range(phase.start + 1, phase.stop + 1)]
    assert [phase.batch_index(step) for phase, step in steps] == [0, 1, 2, 0, 1, 5, 6, 7, 5, 6]


def one_phase(pairs, steps, **options):
    plan = TrainingPlan((tuple(range(pairs)),), (Stage(OBJECTIVE.loss),))
    (phase,) = phases_of(plan, steps, **options)
    return phase


@given(steps=st.integers(1, 1500), pairs=st.integers(1, 400), echo=st.integers(2, 4))
def test_a_long_training_goes_through_its_batches_in_cycles_that_hold_every_pair(steps, pairs, echo):
    phase = one_phase(pairs, steps, batch_size=2, echo=echo)
    indices = [phase.batch_index(step) for step in range(1, steps + 1)]
    uses = Counter(indices)
    assert sorted(uses) == list(range(phase.batches))  # as many as without cycles, none left out
    assert max(uses.values()) <= echo
    cycle, cycles = phase.cycle(1), [phase.cycle(1)]
    while cycle.stop <= steps:
        assert phase.cycle(cycle[-1]) == cycle
        cycle = phase.cycle(cycle.stop)
        cycles.append(cycle)
    assert [step for cycle in cycles for step in cycle] == list(range(1, steps + 1))
    batches = [{indices[step - 1] for step in cycle} for cycle in cycles]
    assert sum(map(len, batches)) == phase.batches  # no batch in two of them
    enough = max(128, -(-pairs // 2))
    assert max(map(len, batches)) < 2 * enough
    assert min(map(len, batches)) >= min(enough, phase.batches)


@pytest.mark.parametrize(
    ("pairs", "steps", "echo"),
    [(8, 400, 4), (400, 400, 4), (401, 400, 3), (800, 400, 2), (1600, 400, 1), (5000, 400, 1), (8, 3, 1)],
)
def test_by_default_batches_are_used_as_often_as_the_objective_recommends_if_that_leaves_out_no_pair(
    pairs, steps, echo
):
    assert one_phase(pairs, steps, batch_size=4).echo == echo
    assert one_phase(pairs, steps, batch_size=4, objective=SupervisedFineTuning()).echo == 1
    assert one_phase(pairs, steps, batch_size=4, objective=TwoStage(), echo=7).echo == 7
