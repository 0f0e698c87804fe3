"""The judge on a server, against a real model behind one, and against replies of all forms."""

import json
import math

import pytest
import torch
from PIL import Image

import artaug as aa
from artaug.judges import OpenAIJudge
from artaug.pairwise import judge_images
from artaug.serving.choices import choice_schema
from support.faulty_server import completion, faulty_server, refuses, says, sends
from support.served_llava import answers_with, forward_shares
from support.tiny_llava import tiny_llava

RED, NOISE = Image.new("RGB", (64, 48), "red"), Image.effect_noise((40, 30), 80).convert("RGB")
GREY = Image.new("RGB", (30, 40), "grey")

pytestmark = pytest.mark.loopback


def judge(server, **options):
    return OpenAIJudge(**{"base_url": server.url, "model": "tiny", "max_attempts": 2, **options})


def better(choice, **odds):
    """A reply, and what the server lists in the place of its choice."""
    document = json.loads(completion(f'{{"reason":"r","better":"{choice}"}}'))
    top = [{"token": token, "logprob": math.log(probability)} for token, probability in odds.items()]
    content = [{"token": '{"reason":"r","better":"', "top_logprobs": []}, {"token": choice, "top_logprobs": top}]
    document["choices"][0]["logprobs"] = {"content": [*content, {"token": '"}', "top_logprobs": []}]} if odds else None
    return sends(json.dumps(document).encode())


@pytest.mark.parametrize("explain", [False, True])
def test_the_odds_over_http_are_those_of_a_forward_call_in_both_orders(explain):
    model, processor = tiny_llava()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(5 if weight.ndim > 1 else 1)
    schema = choice_schema("better", ["A", "B"], explain=explain)
    with faulty_server(answers_with(model, processor)) as server:
        options = {"expectation": True, "ties": False, "explain": explain, "top_logprobs": 10_000}
        asked = judge(server, **options, max_new_tokens=60, concurrency=1)
        (preference,) = judge_images(asked, [RED], [NOISE], ["a wall"])
        text = server.requests[0]["messages"][0]["content"][2]["text"]
    for pictures, answer in (((RED, NOISE), preference.forward), ((NOISE, RED), preference.backward)):
        content = [*({"type": "image", "image": image} for image in pictures), {"type": "text", "text": text}]
        message = {"role": "user", "content": content}
        shares = forward_shares(model, processor, message, schema, ["A", "B"], max_new_tokens=60)
        assert answer == pytest.approx(shares[0] / sum(shares), abs=1e-5)
    assert preference.forward != pytest.approx(preference.backward, abs=1e-5)


def test_a_model_that_always_answers_a_gives_ties_and_a_position_bias():
    with faulty_server(answers_with(*tiny_llava(fixed_reply='{"reason":"r","better":"A"}'))) as server:
        asked = judge(server, structured=False)
        preferences = judge_images(asked, [RED, GREY], [NOISE, RED], ["a wall", "fog"])
        assert [(one.winner, one.position) for one in preferences] == [("tie", 1)] * 2
        assert asked.usage.replies == 4


@pytest.mark.parametrize(
    ("odds", "answer"),
    [
        ({"A": 0.6, "B": 0.2, "C": 0.2}, 0.7),
        ({"A": 0.5, "b": 0.5}, 0.5),
        ({"B": 0.96, "x": 0.04}, 0),
        ({"A": 0.3, "B": 0.1, "C": 0.6}, 0.5),
    ],
)
def test_the_expectation_counts_a_tie_as_half_and_the_likeliest_tie_as_a_tie(odds, answer):
    with faulty_server(better("A", **odds)) as server:
        assert judge(server, expectation=True).prefer(RED, NOISE, "a wall") == pytest.approx(answer)


@pytest.mark.parametrize(("choice", "answer"), [("A", 1), ("B", 0), ("C", 0.5)])
def test_a_choice_is_an_answer(choice, answer):
    with faulty_server(better(choice)) as server:
        assert judge(server).prefer(RED, NOISE, "a wall") == answer


@pytest.mark.parametrize(
    ("behavior", "options", "reason"),
    [
        (says("They are lovely."), {}, "the reply holds none of A, B, C: 'They are lovely.'"),
        (better("C"), {"ties": False}, "the reply holds none of A, B: "),
        (better("A"), {"expectation": True}, "the server gave no log-probabilities"),
        (better("A", x=1.0), {"expectation": True}, "the choice has no token of its own"),
        (refuses(401), {}, "the server answered 401"),
        (says(None, refusal="I must not"), {}, "the model refused: I must not"),
    ],
)
def test_no_choice_is_an_abstention_with_the_reason(behavior, options, reason):
    with faulty_server(behavior) as server:
        answer = judge(server, **options).prefer(RED, NOISE, "a wall")
    assert isinstance(answer, aa.Abstention)
    assert answer.reason.startswith(reason)
    assert not answer.transient


def test_a_busy_server_is_a_transient_abstention_for_its_pair_alone():
    def busy_at_grey(exchange):
        (refuses(503) if "fog" in str(exchange.request) else better("A"))(exchange)

    with faulty_server(busy_at_grey) as server:
        answers = judge_images(judge(server), [RED, GREY], [NOISE, RED], ["a wall", "fog"])
    assert answers[0] == aa.Preference(1, 1)
    assert isinstance(answers[1], aa.Abstention)
    assert answers[1].transient


def test_the_request_holds_both_pictures_in_their_order_and_each_is_encoded_once(monkeypatch):
    encoded, original = [], OpenAIJudge._data_url  # noqa: SLF001 - how often it runs shows nowhere else
    monkeypatch.setattr(OpenAIJudge, "_data_url", lambda self, image: encoded.append(image) or original(self, image))
    with faulty_server(better("A")) as server:
        judge_images(judge(server, concurrency=1), [RED], [NOISE], ["a wall"])
    forward, backward = (
        [part["image_url"]["url"] for part in one["messages"][0]["content"][:2]] for one in server.requests
    )
    assert forward == backward[::-1]
    assert forward[0] != forward[1]
    assert len(encoded) == 2
    schema = server.requests[0]["response_format"]["json_schema"]["schema"]
    assert schema["properties"]["better"] == {"type": "string", "enum": ["A", "B", "C"]}
    assert 'from the prompt "a wall"' in server.requests[0]["messages"][0]["content"][2]["text"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"question": " "}, "needs a question"),
        ({"expectation": True, "temperature": 0.5}, "some servers scale log-probabilities by it"),
    ],
)
def test_settings_that_give_no_answer_are_refused(wrong, message):
    with pytest.raises(aa.InvalidValueError, match=message):
        OpenAIJudge(**{"base_url": "http://127.0.0.1:1/v1", "model": "m", **wrong})
