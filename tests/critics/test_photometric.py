"""PhotometricCritic: the regions it finds, the suggestions it makes, and when it makes none."""

import re

import numpy as np
import pytest
import torch
from hypothesis import given
from PIL import Image, ImageDraw, ImageFilter

import artaug as aa
from artaug.critics import PhotometricCritic, PromptVocabulary
from artaug.images.photometry import METRICS, srgb
from artaug.playground import detect, parse, prompts
from artaug.playground.rendering import render_batch
from artaug.testing import check_critic
from support.strategies import images

WHOLE = aa.Box(0, 0, 1, 1)
CAPTIONS = prompts(24, seed=5)


def still_life(*, scale=1):
    """A dull picture of a ball on the left and a box on the right, in fractions of the picture."""
    image = Image.new("RGB", (96 * scale, 64 * scale), (74, 78, 84))
    brush = ImageDraw.Draw(image)
    brush.rectangle((0, 40 * scale, 96 * scale, 64 * scale), fill=(66, 68, 64))
    brush.ellipse((16 * scale, 28 * scale, 36 * scale, 48 * scale), fill=(120, 60, 56))
    brush.rectangle((60 * scale, 28 * scale, 80 * scale, 50 * scale), fill=(56, 74, 120))
    return image.filter(ImageFilter.GaussianBlur(scale))


def rendered(captions):
    pictures = render_batch([parse(caption) for caption in captions], generator=torch.Generator().manual_seed(0))
    return [Image.fromarray(picture) for picture in (pictures.permute(0, 2, 3, 1) * 255).numpy().astype(np.uint8)]


def suggested_prompts(critique):
    return [suggestion.prompt for suggestion in critique.suggestions]


@pytest.mark.parametrize("scale", [1, 4, 11])
def test_objects_are_found_at_any_resolution(scale):
    critique = PhotometricCritic(contrast=0.15).critique(still_life(scale=scale), "a still life")
    for thing in (aa.Box(16 / 96, 28 / 64, 36 / 96, 48 / 64), aa.Box(60 / 96, 28 / 64, 80 / 96, 50 / 64)):
        assert max(thing.iou(suggestion.box) for suggestion in critique.suggestions[1:]) > 0.7


def test_the_things_of_dull_scenes_are_found():
    critic, hits, things = PhotometricCritic(contrast=0.15, whole_image=False), 0, 0
    for caption, image in zip(CAPTIONS, rendered(CAPTIONS), strict=True):
        boxes = [suggestion.box for suggestion in critic.critique(image, caption).suggestions]
        for thing in detect(image):
            things += 1
            hits += any(thing.box.iou(box) >= 0.5 for box in boxes)
    assert things >= len(CAPTIONS)
    assert hits / things >= 0.9, f"found {hits} of {things}"


def test_better_pictures_get_fewer_suggestions():
    def requests(words):
        pictures = rendered([caption + words for caption in CAPTIONS[:12]])
        answers = [PhotometricCritic().critique(picture, "it") for picture in pictures]
        return sum(prompt.count(",") for answer in answers for prompt in suggested_prompts(answer))

    dull, vivid, best = requests(""), requests(", vivid"), requests(", vivid, softly lit, sharp, glowing")
    assert best < 0.5 * dull
    assert vivid < dull


def test_each_low_measure_adds_its_words_and_its_reason():
    critique = PhotometricCritic(contrast=0.15).critique(still_life(), "a still life")
    whole_image = critique.suggestions[0]
    assert whole_image.box == WHOLE
    numbers = {name: measure(srgb(still_life())) for name, measure in METRICS.items()}
    limits = {"exposure": 0.45, "chroma": 0.3, "contrast": 0.15, "sharpness": 0.5}
    short = [name for name, number in numbers.items() if number < limits[name]]
    words = {"exposure": "softly lit", "chroma": "vivid", "contrast": "glowing", "sharpness": "sharp"}
    assert whole_image.prompt == ", ".join(["a still life", *(words[name] for name in short)])
    assert whole_image.reason == "; ".join(f"{name} {numbers[name]:.2f}, below {limits[name]:.2f}" for name in short)
    assert critique.summary == ", ".join(f"{name} {number:.2f}" for name, number in numbers.items())


@given(images(least=16, most=40))
def test_every_reason_names_a_number_below_its_threshold(image):
    critic = PhotometricCritic(max_regions=2)
    answer = critic.critique(image, "a pear")
    if isinstance(answer, aa.Critique):
        assert len(answer.suggestions) <= 3
        for suggestion in answer.suggestions:
            for number, limit in re.findall(r" (\d\.\d\d), below (\d\.\d\d)", suggestion.reason):
                assert float(number) <= float(limit)
            assert suggestion.prompt.startswith("a pear, ")


def test_thresholds_of_zero_give_no_suggestions():
    critic = PhotometricCritic(exposure=0, chroma=0, contrast=0, sharpness=0)
    assert suggested_prompts(critic.critique(still_life(), "a still life")) == []


def test_the_vocabulary_can_be_that_of_another_model():
    critic = PhotometricCritic(vocabulary=PromptVocabulary(chroma="in saturated Kodachrome"), max_regions=0)
    (prompt,) = suggested_prompts(critic.critique(still_life(), "a still life"))
    assert "in saturated Kodachrome" in prompt
    assert "vivid" not in prompt


def test_an_empty_prompt_gives_only_the_words():
    assert not suggested_prompts(PhotometricCritic().critique(still_life(), " "))[0].startswith((" ", ","))


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (Image.new("RGB", (15, 200), "red"), "15 x 200 pixels"),
        (Image.new("RGB", (64, 64), "red"), "one uniform color"),
    ],
)
def test_where_there_is_nothing_to_measure_it_abstains(image, reason):
    answer = PhotometricCritic().critique(image, "a pear")
    assert isinstance(answer, aa.Abstention)
    assert reason in answer.reason


@pytest.mark.parametrize(
    "options",
    [{"chroma": 1.5}, {"exposure": float("nan")}, {"padding": -0.1}, {"whole_image": False, "max_regions": 0}],
)
def test_invalid_options_are_refused(options):
    with pytest.raises(aa.InvalidValueError, match=f"PhotometricCritic.{next(iter(options))}="):
        PhotometricCritic(**options)


def test_blank_words_are_refused():
    with pytest.raises(aa.InvalidValueError, match="has no words for contrast"):
        PromptVocabulary(contrast=" ")


def test_it_passes_check_critic():
    check_critic(PhotometricCritic())
