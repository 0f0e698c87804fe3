"""How scorers load their models and prepare their inputs."""

import subprocess
import sys

import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPModel

import artaug as aa
from artaug.scorers import ClipIQA, ClipScore, DualEncoder, PickScore
from artaug.scorers.loading import (
    LoadOptions,
    batch_slices,
    check_counts,
    load_image_processor,
    load_tokenizer,
    load_weights,
    model_from_weights,
    to_rgb,
)
from support.tiny_scorers import saved, tiny_clip


def loaded_by(statement):
    program = f"import sys; {statement}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True, text=True)
    return set(done.stdout.split())


def test_importing_the_scorers_loads_no_transformers():
    assert not loaded_by("import artaug.scorers") & {"transformers", "diffusers", "torchvision"}


def test_pictures_are_resized_by_pillow_with_torchvision_or_without(tmp_path):
    folder = saved(tmp_path, *tiny_clip())
    assert type(load_image_processor(folder, revision="main")).__name__ == "CLIPImageProcessorPil"


@pytest.mark.parametrize("load", [load_image_processor, load_tokenizer])
def test_a_folder_without_a_processor_is_named(load, tmp_path):
    with pytest.raises(aa.ModelError, match=r"could not be read by Auto"):
        load(str(tmp_path), revision="main")


def test_a_model_is_built_of_exactly_the_weights_it_is_given():
    model, *_ = tiny_clip()
    weights = model.state_dict()
    twin = model_from_weights(CLIPModel, model.config, dict(weights), LoadOptions(), source="here")
    assert not twin.training
    assert all(torch.equal(weight, weights[name]) for name, weight in twin.state_dict().items())
    partial = {name: weight for name, weight in weights.items() if name != "logit_scale"}
    with pytest.raises(aa.ModelError, match=r"'here' lacks 'logit_scale'"):
        model_from_weights(CLIPModel, CLIPConfig(**model.config.to_dict()), partial, LoadOptions(), source="here")


def test_a_file_that_is_not_safetensors_is_refused(tmp_path):
    (tmp_path / "weights.safetensors").write_text("not tensors", encoding="utf-8")
    with pytest.raises(aa.ModelError, match=r"weights.safetensors' is not a safetensors file"):
        load_weights(tmp_path / "weights.safetensors")
    with pytest.raises(aa.ModelError, match=r"there is no file"):
        load_weights(tmp_path / "nowhere.safetensors")


def test_pictures_become_rgb_and_a_bad_one_is_named_by_its_number():
    assert [image.mode for image in to_rgb([Image.new("L", (2, 2)), Image.new("RGBA", (2, 2))])] == ["RGB", "RGB"]
    with pytest.raises(aa.InvalidValueError) as caught:
        to_rgb([Image.new("L", (2, 2)), Image.new("F", (2, 2))])
    assert caught.value.__notes__ == ["It is picture 2 of 2."]


def test_counts_must_match_and_batches_cover_all():
    check_counts([Image.new("L", (1, 1))], ["a"])
    with pytest.raises(aa.InvalidValueError, match=r"0 pictures and 1 prompts"):
        check_counts([], ["a"])
    assert [list(range(7))[batch] for batch in batch_slices(7, 3)] == [[0, 1, 2], [3, 4, 5], [6]]


def test_load_options_name_a_model_with_its_revision_and_refuse_an_empty_batch():
    assert LoadOptions().label("openai/clip") == "openai/clip"
    assert LoadOptions(revision="v2").label("openai/clip") == "openai/clip@v2"
    with pytest.raises(aa.InvalidValueError, match=r"LoadOptions\(batch_size=0\): need at least 1, or None"):
        LoadOptions(batch_size=0)


@pytest.mark.parametrize(
    ("stored", "loaded"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float32),  # which a CPU computes in faster, and exactly
    ],
    ids=str,
)
def test_a_model_keeps_the_precision_of_its_checkpoint(tmp_path, caplog, stored, loaded):
    model, *others = tiny_clip()
    folder = saved(tmp_path, model.to(stored), *others)
    with caplog.at_level("INFO", logger="artaug"):
        encoder = DualEncoder.from_pretrained(folder, options=LoadOptions(device="cpu"))
    assert encoder.model.dtype == loaded
    (said,) = [record.getMessage() for record in caplog.records if record.getMessage().startswith("loaded")]
    assert f"{str(loaded).removeprefix('torch.')} on cpu" in said
    twin = model_from_weights(CLIPModel, model.config, model.state_dict(), LoadOptions(device="cpu"), source="here")
    assert twin.dtype == loaded


def test_load_options_set_device_dtype_and_batch_size_of_every_loader(tmp_path):
    folder = saved(tmp_path, *tiny_clip())
    options = LoadOptions(device="cpu", dtype=torch.bfloat16, batch_size=3)
    assert (ClipScore.from_pretrained(folder).encoder.model.dtype) == torch.float32
    for encoder in (
        DualEncoder.from_pretrained(folder, options=options),
        ClipScore.from_pretrained(folder, options=options).encoder,
        PickScore.from_pretrained(folder, processor=folder, options=options).encoder,
        ClipIQA.from_pretrained(folder, options=options).encoder,
    ):
        assert (encoder.model.dtype, encoder.model.device.type, encoder.batch_size) == (torch.bfloat16, "cpu", 3)
