import numpy as np
import pytest
import torch
from PIL import Image

from artaug.scorers import DualEncoder, PickScore
from artaug.testing import check_scorer
from support.tiny_clip import LONGEST
from support.tiny_scorers import saved, tiny_clip

PROMPTS = ["a red ball", "fog"]
PICTURES = [Image.linear_gradient("L"), Image.effect_noise((40, 30), 80)]


def published(model, images, words):
    """PickScore as its model card computes it, with what transformers 5 returns unpacked."""
    seen = images([image.convert("RGB") for image in PICTURES], return_tensors="pt")["pixel_values"]
    text = words(PROMPTS, padding=True, truncation=True, max_length=LONGEST, return_tensors="pt")
    with torch.no_grad():
        image = model.get_image_features(pixel_values=seen).pooler_output
        words = model.get_text_features(**text).pooler_output
        image, words = (each / each.norm(dim=-1, keepdim=True) for each in (image, words))
        return (model.logit_scale.exp() * (words @ image.T)).diagonal().tolist()


@pytest.mark.filterwarnings("ignore:.* reads 32 tokens")  # the letters of some languages are many tokens to it
def test_the_score_is_that_of_the_model_card_and_of_a_checkpoint_without_processor(tmp_path):
    model, images, words = tiny_clip()
    tuned, base = saved(tmp_path / "tuned", model), saved(tmp_path / "base", images, words)
    score = PickScore.from_pretrained(tuned, processor=base)
    assert score.score_batch(PICTURES, PROMPTS) == pytest.approx(published(model, images, words), rel=1e-5)
    assert np.ptp(score.score_batch(PICTURES, PROMPTS)) > 0.01
    check_scorer(score)


def test_the_name_is_short_and_it_rests_on_itself():
    model, images, words = tiny_clip()
    score = PickScore(encoder=DualEncoder(model=model, image_processor=images, tokenizer=words))
    assert score.name == "PickScore"
    assert score.depends_on == {"PickScore"}
