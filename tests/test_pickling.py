"""What a worker process returns or raises arrives as it was: every public class of artaug pickles and copies."""

import copy
import dataclasses
import importlib
import inspect
import math
import multiprocessing
import pickle
import pkgutil
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import numpy as np
import pytest
import torch
from PIL import Image

import artaug as aa
from artaug import critics, hub, judges, recipes, scorers
from artaug.evaluation.suites import Case, Question, QuestionCheck, QuestionScore, Suite
from artaug.lora.formats import FLUX1, KeyMap
from artaug.run.planning.cluster_plan import ClusterSize
from artaug.run.storage.records import Member
from artaug.serving.model import ServedModel
from artaug.testing import FixedCritic, FixedFilter, FixedJudge, FixedScorer, SwatchSynthesizer
from support.reference import documented

PUBLIC = documented("class|exception")
HOLD_A_MODEL = {
    # A network or a pipeline in memory: whether that pickles is its library's affair.
    *(
        "VLMCritic",
        "DiffusersSynthesizer",
        "Chroma1",
        "Flux",
        "Flux2",
        "Flux2Klein",
        "FluxKontext",
        "EditingSynthesizer",
        "QwenImage",
        "QwenImageEdit",
        "StableDiffusion3",
    ),
    *("StableDiffusionXL", "StableDiffusion", "ZImage", "ClipScore", "ClipIQA", "SiglipScore", "PickScore", "HPSv2"),
    *(
        "ImageReward",
        "AestheticScore",
        "VQAScore",
        "VLMJudge",
        "ConceptProbability",
        "SafetyMargin",
        "DualEncoder",
        "ClipColors",
    ),
    *("ImageEncoder", "EmbeddingSimilarity", "Tracker", "AttentionSite", "ObjectScore"),
    # A denoiser that is drawing, and what is of one drawing.
    *(
        "Attended",
        "AttentionLayers",
        "DenoiserCall",
        "GuidedRun",
        "LatentStep",
        "Predict",
        "PipelineCall",
        "InstalledTokens",
    ),
    # Processes of a cluster: they go to its workers, see tests/scale.
    *("RayCluster", "RemoteSynthesizer", "RemoteCritic", "RemoteScorer", "ReplicaPool", "SentLoRA"),
}


def a_function(*_):
    """A function of a module, which pickles by its name."""
    return 0.5


SAMPLES = {
    str: lambda: "a pear",
    int: lambda: 1,
    float: lambda: 0.5,
    bool: lambda: True,
    bytes: lambda: b"a pear",
    object: lambda: 1,
    Any: lambda: 1,
    slice: lambda: slice(0, 1),
    range: lambda: range(2),
    Path: lambda: Path("a") / "b",
    torch.Tensor: lambda: torch.ones(1, 1),
    Image.Image: lambda: Image.new("RGB", (2, 2), (1, 2, 3)),
    aa.Box: lambda: aa.Box(0, 0, 0.5, 1),
    aa.Mask: lambda: aa.Mask.from_array(np.eye(2)),
    recipes.AStar: lambda: recipes.AStar(phrases=["red cone", "blue ball"]),
    aa.Tokens: lambda: aa.Tokens({"<pear>": {"clip_l": torch.ones(1, 1)}}),
    aa.Budget: lambda: aa.Budget(at_most=8, critique=0.25),
    aa.Scorer: FixedScorer,
    aa.PairwiseJudge: FixedJudge,
    aa.Synthesizer: SwatchSynthesizer,
    Member: lambda: Member(0, 0),
    aa.PairFilter: lambda: FixedFilter(True),
    aa.Critic: lambda: FixedCritic(aa.Critique()),
    aa.ImageSimilarity: aa.StructuralSimilarity,
    aa.Guide: aa.OutputMix,
    aa.RegionPlanner: aa.GreedyPlanner,
    QuestionScore: lambda: QuestionScore(
        suite=Suite("a suite", (Case("a pear", QuestionCheck((Question(1, "a pear?"),))),)), vqa=FixedScorer()
    ),
    aa.SvdFuser: lambda: aa.SvdFuser(rank=1),
    KeyMap: lambda: FLUX1,
    critics.Ensemble: lambda: critics.Ensemble((FixedCritic(aa.Critique()),), min_votes=1),
    critics.OpenAICritic: lambda: critics.OpenAICritic(
        base_url="http://127.0.0.1:1/v1",
        model="m",
        conversation=critics.Conversation(coordinates=critics.Coordinates("thousandths")),
    ),
    scorers.OpenAIVQAScore: lambda: scorers.OpenAIVQAScore(base_url="http://127.0.0.1:1/v1", model="m"),
    scorers.OpenAIRubricScore: lambda: scorers.OpenAIRubricScore(
        base_url="http://127.0.0.1:1/v1", model="m", rubric="Is it sharp?"
    ),
    judges.OpenAIJudge: lambda: judges.OpenAIJudge(base_url="http://127.0.0.1:1/v1", model="m"),
    recipes.ServedChat: lambda: recipes.ServedChat(base_url="http://127.0.0.1:1/v1", model="m"),
    ServedModel: lambda: ServedModel(base_url="http://127.0.0.1:1/v1", model="m"),
    critics.ApiKey: lambda: critics.ApiKey("EMPTY"),
    aa.StopRule: lambda: aa.StopRule(FixedScorer(), [f"{number} pears" for number in range(30)], at_least=0.1),
    hub.Base: lambda: hub.Base("me/tiny"),
    ClusterSize: lambda: ClusterSize(
        gpus=8,
        critics=1,
        seconds_by_phase=dict.fromkeys(("load", "loop", "train", "combine", "measure"), 60.0),
        busy=dict.fromkeys(("draw", "critique", "plan", "judge", "file"), 6.0),
        cost=None,
    ),
}
"""Values of types that fields do not describe, or not all of what is allowed."""


def sample(kind):  # noqa: C901, PLR0911 - one for each kind of type
    """A value of a type; of a dataclass, one with samples for all fields that have no default."""
    if kind in SAMPLES:
        return SAMPLES[kind]()
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return sample(arguments[0])
    if origin is Literal:
        return arguments[0]
    if origin in {Union, types.UnionType}:
        return sample(next(argument for argument in arguments if argument is not types.NoneType))
    if origin in {tuple, list, Sequence}:
        return tuple(sample(argument) for argument in arguments if argument is not Ellipsis)
    if origin in {dict, Mapping}:
        return {sample(arguments[0]): sample(arguments[1])}
    if origin is Callable:
        return a_function
    if kind.__module__ == "jaxtyping":
        return torch.ones((1,) * len(kind.dims))
    if issubclass(kind, Enum):
        return next(iter(kind))
    if issubclass(kind, Exception):
        return sample_error(kind)
    hints = typing.get_type_hints(kind, include_extras=True)
    fields = [field for field in dataclasses.fields(kind) if field.init and field.default is field.default_factory]
    return kind(**{field.name: sample(hints[field.name]) for field in fields})


def sample_error(kind):
    """An error with samples for the arguments of its constructor, or with a message where it has none of its own."""
    if not inspect.isfunction(kind.__init__):
        return kind("what happened")
    _self, *parameters = inspect.signature(kind.__init__).parameters.values()
    return kind(**{p.name: sample(p.annotation) for p in parameters if p.default is p.empty})


def assert_same(value, other):
    """Nested values with tensors, images and errors in them, by type, content and bits."""
    assert type(value) is type(other)
    match value:
        case torch.Tensor():
            assert value.dtype == other.dtype
            assert torch.equal(value, other)
        case Image.Image():
            assert (value.mode, value.tobytes()) == (other.mode, other.tobytes())
        case Exception():
            assert_same((str(value), value.args, vars(value)), (str(other), other.args, vars(other)))
        case Mapping():
            assert_same(list(value.items()), list(other.items()))
        case list() | tuple():
            assert len(value) == len(other)
            for item, other_item in zip(value, other, strict=True):
                assert_same(item, other_item)
        case float() if math.isnan(value):
            assert math.isnan(other)
        case _ if dataclasses.is_dataclass(value):
            for field in (field for field in dataclasses.fields(value) if field.compare):
                assert_same(getattr(value, field.name), getattr(other, field.name))
        case _:
            assert value == other


def public_values():
    """The public classes that have values, by their full name."""
    for name in PUBLIC:
        module, _, attribute = name.rpartition(".")
        cls = getattr(importlib.import_module(module), attribute)
        is_value = inspect.isclass(cls) and not inspect.isabstract(cls) and not getattr(cls, "_is_protocol", False)
        if is_value and attribute not in HOLD_A_MODEL:
            yield name, cls


def every_error():
    """All subclasses of `ArtAugError`, those that a single room raises too."""
    for module in pkgutil.walk_packages(aa.__path__, "artaug."):
        importlib.import_module(module.name)
    pending, found = [aa.ArtAugError], []
    while pending:
        found.append(pending.pop())
        pending += found[-1].__subclasses__()
    return [error for error in found if error.__module__.split(".")[0] == "artaug"]


COPIES = {
    "pickle": lambda value: pickle.loads(pickle.dumps(value)),
    "the first pickle protocol": lambda value: pickle.loads(pickle.dumps(value, protocol=0)),
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
}


@pytest.mark.parametrize("cls", [pytest.param(cls, id=name) for name, cls in public_values()])
def test_a_value_of_a_public_class_arrives_as_it_was(cls):
    value = sample(cls)
    for make_copy in COPIES.values():
        assert_same(value, make_copy(value))


@pytest.mark.parametrize("make_copy", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("cls", every_error())
def test_an_error_arrives_with_its_text_its_attributes_and_its_notes(cls, make_copy):
    error = sample(cls)
    error.add_note("It was the third.")
    assert_same(error, make_copy(error))


def test_a_key_stays_in_copies_and_goes_into_no_pickle():
    key = critics.ApiKey("sk-very-secret")
    assert copy.copy(key) == copy.deepcopy(key) == key
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        pickled = pickle.dumps(key, protocol=protocol)
        assert b"secret" not in pickled
        assert pickle.loads(pickled) != key
        with pytest.raises(aa.InvalidValueError, match="pickled, without its api_key"):
            pickle.loads(pickled).reveal()


def test_an_error_of_a_missing_package_keeps_its_message():
    arrived = pickle.loads(pickle.dumps(aa.MissingExtraError("Prodigy", package="prodigyopt", extra="optimizers")))
    assert arrived.msg == str(arrived)
    assert (arrived.package, arrived.extra) == ("prodigyopt", "optimizers")


def test_an_error_of_a_users_own_class_arrives():
    assert_same(OwnError(1, where="here"), pickle.loads(pickle.dumps(OwnError(1, where="here"))))


class OwnError(aa.HubError):
    """An error with other arguments than its message."""

    def __init__(self, number, *, where):
        super().__init__(f"{number} {where}", status=number)
        self.where = where


def diverge():
    raise aa.TrainingDivergedError(3, float("nan"))


def test_an_error_of_a_worker_reaches_its_parent():
    context = multiprocessing.get_context("fork")
    with (
        ProcessPoolExecutor(1, mp_context=context) as pool,
        pytest.raises(aa.TrainingDivergedError, match="at step 3") as caught,
    ):
        pool.submit(diverge).result(30)
    assert caught.value.step == 3


def compared():
    synthesizer = SwatchSynthesizer()
    return aa.compare(synthesizer, {"same": synthesizer}, ["a pear", "a plum"], scorers=[FixedScorer()], progress=False)


def test_a_comparison_arrives_as_it_was_made():
    comparison = compared()
    assert_same(comparison, pickle.loads(pickle.dumps(comparison)))
    assert_same(comparison, copy.deepcopy(comparison))
