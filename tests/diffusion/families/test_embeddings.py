"""Embeddings that guides move, on the tiny model of every family, against diffusers' pipeline called with embeddings of one's own."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch

import artaug as aa
from artaug.errors import ContractError, GuideError, ModelError, NonFiniteError
from artaug.regional import EncodedPlan
from artaug.training.steering import Steering
from support.family_laws import synthesizer_of
from support.family_pipelines import PIPELINES, tiny_family
from support.guiding import no_phrases

PROMPTS = ["a red barn by the lake", "a lake, and in it a red boat at night"]
PLANS = [aa.Plan(prompt) for prompt in PROMPTS]


@pytest.fixture(scope="module", params=PIPELINES, ids=lambda kind: kind.__name__)
def family(request):
    return tiny_family(request.param)


@pytest.fixture(scope="module")
def flux():
    return tiny_family(next(kind for kind in PIPELINES if kind.__name__ == "Flux"))


class Embeds(aa.Guide):
    """Moves embeddings by a function, and notes what it was given."""

    reads_regions = False

    def __init__(self, move, *, declines=False):
        self.move, self.given, self._declines = move, [], declines

    def declines(self, plans):
        return self._declines

    def applied(self, run):
        return nullcontext()

    def embedded(self, embeds, encoded):
        self.given.append((embeds.clone(), encoded))
        return self.move(embeds, encoded)


def moved_phrase(embeds, encoded):
    """The embeddings with those of a phrase moved along one direction."""
    moved = embeds.clone()
    moved[list(encoded.phrase("lake"))] += direction(embeds)
    return moved


def direction(embeds):
    return torch.linspace(-1, 1, embeds.shape[-1], device=embeds.device)


def draw(family, guide, plans=PLANS):
    images = synthesizer_of(family, guide=guide, steps=1).synthesize_batch(plans, seeds=range(len(plans)))
    return np.stack([np.asarray(image) for image in images])


def test_moved_embeddings_draw_what_the_pipeline_draws_with_them_bit_for_bit(family):
    conditioning = family.encode_prompts(PROMPTS)
    edited = conditioning["prompt_embeds"].clone()
    for row, prompt in enumerate(PROMPTS):
        (tokens,) = family.phrase_tokens(prompt, ["lake"])
        edited[row, list(tokens)] += direction(edited)
    reference = family.pipeline(
        **family.pipeline_kwargs({**conditioning, "prompt_embeds": edited}, family.encode_negative(PLANS)),
        width=32,
        height=32,
        num_inference_steps=1,
        generator=[torch.Generator().manual_seed(seed) for seed in range(2)],
        output_type="np",
    ).images
    drawn = draw(family, Embeds(moved_phrase))
    assert (drawn == (reference * 255).round().astype("uint8")).all()
    assert (drawn != draw(family, None)).any()


def test_embeddings_that_stay_as_they_are_draw_the_plain_picture(family):
    guide = Embeds(lambda embeds, _: embeds + 0.0)
    assert (draw(family, guide) == draw(family, None)).all()
    given = torch.stack([embeds for embeds, _ in guide.given])
    torch.testing.assert_close(given, family.encode_prompts(PROMPTS)["prompt_embeds"].float())
    for (_, encoded), plan, tokens in zip(guide.given, PLANS, family.token_slices(PROMPTS), strict=True):
        assert encoded.plan is plan
        assert encoded.token_slice == tokens
        assert [encoded.phrase("lake")] == family.phrase_tokens(plan.prompt, ["lake"])


def test_guides_move_one_after_the_other_and_one_that_declines_does_not(flux):
    once, gone = Embeds(moved_phrase), Embeds(moved_phrase, declines=True)
    both = draw(flux, Embeds(lambda embeds, encoded: moved_phrase(moved_phrase(embeds, encoded), encoded)))
    assert (draw(flux, aa.Together((once, gone, once))) == both).all()
    assert not gone.given


def test_a_guide_may_change_what_it_was_given_in_place(flux):
    def in_place(embeds, encoded):
        embeds[list(encoded.phrase("lake"))] += direction(embeds)
        return embeds

    assert (draw(flux, Embeds(in_place)) == draw(flux, Embeds(moved_phrase))).all()
    assert (draw(flux, None) != draw(flux, Embeds(moved_phrase))).any()  # what is kept of the encoders is unchanged


@pytest.mark.parametrize(
    ("move", "error", "match"),
    [
        pytest.param(
            lambda embeds, _: embeds[1:], ContractError, r"Embeds.embedded returned embeddings of shape \(", id="shape"
        ),
        pytest.param(lambda *_: None, ContractError, "Embeds.embedded returned None", id="nothing"),
        pytest.param(lambda embeds, _: embeds / 0, NonFiniteError, "to NaN or infinity", id="not finite"),
        pytest.param(
            lambda embeds, encoded: embeds * len(encoded.phrase("a tower")),
            GuideError,
            "'a tower'",
            id="no such phrase",
        ),
    ],
)
def test_what_cannot_be_drawn_is_refused(flux, move, error, match):
    with pytest.raises(error, match=match):
        draw(flux, Embeds(move))


def test_a_training_refuses_a_guide_that_moves_embeddings(flux):
    guide = aa.Together((Embeds(moved_phrase),))
    with (
        pytest.raises(ModelError, match="Together moves the embeddings of prompts"),
        Steering().guided(flux, guide, PLANS, flux.encode_prompts(PROMPTS)),
    ):
        pass


def test_an_encoded_plan_shows_its_plan():
    encoded = EncodedPlan(aa.Plan("a lake"), slice(0, 3), no_phrases)
    assert repr(encoded).startswith("EncodedPlan(plan=Plan(")
