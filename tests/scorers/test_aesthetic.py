import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import artaug as aa
from artaug.scorers import AestheticScore
from artaug.testing import check_scorer
from support.tiny_scorers import saved, tiny_clip

PICTURES = [Image.linear_gradient("L"), Image.effect_noise((40, 30), 80), Image.new("RGB", (9, 9), "teal")]
WIDTHS = {0: (8, 12), 2: (12, 6), 4: (6, 5), 6: (5, 3), 7: (3, 1)}
"""By published key: inputs and outputs of the layers, 768-1024-128-64-16-1 in the original; 1, 3 and 5 are dropout."""


def head_weights():
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for number, (inputs, outputs) in WIDTHS.items():
        weights[f"layers.{number}.weight"] = torch.randn(outputs, inputs, generator=generator)
        weights[f"layers.{number}.bias"] = torch.randn(outputs, generator=generator)
    return weights


def save_head(path, weights):
    save_file(weights, path / "head.safetensors")
    return path / "head.safetensors"


def image_embeds():
    """The image tower of transformers, by itself, with the projection."""
    model, images, _ = tiny_clip()
    pixels = images([image.convert("RGB") for image in PICTURES], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        embeds = model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)
    return embeds / embeds.norm(dim=-1, keepdim=True)


def test_the_score_is_the_published_head_on_vectors_of_length_1(tmp_path):
    weights = head_weights()
    expected = image_embeds()
    for number in WIDTHS:
        expected = expected @ weights[f"layers.{number}.weight"].T + weights[f"layers.{number}.bias"]
    score = AestheticScore.from_pretrained(save_head(tmp_path, weights), clip=saved(tmp_path / "clip", *tiny_clip()))
    assert score.score_batch(PICTURES, [""] * 3) == pytest.approx(expected[:, 0].tolist(), abs=1e-5)
    check_scorer(score)


def test_a_single_layer_is_a_head_too(tmp_path):
    layer = {"weight": torch.arange(8.0)[None], "bias": torch.tensor([5.0])}
    score = AestheticScore.from_pretrained(save_head(tmp_path, layer), clip=saved(tmp_path / "clip", *tiny_clip()))
    expected = (image_embeds() @ layer["weight"].T + 5)[:, 0]
    assert score.score_batch(PICTURES, [""] * 3) == pytest.approx(expected.tolist(), abs=1e-5)


def test_the_prompt_is_not_used_however_long(tmp_path):
    score = AestheticScore.from_pretrained(
        save_head(tmp_path, head_weights()), clip=saved(tmp_path / "clip", *tiny_clip())
    )
    assert score.score(PICTURES[0], "a wall") == score.score(PICTURES[0], "fog " * 99)


def test_no_pictures_get_no_scores(tmp_path):
    score = AestheticScore.from_pretrained(
        save_head(tmp_path, head_weights()), clip=saved(tmp_path / "clip", *tiny_clip())
    )
    assert score.score_batch([], []) == []


def test_a_pickled_head_is_refused_with_the_way_to_convert_it(tmp_path):
    torch.save(head_weights(), tmp_path / "head.pth")
    with pytest.raises(aa.ModelError, match=r"head.pth' is not a safetensors file.*refused.*weights_only=True"):
        AestheticScore.from_pretrained(tmp_path / "head.pth")


def test_a_converted_head_is_the_pickled_one(tmp_path):
    torch.save(head_weights(), tmp_path / "head.pth")
    converted = torch.load(tmp_path / "head.pth", weights_only=True)
    score = AestheticScore.from_pretrained(save_head(tmp_path, converted), clip=saved(tmp_path / "clip", *tiny_clip()))
    assert score.name == "LAION aesthetic"


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(aa.ModelError, match=r"there is no file '.*nowhere.safetensors'"):
        AestheticScore.from_pretrained(tmp_path / "nowhere.safetensors")


def test_a_head_for_another_clip_is_refused(tmp_path):
    other = {"weight": torch.zeros(1, 5), "bias": torch.zeros(1)}
    with pytest.raises(aa.ModelError, match=r"the head takes 5 features and .* gives 8"):
        AestheticScore.from_pretrained(save_head(tmp_path, other), clip=saved(tmp_path / "clip", *tiny_clip()))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"conv.weight": torch.zeros(1)}, r"'conv.weight'.*not a head of linear layers"),
        (
            {key: value for key, value in head_weights().items() if key != "layers.2.bias"},
            r"not a head of linear layers",
        ),
        ({key: value for key, value in head_weights().items() if "2." not in key}, r"do not fit each other"),
        ({key: value for key, value in head_weights().items() if "7." not in key}, r"do not end in one number"),
    ],
)
def test_weights_that_are_not_a_head_are_refused(tmp_path, weights, message):
    with pytest.raises(aa.ModelError, match=message):
        AestheticScore.from_pretrained(save_head(tmp_path, weights))
