"""Constrained decoding: complete JSON on the schema, whatever the scores and the token budget."""

import json

import jsonschema
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import artaug as aa
from artaug.critics import Conversation, Coordinates
from artaug.critics.constrained import SchemaDecoding, min_tokens
from support.tiny_llava import tiny_llava

TOKENIZER = tiny_llava()[1].tokenizer
EOS = TOKENIZER.eos_token_id
DECODING = SchemaDecoding(TOKENIZER, eos_token_ids=[EOS])


def decoded_replies(schemas, *, max_new_tokens, seed, bias_scale, vocab_size=None):
    """The replies of random scores with a constant bias, so that the same tokens come again and again."""
    generator = torch.Generator().manual_seed(seed)
    vocab_size = vocab_size or len(TOKENIZER)
    bias = torch.randn(vocab_size, generator=generator) * bias_scale
    processor = DECODING.logits_processor(schemas, max_new_tokens=max_new_tokens)
    tokens = torch.zeros(len(schemas), 1, dtype=torch.long)
    for _ in range(max_new_tokens):
        scores = processor(tokens, torch.randn(len(schemas), vocab_size, generator=generator) + bias)
        tokens = torch.cat([tokens, scores.argmax(-1, keepdim=True)], dim=1)
    return [TOKENIZER.decode(row[: row.index(EOS)]) for row in tokens[:, 1:].tolist()]


@settings(max_examples=60)
@given(
    units=st.lists(st.sampled_from(["thousandths", "relative", "pixels", "percent"]), min_size=1, max_size=3),
    order=st.sampled_from(["xyxy", "points"]),
    max_suggestions=st.integers(1, 4),
    spare=st.integers(0, 120),
    seed=st.integers(0, 10_000),
    bias_scale=st.sampled_from([0.1, 1, 5, 20]),
)
def test_any_scores_give_complete_json_on_the_schema_within_any_budget(
    units, order, max_suggestions, spare, seed, bias_scale
):
    schemas = [
        Conversation(coordinates=Coordinates(unit, order=order), max_suggestions=max_suggestions).schema((640, 480))
        for unit in units
    ]
    budget = max(map(min_tokens, schemas)) + spare
    replies = decoded_replies(schemas, max_new_tokens=budget, seed=seed, bias_scale=bias_scale)
    for reply, schema in zip(replies, schemas, strict=True):
        jsonschema.validate(json.loads(reply), schema)


def test_there_is_no_white_space_between_json_tokens():
    (reply,) = decoded_replies([Conversation().schema((64, 64))], max_new_tokens=300, seed=0, bias_scale=1)
    assert reply.startswith('{"summary":"')
    assert json.dumps(json.loads(reply), separators=(",", ":"), ensure_ascii=False) == reply


def test_a_model_may_score_more_tokens_than_its_tokenizer_has():
    schema = Conversation().schema((64, 64))
    (reply,) = decoded_replies(
        [schema], max_new_tokens=min_tokens(schema), seed=0, bias_scale=1, vocab_size=len(TOKENIZER) + 64
    )
    jsonschema.validate(json.loads(reply), schema)


def test_a_budget_too_small_for_any_reply_is_refused():
    schema = Conversation().schema((64, 64))
    with pytest.raises(aa.InvalidValueError, match=f"need at least {min_tokens(schema)}"):
        DECODING.logits_processor([schema], max_new_tokens=min_tokens(schema) - 1)


def test_an_unsupported_schema_is_refused():
    with pytest.raises(aa.InvalidValueError, match="llguidance does not support this schema"):
        DECODING.logits_processor([{"type": "string", "pattern": "(?<=a)b"}], max_new_tokens=100)


def test_a_token_from_outside_the_schema_is_a_bug():
    processor = DECODING.logits_processor([Conversation().schema((64, 64))], max_new_tokens=200)
    scores = torch.zeros(1, len(TOKENIZER))
    processor(torch.zeros(1, 1, dtype=torch.long), scores)
    with pytest.raises(RuntimeError, match="the schema does not allow"):
        processor(torch.tensor([[0, TOKENIZER.encode("q")[0]]]), scores)
