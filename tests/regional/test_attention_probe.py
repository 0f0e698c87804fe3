"""What the probe takes and gives: phrases, layers, means, and what it refuses. Exactness has a test in every family."""

from contextlib import contextmanager

import pytest
import torch
from PIL import Image

import artaug as aa
from artaug.regional import AttentionMaps, LayerMaps
from artaug.regional.guide import steer
from artaug.testing import check_guide
from support.guided_flux import FULL, LEFT, PROMPT, GuidedStep, draw, synthesizer
from support.tiny_flux import tiny_flux

PLANS = [aa.Plan("a red barn"), aa.Plan("ivy on a red door")]


@pytest.fixture(scope="module")
def pipeline():
    return tiny_flux()


def read(pipeline, plans, **options):
    maps = []
    probe = aa.AttentionProbe(**{"phrases": ["red"], "receive": maps.append, **options})
    synthesizer(pipeline, probe).synthesize_batch(plans, seeds=range(len(plans)))
    return maps


def test_maps_come_after_every_call_with_their_phrases_and_layers(pipeline):
    maps = read(pipeline, PLANS, phrases=["red", "barn"])
    assert [call.call for call in maps] == [0, 1]
    assert maps[0].phrases == (("red", "barn"),) * 2
    assert [(layer.block, layer.grid, layer.maps.shape) for layer in maps[0].layers] == [
        (block, (8, 8), (2, 2, 64)) for block in range(3)
    ]
    assert not maps[0].layers[0].maps.requires_grad


def test_of_all_layers_those_that_are_named_are_read_in_the_order_of_computation(pipeline):
    both = read(pipeline, PLANS, layers=[2, 0])[0].layers
    every = read(pipeline, PLANS)[0].layers
    assert [layer.block for layer in both] == [0, 2]
    assert torch.equal(both[1].maps, every[2].maps)


def test_phrases_may_differ_from_plan_to_plan(pipeline):
    own = read(pipeline, PLANS, phrases=lambda plan: [plan.prompt.split()[-1]])[0]
    assert own.phrases == (("barn",), ("door",))
    for row, phrase in enumerate(("barn", "door")):
        same = read(pipeline, PLANS, phrases=[phrase])[0]
        torch.testing.assert_close(own.layers[0].maps[row], same.layers[0].maps[row])


def test_a_plan_with_fewer_phrases_than_another_has_maps_of_zeros_in_their_place(pipeline):
    maps = read(pipeline, PLANS, phrases=lambda plan: ["red", "barn"] if "barn" in plan.prompt else ["door"])[0]
    assert maps.phrases == (("red", "barn"), ("door",))
    (door,) = read(pipeline, PLANS, phrases=["door"])[:1]
    for layer, alone in zip(maps.layers, door.layers, strict=True):
        torch.testing.assert_close(layer.maps[1, 0], alone.maps[1, 0])
        assert layer.maps[1, 1].count_nonzero() == 0
        assert layer.maps[0].gt(0).all()


def test_some_plans_may_have_no_phrases(pipeline):
    maps = read(pipeline, PLANS, phrases=lambda plan: ["red"] if "barn" in plan.prompt else [])[0]
    assert maps.phrases == (("red",), ())
    assert maps.layers[0].maps[1].count_nonzero() == 0
    assert read(pipeline, PLANS, phrases=lambda _plan: []) == []


def test_a_number_is_one_token_whatever_it_stands_for(pipeline):
    numbers = []

    class Tokens(aa.Guide):
        reads_regions = False

        @contextmanager
        def applied(self, run):
            numbers.extend(run.phrase("red"))
            yield

    synthesizer(pipeline, Tokens()).synthesize_batch(PLANS, seeds=[0, 1])
    whole = read(pipeline, PLANS[:1], phrases=["red", *numbers[0], 10_000])[0].layers[0].maps
    torch.testing.assert_close(whole[:, 1:-1].sum(dim=1), whole[:, 0])
    assert (whole[:, -1] == 0).all()
    every = read(pipeline, PLANS[:1], phrases=range(128), over="prompt")[0].layers[0].maps
    torch.testing.assert_close(every.sum(dim=1), torch.ones_like(every[:, 0]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"phrases": ["a green cube"]}, r"the phrase 'a green cube' is in none of the prompts \['a red barn', 'ivy on"),
        ({"phrases": lambda _plan: ["barn"]}, r"the phrases \['barn'\] are not in the prompt 'ivy on a red door'"),
        ({"layers": [1, 7]}, r"names the layers \[7\], .* Expected numbers of \[0, 1, 2\]"),
    ],
)
def test_what_cannot_be_read_is_an_error_before_anything_is_drawn(pipeline, options, message):
    with pytest.raises(aa.GuideError, match=message):
        read(pipeline, PLANS, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"phrases": []}, r"AttentionProbe\(phrases=\[\]\) would read nothing"),
        ({"phrases": "red"}, r"Put it in a list"),
        ({"phrases": ["red"], "layers": []}, r"AttentionProbe\(layers=\[\]\) would read nothing"),
        ({"phrases": [-1]}, r"AttentionProbe\(phrases=-1\): expected a whole number of at least 0"),
    ],
)
def test_a_probe_without_phrases_is_refused(options, message):
    with pytest.raises(aa.InvalidValueError, match=message):
        aa.AttentionProbe(receive=print, **options)


@pytest.mark.parametrize("given", ["red", None])
def test_a_function_that_gives_one_text_or_nothing_in_the_place_of_phrases_is_named(pipeline, given):
    with pytest.raises(aa.ContractError, match=rf"phrases returned {given!r} for 'a red barn'. Expected a list"):
        read(pipeline, PLANS, phrases=lambda _: given)


def test_a_plan_with_regions_needs_another_guide_beside_the_probe(pipeline):
    plan = aa.Plan(PROMPT, (aa.Region(LEFT, "ivy"),))
    probe = aa.AttentionProbe(phrases=["red"], receive=print)
    with pytest.raises(aa.GuideError, match="which does not read them"):
        draw(pipeline, plan, probe)


@pytest.mark.parametrize("order", [1, -1])
def test_a_probe_changes_no_picture_with_regions_whatever_its_place(pipeline, order):
    plan = aa.Plan(PROMPT, (aa.Region(LEFT, "ivy"), aa.Region(FULL, "dusk", weight=0.5)))
    for guides in ([aa.RegionalAttention()], [aa.OutputMix()], [aa.RegionalAttention(), aa.OutputMix()]):
        maps = []
        probe = aa.AttentionProbe(phrases=["red"], receive=maps.append)
        together = aa.Together([*guides, probe][::order])
        assert (draw(pipeline, plan, together) == draw(pipeline, plan, aa.Together(guides))).all()
        assert len(maps) == 2  # not of the predictions that OutputMix makes by itself


def test_the_mean_is_over_layers_and_heads_on_the_finest_grid():
    fine = torch.rand(1, 2, 3, 16, generator=torch.Generator().manual_seed(0))
    coarse = torch.tensor([[[0.25] * 4, [1.0] * 4]])
    maps = AttentionMaps(0, (("a", "b"),), (LayerMaps(0, (2, 2), coarse), LayerMaps(1, (4, 4), fine)))
    expected = (fine.mean(dim=2).reshape(1, 2, 4, 4) + torch.tensor([0.25, 1.0])[:, None, None]) / 2
    torch.testing.assert_close(maps.mean(), expected)
    assert maps.mean((2, 2)).shape == (1, 2, 2, 2)
    torch.testing.assert_close(maps.mean((2, 2)).mean(), expected.mean())


def test_a_layer_that_was_not_computed_by_its_processor_is_an_error(pipeline):
    attention = pipeline.transformer.transformer_blocks[0].attn
    forward, processor = attention.forward, attention.processor
    attention.forward = lambda *args, **kwargs: processor(attention, *args, **kwargs)
    try:
        with pytest.raises(aa.GuideError, match=r"1 of 3 attention layers .*\(first: 0\) were not read"):
            read(pipeline, PLANS)
    finally:
        attention.forward = forward


def test_an_exception_of_the_receiver_reaches_the_caller_and_leaves_no_trace(pipeline):
    def refuse(_maps):
        raise ZeroDivisionError

    before = [layer.processor for layer in pipeline.transformer.modules() if hasattr(layer, "processor")]
    with pytest.raises(ZeroDivisionError):
        read(pipeline, PLANS, receive=refuse)
    after = [layer.processor for layer in pipeline.transformer.modules() if hasattr(layer, "processor")]
    assert after == before
    assert len(read(pipeline, PLANS)) == 2


@pytest.fixture
def checkpointed(pipeline):
    pipeline.transformer.enable_gradient_checkpointing()
    pipeline.transformer.train()
    yield pipeline
    pipeline.transformer.disable_gradient_checkpointing()
    pipeline.transformer.eval()


def test_a_call_goes_back_through_checkpointed_layers_also_after_another_call_with_the_same_tokens(checkpointed):
    flux, maps = GuidedStep(checkpointed, [[]]).flux, []
    probe = aa.AttentionProbe(phrases=["red"], receive=maps.append)
    conditioning = flux.encode_prompts(["a red barn"])
    noise = flux.initial_noise([0], conditioning)
    weight = checkpointed.transformer.transformer_blocks[0].attn.to_q.weight
    gradients = []
    for calls in (1, 2):
        maps.clear()
        with steer(probe, flux.guided_run(PLANS[:1], conditioning)):
            for _ in range(calls):
                flux.predict(noise, torch.tensor([0.7]), conditioning)
            gradients += torch.autograd.grad(maps[0].layers[1].maps.square().sum(), [weight])
        assert len(maps) == calls
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(*gradients)


def test_layers_computed_again_after_a_call_with_other_tokens_are_an_error(checkpointed):
    flux, maps = GuidedStep(checkpointed, [[]]).flux, []
    probe = aa.AttentionProbe(phrases=["red"], receive=maps.append)
    conditioning = flux.encode_prompts(["a red barn"])
    noise = flux.initial_noise([0], conditioning)
    weight = checkpointed.transformer.transformer_blocks[0].attn.to_q.weight
    plan = aa.Plan("a red barn", (aa.Region(LEFT, "ivy"),))
    early = aa.RegionalAttention(isolation=aa.Isolation(sigma_range=(0.5, 1.0)))
    with steer(aa.Together((early, probe)), flux.guided_run([plan], conditioning)):
        flux.predict(noise, torch.tensor([0.7]), conditioning)
        flux.predict(noise, torch.tensor([0.3]), conditioning)  # without the region's prompt in the sequence
        with pytest.raises(aa.GuideError, match="Go back through each call before the next one"):
            torch.autograd.grad(maps[0].layers[1].maps.square().sum(), [weight])


@pytest.mark.filterwarnings("ignore")  # torch's compiler warns of torch
def test_a_compiled_model_is_read_as_it_is_written(pipeline):
    expected = read(pipeline, PLANS)[1].layers
    compiled = tiny_flux()
    compiled.transformer.compile_repeated_blocks(backend="eager")
    draw(compiled, PLANS[0], None)
    for layer, reference in zip(read(compiled, PLANS)[1].layers, expected, strict=True):
        torch.testing.assert_close(layer.maps, reference.maps)


def test_in_half_precision_maps_are_float32_and_nearly_the_same(pipeline):
    expected = read(pipeline, PLANS)[0].layers
    for layer, reference in zip(read(tiny_flux().to(torch.bfloat16), PLANS)[0].layers, expected, strict=True):
        assert layer.maps.dtype == torch.float32
        torch.testing.assert_close(layer.maps, reference.maps, atol=2e-3, rtol=0.05)


def test_an_offloaded_model_is_read(pipeline):
    offloaded, cpu = tiny_flux(), torch.device("cpu")
    offloaded.transformer.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type="leaf_level")
    for layer, reference in zip(read(offloaded, PLANS)[0].layers, read(pipeline, PLANS)[0].layers, strict=True):
        torch.testing.assert_close(layer.maps, reference.maps)


def test_check_guide_takes_guides_that_read_no_regions():
    probe = aa.AttentionProbe(phrases=["a"], receive=[].append)
    check_guide(probe)
    check_guide(aa.Together((aa.RegionalAttention(), probe)))


def test_the_map_of_a_phrase_is_drawn_over_a_picture(pipeline):
    maps = read(pipeline, PLANS, phrases=["red", "barn"])[-1]
    picture = Image.new("RGB", (64, 48), "teal")
    drawn = maps.preview(picture, "barn")
    assert drawn.width == 512
    assert drawn.tobytes() != maps.preview(picture, "red").tobytes()
    assert picture.getcolors() == [(64 * 48, (0, 128, 128))]
    for phrase, row in (("door", 0), ("red", 2)):
        with pytest.raises(aa.InvalidValueError, match="there is no such map"):
            maps.preview(picture, phrase, row=row)
