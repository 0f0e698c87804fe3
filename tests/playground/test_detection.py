"""Detection: right on rendered pictures, and sensible on any others."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from artaug import playground
from artaug.geometry import Box
from artaug.playground import oklab
from artaug.playground.detection import DetectedThing, align_things, alignment, detect
from artaug.playground.rendering import render, render_batch
from artaug.playground.world import ADJECTIVES, Scene, parse, prompts

_SCENES = 2048


def _styled(scene: Scene, chooser: random.Random) -> Scene:
    def adjectives() -> tuple:
        return tuple(chooser.sample(ADJECTIVES, chooser.choice((0, 0, 1, 2, 4))))

    things = tuple(replace(thing, adjectives=adjectives() if chooser.random() < 0.4 else ()) for thing in scene.things)
    return replace(scene, things=things, adjectives=adjectives())


def _images(scenes: list[Scene], *, seed: int) -> list[Image.Image]:
    pictures = render_batch(scenes, generator=torch.Generator().manual_seed(seed))
    return [Image.fromarray(pixels) for pixels in (pictures.permute(0, 2, 3, 1) * 255).round().byte().numpy()]


def test_rendered_scenes_of_every_style_are_detected_right_99_times_in_100() -> None:
    chooser = random.Random(0)
    captions = prompts(_SCENES // 2, seed=3) + prompts(_SCENES // 2, seed=4, held_out=True)
    scenes = [_styled(parse(caption), chooser) for caption in captions]
    rows = []
    for start in range(0, _SCENES, 64):
        part = scenes[start : start + 64]
        for image, scene in zip(_images(part, seed=start), part, strict=True):
            result = align_things(detect(image), scene)
            rows.append([result.color, result.shape, result.place, result.surplus == 0])
    assert (np.mean(rows, axis=0) >= 0.99).all(), np.mean(rows, axis=0)


def test_things_come_from_left_to_right_with_boxes_around_them() -> None:
    left, right = detect(render("a blue ball on the right and a red cone on the left at noon, vivid", seed=0))
    assert (left.color, left.shape, left.place) == ("red", "cone", "on the left")
    assert (right.color, right.shape, right.place) == ("blue", "ball", "on the right")
    assert 0.1 < left.box.center[0] < 0.3
    assert 0.2 < left.box.width < 0.4


@pytest.mark.parametrize("seed", range(4))
def test_a_little_blur_and_noise_do_no_harm(seed: int) -> None:
    caption = "a green ring on the left and an orange cube on the right at noon, vivid, softly lit"
    image = render(caption, seed=seed).filter(ImageFilter.GaussianBlur(0.7))
    noise = np.random.default_rng(seed).normal(0, 4, (64, 64, 3))
    noisy = Image.fromarray(np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8))
    result = alignment(noisy, caption)
    assert (result.color, result.shape, result.place, result.surplus) == (1, 1, 1, 0)


def test_larger_pictures_are_read_as_well() -> None:
    caption = "a purple cone in the middle at night, vivid"
    large = render(caption, seed=0).resize((256, 256), Image.Resampling.BICUBIC)
    assert alignment(large, caption).shape == 1


@pytest.mark.parametrize("setting", ["at noon, vivid", "at sunset, vivid", "at night, vivid", "in the snow, vivid"])
def test_a_bare_setting_shows_nothing(setting: str) -> None:
    assert detect(render(setting, seed=0)) == []


@pytest.mark.parametrize("value", [0, 128, 255])
def test_a_plain_picture_shows_nothing(value: int) -> None:
    assert detect(Image.new("L", (64, 64), value)) == []


def test_noise_raises_no_error() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    assert len(detect(Image.fromarray(pixels))) <= 4


def _thing(color, shape, place) -> DetectedThing:
    return DetectedThing(color=color, shape=shape, place=place, box=Box(0, 0, 1, 1))


def test_a_missing_thing_is_wrong_in_all_three() -> None:
    result = align_things([], parse("a red cone on the left"))
    assert (result.color, result.shape, result.place, result.surplus) == (0, 0, 0, 0)


def test_things_are_matched_to_the_best_of_both() -> None:
    detected = [_thing("red", "ball", "on the left"), _thing("blue", "cone", "on the right")]
    result = align_things(detected, parse("a blue cone on the left and a red ball on the right"))
    assert (result.color, result.shape, result.place) == (1, 1, 0)


def test_one_detected_thing_is_matched_to_one_thing_of_the_caption() -> None:
    result = align_things(
        [_thing("red", "ball", "on the left")], parse("a red ball on the left and a red ball on the right")
    )
    assert (result.color, result.shape, result.place) == (0.5, 0.5, 0.5)


def test_an_open_place_is_right_wherever_the_thing_is_and_surplus_is_counted() -> None:
    detected = [_thing("red", "ball", "on the left"), _thing("blue", "cone", "on the right")]
    result = align_things(detected, parse("a red ball"))
    assert (result.color, result.shape, result.place, result.surplus) == (1, 1, 1, 1)


def test_every_picture_matches_a_caption_that_asks_for_nothing() -> None:
    result = align_things([], parse("at night"))
    assert (result.color, result.shape, result.place) == (1, 1, 1)


def test_a_picture_that_several_scorers_look_at_is_looked_at_once(monkeypatch):
    looks = []
    from_srgb = oklab.from_srgb
    monkeypatch.setattr(oklab, "from_srgb", lambda pixels: looks.append(1) or from_srgb(pixels))
    prompt = "a red cone on the left"
    first, second = (playground.render(prompt, seed=seed) for seed in (70_001, 70_002))
    for scorer in map(playground.Accuracy, ("color", "shape", "place")):
        scorer.score_batch([first, second, first.copy()], [prompt] * 3)
    assert len(looks) == 2
    detect(first).clear()
    assert len(detect(first)) == 1
