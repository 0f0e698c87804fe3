"""Folders and pipelines that are not what was hoped for."""

import json

import pytest
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

import artaug as aa
from artaug.diffusion import DiffusersSynthesizer


@pytest.fixture
def stranger():
    """A real pipeline of a family artaug does not know."""
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(8,),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
    )
    return DDPMPipeline(unet.eval(), DDPMScheduler())


def test_a_folder_that_is_no_pipeline_says_what_it_holds(tmp_path):
    (tmp_path / "holiday.png").touch()
    with pytest.raises(
        aa.ModelError, match=r"is a folder that holds \['holiday.png'\].*model_index.json.*FluxPipeline"
    ):
        DiffusersSynthesizer.from_pretrained(tmp_path)


def test_an_empty_folder_is_an_error(tmp_path):
    with pytest.raises(aa.ModelError, match="is a folder that holds nothing"):
        DiffusersSynthesizer.from_pretrained(tmp_path)


def test_a_missing_folder_is_an_error(tmp_path):
    with pytest.raises(aa.ModelError, match=r"nowhere' does not exist"):
        DiffusersSynthesizer.from_pretrained(tmp_path / "nowhere")


def test_an_index_that_is_no_json_is_an_error(tmp_path):
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(aa.ModelError, match="not a valid JSON file"):
        DiffusersSynthesizer.from_pretrained(tmp_path)


def test_a_folder_of_an_unknown_family_is_named_before_its_weights_are_read(tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "KandinskyPipeline"}))
    with pytest.raises(aa.ModelError, match=r"holds a 'KandinskyPipeline'. Known families: FluxPipeline"):
        DiffusersSynthesizer.from_pretrained(tmp_path)


def test_a_loaded_pipeline_of_an_unknown_family_is_named(stranger):
    with pytest.raises(aa.ModelError, match=r"does not know DDPMPipeline. Known families: FluxPipeline"):
        DiffusersSynthesizer(pipeline=stranger)


def test_a_saved_pipeline_of_an_unknown_family_is_named(stranger, tmp_path):
    stranger.save_pretrained(tmp_path)
    with pytest.raises(aa.ModelError, match="holds a 'DDPMPipeline'"):
        DiffusersSynthesizer.from_pretrained(tmp_path)
