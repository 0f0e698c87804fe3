"""Threads that share a pipeline, or a part of one, take turns; a hook of a drawing begins no other."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import artaug as aa
from artaug.diffusion import DiffusersSynthesizer
from artaug.diffusion.locking import exclusive_drawing, exclusive_use
from support.tiny_flux import TINY_SIZE, tiny_flux
from support.traces import hooks_of

BARN = aa.Plan("a red barn")
DOOR = aa.Plan("a red barn", (aa.Region(aa.Box(0, 0, 0.5, 1), "a blue door"),))
TIMEOUT_S = 60


def synthesizer_of(pipeline, **options):
    return DiffusersSynthesizer(pipeline=pipeline, width=TINY_SIZE, height=TINY_SIZE, steps=2, **options)


@pytest.fixture
def synthesizer():
    return synthesizer_of(tiny_flux(), guide=aa.RegionalAttention())


def strong_lora(module):
    layer = module.get_submodule("transformer_blocks.0.attn.to_q")
    return aa.LoRA(
        {
            "transformer_blocks.0.attn.to_q": aa.LowRank(
                torch.ones(1, layer.in_features), torch.ones(layer.out_features, 1)
            )
        }
    )


def test_threads_on_one_pipeline_draw_what_each_draws_alone(synthesizer):
    enhanced = synthesizer.with_lora(strong_lora(synthesizer.pipeline.transformer))
    other = synthesizer_of(type(synthesizer.pipeline)(**synthesizer.pipeline.components))  # shares every part
    works = [(synthesizer, BARN), (synthesizer, DOOR), (enhanced, BARN), (other, BARN)] * 3
    expected = [each.synthesize(plan, seed=1).tobytes() for each, plan in works]
    assert len(set(expected)) == 3
    with ThreadPoolExecutor(4) as pool:
        drawn = list(pool.map(lambda work: work[0].synthesize(work[1], seed=1).tobytes(), works))
    assert drawn == expected


def in_another_thread(function):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result(timeout=TIMEOUT_S)


def begin_in_a_thread(begin):
    """Whether ``begin`` waits in another thread, and a function that says whether it has ended when nothing holds it."""
    begun = threading.Event()

    def work():
        begin()
        begun.set()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    waited = not begun.wait(0.3)
    return waited, lambda: (thread.join(TIMEOUT_S), begun.is_set())[1]


def test_a_drawing_waits_until_another_threads_training_has_ended(synthesizer):
    with synthesizer.training():
        waited, ended = begin_in_a_thread(lambda: synthesizer.synthesize(BARN, seed=0))
    assert waited
    assert ended()


def test_a_training_waits_until_another_threads_drawing_has_ended(synthesizer):
    def train():
        with synthesizer.training():
            pass

    with exclusive_drawing(synthesizer.pipeline):
        waited, ended = begin_in_a_thread(train)
    assert waited
    assert ended()


def test_a_synthesizer_with_a_lora_is_made_without_touching_a_model_that_draws(synthesizer):
    lora, transformer = strong_lora(synthesizer.pipeline.transformer), synthesizer.pipeline.transformer
    with exclusive_drawing(synthesizer.pipeline):
        before = hooks_of(transformer)
        in_another_thread(lambda: synthesizer.with_lora(lora))
        assert hooks_of(transformer) == before


def test_a_pipeline_that_shares_one_part_waits_and_one_that_shares_none_does_not(synthesizer):
    sharing, apart = tiny_flux(), tiny_flux()
    sharing.tokenizer = synthesizer.pipeline.tokenizer
    with exclusive_drawing(synthesizer.pipeline):
        in_another_thread(lambda: synthesizer_of(apart).synthesize(BARN, seed=0))
        waited, ended = begin_in_a_thread(lambda: synthesizer_of(sharing).synthesize(BARN, seed=0))
    assert waited
    assert ended()


def test_pipelines_that_share_parts_never_wait_for_each_other():
    first, second = tiny_flux(), tiny_flux()
    second.tokenizer, second.vae = first.tokenizer, first.vae

    def use(pipeline):
        for _ in range(200):
            with exclusive_use(pipeline):
                pass
        return True

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(use, [first, second] * 4, timeout=TIMEOUT_S))


def test_a_training_may_draw_and_contain_another_use(synthesizer):
    with synthesizer.training():
        drawn = synthesizer.synthesize(BARN, seed=0)
        with synthesizer.training():
            pass
    assert drawn.tobytes() == synthesizer.synthesize(BARN, seed=0).tobytes()


@pytest.mark.parametrize("plan", [BARN, DOOR])
def test_a_hook_of_a_drawing_that_draws_is_refused_and_the_drawing_goes_on(synthesizer, plan):
    expected = synthesizer.synthesize(plan, seed=0).tobytes()
    refusals = []

    def draw_again(*_):
        with pytest.raises(aa.ModelError, match="is drawing already, and a hook or a callback") as refusal:
            synthesizer.synthesize(plan, seed=1)
        with pytest.raises(aa.ModelError, match="is drawing already"), synthesizer.training():
            pass
        refusals.append(refusal)

    with synthesizer.pipeline.transformer.register_forward_hook(draw_again):
        drawn = synthesizer.synthesize(plan, seed=0).tobytes()
    assert drawn == expected
    assert len(refusals) == 2
    assert synthesizer.synthesize(plan, seed=0).tobytes() == expected


@pytest.mark.skipif(not hasattr(os, "fork"), reason="POSIX")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_child_forked_while_another_thread_draws_inherits_no_lock():
    pipeline = tiny_flux()
    held, release = threading.Event(), threading.Event()

    def hold():
        with exclusive_drawing(pipeline):
            held.set()
            release.wait(TIMEOUT_S)

    thread = threading.Thread(target=hold)
    thread.start()
    assert held.wait(TIMEOUT_S)
    child = os.fork()
    if child == 0:
        entered = threading.Event()

        def enter():
            with exclusive_drawing(pipeline):
                entered.set()

        threading.Thread(target=enter, daemon=True).start()
        os._exit(0 if entered.wait(10) else 1)
    release.set()
    thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
