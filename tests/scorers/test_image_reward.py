import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import artaug as aa
from artaug.scorers import ImageReward, LoadOptions
from artaug.scoring import score_images
from artaug.testing import check_scorer
from support.image_reward_reference import image_reward, image_reward_weights
from support.tiny_scorers import clip_pictures, letters, saved

PROMPTS = ["a red ball", "fog", "a wall by the sea"]


def tokenizer():
    return letters(pad="[PAD]", begin="[CLS]", end="[SEP]")


def pictures():
    generator = np.random.default_rng(0)
    return [Image.fromarray(generator.integers(0, 256, (30, 44, 3), dtype=np.uint8)) for _ in PROMPTS]


def scorer(tmp_path, weights=None, *, batch_size=2):
    save_file(image_reward_weights() if weights is None else weights, tmp_path / "ImageReward.safetensors")
    return ImageReward.from_pretrained(
        tmp_path / "ImageReward.safetensors",
        tokenizer=saved(tmp_path / "words", tokenizer()),
        options=LoadOptions(batch_size=batch_size),
    )


def test_the_score_is_the_reward_that_the_authors_compute_with_their_own_weights(tmp_path):
    expected = [
        image_reward(
            image_reward_weights(),
            clip_pictures()(image, return_tensors="pt")["pixel_values"],
            torch.tensor([tokenizer()(prompt)["input_ids"]]),
        )
        for image, prompt in zip(pictures(), PROMPTS, strict=True)
    ]
    assert scorer(tmp_path).score_batch(pictures(), PROMPTS) == pytest.approx(expected, abs=1e-5)
    assert np.ptp(expected) > 0.01


def test_both_the_picture_and_the_prompt_change_the_reward(tmp_path):
    reward = scorer(tmp_path)
    (first, second, _), (prompt, other_prompt, _) = pictures(), PROMPTS
    assert abs(reward.score(first, prompt) - reward.score(second, prompt)) > 1e-3
    assert abs(reward.score(first, prompt) - reward.score(first, other_prompt)) > 1e-3


@pytest.mark.filterwarnings("ignore:ImageReward reads 35 tokens")  # its tokenizer needs many tokens for some scripts
def test_it_passes_the_scorer_checks(tmp_path):
    check_scorer(scorer(tmp_path, batch_size=4))


def test_a_prompt_that_is_too_long_is_truncated_with_a_warning_that_quotes_the_rest(tmp_path):
    with pytest.warns(UserWarning, match=r"ImageReward reads 35 tokens and the prompt 'a+' has 38.* is 'a ?a ?a'"):
        scorer(tmp_path).score(pictures()[0], "a" * 36)


def test_half_precision_weights_stay_near(tmp_path):
    full = scorer(tmp_path)
    half = ImageReward.from_pretrained(
        tmp_path / "ImageReward.safetensors",
        tokenizer=str(tmp_path / "words"),
        options=LoadOptions(device="cpu", dtype=torch.bfloat16),
    )
    assert half.vision.dtype == half.text.dtype == torch.bfloat16
    assert half.score_batch(pictures(), PROMPTS) == pytest.approx(full.score_batch(pictures(), PROMPTS), abs=0.3)


def test_a_model_that_returns_nan_is_caught_by_score_images(tmp_path):
    weights = image_reward_weights()
    weights["blip.visual_encoder.norm.bias"][:] = torch.nan
    with pytest.raises(aa.NonFiniteError, match=r"ImageReward.score_batch returned nan"):
        score_images(scorer(tmp_path, weights), pictures(), PROMPTS)


def test_a_pickled_file_is_refused(tmp_path):
    torch.save(image_reward_weights(), tmp_path / "ImageReward.pt")
    with pytest.raises(aa.ModelError, match=r"ImageReward.pt' is not a safetensors file.*refused"):
        ImageReward.from_pretrained(tmp_path / "ImageReward.pt")


def without(part):
    return {name: weight for name, weight in image_reward_weights().items() if part not in name}


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (without("visual_encoder.norm.bias"), r"lacks 'post_layernorm.bias'"),
        (without("layer.1.crossattention.self.query"), r"lacks 'encoder.layer.1.crossattention.self.query.bias'"),
        (without("pos_embed"), r"lacks the weights of ImageReward, 'embeddings.position_embedding'"),
        (without("mlp.layers"), r"not a head of linear layers"),
        (image_reward_weights() | {"blip.text_encoder.odd": torch.zeros(1)}, r"has an unknown 'odd'"),
        (image_reward_weights() | {"odd": torch.zeros(1)}, r"has 'odd', which ImageReward does not have"),
        ({"layers.0.weight": torch.zeros(1)}, r"has 'layers.0.weight', which ImageReward does not have"),
    ],
)
def test_weights_that_are_not_exactly_those_of_image_reward_are_refused(tmp_path, weights, message):
    with pytest.raises(aa.ModelError, match=message):
        scorer(tmp_path, weights)


def test_pictures_and_prompts_that_differ_in_number_are_refused(tmp_path):
    with pytest.raises(aa.InvalidValueError, match=r"3 pictures and 2 prompts"):
        scorer(tmp_path).score_batch(pictures(), PROMPTS[:2])
