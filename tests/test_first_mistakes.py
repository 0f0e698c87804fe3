"""What people type first is met with the way out: a wrong type is refused at the door, by an error of artaug that names it.

The first law walks over everything public. Whether a value is of an annotation's type is not for us to say: beartype does.
"""

import inspect
import typing
from dataclasses import replace
from enum import Enum
from importlib import import_module
from pathlib import Path

import jaxtyping
import numpy as np
import pytest
import torch
from beartype import BeartypeConf
from beartype.door import is_bearable
from beartype.roar import BeartypeException
from PIL import Image
from tests.test_surface import PACKAGES

import artaug as aa
from artaug import playground
from artaug.critics import OpenAICritic, PhotometricCritic
from artaug.scorers import Chroma

AS_MYPY = BeartypeConf(is_pep484_tower=True)
NOT_DOORS = {
    # What extensions of the drawing itself are given by the library, many times a step: people pass nothing to it.
    *("Attended", "AttentionComputer", "AttentionLayer", "AttentionLayers", "AttentionSite"),
    *(
        "AttentiveDenoiser",
        "Bias",
        "Branches",
        "Denoiser",
        "DenoiserCall",
        "EncodedPrompt",
        "EncodedRegion",
        "GuidedRun",
    ),
    *("LatentStep", "LayerMaps", "Predict", "Span"),
    # As much for training.
    *("EpsilonPrediction", "FlowMatching", "VPrediction", "NoiseSchedule", "LossScale", "LayerWeights", "PairBatch"),
    *("PromptBatch", "Stage", "TrainingState", "TrainingPlan", "CompanionState", "EncodedPlan", "InstalledTokens"),
    "Tokens",  # which takes rows of numbers in several forms, and says itself what it cannot read
    # Families read a pipeline; `DiffusersSynthesizer` finds them.
    *(
        "Family",
        "Chroma1",
        "Flux",
        "Flux2",
        "Flux2Klein",
        "FluxKontext",
        "QwenImage",
        "QwenImageEdit",
        "StableDiffusion",
    ),
    *("StableDiffusion3", "StableDiffusionXL", "ZImage", "TokenizedPrompt", "tokenize_chat", "tokenize_prompt"),
}


@pytest.fixture(autouse=True)
def _as_for_users():
    """Without the checker of annotations that tests run under, which would come first."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


class Stranger:
    """A value of no type that anything takes."""

    def __repr__(self):
        return "Stranger()"


MISTAKES = {
    "another object": Stranger(),
    "a class": Stranger,
    "None": None,
    "a text": "runs/first",
    "texts": ["a", "b"],
    "a fraction": 2.5,
    "an array": np.ones((4, 4)),
    "strangers": [Stranger()],
    "strangers by name": {"a": Stranger()},
}


def doors():
    """Everything public that is called, by name: functions, constructors, and methods of classes."""
    found = {}
    for package in ("artaug", *(f"artaug.{name}" for name in PACKAGES)):
        for name in import_module(package).__all__:
            exported = getattr(import_module(package), name)
            if name in NOT_DOORS or not hasattr(exported, "__module__") or getattr(exported, "_is_protocol", False):
                continue
            if inspect.isfunction(exported) or (
                inspect.isclass(exported)
                and not issubclass(exported, Exception | Enum)
                and not inspect.isabstract(exported)
                and inspect.isfunction(exported.__init__)
            ):
                found[name] = exported
    return found


def parameters(called):
    """Names and types of what a function or a constructor is called with."""
    inner = called.__init__ if inspect.isclass(called) else inspect.unwrap(called)
    names = dict(inspect.unwrap(inner).__globals__)
    for parameter in inspect.signature(called).parameters.values():
        hint = parameter.annotation
        try:
            yield parameter.name, eval(hint, names) if isinstance(hint, str) else hint
        except NameError:  # imported for type checkers alone, from a floor above or a library that is not loaded
            continue


def refused(function, arguments):
    """What an error says of arguments, or nothing."""
    try:
        answer = function(**arguments)
        if inspect.isgenerator(answer):
            next(answer)
    except aa.ArtAugError as error:
        return str(error)
    except TypeError as error:
        if "missing" in str(error):  # the type was fine; others are not there
            return ""
        raise
    return ""


def is_of(value, hint):
    if isinstance(hint, typing.TypeVar):
        hint = hint.__bound__ or object
    try:
        return is_bearable(value, hint, conf=AS_MYPY)
    except BeartypeException:
        return True


LOOP = {
    "prompts": ["a red cone"],
    "synthesizer": playground.synthesizer(guide=aa.RegionalAttention()),
    "critic": PhotometricCritic(),
    "planner": aa.GreedyPlanner(),
    "keep": aa.Gain(Chroma()),
    "seed": 0,
}
LEARNING = {"trainer": aa.DifferentialLoRATrainer(steps=1, batch_size=1), "fuser": aa.ConcatFuser()}
REFINED = {name: LOOP[name] for name in ("synthesizer", "critic", "planner")}
WHOLE = {
    "improve": LOOP,
    "enhance": {**LOOP, **LEARNING},
    "plan_run": {**LOOP, **LEARNING},
    "refine": {"prompt": "a red cone", **REFINED},
    "refine_each": {"prompts": ["a red cone"], **REFINED},
    "grape": {"prompts": ["a red cone"], "synthesizer": LOOP["synthesizer"], "plan_edits": PhotometricCritic()},
    "checklist": {
        "prompts": ["a red cone"],
        "synthesizer": LOOP["synthesizer"],
        "verify": Chroma(),
        "requirements": str.split,
    },
}
"""Of functions that check their arguments together with more than types: all that they need."""

CASES = [
    pytest.param(function, name, hint, id=f"{door}({name})")
    for door, function in doors().items()
    for name, hint in parameters(function)
]


@pytest.mark.parametrize(("function", "name", "hint"), CASES)
def test_a_wrong_type_is_refused_by_an_error_that_names_the_argument_and_what_was_expected(function, name, hint):
    for what, value in MISTAKES.items():
        stands_for = {list: tuple, str: Path}.get(type(value), lambda same: same)  # which a class makes of it
        if is_of(value, hint) or is_of(stands_for(value), hint):
            continue
        said = refused(function, {**WHOLE.get(function.__name__, {}), name: value})
        assert f"{name}" in said, (what, said)
        assert "expected" in said, (what, said)
        assert "pydantic" not in said
        assert "Input should" not in said


# --- what it says ---

PICTURE = Image.new("RGB", (8, 8))
NO_EDIT = aa.LoRA({"x_embedder": aa.LowRank(torch.zeros(1, 64), torch.zeros(128, 1))})
PAIR = aa.ImagePair(prompt="a rose", before=PICTURE, after=PICTURE)
KEPT = aa.Kept(PAIR, aa.Verdict(keep=True, reason="it rose", scores={}))


class OwnScorer(aa.Scorer):
    """As users write them: without annotations."""

    def score(self, image, prompt):
        return 0.5


class OwnSynthesizer(aa.Synthesizer):
    def synthesize(self, plan, *, seed):
        return PICTURE


@pytest.mark.parametrize(
    ("mistake", "words"),
    [
        pytest.param(
            lambda: LOOP["synthesizer"].synthesize("a rose", seed=0), "artaug.Plan('a red cone')", id="a text"
        ),
        pytest.param(
            lambda: OwnSynthesizer().synthesize("a rose", seed=0), "OwnSynthesizer.synthesize(plan=", id="an own one"
        ),
        pytest.param(
            lambda: aa.refine("a rose", **{**REFINED, "critic": PhotometricCritic}),
            "received the class PhotometricCritic. Make one of the class: PhotometricCritic(...).",
            id="a class",
        ),
        pytest.param(lambda: aa.Mask(np.ones((4, 4))), "Mask.from_array", id="an array for a mask"),
        pytest.param(
            lambda: aa.Region(np.ones((4, 4)), "a sky"), "artaug.Mask.from_array(array)", id="an array for an area"
        ),
        pytest.param(
            lambda: aa.ImagePair(prompt="a rose", before=np.zeros((8, 8, 3)), after=PICTURE),
            "PIL.Image.fromarray(array)",
            id="an array for a picture",
        ),
        pytest.param(lambda: OwnScorer().score("a.png", "a rose"), "PIL.Image.open(path)", id="a path for a picture"),
        pytest.param(
            lambda: aa.DifferentialLoRATrainer().train([KEPT], LOOP["synthesizer"], seed=0),
            "attempt.pair",
            id="attempts",
        ),
        pytest.param(
            lambda: aa.calibrate([KEPT], [Chroma()]), "calibrate(pairs[0]=", id="attempts for pairs in another function"
        ),
        pytest.param(lambda: aa.RegionalAttention(loras={"a": "x.safetensors"}), "artaug.LoRA.load(path)", id="a path"),
        pytest.param(
            lambda: aa.DifferentialLoRATrainer(lr=1e-4), "Did you mean learning_rate?", id="a name of sd-scripts"
        ),
        pytest.param(
            lambda: replace(LOOP["synthesizer"], num_inference_steps=4), "Did you mean steps?", id="a name of diffusers"
        ),
        pytest.param(
            lambda: LOOP["synthesizer"].with_lora(NO_EDIT, weight=0.5), "Did you mean scale?", id="a name in a method"
        ),
        pytest.param(lambda: aa.Gain(Chroma(), at_last=0.1), "Did you mean at_least?", id="a name misspelt"),
        pytest.param(
            lambda: OpenAICritic("http://127.0.0.1:8000/v1", "qwen3-vl"),
            "received 2 arguments without a name and takes none. Write OpenAICritic(base_url=..., model=...).",
            id="arguments without names",
        ),
        pytest.param(
            lambda: aa.write_report("a.html", 1, 2), "Write write_report(path=..., result=..., ", id="too many"
        ),
        pytest.param(
            lambda: aa.DifferentialLoRATrainer(targets=["to_q", "to_k"]), "'to_q|to_k'", id="PEFT's target_modules"
        ),
        pytest.param(
            lambda: aa.compare(LOOP["synthesizer"], {"a": NO_EDIT}, ["a", "b"], scorers=[Chroma()]),
            "synthesizer.with_lora(lora)",
            id="a LoRA for a synthesizer",
        ),
        pytest.param(lambda: aa.Gain(Chroma()) & (lambda _: True), "artaug.Gain(scorer", id="a function for a filter"),
        pytest.param(
            lambda: aa.compare(LOOP["synthesizer"], {}, "a rose", scorers=[Chroma()]), "['a rose']", id="one prompt"
        ),
        pytest.param(lambda: aa.AdamW(betas=0.9), "AdamW(betas=0.9): expected two numbers", id="one number for two"),
        pytest.param(
            lambda: playground.prompts(4.0, seed=0), "expected a whole number, received a float. Write 4.", id="4.0"
        ),
        pytest.param(
            lambda: aa.Plan(prompt="a rose", region=()), "Did you mean regions?", id="a name that is nearly right"
        ),
        pytest.param(
            lambda: aa.Box(0, 0, 1), "Box() lacks bottom: expected Box(left, top, right, bottom).", id="too few"
        ),
        pytest.param(
            lambda: aa.Region(aa.Box(0, 0, 1, 1), "a sky", weight=-1), "expected a number greater than 0", id="a range"
        ),
        pytest.param(lambda: aa.Preferred(Chroma()), "artaug.PairwiseJudge", id="a scorer for a judge"),
        pytest.param(lambda: aa.write_report(PICTURE), "write_report(path=", id="arguments in another order"),
        pytest.param(lambda: aa.LoRA.load(3), "LoRA.load(path=3): expected a path", id="a number for a path"),
        pytest.param(
            lambda: aa.Together([aa.OutputMix]),
            "Together(guides[0]=<class 'artaug.OutputMix'>)",
            id="a class in a list",
        ),
    ],
)
def test_a_first_mistake_is_met_with_the_way_out(mistake, words):
    with pytest.raises(aa.InvalidValueError) as caught:
        mistake()
    assert words in str(caught.value)


def test_a_method_of_a_users_class_may_allow_more_than_the_seam():
    class Wider(aa.Scorer):
        def score(self, image: Image.Image | str, prompt: str) -> float:
            return 1.0

    assert Wider().score("a.png", "a rose") == 1.0
    with pytest.raises(aa.InvalidValueError, match="prompt=None"):
        Wider().score("a.png", None)


def test_a_class_that_was_written_in_no_module_is_a_users():
    names = {"aa": aa}
    exec("class Plain(aa.Scorer):\n    def score(self, image, prompt):\n        return 1.0", names)
    assert names["Plain"]().score(Image.new("RGB", (8, 8)), "a rose") == 1.0


def test_all_wrong_types_of_a_call_are_listed_at_once():
    with pytest.raises(aa.InvalidValueError, match="2 things are wrong") as caught:
        aa.Gain("chroma", at_least="a lot")
    assert all(name in str(caught.value) for name in ("scorer", "at_least"))


def test_numbers_of_numpy_and_lists_in_the_place_of_tuples_are_taken():
    assert aa.Gain(Chroma(), at_least=np.float32(0.5)).at_least == 0.5
    assert aa.AdamW(betas=[0.9, 0.99]).betas[1] == 0.99
