"""OpenAICritic against a real server and one that misbehaves: retries, failures, requests, usage and the key."""

import base64
import dataclasses
import io
import json
import logging
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import pytest
from PIL import Image

import artaug as aa
from artaug.critics import Cached, Conversation, Coordinates, OpenAICritic, Usage, coordinates_for
from artaug.critics.server import backoff
from artaug.testing import check_critic
from support.faulty_server import (
    completion,
    drips,
    faulty_server,
    half,
    hangs,
    refuses,
    resets,
    says,
    sends,
    slow,
)
from support.tiny_llava import suggestion_json, tiny_llava

pytestmark = pytest.mark.loopback

RED = Image.new("RGB", (64, 48), "red")
ADVICE = aa.Critique((aa.Suggestion(aa.Box(0, 0, 0.5, 1), "a sunlit window", "dark"),), "dull")
GOOD = says(suggestion_json())
KEY = "sk-very-secret"


@pytest.fixture(autouse=True)
def _short_delays(monkeypatch):
    monkeypatch.setattr(backoff, "_FIRST_DELAY_S", 0.01)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    for proxy in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(proxy, raising=False)


def critic(server, **options):
    defaults = {"conversation": Conversation(), "timeout_s": 5.0, "max_attempts": 3}
    return OpenAICritic(base_url=server.url, model="tiny", **{**defaults, **options})


# --- a real server ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real_server(tmp_path_factory):
    """``transformers serve`` with a tiny LLaVA that always gives the same reply."""
    folder = tmp_path_factory.mktemp("served")
    for part in tiny_llava(fixed_reply=suggestion_json()):
        part.save_pretrained(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [Path(sys.executable).parent / "transformers", "serve", folder, "--host", "127.0.0.1", "--device", "cpu"]
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with (
        (folder / "log").open("w") as log,
        subprocess.Popen([*command, "--port", str(port)], env=offline, stdout=log, stderr=log) as process,
    ):
        try:
            _wait_until_healthy(f"http://127.0.0.1:{port}/health", process, folder / "log")
            yield f"http://127.0.0.1:{port}/v1", str(folder)
        finally:
            process.kill()


def _wait_until_healthy(url, process, log):
    for _ in range(600):
        assert process.poll() is None, log.read_text()
        try:
            urllib.request.urlopen(url, timeout=1).close()
        except OSError:
            time.sleep(0.1)
        else:
            return
    pytest.fail(log.read_text())


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
}
PERMANENT = {
    "400": (refuses(400), "the server answered 400"),
    "401": (refuses(401), "the server answered 401"),
    "wrong content type": (sends(b"<html>hello", content_type="text/html"), "text/html, is no JSON: '<html>hello'"),
    "JSON of something else": (sends(b'{"choices": "none"}'), "no chat completion (choices:"),
    "no choices": (sends(b'{"choices": []}'), "has no choices"),
    "a list": (sends(b"[1]"), "no chat completion (the whole:"),
    "nothing": (sends(b"", content_type="text/plain"), "is no JSON: ''"),
    "nested too deep": (sends(b"[" * 100_000, content_type="text/plain"), "is no JSON"),
    "a refusal": (says(None, refusal="I must not"), "the model refused: I must not"),
    "no critique": (says("Lovely."), "holds no suggestions: 'Lovely.'"),
}


@pytest.mark.parametrize("failure", TEMPORARY)
def test_a_temporary_failure_is_retried(failure):
    behavior, _ = TEMPORARY[failure]
    with faulty_server(behavior, GOOD) as server:
        openai_critic = critic(server, timeout_s=0.3)
        assert openai_critic.critique(RED, "a wall") == ADVICE
        assert openai_critic.usage.retries == 1
        assert openai_critic.usage.failures == 0


@pytest.mark.parametrize("failure", TEMPORARY)
def test_a_failure_that_lasts_is_an_abstention_that_names_it(failure):
    behavior, named = TEMPORARY[failure]
    with faulty_server(behavior) as server:
        openai_critic = critic(server, timeout_s=0.3, max_attempts=2)
        answer = openai_critic.critique(RED, "a wall")
        assert isinstance(answer, aa.Abstention)
        assert named in answer.reason
        assert "tried 2 times" in answer.reason
        assert openai_critic.usage == Usage(retries=1, failures=1)


@pytest.mark.parametrize("failure", PERMANENT)
def test_a_permanent_failure_is_not_retried(failure):
    behavior, named = PERMANENT[failure]
    with faulty_server(behavior) as server:
        answer = critic(server, structured=False).critique(RED, "a wall")
        assert isinstance(answer, aa.Abstention)
        assert named in answer.reason
        assert len(server.requests) == 1


def test_an_address_without_a_server_is_an_abstention():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    answer = OpenAICritic(base_url=url, model="m", conversation=Conversation(), max_attempts=2).critique(RED, "a wall")
    assert isinstance(answer, aa.Abstention)
    assert "the connection failed: ConnectError" in answer.reason


def test_every_picture_gets_an_answer_when_all_kinds_of_failures_mix():
    failures = [behavior for behavior, _ in [*TEMPORARY.values(), *PERMANENT.values()]]
    with faulty_server(*failures, *failures, GOOD) as server:
        openai_critic = critic(server, timeout_s=0.3, max_attempts=2)
        answers = openai_critic.critique_batch([RED] * 40, ["a wall"] * 40)
    assert len(answers) == 40
    assert all(isinstance(answer, aa.Critique | aa.Abstention) for answer in answers)
    assert answers[-1].suggestions == ADVICE.suggestions
    counted = sum(isinstance(answer, aa.Abstention) and "holds no" not in answer.reason for answer in answers)
    assert openai_critic.usage.failures == counted > 0


def test_all_requests_wait_as_long_as_the_server_asks_for():
    with faulty_server(refuses(429, Retry_After="0.6"), GOOD) as server:
        openai_critic = critic(server, concurrency=1)
        assert openai_critic.critique_batch([RED] * 3, ["a wall"] * 3) == [ADVICE] * 3
        assert server.times[1] - server.times[0] >= 0.6


def test_a_wait_beyond_the_retry_deadline_is_an_abstention_that_says_how_long():
    with faulty_server(refuses(429, Retry_After="3600")) as server:
        answer = critic(server, retry_deadline_s=5).critique(RED, "a wall")
        assert isinstance(answer, aa.Abstention)
        assert "it asks to wait 3600 s" in answer.reason
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
    delays = [backoff.backoff_delay_s(attempt) for attempt in range(1, 30)]
    assert all(0 < delay <= 30 for delay in delays)
    assert max(delays[:2]) < 0.03 < min(delays[8:])


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


def test_no_more_requests_than_the_concurrency_run_at_once():
    with faulty_server(slow(0.1, suggestion_json())) as server:
        openai_critic = critic(server, concurrency=3)
        assert openai_critic.critique_batch([RED] * 12, ["a wall"] * 12) == [ADVICE] * 12
        assert server.max_active == 3


def test_answers_are_in_the_order_of_the_pictures():
    def echo(exchange):
        prompt = exchange.request["messages"][-1]["content"][1]["text"].split("----\n")[1].strip()
        time.sleep(0.1 if prompt == "number 0" else 0)
        exchange.send(completion(suggestion_json(prompt=prompt)))

    prompts = [f"number {number}" for number in range(10)]
    with faulty_server(echo) as server:
        answers = critic(server).critique_batch([RED] * 10, prompts)
    assert [answer.suggestions[0].prompt for answer in answers] == prompts


def test_after_a_refused_schema_requests_are_for_free_text_with_one_warning(caplog):
    def picky(exchange):
        (refuses(400, b"response_format is not supported") if "response_format" in exchange.request else GOOD)(exchange)

    with faulty_server(picky) as server, caplog.at_level(logging.WARNING, "artaug"):
        openai_critic = critic(server, concurrency=1)
        answers = openai_critic.critique_batch([RED] * 3, ["a wall"] * 3)
        assert len(server.requests) == 4  # one request with the schema, three without
    note = "the server refused the JSON schema, so the model was asked for free text"
    assert answers == [dataclasses.replace(ADVICE, repairs=(note,))] * 3
    (record,) = caplog.records
    assert "refused the JSON schema" in record.getMessage()
    assert "response_format is not supported" in record.getMessage()


def test_a_reply_cut_at_the_token_limit_is_noted():
    with faulty_server(says(suggestion_json()[:90], finish="length")) as server:
        answer = critic(server).critique(RED, "a wall")
    assert "the reply was cut at the limit of tokens" in (
        answer.repairs if isinstance(answer, aa.Critique) else answer.reason
    )


def test_usage_adds_up_and_has_a_price():
    with faulty_server(GOOD, says(suggestion_json(), usage=False)) as server:
        openai_critic = critic(server, concurrency=1)
        openai_critic.critique_batch([RED] * 2, ["a wall"] * 2)
    assert openai_critic.usage == Usage(replies=2, input_tokens=100, output_tokens=10, uncounted=1)
    assert openai_critic.usage.cost(input_per_million=2, output_per_million=5) == pytest.approx(0.00025)
    with pytest.raises(aa.InvalidValueError, match="prices of -1 and 0"):
        openai_critic.usage.cost(input_per_million=-1, output_per_million=0)


# --- the key ---------------------------------------------------------------------------------------------------------


def test_the_key_is_sent_and_appears_in_no_output(caplog, tmp_path):
    quoting_key = refuses(401, f'{{"error": "bad key {KEY}"}}'.encode())
    with faulty_server(quoting_key) as server, caplog.at_level(logging.DEBUG):
        openai_critic = critic(server, api_key=KEY, structured=False)
        answer = Cached(openai_critic, folder=tmp_path, cache_abstentions=True).critique(RED, "a wall")
    assert server.headers[0]["authorization"] == f"Bearer {KEY}"
    outputs = [repr(openai_critic), str(answer), caplog.text, *(file.read_text() for file in tmp_path.rglob("*.json"))]
    assert len(outputs) == 4
    assert not any(KEY in text for text in outputs)
    assert "***" in answer.reason


def test_the_key_comes_from_the_environment_where_none_is_given(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with faulty_server(GOOD) as server:
        critic(server).critique(RED, "a wall")
    assert server.headers[0]["authorization"] == f"Bearer {KEY}"


# --- bugs and interruptions ------------------------------------------------------------------------------------------


def test_a_bug_is_raised_and_is_no_abstention(monkeypatch):
    monkeypatch.setattr(OpenAICritic, "_data_url", lambda *_: 1 / 0)
    with faulty_server(GOOD) as server, pytest.raises(ZeroDivisionError):
        critic(server).critique_batch([RED] * 3, ["a wall"] * 3)


def test_an_interruption_is_raised_at_once_and_the_critic_can_be_used_again(monkeypatch):
    def interrupt(self, image):
        if threading.active_count() > 1 and image.getpixel((0, 0)) == (0, 0, 0):
            time.sleep(0.3)
            raise KeyboardInterrupt
        return original(self, image)

    original = OpenAICritic._data_url  # noqa: SLF001 - the first step in a thread
    monkeypatch.setattr(OpenAICritic, "_data_url", interrupt)
    black = Image.new("RGB", (8, 8))
    with faulty_server(hangs, GOOD) as server:
        openai_critic, start = critic(server, timeout_s=30, concurrency=2), time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            openai_critic.critique_batch([black, RED], ["a wall"] * 2)
        assert time.monotonic() - start < 10
        assert openai_critic.critique(RED, "a wall") == ADVICE


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


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"base_url": "localhost:8000"}, "no address of a server"),
        ({"base_url": "http://me:secret@host/v1"}, "holds a password"),
        ({"concurrency": 0}, "concurrency=0"),
        ({"timeout_s": float("nan")}, "timeout_s=nan"),
        ({"jpeg_quality": 100}, "need 1 to 95"),
    ],
)
def test_invalid_options_are_refused_at_construction(wrong, message):
    with pytest.raises(aa.InvalidValueError, match=message) as caught:
        OpenAICritic(**{"base_url": "http://127.0.0.1:1/v1", "model": "m", "conversation": Conversation(), **wrong})
    assert "secret" not in str(caught.value)


def test_without_openai_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(aa.MissingExtraError, match=r'OpenAICritic needs the openai package.*"artaug\[openai\]"'):
        OpenAICritic(base_url="http://127.0.0.1:1/v1", model="m", conversation=Conversation())


def test_it_passes_check_critic():
    with faulty_server(GOOD) as server:
        check_critic(critic(server))


def test_a_request_is_the_same_for_the_same_arguments():
    with faulty_server(GOOD) as server:
        openai_critic = critic(server)
        assert openai_critic.critique(RED, "a wall") == openai_critic.critique(RED, "a wall")
    assert json.dumps(server.requests[0]) == json.dumps(server.requests[1])
