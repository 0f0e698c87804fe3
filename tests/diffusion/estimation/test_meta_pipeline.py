"""Pipelines on the meta device: their sizes, the shapes of prompts, and that only configs are read."""

import warnings

import pytest
import torch

import artaug as aa
from artaug.diffusion.estimation.meta_pipeline import _TrueOnMeta, meta_pipeline, modules, stored_bytes, text_shapes
from artaug.diffusion.families.base import Family
from artaug.diffusion.families.flux.family import Flux
from artaug.diffusion.families.registry import family_of
from support.tiny_flux import tiny_flux
from support.tiny_flux2 import tiny_flux2, tiny_flux2_klein
from support.tiny_qwen_image import tiny_qwen_image
from support.tiny_sd3 import tiny_sd3
from support.tiny_unet import tiny_sd15, tiny_sdxl
from support.tiny_z_image import tiny_z_image

PIPELINES = [tiny_flux, tiny_flux2, tiny_flux2_klein, tiny_qwen_image, tiny_sd3, tiny_sd15, tiny_sdxl, tiny_z_image]


def family_of_tiny(pipeline, *, family=None):
    return (family or family_of(pipeline))(
        pipeline=pipeline,
        width=32,
        height=32,
        guidance_scale=None,
        negative_prompt=None,
        true_cfg_scale=1.0,
        max_sequence_length=48,
    )


@pytest.fixture(scope="module", params=PIPELINES, ids=lambda build: build.__name__)
def pipeline(request):
    return request.param()


def only_configs(pipeline, folder):
    """What is left of a saved pipeline without weights and vocabularies."""
    pipeline.save_pretrained(folder)
    for file in folder.rglob("*"):
        if file.is_file() and "config" not in file.name and file.name != "model_index.json":
            file.unlink()
    return folder


def test_a_pipeline_built_from_configs_alone_would_weigh_what_the_real_one_weighs(pipeline, tmp_path):
    found = meta_pipeline(only_configs(pipeline, tmp_path), dtype=torch.float32)
    assert type(found) is type(pipeline)
    assert {name: stored_bytes(module) for name, module in modules(found)} == {
        name: stored_bytes(module) for name, module in modules(pipeline)
    }
    assert {weight.device.type for _, module in modules(found) for weight in module.parameters()} == {"meta"}


def test_a_loaded_pipeline_stays_as_it_is(pipeline):
    weights = {name: [*module.parameters()] for name, module in modules(pipeline)}
    twin = meta_pipeline(pipeline, dtype=torch.bfloat16)
    assert all(
        weight is original
        for name, module in modules(pipeline)
        for weight, original in zip(module.parameters(), weights[name], strict=True)
    )
    assert {weight.dtype for _, module in modules(twin) for weight in module.parameters()} == {torch.bfloat16}


def test_the_shapes_of_a_prompt_of_full_length_are_what_its_family_encodes(pipeline):
    family = family_of_tiny(pipeline)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what is cut: the prompt is longer than any model reads
        encoded = family.encode_prompts(["word " * 100])
    assert {name: tuple(tensor.shape[1:]) for name, tensor in encoded.items()} == text_shapes(family)


def test_sd3_without_t5_has_as_many_tokens():
    family = family_of_tiny(tiny_sd3(has_t5=False))
    assert tuple(family.encode_prompts(["a"])["prompt_embeds"].shape[1:]) == text_shapes(family)["prompt_embeds"]


@pytest.mark.parametrize("build", [tiny_flux, tiny_sd3, tiny_sd15, tiny_sdxl], ids=lambda build: build.__name__)
def test_the_default_of_text_shapes_encodes_a_prompt_without_weights_and_vocabulary(build, tmp_path):
    family = family_of_tiny(meta_pipeline(only_configs(build(), tmp_path), dtype=torch.float32))
    with _TrueOnMeta():
        assert Family.text_shapes(family) == family.text_shapes()


class ValueReadingFlux(Flux):
    """A family whose encoder reads values, without a `text_shapes` of its own."""

    text_shapes = Family.text_shapes

    def encode_prompts(self, prompts):
        encoded = super().encode_prompts(prompts)
        return {**encoded, "strength": torch.full((len(prompts), 1), encoded["prompt_embeds"].mean().item())}


def test_a_family_that_cannot_encode_without_weights_gives_its_shapes():
    pipeline = meta_pipeline(tiny_flux(), dtype=torch.float32)
    with pytest.raises(
        aa.ModelError, match=r"what ValueReadingFlux.encode_prompts returns .*Give the family a method text_shapes\(\)"
    ):
        text_shapes(family_of_tiny(pipeline, family=ValueReadingFlux))


def test_a_component_without_a_config_is_named(tmp_path):
    tiny_flux().save_pretrained(tmp_path)
    (tmp_path / "vae" / "config.json").unlink()
    with pytest.raises(aa.ModelError, match=r"the config of 'vae' of .* cannot be read"):
        meta_pipeline(tmp_path, dtype=torch.float32)
