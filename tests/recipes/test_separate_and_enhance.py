"""Separate-and-Enhance: its loss by hand, what is trained, what is kept, and that it goes on where it stopped."""

from dataclasses import replace

import pytest
import torch

import artaug as aa
from artaug.diffusion import Flux, StableDiffusion, StableDiffusion3
from artaug.errors import InvalidValueError, PromptError
from artaug.recipes import SeparateAndEnhance, sepen
from artaug.regional import AttentionMaps, LayerMaps
from support.family_laws import family_of, synthesizer_of
from support.tiny_flux import tiny_flux
from support.tiny_sd3 import tiny_sd3
from support.tiny_unet import tiny_sd15

THINGS = {"a red barn and a green door": ["red barn", "green door"]}
KEPT = ["a red barn", "ivy on a door"]
TRAINER = aa.DifferentialLoRATrainer(
    adapter=aa.FullRank(), steps=6, batch_size=1, learning_rate=2e-2, warmup=0, sigma_range=(0.5, 0.52)
)


def synthesizer_named(kind):
    family, build = {
        "sd15": (StableDiffusion, tiny_sd15),
        "sd3": (StableDiffusion3, tiny_sd3),
        "flux": (Flux, tiny_flux),
    }[kind]
    return synthesizer_of(family_of(family, build(), max_sequence_length=77))


def run(kind="sd15", prompts=THINGS, trainer=TRAINER, **options):
    return sepen(prompts, synthesizer=synthesizer_named(kind), trainer=trainer, progress=False, **options)


def maps_of(*layers):
    """Maps of one picture and one head, of layers given as (grid, values of each phrase)."""
    made = [
        LayerMaps(block, grid, torch.tensor(values)[None, :, None].float())
        for block, (grid, values) in enumerate(layers)
    ]
    count = made[0].maps.shape[1]
    return AttentionMaps(0, (("thing",) * count,), tuple(made))


def test_the_loss_of_two_things_is_the_papers_by_hand():
    first, second = [0.0] * 9, [0.0] * 9
    first[4], second[4] = 0.6, 0.3
    blur = 0.3319  # of the kernel's middle: a single value keeps so much of itself
    expected = 1.0 * (0.6 * 0.3 / 0.9) + 0.5 * (1 - 0.3 * blur)
    loss = SeparateAndEnhance()(maps_of(((3, 3), [first, second])), [])
    assert loss.shape == (1,)
    assert loss.item() == pytest.approx(expected, abs=1e-4)
    assert SeparateAndEnhance(enhance=0.0)(maps_of(((3, 3), [first, second])), []).item() == pytest.approx(0.2)


def test_of_three_things_the_worst_pair_counts():
    values = torch.eye(3).repeat(1, 3).tolist()
    values[2] = [0.0, 0.5, 0.0] * 3  # shares tokens with the second alone
    loss = SeparateAndEnhance(enhance=0.0)(maps_of(((3, 3), values)), [])
    assert loss.item() == pytest.approx(0.5 / 1.5)


def test_maps_are_those_of_the_grid_nearest_to_sixteen_by_sixteen_tokens():
    near = ((12, 12), torch.rand(2, 144, generator=torch.Generator().manual_seed(0)).tolist())
    far = [((2, 2), torch.rand(2, 4).tolist()), ((64, 64), torch.rand(2, 4096).tolist())]
    assert torch.equal(SeparateAndEnhance()(maps_of(far[0], near, far[1]), []), SeparateAndEnhance()(maps_of(near), []))


@pytest.mark.parametrize("kind", ["sd15", "sd3", "flux"])
def test_at_test_time_the_loss_of_one_prompt_falls_by_the_keys_of_text_alone(kind):
    result = run(kind)
    assert result.losses[-1] < result.losses[0]
    assert result.lora.layers
    assert all(name.endswith(("attn2.to_k", "attn.add_k_proj")) for name in result.lora.layers)


def test_the_norm_term_keeps_what_prompts_of_one_thing_predict():
    trainer = replace(TRAINER, batch_size=3, steps=8)
    distances = []
    for preserve in (1e-6, 1e3):
        lora = run(trainer=trainer, preserved=KEPT, preserve=preserve).lora
        with synthesizer_named("sd15").training() as model:
            conditioning = model.encode_prompts(KEPT)
            noise = model.initial_noise([0, 1], conditioning)
            arguments = (noise, torch.tensor([0.5, 0.5]), conditioning)
            with torch.no_grad():
                before = model.predict(*arguments)
                with lora.applied_to(model.module):
                    distances.append((model.predict(*arguments) - before).square().mean().item())
    assert distances[1] < distances[0] / 2


def test_the_same_call_goes_on_where_it_stopped(tmp_path):
    short = run(folder=tmp_path)
    assert run(folder=tmp_path).lora.digest == short.lora.digest
    assert run().lora.digest == short.lora.digest


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"prompts": {}}, PromptError, "there are no prompts"),
        (
            {"prompts": {"a red barn": ["red barn"]}},
            InvalidValueError,
            r"has 1 thing\(s\), and two or more are kept apart",
        ),
        ({"prompts": {"a red barn": ["red barn", "cat"]}}, InvalidValueError, r"the phrases \['cat'\]"),
        ({"preserved": ["A red barn and a green door."]}, PromptError, "One cannot change and stay"),
        ({"preserved": KEPT, "preserve": -1.0}, InvalidValueError, "preserve=-1.0"),
        ({"targets": "no_such_layer"}, aa.LoRAMismatchError, "no_such_layer"),
    ],
)
def test_what_cannot_be_learned_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        run(**options)
