"""Regional attention in compiled models: one operator in the graphs, the same pictures and gradients, and no further graphs."""

import gc
import logging
from contextlib import ExitStack

import jaxtyping
import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import artaug as aa
from artaug.regional import compiled_attention
from artaug.regional.compiled_attention import SteeredAttention
from artaug.regional.guided_call import CurrentCall, GuidedRow
from support.guided_flux import FULL, ISOLATED, LEFT, PROMPT, RIGHT, GuidedStep, draw
from support.guiding import under
from support.tiny_flux import tiny_flux

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's compiler warns of torch, and takes an error for a fault
PLAIN = aa.Plan(PROMPT)
LAYOUTS = [
    aa.Plan(PROMPT, (aa.Region(LEFT, "a blue door"),)),
    aa.Plan(PROMPT, (aa.Region(aa.Box(0.1, 0.2, 0.55, 0.9), "a lake", weight=2.0), aa.Region(RIGHT, "ivy"))),
    aa.Plan(PROMPT, (aa.Region(RIGHT, "a hill", feather=0.1), aa.Region(LEFT, "a door"), aa.Region(FULL, "ice"))),
]


@pytest.fixture(autouse=True)
def _nothing_compiled(caplog):
    caplog.set_level(logging.WARNING, logger="torch.__trace")  # whose records would take longer than compiling
    torch.compiler.reset()  # eight graphs of a function are torch's limit
    jaxtyping.config.update("jaxtyping_disable", True)  # the checks of types would be compiled, too
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
    torch.compiler.reset()


class Backend:
    """A backend of the compiler that runs graphs as they are, and keeps them."""

    def __init__(self):
        self.graphs = []

    def __call__(self, graph, _inputs):
        self.graphs.append(graph)
        return graph.forward

    @property
    def regional(self):
        """How many graphs attend to regions."""
        operator = torch.ops.artaug.regional_attention.default
        return sum(any(_is_call_of(operator, node) for node in graph.graph.nodes) for graph in self.graphs)


def _is_call_of(operator, node):
    return getattr(node.target, "_opoverload", node.target) is operator


def compile_blocks(pipeline, **options):
    pipeline.transformer.compile_repeated_blocks(fullgraph=True, **options)


def compile_in_place(pipeline, **options):
    pipeline.transformer.compile(fullgraph=True, **options)


def compile_by_wrapping(pipeline, **options):
    pipeline.transformer = torch.compile(pipeline.transformer, fullgraph=True, **options)


@pytest.fixture(scope="module")
def reference():
    return tiny_flux()


@pytest.fixture(scope="module")
def in_blocks():
    """A pipeline whose blocks are compiled."""
    pipeline = tiny_flux()
    compile_blocks(pipeline, backend="eager")
    return pipeline


@pytest.mark.parametrize("way", [compile_blocks, compile_in_place, compile_by_wrapping])
def test_a_compiled_model_draws_every_layout_in_the_graphs_of_the_first(way, reference):
    backend, pipeline = Backend(), tiny_flux()
    way(pipeline, backend=backend)
    graphs = []
    for plan in (PLAIN, *LAYOUTS, PLAIN):
        expected = draw(reference, plan, aa.RegionalAttention(), steps=1)
        assert np.abs(draw(pipeline, plan, aa.RegionalAttention(), steps=1) - expected).max() <= 1
        graphs.append((backend.regional, len(backend.graphs)))
    # With blocks compiled the first single block has graphs of its own: its inputs lie otherwise in memory.
    kinds = 3 if way is compile_blocks else 1
    assert graphs[0] == (0, kinds)
    assert graphs[1:] == [(kinds, 2 * kinds)] * 4


def test_splits_that_are_merged_in_compiled_blocks_predict_what_the_dense_mask_predicts(in_blocks, reference):
    regions = [[aa.Region(LEFT, "a blue door"), aa.Region(RIGHT, "ivy")], []]
    pipelines = in_blocks, reference
    with torch.no_grad():
        results = [
            GuidedStep(
                pipeline,
                regions,
                prompts=(PROMPT, "a lake"),
                guide=aa.RegionalAttention(isolation=ISOLATED, method=name),
            )
            for pipeline, name in zip(pipelines, ("merged", "dense"), strict=True)
        ]
    torch.testing.assert_close(results[0].prediction, results[1].prediction, atol=1e-5, rtol=1e-5)


def gradient(pipeline, *, checkpointing):
    """Of a guided call that is followed, before its backward pass, by one in which no region counts."""
    transformer = pipeline.transformer
    if checkpointing:
        transformer.enable_gradient_checkpointing()
    transformer.train(checkpointing)
    guide = aa.RegionalAttention(isolation=aa.Isolation(sigma_range=(0.5, 1.0)))
    step = GuidedStep(pipeline, [[]])
    with under(guide, step.flux.denoiser(step.conditioning), [step.encode([aa.Region(LEFT, "ivy")])]):
        loss = step.predict().square().sum()
        if not checkpointing:  # which computes layers again, as in the last call
            step.sigma = 0.3
            step.predict()
        (result,) = torch.autograd.grad(loss, [transformer.single_transformer_blocks[0].attn.to_q.weight])
    transformer.disable_gradient_checkpointing()
    transformer.eval()
    return result


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_through_compiled_blocks_are_those_of_the_plain_model(checkpointing, in_blocks, reference):
    gradients = [gradient(pipeline, checkpointing=checkpointing) for pipeline in (in_blocks, reference)]
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-5)
    assert gradients[1].abs().max() > 0


def test_a_backward_pass_after_the_run_of_a_compiled_model_is_an_error(in_blocks):
    step = GuidedStep(in_blocks, [[aa.Region(LEFT, "ivy")]])
    gc.collect()
    with pytest.raises(aa.GuideError, match="a guided run has ended"):
        step.prediction.sum().backward()


def test_runs_at_once_on_two_compiled_models_do_not_mix(in_blocks):
    other = tiny_flux(seed=1)
    compile_blocks(other, backend="eager")
    pipelines = in_blocks, other
    regions = [[aa.Region(LEFT, "a blue door")]], [[aa.Region(RIGHT, "ivy"), aa.Region(LEFT, "ice", weight=0.5)]]
    alone = [GuidedStep(pipeline, layout) for pipeline, layout in zip(pipelines, regions, strict=True)]
    with ExitStack() as runs:
        for step, layout in zip(alone, regions, strict=True):
            denoiser = step.flux.denoiser(step.conditioning)
            runs.enter_context(under(aa.RegionalAttention(), denoiser, [step.encode(layout[0])]))
        for step in (*alone, *alone):
            torch.testing.assert_close(step.predict(), step.prediction)


def test_nothing_of_a_run_stays_with_a_compiled_model(in_blocks):
    draw(in_blocks, LAYOUTS[0], aa.RegionalAttention())
    gc.collect()
    assert not compiled_attention._LAYERS  # noqa: SLF001 - what compiled code may have kept alive


@pytest.mark.parametrize("needs_grad", [False, True])
def test_the_operator_is_what_torch_expects_of_one(needs_grad):
    # opcheck compares the operator with what is registered for it: shapes and strides, gradients, tracing.
    query, key, value = (torch.randn(1, 2, tokens, 4, requires_grad=needs_grad) for tokens in (5, 7, 7))
    current = CurrentCall()
    attention = SteeredAttention(scaled_dot_product_attention, current)
    arguments = (query, key, value, attention.number, current.number)
    torch.library.opcheck(torch.ops.artaug.regional_attention.default, arguments)


def test_a_number_stands_for_one_call_and_an_earlier_call_is_left_as_it_was_found():
    region = aa.Region(LEFT, "ivy")
    first, second = (GuidedRow((), (region,), ()),), (GuidedRow((), (), (region,)),)
    current = CurrentCall()
    numbers = []
    for rows in (first, second, first):
        current.begin(rows)
        numbers.append(current.number)
    assert numbers[0] == numbers[2] != numbers[1]
    current.begin(second)
    with current.back_at(numbers[0]):
        assert current.value.rows is first
    assert current.value.rows is second
