import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPConfig

import artaug as aa
from artaug.scorers import HPSv2, Letterbox, LoadOptions
from artaug.testing import check_scorer
from support.open_clip_reference import encode_image, encode_text, open_clip_weights
from support.tiny_clip import LONGEST, clip_tokenizer
from support.tiny_scorers import SIDE, clip_pictures, saved

PROMPTS = ["a red ball", "fog", "a wall"]
HEADS = 2
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def pictures():
    generator = np.random.default_rng(0)
    return [Image.fromarray(generator.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)) for _ in PROMPTS]


def base(folder):
    """A folder like that of the CLIP-H: configuration, tokenizer and image processor."""
    words = clip_tokenizer()
    tower = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": HEADS}
    tower["hidden_act"] = "gelu"
    text = {**tower, "vocab_size": len(words), "max_position_embeddings": LONGEST, "bos_token_id": 0, "eos_token_id": 1}
    config = CLIPConfig(
        text_config=text, vision_config={**tower, "image_size": SIDE, "patch_size": 14}, projection_dim=8
    )
    return saved(folder, config, clip_pictures(), words)


def scorer(tmp_path, weights, *, name="HPS_v2.1.safetensors"):
    save_file(weights, tmp_path / name)
    return HPSv2.from_pretrained(tmp_path / name, clip=base(tmp_path / "base"), options=LoadOptions(batch_size=4))


def test_the_score_is_the_cosine_that_open_clip_computes_with_its_own_weights(tmp_path):
    weights, tokenizer = open_clip_weights(), clip_tokenizer()
    mean, std = (torch.tensor(channels)[:, None, None] for channels in (MEAN, STD))
    expected = []
    for image, prompt in zip(pictures(), PROMPTS, strict=True):
        pixels = (torch.from_numpy(np.array(image) / np.float32(255)).permute(2, 0, 1) - mean) / std
        tokens = torch.tensor([tokenizer(prompt)["input_ids"]])
        embeds = encode_image(weights, pixels[None], heads=HEADS), encode_text(weights, tokens, heads=HEADS)
        expected.append(float((embeds[0] * embeds[1]).sum()))
    assert scorer(tmp_path, weights).score_batch(pictures(), PROMPTS) == pytest.approx(expected, abs=1e-5)
    assert np.ptp(expected) > 0.01


@pytest.mark.filterwarnings("ignore:.* reads 32 tokens")  # its tokenizer needs many tokens for some scripts
def test_it_passes_the_scorer_checks_and_is_named_after_its_file(tmp_path):
    score = scorer(tmp_path, open_clip_weights())
    assert score.name == "HPSv2 (HPS_v2.1)"
    check_scorer(score)


def test_the_mask_of_older_files_is_ignored(tmp_path):
    plain = scorer(tmp_path, open_clip_weights()).score_batch(pictures(), PROMPTS)
    older = scorer(tmp_path, open_clip_weights() | {"attn_mask": torch.zeros(LONGEST, LONGEST)})
    assert older.score_batch(pictures(), PROMPTS) == plain


def without(name):
    return {key: value for key, value in open_clip_weights().items() if key != name}


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (without("visual.proj"), r"lacks 'visual_projection.weight'"),
        (without("transformer.resblocks.1.ln_2.bias"), r"lacks 'text_model.encoder.layers.1.layer_norm2.bias'"),
        (open_clip_weights(layers=3), r"has an unknown 'text_model.encoder.layers.2"),
        (
            open_clip_weights() | {"score_predictor": torch.zeros(1)},
            r"'score_predictor', which no CLIP of open_clip has",
        ),
        (open_clip_weights(joint=9), r"does not fit a CLIPModel"),
    ],
)
def test_weights_that_are_not_exactly_those_of_the_clip_are_refused(tmp_path, weights, message):
    with pytest.raises(aa.ModelError, match=message):
        scorer(tmp_path, weights)


def test_a_pickled_file_is_refused(tmp_path):
    torch.save({"state_dict": open_clip_weights()}, tmp_path / "HPS_v2.1_compressed.pt")
    with pytest.raises(aa.ModelError, match=r"HPS_v2.1_compressed.pt' is not a safetensors file.*refused.*nested"):
        HPSv2.from_pretrained(tmp_path / "HPS_v2.1_compressed.pt")


@pytest.mark.parametrize(("size", "bars"), [((56, 28), (7, 0)), ((28, 56), (0, 7)), ((28, 28), (0, 0))])
def test_a_letterbox_keeps_the_whole_picture_between_black_bars(size, bars):
    box = Letterbox(size_px=28, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    (square,) = box([Image.new("RGB", size, (255, 128, 0))])["pixel_values"]
    top, left = bars
    inside = square[:, top : 28 - top, left : 28 - left]
    assert torch.allclose(inside, torch.tensor([1, 128 / 255, 0])[:, None, None].expand_as(inside), atol=1e-5)
    assert float(square.sum()) == pytest.approx(float(inside.sum()), abs=1e-3)


def test_a_letterbox_keeps_a_thin_picture_one_pixel_high():
    box = Letterbox(size_px=28, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    (square,) = box([Image.new("RGB", (300, 1), "white")])["pixel_values"]
    assert sorted(set(square.round(decimals=4).flatten().tolist())) == [-1.0, 1.0]
    assert (square[0] > 0).sum() == 28
