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


def published(seed, wanted, unwanted):
    """The formula of the paper, and of torchmetrics, on the model's own features."""
    model, images, words = tiny_clip(seed=seed)
    text = words([wanted, unwanted], padding="max_length", max_length=LONGEST, return_tensors="pt")["input_ids"]
    seen = images([image.convert("RGB") for image in PICTURES], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        anchors, features = model.get_text_features(text).pooler_output, model.get_image_features(seen).pooler_output
    anchors, features = (one / one.norm(p=2, dim=-1, keepdim=True) for one in (anchors, features))
    return (100 * features @ anchors.t()).reshape(len(PICTURES), -1, 2).softmax(-1)[:, 0, 0].tolist()


@pytest.mark.parametrize("words", [("Good photo.", "Bad photo."), ("Sharp photo.", "Blurry photo.")])
@pytest.mark.parametrize("seed", [0, 3])
def test_the_score_is_the_published_formula(seed, words):
    found = scorer(seed, wanted=words[0], unwanted=words[1]).score_batch(PICTURES, [""] * 3)
    assert found == pytest.approx(published(seed, *words), abs=1e-5)
    assert len({round(number, 6) for number in found}) == 3


def test_the_opposite_question_has_the_opposite_answer():
    there, back = scorer(wanted="new", unwanted="old"), scorer(wanted="old", unwanted="new")
    for one, other in zip(there.score_batch(PICTURES, [""] * 3), back.score_batch(PICTURES, [""] * 3), strict=True):
        assert one + other == pytest.approx(1)


def test_the_scorer_keeps_the_promises_of_its_seam():
    check_scorer(scorer())
    assert scorer().score_batch([], []) == []


def test_a_saved_checkpoint_scores_as_the_model_did(tmp_path):
    loaded = ClipIQA.from_pretrained(saved(tmp_path, *tiny_clip()), wanted="Warm photo.", unwanted="Cold photo.")
    before = scorer(wanted="Warm photo.", unwanted="Cold photo.").score_batch(PICTURES, [""] * 3)
    assert loaded.score_batch(PICTURES, [""] * 3) == pytest.approx(before, abs=1e-5)
    assert loaded.name == f"CLIP-IQA ('Warm photo.' or 'Cold photo.', {tmp_path})"


def test_a_model_gone_wrong_is_caught():
    one = scorer()
    with torch.no_grad():
        next(one.encoder.model.vision_model.parameters()).fill_(torch.nan)
    with pytest.raises(aa.NonFiniteError, match="returned nan"):
        score_images(one, PICTURES, ["a"] * 3)


@pytest.mark.parametrize("words", [("good", "good"), (" ", "bad"), ("good", "")])
def test_words_that_are_no_opposites_are_refused(words):
    with pytest.raises(aa.InvalidValueError, match="need two different texts"):
        scorer(wanted=words[0], unwanted=words[1])
