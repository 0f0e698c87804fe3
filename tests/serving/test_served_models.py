"""The laws of everything on a served model (critic, scorers, judge): retries, failures, limits, usage, the key, interruptions."""

import base64
import copy
import dataclasses
import json
import logging
import pickle
import socket
import time
import urllib.parse
import zlib

import pytest
from PIL import Image

import artaug as aa
from artaug._internal import transient
from artaug.critics import Usage
from artaug.serving import backoff
from support.faulty_server import (
    completion,
    drips,
    drips_error,
    drips_headers,
    endless,
    endless_informational,
    faulty_server,
    half,
    hangs,
    quiet,
    refuses,
    resets,
    says,
    sends,
    slow,
)
from support.served_kinds import KINDS, Failure
from support.tiny_llava import suggestion_json

pytestmark = pytest.mark.loopback

RED = Image.new("RGB", (64, 48), "red")
KEY = "sk-very-secret"


@pytest.fixture(autouse=True)
def _short_delays(monkeypatch):
    monkeypatch.setattr(transient, "_FIRST_DELAY_S", 0.01)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    for proxy in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(proxy, raising=False)


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]


def ask(kind, served, count=1):
    """Answers, or failures, about some pictures; one of them without a list."""
    answers = kind.ask(served, [RED] * count, ["a wall"] * count)
    return answers[0] if count == 1 else answers


def no_schema(kind):
    return {"structured": False} if kind.has_schema else {}


# --- failures --------------------------------------------------------------------------------------------------------

TEMPORARY = {
    "429 with a time to wait": (refuses(429, Retry_After="0"), "429"),
    "500": (refuses(500), "500"),
    "503": (refuses(503), "503"),
    "hanging": (hangs, "no whole answer within 0.3 s"),
    "dripping": (drips, "no whole answer within 0.3 s"),
    "slow": (slow(2, suggestion_json()), "no whole answer within 0.3 s"),
    "half a body": (half(suggestion_json()), "the connection failed"),
    "broken JSON": (sends(completion(suggestion_json())[:-9]), "is no JSON"),
    "connection reset": (resets, "the connection failed"),
    "dripping headers": (drips_headers, "no whole answer within 0.3 s"),
    "dripping error": (drips_error, "no whole answer within 0.3 s"),
    "endless error": (endless(b"x" * 2**16, status=500), "the server answered 500: 'xxx"),
    "endless 1xx": (endless_informational, "no whole answer within 0.3 s"),
    "no choices": (sends(b'{"choices": []}'), "has no choices"),
    "null for choices": (sends(b'{"choices": null, "usage": null}'), "has no choices"),
    "an error in a 200": (sends(b'{"error": {"message": "upstream", "code": 502}}'), "an error, 502: 'upstream'"),
    "an error of a type": (sends(b'{"error": {"message": "m", "type": "overloaded_error"}}'), "an error, 529: 'm'"),
    "an error without status": (sends(b'{"error": "upstream"}'), "an error, without a status: 'upstream'"),
    "an error in a choice": (
        sends(b'{"choices": [{"message": null, "error": {"code": 503, "message": "m"}}]}'),
        "an error, 503: 'm'",
    ),
}
PERMANENT = {
    "400": (refuses(400), "the server answered 400"),
    "401": (refuses(401), "the server answered 401"),
    "wrong content type": (sends(b"<html>hello", content_type="text/html"), "text/html, is no JSON: '<html>hello'"),
    "JSON of something else": (sends(b'{"choices": "none"}'), "no chat completion (choices:"),
    "an endless answer": (endless(b"x" * 2**16), "goes on after 16,777,216 bytes"),
    "a bomb": (sends(zlib.compress(bytes(2**26), wbits=31), Content_Encoding="gzip"), "goes on after 16,777,216 bytes"),
    "a bomb of an error": (
        refuses(400, zlib.compress(bytes(2**26), wbits=31), Content_Encoding="gzip"),
        "answered 400",
    ),
    "another compression": (sends(b"x", Content_Encoding="br"), "compressed by 'br'"),
    "no gzip": (sends(b"it is not", Content_Encoding="gzip"), "cannot be decompressed"),
    "an error in a 200": (sends(b'{"error": {"message": "m", "code": "401"}}'), "an error, 401: 'm'"),
    "an error of old vLLM": (sends(b'{"object": "error", "message": "m", "code": 400}'), "an error, 400: 'm'"),
    "a redirect to nowhere": (refuses(302, Location="http://[::1"), "redirects (302)"),
    "a redirect as GET": (refuses(303, Location="/v2"), "redirects (303) to '/v2'"),
    "redirects without end": (refuses(307, Location="/v1/chat/completions"), "redirects more than 4 times"),
    "a redirect without a place": (refuses(307), "the server answered 307"),
    "tokens that ran out": (says(None, finish="length"), "the reply was cut at the limit of tokens before"),
    "reasoning that was cut": (
        says("", finish="length", reasoning_content="let me"),
        "tokens before it had any text, while the model was still reasoning",
    ),
    "a filter": (says(None, finish="content_filter"), "no text; its finish_reason is 'content_filter'"),
    "a refusal in parts": (says([{"type": "refusal", "refusal": "I must not"}]), "the model refused: I must not"),
    "a list": (sends(b"[1]"), "no chat completion (the whole:"),
    "nothing": (sends(b"", content_type="text/plain"), "is no JSON: ''"),
    "nested too deep": (sends(b"[" * 100_000, content_type="text/plain"), "is no JSON"),
    "a refusal": (says(None, refusal="I must not"), "the model refused: I must not"),
}
SLOW = {
    "hanging",
    "dripping",
    "slow",
    "dripping headers",
    "dripping error",
    "endless error",
    "endless 1xx",
    "an endless answer",
    "a bomb",
    "a bomb of an error",
}
"""Those that take a part of a second."""


def every(failures):
    """Each failure with every kind; those that take their time with one kind each."""
    names = list(KINDS)
    return [
        pytest.param(failure, KINDS[name], id=f"{failure}-{name}")
        for number, failure in enumerate(failures)
        for index, name in enumerate(names)
        if failure not in SLOW or index == number % len(names)
    ]


def patience(named):
    """Short where the failure is that nothing comes; elsewhere what comes late on a busy machine should count as come."""
    return 0.3 if "no whole answer" in named else 10


@pytest.mark.parametrize(("failure", "kind"), every(TEMPORARY))
def test_a_temporary_failure_is_retried(failure, kind):
    behavior, named = TEMPORARY[failure]
    with faulty_server(behavior, kind.good) as server:
        served = kind.make(server.url, timeout_s=patience(named))
        assert ask(kind, served) == kind.answer(4)
        assert served.usage.retries == 1
        assert served.usage.failures == 0


@pytest.mark.parametrize(("failure", "kind"), every(TEMPORARY))
def test_a_failure_that_lasts_is_named(failure, kind):
    behavior, named = TEMPORARY[failure]
    with faulty_server(behavior) as server:
        served = kind.make(server.url, timeout_s=patience(named), max_attempts=2)
        outcome = ask(kind, served)
        assert named in outcome.reason
        assert "tried 2 times" in outcome.reason
        assert outcome.transient
        assert served.usage == Usage(retries=1, failures=1)


@pytest.mark.parametrize(("failure", "kind"), every(PERMANENT))
def test_a_permanent_failure_is_not_retried(failure, kind):
    behavior, named = PERMANENT[failure]
    with faulty_server(behavior) as server:
        outcome = ask(kind, kind.make(server.url, **no_schema(kind)))
        assert named in outcome.reason
        assert not outcome.transient
        assert "refused" not in outcome.reason or "refus" in failure
        assert len(server.requests) == (4 if "without end" in failure else 1)


def test_an_address_without_a_server_is_named(kind):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    assert "the connection failed: ConnectionRefusedError" in ask(kind, kind.make(url, max_attempts=2)).reason


@pytest.mark.parametrize("name", ["critic", "judge"])
def test_every_picture_gets_an_answer_when_all_kinds_of_failures_mix(name):
    kind = KINDS[name]
    failures = [behavior for behavior, _ in [*TEMPORARY.values(), *PERMANENT.values()]]
    with faulty_server(*failures, *failures, kind.good) as server:
        served = kind.make(server.url, timeout_s=0.3, max_attempts=2)
        answers = ask(kind, served, 120)
    assert len(answers) == 120
    assert answers[-1] == kind.answer(4) or answers[-1].suggestions
    assert served.usage.failures == sum(isinstance(answer, Failure) for answer in answers) > 0


@pytest.mark.parametrize("name", ["yes", "rubric"])
def test_a_scorer_that_gets_no_answer_asks_no_further(name):
    kind = KINDS[name]
    with faulty_server(kind.good, refuses(401)) as server:
        outcome = ask(kind, kind.make(server.url, concurrency=1), 20)
        assert "the server answered 401" in outcome[0].reason
        assert quiet()
        assert len(server.requests) <= 4


def test_all_requests_wait_as_long_as_the_server_asks_for(kind):
    with faulty_server(refuses(429, Retry_After="0.6"), kind.good) as server:
        assert ask(kind, kind.make(server.url, concurrency=1), 3) == [kind.answer(4)] * 3
        assert server.times[1] - server.times[0] >= 0.6


def test_a_wait_beyond_the_retry_deadline_fails_and_says_how_long(kind):
    with faulty_server(refuses(429, Retry_After="3600")) as server:
        assert "it asks to wait 3600 s" in ask(kind, kind.make(server.url, retry_deadline_s=5)).reason
        assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry-after": "7"}, 7),
        ({"retry-after-ms": "250"}, 0.25),
        ({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0),
        ({"retry-after": "-3"}, 0),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "soon"}, None),
        ({}, None),
    ],
)
def test_retry_after_headers_are_parsed(headers, seconds):
    assert backoff.parse_retry_after(headers) == seconds


def test_backoff_delays_grow_to_a_maximum():
    delays = [transient.backoff_delay_s(attempt) for attempt in range(1, 30)]
    assert all(0 < delay <= 30 for delay in delays)
    assert max(delays[:2]) < 0.03 < min(delays[8:])


@pytest.mark.parametrize("behavior", [drips, drips_headers, endless_informational, endless(b"x" * 2**16)])
def test_no_thread_outlives_an_exchange(behavior):
    kind = KINDS["yes"]
    with faulty_server(behavior) as server:
        ask(kind, kind.make(server.url, timeout_s=0.3, max_attempts=1))
        assert quiet()


# --- limits and usage ------------------------------------------------------------------------------------------------


def test_no_more_requests_than_the_concurrency_run_at_once(kind):
    def late(exchange):
        exchange.server.stopped.wait(0.1)
        kind.good(exchange)

    with faulty_server(late) as server:
        assert ask(kind, kind.make(server.url, concurrency=3), 12) == [kind.answer(4)] * 12
        assert server.max_active == 3


def test_answers_are_in_the_order_of_the_pictures(kind):
    def echo(exchange):
        text = exchange.request["messages"][-1]["content"][-1]["text"]
        number = next(number for number in range(1, 6) if f"prompt {number}" in text)
        exchange.server.stopped.wait(0.2 if number == 1 else 0)
        exchange.send(kind.body(number))

    with faulty_server(echo) as server:
        answers = kind.ask(kind.make(server.url), [RED] * 5, [f"prompt {number}" for number in range(1, 6)])
    assert answers == [kind.answer(number) for number in range(1, 6)]


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind.has_schema])
@pytest.mark.parametrize(("status", "requests"), [(400, 4), (500, 5)])
def test_after_a_refused_schema_requests_are_for_free_text_with_one_warning(name, status, requests, caplog):
    kind = KINDS[name]

    def picky(exchange):
        no = refuses(status, b"response_format is not supported")
        (no if "response_format" in exchange.request else kind.good)(exchange)

    with faulty_server(picky) as server, caplog.at_level(logging.WARNING, "artaug"):
        answers = ask(kind, kind.make(server.url, concurrency=1, max_attempts=2), 3)
        assert len(server.requests) == requests  # one or two with the schema, three without
    assert not any(isinstance(answer, Failure) for answer in answers)
    (record,) = caplog.records
    assert "refused the JSON schema" in record.getMessage()
    assert "response_format is not supported" in record.getMessage()


def test_usage_adds_up_and_has_a_price(kind):
    uncounted = json.loads(kind.body(4))
    del uncounted["usage"]
    with faulty_server(kind.good, sends(json.dumps(uncounted).encode())) as server:
        served = kind.make(server.url, concurrency=1)
        ask(kind, served, 2)
    assert served.usage == Usage(replies=2, input_tokens=100, output_tokens=10, uncounted=1)
    assert served.usage.cost(input_per_million=2, output_per_million=5) == pytest.approx(0.00025)
    with pytest.raises(aa.InvalidValueError, match="prices of -1 and 0"):
        served.usage.cost(input_per_million=-1, output_per_million=0)


def test_a_request_is_the_same_for_the_same_arguments(kind):
    with faulty_server(kind.good) as server:
        served = kind.make(server.url)
        assert ask(kind, served) == ask(kind, served)
    assert json.dumps(server.requests[0]) == json.dumps(server.requests[1])


# --- the key ---------------------------------------------------------------------------------------------------------


def test_the_key_is_sent_and_appears_in_no_output(kind, caplog):
    quoting_key = refuses(401, f'{{"error": "bad key {KEY}"}}'.encode())
    with faulty_server(quoting_key) as server, caplog.at_level(logging.DEBUG):
        served = kind.make(server.url, api_key=KEY, **no_schema(kind))
        outcome = ask(kind, served)
    assert server.headers[0]["authorization"] == f"Bearer {KEY}"
    assert not any(KEY in text for text in (repr(served), str(outcome), caplog.text, served.__dict__.get("name", "")))
    assert "***" in outcome.reason


WAYS_TO_QUOTE = {
    "as it is": lambda key: key,
    "after spaces": lambda key: " " * 70_000 + key,
    "as JSON": lambda key: "".join(f"\\u{ord(letter):04x}" for letter in key),
    "as JSON in JSON": lambda key: json.dumps(json.dumps(key)),
    "in a URL": lambda key: urllib.parse.quote(key, safe=""),
    "in HTML": lambda key: "".join(f"&#{ord(letter)};" for letter in key),
    "as base64": lambda key: base64.b64encode(f"Authorization: Bearer {key}\r\n".encode()).decode(),
    "in one case": str.upper,
    "after half a quote": lambda key: "x" * 45 + key,
    "at the end of a quote": lambda key: "x" * 190 + key,
    "many times": lambda key: key * 3000,
}
WAYS_TO_ANSWER = {
    "an error": lambda text: refuses(401, text.encode()),
    "no JSON": lambda text: sends(text.encode(), content_type="text/html"),
    "an error in a 200": lambda text: sends(json.dumps({"error": {"code": 400, "message": text}}).encode()),
    "a reply": lambda text: says(f"Your key is {text}"),
    "a critique": lambda text: says(suggestion_json(prompt=text[-300:])),
    "a refusal": lambda text: says(None, refusal=text),
    "a finish reason": lambda text: says(None, finish=text),
    "a tool call": lambda text: says(None, tool_calls=[{"function": {"arguments": text}}]),
    "a redirect": lambda text: refuses(302, Location=f"http://elsewhere/{text[-280:]}"),
    "a coding": lambda text: sends(b"x", Content_Encoding=text[-250:]),
    "a type": lambda text: sends(b"x", content_type=text[-250:]),
    "parts": lambda text: says([{"type": "text", "text": part} for part in (text[:-5], text[-5:])]),
    "UTF-16": lambda text: sends(json.dumps({"error": text}).encode("utf-16")),
    "no HTTP": lambda text: lambda exchange: exchange.handler.wfile.write(text.encode() + b"\r\n\r\n"),
}


def pieces_of_the_key(text):
    """Log-probabilities whose tokens are parts of the key, which only one after the other are all of it."""
    document = json.loads(completion(text))
    parts = [text[start : start + 5] for start in range(0, len(text), 5)][:20]
    top = [{"token": part, "logprob": -0.1} for part in parts]
    document["choices"][0]["logprobs"] = {"content": [{"token": part, "top_logprobs": top} for part in parts]}
    return sends(json.dumps(document).encode())


WAYS_TO_ANSWER["tokens"] = pieces_of_the_key
QUOTES = [
    pytest.param(place, way, KINDS[name], id=f"{place}-{way}-{name}")
    for place in WAYS_TO_ANSWER
    for way in WAYS_TO_QUOTE
    for name in KINDS
    if name == "critic" or way == "as it is"
]


@pytest.mark.parametrize(("place", "way", "kind"), QUOTES)
def test_a_key_that_the_server_quotes_is_in_no_answer(place, way, kind, caplog):
    written = WAYS_TO_QUOTE[way](KEY)
    caplog.set_level(logging.DEBUG)
    with faulty_server(WAYS_TO_ANSWER[place](written)) as server:
        answer = ask(kind, kind.make(server.url, api_key=KEY, max_attempts=1))
    parts = [KEY[5:10]] if place == "tokens" else []
    leaks = (KEY, KEY[:-2], KEY[:7], *parts, written.strip()[:2000], urllib.parse.quote(KEY, safe=""))
    for text in (repr(answer), caplog.text):
        assert not any(leak in text for leak in leaks)


def test_a_key_as_people_paste_it_is_sent_without_the_white_space(kind):
    with faulty_server(kind.good) as server:
        assert ask(kind, kind.make(server.url, api_key=f" {KEY}\r\n")) == kind.answer(4)
    assert server.headers[0]["authorization"] == f"Bearer {KEY}"


def test_an_empty_key_sends_none_though_the_environment_has_one(kind, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with faulty_server(kind.good) as server:
        ask(kind, kind.make(server.url, api_key=""))
    assert "authorization" not in server.headers[0]


def test_what_was_used_can_be_copied_and_pickled_without_its_key(kind):
    with faulty_server(kind.good) as server:
        used = kind.make(server.url, api_key=KEY)
        ask(kind, used)
        copied, pickled = copy.deepcopy(used), pickle.dumps(used)
        assert ask(kind, copied) == kind.answer(4)
    assert server.headers[-1]["authorization"] == f"Bearer {KEY}"
    assert copied.usage.replies == 2
    assert KEY.encode() not in pickled
    assert KEY not in str(dataclasses.asdict(used))
    loaded = pickle.loads(pickled)
    assert loaded.usage == used.usage
    with pytest.raises(aa.InvalidValueError, match="pickled, without its api_key"):
        ask(kind, loaded)


def test_the_key_of_the_environment_is_sent_also_after_a_pickle(kind, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with faulty_server(kind.good) as server:
        assert ask(kind, pickle.loads(pickle.dumps(kind.make(server.url)))) == kind.answer(4)
    assert server.headers[0]["authorization"] == f"Bearer {KEY}"


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_to_another_origin_gets_neither_picture_nor_key(status, kind):
    with faulty_server(kind.good) as elsewhere, faulty_server(refuses(status, Location=elsewhere.url)) as server:
        outcome = ask(kind, kind.make(server.url, api_key=KEY))
    assert not elsewhere.requests
    assert f"redirects ({status}) to '{elsewhere.url}'" in outcome.reason
    assert len(server.requests) == 1


@pytest.mark.parametrize("status", [307, 308])
def test_a_redirect_inside_the_origin_is_followed(status, kind):
    with faulty_server(refuses(status, Location="/v2/chat/completions"), kind.good) as server:
        assert ask(kind, kind.make(server.url)) == kind.answer(4)
        assert server.requests[0] == server.requests[1]


# --- interruptions and construction ----------------------------------------------------------------------------------


def test_an_interruption_is_raised_at_once_and_the_object_can_be_used_again(kind, monkeypatch):
    def interrupt(self, image):
        if image.getpixel((0, 0)) == (0, 0, 0):
            time.sleep(0.3)
            raise KeyboardInterrupt
        return original(self, image)

    with faulty_server(hangs, kind.good) as server:
        served, start = kind.make(server.url, timeout_s=30, concurrency=2), time.monotonic()
        original = type(served)._data_url  # noqa: SLF001 - the first step in a thread
        monkeypatch.setattr(type(served), "_data_url", interrupt)
        with pytest.raises(KeyboardInterrupt):
            kind.ask(served, [Image.new("RGB", (8, 8)), RED], ["a wall"] * 2)
        assert time.monotonic() - start < 10
        assert quiet()
        server.script[0] = kind.good
        assert ask(kind, served) == kind.answer(4)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"url": "localhost:8000"}, "no address of a server"),
        ({"url": "http://me:secret@host/v1"}, "of host holds a user, a password"),
        ({"url": "http://secret@host/v1"}, "of host holds a user"),
        ({"url": "http://host/v1?key=secret"}, "a query"),
        ({"url": "http://host/v1#secret"}, "a fragment"),
        ({"url": "http://host/v1;key=secret"}, "parameters"),
        ({"url": "http://host\n/secret"}, "no address of a server"),
        ({"url": "http://[::1/secret"}, "no address of a server"),
        ({"url": "http://host:99999/secret"}, "no address of a server"),
        ({"url": "http://a..b/secret"}, "no address of a server"),
        ({"url": "file:///secret"}, "no address of a server"),
        ({"api_key": "\u2019sk-secret"}, "has U\\+2019 in place 1"),
        ({"api_key": "sk-secret\0x"}, "has U\\+0000 in place 10"),
        ({"api_key": "sk-secret \u00e9"}, "has U\\+0020 in place 10"),
        ({"api_key": "sk-secret", "model": "sk-secret"}, "stands in another field"),
        ({"api_key": "sk-secret", "extra_body": {"api_key": "sk-secret"}}, "stands in another field"),
        ({"concurrency": 0}, "concurrency=0"),
        ({"timeout_s": float("nan")}, "timeout_s=nan"),
        ({"jpeg_quality": 100}, "need 1 to 95"),
    ],
)
def test_invalid_options_are_refused_at_construction(wrong, message, kind):
    with pytest.raises(aa.InvalidValueError, match=message) as caught:
        kind.make(**{"url": "http://127.0.0.1:1/v1", **wrong})
    assert "secret" not in str(caught.value)


def test_a_server_that_gives_no_reply_is_in_the_log_while_it_is_asked_again_once_a_silence(kind, caplog, monkeypatch):
    monkeypatch.setattr(backoff, "_NEWS_AFTER_S", 0.0)
    silences = [refuses(503), refuses(503), kind.good, refuses(503), kind.good]
    with faulty_server(*silences) as server, caplog.at_level(logging.WARNING, "artaug"):
        ask(kind, kind.make(server.url, concurrency=1, **no_schema(kind)), 2)
    assert len(server.requests) == 5
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2
    assert all(server.url in line and "the server answered 503" in line and "600 s" in line for line in said)
