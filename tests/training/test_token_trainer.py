"""Words are learned through frozen text encoders: rows alone or with a LoRA, by any objective, resumed to the bit."""

from dataclasses import dataclass

import pytest
import torch

import artaug as aa
from artaug import playground
from artaug.diffusion import DiffusersSynthesizer, StableDiffusion, StableDiffusionXL
from artaug.diffusion.families.chroma.family import Chroma1
from artaug.diffusion.families.flux2.family import Flux2
from artaug.diffusion.families.qwen_image.family import QwenImage
from artaug.diffusion.families.sd3.family import StableDiffusion3
from artaug.diffusion.families.z_image.family import ZImage
from artaug.training import ReadsTokens, TrainingPrompt
from support.family_laws import picture, synthesizer_of
from support.family_pipelines import tiny_family

WORD = "<thing>"
QUICK = {"steps": 3, "batch_size": 2, "learning_rate": 0.05}


@pytest.fixture(scope="module")
def synthesizer():
    return playground.synthesizer(steps=8)


def pairs(word=WORD, shown="blue cone", count=6):
    """Pictures of one thing in all places, by a caption that has a word in its place."""
    scenes = [
        f"{place} {setting}"
        for place in ("on the left", "in the middle", "on the right")
        for setting in ("at noon", "at night")
    ]
    images = [playground.render(f"a {shown} {scene}", seed=index) for index, scene in enumerate(scenes[:count])]
    return [
        aa.ImagePair(prompt=f"a {word} {scene}", seed=index, before=image, after=image)
        for index, (scene, image) in enumerate(zip(scenes, images, strict=False))
    ]


def train(synthesizer, samples=None, *, tokens=None, seed=0, checkpoints=None, on_step=None, **options):
    trainer = aa.TokenTrainer(**{**QUICK, **options})
    tokens = tokens or synthesizer.new_tokens(WORD, like="red cone")
    return trainer.train(
        samples or pairs(),
        synthesizer,
        tokens=tokens,
        seed=seed,
        checkpoints=checkpoints,
        on_step=on_step,
        progress=False,
    )


def weights(synthesizer):
    return {
        f"{name}.{path}": (parameter.detach().clone(), parameter.requires_grad, parameter.grad)
        for name, part in synthesizer.pipeline.components.items()
        if isinstance(part, torch.nn.Module)
        for path, parameter in part.named_parameters()
    }


def test_a_word_learns_what_pictures_show(synthesizer):
    learned = train(synthesizer, steps=30, batch_size=4).tokens
    drawn = [synthesizer.with_tokens(learned).synthesize(aa.Plan(pair.prompt), seed=50) for pair in pairs()[::2]]
    seen = [[(thing.color, thing.shape, thing.place) for thing in playground.detect(image)] for image in drawn]
    assert seen == [[("blue", "cone", place)] for place in ("on the left", "in the middle", "on the right")]


def test_the_same_seed_gives_the_same_rows_and_the_model_stays_as_it_was(synthesizer):
    before = weights(synthesizer)
    first, again, other = train(synthesizer), train(synthesizer), train(synthesizer, seed=1)
    assert first.tokens.digest == again.tokens.digest != other.tokens.digest
    assert first.lora is None
    after = weights(synthesizer)
    assert after.keys() == before.keys()
    for name, (value, requires_grad, grad) in before.items():
        assert torch.equal(value, after[name][0])
        assert (requires_grad, grad) == after[name][1:]


class KilledError(Exception):
    """In place of a kill."""


@pytest.mark.parametrize("options", [{}, {"rank": 2, "objective": aa.PairedDifference()}], ids=["rows", "with a LoRA"])
def test_a_killed_training_ends_as_one_that_was_not(synthesizer, tmp_path, options):
    def kill(event):
        if event.step == 3:
            raise KilledError

    checkpoints = aa.Checkpoints(folder=tmp_path, every=1)
    whole = train(synthesizer, steps=4, **options)
    with pytest.raises(KilledError):
        train(synthesizer, steps=4, checkpoints=checkpoints, on_step=kill, **options)
    steps = []
    resumed = train(
        synthesizer, steps=4, checkpoints=checkpoints, on_step=lambda event: steps.append(event.step), **options
    )
    assert steps == [3, 4]
    assert resumed.tokens.digest == whole.tokens.digest
    assert resumed.losses == whole.losses
    assert (resumed.lora and resumed.lora.digest) == (whole.lora and whole.lora.digest)
    done = train(synthesizer, steps=4, checkpoints=checkpoints, **options)
    assert done.tokens.digest == whole.tokens.digest


def test_a_checkpoint_of_other_words_is_refused(synthesizer, tmp_path):
    checkpoints = aa.Checkpoints(folder=tmp_path)
    train(synthesizer, checkpoints=checkpoints, steps=1)
    with pytest.raises(aa.StorageError, match=r"belongs to another training \(tokens"):
        train(synthesizer, tokens=synthesizer.new_tokens(WORD, like="ball"), checkpoints=checkpoints, steps=1)


def test_the_first_step_is_that_of_diffusers_own_script(synthesizer):
    """Its loop: encode with the row in the embedding's table, predict, mean squared error, AdamW on the table, other rows put back."""
    word = "zork"  # without signs, which diffusers loses in a tokenizer that takes them for white space
    tokens, pair = synthesizer.new_tokens(word, like="red"), pairs(word, count=1)
    ours = train(synthesizer, pair, tokens=tokens, batch_size=1, steps=1, norm_pull=0.0, learning_rate=0.01)

    caught = {}

    @dataclass(frozen=True)
    class Recorded(aa.Objective):
        def loss(self, model, batch):
            caught.update(batch=batch, schedule=model.noise_schedule)
            return model.predict(batch.noisy(model.noise_schedule), batch.sigmas, batch.conditioning).sum()

    train(synthesizer, pair, tokens=tokens, batch_size=1, steps=1, objective=Recorded())  # its batch has the same noise
    batch, schedule = caught["batch"], caught["schedule"]
    fresh = playground.synthesizer()
    for name, number in (("clip_l", ""), ("t5xxl", "_2")):
        tokenizer, encoder = (getattr(fresh.pipeline, f"{part}{number}") for part in ("tokenizer", "text_encoder"))
        fresh.pipeline.load_textual_inversion(
            {word: tokens.rows[word][name]}, tokenizer=tokenizer, text_encoder=encoder
        )
        encoder.requires_grad_(False)
        encoder.get_input_embeddings().weight.requires_grad_()
    tables = [
        encoder.get_input_embeddings().weight
        for encoder in (fresh.pipeline.text_encoder, fresh.pipeline.text_encoder_2)
    ]
    optimizer = torch.optim.AdamW(tables, lr=0.01, weight_decay=0.0)
    with fresh.training() as model:
        noisy = schedule.add_noise(batch.after, batch.noise, batch.sigmas)
        prediction = model.predict(noisy, batch.sigmas, model.encode_differentiably([pair[0].prompt]))
        loss = torch.nn.functional.mse_loss(prediction.float(), schedule.target(batch.after, batch.noise, batch.sigmas))
        loss.backward()
    norm = torch.cat([table.grad[-1] for table in tables]).norm()
    for table in tables:
        table.grad.div_(norm.clamp(min=1.0))
    optimizer.step()
    assert ours.losses[0] == pytest.approx(loss.item(), rel=1e-5)
    for encoder, table in zip(("clip_l", "t5xxl"), tables, strict=True):
        torch.testing.assert_close(ours.tokens.rows[word][encoder], table[-1:].detach(), rtol=0, atol=2e-4)


def test_norms_are_pulled_to_the_mean_of_the_vocabulary(synthesizer):
    vocabulary = {
        "clip_l": synthesizer.pipeline.text_encoder.get_input_embeddings().weight,
        "t5xxl": synthesizer.pipeline.text_encoder_2.get_input_embeddings().weight,
    }
    large = aa.Tokens({WORD: {name: 100 * torch.ones(1, table.shape[1]) for name, table in vocabulary.items()}})
    still = {"learning_rate": 1e-9, "steps": 1, "tokens": large}
    pulled = train(synthesizer, norm_pull=1.0, **still).tokens.rows[WORD]
    half = train(synthesizer, norm_pull=0.5, **still).tokens.rows[WORD]
    free = train(synthesizer, norm_pull=0.0, **still).tokens.rows[WORD]
    for name, table in vocabulary.items():
        mean, start = table.detach().norm(dim=1).mean(), large.rows[WORD][name].norm()
        torch.testing.assert_close(pulled[name].norm(), mean)
        torch.testing.assert_close(half[name].norm(), (mean * start).sqrt())
        torch.testing.assert_close(free[name].norm(), start)


def test_the_teacher_reads_the_rows_that_training_began_with(synthesizer):
    teachers = []

    @dataclass(frozen=True)
    class Kept(aa.Objective):
        def loss(self, model, batch):
            noisy = torch.ones_like(batch.noise)
            sigmas = torch.full_like(batch.sigmas, 0.5)
            teachers.append(model.teacher_predict(noisy, sigmas, batch.conditioning)[:1])
            return (model.predict(noisy, sigmas, batch.conditioning)[:1] - teachers[0]).square().mean()

    result = train(synthesizer, pairs(count=1), batch_size=1, steps=3, objective=Kept())
    assert all(torch.equal(teacher, teachers[0]) for teacher in teachers)
    assert result.losses[0] < 1e-9 < result.losses[-1] or result.losses[-1] < 1e-9


def test_a_loss_of_attention_reads_all_rows_of_a_word(synthesizer):
    objective = aa.AttentionObjective(
        phrases=[WORD, "ball"], attention_loss=lambda maps, _plans: maps.mean().flatten(2)[:, 0].mean(-1), over="prompt"
    )
    sample = TrainingPrompt(prompt=f"a {WORD} ball at night", size=(64, 64))
    result = train(
        synthesizer,
        [sample],
        tokens=synthesizer.new_tokens(WORD, like="red", vectors=2),
        objective=objective,
        batch_size=1,
    )
    assert result.losses[-1] != result.losses[0]


@pytest.mark.parametrize("kind", [StableDiffusion, StableDiffusionXL, Chroma1, StableDiffusion3, QwenImage, ZImage])
def test_every_family_learns_words(kind):
    family = tiny_family(kind)
    synthesizer = synthesizer_of(family)
    image = picture(width=family.width, height=family.height)
    sample = aa.ImagePair(prompt="a <a> boat", seed=0, before=image, after=image)
    tokens = synthesizer.new_tokens("<a>", like="b", vectors=2)
    learned = train(synthesizer, [sample], tokens=tokens, batch_size=1, steps=1, norm_pull=0.0).tokens
    for encoder, rows in learned.rows["<a>"].items():
        assert (rows != tokens.rows["<a>"][encoder]).any(dim=1).all(), encoder


def test_words_are_learned_beside_words_that_are_there(synthesizer):
    known = synthesizer.new_tokens("<b>", like="blue")
    learned = train(
        synthesizer.with_tokens(known), pairs(f"<b> {WORD}"), tokens=synthesizer.new_tokens(WORD, like="ball"), steps=2
    )
    assert learned.tokens.words == (WORD,)


def test_what_cannot_be_learned_is_refused(synthesizer):
    words = synthesizer.new_tokens(WORD, like="cone")
    with pytest.raises(aa.NothingToLearnError):
        aa.TokenTrainer().train([], synthesizer, tokens=words, seed=0)
    with pytest.raises(aa.TokensError, match=r"the words \['<other>'\] occur in none of the 6 prompts"):
        train(synthesizer, tokens=words | synthesizer.new_tokens("<other>", like="cone"))
    with pytest.raises(aa.InvalidValueError, match="words are learned in one go"):
        train(synthesizer, objective=aa.TwoStage())
    with pytest.raises(aa.ModelError, match="the rows of a word have no scale"):
        train(synthesizer, objective=aa.Bipolar())
    with pytest.raises(aa.ModelError, match="words cannot be added to a Flux2Pipeline"):
        train(synthesizer_of(tiny_family(Flux2)), tokens=words)
    with pytest.raises(aa.InvalidValueError, match="reads pictures"):
        train(synthesizer, [TrainingPrompt(prompt=WORD, size=(64, 64))])
    for wrong in ({"steps": 0}, {"norm_pull": 2.0}, {"rank": 0}, {"learning_rate": 0.0}, {"lora_learning_rate": -1.0}):
        with pytest.raises(aa.InvalidValueError):
            aa.TokenTrainer(**wrong)


def test_a_family_reads_tokens():
    assert isinstance(tiny_family(StableDiffusion), ReadsTokens)
    assert issubclass(DiffusersSynthesizer, aa.Synthesizer)
