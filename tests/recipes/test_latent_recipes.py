"""Attend-and-Excite and A-STAR: the moves that their formulas give on a dense attention, and losses that fall as they draw."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional

import artaug as aa
from artaug.diffusion.families.flux.family import Flux
from artaug.diffusion.families.sd3.family import StableDiffusion3
from artaug.diffusion.families.unet.family import StableDiffusion
from artaug.diffusion.families.z_image.family import ZImage
from artaug.recipes import AStar, AttendAndExcite
from artaug.regional.attention_losses import segregation_loss
from support.family_laws import family_of, synthesizer_of
from support.family_pipelines import tiny_family
from support.tiny_unet import tiny_sd15

PROMPTS = ["a red barn by the lake", "a lake, and in it a red boat at night"]
PLANS = [aa.Plan(prompt) for prompt in PROMPTS]
PHRASES = ["lake", "red barn"]
STEPS = 4


class Latents(aa.LatentGuide):
    """Notes what a step is made from."""

    def __init__(self):
        self.noted = []

    def moved(self, latents, step, predict):
        self.noted.append(latents.clone())
        return latents


def draw(family, guide, plans=PLANS, *, steps=STEPS, seeds=None):
    images = synthesizer_of(family, guide=guide, steps=steps).synthesize_batch(plans, seeds=seeds or range(len(plans)))
    return np.stack([np.asarray(image) for image in images]).astype(int)


def latents_under(family, guide, plans=PLANS[:1]):
    """What each step of a drawing is made from."""
    noting = Latents()
    draw(family, aa.Together((guide, noting)), plans)
    return noting.noted


class DenseUNet:
    """Stable Diffusion as the papers' codes drive it: a loop of its own, and maps out of whole attention matrices."""

    def __init__(self, family, prompt):
        self.family, self.pipeline = family, family.pipeline
        self.conditioning = family.encode_prompts([prompt])
        self.embeds = self.conditioning["prompt_embeds"]
        self.sites = [site.grid for site in family.denoiser(self.conditioning).sites]
        self.grid = min(self.sites, key=lambda grid: abs(math.log(math.prod(grid) / 256)))
        self.tokens = family.phrase_tokens(prompt, PHRASES)

    def predict(self, latents, timestep):
        model_input = self.pipeline.scheduler.scale_model_input(latents, timestep)
        return self.pipeline.unet(model_input, timestep, encoder_hidden_states=self.embeds, return_dict=False)[0]

    def maps(self, latents, timestep):
        """The mean over layers and heads of the probabilities of all text tokens: (text tokens, image tokens)."""
        probs, original = [], functional.scaled_dot_product_attention

        def recorded(query, key, value, **options):
            if key.shape[2] == self.embeds.shape[1]:
                probs.append((query @ key.mT / query.shape[-1] ** 0.5).softmax(dim=-1))
            return original(query, key, value, **options)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(functional, "scaled_dot_product_attention", recorded)
            self.predict(latents, timestep)
        assert len(probs) == len(self.sites)
        of_size = [layer.mean(dim=1)[0] for layer, grid in zip(probs, self.sites, strict=True) if grid == self.grid]
        return torch.stack(of_size).mean(dim=0).T

    def draw(self, move):
        """The latents of every step, each moved before it is made."""
        scheduler = self.pipeline.scheduler
        scheduler.set_timesteps(STEPS)
        latents = self.family.initial_noise([0], self.conditioning) * scheduler.init_noise_sigma
        moved = []
        for number, timestep in enumerate(scheduler.timesteps):
            latents = move(number, latents, timestep)
            moved.append(latents)
            with torch.no_grad():
                latents = scheduler.step(self.predict(latents, timestep), timestep, latents, return_dict=False)[0]
        return moved


@pytest.fixture(scope="module")
def unet():
    return family_of(StableDiffusion, tiny_sd15(), width=64, height=64, max_sequence_length=96, guidance_scale=1.0)


def blurred(pictures):
    """The authors' kernel: exp(-(d / 2 sigma)^2) with sigma 0.5, on a reflected edge."""
    profile = torch.exp(-((torch.tensor([-1.0, 0.0, 1.0]) / (2 * 0.5)) ** 2))
    kernel = torch.outer(profile, profile)
    return functional.conv2d(
        functional.pad(pictures[:, None], (1,) * 4, mode="reflect"), (kernel / kernel.sum())[None, None]
    )


def test_attend_and_excite_moves_latents_as_its_formulas_say(unet):
    dense = DenseUNet(unet, PROMPTS[0])
    thresholds, counts = {0: 0.5, 1: 0.8}, []

    def loss_of(latents, timestep):
        words = (100 * dense.maps(latents, timestep)[1:-1]).softmax(dim=0)
        phrases = torch.stack([words[[token - 1 for token in tokens]].sum(dim=0) for tokens in dense.tokens])
        peaks = blurred(phrases.unflatten(1, dense.grid)).flatten(1).amax(dim=1)
        return max(0 * peaks[0], *(1 - peaks))

    def step(latents, timestep, size):
        wanted = latents.detach().requires_grad_()
        loss = loss_of(wanted, timestep)
        return loss.item(), latents - size * torch.autograd.grad(loss, wanted)[0]

    def move(number, latents, timestep):
        if number >= 2:  # of four steps the first half
            return latents
        size = 20 * math.sqrt(np.linspace(1.0, 0.5, STEPS)[number])
        loss, moved = step(latents, timestep, size)
        counts.append(0)
        while loss > 1 - thresholds[number] and counts[-1] < 3:
            counts[-1] += 1
            latents = moved
            loss, moved = step(latents, timestep, size)
        return moved

    expected = dense.draw(move)
    assert any(counts)
    guide = AttendAndExcite(phrases=PHRASES, most_refinements=3)
    for got, wanted in zip(latents_under(unet, guide), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=2e-3, atol=2e-3)


def test_a_star_moves_latents_as_its_formulas_say(unet):
    dense, masks = DenseUNet(unet, PROMPTS[0]), []

    def move(_number, latents, timestep):
        wanted = latents.detach().requires_grad_()
        maps = dense.maps(wanted, timestep)
        first, second = (maps[list(tokens)].sum(dim=0) for tokens in dense.tokens)
        loss = torch.minimum(first, second).sum() / (first + second).sum()
        if masks:
            for phrase, mask in zip((first, second), masks[-1], strict=True):
                loss = loss + 1 - torch.minimum(phrase, mask).sum() / (phrase + mask).sum()
        masks.append([(phrase >= 0.5 * phrase.max()).float().detach() for phrase in (first, second)])
        return latents - 300 * torch.autograd.grad(loss, wanted)[0]

    expected = dense.draw(move)
    guide = AStar(phrases=PHRASES, step_size=300)
    moved = latents_under(unet, guide)
    for got, wanted in zip(moved, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=2e-3, atol=2e-3)
    again = latents_under(unet, guide)
    assert all(map(torch.equal, moved, again))  # nothing is remembered from one drawing to the next


def drawn_maps(family, guide, plans=PLANS):
    """The mean maps of all phrases in the calls that draw: (steps, pictures, phrases, tokens)."""
    received = []
    probe = aa.AttentionProbe(phrases=["lake", "red"], receive=received.append, over="prompt")
    draw(family, aa.Together((guide, probe)), plans)
    assert len(received) == STEPS
    return torch.stack([call.mean().flatten(2) for call in received])


KINDS = [Flux, StableDiffusion3, StableDiffusion, ZImage]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_phrases_share_less_as_a_star_draws_each_picture_of_a_batch(kind):
    family = tiny_family(kind)
    unguided = drawn_maps(family, AStar(phrases=["lake", "red"], step_size=0.0))
    assert torch.equal(unguided, drawn_maps(family, Latents()))
    guided = drawn_maps(family, AStar(phrases=["lake", "red"], step_size=0.1, normalize="abs_max", retention=0.0))
    before, after = (torch.stack(list(map(segregation_loss, maps))) for maps in (unguided, guided))
    assert (after[-1] < before[-1]).all()


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_the_weakest_phrase_has_a_higher_peak_as_attend_and_excite_draws(kind):
    family = tiny_family(kind)
    guide = AttendAndExcite(
        phrases=["lake", "red"],
        step_size=0.1,
        until=1.0,
        most_refinements=2,
        sharpness=None,
        smoothing=None,
        normalize="abs_max",
    )
    peaks, excited = (drawn_maps(family, way).amax(dim=-1).amin(dim=-1) for way in (Latents(), guide))
    assert (excited[-1] > peaks[-1]).all()


def test_a_picture_of_a_batch_is_moved_as_it_is_alone_and_one_without_phrases_is_not():
    family = tiny_family(StableDiffusion3)

    def phrases(plan):
        return ["lake", "red barn"] if "barn" in plan.prompt else []

    for guide in (
        AttendAndExcite(phrases=phrases, step_size=0.3, normalize="abs_max", most_refinements=2),
        AStar(phrases=phrases, step_size=0.3, normalize="abs_max"),
    ):
        together, plain = draw(family, guide), draw(family, None)
        assert np.abs(together[0] - draw(family, guide, PLANS[:1])[0]).max() <= 2
        assert np.abs(together[0] - plain[0]).max() > 2
        assert np.abs(together[1] - plain[1]).max() <= 2


def test_one_phrase_of_a_plan_has_nothing_to_be_kept_apart_from_and_is_retained():
    family = tiny_family(StableDiffusion3)
    plain = draw(family, None)
    options = {"phrases": lambda _plan: ["lake"], "step_size": 0.3, "normalize": "abs_max"}
    assert np.abs(draw(family, AStar(**options, retention=0.0)) - plain).max() <= 2
    assert np.abs(draw(family, AStar(**options)) - plain).max() > 2


@pytest.mark.parametrize(("value", "calls"), [(1.0, 3 + 1 + 3 + 1 + 3), (0.0, 5)])
def test_a_move_is_repeated_where_the_paper_does_until_the_value_is_reached(value, calls):
    family = tiny_family(StableDiffusion3)
    published = AttendAndExcite(phrases=PHRASES).refinements
    assert [(part * 50, least) for part, least in published] == [(0, 0.05), (10, 0.5), (20, 0.8)]
    guide = AttendAndExcite(
        phrases=PHRASES, step_size=0.01, most_refinements=2, refinements=[(part, value) for part, _ in published]
    )
    counted = []
    with family.module.register_forward_pre_hook(lambda *_: counted.append(1)):
        draw(family, guide, PLANS[:1], steps=10)
    assert len(counted) == 10 + calls


def test_both_act_beside_regions():
    family = tiny_family(StableDiffusion3)
    plan = aa.Plan(PROMPTS[0], (aa.Region(aa.Box(0, 0, 0.5, 1), "ivy"),))
    regions = draw(family, aa.RegionalAttention(), [plan])
    guides = (
        aa.RegionalAttention(),
        AttendAndExcite(phrases=PHRASES, step_size=0.2, normalize="abs_max"),
        AStar(phrases=PHRASES, step_size=0.2, normalize="abs_max"),
    )
    assert (draw(family, aa.Together(guides), [plan]) != regions).any()


@pytest.mark.parametrize("recipe", [AttendAndExcite, AStar])
def test_a_phrase_that_a_prompt_lacks_is_an_error_before_anything_is_drawn(recipe):
    with pytest.raises(aa.GuideError, match=r"the phrases \['red barn'\] are not in the prompt 'a lake, and in it"):
        draw(tiny_family(StableDiffusion3), recipe(phrases=PHRASES))
    with pytest.raises(aa.ContractError, match="phrases returned 'lake'"):
        draw(tiny_family(StableDiffusion3), recipe(phrases=lambda _: "lake"))


@pytest.mark.parametrize(
    ("recipe", "options", "message"),
    [
        (AttendAndExcite, {"phrases": []}, r"expected a list of one phrase or more"),
        (AttendAndExcite, {"phrases": "cat"}, r"phrases='cat'\): expected a list"),
        (AttendAndExcite, {"phrases": ["cat"], "step_size": math.nan}, r"step_size=nan\): expected a finite number"),
        (AttendAndExcite, {"phrases": ["cat"], "scales": (-1.0, 0.5)}, r"expected two numbers of 0 or more"),
        (AttendAndExcite, {"phrases": ["cat"], "refinements": [(0, 2)]}, r"expected pairs of a part of the steps"),
        (AStar, {"phrases": ["cat"]}, r"expected a list of two phrases or more"),
        (AStar, {"phrases": ["cat", "frog"], "threshold": 0.0}, r"expected a part of each map's maximum"),
    ],
)
def test_what_has_no_meaning_is_refused_when_it_is_made(recipe, options, message):
    with pytest.raises(aa.InvalidValueError, match=message):
        recipe(**options)
