import json

import jsonschema
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import artaug as aa
from artaug.critics import Conversation, Coordinates
from artaug.critics.constrained import SchemaDecoding, fewest_tokens
from support.tiny_llava import tiny_llava

TOKENIZER = tiny_llava()[1].tokenizer
END = TOKENIZER.eos_token_id
DECODING = SchemaDecoding(TOKENIZER, ends=[END])


def spoken(schemas, *, tokens, seed, taste, scored=None):
    """What rows of random scores say, with a taste for the same tokens again."""
    chance = torch.Generator().manual_seed(seed)
    vocabulary = scored or len(TOKENIZER)
    bias = torch.randn(vocabulary, generator=chance) * taste
    keeps, said = DECODING.keeping(schemas, max_new_tokens=tokens), torch.zeros(len(schemas), 1, dtype=torch.long)
    for _ in range(tokens):
        scores = keeps(said, torch.randn(len(schemas), vocabulary, generator=chance) + bias)
        said = torch.cat([said, scores.argmax(-1, keepdim=True)], dim=1)
    return [TOKENIZER.decode(row[: row.index(END)]) for row in said[:, 1:].tolist()]


@settings(max_examples=60)
@given(
    units=st.lists(st.sampled_from(["thousandths", "relative", "pixels", "percent"]), min_size=1, max_size=3),
    order=st.sampled_from(["xyxy", "points"]),
    at_most=st.integers(1, 4),
    spare=st.integers(0, 120),
    seed=st.integers(0, 10_000),
    taste=st.sampled_from([0.1, 1, 5, 20]),
)
def test_any_scores_give_whole_json_on_the_schema_within_any_budget(units, order, at_most, spare, seed, taste):
    schemas = [
        Conversation(coordinates=Coordinates(unit, order=order), max_suggestions=at_most).schema((640, 480))
        for unit in units
    ]
    tokens = max(map(fewest_tokens, schemas)) + spare
    for said, schema in zip(spoken(schemas, tokens=tokens, seed=seed, taste=taste), schemas, strict=True):
        jsonschema.validate(json.loads(said), schema)


def test_no_white_space_is_spent_between_the_parts():
    (said,) = spoken([Conversation().schema((64, 64))], tokens=300, seed=0, taste=1)
    assert said.startswith('{"summary":"')
    assert json.dumps(json.loads(said), separators=(",", ":"), ensure_ascii=False) == said


def test_a_model_may_score_more_tokens_than_there_are_words():
    schema = Conversation().schema((64, 64))
    (said,) = spoken([schema], tokens=fewest_tokens(schema), seed=0, taste=1, scored=len(TOKENIZER) + 64)
    jsonschema.validate(json.loads(said), schema)


def test_a_budget_too_small_for_any_reply_is_refused():
    schema = Conversation().schema((64, 64))
    with pytest.raises(aa.InvalidValueError, match=f"need at least {fewest_tokens(schema)}"):
        DECODING.keeping([schema], max_new_tokens=fewest_tokens(schema) - 1)


def test_a_schema_that_cannot_be_followed_is_refused():
    with pytest.raises(aa.InvalidValueError, match="llguidance cannot follow this schema"):
        DECODING.keeping([{"type": "string", "pattern": "(?<=a)b"}], max_new_tokens=100)


def test_a_token_from_outside_the_schema_is_a_bug():
    keeps = DECODING.keeping([Conversation().schema((64, 64))], max_new_tokens=200)
    scores = torch.zeros(1, len(TOKENIZER))
    keeps(torch.zeros(1, 1, dtype=torch.long), scores)
    with pytest.raises(RuntimeError, match="the schema does not allow"):
        keeps(torch.tensor([[0, TOKENIZER.encode("q")[0]]]), scores)
