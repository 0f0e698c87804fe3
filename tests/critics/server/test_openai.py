import base64
import builtins
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
from support.tiny_llava import reply, tiny_llava

pytestmark = pytest.mark.loopback

RED = Image.new("RGB", (64, 48), "red")
ADVICE = aa.Critique((aa.Suggestion(aa.Box(0, 0, 0.5, 1), "a sunlit window", "dark"),), "dull")
GOOD = says(reply())
KEY = "sk-very-secret"


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    monkeypatch.setattr(backoff, "_FIRST_WAIT_S", 0.01)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    for proxy in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(proxy, raising=False)


def critic(server, **choices):
    defaults = {"conversation": Conversation(), "timeout_s": 5.0, "tries": 3}
    return OpenAICritic(base_url=server.url, model="tiny", **{**defaults, **choices})


# --- a real server ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real_server(tmp_path_factory):
    """``transformers serve`` with a tiny LLaVA that has learnt one reply."""
    folder = tmp_path_factory.mktemp("served")
    for part in tiny_llava(saying=reply()):
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
            _until_it_answers(f"http://127.0.0.1:{port}/health", process, folder / "log")
            yield f"http://127.0.0.1:{port}/v1", str(folder)
        finally:
            process.kill()


def _until_it_answers(url, process, log):
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
    one = OpenAICritic(base_url=url, model=model, conversation=Conversation(), max_new_tokens=16, concurrency=2)
    assert one.critique_batch([RED] * 3, ["a wall"] * 3) == [ADVICE] * 3
    assert one.usage.replies == 3
    assert one.usage.input_tokens > 3 * 300
    assert one.usage.output_tokens == 3 * 2
    assert one.usage.uncounted == one.usage.faults == one.usage.retries == 0


def test_a_real_server_answers_in_two_stages(real_server):
    url, model = real_server
    asked = Conversation.in_two_stages(coordinates=Coordinates("thousandths"))
    one = OpenAICritic(base_url=url, model=model, conversation=asked, max_new_tokens=16)
    assert one.critique(RED, "a wall") == ADVICE
    assert one.usage.replies == 2


def test_a_real_servers_refusal_is_an_abstention_that_quotes_it(real_server):
    url, _ = real_server
    one = OpenAICritic(base_url=url, model="another", conversation=Conversation())
    said = one.critique(RED, "a wall")
    assert isinstance(said, aa.Abstention)
    assert said.reason.startswith("the server answered 400:")
    assert "requested" in said.reason


def test_a_real_server_can_be_probed(real_server):
    url, model = real_server
    found = OpenAICritic(base_url=url, model=model, conversation=Conversation(), max_new_tokens=16).probe()
    assert not found.found
    assert found.replies == (reply(),) * 6


# --- faults ----------------------------------------------------------------------------------------------------------

PASSING = {
    "429 with a time to wait": (refuses(429, Retry_After="0"), "429"),
    "500": (refuses(500), "500"),
    "503": (refuses(503), "503"),
    "hanging": (hangs, "no whole answer within 0.3 s"),
    "dripping": (drips, "no whole answer within 0.3 s"),
    "slow": (slow(2, reply()), "no whole answer within 0.3 s"),
    "half a body": (half(reply()), "the connection failed"),
    "broken JSON": (sends(completion(reply())[:-9]), "is no JSON"),
    "connection reset": (resets, "the connection failed"),
}
LASTING = {
    "400": (refuses(400), "the server answered 400"),
    "401": (refuses(401), "the server answered 401"),
    "wrong content type": (sends(b"<html>hello", kind="text/html"), "text/html, is no JSON: '<html>hello'"),
    "JSON of something else": (sends(b'{"choices": "none"}'), "no chat completion (choices:"),
    "no choices": (sends(b'{"choices": []}'), "has no choices"),
    "a list": (sends(b"[1]"), "no chat completion (the whole:"),
    "nothing": (sends(b"", kind="text/plain"), "is no JSON: ''"),
    "nested too deep": (sends(b"[" * 100_000, kind="text/plain"), "is no JSON"),
    "a refusal": (says(None, refusal="I must not"), "the model refused: I must not"),
    "no critique": (says("Lovely."), "holds no suggestions: 'Lovely.'"),
}


@pytest.mark.parametrize("fault", PASSING)
def test_a_fault_that_passes_is_tried_again(fault):
    behaviour, _ = PASSING[fault]
    with faulty_server(behaviour, GOOD) as server:
        one = critic(server, timeout_s=0.3)
        assert one.critique(RED, "a wall") == ADVICE
        assert one.usage.retries == 1
        assert one.usage.faults == 0


@pytest.mark.parametrize("fault", PASSING)
def test_a_fault_that_stays_is_an_abstention_that_names_it(fault):
    behaviour, named = PASSING[fault]
    with faulty_server(behaviour) as server:
        one = critic(server, timeout_s=0.3, tries=2)
        said = one.critique(RED, "a wall")
        assert isinstance(said, aa.Abstention)
        assert named in said.reason
        assert "tried 2 times" in said.reason
        assert one.usage == Usage(retries=1, faults=1)


@pytest.mark.parametrize("fault", LASTING)
def test_a_fault_that_will_not_pass_is_not_tried_again(fault):
    behaviour, named = LASTING[fault]
    with faulty_server(behaviour) as server:
        said = critic(server, structured=False).critique(RED, "a wall")
        assert isinstance(said, aa.Abstention)
        assert named in said.reason
        assert len(server.requests) == 1


def test_nobody_at_the_address_is_an_abstention():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    said = OpenAICritic(base_url=url, model="m", conversation=Conversation(), tries=2).critique(RED, "a wall")
    assert isinstance(said, aa.Abstention)
    assert "the connection failed: ConnectError" in said.reason


def test_nothing_is_lost_when_everything_goes_wrong_at_once():
    faults = [behaviour for behaviour, _ in [*PASSING.values(), *LASTING.values()]]
    with faulty_server(*faults, *faults, GOOD) as server:
        one = critic(server, timeout_s=0.3, tries=2)
        said = one.critique_batch([RED] * 40, ["a wall"] * 40)
    assert len(said) == 40
    assert all(isinstance(answer, aa.Critique | aa.Abstention) for answer in said)
    assert said[-1].suggestions == ADVICE.suggestions
    counted = sum(isinstance(answer, aa.Abstention) and "holds no" not in answer.reason for answer in said)
    assert one.usage.faults == counted > 0


def test_the_wait_that_a_server_asks_for_is_kept_by_all():
    with faulty_server(refuses(429, Retry_After="0.6"), GOOD) as server:
        one = critic(server, concurrency=1)
        assert one.critique_batch([RED] * 3, ["a wall"] * 3) == [ADVICE] * 3
        assert server.times[1] - server.times[0] >= 0.6


def test_a_wait_beyond_patience_is_an_abstention_that_says_how_long():
    with faulty_server(refuses(429, Retry_After="3600")) as server:
        said = critic(server, patience_s=5).critique(RED, "a wall")
        assert isinstance(said, aa.Abstention)
        assert "it asks to wait 3600 s" in said.reason
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
def test_the_ways_to_ask_for_a_wait(headers, seconds):
    assert backoff.asked_wait(headers) == seconds


def test_waits_grow_and_end():
    waits = [backoff.wait_before(attempt) for attempt in range(1, 30)]
    assert all(0 < wait <= 30 for wait in waits)
    assert max(waits[:2]) < 0.03 < min(waits[8:])


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
    shown, said = request["messages"][-1]["content"]
    assert "a wall" in said["text"]
    head, data = shown["image_url"]["url"].split(",")
    assert head == "data:image/png;base64"
    picture = Image.open(io.BytesIO(base64.b64decode(data)))
    assert picture.size == (32, 24)
    assert picture.getpixel((5, 5)) == (255, 0, 0)


def test_a_picture_is_encoded_once_for_two_stages_and_all_tries(monkeypatch):
    calls, plain = [], OpenAICritic._encoded  # noqa: SLF001 - how often it runs shows nowhere else
    monkeypatch.setattr(OpenAICritic, "_encoded", lambda self, image: calls.append(image) or plain(self, image))
    asked = Conversation.in_two_stages(coordinates=Coordinates("thousandths"))
    with faulty_server(refuses(500), says("dark"), refuses(500), GOOD) as server:
        assert critic(server, conversation=asked).critique(RED, "a wall") == ADVICE
        assert len(server.requests) == 4
        assert [message["role"] for message in server.requests[-1]["messages"]] == [
            "system", "user", "assistant", "user",
        ]  # fmt: skip
    assert len(calls) == 1


def test_jpeg_and_the_other_limit_and_no_temperature():
    with faulty_server(GOOD) as server:
        critic(server, jpeg_quality=90, limit="max_completion_tokens", temperature=None).critique(RED, "a wall")
    (request,) = server.requests
    assert request["max_completion_tokens"] == 1024
    assert not {"max_tokens", "temperature"} & set(request)
    assert request["messages"][-1]["content"][0]["image_url"]["url"].startswith("data:image/jpeg;base64,")


def test_no_more_than_the_agreed_requests_are_on_their_way():
    with faulty_server(slow(0.1, reply())) as server:
        one = critic(server, concurrency=3)
        assert one.critique_batch([RED] * 12, ["a wall"] * 12) == [ADVICE] * 12
        assert server.busiest == 3


def test_answers_come_in_the_order_of_the_pictures():
    def echo(exchange):
        prompt = exchange.request["messages"][-1]["content"][1]["text"].split("----\n")[1].strip()
        time.sleep(0.1 if prompt == "number 0" else 0)
        exchange.send(completion(reply(prompt=prompt)))

    prompts = [f"number {number}" for number in range(10)]
    with faulty_server(echo) as server:
        said = critic(server).critique_batch([RED] * 10, prompts)
    assert [answer.suggestions[0].prompt for answer in said] == prompts


def test_a_server_that_refuses_schemas_is_asked_freely_with_one_warning(caplog):
    def picky(exchange):
        (refuses(400, b"response_format is not supported") if "response_format" in exchange.request else GOOD)(exchange)

    with faulty_server(picky) as server, caplog.at_level(logging.WARNING, "artaug"):
        one = critic(server, concurrency=1)
        said = one.critique_batch([RED] * 3, ["a wall"] * 3)
        assert len(server.requests) == 4  # refused once, remembered then
    told = "the server refused the JSON schema, so the model was asked freely"
    assert said == [dataclasses.replace(ADVICE, repairs=(told,))] * 3
    (record,) = caplog.records
    assert "refused the JSON schema" in record.getMessage()
    assert "response_format is not supported" in record.getMessage()


def test_a_reply_cut_at_the_limit_of_tokens_says_so():
    with faulty_server(says(reply()[:90], finish="length")) as server:
        said = critic(server).critique(RED, "a wall")
    assert "the reply was cut at the limit of tokens" in (
        said.repairs if isinstance(said, aa.Critique) else said.reason
    )


def test_usage_adds_up_and_is_priced():
    with faulty_server(GOOD, says(reply(), usage=False)) as server:
        one = critic(server, concurrency=1)
        one.critique_batch([RED] * 2, ["a wall"] * 2)
    assert one.usage == Usage(replies=2, input_tokens=100, output_tokens=10, uncounted=1)
    assert one.usage.cost(input_per_million=2, output_per_million=5) == pytest.approx(0.00025)
    with pytest.raises(aa.InvalidValueError, match="prices of -1 and 0"):
        one.usage.cost(input_per_million=-1, output_per_million=0)


# --- the key ---------------------------------------------------------------------------------------------------------


def test_the_key_is_sent_and_shown_nowhere(caplog, tmp_path):
    tells = refuses(401, f'{{"error": "bad key {KEY}"}}'.encode())
    with faulty_server(tells) as server, caplog.at_level(logging.DEBUG):
        one = critic(server, api_key=KEY, structured=False)
        said = Cached(one, folder=tmp_path, abstentions=True).critique(RED, "a wall")
    assert server.headers[0]["authorization"] == f"Bearer {KEY}"
    shown = [repr(one), str(said), caplog.text, *(file.read_text() for file in tmp_path.rglob("*.json"))]
    assert len(shown) == 4
    assert not any(KEY in text for text in shown)
    assert "***" in said.reason


def test_the_key_comes_from_the_environment_where_none_is_given(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with faulty_server(GOOD) as server:
        critic(server).critique(RED, "a wall")
    assert server.headers[0]["authorization"] == f"Bearer {KEY}"


# --- bugs and interruptions ------------------------------------------------------------------------------------------


def test_a_bug_is_raised_not_abstained_from(monkeypatch):
    monkeypatch.setattr(OpenAICritic, "_encoded", lambda *_: 1 / 0)
    with faulty_server(GOOD) as server, pytest.raises(ZeroDivisionError):
        critic(server).critique_batch([RED] * 3, ["a wall"] * 3)


def test_an_interruption_is_raised_at_once_and_the_critic_can_be_used_again(monkeypatch):
    def interrupt(self, image):
        if threading.active_count() > 1 and image.getpixel((0, 0)) == (0, 0, 0):
            time.sleep(0.3)
            raise KeyboardInterrupt
        return plain(self, image)

    plain = OpenAICritic._encoded  # noqa: SLF001 - the first step in a thread
    monkeypatch.setattr(OpenAICritic, "_encoded", interrupt)
    black = Image.new("RGB", (8, 8))
    with faulty_server(hangs, GOOD) as server:
        one, begun = critic(server, timeout_s=30, concurrency=2), time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            one.critique_batch([black, RED], ["a wall"] * 2)
        assert time.monotonic() - begun < 10
        assert one.critique(RED, "a wall") == ADVICE


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
def test_some_names_tell_how_the_model_writes_boxes(name, family):
    one = OpenAICritic(base_url="http://127.0.0.1:1/v1", model=name)
    assert one.conversation.coordinates == coordinates_for(family)


@pytest.mark.parametrize("name", ["gpt-5", "Qwen/Qwen2.5-VL-7B-Instruct", "gemma-3n-e4b", "llava-v1.6", "default"])
def test_other_names_do_not_and_the_error_says_what_to_pass(name):
    with pytest.raises(aa.InvalidValueError, match=r"does not tell how the model writes boxes\. Pass conversation="):
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
def test_what_cannot_work_is_refused_at_construction(wrong, message):
    with pytest.raises(aa.InvalidValueError, match=message) as caught:
        OpenAICritic(**{"base_url": "http://127.0.0.1:1/v1", "model": "m", "conversation": Conversation(), **wrong})
    assert "secret" not in str(caught.value)


def test_without_openai_the_extra_is_named(monkeypatch):
    plain = builtins.__import__

    def without(name, *rest):
        if name == "openai":
            raise ImportError(name)
        return plain(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(aa.MissingExtraError, match=r'OpenAICritic needs the openai package.*"artaug\[openai\]"'):
        OpenAICritic(base_url="http://127.0.0.1:1/v1", model="m", conversation=Conversation())


def test_the_critic_keeps_the_promises_of_its_seam():
    with faulty_server(GOOD) as server:
        check_critic(critic(server))


def test_a_request_is_the_same_for_the_same_arguments():
    with faulty_server(GOOD) as server:
        one = critic(server)
        assert one.critique(RED, "a wall") == one.critique(RED, "a wall")
    assert json.dumps(server.requests[0]) == json.dumps(server.requests[1])
