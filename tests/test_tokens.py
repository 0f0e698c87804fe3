"""Words of one's own as a value, and their files."""

import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import artaug as aa
from artaug.identity import identity_of


def rows(vectors, width, *, seed=0):
    return torch.randn(vectors, width, generator=torch.Generator().manual_seed(seed))


def tokens(word="<cone>", **encoders):
    return aa.Tokens({word: encoders or {"clip_l": rows(2, 8)}})


def test_a_value_copies_its_rows_and_cannot_be_changed():
    mine = rows(1, 4)
    made = tokens(clip_l=mine)
    digest = made.digest
    mine.zero_()
    assert made.digest == digest
    with pytest.raises(TypeError):
        made.rows["<cone>"]["clip_l"] = mine
    with pytest.raises(AttributeError):
        made.rows = {}


def test_a_digest_sees_words_encoders_and_every_bit():
    first = tokens(clip_l=rows(1, 4))
    nudged = rows(1, 4)
    nudged[0, 3] = torch.nextafter(nudged[0, 3], torch.tensor(9.0))
    others = [tokens("<c>", clip_l=rows(1, 4)), tokens(clip_g=rows(1, 4)), tokens(clip_l=nudged)]
    assert first.digest == pickle.loads(pickle.dumps(first)).digest
    assert len({first.digest, *(other.digest for other in others)}) == 4
    assert identity_of(first, "tokens") == {"tokens": f"Tokens {first.digest}"}


def test_a_repr_is_short_and_names_words_and_encoders():
    assert repr(tokens(clip_l=rows(2, 768), t5xxl=rows(1, 4096))) == "Tokens('<cone>': 2 x 768 clip_l, 1 x 4096 t5xxl)"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({}, "at least one word"),
        ({"<a>": rows(1, 4)}, r"need rows by word, then by text encoder, such as \{'<cone>': \{'clip_l': rows\}\}"),
        ([rows(1, 4)], "need rows by word"),
        ({3: {"clip_l": rows(1, 4)}}, "need rows by word"),
        ({"": {"clip_l": rows(1, 4)}}, "is no word"),
        ({"a cone": {"clip_l": rows(1, 4)}}, "without white space"),
        ({"<a>": {}}, "has no rows"),
        ({"<a>": {"clip_l": torch.ones(4)}}, r"shape \(vectors, width\) .* received torch.float32 of shape \(4,\)"),
        ({"<a>": {"clip_l": torch.ones(1, 4, dtype=torch.long)}}, "received torch.int64"),
        ({"<a>": {"clip_l": torch.ones(0, 4)}}, r"shape \(0, 4\)"),
        ({"<a>": {"clip_l": torch.full((1, 4), torch.nan)}}, "NaN or infinity"),
        ({"<a>": {"clip_l": [1.0]}}, r"received \[1.0\]"),
    ],
)
def test_what_is_no_word_with_rows_is_refused(value, message):
    with pytest.raises(aa.TokensError, match=message):
        aa.Tokens(value)


def test_words_are_joined_and_parted():
    both = tokens("<a>") | tokens("<b>")
    assert both.words == ("<a>", "<b>")
    assert both.only("<b>").digest == tokens("<b>").digest
    with pytest.raises(aa.TokensError, match=r"both have the words \['<a>'\]"):
        both | tokens("<a>")
    with pytest.raises(aa.TokensError, match=r"has no \['<c>'\]"):
        both.only("<c>")


@given(
    layout=st.sampled_from(["diffusers", "a1111", "encoders"]),
    vectors=st.integers(1, 3),
    encoder=st.sampled_from(["clip_l", "clip_g", "t5xxl"]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
def test_a_file_means_what_the_value_meant(tmp_path_factory, layout, vectors, encoder, dtype):
    made = tokens("<my-cone>", **{encoder: rows(vectors, 6).to(dtype)})
    path = made.save(tmp_path_factory.mktemp("files") / "another-name.safetensors", layout=layout)
    assert aa.Tokens.load(path).digest == made.digest


def test_a_word_that_is_the_name_of_an_encoder_is_a_word(tmp_path):
    made = tokens("t5", clip_l=rows(1, 6))
    assert aa.Tokens.load(made.save(tmp_path / "t5.safetensors")).digest == made.digest


def test_the_tensors_of_a_file_have_the_names_of_its_layout(tmp_path):
    one, two = tokens(clip_l=rows(2, 8)), tokens(clip_l=rows(2, 8), clip_g=rows(2, 12), t5xxl=rows(1, 6))
    path = tmp_path / "cone.safetensors"
    assert {name: tuple(t.shape) for name, t in load_file(one.save(path)).items()} == {"<cone>": (2, 8)}
    assert list(load_file(one.save(path, layout="a1111"))) == ["emb_params"]
    assert list(load_file(one.save(path, layout="encoders"))) == ["clip_l"]
    assert sorted(load_file(two.save(path))) == ["clip_g", "clip_l", "t5xxl"]
    assert aa.Tokens.load(path).digest == two.digest


def test_files_of_others_are_read(tmp_path):
    vector, path = rows(1, 8), tmp_path / "my-cone.safetensors"

    save_file({"<cat-toy>": vector[0].contiguous()}, path)  # diffusers, a single row
    assert aa.Tokens.load(path).digest == aa.Tokens({"<cat-toy>": {"any": vector}}).digest
    assert aa.Tokens.load(path, word="<x>", encoder="clip_l").digest == aa.Tokens({"<x>": {"clip_l": vector}}).digest

    save_file({"emb_params": vector}, path)  # A1111: the file's name is the word
    assert aa.Tokens.load(path).words == ("my-cone",)

    save_file({"clip_l": vector, "clip_g": rows(1, 12)}, path)  # kohya and ComfyUI, SDXL
    assert repr(aa.Tokens.load(path)) == "Tokens('my-cone': 1 x 12 clip_g, 1 x 8 clip_l)"

    save_file({"clip_l": vector, "t5": rows(1, 12)}, path)  # diffusers' script for FLUX
    assert set(aa.Tokens.load(path).rows["my-cone"]) == {"clip_l", "t5xxl"}


def test_a_file_that_is_something_else_is_refused(tmp_path):
    path = tmp_path / "file.safetensors"
    with pytest.raises(aa.TokensError, match="could not be read"):
        aa.Tokens.load(path)
    path.write_bytes(b"PK\x03\x04")
    with pytest.raises(aa.TokensError, match="pickled ones"):
        aa.Tokens.load(path)
    save_file({"a.lora_A.weight": rows(1, 4), "a.lora_B.weight": rows(4, 1)}, path)
    with pytest.raises(aa.TokensError, match=r"holds 2 tensors .*is it a LoRA"):
        aa.Tokens.load(path)
    save_file({"clip_l": rows(1, 4)}, path)
    with pytest.raises(aa.TokensError, match="names its text encoders"):
        aa.Tokens.load(path, encoder="clip_g")


def test_what_no_file_holds_is_not_saved(tmp_path):
    path = tmp_path / "file.safetensors"
    with pytest.raises(aa.TokensError, match="a file holds one word, and there are 2"):
        (tokens("<a>") | tokens("<b>")).save(path)
    with pytest.raises(aa.TokensError, match="holds the rows of one text encoder"):
        tokens(clip_l=rows(1, 4), clip_g=rows(1, 4)).save(path, layout="diffusers")
    with pytest.raises(aa.TokensError, match=r"no reader .* knows the text encoder 'mine'"):
        tokens(mine=rows(1, 4)).save(path, layout="encoders")
    with pytest.raises(aa.TokensError, match="layout='pt'"):
        tokens().save(path, layout="pt")
    assert not path.exists()
