import subprocess
import sys

import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPModel

import artaug as aa
from artaug.scorers.loading import build, load_image_processor, load_tokenizer, matched, read_tensors, shown, slices
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
    with pytest.raises(aa.ModelError, match=r"has nothing for Auto"):
        load(str(tmp_path), revision="main")


def test_a_model_is_built_of_exactly_the_weights_it_is_given():
    model, *_ = tiny_clip()
    weights = model.state_dict()
    twin = build(CLIPModel, model.config, dict(weights), source="here", device=None, dtype=torch.float32)
    assert not twin.training
    assert all(torch.equal(weight, weights[name]) for name, weight in twin.state_dict().items())
    with pytest.raises(aa.ModelError, match=r"'here' lacks 'logit_scale'"):
        build(
            CLIPModel,
            CLIPConfig(**model.config.to_dict()),
            {name: weight for name, weight in weights.items() if name != "logit_scale"},
            source="here",
            device=None,
            dtype=torch.float32,
        )


def test_what_is_no_safetensors_file_is_refused(tmp_path):
    (tmp_path / "weights.safetensors").write_text("not tensors", encoding="utf-8")
    with pytest.raises(aa.ModelError, match=r"weights.safetensors' is no safetensors file"):
        read_tensors(tmp_path / "weights.safetensors")
    with pytest.raises(aa.ModelError, match=r"there is no file"):
        read_tensors(tmp_path / "nowhere.safetensors")


def test_pictures_are_shown_as_rgb_and_a_bad_one_is_counted():
    assert [image.mode for image in shown([Image.new("L", (2, 2)), Image.new("RGBA", (2, 2))])] == ["RGB", "RGB"]
    with pytest.raises(aa.InvalidValueError) as caught:
        shown([Image.new("L", (2, 2)), Image.new("F", (2, 2))])
    assert caught.value.__notes__ == ["It is picture 2 of 2."]


def test_counts_must_match_and_parts_cover_all():
    matched([Image.new("L", (1, 1))], ["a"])
    with pytest.raises(aa.InvalidValueError, match=r"0 pictures and 1 prompts"):
        matched([], ["a"])
    assert [list(range(7))[part] for part in slices(7, 3)] == [[0, 1, 2], [3, 4, 5], [6]]
