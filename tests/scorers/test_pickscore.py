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


def published(model, image_processor, tokenizer):
    """PickScore as its model card computes it, adapted to the output objects of transformers 5."""
    pixels = image_processor([image.convert("RGB") for image in PICTURES], return_tensors="pt")["pixel_values"]
    tokens = tokenizer(PROMPTS, padding=True, truncation=True, max_length=LONGEST, return_tensors="pt")
    with torch.no_grad():
        image_embeds = model.get_image_features(pixel_values=pixels).pooler_output
        text_embeds = model.get_text_features(**tokens).pooler_output
        image_embeds = image_embeds / image_embeds.norm(dim=-1, keepdim=True)
        text_embeds = text_embeds / text_embeds.norm(dim=-1, keepdim=True)
        return (model.logit_scale.exp() * (text_embeds @ image_embeds.T)).diagonal().tolist()


@pytest.mark.filterwarnings("ignore:.* reads 32 tokens")  # its tokenizer needs many tokens for some scripts
def test_the_score_is_that_of_the_model_card_and_of_a_checkpoint_without_processor(tmp_path):
    model, images, words = tiny_clip()
    tuned, base = saved(tmp_path / "tuned", model), saved(tmp_path / "base", images, words)
    score = PickScore.from_pretrained(tuned, processor=base)
    assert score.score_batch(PICTURES, PROMPTS) == pytest.approx(published(model, images, words), rel=1e-5)
    assert np.ptp(score.score_batch(PICTURES, PROMPTS)) > 0.01
    check_scorer(score)


def test_it_is_named_and_depends_on_itself():
    model, images, words = tiny_clip()
    score = PickScore(encoder=DualEncoder(model=model, image_processor=images, tokenizer=words))
    assert score.name == "PickScore"
    assert score.depends_on == {"PickScore"}
