"""A guide is asked for every drawing, in one place; several act together in one run; one run at a time on a model."""

from contextlib import contextmanager

import pytest
import torch
from torch import nn

import artaug as aa
from artaug.regional import Branches, Denoiser
from artaug.regional.guide import declines, steer
from support.guided_flux import FULL, LEFT, PROMPT, RIGHT, GuidedStep, draw, synthesizer
from support.guiding import run_of, under
from support.tiny_flux import tiny_flux


class Plain(Denoiser):
    def branches(self, kwargs):
        return Branches(cond=range(0))

    def with_prompt_embeds(self, kwargs, rows, prompts):
        return dict(kwargs)


DENOISER = Plain(module=nn.Identity(), grid=(1, 1))


class Forgotten(aa.Guide):
    def applied(self, run):  # without @contextmanager
        yield


class Complete(aa.Guide):
    def __init__(self, name="complete", log=None, *, declined=False):
        self.name, self.log, self.declined = name, [] if log is None else log, declined

    def declines(self, plans):
        return self.declined

    @contextmanager
    def applied(self, run):
        self.log.append(f"{self.name} entered")
        yield
        self.log.append(f"{self.name} left")


class Seen(aa.Guide):
    """Reads no regions, and counts the drawings it is applied to and the calls in them."""

    reads_regions = False

    def __init__(self):
        self.runs, self.calls = [], 0

    @contextmanager
    def applied(self, run):
        def count(_module, _args):
            self.calls += run.call is not None

        self.runs.append(run)
        with run.denoiser.module.register_forward_pre_hook(count):
            yield


@pytest.fixture(scope="module")
def pipeline():
    return tiny_flux()


def test_a_guide_without_a_context_manager_is_named_with_what_it_returned():
    with (
        pytest.raises(aa.ContractError, match=r"^Forgotten\.applied returned generator .* and 2 plan\(s\)\. Exp"),
        under(Forgotten(), DENOISER, [[], []]),
    ):
        pass


def test_a_guide_with_a_context_manager_is_entered_and_left_once():
    guide = Complete()
    with under(guide, DENOISER, []):
        assert guide.log == ["complete entered"]
    assert guide.log == ["complete entered", "complete left"]


def test_a_second_run_on_one_denoiser_is_refused_and_a_later_one_is_not():
    for _ in range(2):
        with (
            under(aa.OutputMix(), DENOISER, [[]]),
            pytest.raises(aa.GuideError, match=r"OutputMix\(\) cannot steer a Identity that OutputMix\(\) is steering"),
            under(aa.OutputMix(), DENOISER, [[]]),
        ):
            pass


def test_a_run_in_which_the_denoiser_was_not_called_is_told_from_one_in_which_it_was():
    guide = Complete()
    with under(guide, DENOISER, [[]]) as run:
        with pytest.raises(aa.GuideError, match="had no effect: a step was drawn without a call of the Identity"):
            run.check_called(guide)
        DENOISER.module(1)
        run.check_called(guide)


def test_a_guide_is_asked_for_a_plan_without_regions(pipeline):
    guide = Seen()
    synthesizer(pipeline, guide).synthesize(aa.Plan(PROMPT), seed=0)
    assert (len(guide.runs), guide.calls) == (1, 2)
    assert [plan.prompt for plan in guide.runs[0].plans] == [PROMPT]
    assert guide.runs[0].regions == [[]]


def test_a_guide_that_declines_is_not_applied_and_the_model_is_called_bare(pipeline):
    guide = Complete(declined=True)
    hooks = []
    watch = pipeline.transformer.register_forward_hook(
        lambda module, _args, _output: hooks.append(len(module._forward_pre_hooks))  # noqa: SLF001 - listed nowhere else
    )
    with watch:
        drawn = draw(pipeline, aa.Plan(PROMPT), guide)
    assert (drawn == draw(pipeline, aa.Plan(PROMPT), None)).all()
    assert (guide.log, set(hooks)) == ([], {0})


def test_a_guide_that_declines_with_something_else_than_a_bool_is_named():
    guide = Complete(declined=None)
    with pytest.raises(aa.ContractError, match=r"^Complete\.declines returned None for 1 plan\(s\)\. Expected bool\.$"):
        declines(guide, [aa.Plan("a lake")])


def test_regions_that_the_guide_does_not_read_are_refused(pipeline):
    plan = aa.Plan(PROMPT, (aa.Region(LEFT, "ivy"),))
    guide = Seen()
    with pytest.raises(
        aa.GuideError, match=r"has <.*Seen object.*>, which does not read them, and no guide to read them"
    ):
        draw(pipeline, plan, guide)
    assert not synthesizer(pipeline, guide).draws_regions
    assert synthesizer(pipeline, aa.Together((guide, aa.OutputMix()))).draws_regions


def test_guides_together_are_entered_in_order_and_left_in_reverse_without_those_that_decline():
    log = []
    together = aa.Together([Complete("first", log), Complete("absent", log, declined=True), Complete("last", log)])
    with under(together, DENOISER, [[]]):
        pass
    assert log == ["first entered", "last entered", "last left", "first left"]


def test_guides_together_decline_what_all_of_them_decline():
    plans = [aa.Plan("a lake")]
    assert aa.Together((aa.OutputMix(), aa.RegionalAttention())).declines(plans)
    assert not aa.Together((aa.OutputMix(), Complete())).declines(plans)


def test_no_guides_cannot_be_together():
    with pytest.raises(aa.InvalidValueError, match=r"Together\(\(\)\) would guide nothing"):
        aa.Together(())


REGIONS = (aa.Region(LEFT, "a blue door"), aa.Region(FULL, "ivy", weight=0.5))


@pytest.mark.parametrize("order", [1, -1])
def test_output_mix_mixes_plain_predictions_of_region_prompts_into_what_regional_attention_predicts(pipeline, order):
    guides = (aa.RegionalAttention(), aa.OutputMix())[::order]
    together = GuidedStep(pipeline, [REGIONS, []], prompts=(PROMPT, "a lake"), guide=aa.Together(guides))
    # By the definition: (v_R(P) + sum_i s_i M_i v(P_i)) / (1 + sum_i s_i M_i), v_R under regional attention, v plain.
    plain = GuidedStep(pipeline, [REGIONS, []], prompts=(PROMPT, "a lake"))
    numerator, denominator = plain.prediction[0], 1.0
    for region in REGIONS:
        alone = GuidedStep(pipeline, [[]], prompts=(region.prompt,))
        weights = aa.regional.token_weights(region, (8, 8)).reshape(64, 1)
        numerator = numerator + weights * alone.prediction[0]
        denominator = denominator + weights
    torch.testing.assert_close(together.prediction[0], numerator / denominator, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(together.prediction[1], plain.prediction[1], atol=1e-6, rtol=1e-5)


def test_two_guides_that_compute_attention_are_refused_by_name(pipeline):
    both = aa.Together((aa.RegionalAttention(), aa.RegionalAttention(method="dense")))
    with pytest.raises(
        aa.GuideError, match=r"RegionalAttention\(.*method='dense'.*\) cannot compute attention that another"
    ):
        draw(pipeline, aa.Plan(PROMPT, REGIONS), both)
    assert draw(pipeline, aa.Plan(PROMPT, REGIONS), aa.RegionalAttention()).any()  # nothing stayed behind


def test_a_guide_together_with_regional_attention_sees_each_call_of_the_pipeline_and_none_of_the_others(pipeline):
    seen = Seen()
    draw(pipeline, aa.Plan(PROMPT, REGIONS), aa.Together((aa.RegionalAttention(), aa.OutputMix(), seen)))
    assert seen.calls == 2
    call = seen.runs[0].call
    assert call.branches == Branches(cond=range(1))
    assert call.kwargs["encoder_hidden_states"].shape[1] == 24  # as the pipeline made it, without the regions' prompts


def test_a_guide_that_declines_draws_a_plan_of_a_batch_as_another_guide_does(pipeline):
    plans = [aa.Plan(PROMPT), aa.Plan("a lake", (aa.Region(RIGHT, "ivy"),))]
    results = [
        [image.tobytes() for image in synthesizer(pipeline, guide).synthesize_batch(plans, seeds=[0, 1])]
        for guide in (aa.OutputMix(), aa.Together((Complete(declined=True), aa.OutputMix())))
    ]
    assert results[0] == results[1]


def test_a_phrase_is_found_for_every_picture_and_refused_where_no_prompt_holds_it(pipeline):
    flux = GuidedStep(pipeline, [[]]).flux
    run = run_of(DENOISER, [[], []], prompts=("a red barn", "a lake"), phrase_tokens=flux.phrase_tokens)
    found = run.phrase("red barn")
    assert found[0]
    assert found[1] == ()
    with pytest.raises(aa.GuideError, match=r"the phrase 'green' is in none of the prompts \['a red barn', 'a lake'\]"):
        run.phrase("green")


def test_a_guide_of_one_run_is_the_same_in_the_next():
    guide = Complete()
    run = run_of(DENOISER, [[]])
    for _ in range(2):
        with steer(guide, run):
            pass
    assert len(guide.log) == 4


class Doubled(aa.Guide):
    """Computes attention of doubled values, by a function."""

    reads_regions = False

    @contextmanager
    def applied(self, run):
        def attention(query, key, value, attn_mask=None):
            return torch.nn.functional.scaled_dot_product_attention(query, key, 2 * value, attn_mask=attn_mask)

        with run.attention() as layers, layers.computed_by(self, dict.fromkeys(layers.sites, attention)):
            yield


def test_a_guide_may_compute_attention_by_a_function_which_others_cannot_observe(pipeline):
    plan = aa.Plan(PROMPT)
    assert (draw(pipeline, plan, Doubled()) != draw(pipeline, plan, None)).any()
    probe = aa.AttentionProbe(phrases=["barn"], receive=print)
    with pytest.raises(aa.GuideError, match=r"Doubled.* computes attention by a function, which does not tell a guide"):
        draw(pipeline, plan, aa.Together((Doubled(), probe)))
