"""The ablation: cells that go on where they stopped, arms at equal pairs, passes as they are counted."""

import numpy as np
import pytest
from benchmarks import _ablation_bench as bench
from benchmarks import _ablation_pairs as pair_sources
from benchmarks import ablation
from benchmarks._ablation_plot import plot as ablation_plot
from PIL import Image

from artaug import playground
from artaug.critics import PhotometricCritic
from artaug.evaluation.statistics import paired_bootstrap

BLACK, WHITE = (Image.new("RGB", (64, 64), colour) for colour in ("black", "white"))

CELLS = [
    bench.Cell(axis="control", arm="words added", seed=0),
    *[bench.Cell(axis="pairs", arm=arm, seed=0, pairs=2) for arm in (bench.OURS, "DPO, best of k")],
    bench.Cell(axis="rounds", arm=bench.OURS, seed=0, pairs=4, rounds=2),
]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A journal of some cells, and the bench they were measured on."""
    journal = ablation.Journal(tmp_path_factory.mktemp("ablation") / "ablation.jsonl", {"settings": "quick"})
    journal.begin()
    measuring = bench.Bench(bench.QUICK, seed=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pair_sources, "CHUNK", 4)
        journal.measure(CELLS, measuring)
        yield journal, measuring


def test_the_ablation_has_a_row_for_every_cell(measured):
    words, paired, best_of_k, two_rounds = measured[0].rows()

    assert words["gain"] > 5 * abs(paired["gain"]), "the model knows the words, and two steps teach little"
    assert [paired[name] for name in ("kept", "images", "critic_calls")] == [2, 4, 2]
    assert [best_of_k[name] for name in ("kept", "images", "critic_calls")] == [2, 4, 0]
    assert two_rounds["learning_passes"] == 2 * paired["learning_passes"] == 2 * (2 * 2 * 4)
    assert all(row["gain_low"] <= row["gain"] <= row["gain_high"] for row in (words, paired, best_of_k, two_rounds))
    assert paired["gain"] == pytest.approx(np.mean(paired["gains"]), abs=1e-6)


def test_an_ablation_resumes_from_its_journal_and_no_other(measured):
    journal, _ = measured
    rows = journal.rows()

    journal.begin()
    ablation.Journal(journal.path, journal.about).measure(CELLS, None)  # no bench: there is nothing to measure

    assert journal.rows() == rows
    with pytest.raises(SystemExit, match="has other settings"):
        ablation.Journal(journal.path, {"settings": "others"}).begin()


@pytest.mark.parametrize("source_name", ["interaction", "best of k"])
def test_passes_are_calls_of_the_denoiser_counted_per_picture(measured, source_name):
    _, measuring = measured
    source = measuring.interaction(0.25) if source_name == "interaction" else measuring.best_of_k
    source.attempts.clear()
    passes = []
    model = measuring.base.pipeline.transformer
    counting = model.register_forward_pre_hook(
        lambda _, __, kwargs: passes.append(len(kwargs["hidden_states"])), with_kwargs=True
    )

    pair_set = source.kept(2)
    counting.remove()

    expected = pair_set.cost.passes + sum(cost.passes for _, cost in source.attempts[pair_set.prompts :])
    assert len(source.attempts) % pair_sources.CHUNK == 0 < pair_set.prompts
    assert sum(passes) == expected


def test_a_noisy_critic_misplaces_its_share_of_boxes_and_nothing_else():
    prompts = playground.prompts(24, seed=1)
    images = [playground.render(prompt, seed=seed) for seed, prompt in enumerate(prompts)]
    noiseless = PhotometricCritic().critique_batch(images, prompts)

    for wrong in (0, 0.5):
        critic = pair_sources.NoisyCritic(critic=PhotometricCritic(), wrong=wrong, seed=0)
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


def test_the_best_of_k_is_the_best_of_those_that_show_what_was_requested():
    prompt = "a red cone on the left at night"
    good, better = (playground.render(prompt + words, seed=0) for words in (", vivid", ", vivid, glowing"))
    dull, wrong = playground.render(prompt, seed=0), playground.render("a blue ball at night, vivid, glowing", seed=0)
    best_of_k = pair_sources.BestOfK(synthesizer=None, draws=4, sampling_steps=1, seed=0)

    pair = best_of_k._best(prompt, [good, wrong, better, dull])  # noqa: SLF001

    assert (pair.before, pair.after) == (dull, better)
    assert best_of_k._best(prompt, [wrong, wrong]) is None  # noqa: SLF001


def synthetic_rows(settings, seeds):
    """Rows of every cell, the gain in them growing with the pairs, by prompts."""
    cells = [cell for seed in seeds for cell in bench.cells(settings, seed)]
    columns = {"passes": 90, "learning_passes": 30, "drawing_passes": 6, "alignment": 1.0, "drift": 0.001}
    return [
        {
            **vars(cell),
            **columns,
            "gain": cell.pairs + cell.seed,
            "gains": [cell.pairs + cell.seed, cell.pairs + cell.seed],
        }
        for cell in cells
    ]


def test_arms_are_compared_with_ours_at_as_many_pairs():
    rows = synthetic_rows(bench.Settings(), [0, 1])
    for row in rows:
        if row["arm"] == "DPO":
            row["gains"] = [gain - change for gain, change in zip(row["gains"], (1, 3), strict=True)]

    comparisons = {(row["arm"], row["pairs"]): row for row in ablation.comparisons(rows)}

    assert {pairs for _, pairs in comparisons} == set(bench.Settings().pairs)
    assert {row["gain"] for (arm, _), row in comparisons.items() if arm == "DPO"} == {-2.0}
    interval = paired_bootstrap([-1, -3])
    assert (comparisons["DPO", 32]["low"], comparisons["DPO", 32]["high"]) == (interval.low, interval.high)
    assert comparisons["DPO", 32]["seeds"] == 2
    assert comparisons["TwoStage", 32]["low"] == comparisons["TwoStage", 32]["high"] == 0


def test_the_ablation_is_shown_axis_by_axis():
    figure = ablation_plot(synthetic_rows(bench.Settings(), [0, 1, 2]))

    assert len(figure.axes) == 8
    assert len(figure.axes[0].get_legend_handles_labels()[1]) == len(bench.ARMS)
