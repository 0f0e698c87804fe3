"""Region prompts encoded together, in one call of the encoders: the same as each of them encoded alone."""

import dataclasses
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import artaug as aa
from artaug.diffusion.families.base import Family
from artaug.diffusion.families.chroma.family import Chroma1
from artaug.diffusion.families.flux.family import Flux
from artaug.diffusion.families.flux2.family import Flux2, Flux2Klein
from artaug.diffusion.families.qwen_image.family import QwenImage
from artaug.diffusion.families.sd3.family import StableDiffusion3
from artaug.diffusion.families.unet.family import StableDiffusion, StableDiffusionXL
from artaug.diffusion.families.z_image.family import ZImage
from support.family_laws import family_of
from support.tiny_chroma import tiny_chroma
from support.tiny_flux import tiny_flux
from support.tiny_flux2 import tiny_flux2, tiny_flux2_klein
from support.tiny_qwen_image import tiny_qwen_image
from support.tiny_sd3 import tiny_sd3
from support.tiny_unet import tiny_sd15, tiny_sdxl
from support.tiny_z_image import tiny_z_image

PIPELINES = {
    Chroma1: tiny_chroma(),
    Flux: tiny_flux(),
    Flux2: tiny_flux2(),
    Flux2Klein: tiny_flux2_klein(),
    QwenImage: tiny_qwen_image(),
    StableDiffusion3: tiny_sd3(),
    StableDiffusion: tiny_sd15(),
    StableDiffusionXL: tiny_sdxl(),
    ZImage: tiny_z_image(),
}
PROMPTS = ["a red barn", "", "ivy", "a very old and crooked oak that nobody has cut for three hundred years", "a lake"]
LEFT, RIGHT = aa.Box(0, 0, 0.5, 1), aa.Box(0.5, 0, 1, 1)


@pytest.fixture(params=PIPELINES, ids=lambda family: family.__name__)
def family(request):
    return family_of(request.param, PIPELINES[request.param], width=32, height=32)


def encoders_of(family):
    components = family.pipeline.components
    return {name: part for name, part in components.items() if name.startswith("text_encoder") and part is not None}


def calls_of_encoders(family, encode):
    """How often each text encoder is called by a function, in the order of the pipeline's components."""
    counts = dict.fromkeys(encoders_of(family), 0)

    def count(name):
        def counted(*_):
            counts[name] += 1

        return counted

    hooks = [encoder.register_forward_hook(count(name)) for name, encoder in encoders_of(family).items()]
    try:
        encode()
    finally:
        for hook in hooks:
            hook.remove()
    return list(counts.values())


def assert_same_encoding(encoded, alone):
    assert encoded.token_slice == alone.token_slice
    assert encoded.conditioning.keys() == alone.conditioning.keys()
    for name, column in alone.conditioning.items():
        torch.testing.assert_close(encoded.conditioning[name], column, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.* reads .* tokens and the prompt")
def test_a_prompt_encoded_with_others_is_encoded_as_alone(family):
    together = family.encode_separately(PROMPTS)
    for prompt, encoded in zip(PROMPTS, together, strict=True):
        alone = family.encode_prompts([prompt])
        assert_same_encoding(encoded, dataclasses.replace(encoded, conditioning=alone))
        assert encoded.token_slice == family.token_slices([prompt])[0]


@settings(max_examples=8)
@given(prompts=st.lists(st.text("ab cd,", max_size=40), min_size=1, max_size=4, unique=True))
def test_what_is_encoded_beside_a_prompt_does_not_change_it_where_prompts_have_lengths_of_their_own(prompts):
    family = family_of(ZImage, PIPELINES[ZImage], width=32, height=32, max_sequence_length=64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        together = family.encode_separately(prompts)
        for prompt, encoded in zip(prompts, together, strict=True):
            assert_same_encoding(encoded, family.encode_separately([prompt])[0])


@pytest.mark.filterwarnings("ignore:.* reads .* tokens and the prompt")
def test_every_region_prompt_of_a_batch_is_encoded_once_and_all_in_one_call_where_that_changes_none(family):
    first = aa.Plan("a hill", (aa.Region(LEFT, "ivy", negative_prompt="dull"), aa.Region(RIGHT, "a lake")))
    second = aa.Plan("a road", (aa.Region(LEFT, "a lake", negative_prompt="ivy"), aa.Region(RIGHT, "a red barn")))
    encoded = []
    calls = calls_of_encoders(family, lambda: encoded.extend(family.encode_regions([first, aa.Plan("a"), second])))
    assert calls == [1 if family.rows_are_independent else len({"ivy", "a lake", "dull", "a red barn"})] * len(calls)
    assert encoded[0][1].prompt is encoded[2][0].prompt
    assert encoded[2][0].negative_prompt is encoded[0][0].prompt
    assert encoded[0][1].negative_prompt is None
    for region in (*encoded[0], *encoded[2]):
        assert_same_encoding(region.prompt, family.encode_separately([region.region.prompt])[0])


def test_very_many_region_prompts_take_several_calls():
    family = family_of(Flux, PIPELINES[Flux], width=32, height=32)
    prompts = [f"barn {number}" for number in range(65)]
    encoded = []
    calls = calls_of_encoders(family, lambda: encoded.extend(family.encode_separately(prompts)))
    assert calls == [2, 2]
    assert_same_encoding(encoded[64], family.encode_separately(["barn 64"])[0])


def test_no_region_prompts_take_no_call(family):
    assert calls_of_encoders(family, lambda: family.encode_regions([aa.Plan("a barn")])) == [0] * len(
        encoders_of(family)
    )


def test_all_families_but_one_encode_region_prompts_together():
    assert [kind for kind in PIPELINES if not kind.rows_are_independent] == [QwenImage]


class UnmaskedFlux(Flux):
    """A family whose encoder sees the padding that longer prompts of the same call cause."""

    rows_are_independent = False

    def encode_prompts(self, prompts):
        tokens = self.pipeline.tokenizer_2(list(prompts), padding="longest", return_tensors="pt").input_ids
        with torch.no_grad():
            return {"prompt_embeds": self.pipeline.text_encoder_2(tokens)[0]}


def test_a_family_that_does_not_vouch_for_its_rows_encodes_region_prompts_one_by_one():
    assert not Family.rows_are_independent
    family = family_of(UnmaskedFlux, PIPELINES[Flux], width=32, height=32)
    together = family.encode_prompts(PROMPTS[:2])["prompt_embeds"]
    for prompt, encoded in zip(PROMPTS, family.encode_separately(PROMPTS), strict=True):
        assert torch.equal(encoded.conditioning["prompt_embeds"], family.encode_prompts([prompt])["prompt_embeds"])
    assert together[1:].shape != family.encode_prompts(PROMPTS[1:2])["prompt_embeds"].shape
