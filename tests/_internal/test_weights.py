"""Models whose safetensors weights are pickles by another name, in folders and on the Hub."""

import json
from functools import partial

import pytest
import transformers.utils
from diffusers import FluxPipeline
from transformers import AutoModel

import artaug as aa
from artaug._internal.weights import check_safetensors
from artaug.critics import VLMCritic
from artaug.diffusion import DiffusersSynthesizer, Flux, synthesizer
from artaug.scorers import PickScore
from artaug.scorers.loading import DEFAULT_OPTIONS, load_model
from support.hub_server import hub_server

INDEX = "model.safetensors.index.json"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The files of ``me/tiny`` as transformers fetches them one by one: what is not there raises ``OSError``."""

    def cached_file(source, name, *, revision):
        assert source == "me/tiny"
        if not (tmp_path / name).exists():
            raise OSError(f"{source} has no {name} at {revision}")
        return str(tmp_path / name)

    monkeypatch.setattr(transformers.utils, "cached_file", cached_file)
    return tmp_path


def write_index(folder, name):
    folder.mkdir(exist_ok=True)
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": name}}), encoding="utf-8")


@pytest.mark.parametrize(
    "load",
    [
        lambda: VLMCritic.from_pretrained("me/tiny"),
        lambda: load_model(AutoModel, "me/tiny", DEFAULT_OPTIONS),
    ],
    ids=["critic", "scorer"],
)
def test_an_index_on_the_hub_that_names_pickles_is_refused_before_weights_are_read(load, hub):
    write_index(hub, "x.bin")
    with pytest.raises(aa.ModelError, match=r"names 'x\.bin', which is no safetensors file"):
        load()


def test_a_pipeline_on_the_hub_whose_index_names_pickles_is_refused(tmp_path, monkeypatch):
    write_index(tmp_path / "vae", "x.bin")
    monkeypatch.setattr(synthesizer, "family_at", lambda _source: Flux)
    monkeypatch.setattr(FluxPipeline, "download", lambda _source, **_options: str(tmp_path))
    with pytest.raises(aa.ModelError, match=r"names 'x\.bin', which is no safetensors file"):
        DiffusersSynthesizer.from_pretrained("me/tiny")


def test_of_the_hub_an_adapter_without_safetensors_is_refused(hub):
    (hub / "config.json").write_text("{}", encoding="utf-8")
    check_safetensors("me/tiny", fetch=partial(transformers.utils.cached_file, "me/tiny", revision="main"))
    (hub / "adapter_config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(aa.ModelError, match="load an adapter, and there is none in safetensors"):
        check_safetensors("me/tiny", fetch=partial(transformers.utils.cached_file, "me/tiny", revision="main"))


def test_a_name_of_which_the_hub_has_nothing_is_left_to_the_loader():
    check_safetensors("me/tiny", fetch=lambda _name: None)


LOADERS = pytest.mark.parametrize(
    "load",
    [DiffusersSynthesizer.from_pretrained, VLMCritic.from_pretrained, PickScore.from_pretrained],
    ids=["pipeline", "critic", "scorer"],
)


DEPRECATED = pytest.mark.filterwarnings(
    "ignore:The `local_dir_use_symlinks` argument:UserWarning"
)  # diffusers' own call


@DEPRECATED
@LOADERS
def test_a_model_that_the_hub_cannot_be_asked_for_says_so_in_place_of_a_missing_file(load, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(aa.ModelError, match=r"'me/tiny' .*: it is not in the Hub's cache, .* Look at the connection"):
        load("me/tiny")


@pytest.mark.loopback
@DEPRECATED
@LOADERS
def test_a_model_whose_license_was_not_accepted_says_so_in_place_of_an_unknown_name(load, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with hub_server() as server:
        server.add("me/tiny").gated = True
        monkeypatch.setattr(
            "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE",
            server.url + "/{repo_id}/resolve/{revision}/{filename}",
        )
        with pytest.raises(aa.ModelError, match=r"'me/tiny' .*: its page on the Hub asks .* hf auth login"):
            load("me/tiny")
