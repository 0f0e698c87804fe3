"""LoRAs of regions: which token gets how much, and on a real FLUX that a region of everything is the LoRA itself."""

from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings

import artaug as aa
from artaug.diffusion import DiffusersSynthesizer
from artaug.regional.denoiser import AttentionSite, AttentiveDenoiser, Span
from artaug.regional.guided_call import CurrentCall, GuidedRow
from artaug.regional.region_weights import split_grid
from artaug.regional.token_lora import _TokenScales, find_lora
from support.guided_flux import FULL, ISOLATED, LEFT, PROMPT, RIGHT, GuidedStep, draw
from support.layouts import layouts
from support.tiny_flux import TINY_SIZE, tiny_flux


@pytest.fixture(scope="module")
def pipeline():
    return tiny_flux()


def lora(seed=0, *, layers=("transformer_blocks.0.attn.to_q", "single_transformer_blocks.1.proj_mlp")):
    generator = torch.Generator().manual_seed(seed)
    widths = {"proj_mlp": 128}
    return aa.LoRA(
        {
            name: aa.LowRank(
                torch.randn(2, 32, generator=generator),
                torch.randn(widths.get(name.split(".")[-1], 32), 2, generator=generator),
            )
            for name in layers
        }
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class LayersByStream(AttentiveDenoiser):
    """A denoiser of which only the streams of its layers and its grids count: a layer's name is its stream."""

    module: torch.nn.Module = field(default_factory=torch.nn.Identity)
    site_grids: tuple[tuple[int, int] | None, ...] = ()

    @property
    def sites(self):
        return [AttentionSite(SimpleNamespace(), block, grid=grid) for block, grid in enumerate(self.site_grids)]

    def token_stream(self, layer):
        return None if layer == "modulation" else layer

    def branches(self, kwargs): ...

    def with_prompt_embeds(self, kwargs, rows, prompts): ...

    def noise_level(self, kwargs): ...

    def append_prompts(self, kwargs, prompts, *, trim_padding): ...

    def processor(self, site, attention_fn): ...


def token_scales(layer, outputs, *rows, grid, site_grids=(), name="anna"):
    """Factors of a LoRA's update for a layer's outputs."""
    current = CurrentCall()
    current.begin(tuple(rows))

    def split(regions, grid):
        return split_grid(regions, grid, base_weight=0.0)

    return _TokenScales(name, LayersByStream(grid=grid, site_grids=tuple(site_grids)), current, split)(layer, outputs)


SPANS = (
    Span("text", 2, 1),
    Span("text", 1, 2),
    Span("padding", 1),
    Span("text", 3, 0),
    Span("image", 4),
    Span("reference", 2),
)
REGIONS = (aa.Region(aa.Box(0, 0, 0.375, 1), "a", weight=5.0, lora="anna"), aa.Region(RIGHT, "b", lora="bea"))
ROW = GuidedRow(SPANS, REGIONS, REGIONS)


@pytest.mark.parametrize(
    ("stream", "expected"),
    [
        ("image", [1, 0.5, 0, 0, 0, 0]),
        ("text", [1, 1, 0, 0, 0, 0, 0]),
        ("joint", [1, 1, 0, 0, 0, 0, 0, 1, 0.5, 0, 0, 0, 0]),
    ],
)
def test_a_regions_tokens_get_their_share_and_its_prompt_all_whatever_its_weight(stream, expected):
    outputs = torch.zeros(1, len(expected), 8)
    scales = token_scales(stream, outputs, ROW, grid=(1, 4))
    assert scales.shape == (1, len(expected), 1)
    assert scales.flatten().tolist() == expected


def test_a_layer_without_tokens_and_a_call_without_regions_get_nothing():
    outputs = torch.zeros(1, 6, 8)
    assert token_scales("modulation", outputs, ROW, grid=(1, 4)) is None
    assert token_scales("image", outputs, grid=(1, 4)) is None


def test_the_pixels_of_a_convolution_are_tokens_of_a_grid_of_their_own():
    row = GuidedRow((Span("text", 2, 0),), REGIONS[:1], REGIONS[:1])
    scales = token_scales("image", torch.zeros(1, 3, 2, 8), row, grid=(1, 4))
    assert scales.shape == (1, 1, 2, 8)
    assert scales[0, 0].tolist() == [[1, 1, 1, 0, 0, 0, 0, 0]] * 2


def test_a_layer_of_another_resolution_is_known_by_its_number_of_tokens():
    row = GuidedRow((Span("text", 2, 0),), REGIONS[:1], REGIONS[:1])
    scales = token_scales("image", torch.zeros(1, 16, 8), row, grid=(1, 4), site_grids=[(2, 8), None])
    assert scales[0, :, 0].tolist() == [1, 1, 1, 0, 0, 0, 0, 0] * 2


def test_in_the_negative_branch_image_tokens_get_their_share_and_no_prompt_does():
    row = GuidedRow((Span("text", 3, 0), Span("image", 4)), (), REGIONS)
    scales = token_scales("joint", torch.zeros(1, 7, 8), row, grid=(1, 4))
    assert scales.flatten().tolist() == [0, 0, 0, 1, 0.5, 0, 0]


def test_a_stream_that_does_not_fit_the_model_is_named():
    with pytest.raises(
        aa.GuideError, match=r"layer 'text' has 5 tokens, and its text tokens should be 7: LayersByStream"
    ):
        token_scales("text", torch.zeros(1, 5, 8), ROW, grid=(1, 4))


@settings(max_examples=40)
@given(layout=layouts(max_regions=5))
def test_the_shares_of_the_loras_of_all_regions_add_up_to_what_regions_cover(layout):
    regions = tuple(
        aa.Region(region.area, "a", weight=region.weight, feather=region.feather, lora=str(number))
        for number, region in enumerate(layout.regions)
    )
    layout.region_weights  # noqa: B018 - rejects layouts with a region that has no effect under "over"
    row = GuidedRow((Span("image", layout.grid[0] * layout.grid[1]),), regions, regions)
    outputs = torch.zeros(1, layout.grid[0] * layout.grid[1], 1)
    try:
        parts = [token_scales("image", outputs, row, grid=layout.grid, name=region.lora) for region in regions]
    except aa.GuideError:  # a region without effect under "share"
        return
    covered = torch.zeros(outputs.shape[1]) + sum(part[0, :, 0] for part in parts)
    base = split_grid(regions, layout.grid, base_weight=0.0).weights[0]
    torch.testing.assert_close(covered, 1 - base, atol=1 / 128, rtol=0)


def test_a_lora_is_found_by_name_or_refused():
    lora_by_name = {"anna": lora()}
    assert find_lora(aa.Region(LEFT, "a"), lora_by_name) is None
    assert find_lora(aa.Region(LEFT, "a", lora="anna"), lora_by_name) is lora_by_name["anna"]
    with pytest.raises(aa.GuideError, match=r"names the LoRA 'bea' and the guide has \['anna'\]"):
        find_lora(aa.Region(LEFT, "a", lora="bea"), lora_by_name)
    with pytest.raises(aa.GuideError, match="the guide has none"):
        find_lora(aa.Region(LEFT, "a", lora="bea"), {})


def test_a_lora_of_the_whole_model_and_regions_go_together(pipeline):
    with lora().applied_to(pipeline.transformer):
        guide = aa.RegionalAttention(isolation=ISOLATED, trim_padding=False)
        step = GuidedStep(pipeline, [[aa.Region(FULL, PROMPT)]], guide=guide)
        expected = step.predict()
    torch.testing.assert_close(step.prediction, expected, atol=1e-4, rtol=1e-4)


def test_a_lora_of_a_region_of_everything_is_the_lora(pipeline):
    guide = aa.RegionalAttention(isolation=ISOLATED, trim_padding=False, loras={"anna": lora()})
    step = GuidedStep(pipeline, [[aa.Region(FULL, PROMPT, lora="anna")]], guide=guide)
    with lora().applied_to(pipeline.transformer):
        expected = step.predict()
    torch.testing.assert_close(step.prediction, expected, atol=1e-4, rtol=1e-4)


def test_under_guidance_in_two_calls_a_lora_of_a_region_of_everything_is_the_lora(pipeline):
    """The call of the negative prompt has no region's prompt in it, and gets the LoRA all the same."""
    of_output = lora(layers=("transformer_blocks.0.attn.to_out.0",))
    options = {"width": TINY_SIZE, "height": TINY_SIZE, "steps": 1, "negative_prompt": "bad", "true_cfg_scale": 4.0}
    guide = aa.RegionalAttention(isolation=ISOLATED, trim_padding=False, loras={"anna": of_output})
    plan = aa.Plan(PROMPT, (aa.Region(FULL, PROMPT, lora="anna"),))
    regional, whole, plain = (
        np.asarray(synthesizer.synthesize(plan, seed=0), dtype=int)
        for synthesizer, plan in (
            (DiffusersSynthesizer(pipeline=pipeline, guide=guide, **options), plan),
            (DiffusersSynthesizer(pipeline=pipeline, **options).with_lora(of_output), aa.Plan(PROMPT)),
            (DiffusersSynthesizer(pipeline=pipeline, **options), aa.Plan(PROMPT)),
        )
    )
    assert abs(regional - whole).max() <= 1
    assert abs(whole - plain).mean() > 2


def test_in_the_layer_that_a_lora_updates_only_its_regions_tokens_change(pipeline):
    guide = aa.RegionalAttention(
        isolation=ISOLATED, loras={"anna": lora(layers=("transformer_blocks.0.attn.to_out.0",))}
    )
    plain, updated = (
        GuidedStep(pipeline, [[aa.Region(LEFT, "blue", lora=name), aa.Region(RIGHT, "ivy")]], guide=guide)
        for name in (None, "anna")
    )
    change = (plain.block_outputs[0][1] - updated.block_outputs[0][1]).reshape(8, 8, -1).abs().amax(dim=-1)
    assert (change[:, 4:] == 0).all()
    assert (change[:, :4] > 0).all()
    assert (plain.block_outputs[0][0] == updated.block_outputs[0][0]).all()


def test_a_regions_lora_is_applied_to_its_own_prediction_in_output_mixing(pipeline):
    guide = aa.OutputMix(loras={"anna": lora()})
    step = GuidedStep(pipeline, [[aa.Region(FULL, PROMPT, lora="anna")]], guide=guide)
    with lora().applied_to(pipeline.transformer):
        with_lora = step.predict()
    torch.testing.assert_close(step.prediction, (step.predict() + with_lora) / 2, atol=1e-5, rtol=1e-5)


def test_a_lora_that_the_guide_lacks_or_that_acts_on_no_token_is_named(pipeline):
    plan = aa.Plan(PROMPT, (aa.Region(LEFT, "ivy", lora="anna"),))
    for guide in (aa.RegionalAttention(loras={"bea": lora()}), aa.OutputMix(loras={"bea": lora()})):
        with pytest.raises(aa.GuideError, match=r"names the LoRA 'anna' and the guide has \['bea'\]"):
            draw(pipeline, plan, guide)
    modulation = aa.LowRank(torch.ones(1, 32), torch.ones(96, 1))
    whole = aa.LoRA({"single_transformer_blocks.0.norm.linear": modulation})
    with pytest.raises(aa.GuideError, match="no layer of the LoRA 'anna' works on tokens"):
        draw(pipeline, plan, aa.RegionalAttention(loras={"anna": whole}))
    mixed = aa.LoRA({**lora().layers, **whole.layers})
    with pytest.warns(UserWarning, match="1 of 3 layers of the LoRA 'anna' act on the whole picture"):
        draw(pipeline, plan, aa.RegionalAttention(loras={"anna": mixed}))
