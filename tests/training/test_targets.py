"""What the named target selections select of published models: counted by hand from their geometry."""

import re

import pytest

from artaug.training import ATTENTION, ATTENTION_AND_MLP
from support.real_configs import MODELS, weight_shapes

JOINT = 8  # queries, keys, values and output, of pictures and of text
PLAIN = 4  # of one stream
ATTENTION_LAYERS = {
    "FLUX.1-dev": 19 * JOINT + 38 * 3,  # a single block has no output layer of its own
    "FLUX.1-schnell": 19 * JOINT + 38 * 3,
    "FLUX.2-dev": 8 * JOINT + 48 * 2,  # to_qkv_mlp_proj and to_out
    "FLUX.2-klein-4B": 5 * JOINT + 20 * 2,
    "FLUX.2-klein-9B": 8 * JOINT + 24 * 2,
    "SD3.5-medium": 24 * JOINT - 1 + 13 * PLAIN,  # the last block has no to_add_out
    "SD3.5-large": 38 * JOINT - 1,
    "SDXL": (2 * 2 + 2 * 10 + 10 + 3 * 10 + 3 * 2) * 2 * PLAIN,  # down, down, middle, up, up
    "SD1.5": (3 * 2 + 1 + 3 * 3) * 2 * PLAIN,
    "SD2.1": (3 * 2 + 1 + 3 * 3) * 2 * PLAIN,
    "Qwen-Image": 60 * JOINT,
    "Z-Image": (2 + 2 + 30) * PLAIN,
}
OTHER_LAYERS = {
    "FLUX.1-dev": 19 * 4 + 38 * 2,  # proj_mlp and proj_out
    "FLUX.1-schnell": 19 * 4 + 38 * 2,
    "FLUX.2-dev": 8 * 4,
    "FLUX.2-klein-4B": 5 * 4,
    "FLUX.2-klein-9B": 8 * 4,
    "SD3.5-medium": 24 * 4 - 2,  # nor a text MLP
    "SD3.5-large": 38 * 4 - 2,
    "SDXL": 70 * 2 + 11 * 2,  # and proj_in, proj_out of 11 transformers
    "SD1.5": 16 * 2,  # where those two are convolutions
    "SD2.1": 16 * 2 + 16 * 2,
    "Qwen-Image": 60 * 4,
    "Z-Image": (2 + 2 + 30) * 3,
}


def selected(model, targets):
    linear = [name for name, shape in weight_shapes(model).items() if len(shape) == 2]
    return {name for name in linear if re.search(targets, name)}


@pytest.mark.parametrize("model", MODELS)
def test_attention_selects_every_attention_layer_and_nothing_else(model):
    names = selected(model, ATTENTION)
    assert len(names) == ATTENTION_LAYERS[model]
    assert all(re.search(r"\.(to_(q|k|v|out|add_out|qkv_mlp_proj)|add_[qkv]_proj)(\.0)?$", name) for name in names)


@pytest.mark.parametrize("model", MODELS)
def test_attention_and_mlp_adds_the_mlps_and_no_embedding_or_modulation(model):
    names = selected(model, ATTENTION_AND_MLP)
    assert names > selected(model, ATTENTION)
    assert len(names) == ATTENTION_LAYERS[model] + OTHER_LAYERS[model]
    assert not any(re.search(r"embed|norm|mod\.|modulation", name) for name in names)
