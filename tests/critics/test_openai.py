"""OpenAICritic against a real server and one that misbehaves: retries, failures, requests, usage and the key."""

import base64
import dataclasses
import io
import json
import logging
import math
import signal
import sys
import threading
import time
import tracemalloc
import urllib.parse
import urllib.request
import zlib

import pytest
from PIL import Image

import artaug as aa
from artaug._internal import transient
from artaug.critics import Cached, Conversation, Coordinates, OpenAICritic, Usage, coordinates_for
from artaug.critique import stream_critic
from artaug.serving.http import _proxy
from artaug.testing import check_critic
from support.faulty_server import (
    completion,
    eventually,
    faulty_server,
    hangs,
    quiet,
    refuses,
    says,
    sends,
    slow,
)
from support.tiny_llava import suggestion_json, tiny_llava
from support.transformers_server import transformers_server

pytestmark = pytest.mark.loopback

RED = Image.new("RGB", (64, 48), "red")
ADVICE = aa.Critique((aa.Suggestion(aa.Box(0, 0, 0.5, 1), "a sunlit window", "dark"),), "dull")
GOOD = says(suggestion_json())
KEY = "sk-very-secret"


@pytest.fixture(autouse=True)
def _short_delays(monkeypatch):
    monkeypatch.setattr(transient, "_FIRST_DELAY_S", 0.01)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    for proxy in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(proxy, raising=False)


def critic(server, **options):
    defaults = {"conversation": Conversation(), "timeout_s": 5.0, "max_attempts": 3}
    return OpenAICritic(base_url=server.url, model="tiny", **{**defaults, **options})


# --- a real server ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real_server(tmp_path_factory):
    with transformers_server(tmp_path_factory.mktemp("served"), tiny_llava(fixed_reply=suggestion_json())) as served:
        yield served


def test_a_real_server_with_a_real_model_gives_critiques(real_server):
    url, model = real_server
    openai_critic = OpenAICritic(
        base_url=url, model=model, conversation=Conversation(), max_new_tokens=16, concurrency=2
    )
    assert openai_critic.critique_batch([RED] * 3, ["a wall"] * 3) == [ADVICE] * 3
    assert openai_critic.usage.replies == 3
    assert openai_critic.usage.input_tokens > 3 * 300
    assert openai_critic.usage.output_tokens == 3 * 2
    assert openai_critic.usage.uncounted == openai_critic.usage.failures == openai_critic.usage.retries == 0


def test_a_real_server_answers_in_two_stages(real_server):
    url, model = real_server
    conversation = Conversation.in_two_stages(coordinates=Coordinates("thousandths"))
    openai_critic = OpenAICritic(base_url=url, model=model, conversation=conversation, max_new_tokens=16)
    assert openai_critic.critique(RED, "a wall") == ADVICE
    assert openai_critic.usage.replies == 2


def test_a_real_servers_refusal_is_an_abstention_that_quotes_it(real_server):
    url, _ = real_server
    openai_critic = OpenAICritic(base_url=url, model="another", conversation=Conversation())
    answer = openai_critic.critique(RED, "a wall")
    assert isinstance(answer, aa.Abstention)
    assert answer.reason.startswith("the server answered 400:")
    assert "requested" in answer.reason


def test_a_real_server_can_be_probed(real_server):
    url, model = real_server
    result = OpenAICritic(base_url=url, model=model, conversation=Conversation(), max_new_tokens=16).probe()
    assert not result.conclusive
    assert result.replies == (suggestion_json(),) * 6


PLACES_OF_THE_TEXT = {
    "parts": {"text": [{"type": "reasoning", "text": "hm"}, {"type": "text", "text": suggestion_json()}]},
    "parts of Mistral": {"text": [{"type": "thinking", "thinking": []}, {"type": "text", "text": suggestion_json()}]},
    "texts in a list": {"text": [suggestion_json()[:20], suggestion_json()[20:]]},
    "an object": {"text": {"type": "text", "text": suggestion_json()}},
    "the object itself": {"text": json.loads(suggestion_json())},
    "reasoning": {"text": None, "reasoning_content": suggestion_json()},
    "reasoning of OpenRouter": {"text": "", "reasoning": suggestion_json()},
    "a tool call": {"text": None, "tool_calls": [{"function": {"arguments": suggestion_json()}}]},
    "a tool call of objects": {
        "text": None,
        "tool_calls": [{"function": {"arguments": json.loads(suggestion_json())}}],
    },
    "a function call": {"text": None, "function_call": {"name": "critique", "arguments": suggestion_json()}},
}


@pytest.mark.parametrize("place", PLACES_OF_THE_TEXT)
def test_the_reply_is_found_where_servers_put_it(place):
    with faulty_server(says(**PLACES_OF_THE_TEXT[place])) as server:
        assert critic(server).critique(RED, "a wall").suggestions == ADVICE.suggestions


@pytest.mark.parametrize("coding", ["gzip", "x-gzip", "deflate"])
def test_a_compressed_answer_is_read(coding):
    body = zlib.compress(completion(suggestion_json()), wbits=15 if coding == "deflate" else 31)
    with faulty_server(sends(body, Content_Encoding=coding)) as server:
        assert critic(server).critique(RED, "a wall") == ADVICE
    assert server.headers[0]["accept-encoding"] == "identity"


@pytest.mark.parametrize(
    ("counts", "usage"),
    [
        ({"prompt_tokens": 12, "completion_tokens": None}, Usage(replies=1, input_tokens=12, uncounted=1)),
        ({"prompt_tokens": None, "completion_tokens": 3.0}, Usage(replies=1, output_tokens=3, uncounted=1)),
        ({"prompt_tokens": 1, "completion_tokens": 2}, Usage(replies=1, input_tokens=1, output_tokens=2)),
        ({"prompt_tokens": -1, "completion_tokens": "2"}, Usage(replies=1, uncounted=1)),
        ([], Usage(replies=1, uncounted=1)),
        (None, Usage(replies=1, uncounted=1)),
    ],
)
def test_counts_that_are_missing_lose_neither_the_reply_nor_the_others(counts, usage):
    body = json.dumps({**json.loads(completion(suggestion_json())), "usage": counts}).encode()
    with faulty_server(sends(body)) as server:
        openai_critic = critic(server)
        assert openai_critic.critique(RED, "a wall") == ADVICE
        assert openai_critic.usage == usage


# --- what is sent ----------------------------------------------------------------------------------------------------


def test_the_request_holds_the_picture_the_schema_and_the_limits():
    with faulty_server(GOOD) as server:
        critic(server, max_side_px=32, extra_body={"top_k": 1}).critique(Image.new("RGB", (64, 48), "red"), "a wall")
    (request,) = server.requests
    assert request["model"] == "tiny"
    assert request["max_tokens"] == 1024
    assert request["temperature"] == 0
    assert request["top_k"] == 1
    assert request["response_format"]["type"] == "json_schema"
    assert request["response_format"]["json_schema"]["schema"] == Conversation().schema((32, 24))
    image_part, text_part = request["messages"][-1]["content"]
    assert "a wall" in text_part["text"]
    head, data = image_part["image_url"]["url"].split(",")
    assert head == "data:image/png;base64"
    picture = Image.open(io.BytesIO(base64.b64decode(data)))
    assert picture.size == (32, 24)
    assert picture.getpixel((5, 5)) == (255, 0, 0)


def test_a_picture_is_encoded_once_for_two_stages_and_all_attempts(monkeypatch):
    calls, original = [], OpenAICritic._data_url  # noqa: SLF001 - how often it runs shows nowhere else
    monkeypatch.setattr(OpenAICritic, "_data_url", lambda self, image: calls.append(image) or original(self, image))
    conversation = Conversation.in_two_stages(coordinates=Coordinates("thousandths"))
    with faulty_server(refuses(500), says("dark"), refuses(500), GOOD) as server:
        assert critic(server, conversation=conversation).critique(RED, "a wall") == ADVICE
        assert len(server.requests) == 4
        assert [message["role"] for message in server.requests[-1]["messages"]] == [
            "system", "user", "assistant", "user",
        ]  # fmt: skip
    assert len(calls) == 1


def test_jpeg_the_other_limit_parameter_and_no_temperature():
    with faulty_server(GOOD) as server:
        critic(server, jpeg_quality=90, limit_parameter="max_completion_tokens", temperature=None).critique(
            RED, "a wall"
        )
    (request,) = server.requests
    assert request["max_completion_tokens"] == 1024
    assert not {"max_tokens", "temperature"} & set(request)
    assert request["messages"][-1]["content"][0]["image_url"]["url"].startswith("data:image/jpeg;base64,")


def test_a_reply_cut_at_the_token_limit_is_noted():
    with faulty_server(says(suggestion_json()[:90], finish="length")) as server:
        answer = critic(server).critique(RED, "a wall")
    assert "the reply was cut at the limit of tokens" in (
        answer.repairs if isinstance(answer, aa.Critique) else answer.reason
    )


def test_a_critique_without_the_schema_notes_it():
    def picky(exchange):
        (refuses(400) if "response_format" in exchange.request else GOOD)(exchange)

    with faulty_server(picky) as server:
        note = "the server refused the JSON schema, so the model was asked for free text"
        assert critic(server).critique(RED, "a wall") == dataclasses.replace(ADVICE, repairs=(note,))


def test_a_reply_without_a_critique_is_an_abstention_that_quotes_it():
    with faulty_server(says("Lovely.")) as server:
        assert "holds no suggestions: 'Lovely.'" in critic(server).critique(RED, "a wall").reason


def test_the_key_appears_in_no_output_of_a_cache_either(caplog, tmp_path):
    quoting_key = refuses(401, f'{{"error": "bad key {KEY}"}}'.encode())
    with faulty_server(quoting_key) as server, caplog.at_level(logging.DEBUG):
        openai_critic = critic(server, api_key=KEY, structured=False)
        answer = Cached(openai_critic, folder=tmp_path, cache_abstentions=True).critique(RED, "a wall")
    assert server.headers[0]["authorization"] == f"Bearer {KEY}"
    outputs = [repr(openai_critic), str(answer), caplog.text, *(file.read_text() for file in tmp_path.rglob("*.json"))]
    assert len(outputs) == 4
    assert not any(KEY in text for text in outputs)
    assert "***" in answer.reason


def test_a_placeholder_for_a_key_changes_no_reply():
    with faulty_server(says(suggestion_json(prompt="an EMPTY street"))) as server:
        answer = critic(server, api_key="EMPTY").critique(RED, "a wall")
    assert answer.suggestions[0].prompt == "an EMPTY street"


# --- answers of any bytes --------------------------------------------------------------------------------------------

WHOLE = completion(suggestion_json())
IN_CHUNKS = b"".join(b"%x;of=seven\r\n%b\r\n" % (len(part), part) for part in (WHOLE[:7], WHOLE[7:]))


def raw(*parts):
    return b"".join(parts)


def writes(answer):
    return lambda exchange: exchange.handler.wfile.write(answer)


def head(status="200 OK", *, version="1.1", **headers):
    lines = (f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
    return f"HTTP/{version} {status}\r\n{''.join(lines)}\r\n".encode("latin-1")


@pytest.mark.parametrize(
    "answer",
    [
        raw(head(version="1.0"), WHOLE),
        raw(head("200"), WHOLE),
        raw(head("201 Created"), WHOLE),
        raw(head("100 Continue"), head("102 Processing"), head("103 Early Hints", Link="<a>"), head(), WHOLE),
        raw(head(Transfer_Encoding="chunked"), IN_CHUNKS, b"0\r\nX-Trailer: 1\r\n\r\n"),
        raw(head(Transfer_Encoding="Chunked", Content_Length="3"), IN_CHUNKS, b"0\r\n\r\n"),
        raw(head(Content_Length=len(WHOLE)), WHOLE, head(Content_Length=len(WHOLE)), WHOLE),
        raw(head(Content_Length="9" * 5000), WHOLE),
        raw(head(Content_Length="-5", Folded="a\r\n b"), WHOLE),
        raw(head(), b"\xef\xbb\xbf", WHOLE),
        raw(head(), WHOLE.decode().encode("utf-16")),
        raw(head(), b'{"choices": [],', WHOLE[1:]),
        raw(head(), WHOLE.replace(b": 100,", b": %b," % (b"9" * 4000))),
        raw(head(), WHOLE.replace(b'"message"', b'"delta"')),
        raw(head(), json.dumps({"choices": [{"text": suggestion_json()}]}).encode()),
    ],
)
def test_an_unusual_answer_is_read(answer):
    with faulty_server(writes(answer)) as server:
        assert critic(server, max_attempts=1).critique(RED, "a wall") == ADVICE


@pytest.mark.parametrize(
    ("answer", "reason", "attempts"),
    [
        (raw(head(Transfer_Encoding="chunked"), b"-5\r\n", WHOLE), "sizes of the answer's chunks are wrong", 2),
        (raw(head(Transfer_Encoding="chunked"), b"f" * 300 + b"\r\n"), "IncompleteRead", 2),
        (raw(head(Transfer_Encoding="chunked"), IN_CHUNKS), "IncompleteRead", 2),
        (raw(head(Content_Length=2**63), WHOLE), "IncompleteRead", 2),
        (raw(head("204 No Content", Content_Length=len(WHOLE)), WHOLE), "no JSON: ''", 1),
        (raw(head("304 Not Modified"), WHOLE), "answered 304", 1),
        (raw(head("101 Switching Protocols"), WHOLE), "answered 101", 1),
        (raw(head("999 Denied"), b"go away"), "answered 999: 'go away'", 1),
        (raw(head(version="2"), WHOLE), "UnknownProtocol", 2),
        (raw(), "RemoteDisconnected", 2),
        (raw(head(Content_Type="application/json"), WHOLE * 2), "no JSON", 2),
        (raw(head(Content_Type="application/json"), b"[" * 100_000), "no JSON", 2),
        (raw(head(Content_Type="text/event-stream"), b"data: ", WHOLE), "text/event-stream, is no JSON: 'data: {", 1),
        (raw(head(), b'[{"error": {"code": 429, "message": "slower"}}]'), "429: 'slower'", 2),
        (raw(head(), completion("half a", finish="error")), "finish_reason is 'error'", 2),
        (raw(head("503 Busy", Retry_After="Mon, 99 Foo 99999999999 99:99:99 +9999999")), "answered 503: ''", 2),
    ],
)
def test_an_answer_that_cannot_be_read_is_an_abstention(answer, reason, attempts):
    with faulty_server(writes(answer)) as server:
        abstention = critic(server, max_attempts=2, structured=False).critique(RED, "a wall")
    assert reason in abstention.reason
    assert len(server.requests) == attempts


def test_millions_of_wrong_choices_are_one_error():
    """A report on each of them took gigabytes."""
    with faulty_server(sends(b'{"choices": [' + b"0," * 1_000_000 + b"0]}")) as server:
        tracemalloc.start()
        abstention = critic(server).critique(RED, "a wall")
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert "no chat completion" in abstention.reason
    assert peak < 50e6


@pytest.mark.parametrize("no_proxy", ["::1", "[::1]", "[::1]:1"])
def test_an_exception_of_the_proxy_may_be_an_ipv6_address(no_proxy, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", no_proxy)
    assert _proxy(urllib.parse.urlsplit("http://[::1]:1/v1")) is None


@pytest.mark.parametrize(
    "proxy", ["http://[::1", "http://a:99999", "socks5://a:1", f"http://{'a' * 70}:1", "http://:80"]
)
def test_a_proxy_that_cannot_be_is_an_abstention(proxy, monkeypatch):
    monkeypatch.setenv("http_proxy", proxy)
    with faulty_server(GOOD) as server:
        assert "proxy for http is none" in critic(server).critique(RED, "a wall").reason
    assert not server.requests


def test_times_without_an_end_are_possible():
    with faulty_server(refuses(503), GOOD) as server:
        endless_patience = critic(server, timeout_s=math.inf, retry_deadline_s=math.inf)
        assert endless_patience.critique(RED, "a wall") == ADVICE


# --- bugs and interruptions ------------------------------------------------------------------------------------------


def test_a_bug_is_raised_and_is_no_abstention(monkeypatch):
    monkeypatch.setattr(OpenAICritic, "_data_url", lambda *_: 1 / 0)
    with faulty_server(GOOD) as server, pytest.raises(ZeroDivisionError):
        critic(server).critique_batch([RED] * 3, ["a wall"] * 3)


# --- answers as they come --------------------------------------------------------------------------------------------


def test_an_answer_does_not_wait_for_the_others_of_its_batch():
    with faulty_server(slow(1.5, suggestion_json()), GOOD) as server:
        start, times = time.monotonic(), []
        for _, answer in critic(server, concurrency=2).critique_stream([RED] * 4, ["a wall"] * 4):
            assert answer == ADVICE
            times.append(time.monotonic() - start)
    assert len(times) == 4
    assert times[2] < 1.5 <= times[3]


def test_answers_that_have_come_are_given_before_a_bug_is_raised(monkeypatch):
    def fail_at_black(self, image):
        if image.getpixel((0, 0)) == (0, 0, 0):
            assert eventually(lambda: self.usage.replies == 2)
            raise ZeroDivisionError
        return original(self, image)

    original, received = OpenAICritic._data_url, []  # noqa: SLF001 - the first step in a thread
    monkeypatch.setattr(OpenAICritic, "_data_url", fail_at_black)
    images = [RED, Image.new("RGB", (8, 8)), RED, RED, RED]
    with faulty_server(GOOD, GOOD, hangs) as server, pytest.raises(aa.CriticError, match="ZeroDivisionError"):
        received.extend(stream_critic(critic(server, timeout_s=30, concurrency=2), images, ["a wall"] * 5))
    assert sorted(received, key=str) == [(0, ADVICE), (2, ADVICE)]


@pytest.fixture
def interruptible():
    """SIGINT raises KeyboardInterrupt, also where the tests were started in the background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.skipif(sys.platform == "win32", reason="no signal of Windows goes to one thread")
def test_control_c_ends_a_batch_at_once_and_the_answers_before_it_have_been_given():
    received = []
    with faulty_server(GOOD, hangs) as server:
        stream = stream_critic(critic(server, timeout_s=60, concurrency=4), [RED] * 8, ["a wall"] * 8)
        main = threading.main_thread().ident
        start = time.monotonic()
        threading.Timer(0.7, lambda: signal.pthread_kill(main, signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            received.extend(stream)
        assert time.monotonic() - start < 10
        assert [answer for _, answer in received] == [ADVICE]
        assert quiet()


def test_a_stream_that_is_closed_sends_no_further_request():
    with faulty_server(slow(0.2, suggestion_json())) as server:
        stream = stream_critic(critic(server, concurrency=1), [RED] * 8, ["a wall"] * 8)
        next(stream)
        stream.close()
        assert quiet()
        assert len(server.requests) <= 2


# --- construction ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("Qwen/Qwen3-VL-8B-Instruct", "qwen3_vl"),
        ("qwen2-vl-72b-instruct", "qwen2_vl"),
        ("OpenGVLab/InternVL3_5-8B", "internvl"),
        ("google/gemma-3-27b-it", "gemma3"),
    ],
)
def test_the_convention_follows_from_some_model_names(name, family):
    openai_critic = OpenAICritic(base_url="http://127.0.0.1:1/v1", model=name)
    assert openai_critic.conversation.coordinates == coordinates_for(family)


@pytest.mark.parametrize("name", ["gpt-5", "Qwen/Qwen2.5-VL-7B-Instruct", "gemma-3n-e4b", "llava-v1.6", "default"])
def test_for_other_model_names_the_error_says_what_to_pass(name):
    with pytest.raises(aa.InvalidValueError, match=r"does not say how the model writes boxes\. Pass conversation="):
        OpenAICritic(base_url="http://127.0.0.1:1/v1", model=name)


def test_it_passes_check_critic():
    with faulty_server(GOOD) as server:
        check_critic(critic(server))
