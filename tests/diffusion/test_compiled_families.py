"""Every family's regional processors inside compiled models: whole graphs, and the pictures of the plain model."""

import logging

import jaxtyping
import numpy as np
import pytest
import torch

import artaug as aa
from artaug.diffusion import DiffusersSynthesizer
from support.tiny_chroma import tiny_chroma
from support.tiny_flux2 import tiny_flux2
from support.tiny_qwen_image import tiny_qwen_image
from support.tiny_sd3 import tiny_sd3
from support.tiny_unet import tiny_sd15
from support.tiny_z_image import tiny_z_image

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's compiler warns of torch, and takes an error for a fault


@pytest.fixture(autouse=True)
def _nothing_compiled(caplog):
    caplog.set_level(logging.WARNING, logger="torch.__trace")  # whose records would take longer than compiling
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()  # noqa: SLF001 - which a reset leaves as they are
    jaxtyping.config.update("jaxtyping_disable", True)  # the checks of types would be compiled, too
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
    torch.compiler.reset()


def compile_blocks(module, **options):
    module.compile_repeated_blocks(**options)


def compile_whole(module, **options):
    module.compile(**options)


@pytest.mark.parametrize(
    ("make", "part", "way"),
    [
        (tiny_flux2, "transformer", compile_blocks),
        (tiny_qwen_image, "transformer", compile_blocks),
        (tiny_sd3, "transformer", compile_whole),  # diffusers names no blocks of it that repeat
        (tiny_sd15, "unet", compile_blocks),
    ],
)
def test_families_draw_regions_in_whole_graphs(make, part, way):
    draw_both_ways(make, part, way, fullgraph=True)
    assert not torch._dynamo.utils.counters["graph_break"]  # noqa: SLF001 - the compiler's own count


# Their processors make functions and processors as they run, and the checks of types, which then begin anew, break graphs.
@pytest.mark.parametrize("make", [tiny_chroma, tiny_z_image])
def test_families_whose_processors_make_others_draw_regions_compiled(make):
    draw_both_ways(make, "transformer", compile_blocks, fullgraph=False)


def draw_both_ways(make, part, way, *, fullgraph):
    """Draw compiled and as written, and compare."""
    plan = aa.Plan("a red cone", (aa.Region(aa.Box(0, 0, 0.5, 1), "a blue ball at night"),))
    pictures = []
    for is_compiled in (False, True):
        pipeline = make()
        if is_compiled:
            way(getattr(pipeline, part), backend="eager", fullgraph=fullgraph)
        synthesizer = DiffusersSynthesizer(
            pipeline=pipeline, guide=aa.RegionalAttention(), width=32, height=32, steps=1, max_sequence_length=64
        )
        pictures.append(np.asarray(synthesizer.synthesize(plan, seed=1)).astype(int))
    assert np.abs(pictures[0] - pictures[1]).max() <= 1
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0  # noqa: SLF001 - the compiler's own count
