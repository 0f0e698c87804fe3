"""The ablation: cells that go on where they stopped, budgets and passes as they are counted, and what its results say."""

from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from benchmarks import _ablation_arms as arms
from benchmarks import _ablation_bench as bench
from benchmarks import _ablation_cells as axes
from benchmarks import _ablation_pairs as pair_sources
from benchmarks import _ablation_statistics as statistics
from benchmarks import _ablation_summary as summary
from benchmarks import ablation
from benchmarks._ablation_plot import plot as ablation_plot
from PIL import Image

import artaug as aa
from artaug import playground
from artaug.critics import PhotometricCritic

BLACK, WHITE = (Image.new("RGB", (64, 64), colour) for colour in ("black", "white"))
QUICK = replace(axes.QUICK, strengths=(1.0, 2.0), sampling_steps=1)
MIXED, ATTENDED = "OutputMix", "RegionalAttention"
CELLS = [
    axes.Cell(axis="control", arm="words added", seed=0),
    axes.Cell(axis="front", arm=arms.DEFAULT, seed=0, kind=ATTENDED, pairs=2, steps=2),
    axes.Cell(axis="rounds", arm=arms.DEFAULT, seed=0, kind=MIXED, pairs=4, steps=2, rounds=2),
]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A journal of some cells, and the bench they were measured on."""
    folder = tmp_path_factory.mktemp("ablation")
    journal = ablation.new_journal(folder / "ablation.jsonl", QUICK)
    journal.begin()
    measuring = bench.Bench(QUICK, seed=0, loras=folder / "loras")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pair_sources, "CHUNK", 4)
        journal.measure(CELLS, measuring.completed_row)
        yield journal, measuring


def test_the_ablation_has_a_row_for_every_cell(measured):
    words, paired, two_rounds = measured[0].rows()

    gains = {row["axis"]: np.mean(row["curve"]["gain"][row["strengths"].index(1.0)]) for row in (words, paired)}
    assert gains["control"] > 5 * abs(gains["front"]), "the model knows the words, and two steps teach little"
    assert [paired[name] for name in ("kept", "images", "critic_calls")] == [2, 4, 2]
    assert (
        two_rounds["learning_passes"]
        == 2 * paired["learning_passes"]
        == 2 * (2 * 2 * arms.passes_a_step(arms.ARMS[arms.DEFAULT]))
    )
    for row in (paired, two_rounds):
        assert row["strengths"] == [0.0, *QUICK.strengths]
        assert {np.shape(curve) for curve in row["curve"].values()} == {(3, QUICK.prompts)}
        nothing = {name: curve[0] for name, curve in row["curve"].items()}
        assert not np.any([nothing[name] for name in ("gain", "drift", "exposure", "sharpness")])


def test_every_trained_lora_is_kept_and_draws_what_was_measured(measured):
    journal, measuring = measured
    _, _, two_rounds = journal.rows()
    files = [measuring.folder / name for name in two_rounds["loras"]]

    again = measuring.bases[MIXED]
    for file in files:
        again = again.with_lora(aa.LoRA.load(file), scale=2.0)
    measures = measuring.evaluation.measure(bench.evaluations.plain(again))

    assert len(files) == 2
    at_2 = two_rounds["strengths"].index(2.0)
    for name, values in measures.items():
        assert values == pytest.approx(np.array(two_rounds["curve"][name][at_2]), abs=1e-3)


def test_an_ablation_resumes_from_its_journal_and_no_other(measured):
    journal, _ = measured
    rows = journal.rows()

    journal.begin()
    assert not journal.missing(CELLS)

    assert journal.rows() == rows
    with pytest.raises(SystemExit, match="has other settings"):
        replace(journal, about={"settings": "others"}).begin()


def test_a_new_strength_is_drawn_with_the_loras_that_were_kept(measured):
    journal, measuring = measured
    _, paired, two_rounds = journal.rows()
    more = replace(QUICK, strengths=(1.0, 1.5, 2.0))

    assert ablation.new_journal(journal.path, more).missing(CELLS) == CELLS[1:]
    extending = bench.Bench(more, seed=0, loras=measuring.folder)
    for row, cell in ((paired, CELLS[1]), (two_rounds, CELLS[2])):
        extended = extending.extended(row, cell)
        assert extended["strengths"] == [0.0, 1.0, 1.5, 2.0]
        for name, curve in extended["curve"].items():
            assert [curve[0], curve[1], curve[3]] == row["curve"][name]
        drifts = np.mean(extended["curve"]["drift"], axis=1)
        assert drifts[1] < drifts[2] < drifts[3]


def test_a_row_of_an_arm_that_has_changed_is_measured_again(measured, monkeypatch):
    journal, _ = measured
    changed = replace(arms.ARMS[arms.DEFAULT], learning_rate=0.5)

    monkeypatch.setattr(bench, "ARMS", {**arms.ARMS, arms.DEFAULT: changed})

    assert journal.missing(CELLS) == CELLS[1:]


@pytest.mark.parametrize(
    ("objective", "echo", "passes"),
    [
        (aa.PairedDifference(), 1, 4),
        (aa.PairedDifference(), 4, 3.25),
        (aa.SupervisedFineTuning(), 1, 3),
        (aa.TwoStage(per_pair=False), 1, 3),
        (aa.DirectPreference(), 1, 8),
    ],
)
def test_passes_of_a_step_are_counted(objective, echo, passes):
    arm = arms.Arm(objective, 1e-3, echo=echo)

    assert arms.passes_a_step(arm) == passes
    steps = arms.steps_of_equal_passes(arm, 64)
    assert steps * passes == pytest.approx(64 * 4, rel=statistics.SAME_PASSES)


def test_an_arm_is_described_by_what_is_set():
    inner = aa.PairedDifference(outside_weight=0.5)

    described = arms.described(arms.Arm(aa.Bipolar(objective=inner), 1e-3))

    assert described == "Arm(objective=Bipolar(objective=PairedDifference(outside_weight=0.5)), learning_rate=0.001)"
    assert len({arms.described(arm) for arm in arms.ARMS.values()}) == len(arms.ARMS), "no two arms are the same"


@pytest.mark.parametrize("kind", [MIXED, ATTENDED])
def test_passes_of_pairs_are_calls_of_the_denoiser_counted_per_picture(measured, kind):
    _, measuring = measured
    source = bench.Interaction(
        synthesizer=measuring.bases[kind], critic=PhotometricCritic(), sampling_steps=QUICK.sampling_steps, seed=0
    )

    with torch.no_grad(), bench.passes_counted(source.synthesizer) as passes:
        pair_set = source.kept(2)

    expected = pair_set.cost.passes + sum(cost.passes for _, cost in source.attempts[pair_set.prompts :])
    assert len(source.attempts) % pair_sources.CHUNK == 0 < pair_set.prompts
    assert passes.denoiser_calls == expected


def test_a_noisy_critic_misplaces_its_share_of_boxes_and_nothing_else():
    prompts = playground.prompts(24, seed=1)
    images = [playground.render(prompt, seed=seed) for seed, prompt in enumerate(prompts)]
    noiseless = PhotometricCritic(contrast=0.15).critique_batch(images, prompts)

    for wrong in (0, 0.5):
        critic = pair_sources.NoisyCritic(critic=PhotometricCritic(contrast=0.15), wrong=wrong, seed=0)
        answers = critic.critique_batch(images, prompts)
        boxes = [
            found.box != suggestion.box
            for answer, expected in zip(answers, noiseless, strict=True)
            for found, suggestion in zip(answer.suggestions, expected.suggestions, strict=True)
        ]
        assert np.mean(boxes) == pytest.approx(wrong, abs=0.1)
        assert [[found.prompt for found in answer.suggestions] for answer in answers] == [
            [found.prompt for found in answer.suggestions] for answer in noiseless
        ]


def all_cells(settings, seeds):
    return [cell for seed in seeds for cell in axes.cells(settings, seed, axes.Selection())]


def test_every_arm_is_on_the_front_at_both_budgets_and_every_cell_has_a_file_of_its_own():
    settings = axes.Settings()
    cells = all_cells(settings, [0, 1])

    for kind in axes.KINDS:
        on_front = [cell for cell in cells if (cell.axis, cell.kind, cell.seed) == ("front", kind, 0)]
        for name, arm in arms.ARMS.items():
            steps = {cell.steps for cell in on_front if cell.arm == name}
            assert steps == {settings.steps, arms.steps_of_equal_passes(arm, settings.steps)}
    assert {cell.axis for cell in cells} == {*axes.AXES, "one long round"}
    assert len({cell.name for cell in cells}) == len(set(cells)) == len(cells)


def test_a_selection_is_a_part_of_the_whole():
    settings = axes.Settings()
    whole = all_cells(settings, [0])

    selection = axes.Selection(axes=["front"], kinds=[MIXED], budgets=["passes"], arms=["DPO"])
    (cell,) = axes.cells(settings, 0, selection)

    assert cell in whole
    assert cell.steps == settings.steps // 2


def synthetic_rows(settings, seeds, prompts=3):
    """Rows of every cell, whose gain and drift grow with the strength."""
    columns = {
        "passes": 90,
        "learning_passes": 30,
        "drawing_passes": 6,
        "kept": 2,
        "yield": 0.5,
        "images": 4,
        "loras": [],
    }
    rows = []
    for cell in all_cells(settings, seeds):
        strengths = [0.0, *settings.strengths] if cell.axis in bench.SWEPT else [0.0, 1.0]
        curve = {
            name: [[size * strength**power + 1e-5 * cell.seed] * prompts for strength in strengths]
            for name, (size, power) in {
                "gain": (0.05, 1),
                "drift": (0.0002, 2),
                "alignment": (0, 1),
                "diversity": (0, 1),
                "exposure": (0, 1),
                "sharpness": (0, 1),
            }.items()
        }
        rows.append({**vars(cell), **columns, "made_by": "", "strengths": strengths, "curve": curve})
    return rows


@pytest.fixture(scope="module")
def content():
    """The results of synthetic rows."""
    settings = axes.Settings()
    rows = synthetic_rows(settings, [0, 1])
    by_panel, bootstrap = summary.panels(rows, settings), statistics.Bootstrap(50)
    return {
        "default": arms.DEFAULT,
        "arms": arms.ARMS,
        "fronts": list(summary.fronts(by_panel, bootstrap)),
        "dominance": list(summary.dominance(by_panel, bootstrap)),
        "costs": list(summary.costs(rows, settings)),
        "rows": list(summary.flat_rows(rows, settings)),
    }


def test_fronts_have_every_arm_kind_and_budget_at_every_drift(content):
    fronts = [row for row in content["fronts"] if row["axis"] == "front"]

    assert len(fronts) == len(arms.ARMS) * 2 * 2 * (1 + len(statistics.DRIFTS))
    for row in fronts:
        drift = 0.0002 if row["at_drift"] is None else row["at_drift"]
        reached = drift <= 0.005  # at strength 5
        assert row["gain"] == (pytest.approx(0.05 * (drift / 0.0002) ** 0.5, rel=0.05) if reached else None)


def test_equal_arms_do_not_dominate_each_other_and_all_are_compared_with_the_default(content):
    assert not any(row["dominates"] for row in content["dominance"])
    others = len(arms.ARMS) - 1
    assert sum(row["axis"] == "front" for row in content["dominance"]) == 2 * 2 * 2 * others


def test_the_ablation_is_shown_axis_by_axis(content):
    figure = ablation_plot(content)

    assert len(figure.axes) == 12
    assert len(figure.legends[0].get_texts()) == len(arms.ARMS)


def test_what_has_not_been_measured_has_no_panel(content):
    by_passes = [row for row in content["rows"] if row["axis"] == "front" and "passes" in row["budgets"]]
    assert any("steps" in row["budgets"] for row in by_passes)  # of arms that have the same steps within both budgets

    figure = ablation_plot({**content, "rows": by_passes, "costs": []})

    titles = [axes.get_title() for axes in figure.axes]
    assert titles == ["pairs by RegionalAttention, equal passes", "pairs by OutputMix, equal passes"]
    assert not ablation_plot({**content, "rows": [], "costs": []}).axes


def test_a_cell_is_what_its_row_says():
    assert {item.name for item in fields(axes.Cell)} <= synthetic_rows(axes.QUICK, [0])[0].keys()
