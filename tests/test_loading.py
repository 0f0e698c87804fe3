"""Whatever is wrong with a foreign model, `from_pretrained` says it in an error of artaug, naming what it was given."""

import json
import os
import re
import shutil
from contextlib import contextmanager
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.scorers.test_hps import base as hps_base
from tests.scorers.test_safety import tiny_checker

import artaug as aa
from artaug.critics import Coordinates, VLMCritic
from artaug.diffusion import DiffusersSynthesizer, estimate
from artaug.judges import VLMJudge
from artaug.scorers import (
    AestheticScore,
    ClipIQA,
    ClipScore,
    ConceptProbability,
    DualEncoder,
    HPSv2,
    ImageEncoder,
    ImageReward,
    LoadOptions,
    PickScore,
    SafetyMargin,
    SiglipScore,
    VQAScore,
)
from support.image_reward_reference import image_reward_weights
from support.open_clip_reference import open_clip_weights
from support.tiny_flux import tiny_flux
from support.tiny_llava import tiny_llava
from support.tiny_scorers import letters, saved, tiny_classifier, tiny_clip, tiny_dino, tiny_siglip


def critic(folder, **options):
    return VLMCritic.from_pretrained(folder, coordinates=Coordinates("thousandths"), constrained=False, **options)


def of_a_scorer(load):
    """A loader of a scorer with its options as keyword arguments, as the critic and the synthesizer have them."""
    return lambda folder, **options: load(folder, options=LoadOptions(**options))


FOLDERS = {
    # the folder that is spoiled, by what makes it, and how it is loaded
    "DiffusersSynthesizer": ("flux", DiffusersSynthesizer.from_pretrained),
    "estimate": ("flux", estimate),
    "VLMCritic": ("llava", critic),
    "VLMJudge": ("llava", of_a_scorer(VLMJudge.from_pretrained)),
    "VQAScore": (
        "llava",
        of_a_scorer(lambda folder, options: VQAScore.from_pretrained(folder, answer="a", options=options)),
    ),
    "DualEncoder": ("clip", of_a_scorer(DualEncoder.from_pretrained)),
    "ClipScore": ("clip", of_a_scorer(ClipScore.from_pretrained)),
    "ClipIQA": ("clip", of_a_scorer(ClipIQA.from_pretrained)),
    "PickScore": (
        "clip",
        of_a_scorer(lambda folder, options: PickScore.from_pretrained(folder, processor=folder, options=options)),
    ),
    "SiglipScore": ("siglip", of_a_scorer(SiglipScore.from_pretrained)),
    "ImageEncoder": ("dino", of_a_scorer(ImageEncoder.from_pretrained)),
    "ConceptProbability": (
        "classifier",
        of_a_scorer(
            lambda folder, options: ConceptProbability.from_pretrained(folder, classes=("normal",), options=options)
        ),
    ),
    "SafetyMargin": ("checker", of_a_scorer(SafetyMargin.from_pretrained)),
}
OTHER_KIND = {
    "flux": "clip",
    "llava": "clip",
    "clip": "dino",
    "siglip": "dino",
    "dino": "clip",
    "classifier": "clip",
    "checker": "dino",
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with a whole, tiny model of each kind."""
    root = tmp_path_factory.mktemp("models")
    tiny_flux().save_pretrained(root / "flux")
    for kind, parts in {
        "llava": tiny_llava(),
        "clip": tiny_clip(),
        "siglip": tiny_siglip(),
        "dino": tiny_dino(),
        "classifier": tiny_classifier(),
        "checker": (tiny_checker(), tiny_clip()[1]),
        "words": (letters(pad="[PAD]", begin="[CLS]", end="[SEP]"),),
    }.items():
        saved(root / kind, *parts)
    hps_base(root / "hps")
    heads = {"weight": torch.ones(1, 8), "bias": torch.zeros(1)}
    for name, weights in {
        "AestheticScore": heads,
        "HPSv2": open_clip_weights(),
        "ImageReward": image_reward_weights(),
    }.items():
        save_file(weights, root / f"{name}.safetensors")
    return root


@pytest.fixture
def copy(models, tmp_path):
    """A function that copies what is in ``models``, to spoil it."""

    def copied(name):
        copying = shutil.copytree if (models / name).is_dir() else shutil.copy
        return Path(copying(models / name, tmp_path / name))

    return copied


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@contextmanager
def unreadable(file):
    """A file that this process may not read: root may read any, so it is nobody for the time."""
    file.chmod(0)
    root = os.geteuid() == 0
    if root:
        for folder in file.parents:
            if folder.stat().st_uid == 0 and folder != Path("/") and not folder.stat().st_mode & 0o001:
                folder.chmod(folder.stat().st_mode | 0o755)
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
        file.chmod(0o644)


def configs(folder):
    return [
        path
        for path in folder.rglob("*config.json")
        if path.parent.name not in {"tokenizer", "tokenizer_2", "scheduler"}
    ]


def weights(folder):
    return max(folder.rglob("*.safetensors"), key=lambda path: path.stat().st_size)


def overwrite(text):
    def spoil(folder):
        for config in [*configs(folder), *folder.glob("model_index.json")]:
            config.write_text(text, encoding="utf-8")

    return spoil


def replace_by_folders(folder):
    for config in [*configs(folder), *folder.glob("model_index.json")]:
        config.unlink()
        config.mkdir()


def cut(folder):
    file = weights(folder)
    os.truncate(file, file.stat().st_size // 2)


def empty(folder):
    weights(folder).write_bytes(b"")


SPOILED = {
    "broken JSON": overwrite("{"),
    "a list for a config": overwrite("[1]"),
    "numbers for a config": overwrite('{"model_type": 3, "_class_name": 3, "architectures": 4}'),
    "not UTF-8": lambda folder: [
        config.write_bytes(b"\xff\xfe{") for config in [*configs(folder), *folder.glob("model_index.json")]
    ],
    "folders for configs": replace_by_folders,
    "weights cut short": cut,
    "weights empty": empty,
}


@pytest.mark.parametrize("spoil", SPOILED.values(), ids=SPOILED)
@pytest.mark.parametrize("name", FOLDERS)
@pytest.mark.filterwarnings("ignore")
def test_a_spoiled_folder_is_named(name, spoil, copy):
    kind, load = FOLDERS[name]
    folder = copy(kind)
    spoil(folder)
    if name == "estimate" and spoil in {cut, empty}:
        load(str(folder), width=64, height=64)  # it reads no weights
        return
    with pytest.raises(aa.ModelError, match=str(folder)):
        load(str(folder))


@pytest.mark.parametrize("name", FOLDERS)
@pytest.mark.filterwarnings("ignore")
def test_a_folder_of_another_kind_of_model_is_named(name, copy):
    kind, load = FOLDERS[name]
    with pytest.raises(aa.ModelError):
        load(str(copy(OTHER_KIND[kind])))


@pytest.mark.parametrize("source", ["", "/nowhere/at/all", "nobody/no-such-model", "a/b/c/d"])
@pytest.mark.parametrize("name", FOLDERS)
def test_a_source_that_does_not_exist_is_named(name, source):
    with pytest.raises(aa.ModelError, match=re.escape(repr(source))):
        FOLDERS[name][1](source)


@pytest.mark.parametrize("name", FOLDERS)
def test_a_path_where_nothing_is_is_not_answered_with_the_hubs_rules_for_names(name):
    with pytest.raises(aa.ModelError, match="no name on the Hub") as caught:
        FOLDERS[name][1]("./models/no-such")
    assert "Repo id" not in str(caught.value)


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="no users to be")
@pytest.mark.parametrize("name", FOLDERS)
@pytest.mark.filterwarnings("ignore")
def test_a_folder_that_may_not_be_read_is_named(name, copy):
    kind, load = FOLDERS[name]
    folder = copy(kind)
    with unreadable(folder / ("model_index.json" if kind == "flux" else "config.json")), pytest.raises(aa.ModelError):
        load(str(folder))


@pytest.mark.parametrize(
    "options", [{"dtype": "nonsense"}, {"dtype": torch.int8}, {"device": "gpu"}, {"device": "cuda:x"}], ids=str
)
@pytest.mark.parametrize("name", FOLDERS)
def test_a_type_or_a_device_that_torch_does_not_have_is_refused_before_anything_is_read(name, options):
    if name == "estimate" or (name == "DiffusersSynthesizer" and isinstance(options.get("dtype"), str)):
        return  # it loads no weights; the tests' own check of types comes first
    with pytest.raises(aa.InvalidValueError, match=r"dtype is|device is|dtype=.*expected an instance of torch.dtype"):
        FOLDERS[name][1]("/nowhere", **options)


@pytest.mark.parametrize("name", FOLDERS)
@pytest.mark.filterwarnings("ignore")
def test_what_is_not_spoiled_loads(name, copy):
    kind, load = FOLDERS[name]
    assert load(str(copy(kind)), **({"width": 64, "height": 64} if kind == "flux" else {}))


def store_as(dtype, folder):
    """Change what the weights of a folder are stored as, and what its configurations say of it."""
    for file in folder.rglob("*.safetensors"):
        weights = {
            name: weight.to(dtype) if weight.is_floating_point() else weight for name, weight in load_file(file).items()
        }
        save_file(weights, file, metadata={"format": "pt"})
    for config in configs(folder):
        if "dtype" in (settings := json.loads(config.read_text(encoding="utf-8"))):
            name = str(dtype).removeprefix("torch.")
            config.write_text(json.dumps({**settings, "dtype": name}), encoding="utf-8")


@pytest.mark.parametrize(
    ("stored", "computed"),
    [
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16 if torch.accelerator.is_available() else torch.float32),
    ],
    ids=["bfloat16", "float16"],
)
@pytest.mark.parametrize("name", [name for name in FOLDERS if name != "estimate"])
@pytest.mark.filterwarnings("ignore")
def test_what_loads_has_the_precision_of_its_checkpoint_on_the_gpu_where_there_is_one_and_says_so_once(
    name, stored, computed, copy, caplog
):
    kind, load = FOLDERS[name]
    folder = copy(kind)
    store_as(stored, folder)
    with caplog.at_level("INFO", logger="artaug"):
        loaded = load(str(folder))
    here = torch.accelerator.current_accelerator() or torch.device("cpu")
    weights = [weight for model in parts_of(loaded) for weight in model.parameters()]
    assert {weight.dtype for weight in weights} == {computed}
    assert {weight.device.type for weight in weights} == {here.type}
    (said,) = [record.getMessage() for record in caplog.records if record.getMessage().startswith("loaded")]
    assert said.startswith(f"loaded {folder}: {str(computed).removeprefix('torch.')} on {here.type}")


def parts_of(loaded):
    """The models of a synthesizer, a critic, a scorer, a judge or an encoder."""
    if isinstance(loaded, DiffusersSynthesizer):
        return [part for part in loaded.pipeline.components.values() if isinstance(part, torch.nn.Module)]
    return loaded.models


FILES = {
    "AestheticScore": lambda file, root: AestheticScore.from_pretrained(file, clip=str(root / "clip")),
    "HPSv2": lambda file, root: HPSv2.from_pretrained(file, clip=str(root / "hps")),
    "ImageReward": lambda file, root: ImageReward.from_pretrained(file, tokenizer=str(root / "words")),
}


def reshape(file):
    save_file({name: weight.flatten()[:1].clone() for name, weight in load_file(file).items()}, file)


SPOILED_FILES = {
    "missing": lambda file: file.unlink(),
    "a folder": lambda file: (file.unlink(), file.mkdir()),
    **({"a pipe": lambda file: (file.unlink(), os.mkfifo(file))} if hasattr(os, "mkfifo") else {}),
    "cut short": lambda file: os.truncate(file, file.stat().st_size // 2),
    "empty": lambda file: file.write_bytes(b""),
    "other weights": lambda file: save_file({"layers.x.weight": torch.ones(2)}, file),
    "no weights": lambda file: save_file({}, file),
    "other shapes": reshape,
}


@pytest.mark.parametrize("spoil", SPOILED_FILES.values(), ids=SPOILED_FILES)
@pytest.mark.parametrize("name", FILES)
def test_a_spoiled_file_is_named(name, spoil, copy, models):
    file = copy(f"{name}.safetensors")
    spoil(file)
    with pytest.raises(aa.ModelError, match=str(file)):
        FILES[name](file, models)


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="no users to be")
@pytest.mark.parametrize("name", FILES)
def test_a_file_that_may_not_be_read_is_not_called_a_pickle(name, copy, models):
    file = copy(f"{name}.safetensors")
    with unreadable(file), pytest.raises(aa.ModelError, match=r"cannot be read.*denied"):
        FILES[name](file, models)


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_not_spoiled_loads(name, models):
    assert FILES[name](models / f"{name}.safetensors", models)
