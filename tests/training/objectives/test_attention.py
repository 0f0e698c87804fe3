"""Attention in training: exact maps of the student, their gradients, and trainings on prompts without pictures."""

from dataclasses import replace

import pytest
import torch

import artaug as aa
from artaug.diffusion.families.flux.family import Flux
from artaug.diffusion.families.sd3.family import StableDiffusion3
from artaug.diffusion.families.unet.family import StableDiffusion
from artaug.errors import ContractError, InvalidValueError, ModelError
from artaug.regional.attention_losses import enhance_loss, separate_loss
from artaug.training import PairBatch, TrainingPrompt
from artaug.training.batches import EncodedPairs
from artaug.training.config import TrainingConfig
from artaug.training.injection import inject_adapter
from support.family_laws import HEIGHT, WIDTH, family_of, picture, record_calls, synthesizer_of
from support.tiny_flux import tiny_flux
from support.tiny_sd3 import tiny_sd3
from support.tiny_unet import tiny_sd15

KEYS = r"attn2\.to_k|add_k_proj"
KINDS = {"flux": (Flux, tiny_flux), "sd15": (StableDiffusion, tiny_sd15), "sd3": (StableDiffusion3, tiny_sd3)}
each_kind = pytest.mark.parametrize("kind", KINDS)
BARN, DOOR = "a red barn and a green door", "ivy on a red door"
TWO = {BARN: ["red barn", "green door"], DOOR: ["ivy", "red door"]}


def family_named(kind):
    family, build = KINDS[kind]
    return family_of(family, build(), max_sequence_length=77)


def apart(maps, _plans):
    finest = max(layer.grid for layer in maps.layers)
    of_finest = torch.stack([layer.maps for layer in maps.layers if layer.grid == finest]).mean(0)
    return separate_loss(of_finest) + 0.5 * enhance_loss(of_finest, finest, smoothing=None)


def objective_of(**options):
    return aa.AttentionObjective(
        **{"phrases": lambda plan: TWO[plan.prompt], "attention_loss": apart, "over": "prompt", **options}
    )


def prompts_of(*prompts, **options):
    return [
        TrainingPrompt(prompt=prompt, size=(WIDTH, HEIGHT), seed=seed, **options) for seed, prompt in enumerate(prompts)
    ]


def batch_of(family, samples, objective, *, index=0, **options):
    config = TrainingConfig(objective=objective, batch_size=len(samples), **options)
    encoded = EncodedPairs.encode(family, samples, micro_batch_size=2, objective=objective)
    (step,) = encoded.batches(family, range(len(samples)), config, seed=0, indices=[index])
    (batch,) = step.micro_batches
    return batch


def student_of(family, *, targets=KEYS):
    generator = torch.Generator().manual_seed(0)
    return inject_adapter(family, rank=2, targets=targets, generator=generator)


def perturb(student):
    generator = torch.Generator().manual_seed(1)
    for factor in student.parameters():
        factor.data += 0.3 * torch.randn(factor.shape, generator=generator)


def trained(family, samples, objective, **options):
    arguments = {name: options.pop(name) for name in ("checkpoints", "on_step", "cache") if name in options}
    settings = {"rank": 2, "steps": 4, "batch_size": 2, "learning_rate": 1e-2, "targets": KEYS, **options}
    trainer = aa.DifferentialLoRATrainer(objective=objective, **settings)
    return trainer.train(samples, synthesizer_of(family), seed=0, progress=False, **arguments)


@each_kind
def test_the_gradient_is_that_of_finite_differences(kind):
    family = family_named(kind)
    family.pipeline.to(torch.float64)
    objective = objective_of(preserve=0.5, phrases=lambda plan: TWO.get(plan.prompt, ()))
    batch = batch_of(family, prompts_of(BARN, DOOR, "a barn"), objective)
    batch = replace(batch, noise=batch.noise.double(), sigmas=batch.sigmas.double())
    with student_of(family) as student:
        perturb(student)
        objective.loss(student, batch).backward()
        parameters = [parameter for parameter in student.parameters() if parameter.grad.norm() > 0]
        assert parameters
        for parameter in parameters[:4]:
            direction = parameter.grad / parameter.grad.norm()
            losses = []
            for step in (1e-3, -1e-3):
                moved = parameter.detach() + step * direction
                original, parameter.data = parameter.data, moved
                losses.append(objective.loss(student, batch).item())
                parameter.data = original
            slope = (losses[0] - losses[1]) / 2e-3
            assert slope == pytest.approx(parameter.grad.norm().item(), rel=2e-3)


def test_the_maps_are_the_softmax_of_the_students_own_queries_and_keys():
    family, seen, projected = family_named("sd15"), [], {}
    objective = objective_of(attention_loss=lambda maps, plans: seen.append(maps) or apart(maps, plans), heads=True)
    batch = batch_of(family, prompts_of(BARN, DOOR), objective)
    with student_of(family) as student:
        perturb(student)
        attention = family.module.mid_block.attentions[0].transformer_blocks[0].attn2
        for name in ("to_q", "to_k"):
            layer = getattr(attention, name)
            layer.register_forward_hook(lambda _layer, _args, output, name=name: projected.update({name: output}))
        objective.loss(student, batch)
        query, key = (projected[name].unflatten(-1, (attention.heads, -1)).transpose(1, 2) for name in ("to_q", "to_k"))
    probs = (query @ key.mT * query.shape[-1] ** -0.5).softmax(dim=-1)
    layer = next(layer for layer in seen[0].layers if layer.maps.shape[-1] == query.shape[2])
    for row, tokens in enumerate(batch.phrase_tokens):
        for number, of_phrase in enumerate(tokens):
            dense = probs[row, :, :, list(of_phrase)].sum(dim=-1)
            same = [one.maps[row, number] for one in seen[0].layers if one.maps.shape[1:] == layer.maps.shape[1:]]
            assert any(torch.allclose(maps, dense, atol=1e-5) for maps in same)


@each_kind
def test_the_loss_falls_on_prompts_without_pictures_and_the_model_is_as_before(kind):
    family = family_named(kind)
    before = {name: tensor.clone() for name, tensor in family.module.state_dict().items()}
    options = {"steps": 8, "learning_rate": 0.1, "sigma_range": (0.5, 0.52), "own_noise": True}
    result = trained(family, prompts_of(BARN, DOOR), objective_of(), **options)
    assert result.losses[-1] < result.losses[0] - 1e-3
    assert all(torch.equal(tensor, before[name]) for name, tensor in family.module.state_dict().items())
    assert all(name.endswith(("attn2.to_k", "attn.add_k_proj")) for name in result.lora.layers)


@each_kind
def test_gradient_checkpointing_changes_no_step(kind):
    objective = objective_of(preserve=1.0, phrases=lambda plan: TWO.get(plan.prompt, ()))
    samples = prompts_of(BARN, DOOR, "a barn", "a door")
    plain, saving = (
        trained(family_named(kind), samples, objective, gradient_checkpointing=saves) for saves in (False, True)
    )
    assert saving.losses == pytest.approx(plain.losses, rel=1e-4)
    for name, layer in plain.lora.layers.items():
        torch.testing.assert_close(saving.lora.layers[name].delta(), layer.delta(), rtol=1e-3, atol=1e-5)


def test_rows_with_two_and_three_phrases_and_with_none_count_the_same_in_any_micro_batch():
    phrases = {**TWO, "a red barn, a green door and ivy": ["red barn", "green door", "ivy"], "a barn": []}
    objective = objective_of(preserve=1.0, phrases=lambda plan: phrases[plan.prompt])
    samples = prompts_of(*phrases)
    together, apart_ = (
        trained(family_named("flux"), samples, objective, batch_size=4, micro_batch_size=size) for size in (None, 1)
    )
    assert apart_.losses == pytest.approx(together.losses, rel=1e-4)


@pytest.mark.parametrize("cached", [False, True])
def test_a_training_that_was_killed_ends_with_the_same_bits(tmp_path, cached):
    class KilledError(Exception):
        pass

    def kill(event):
        if event.step == 3:
            raise KilledError

    objective = objective_of(preserve=1.0, phrases=lambda plan: TWO.get(plan.prompt, ()))
    samples = [*prompts_of(BARN, DOOR, "a barn"), aa.ImagePair.unchanged(picture(), prompt=DOOR, seed=5)]
    options = {"own_noise": True, "echo": 2, "steps": 6, **({"cache": tmp_path / "cache"} if cached else {})}
    whole = trained(family_named("flux"), samples, objective, **options)
    checkpoints = aa.Checkpoints(folder=tmp_path / "state", every=2)
    with pytest.raises(KilledError):
        trained(family_named("flux"), samples, objective, checkpoints=checkpoints, on_step=kill, **options)
    resumed = trained(family_named("flux"), samples, objective, checkpoints=checkpoints, **options)
    assert resumed.losses == whole.losses
    assert resumed.lora.digest == whole.lora.digest


class NeedsOwnNoise(aa.Objective):
    """Learns to predict zero from what each row is drawn from."""

    reads_pictures, reads_own_noise = False, True

    def loss(self, model, batch):
        return model.predict(batch.own_noise, torch.ones_like(batch.sigmas), batch.conditioning).square().mean()


@each_kind
def test_own_noise_is_what_the_synthesizer_draws_from(kind):
    family = family_named(kind)
    batch = batch_of(family, prompts_of(BARN, DOOR), NeedsOwnNoise())
    assert not torch.equal(batch.noise, batch.own_noise)
    seeds = {sample.prompt: sample.seed for sample in prompts_of(BARN, DOOR)}
    for plan, noise in zip(batch.plans, batch.own_noise, strict=True):
        with record_calls(family.module) as calls:
            synthesizer_of(family).synthesize(plan, seed=seeds[plan.prompt])
        arguments, _ = calls[0]
        drawn_from = arguments["sample" if kind == "sd15" else "hidden_states"][-1]
        assert torch.equal(noise, drawn_from.float())


def test_an_objective_gets_what_it_reads_and_nothing_else():
    family = family_named("flux")
    region = aa.Region(aa.Box(0, 0, 0.5, 1), "ivy")
    samples = [
        *prompts_of(BARN, plan=aa.Plan("another prompt", (region,))),
        aa.ImagePair(prompt=BARN, before=picture(1), after=picture(2), plan=aa.Plan("vivid", (region,))),
    ]
    plain = batch_of(family, samples[1:], aa.PairedDifference())
    assert isinstance(plain, PairBatch)
    assert (plain.phrase_tokens, plain.own_noise) == (None, None)
    for sample in samples:
        batch = batch_of(family, [sample], objective_of())
        assert batch.plans == (aa.Plan(BARN, (region,)),)
        assert batch.phrase_tokens == (tuple(map(tuple, family.phrase_tokens(BARN, TWO[BARN]))),)
        assert isinstance(batch, PairBatch) == isinstance(sample, aa.ImagePair)
        assert torch.equal(batch.noise, plain.noise)
        assert torch.equal(batch.region_mask, plain.region_mask)


def test_prompts_and_pairs_are_in_batches_of_their_own_each_as_often_as_it_should_be():
    kinds = []

    class Seen(NeedsOwnNoise):
        def loss(self, model, batch):
            kinds.extend([isinstance(batch, PairBatch)] * len(batch.sigmas))
            return super().loss(model, batch)

    pairs = [aa.ImagePair.unchanged(picture(seed), prompt=DOOR, seed=seed) for seed in range(2)]
    trained(family_named("flux"), [*prompts_of(BARN, DOOR), *pairs], Seen(), steps=4, targets="to_k")
    assert len(kinds) == 8
    assert kinds.count(True) == 4
    assert all(first == second for first, second in zip(kinds[::2], kinds[1::2], strict=True))


def test_without_pictures_noisy_latents_are_distributed_as_noised_normal_latents():
    family = family_named("sd15")
    batch = batch_of(family, prompts_of(BARN), objective_of())
    noise, clean = torch.randn(2, 1, 40_000, generator=torch.Generator().manual_seed(0))
    wide = replace(batch, noise=noise, sigmas=torch.tensor([0.3]))
    for schedule in (aa.training.FlowMatching(), aa.training.EpsilonPrediction()):
        for std in (1.0, 0.18):
            drawn_twice = schedule.add_noise(std * clean, noise, wide.sigmas)
            assert wide.noisy(schedule, latent_std=std).std() == pytest.approx(drawn_twice.std().item(), rel=0.02)
    ones = replace(wide, sigmas=torch.ones(1))
    assert torch.equal(ones.noisy(aa.training.FlowMatching()), noise)


def test_another_objective_is_minimized_by_the_same_predictions():
    family = family_named("flux")
    pairs = [aa.ImagePair(prompt=prompt, before=picture(1), after=picture(2)) for prompt in TWO]
    for inner in (aa.PairedDifference(at_before=0.5), aa.SupervisedFineTuning()):
        both, none = objective_of(objective=inner, weight=2.0), objective_of(objective=inner, weight=0.0)
        batch = batch_of(family, pairs, both)
        with student_of(family) as student:
            perturb(student)
            with record_calls(family.module) as calls:
                total = both.loss(student, batch)
            made = len(calls)
            with record_calls(family.module) as calls:
                alone = inner.loss(student, batch)
            assert made == len(calls)
            torch.testing.assert_close(none.loss(student, batch), alone)
            once = objective_of().loss(student, batch)
            if inner == aa.SupervisedFineTuning():
                torch.testing.assert_close(total, alone + 2 * once)
        results = [trained(family, pairs, both, gradient_checkpointing=saves) for saves in (False, True)]
        assert results[0].losses == pytest.approx(results[1].losses, rel=1e-4)


@pytest.mark.parametrize(
    ("samples", "objective", "message"),
    [
        (prompts_of(BARN), aa.PairedDifference(), r"PairedDifference reads pictures, and pairs\[0\], TrainingPrompt\("),
        (prompts_of(BARN), objective_of(objective=aa.PairedPreference()), "AttentionObjective reads pictures"),
        (prompts_of(BARN), objective_of(phrases=["blue cone"]), r"the phrases \['blue cone'\] of pairs\[0\]"),
        (prompts_of(BARN), objective_of(phrases=lambda _plan: []), "gives no phrases of 'a red barn and a green door'"),
        ([TrainingPrompt(prompt=BARN, size=(24, 32))], NeedsOwnNoise(), "objective=NeedsOwnNoise draws .* has none"),
    ],
)
def test_what_an_objective_does_not_find_is_refused_before_anything_is_encoded(
    samples, objective, message, monkeypatch
):
    monkeypatch.setattr(Flux, "encode_prompts", lambda *_args: pytest.fail("a prompt was encoded"))
    with pytest.raises(InvalidValueError, match=message):
        trained(family_named("flux"), samples, objective)


def test_a_model_into_which_nothing_looks_is_refused(make_model):
    samples = [TrainingPrompt(prompt=BARN, size=(4, 4))]
    trainer = aa.DifferentialLoRATrainer(objective=objective_of(), targets="blocks")
    with pytest.raises(ModelError, match="TinyModel has no `denoiser` and `phrase_tokens`"):
        trainer.train(samples, make_model(), seed=0, progress=False)


def test_a_loss_that_is_not_a_value_for_each_row_is_refused():
    objective = objective_of(attention_loss=lambda maps, plans: apart(maps, plans).mean())
    with pytest.raises(ContractError, match=r"attention_loss returned a tensor of shape \(\) .* shape \(2,\)"):
        trained(family_named("flux"), prompts_of(BARN, DOOR), objective)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"phrases": []}, "would read nothing"),
        ({"weight": -1.0}, r"weight=-1.0"),
        (
            {"preserve": 1.0, "objective": aa.PairedDifference()},
            "the objective says what is learned from pairs without",
        ),
        ({"objective": aa.TwoStage()}, "an objective with a loss alone"),
    ],
)
def test_settings_without_a_meaning_are_refused(options, message):
    with pytest.raises(InvalidValueError, match=message):
        objective_of(**options)


class Mixed(aa.Objective):
    """Predicts under a probe, and without it."""

    reads_pictures = False

    def loss(self, model, batch):
        probe = aa.AttentionProbe(phrases=["red"], receive=lambda _maps: None)
        noisy = batch.noisy(model.noise_schedule)
        arguments = (noisy, batch.sigmas, batch.conditioning)
        plain = model.predict(*arguments)
        guided = model.predict_guided(*arguments, guide=probe, plans=batch.plans)
        assert torch.equal(model.predict(*arguments), plain)
        return (plain + guided).square().mean()


def test_a_guide_acts_on_its_own_prediction_alone():
    result = trained(family_named("flux"), prompts_of(BARN, DOOR), Mixed(), targets="to_k")
    assert len(result.losses) == 4
    with pytest.raises(ModelError, match="with gradient checkpointing all have to be under the guide"):
        trained(family_named("flux"), prompts_of(BARN), Mixed(), targets="to_k", gradient_checkpointing=True)


def test_a_guide_that_reads_regions_is_refused():
    class Regional(Mixed):
        def loss(self, model, batch):
            return model.predict_guided(
                batch.noise, batch.sigmas, batch.conditioning, guide=aa.RegionalAttention(), plans=batch.plans
            ).mean()

    with pytest.raises(ModelError, match="RegionalAttention reads regions, whose prompts are not encoded in training"):
        trained(family_named("flux"), prompts_of(BARN), Regional(), targets="to_k")
