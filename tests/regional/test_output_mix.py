"""The paper's equation against separate calls of the same real transformer."""

import math

import pytest
import torch

import artaug as aa
from artaug.diffusion import Flux
from artaug.regional import EncodedPrompt, EncodedRegion, OutputMix, token_weights
from support.guiding import under
from support.tiny_flux import TINY_SIZE, tiny_flux
from support.traces import hooks_of

LEFT, TOP, FULL = aa.Box(0, 0, 0.5, 1), aa.Box(0, 0, 1, 0.3), aa.Box(0, 0, 1, 1)
PLAIN = "a red barn"
PLACES = torch.cartesian_prod(torch.zeros(1), torch.arange(8.0), torch.arange(8.0))


@pytest.fixture(scope="module")
def flux():
    return Flux(
        pipeline=tiny_flux(guidance_embeds=True),
        width=TINY_SIZE,
        height=TINY_SIZE,
        guidance_scale=None,
        negative_prompt=None,
        true_cfg_scale=1.0,
        max_sequence_length=24,
    )


class Step:
    """One step of a run: the call that a pipeline would make, and what a guide needs to steer it."""

    def __init__(self, flux, prompts, *, seed=0):
        self.flux = flux
        self.conditioning = flux.encode_prompts(prompts)
        self.denoiser = flux.denoiser(self.conditioning)
        self.latents = torch.randn(len(prompts), 64, 16, generator=torch.Generator().manual_seed(seed))

    def regions(self, *rows):
        return [
            [EncodedRegion(region, *self.flux.encode_separately([region.prompt])) for region in row] for row in rows
        ]

    @torch.no_grad()
    def predict(self, conditioning=None, *, rows=None, return_dict=False):
        conditioning = conditioning or self.conditioning
        latents = self.latents if rows is None else self.latents[rows]
        return self.flux.module(
            hidden_states=latents,
            timestep=torch.full((len(latents),), 0.7),
            guidance=torch.full((len(latents),), 3.5),
            pooled_projections=conditioning["pooled_prompt_embeds"],
            encoder_hidden_states=conditioning["prompt_embeds"],
            txt_ids=torch.zeros(24, 3),
            img_ids=PLACES,
            joint_attention_kwargs={},
            return_dict=return_dict,
        )[0]

    def reference_mix(self, row, regions):
        """The paper's equation, one call a prompt."""
        numerator, denominator = self.predict()[row], 1.0
        for region in regions:
            weights = token_weights(region, (8, 8)).reshape(64, 1)
            numerator = numerator + weights * self.predict(self.flux.encode_prompts([region.prompt]), rows=[row])[0]
            denominator = denominator + weights
        return numerator / denominator


def steered(step, regions, **options):
    with under(OutputMix(), step.denoiser, regions):
        return step.predict(**options)


@pytest.mark.parametrize("return_dict", [False, True])
def test_the_output_is_the_papers_equation_for_every_picture_of_a_batch(flux, return_dict):
    rows = [
        [aa.Region(LEFT, "a blue door"), aa.Region(TOP, "a stormy sky", weight=2.5, feather=0.1)],
        [],
        [aa.Region(TOP, "a calm sky", weight=0.3), aa.Region(LEFT, "ivy"), aa.Region(FULL, "dusk", weight=9)],
    ]
    step = Step(flux, [PLAIN, "a green hill", "a lake"])
    mixed = steered(step, step.regions(*rows), return_dict=return_dict)
    for row, regions in enumerate(rows):
        torch.testing.assert_close(mixed[row], step.reference_mix(row, regions), atol=2e-6, rtol=1e-5)


def test_an_output_object_keeps_its_type(flux):
    step = Step(flux, [PLAIN])
    with under(OutputMix(), step.denoiser, step.regions([aa.Region(LEFT, "ivy")])):
        types = [
            type(flux.module(**call_kwargs(step), return_dict=return_dict)).__name__ for return_dict in (True, False)
        ]
    assert types == ["Transformer2DModelOutput", "tuple"]


def call_kwargs(step):
    return {
        "hidden_states": step.latents,
        "timestep": torch.ones(1),
        "guidance": torch.ones(1),
        "pooled_projections": step.conditioning["pooled_prompt_embeds"],
        "encoder_hidden_states": step.conditioning["prompt_embeds"],
        "txt_ids": torch.zeros(24, 3),
        "img_ids": torch.zeros(64, 3),
    }


def test_a_picture_without_regions_is_untouched_bit_for_bit(flux):
    step = Step(flux, [PLAIN, "a lake"])
    mixed = steered(step, step.regions([aa.Region(FULL, "dusk")], []))
    assert torch.equal(mixed[1], step.predict()[1])
    assert not torch.equal(mixed[0], step.predict()[0])


def test_outside_every_region_the_prediction_is_untouched_bit_for_bit(flux):
    step = Step(flux, [PLAIN])
    change = (steered(step, step.regions([aa.Region(LEFT, "a blue door")]))[0] - step.predict()[0]).reshape(8, 8, 16)
    assert (change[:, 4:] == 0).all()
    assert (change[:, :4] != 0).any()


@pytest.mark.parametrize("weight", [0.1, 1.0, 99.0])
def test_a_region_with_the_plans_prompt_changes_nothing(flux, weight):
    step = Step(flux, [PLAIN])
    mixed = steered(step, step.regions([aa.Region(FULL, PLAIN, weight=weight)]))
    torch.testing.assert_close(mixed, step.predict(), atol=1e-6, rtol=1e-5)


def test_the_negative_branch_is_untouched_bit_for_bit(flux):
    step = Step(flux, [PLAIN])
    negative = flux.encode_prompts(["blurry"])
    mixed = steered(step, step.regions([aa.Region(FULL, "dusk")]), conditioning=negative)
    assert torch.equal(mixed, step.predict(negative))


def test_the_plans_branch_is_known_by_the_identity_of_its_tensor(flux):
    step = Step(flux, [PLAIN])
    twin = {name: tensor.clone() for name, tensor in step.conditioning.items()}
    assert torch.equal(steered(step, step.regions([aa.Region(FULL, "dusk")]), conditioning=twin), step.predict())


def test_extra_passes_are_no_larger_than_the_batch(flux):
    step = Step(flux, [PLAIN, "a lake"])
    regions = step.regions(
        [aa.Region(LEFT, text) for text in ("a", "b", "c")], [aa.Region(TOP, "d"), aa.Region(TOP, "e")]
    )
    sizes = []
    hook = flux.module.register_forward_hook(
        lambda _module, _args, kwargs, _output: sizes.append(len(kwargs["hidden_states"])), with_kwargs=True
    )
    with hook:
        steered(step, regions)
    assert sorted(sizes) == [1, 2, 2, 2]


def test_nothing_remains_after_a_run(flux):
    step = Step(flux, [PLAIN])
    before, hooks = step.predict(), hooks_of(flux.module)
    steered(step, step.regions([aa.Region(FULL, "dusk")]))
    assert hooks_of(flux.module) == hooks
    assert torch.equal(step.predict(), before)


def test_nothing_remains_after_an_exception(flux):
    step = Step(flux, [PLAIN])
    before, hooks = step.predict(), hooks_of(flux.module)
    regions = step.regions([aa.Region(FULL, "dusk")])

    def interrupted():
        with under(OutputMix(), step.denoiser, regions):
            step.predict()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        interrupted()
    assert hooks_of(flux.module) == hooks
    assert torch.equal(step.predict(), before)
    steered(step, regions)


def test_two_guides_on_one_denoiser_are_refused(flux):
    step = Step(flux, [PLAIN])
    regions = step.regions([aa.Region(FULL, "dusk")])
    with (
        under(OutputMix(), step.denoiser, regions),
        pytest.raises(aa.GuideError, match=r"OutputMix\(\) cannot steer a FluxTransformer2DModel that OutputMix\(\)"),
        under(OutputMix(), step.denoiser, regions),
    ):
        pass


def test_a_prediction_that_is_not_finite_names_the_step_and_the_prompt(flux):
    step = Step(flux, [PLAIN])
    broken = EncodedRegion(
        aa.Region(FULL, "dusk"),
        EncodedPrompt(
            {name: torch.full_like(tensor, math.nan) for name, tensor in flux.encode_prompts(["dusk"]).items()},
            slice(0, 1),
        ),
    )
    with pytest.raises(aa.NonFiniteError, match=r"the region prompt\(s\) \['dusk'\] at step 1"):
        steered(step, [[broken]])
    step.latents = torch.full_like(step.latents, math.inf)
    with pytest.raises(aa.NonFiniteError, match="the plan's prompt at step 1"):
        steered(step, step.regions([aa.Region(FULL, "dusk")]))


def test_a_batch_of_another_size_is_refused(flux):
    step = Step(flux, [PLAIN, "a lake"])
    with pytest.raises(aa.GuideError, match="regions of 1 pictures cannot steer a batch of 2"):
        steered(step, step.regions([aa.Region(FULL, "dusk")]))


def test_half_precision_is_mixed_in_single_precision(flux):
    step = Step(flux, [PLAIN])
    regions = step.regions([aa.Region(LEFT, "a blue door", weight=0.37)])
    float_mix = steered(step, regions)
    hook = flux.module.register_forward_hook(lambda _module, _args, output: (output[0].bfloat16(),))
    with hook:
        plain, mixed = step.predict(), steered(step, regions)
    assert mixed.dtype == torch.bfloat16
    assert torch.equal(mixed.reshape(8, 8, 16)[:, 4:], plain.reshape(8, 8, 16)[:, 4:])
    torch.testing.assert_close(mixed.float(), float_mix, atol=1e-2, rtol=1e-2)
