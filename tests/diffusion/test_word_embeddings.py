"""Words of one's own in real pipelines: against diffusers' own textual inversion, and gone without a trace."""

import copy

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import artaug as aa
from artaug import playground
from artaug.diffusion import StableDiffusion3, StableDiffusionXL
from artaug.diffusion.families.chroma.family import Chroma1
from artaug.diffusion.families.flux.family import Flux
from artaug.diffusion.families.flux2.family import Flux2
from artaug.diffusion.families.qwen_image.family import QwenImage
from artaug.diffusion.families.unet.family import StableDiffusion
from artaug.diffusion.families.z_image.family import ZImage
from artaug.identity import identity_of
from support.family_laws import synthesizer_of
from support.family_pipelines import tiny_family

WORD = "<cone>"
PROMPT = f"a {WORD} at night"
READING = [StableDiffusion, StableDiffusionXL, Flux, Chroma1, StableDiffusion3, QwenImage, ZImage]
"""The families whose text encoders take words."""
WITH_LOADER = [StableDiffusion, StableDiffusionXL, Flux, Chroma1]
"""Those for whose pipelines diffusers has ``load_textual_inversion``."""


def encoders(family):
    """Tokenizer and encoder by the encoder's name in files."""
    pipeline = family.pipeline
    return {
        name: (getattr(pipeline, part.replace("text_encoder", "tokenizer")), getattr(pipeline, part))
        for name, part in family.text_encoders.items()
    }


def some_tokens(family, *, word=WORD, vectors=1, seed=0):
    """Random rows for every text encoder, large enough to be seen."""
    generator = torch.Generator().manual_seed(seed)
    widths = {name: encoder.get_input_embeddings().embedding_dim for name, (_, encoder) in encoders(family).items()}
    return aa.Tokens({word: {name: torch.randn(vectors, width, generator=generator) for name, width in widths.items()}})


def pixels(images):
    return np.stack([np.asarray(image) for image in images])


def state_of(pipeline):
    """Everything that a drawing could leave behind in tokenizers and encoders."""
    parts = {name: part for name, part in pipeline.components.items() if name.startswith(("tok", "text_enc"))}
    return {
        name: (
            id(part),
            len(part)
            if name.startswith("tok")
            else [(path, id(m), m.training, sorted(vars(m))) for path, m in part.named_modules()],
            None if name.startswith("tok") else [(path, id(p), p.requires_grad) for path, p in part.named_parameters()],
        )
        for name, part in parts.items()
        if part is not None
    }


@pytest.mark.parametrize("vectors", [1, 3])
@pytest.mark.parametrize("kind", WITH_LOADER)
def test_words_are_read_as_diffusers_reads_them(kind, vectors, tmp_path):
    family = tiny_family(kind)
    tokens = some_tokens(family, vectors=vectors)
    plans = [aa.Plan(PROMPT), aa.Plan(f"{WORD}, or a {WORD}")]
    drawn = synthesizer_of(family, steps=1).with_tokens(tokens).synthesize_batch(plans, seeds=[3, 4])

    for name, (tokenizer, encoder) in encoders(family).items():  # now for good, by diffusers, from our file
        path = aa.Tokens({WORD: {name: tokens.rows[WORD][name]}}).save(tmp_path / f"{name}.safetensors")
        family.pipeline.load_textual_inversion(
            str(tmp_path), weight_name=path.name, tokenizer=tokenizer, text_encoder=encoder
        )
    theirs = synthesizer_of(family, steps=1).synthesize_batch(plans, seeds=[3, 4])
    np.testing.assert_array_equal(pixels(drawn), pixels(theirs))


def rows_like(family, text):
    """The embeddings of a text of as many tokens as it has letters, read by hand, in each encoder."""
    found = {}
    for name, (tokenizer, encoder) in encoders(family).items():
        ids = tokenizer(text, add_special_tokens=False).input_ids
        found[name] = encoder.get_input_embeddings()(torch.tensor(ids)).detach()
    return found


@pytest.mark.parametrize("kind", READING)
def test_a_word_with_the_rows_of_a_known_text_draws_as_that_text(kind):
    # Where a tokenizer marks beginnings and ends of words, the rows of one text stand for it only between spaces.
    family = tiny_family(kind)
    synthesizer = synthesizer_of(family, steps=1)
    as_text = synthesizer.synthesize(aa.Plan("sea"), seed=1)
    as_word = synthesizer.with_tokens(aa.Tokens({WORD: rows_like(family, "sea")})).synthesize(aa.Plan(WORD), seed=1)
    assert pixels([as_word]).tolist() == pixels([as_text]).tolist()


@pytest.mark.parametrize("kind", READING)
def test_words_leave_no_trace_and_reach_every_encoder(kind):
    family = tiny_family(kind)
    synthesizer = synthesizer_of(family, steps=1)
    plain = synthesizer.synthesize(aa.Plan(PROMPT), seed=1)
    before = state_of(family.pipeline)
    tokens = some_tokens(family, vectors=2)
    drawn = synthesizer.with_tokens(tokens).synthesize(aa.Plan(PROMPT), seed=1)
    assert state_of(family.pipeline) == before
    assert pixels([synthesizer.synthesize(aa.Plan(PROMPT), seed=1)]).tolist() == pixels([plain]).tolist()
    encoded = encode(family, tokens)
    for name in tokens.rows[WORD]:
        without = {other: rows for other, rows in tokens.rows[WORD].items() if other != name}
        assert any(
            not torch.equal(column, encoded[key])
            for key, column in encode(family, without and aa.Tokens({WORD: without})).items()
        )
    assert not np.array_equal(pixels([drawn]), pixels([plain]))


def encode(family, tokens):
    if not tokens:
        return family.encode_prompts([PROMPT])
    with family.installed(tokens):
        return family.encode_prompts([PROMPT])


def test_pooled_vectors_are_read_at_the_end_of_the_text():
    # CLIP with the old ``eos_token_id`` of 2, as FLUX.1's, takes the highest id of the prompt for its end.
    new, old = tiny_family(Flux), tiny_family(Flux)
    old.pipeline.text_encoder.eos_token_id = 2
    tokens = some_tokens(new)
    assert torch.equal(encode(old, tokens)["pooled_prompt_embeds"], encode(new, tokens)["pooled_prompt_embeds"])
    assert old.pipeline.text_encoder.eos_token_id == 2


def test_phrases_are_found_with_all_rows_of_a_word():
    family = tiny_family(StableDiffusion)
    with family.installed(some_tokens(family, vectors=3)):
        assert family.phrase_tokens(f"a {WORD} at", [WORD, "at"]) == [(2, 3, 4), (5, 6)]
        assert family.phrase_tokens(f"{WORD} a {WORD}", [WORD, "a"]) == [(1, 2, 3, 5, 6, 7), (4,)]


@pytest.mark.parametrize("kind", [StableDiffusion, Flux])
def test_the_gradient_reaches_the_rows_and_nothing_else(kind):
    family = tiny_family(kind)
    with family.installed(some_tokens(family, vectors=2)) as installed:
        for parameter in installed:
            parameter.requires_grad_()
        sum(column.sum() for column in family.encode_differentiably([PROMPT]).values()).backward()
        assert all((parameter.grad != 0).any(dim=1).all() for parameter in installed)
        assert installed.tokens().words == (WORD,)
    for _, encoder in encoders(family).values():
        assert all(parameter.grad is None and parameter.requires_grad for parameter in encoder.parameters())


@pytest.mark.parametrize("kind", READING)
def test_encodings_with_and_without_gradient_are_the_same(kind):
    family = tiny_family(kind)
    with family.installed(some_tokens(family)):
        kept, fresh = family.encode_prompts([PROMPT]), family.encode_differentiably([PROMPT])
    assert all(torch.equal(kept[name], column) for name, column in fresh.items())


@pytest.fixture(scope="module")
def synthesizer():
    return playground.synthesizer(steps=1)


def test_the_rows_of_a_word_draw_as_the_word(synthesizer):
    tokens = synthesizer.new_tokens("<thing>", like="cone")
    drawn = synthesizer.with_tokens(tokens).synthesize(aa.Plan("a red <thing> at night"), seed=0)
    assert drawn.tobytes() == synthesizer.synthesize(aa.Plan("a red cone at night"), seed=0).tobytes()


def test_words_are_read_in_regions(synthesizer):
    guided = playground.synthesizer(guide=aa.RegionalAttention(), steps=1)
    regions = [aa.Region(aa.Box(0, 0, 0.5, 1), text) for text in ("a <thing>", "a cone")]
    words, plain = (aa.Plan("a red ball at night", (region,)) for region in regions)
    drawn = guided.with_tokens(synthesizer.new_tokens("<thing>", like="cone")).synthesize(words, seed=0)
    assert drawn.tobytes() == guided.synthesize(plain, seed=0).tobytes()


def test_new_rows_are_the_mean_of_the_words_that_they_are_like(synthesizer):
    red, cone, both = (synthesizer.new_tokens("<x>", like=text).rows["<x>"] for text in ("red", "cone", "red cone"))
    for encoder, rows in synthesizer.new_tokens("<x>", like="red cone", vectors=3).rows["<x>"].items():
        assert torch.equal(rows, both[encoder].repeat(3, 1))
        torch.testing.assert_close(both[encoder], (red[encoder] + cone[encoder]) / 2)
    with pytest.raises(aa.TokensError, match="the tokenizer of clip_l does not know 'zebra'"):
        synthesizer.new_tokens("<x>", like="zebra")


def test_words_are_part_of_what_a_synthesizer_is(synthesizer):
    made = [synthesizer.new_tokens("<x>", like=text) for text in ("red", "cone")]
    first, second, again = (synthesizer.with_tokens(tokens) for tokens in (*made, copy.deepcopy(made[0])))
    assert identity_of(first, "s") == identity_of(again, "s") != identity_of(second, "s")
    assert first.fingerprint == again.fingerprint
    assert len({synthesizer.fingerprint, first.fingerprint, second.fingerprint}) == 3
    assert "tokens=Tokens('<x>': 1 x 64 clip_l, 1 x 96 t5xxl)" in repr(first)


def test_what_would_have_no_effect_or_two_meanings_is_refused(synthesizer, tmp_path):
    tokens = synthesizer.new_tokens("<x>", like="cone")
    with pytest.raises(aa.TokensError, match=r"none of the words \['<x>'\] occurs in a prompt \(first: 'a red cone'\)"):
        synthesizer.with_tokens(tokens).synthesize(aa.Plan("a red cone"), seed=0)
    with pytest.raises(aa.TokensError, match=r"both have the words \['<x>'\]"):
        synthesizer.with_tokens(tokens).with_tokens(tokens)
    with pytest.raises(aa.TokensError, match=r"the tokenizer of clip_l knows \['cone'\] already"):
        synthesizer.with_tokens(aa.Tokens({"cone": tokens.rows["<x>"]}))
    assert synthesizer.with_tokens(aa.Tokens({"<cone>": tokens.rows["<x>"]})).tokens  # without signs it would be known
    with pytest.raises(aa.TokensError, match=r"width 5 .*clip_l of width 64, t5xxl of width 96: they fit none of them"):
        synthesizer.with_tokens(aa.Tokens({"<x>": {"any": torch.ones(1, 5)}}))
    with pytest.raises(aa.TokensError, match="for the text encoder 'clip_g'"):
        synthesizer.with_tokens(aa.Tokens({"<x>": {"clip_g": torch.ones(1, 64)}}))
    save_file({"<x>": torch.ones(1, 96)}, tmp_path / "file.safetensors")  # does not say whose rows they are
    assert synthesizer.with_tokens(aa.Tokens.load(tmp_path / "file.safetensors")).tokens.words == ("<x>",)


def test_rows_that_fit_two_encoders_are_refused():
    family = tiny_family(StableDiffusionXL)
    width = family.pipeline.text_encoder_2.config.hidden_size
    family.pipeline.text_encoder = copy.deepcopy(family.pipeline.text_encoder_2)
    with (
        pytest.raises(
            aa.TokensError, match=r"fit several of them, \['clip_l', 'clip_g'\]: load the file with encoder="
        ),
        family.installed(aa.Tokens({WORD: {"any": torch.ones(1, width)}})),
    ):
        pass


def test_a_family_that_does_not_say_which_its_encoders_are_is_refused():
    family = tiny_family(Flux2)
    with pytest.raises(aa.ModelError, match="words cannot be added to a Flux2Pipeline"):
        synthesizer_of(family).with_tokens(aa.Tokens({WORD: {"any": torch.ones(1, 16)}}))


def test_words_are_gone_after_an_error(synthesizer):
    before = state_of(synthesizer.pipeline)
    spoken = synthesizer.with_tokens(synthesizer.new_tokens("<x>", like="cone"))
    with pytest.raises(RuntimeError, match="stop"), spoken.training():
        raise RuntimeError("stop")
    assert state_of(synthesizer.pipeline) == before
