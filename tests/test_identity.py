"""What an object is in words: stable over processes, complete, refused where nothing says what it is, and never a secret."""

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import artaug as aa
from artaug.critics import Cached, OpenAICritic, PhotometricCritic, Retried
from artaug.diffusion import DiffusersSynthesizer
from artaug.identity import identity_of
from artaug.lora.lora import LowRank
from artaug.scorers import Chroma
from support.tiny_flux import TINY_SIZE, tiny_flux

LIMIT = 0.5
SECRET = "s3cr3t-value-0123456789"


class Plain:
    def __init__(self, threshold, _calls=0):
        self.threshold = threshold
        self._calls = _calls


class Slotted(aa.Critic):
    __slots__ = ("threshold",)

    def __init__(self, threshold):
        self.threshold = threshold

    def critique(self, image, prompt):
        raise AssertionError


@dataclass(frozen=True)
class Frozen:
    threshold: float
    folder: str = field(default="here", repr=False)


@dataclass(frozen=True, slots=True)
class FrozenSlots:
    threshold: float


class Spoken:
    def __init__(self, threshold):
        self._threshold = threshold

    def __repr__(self):
        return f"Spoken({self._threshold})"


class OnlyHidden:
    def __init__(self):
        self._threshold = 0.5


class Stated:
    def __init__(self, threshold):
        self.identity = f"stated {threshold}"
        self.lock = object()


class StatedByParts:
    def __init__(self, threshold):
        self.identity = {"threshold": threshold}


class Learned(torch.nn.Module):
    def __init__(self, threshold, large=0.0):
        super().__init__()
        self.threshold = threshold
        self.layer = torch.nn.Linear(100, 100)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.zero_()
            self.layer.weight += large


class OfModel:
    def __init__(self, large):
        self._model = Learned(0.5, large)


@dataclass
class HiddenModel:
    model: torch.nn.Module = field(repr=False)


class Recursive:
    def __init__(self, threshold):
        self.threshold = threshold
        self.parts = [self, {"again": self}]


def closure(threshold):
    def over(_image, _prompt):
        return threshold

    return over


def by_default(threshold):
    return lambda _image, _prompt, least=threshold: least


def by_keyword(threshold):
    def function(_image, _prompt, *, least=threshold):
        return least

    return function


def reads_a_global(_image, prompt):
    return LIMIT + len({"the", "order", "of", "a", "set", "differs"} & {prompt}) * (prompt in {"a", "b", "c", "d"})


def cached_function(threshold):
    return cache(closure(threshold))


def nested(threshold):
    return {"a": [Plain(Frozen(Spoken(threshold)))], 3: (Plain(closure(Frozen(threshold))),)}


def deep(threshold):
    value = Frozen(threshold)
    for _ in range(20):
        value = Plain(value)
    return value


MAKERS = [
    *(
        Plain,
        Slotted,
        Frozen,
        FrozenSlots,
        Spoken,
        Stated,
        StatedByParts,
        Learned,
        Recursive,
        closure,
        by_default,
        by_keyword,
    ),
    *(cached_function, nested, deep, lambda t: partial(closure, t), lambda t: partial(closure, threshold=t)),
    *(
        lambda t: Plain(t).__eq__,
        lambda t: [t].index,
        lambda t: {Frozen(t)},
        lambda t: {"x": t},
        lambda t: (Plain(t), "x"),
    ),
    *(lambda t: np.full(5000, t), lambda t: torch.full((5000,), t), lambda t: np.array([Plain(t)])),
    lambda t: re.compile("a" * 400 + str(t)),
    lambda t: Image.new("RGB", (4, 4), (int(t * 100), 0, 0)),
    *(OfModel, lambda t: HiddenModel(Learned(0.5, t)), lambda t: f"{t}", lambda t: Path(str(t))),
    *(lambda t: str(t).encode(), lambda t: [str(t)] * 200),
]
"""Each makes an object of a number."""


def identities():
    objects = [make(threshold) for make in MAKERS for threshold in (0.25, 0.75)] + [reads_a_global, Chroma(), np, int]
    return [identity_of(value, "part") for value in objects]


@pytest.mark.parametrize("number", range(len(MAKERS)))
def test_what_differs_has_another_identity_and_what_does_not_the_same(number):
    make = MAKERS[number]
    assert identity_of(make(0.25), "part") == identity_of(make(0.25), "part")
    assert identity_of(make(0.25), "part") != identity_of(make(0.75), "part")


def test_an_identity_is_the_same_in_every_process():
    script = "import json; from tests.test_identity import identities; print(json.dumps(identities()))"
    path = os.pathsep.join([str(Path(__file__).parents[1]), str(Path(__file__).parent), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": "7"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    here = [{name: text.replace(__name__, "M") for name, text in items.items()} for items in identities()]
    there = [
        {name: text.replace("tests.test_identity", "M") for name, text in items.items()}
        for items in json.loads(done.stdout)
    ]
    assert there == here


def test_a_value_that_a_closure_encloses_and_a_global_number_count(monkeypatch):
    before = identity_of(reads_a_global, "f")
    monkeypatch.setitem(globals(), "LIMIT", 0.75)
    assert identity_of(reads_a_global, "f") == {**before, "f.LIMIT": "0.75"}
    values = [1]

    def over(_image, _prompt):
        return values

    before = identity_of(Plain(over), "scorer")
    values.append(2)
    assert identity_of(Plain(over), "scorer") != before


@pytest.mark.parametrize(
    "make",
    [
        lambda: Plain(object()),
        lambda: {"a": [object()]},
        lambda: {object()},
        torch.Generator,
        lambda: (number for number in [1]),
        lambda: closure(object()),
        OnlyHidden,
    ],
    ids=["object", "in_a_list", "in_a_set", "generator", "iterator", "in_a_closure", "only_hidden"],
)
def test_what_nothing_distinguishes_is_refused_by_name_with_what_to_do(make):
    with pytest.raises(aa.InvalidValueError, match=r"(?s)^critic\S*: this .* cannot be .*identity='...'"):
        identity_of(make(), "critic")


def test_what_is_nested_without_end_is_refused():
    class Endless:
        @property
        def identity(self):
            return {"next": Endless()}

    with pytest.raises(aa.InvalidValueError, match="more than 40 objects deep"):
        identity_of(Endless(), "critic")


def test_objects_that_contain_themselves_are_described_once():
    assert identity_of(Recursive(1), "part")["part.parts.0"] == "the same as part"


def test_a_text_is_no_number_and_none_is_no_text():
    assert len({identity_of(value, "part")["part"] for value in ("0.5", 0.5, None, "None", b"0.5", True, "True")}) == 7


def test_a_text_that_looks_like_an_address_is_a_text():
    assert identity_of(Plain("a house at 0x12"), "part")


# Secrets -----------------------------------------------------------------------------------------

NAMES = st.sampled_from(
    [
        *(
            "api_key",
            "apiKey",
            "X-Api-Key",
            "OPENAI_API_KEY",
            "token",
            "hf_token",
            "accessToken",
            "password",
            "api_tokens",
        ),
        *("client_secret", "Authorization", "auth", "cookie", "credentials", "keys", "db.password"),
    ]
)
HOLDERS = st.sampled_from(
    [
        lambda name: Plain({name: SECRET}),
        lambda name: partial(closure, **{name: SECRET}),
        lambda name: {"headers": {name: [SECRET, "x"]}},
        lambda name: type("Holder", (), {"__init__": lambda self: setattr(self, name, SECRET)})(),
        lambda name: closure({name: SECRET}),
        lambda name: Stated(f"{{'{name}': '{SECRET}'}}"),
        lambda name: [f"{name}={SECRET}"],
    ]
)


@given(NAMES, HOLDERS)
def test_what_is_called_a_secret_is_nowhere(name, holder):
    assert SECRET not in str(identity_of(holder(name), "critic"))


@pytest.mark.parametrize(
    "text",
    [
        f"https://me:{SECRET}@host/v1",
        f"https://host/v1?x=1&api_key={SECRET}",
        f"Bearer {SECRET}",
        f"hf_{SECRET}",
        f"sk-proj-{SECRET}",
        f"Authorization: {SECRET}",
    ],
)
def test_a_text_with_a_secret_is_hidden_and_another_secret_changes_nothing(text):
    shown = identity_of(Plain(text), "critic")
    assert SECRET not in str(shown)
    assert shown == identity_of(Plain(text.replace(SECRET, "another0123456789")), "critic")
    long = identity_of(Plain("x " * 200 + text), "critic")
    assert long == identity_of(Plain("x " * 200 + text.replace(SECRET, "another0123456789")), "critic")


def test_the_environment_and_its_keys_are_hidden_wherever_they_stand(monkeypatch):
    monkeypatch.setenv("SOME_SERVICE_KEY", SECRET)
    monkeypatch.setenv("HARMLESS", "nothing-that-counts")
    shown = str(
        [identity_of(value, "critic") for value in (Plain(os.environ), Plain(f"my {SECRET} here"), dict(os.environ))]
    )
    assert SECRET not in shown
    assert "nothing-that-counts" not in str(identity_of(Plain(os.environ), "critic"))


def test_settings_that_only_sound_like_secrets_count():
    for name in ("max_tokens", "key_format", "n_keys_per_head"):
        assert identity_of({name: "a"}, "part") != identity_of({name: "b"}, "part")
    assert identity_of({"key": len}, "part") != identity_of({"key": max}, "part")


# Parts that come with the package ----------------------------------------------------------------


def test_what_a_critic_waits_for_and_where_it_keeps_answers_does_not_count(tmp_path):
    server = OpenAICritic(base_url="http://localhost/v1", model="qwen2-vl", api_key="abcdefghijk")
    other = replace(server, api_key="lmnopqrstuv", concurrency=2, timeout_s=1.0, retry_deadline_s=3.0)
    critics = [
        Cached(Retried(server), folder=tmp_path),
        Cached(Retried(other, retry_deadline_s=1), folder=tmp_path / "b"),
    ]
    first, second = (identity_of(critic, "critic") for critic in critics)
    assert first == second
    for change in ({"model": "qwen3-vl"}, {"temperature": 0.5}, {"extra_body": {"top_p": 0.5}}, {"max_side_px": 640}):
        assert identity_of(replace(server, **change), "critic") != identity_of(server, "critic")


@pytest.fixture(scope="module")
def pipeline():
    return tiny_flux()


def synthesizer_of(pipeline, **options):
    return DiffusersSynthesizer(
        **{
            "pipeline": pipeline,
            "width": TINY_SIZE,
            "height": TINY_SIZE,
            "steps": 2,
            "max_sequence_length": 32,
            **options,
        }
    )


def test_every_setting_and_part_of_a_synthesizer_counts_by_name(pipeline):
    before = identity_of(synthesizer_of(pipeline), "synthesizer")
    changes = {
        "steps": {"steps": 3},
        "width": {"width": 2 * TINY_SIZE},
        "guide": {"guide": aa.OutputMix()},
        "true_cfg_scale": {"true_cfg_scale": 2.0, "negative_prompt": "grey"},
        "max_sequence_length": {"max_sequence_length": 16},
    }
    for name, change in changes.items():
        now = identity_of(synthesizer_of(pipeline, **change), "synthesizer")
        differing = {key for key in {*now, *before} if now.get(key) != before.get(key)}
        assert f"synthesizer.{name}" in differing
        assert all(key.split(".")[1] in {name, "negative_prompt"} for key in differing)
    lora, other = (aa.LoRA({"layer": LowRank(torch.full((1, 3), x), torch.ones(4, 1))}) for x in (0.25, 0.75))
    guides = [
        aa.OutputMix(),
        aa.RegionalAttention(),
        aa.RegionalAttention(loras={"red": lora}),
        aa.RegionalAttention(loras={"red": other}),
    ]
    texts = [str(identity_of(synthesizer_of(pipeline, guide=guide), "s")) for guide in guides]
    assert len(set(texts)) == len(guides)


@pytest.mark.parametrize("part", ["vae", "text_encoder", "text_encoder_2", "transformer"])
def test_a_change_of_large_weights_alone_is_seen(pipeline, part):
    synthesizer = synthesizer_of(pipeline)
    before = identity_of(synthesizer, "synthesizer")
    largest = max(getattr(pipeline, part).parameters(), key=torch.Tensor.numel)
    with torch.no_grad():
        largest.add_(1e-3)
        now = identity_of(synthesizer, "synthesizer")
        largest.sub_(1e-3)
    assert {key for key in now if now[key] != before[key]} == {f"synthesizer.components.{part}"}


def test_scheduler_dtype_and_the_config_of_a_vae_count():
    pipeline = tiny_flux()
    before = identity_of(synthesizer_of(pipeline), "s")
    pipeline.scheduler.register_to_config(shift=1.0)
    pipeline.vae.register_to_config(scaling_factor=0.5)
    pipeline.text_encoder.to(torch.bfloat16)
    now = identity_of(synthesizer_of(pipeline), "s")
    assert {key for key in now if now[key] != before[key]} == {
        *("s.scheduler.shift", "s.configs.vae.scaling_factor", "s.dtypes.text_encoder", "s.components.text_encoder")
    }


def test_of_a_photometric_critic_all_fields_count():
    assert identity_of(PhotometricCritic(), "critic") != {}
