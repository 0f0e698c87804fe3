"""Rendered pictures: reproducible, and better for each adjective in what it stands for."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from artaug.playground.rendering import SIZE_PX, render, render_batch
from artaug.playground.world import ADJECTIVES, PLACES, SETTINGS, CaptionError, Scene, Thing, parse, prompts


def _pixels(caption: str, *, seed: int = 0) -> NDArray[np.float64]:
    return np.asarray(render(caption, seed=seed), dtype=np.float64) / 255


def _luma(picture: NDArray[np.float64]) -> NDArray[np.float64]:
    return picture @ np.array([0.299, 0.587, 0.114])


def _exposure(picture: NDArray[np.float64]) -> float:
    return float(np.exp(-((_luma(picture) - 0.5) ** 2) / 0.08).mean())


def _chroma(picture: NDArray[np.float64]) -> float:
    return float((picture.max(axis=2) - picture.min(axis=2)).mean())


def _edges(picture: NDArray[np.float64]) -> float:
    """Share of the variation that neighbouring pixels account for: high where nothing is blurred."""
    luma = _luma(picture)
    second = np.abs(np.diff(luma, n=2, axis=1)).mean()
    return float(second / np.abs(np.diff(luma, axis=1)).mean())


def _contrast(picture: NDArray[np.float64]) -> float:
    return float(_luma(picture).std())


@pytest.mark.parametrize(
    ("adjective", "measure", "gain"),
    [("vivid", _chroma, 1.3), ("softly lit", _exposure, 1.3), ("sharp", _edges, 1.2), ("glowing", _contrast, 1.3)],
)
def test_each_adjective_raises_its_own_measure(adjective, measure, gain) -> None:
    captions = prompts(24, seed=0)
    before = np.mean([measure(_pixels(caption)) for caption in captions])
    after = np.mean([measure(_pixels(f"{caption}, {adjective}")) for caption in captions])
    assert after > gain * before


def test_the_same_seed_draws_the_same_picture_and_no_global_state_is_touched() -> None:
    state = torch.get_rng_state()
    first, again, other = (_pixels("a red cone at night", seed=seed) for seed in (0, 0, 1))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert torch.equal(state, torch.get_rng_state())


def test_a_thing_of_its_own_adjectives_leaves_the_far_side_alone() -> None:
    plain = _pixels("a red cone on the left and a blue ball on the right at noon")
    praised = _pixels("a vivid softly lit sharp glowing red cone on the left and a blue ball on the right at noon")
    change = np.abs(praised - plain).mean(axis=(0, 2))
    assert change[:24].mean() > 0.05
    assert change[40:].mean() < 0.01


@pytest.mark.parametrize("setting", SETTINGS)
def test_batches_hold_pictures_of_every_kind_of_scene(setting) -> None:
    thing = Thing(color="green", shape="ring", place=PLACES[0])
    scenes = [
        Scene(),
        Scene(setting=setting),
        Scene(things=(thing,), setting=setting, adjectives=ADJECTIVES),
        parse(f"a red ball on the left and a blue cube in the middle {setting}"),
    ]
    pictures = render_batch(scenes, generator=torch.Generator().manual_seed(0))
    assert pictures.shape == (4, 3, SIZE_PX, SIZE_PX)
    assert 0 <= pictures.min() < pictures.max() <= 1


def test_an_unknown_caption_is_refused() -> None:
    with pytest.raises(CaptionError, match="dragon"):
        render("a dragon", seed=0)
