import math
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

import artaug as aa
from artaug.scorers import ClipScore, DualEncoder, LoadOptions, SiglipScore
from artaug.scoring import score_images
from artaug.testing import check_scorer
from support.tiny_clip import LONGEST
from support.tiny_scorers import saved, tiny_clip, tiny_dino, tiny_siglip

PROMPTS = ["a red ball", "fog", "a wall", "two dogs"]


def pictures(count=4, size=(40, 32)):
    generator = np.random.default_rng(0)
    return [Image.fromarray(generator.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)) for _ in range(count)]


def encoder(make=tiny_clip, *, batch_size=16, **options):
    model, images, words = make(**options)
    return DualEncoder(model=model, image_processor=images, tokenizer=words, name="tiny", batch_size=batch_size)


def own_logits(make, images, prompts, *, seed=0):
    """The logits of each pair by the forward method of transformers."""
    model, image_processor, tokenizer = make(seed=seed)
    text = tokenizer(prompts, padding="max_length", max_length=LONGEST, return_tensors="pt")
    with torch.no_grad():
        out = model(
            input_ids=text["input_ids"], pixel_values=image_processor(images, return_tensors="pt")["pixel_values"]
        )
    return model, out.logits_per_image.diagonal()


def test_a_clip_score_is_a_hundred_times_the_cosine_that_the_model_computes_itself():
    expected, scores = [], []
    for seed in (3, 4, 5):
        model, logits = own_logits(tiny_clip, pictures(), PROMPTS, seed=seed)
        expected += (100 * (logits / model.logit_scale.exp()).clamp(min=0)).tolist()
        scores += ClipScore(encoder=encoder(seed=seed)).score_batch(pictures(), PROMPTS)
    assert scores == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert len(set(expected)) > 4


def test_a_clip_score_is_never_negative():
    scores = [ClipScore(encoder=encoder(seed=seed)).score_batch(pictures(), PROMPTS) for seed in range(6)]
    cosines = [encoder(seed=seed).cosines(pictures(), PROMPTS) for seed in range(6)]
    assert min(map(min, scores)) == 0 > min(map(min, cosines))


def test_a_siglip_score_is_the_probability_that_the_model_computes_itself():
    _, logits = own_logits(tiny_siglip, pictures(), PROMPTS)
    scores = SiglipScore(encoder=encoder(tiny_siglip)).score_batch(pictures(), PROMPTS)
    assert scores == pytest.approx(logits.sigmoid().tolist(), abs=1e-5)
    assert len(set(scores)) == 4


def test_a_siglip_2_reads_lower_case_as_it_was_trained():
    second = encoder(tiny_siglip)  # its tokenizer keeps the case, as Gemma's, which SigLIP 2 has, does
    assert torch.equal(second.embed_texts(["A Red BALL"]), second.embed_texts(["a red ball"]))


def test_a_siglip_attends_to_its_padding():
    siglip = encoder(tiny_siglip)
    short = siglip.tokenizer(["fog"], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        bare = torch.nn.functional.normalize(siglip.model.get_text_features(input_ids=short).pooler_output, dim=-1)
    assert not torch.allclose(bare, siglip.embed_texts(["fog"]), atol=1e-2)


@pytest.mark.filterwarnings("ignore:tiny reads 32 tokens")  # its tokenizer needs many tokens for some scripts
@pytest.mark.parametrize(("make", "kind"), [(tiny_clip, ClipScore), (tiny_siglip, SiglipScore)])
def test_it_passes_the_scorer_checks(make, kind):
    check_scorer(kind(encoder=encoder(make, batch_size=4)))


@pytest.mark.parametrize(("make", "kind"), [(tiny_clip, ClipScore), (tiny_siglip, SiglipScore)])
def test_a_saved_checkpoint_scores_as_the_model_did(make, kind, tmp_path):
    folder = saved(tmp_path, *make())
    loaded = kind.from_pretrained(folder, options=LoadOptions(batch_size=3))
    before = kind(encoder=encoder(make)).score_batch(pictures(), PROMPTS)
    assert loaded.score_batch(pictures(), PROMPTS) == pytest.approx(before, abs=1e-5)
    assert folder in loaded.name
    assert loaded.depends_on == {loaded.name}


def test_vectors_of_half_precision_weights_are_float32_and_of_length_1(tmp_path):
    half = DualEncoder.from_pretrained(
        saved(tmp_path, *tiny_clip()), options=LoadOptions(dtype=torch.bfloat16, device="cpu")
    )
    vectors = half.embed_images(pictures())
    assert half.model.dtype == torch.bfloat16
    assert vectors.dtype == torch.float32
    assert torch.allclose(vectors.norm(dim=-1), torch.ones(4), atol=1e-6)


def test_the_batch_size_changes_nothing():
    single, batched = encoder(batch_size=1), encoder(batch_size=7)
    assert single.cosines(pictures(), PROMPTS) == pytest.approx(batched.cosines(pictures(), PROMPTS), abs=1e-6)


@pytest.mark.parametrize("size", [(1, 1), (3, 50), (50, 3), (1, 40), (200, 1)])
def test_a_picture_as_high_as_its_channels_is_not_taken_as_channels_first(size):
    thin = pictures(1, size)[0]
    wide = encoder().image_processor(thin.resize((56, 56)), return_tensors="pt")["pixel_values"]
    assert wide.shape == (1, 3, 28, 28)
    assert math.isfinite(ClipScore(encoder=encoder()).score(thin, "a line"))
    grey = Image.new("RGB", size, (10, 120, 250))
    square = Image.new("RGB", (28, 28), (10, 120, 250))
    assert torch.allclose(encoder().embed_images([grey]), encoder().embed_images([square]), atol=1e-5)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1"])
def test_a_picture_of_another_mode_scores_as_its_rgb(mode):
    odd = Image.new("RGB", (30, 30), "red").convert(mode)
    score = ClipScore(encoder=encoder())
    assert score.score(odd, "x") == pytest.approx(score.score(odd.convert("RGB"), "x"))


@pytest.mark.parametrize("make", [tiny_clip, tiny_siglip])
def test_a_prompt_that_is_too_long_is_truncated_with_a_warning_that_quotes_the_rest(make):
    dual, prompt = encoder(make), "a" * (LONGEST + 3)
    with pytest.warns(UserWarning, match=r"tiny reads 32 tokens and the prompt 'a+' has \d\d: cut off.* is 'a[a ]*'"):
        assert dual.embed_texts([prompt, prompt]).shape == (2, dual.embed_texts(["a"]).shape[1])


def test_a_prompt_that_just_fits_is_not_warned_of():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder().embed_texts(["a" * (LONGEST - 2)])


def test_pictures_and_prompts_that_differ_in_number_are_refused():
    with pytest.raises(aa.InvalidValueError, match=r"4 pictures and 2 prompts"):
        ClipScore(encoder=encoder()).score_batch(pictures(), PROMPTS[:2])


def test_no_pictures_get_no_scores():
    assert ClipScore(encoder=encoder()).score_batch([], []) == []


def test_one_bad_picture_of_a_batch_is_named():
    with pytest.raises(aa.InvalidValueError, match=r"0 x 5") as caught:
        ClipScore(encoder=encoder()).score_batch([*pictures(2), Image.new("RGB", (0, 5))], PROMPTS[:3])
    assert caught.value.__notes__ == ["It is picture 3 of 3."]


@pytest.mark.parametrize(("make", "kind"), [(tiny_clip, ClipScore), (tiny_siglip, SiglipScore)])
def test_a_model_that_returns_nan_is_caught_by_score_images(make, kind):
    dual = encoder(make)
    with torch.no_grad():
        next(dual.model.text_model.parameters()).fill_(torch.nan)
    with pytest.raises(aa.NonFiniteError, match=r"returned nan for picture \d+ \('a red ball'\)"):
        score_images(kind(encoder=dual), pictures(), PROMPTS)


def test_siglip_scores_need_a_siglip():
    with pytest.raises(aa.ModelError, match=r"'tiny' is not a SigLIP.*ClipScore"):
        SiglipScore(encoder=encoder())


def test_a_model_in_training_mode_is_refused():
    model, images, words = tiny_clip()
    with pytest.raises(aa.ModelError, match=r"training mode"):
        DualEncoder(model=model.train(), image_processor=images, tokenizer=words)


def test_a_batch_size_below_1_is_refused():
    with pytest.raises(aa.InvalidValueError, match=r"batch_size=0"):
        encoder(batch_size=0)


def test_a_model_without_a_text_tower_is_refused_before_its_weights_are_read(tmp_path):
    with pytest.raises(aa.ModelError, match=r"is a 'dinov2' model. Expected one of clip, siglip"):
        DualEncoder.from_pretrained(saved(tmp_path, *tiny_dino()))


def test_pickled_weights_are_refused(tmp_path):
    model, images, words = tiny_clip()
    folder = saved(tmp_path, model, images, words)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(aa.ModelError, match=r"safetensors"):
        ClipScore.from_pretrained(folder)


def test_an_incomplete_checkpoint_is_refused(tmp_path):
    model, images, words = tiny_clip()
    saved(tmp_path, images, words)
    partial = {name: weight for name, weight in model.state_dict().items() if "visual_projection" not in name}
    model.save_pretrained(tmp_path, state_dict=partial)
    with pytest.raises(aa.ModelError, match=r"lacks 1 of the weights of .*'visual_projection.weight'"):
        ClipScore.from_pretrained(str(tmp_path))


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(aa.ModelError, match=r"nowhere"):
        ClipScore.from_pretrained(str(tmp_path / "nowhere"))
