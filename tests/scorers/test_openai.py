"""The scorers on a server, against a real model behind one: the local scorer and plain forward calls are the oracles."""

import json
import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import artaug as aa
from artaug.scorers import OpenAIRubricScore, OpenAIVQAScore, VQAScore
from artaug.scoring import score_images
from artaug.serving.chat import ChatReply, TokenLogprobs
from artaug.serving.choices import choice_odds, choice_schema, read_choice
from artaug.serving.logprobs import answer_odds, parse_logprobs
from artaug.testing import check_scorer
from support.faulty_server import completion, faulty_server, refuses, says, sends
from support.served_llava import answers_with, forward_shares
from support.tiny_llava import tiny_llava

PICTURES = [Image.linear_gradient("L"), Image.effect_noise((40, 30), 80), Image.new("RGB", (9, 9), "teal")]
PROMPTS = ["a red ball", "fog that lies low over the hills", "a wall"]
RED = PICTURES[-1]
EVERYTHING = 10_000
RUBRIC = 'How well does it show "{prompt}"?'


@pytest.fixture(scope="module")
def model_and_processor():
    """A LLaVA of random weights whose next token depends on the picture and the prompt."""
    model, processor = tiny_llava()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(5 if weight.ndim > 1 else 1)
    return model, processor


@pytest.fixture
def real_server(model_and_processor):
    with faulty_server(answers_with(*model_and_processor)) as server:
        yield server


def vqa(server, **options):
    return OpenAIVQAScore(**{"base_url": server.url, "model": "tiny", "max_attempts": 2, **options})


def rubric(server, **options):
    return OpenAIRubricScore(
        **{"base_url": server.url, "model": "tiny", "rubric": RUBRIC, "max_attempts": 2, **options}
    )


def spellings(tokenizer, word):
    """All tokens that are a word in any case, with anything around it that is no letter and no digit."""
    texts = [tokenizer.decode([token]) for token in range(len(tokenizer))]
    return [text for text in texts if re.fullmatch(rf"[\W_]*{word}[\W_]*", text, re.IGNORECASE)]


@pytest.mark.loopback
def test_the_probability_of_yes_over_http_is_that_of_the_local_scorer(real_server, model_and_processor):
    model, processor = model_and_processor

    def local(word):
        scorers = [
            VQAScore(model=model, processor=processor, answer=text) for text in spellings(processor.tokenizer, word)
        ]
        assert len(scorers) > 1
        return [sum(scores) for scores in zip(*(one.score_batch(PICTURES, PROMPTS) for one in scorers), strict=True)]

    expected = [yes / (yes + no) for yes, no in zip(local("a"), local("e"), strict=True)]
    served = vqa(real_server, answer="a", other_answer="e", top_logprobs=EVERYTHING)
    assert served.score_batch(PICTURES, PROMPTS) == pytest.approx(expected, abs=1e-5)
    assert max(expected) > 1.01 * min(expected)


@pytest.mark.loopback
def test_a_model_that_answers_yes_scores_1_and_one_that_answers_no_scores_0():
    for reply, score in (("Yes", 1), ("No", 0)):
        with faulty_server(answers_with(*tiny_llava(fixed_reply=reply))) as server:
            assert vqa(server).score(RED, "a wall") == pytest.approx(score, abs=1e-6)


@pytest.mark.loopback
def test_the_expected_grade_is_that_of_a_forward_call(real_server, model_and_processor):
    model, processor = model_and_processor
    for explain in (False, True):
        grader = rubric(real_server, expectation=True, explain=explain, top_logprobs=EVERYTHING, max_new_tokens=60)
        scores = grader.score_batch(PICTURES, PROMPTS)
        grades = rubric(real_server, explain=explain, max_new_tokens=60).score_batch(PICTURES, PROMPTS)
        assert set(grades) <= {1.0, 2.0, 3.0, 4.0, 5.0}
        for image, prompt, score in zip(PICTURES, PROMPTS, scores, strict=True):
            text = next(
                message["messages"][0]["content"][1]["text"]
                for message in real_server.requests
                if prompt in str(message) and ("reason" in str(message)) is explain
            )
            content = [{"type": "image", "image": image.convert("RGB")}, {"type": "text", "text": text}]
            schema = choice_schema("grade", range(1, 6), explain=explain)
            message = {"role": "user", "content": content}
            shares = forward_shares(model, processor, message, schema, ["1", "2", "3", "4", "5"], max_new_tokens=60)
            expected = sum(grade * share for grade, share in enumerate(shares, 1)) / sum(shares)
            assert score == pytest.approx(expected, abs=1e-5)
        assert len(set(scores)) == 3


@pytest.mark.loopback
def test_both_pass_the_scorer_checks(real_server):
    check_scorer(vqa(real_server, answer="a", other_answer="e", top_logprobs=EVERYTHING))
    check_scorer(rubric(real_server, explain=False, max_new_tokens=40))


# --- what a server lists ---------------------------------------------------------------------------------------------


@given(
    st.lists(st.floats(1e-6, 1), min_size=3, max_size=12),
    st.lists(st.sampled_from(["yes", "no", "it"]), min_size=12, max_size=12),
    st.integers(1, 12),
)
def test_what_is_not_listed_changes_a_probability_by_less_than_the_error(weights, texts, count):
    answers = {"yes": ["yes"], "no": ["no"]}
    tokens = sorted(
        ((text, math.log(w / sum(weights))) for text, w in zip(texts, weights, strict=False)), key=lambda t: -t[1]
    )
    whole, listed = answer_odds(tokens, answers), answer_odds(tokens[:count], answers)
    if listed is None:
        return
    assert sum(listed.probability.values()) == pytest.approx(1)
    assert abs(listed.probability["yes"] - whole.probability["yes"]) <= listed.error + 1e-9


def lists(*tokens, text="Yes"):
    """A reply of one token, and what the server lists for it."""
    top = [{"token": token, "logprob": math.log(probability)} for token, probability in tokens]
    content = [{"token": text, "logprob": 0.0, "top_logprobs": top}]
    document = json.loads(completion(text))
    document["choices"][0]["logprobs"] = {"content": content}
    return sends(json.dumps(document).encode())


@pytest.mark.loopback
@pytest.mark.parametrize(
    ("tokens", "score"),
    [
        ([("Yes", 0.6), ("No", 0.2), ("It", 0.2)], 0.75),
        ([("Yes", 0.3), (" yes", 0.2), ("\u2581YES", 0.1), ("No", 0.1), ("no.", 0.1), ("It", 0.2)], 0.75),
        ([("No", 0.98), ("It", 0.02)], 0.0),
        ([("Yes", 0.98), ("Yes", 0.01), ("nope", 0.01)], 1.0),
    ],
)
def test_spellings_of_an_answer_add_up_and_other_tokens_do_not_count(tokens, score):
    with faulty_server(lists(*tokens)) as server:
        assert vqa(server).score(RED, "a wall") == pytest.approx(score)


@pytest.mark.loopback
def test_a_list_that_leaves_much_open_is_warned_of():
    with (
        faulty_server(lists(("Yes", 0.3), ("It", 0.2))) as server,
        pytest.warns(
            UserWarning, match=r"the picture of 'a wall' may be off by 0\.62 of its range\. Raise top_logprobs"
        ),
    ):
        assert vqa(server).score(RED, "a wall") == 1


@pytest.mark.loopback
@pytest.mark.parametrize(
    ("behavior", "message"),
    [
        (
            lists(("<think>", 0.99), ("It", 0.01)),
            r"neither 'yes' nor 'no' is among the 2 most likely.*begin with '<think>'",
        ),
        (says("Yes"), r"the server gave no log-probabilities"),
        (lists(), r"the server gave no log-probabilities\. Need one"),
        (refuses(400, b"logprobs are not supported"), r"the server answered 400: 'logprobs are not supported'"),
    ],
)
def test_a_reply_without_the_odds_is_an_error_that_names_the_prompt(behavior, message):
    with faulty_server(behavior) as server, pytest.raises(aa.ScoringError, match=rf"picture of 'a wall': {message}"):
        score_images(vqa(server), [RED], ["a wall"])


@pytest.mark.loopback
def test_a_first_token_without_text_counts_by_its_odds():
    with faulty_server(lists(("Yes", 0.6), ("No", 0.4), text="")) as server:
        assert vqa(server).score(RED, "a wall") == pytest.approx(0.6)


@pytest.mark.parametrize(
    ("document", "tokens"),
    [
        ({"content": [{"token": "a", "top_logprobs": [{"token": "a", "logprob": -1}]}]}, [("a", (("a", -1.0),))]),
        ({"content": [{"token": "a", "top_logprobs": None}]}, [("a", ())]),
        ({"tokens": ["a"], "top_logprobs": [{"a": -1.0, "b": -2}]}, [("a", (("a", -1.0), ("b", -2.0)))]),
        (
            {
                "content": [
                    {"token": "a", "top_logprobs": [{"token": 1, "logprob": 0}, {"token": "a", "logprob": math.nan}]}
                ]
            },
            [("a", ())],
        ),
        (
            {"content": [{"token": "a", "top_logprobs": [{"token": "a", "logprob": -(10**400)}]}]},
            [("a", (("a", -1e4),))],
        ),
        ({"content": [{"token": "a", "top_logprobs": [{"token": "a", "logprob": 7}]}]}, [("a", ())]),
        ({"content": ["a", None]}, [("", ()), ("", ())]),
        ({"content": "a"}, []),
        ([], []),
        (None, []),
    ],
)
def test_log_probabilities_of_any_form_are_read_or_left_out(document, tokens):
    assert [(token.token, token.top) for token in parse_logprobs(document)] == tokens


# --- what is requested -----------------------------------------------------------------------------------------------


@pytest.mark.loopback
def test_the_request_for_yes_is_for_one_token_and_its_log_probabilities():
    with faulty_server(lists(("Yes", 0.6), ("No", 0.4))) as server:
        vqa(server, question='Is "{prompt}" in it?').score(RED, "a <image> {prompt}")
    (request,) = server.requests
    assert (request["max_tokens"], request["logprobs"], request["top_logprobs"]) == (1, True, 20)
    assert request["temperature"] == 0
    assert "response_format" not in request
    assert request["messages"][0]["content"][1]["text"] == 'Is "a \u2039image\u203a {prompt}" in it?'


@pytest.mark.loopback
def test_the_request_for_a_grade_has_the_scale_and_the_schema():
    with faulty_server(says('{"reason": "odd", "grade": 7}')) as server:
        assert rubric(server, scale=(0, 10)).score(RED, "a wall") == 7
    (request,) = server.requests
    schema = request["response_format"]["json_schema"]["schema"]
    assert schema["properties"]["grade"] == {"type": "integer", "minimum": 0, "maximum": 10}
    assert list(schema["properties"]) == ["reason", "grade"]
    text = request["messages"][0]["content"][1]["text"]
    assert text.startswith('How well does it show "a wall"?')
    assert "from 0, the worst, to 10, the best" in text
    assert "logprobs" not in request


@pytest.mark.loopback
def test_a_server_that_refuses_the_schema_is_asked_for_free_text():
    def picky(exchange):
        (refuses(400) if "response_format" in exchange.request else says("It is odd.\n**Grade: 2**"))(exchange)

    with faulty_server(picky) as server:
        assert rubric(server, concurrency=1).score_batch([RED] * 2, PROMPTS[:2]) == [2, 2]
        assert len(server.requests) == 3


@pytest.mark.loopback
@pytest.mark.parametrize(
    ("reply", "finish"),
    [("Lovely!", "stop"), ('{"grade": 9}', "stop"), ('{"grade": true}', "stop"), ('{"reason": "grade: 4', "length")],
)
def test_a_reply_without_a_grade_of_the_scale_is_an_error_that_quotes_it(reply, finish):
    with (
        faulty_server(says(reply, finish=finish)) as server,
        pytest.raises(aa.ScoringError, match=r"picture of 'a wall': the reply holds no grade from 1 to 5: '"),
    ):
        rubric(server).score(RED, "a wall")


@pytest.mark.parametrize(
    ("text", "grade"),
    [
        ('{"reason": "grade: 3 at first", "grade": 4}', "4"),
        ("grade: 3. No: grade = 4/5", "4"),
        ("4", "4"),
        (' "Grade" : "4" ', "4"),
        ('{"grade": 4.0}', "4"),
        ('{"grade": 4.5}', None),
        ('{"grade": [4]}', "4"),
        ("4 of 5", None),
        ("", None),
    ],
)
def test_a_grade_is_read_where_models_write_it(text, grade):
    assert read_choice(ChatReply(text), "grade", ["1", "2", "3", "4", "5"]) == grade


@pytest.mark.parametrize(
    "tokens",
    [
        ['{"', "grade", '":', " ", "4", "}"],
        ['{"grade":', "\u01204", "}"],
        ["<think>", "grade: 3", "</think>", '{"grade": ', '"4"}'],
    ],
)
def test_the_odds_are_those_of_the_token_that_is_the_grade(tokens):
    top = (("3", math.log(0.25)), ("4", math.log(0.75)))
    entries = tuple(TokenLogprobs(token, top if "4" in token else (("1", 0.0),)) for token in tokens)
    odds = choice_odds(ChatReply("", (), entries), "grade", ["1", "2", "3", "4", "5"])
    assert odds.probability == pytest.approx({"1": 0, "2": 0, "3": 0.25, "4": 0.75, "5": 0})


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"temperature": 0.7}, "some servers scale log-probabilities by it"),
        ({"top_logprobs": 1}, "need at least 2"),
        ({"other_answer": "Yes "}, "need two different words"),
        ({"answer": ""}, "need two different words"),
    ],
)
def test_settings_that_give_no_probability_are_refused(wrong, message):
    with pytest.raises(aa.InvalidValueError, match=message):
        OpenAIVQAScore(**{"base_url": "http://127.0.0.1:1/v1", "model": "m", **wrong})


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"rubric": " "}, "needs a rubric"),
        ({"scale": (5, 5)}, "a lowest grade from 0 up and a higher one"),
        ({"scale": (-1, 5)}, "a lowest grade from 0 up"),
        ({"scale": (0, 100)}, "at most 100"),
        ({"scale": (1, 10), "expectation": True}, "two digits"),
        ({"temperature": 0.7, "expectation": True}, "some servers scale log-probabilities by it"),
    ],
)
def test_a_rubric_that_gives_no_grade_is_refused(wrong, message):
    with pytest.raises(aa.InvalidValueError, match=message):
        OpenAIRubricScore(**{"base_url": "http://127.0.0.1:1/v1", "model": "m", "rubric": RUBRIC, **wrong})
