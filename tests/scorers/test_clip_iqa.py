import numpy as np
import pytest
import torch
from PIL import Image

import artaug as aa
from artaug.scorers import ClipIQA, DualEncoder
from artaug.scoring import score_images
from artaug.testing import check_scorer
from support.tiny_clip import LONGEST
from support.tiny_scorers import saved, tiny_clip

PICTURES = [Image.linear_gradient("L"), Image.effect_noise((40, 30), 80), Image.new("RGB", (9, 9), "teal")]


def scorer(seed=0, **options):
    model, images, words = tiny_clip(seed=seed)
    return ClipIQA(encoder=DualEncoder(model=model, image_processor=images, tokenizer=words, name="tiny"), **options)


def published(seed, positive, negative):
    """The formula of the paper, and of torchmetrics, on the model's own features."""
    model, images, words = tiny_clip(seed=seed)
    text = words([positive, negative], padding="max_length", max_length=LONGEST, return_tensors="pt")["input_ids"]
    pixels = images([image.convert("RGB") for image in PICTURES], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        anchors, features = model.get_text_features(text).pooler_output, model.get_image_features(pixels).pooler_output
    anchors, features = (embeds / embeds.norm(p=2, dim=-1, keepdim=True) for embeds in (anchors, features))
    return (100 * features @ anchors.t()).reshape(len(PICTURES), -1, 2).softmax(-1)[:, 0, 0].tolist()


@pytest.mark.parametrize("words", [("Good photo.", "Bad photo."), ("Sharp photo.", "Blurry photo.")])
@pytest.mark.parametrize("seed", [0, 3])
def test_the_score_is_the_published_formula(seed, words):
    found = scorer(seed, positive=words[0], negative=words[1]).score_batch(PICTURES, [""] * 3)
    assert found == pytest.approx(published(seed, *words), abs=1e-5)
    assert len({round(number, 6) for number in found}) == 3


def test_scores_of_swapped_texts_add_up_to_1():
    forward, backward = scorer(positive="new", negative="old"), scorer(positive="old", negative="new")
    scores = np.array([forward.score_batch(PICTURES, [""] * 3), backward.score_batch(PICTURES, [""] * 3)])
    assert scores.sum(axis=0) == pytest.approx(1)


def test_it_passes_the_scorer_checks():
    check_scorer(scorer())
    assert scorer().score_batch([], []) == []


def test_a_saved_checkpoint_scores_as_the_model_did(tmp_path):
    loaded = ClipIQA.from_pretrained(saved(tmp_path, *tiny_clip()), positive="Warm photo.", negative="Cold photo.")
    before = scorer(positive="Warm photo.", negative="Cold photo.").score_batch(PICTURES, [""] * 3)
    assert loaded.score_batch(PICTURES, [""] * 3) == pytest.approx(before, abs=1e-5)
    assert loaded.name == f"CLIP-IQA ('Warm photo.' or 'Cold photo.', {tmp_path})"


def test_a_model_that_returns_nan_is_caught_by_score_images():
    quality = scorer()
    with torch.no_grad():
        next(quality.encoder.model.vision_model.parameters()).fill_(torch.nan)
    with pytest.raises(aa.NonFiniteError, match="returned nan"):
        score_images(quality, PICTURES, ["a"] * 3)


@pytest.mark.parametrize("words", [("good", "good"), (" ", "bad"), ("good", "")])
def test_blank_and_equal_texts_are_refused(words):
    with pytest.raises(aa.InvalidValueError, match="need two different texts"):
        scorer(positive=words[0], negative=words[1])
