"""Where the tokens of a phrase are in an encoded prompt: what the text encoders were given there spells the phrase."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import artaug as aa
from artaug.diffusion.families.flux.family import Flux
from artaug.diffusion.families.flux2.family import Flux2
from artaug.diffusion.families.qwen_image.family import QwenImage
from artaug.diffusion.families.sd3.family import StableDiffusion3
from artaug.diffusion.families.tokenized import TokenizedPrompt
from artaug.diffusion.families.unet.family import StableDiffusion
from artaug.diffusion.families.z_image.family import ZImage
from support.family_laws import family_of
from support.family_pipelines import PIPELINES
from support.tiny_sd3 import tiny_sd3
from support.tiny_unet import tiny_sd15

LONGEST = 192


def tiny_family(kind, **options):
    longest = {ZImage: 96}.get(kind, LONGEST)  # as many positions as the tiny one has
    return family_of(kind, PIPELINES[kind](), width=32, height=32, max_sequence_length=longest, **options)


@pytest.fixture(scope="module", params=PIPELINES, ids=lambda kind: kind.__name__)
def family(request):
    return tiny_family(request.param)


def rows_of_ids(family, prompt):
    """The ids that a family's row of a prompt was made of: a list for each encoder, as the encoder got them."""
    rows, hooks = [], []
    encoders = {name: part for name, part in family.pipeline.components.items() if name.startswith("text_encoder")}
    if isinstance(family, Flux):  # its first encoder gives no tokens
        del encoders["text_encoder"]
    for encoder in encoders.values():

        def record(_encoder, args, kwargs):
            ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
            rows.append(ids[0].tolist())

        if encoder is not None:
            hooks.append(encoder.register_forward_pre_hook(record, with_kwargs=True))
    family.encode_prompts([prompt])
    for hook in hooks:
        hook.remove()
    return rows


def spelled(family, prompt, positions):
    """What the encoders were given at positions of the prompt's row, without spaces: one text for each encoder."""
    pipeline, rows = family.pipeline, rows_of_ids(family, prompt)
    if isinstance(family, StableDiffusion3):
        length = pipeline.tokenizer_max_length
        parts = [(pipeline.tokenizer, rows[0], 0), (pipeline.tokenizer_3, rows[2], length)]
    elif isinstance(family, QwenImage):
        parts = [(pipeline.tokenizer, rows[0], -pipeline.prompt_template_encode_start_idx)]
    elif isinstance(family, Flux):
        parts = [(pipeline.tokenizer_2, rows[0], 0)]
    else:
        parts = [(pipeline.tokenizer, rows[0], 0)]
    texts = []
    for tokenizer, row, first in parts:
        ids = [row[position - first] for position in positions if 0 <= position - first < len(row)]
        texts.append("".join(tokenizer.decode(ids).split()))
    return texts


@pytest.mark.parametrize("prompt", ["a red barn by a lake", "by the lake a Red  barn, and", "red barn"])
def test_the_tokens_of_a_phrase_are_those_that_the_encoders_read_there(family, prompt):
    tokens, absent = family.phrase_tokens(prompt, ["red barn", "green"])
    assert absent == ()
    assert list(tokens) == sorted(set(tokens))
    texts = spelled(family, prompt, tokens)
    assert len(texts) == 1 + isinstance(family, StableDiffusion3)
    assert {text.lower() for text in texts} == {"redbarn"}


def test_tokens_of_a_phrase_belong_to_the_prompt_and_not_to_its_padding(family):
    prompt = "a red barn by a lake"
    (tokens,) = family.phrase_tokens(prompt, ["a red barn by a lake"])
    (own,) = family.token_slices([prompt])
    assert set(tokens) <= set(range(own.start, own.stop))
    row = family.select_prompt(family.encode_prompts([prompt]), 0)["prompt_embeds"]
    assert max(tokens) < row.shape[1]


@pytest.mark.parametrize("word", ["user", "assistant", "color", "objects", "a", "system"])
def test_words_of_the_chat_around_a_prompt_are_not_found(family, word):
    assert family.phrase_tokens("the lake", [word]) == [()]
    (tokens,) = family.phrase_tokens(f"the {word} lake", [word])
    assert {text.lower() for text in spelled(family, f"the {word} lake", tokens)} == {word}


def test_a_phrase_beyond_what_one_encoder_reads_is_found_in_the_other():
    family = tiny_family(StableDiffusion3)
    prompt = "ivy " * 20 + "and a red barn"
    (tokens,) = family.phrase_tokens(prompt, ["red barn"])
    with pytest.warns(UserWarning, match="CLIP reads"):
        assert spelled(family, prompt, tokens) == ["", "redbarn"]


def test_a_model_without_its_second_encoder_has_the_tokens_of_the_first():
    family = family_of(StableDiffusion3, tiny_sd3(has_t5=False), width=32, height=32)
    (tokens,) = family.phrase_tokens("a red barn", ["red barn"])
    assert max(tokens) < family.pipeline.tokenizer_max_length
    assert len(tokens) == len("redbarn")


@pytest.mark.parametrize("kind", [Flux, Flux2, QwenImage, ZImage, StableDiffusion], ids=lambda kind: kind.__name__)
def test_a_phrase_that_is_cut_off_has_no_tokens(kind):
    family = tiny_family(kind)
    assert family.phrase_tokens("ivy " * LONGEST + "red barn", ["red barn"]) == [()]


def test_the_words_of_a_textual_inversion_are_all_its_tokens():
    pipeline = tiny_sd15()
    width = pipeline.text_encoder.config.hidden_size
    pipeline.load_textual_inversion({"<barn>": torch.zeros(3, width)})
    family = family_of(StableDiffusion, pipeline, width=32, height=32, max_sequence_length=LONGEST)
    first, both = family.phrase_tokens("a <barn> by a lake", ["<barn>", "a <barn>"])
    assert len(first) == 3
    assert len(both) == 4


def prompt_of(text):
    """A prompt whose tokens are its characters."""
    characters = tuple((index, index + 1) for index in range(len(text)))
    kept = range(len(text))
    return TokenizedPrompt(text=text, prompt=slice(0, len(text)), characters=characters, first=0, positions_kept=kept)


@pytest.mark.parametrize(
    ("prompt", "phrase", "expected"),
    [
        ("concatenate a cat", "cat", [14, 15, 16]),
        ("a Cat, a cat", "cat", [2, 3, 4, 9, 10, 11]),
        ("a red  cone", "red cone", [2, 3, 4, 5, 6, 7, 8, 9, 10]),
        ("scat cat cat", "cat cat", [5, 6, 7, 8, 9, 10, 11]),
        ("一只红色的猫", "猫", [5]),
        ("2 cats", "cat", []),
        ("cafe\u0301", "cafe", []),
        ("a (red) cone", "(red)", [2, 3, 4, 5, 6]),
        ("a cat", " ", []),
        ("room 12", "1", []),
    ],
)
def test_a_phrase_is_whole_words_in_any_case(prompt, phrase, expected):
    assert prompt_of(prompt).positions(phrase) == expected


@given(st.text(alphabet="ab cÄ猫", max_size=12), st.text(alphabet="ab cÄ猫", min_size=1, max_size=4))
def test_what_is_found_spells_the_phrase_as_often_as_it_stands_there(prompt, phrase):
    found = prompt_of(prompt).positions(phrase)
    padded, wanted = f" {prompt.lower()} ", f" {' '.join(phrase.lower().split())} "
    if wanted.strip() and wanted in " ".join(padded.split(" ")):
        assert found
    letters = {prompt[position].lower() for position in found}
    assert letters - {" "} <= set(phrase.lower())


def test_a_tokenizer_that_does_not_say_where_its_tokens_are_is_an_error():
    family = tiny_family(QwenImage)
    family.pipeline.tokenizer = type("Slow", (), {"is_fast": False})()
    with pytest.raises(aa.GuideError, match="Slow does not say which characters its tokens hold"):
        family.phrase_tokens("a red barn", ["barn"])
