"""Every way of computing regional attention against the definition: a dense mask."""

import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.attention.flex_attention as flex_attention_of_torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import artaug as aa
from artaug.regional.attention import attention_in_passes, attention_with_sums, dense_attention
from artaug.regional.attention_mask import cross_sight, joint_sight, text_sight
from artaug.regional.denoiser import Span
from artaug.regional.flex import FlexSight, attention_by_flex
from artaug.regional.region_weights import divided
from artaug.regional.split_plan import passes
from support.layouts import layouts, tokens

CPU = torch.device("cpu")


def defined(query, key, value, sight):
    """The definition in five lines: a softmax with weights, term by term, in double precision."""
    scores = (query.double() @ key.double().mT) / query.shape[-1] ** 0.5
    weights = sight.weights.double()[:, sight.groups]
    shares = (scores - scores.amax(dim=-1, keepdim=True)).exp() * weights
    return (shares / shares.sum(dim=-1, keepdim=True)) @ value.double()


def asked(sight, *, seed=0, batch=1):
    queries, keys = len(sight.weights), len(sight.groups)
    return (
        tokens(queries, seed=seed, batch=batch),
        tokens(keys, seed=seed + 1, batch=batch),
        tokens(keys, seed=seed + 2),
    )


def everyway(sight, query, key, value):
    """Attention under a sight by every path there is."""
    ways = {how: attention_in_passes(query, key, value, passes(sight, how)) for how in ("auto", "merged")}
    if sight.is_hard:
        ways["grouped"] = attention_in_passes(query, key, value, passes(sight, "grouped"))
    ways["dense"] = dense_attention(query, key, value, sight.bias)
    return ways


@settings(max_examples=150)
@given(layout=layouts(), batch=st.integers(1, 3), seed=st.integers(0, 99))
def test_every_path_is_the_definition(layout, batch, seed):
    query, key, _ = asked(layout.sight, seed=seed, batch=batch)
    value = tokens(len(layout.sight.groups), seed=seed + 2, batch=batch)
    wanted = defined(query, key, value, layout.sight)
    for way, result in everyway(layout.sight, query, key, value).items():
        torch.testing.assert_close(result.double(), wanted, atol=1e-5, rtol=0, msg=way)


@settings(max_examples=60)
@given(layout=layouts(hard=True))
def test_hard_layouts_are_hard_and_every_path_is_the_definition(layout):
    assert layout.sight.is_hard
    query, key, value = asked(layout.sight)
    wanted = defined(query, key, value, layout.sight)
    ways = everyway(layout.sight, query, key, value)
    assert "grouped" in ways
    for way, result in ways.items():
        torch.testing.assert_close(result.double(), wanted, atol=1e-5, rtol=0, msg=way)


@settings(max_examples=40)
@given(layout=layouts(most=5))
def test_gradients_are_those_of_the_definition(layout):
    given_ = [one.requires_grad_() for one in asked(layout.sight)]
    slope = tokens(len(layout.sight.weights), seed=9)
    wanted = torch.autograd.grad(defined(*given_, layout.sight), given_, slope.double())
    for way, result in everyway(layout.sight, *given_).items():
        for one, other in zip(torch.autograd.grad(result, given_, slope), wanted, strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4, msg=way)


@pytest.fixture
def _uncompiled(monkeypatch):
    """Run FlexAttention's definition as it stands: compiling it anew for every layout drawn would take minutes."""
    monkeypatch.setattr(flex_attention_of_torch, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)


@pytest.mark.usefixtures("_uncompiled")
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(layout=layouts(most=6))
def test_flex_attention_is_the_definition(layout):
    query, key, value = asked(layout.sight)
    result = attention_by_flex(query, key, value, FlexSight.of(layout.sight, CPU), compiled=False)
    torch.testing.assert_close(result.double(), defined(query, key, value, layout.sight), atol=1e-5, rtol=0)


@given(layout=layouts(most=6))
def test_cross_attention_and_attention_among_prompts_are_the_definition(layout):
    for sight in (
        cross_sight(layout.spans, layout.shares, layout.isolation),
        cross_sight(layout.spans, layout.shares, None),
        text_sight(layout.spans, layout.isolation),
    ):
        query, key, value = asked(sight)
        for way, result in everyway(sight, query, key, value).items():
            torch.testing.assert_close(result.double(), defined(query, key, value, sight), atol=1e-5, rtol=0, msg=way)


@given(layout=layouts(most=5))
def test_half_precision_stays_near_the_definition(layout):
    query, key, value = (one.bfloat16() for one in asked(layout.sight))
    wanted = defined(query, key, value, layout.sight)
    result = attention_in_passes(query, key, value, passes(layout.sight))
    assert result.dtype == torch.bfloat16
    torch.testing.assert_close(result.double(), wanted, atol=5e-2, rtol=0)


def test_the_sums_are_the_logarithms_of_the_softmax_denominators():
    query, key, value = tokens(5), tokens(7, seed=1), tokens(7, seed=2)
    _, sums = attention_with_sums(query, key, value)
    torch.testing.assert_close(sums, (query @ key.mT / 8**0.5).logsumexp(dim=-1))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@given(layout=layouts(most=4))
def test_cuda_merges_to_the_definition(dtype, layout):
    query, key, value = (one.cuda().to(dtype) for one in asked(layout.sight))
    planned = tuple(one.on(query.device) for one in passes(layout.sight, "merged"))
    wanted = defined(query.cpu(), key.cpu(), value.cpu(), layout.sight)
    tolerance = 1e-5 if dtype == torch.float32 else 5e-2
    result = attention_in_passes(query, key, value, planned)
    torch.testing.assert_close(result.cpu().double(), wanted, atol=tolerance, rtol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_compiles_flex_to_the_definition(dtype):
    regions = (aa.Region(aa.Box(0, 0, 0.5, 0.5), "a"), aa.Region(aa.Box(0.4, 0.4, 1, 1), "b", feather=0.1))
    spans = (Span("text", 9, 1), Span("text", 7, 2), Span("text", 16, 0), Span("image", 256))
    sight = joint_sight(spans, divided(regions, (16, 16), base_weight=0.3), aa.Isolation(base_weight=0.3))
    query, key, value = torch.randn(3, 1, 2, len(sight.groups), 16, device="cuda", dtype=dtype)
    result = attention_by_flex(query, key, value, FlexSight.of(sight, query.device), compiled=True)
    wanted = defined(query.cpu(), key.cpu(), value.cpu(), sight)
    tolerance = 1e-5 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(result.cpu().double(), wanted, atol=tolerance, rtol=0)


LAYOUTS_OF_ABOUT_ONE_LENGTH = """
import torch
import artaug as aa
from artaug.regional.attention import dense_attention
from artaug.regional.denoiser import Span
from artaug.regional.flex import FlexSight, attention_by_flex
from artaug.regional.region_weights import divided
from artaug.regional.attention_mask import joint_sight

for number, (box, length) in enumerate([((0, 0, 0.5, 0.5), 9), ((0, 0, 0.25, 0.75), 20), ((0.1, 0.1, 0.9, 1), 3)]):
    regions = (aa.Region(aa.Box(*box), "a"), aa.Region(aa.Box(0.5, 0.5, 1, 1), "b"))
    spans = (Span("text", length, 1), Span("text", 7, 2), Span("text", 16, 0), Span("image", 256))
    sight = joint_sight(spans, divided(regions, (16, 16), base_weight=0.3), aa.Isolation(base_weight=0.3))
    query, key, value = torch.randn(3, 1, 2, len(sight.groups), 16)
    with torch._dynamo.config.patch(error_on_recompile=number > 0), torch.no_grad():
        result = attention_by_flex(query, key, value, FlexSight.of(sight, query.device), compiled=True)
    torch.testing.assert_close(result, dense_attention(query, key, value, sight.bias), atol=1e-5, rtol=0)
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on the CPU")
def test_another_layout_and_other_prompts_of_about_the_same_length_run_the_same_kernel():
    # In a process of its own, since the checks of types that run with the tests would be compiled, too.
    done = subprocess.run(
        [sys.executable, "-c", LAYOUTS_OF_ABOUT_ONE_LENGTH], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
