"""ManualReview and RecordedDecisions as filters, and the review page through HTTP."""

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import threading
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

import numpy as np
import pytest
from PIL import Image

import artaug as aa
from artaug.errors import StorageError
from artaug.review.decisions import append_decision
from support.strategies import Listed, pair

PAIRS = [pair(10 * index, 10 * index + 5 + index, seed=index) for index in range(4)]


# --- as a filter --------------------------------------------------------------------------------------------------


def test_recorded_decisions_become_verdicts(tmp_path):
    path = tmp_path / "by-hand.jsonl"
    append_decision(path, PAIRS[0], keep=True)
    append_decision(path, PAIRS[1], keep=False)
    verdicts = aa.RecordedDecisions(path).judge_batch(PAIRS[:2])
    assert verdicts == [aa.Verdict(True, "kept by hand", {}), aa.Verdict(False, "dropped by hand", {})]
    assert [verdict.keep for verdict in (~aa.RecordedDecisions(path)).judge_batch(PAIRS[:2])] == [False, True]
    assert aa.RecordedDecisions(path).scorers == frozenset()


def test_recorded_decisions_never_show_the_page_and_raise_for_undecided_pairs(tmp_path):
    path = tmp_path / "by-hand.jsonl"
    append_decision(path, PAIRS[0], keep=True)
    with pytest.raises(aa.UndecidedError, match=r"'.*by-hand.jsonl' has no decision on 3 of 4 pairs yet") as caught:
        aa.RecordedDecisions(path).judge_batch(PAIRS)
    assert caught.value.undecided == 3
    with pytest.raises(aa.UndecidedError):
        (~aa.RecordedDecisions(path)).judge_batch(PAIRS)


def test_the_page_is_not_shown_if_every_pair_is_decided(tmp_path):
    path = tmp_path / "by-hand.jsonl"
    for index, pair_ in enumerate(PAIRS):
        append_decision(path, pair_, keep=index > 1)

    def fail(address):
        raise AssertionError(address)

    review = aa.ManualReview(path, announce=fail)
    assert [verdict.keep for verdict in review.judge_batch(PAIRS)] == [False, False, True, True]
    assert review.serve(PAIRS) == aa.ReviewProgress(kept=2, dropped=2, undecided=0)
    assert review.serve([]) == aa.ReviewProgress(0, 0, 0)
    assert review.judge_batch([]) == []


@pytest.mark.parametrize("port", [-1, 65536])
def test_a_port_out_of_range_is_refused(tmp_path, port):
    with pytest.raises(aa.InvalidValueError, match="need 0"):
        aa.ManualReview(tmp_path / "x").serve(PAIRS, port=port)


# --- through the page ---------------------------------------------------------------------------------------------


class Client:
    """Sends the requests that a browser would send."""

    def __init__(self, address):
        parts = urlsplit(address)
        self.host, self.path = parts.netloc, parts.path

    def request(self, method, path, body=None, headers=None):
        with closing(http.client.HTTPConnection(self.host, timeout=10)) as connection:
            content_type = {"Content-Type": "application/json"} if method == "POST" else {}
            connection.request(method, path, body=body, headers={**content_type, **(headers or {})})
            response = connection.getresponse()
            return response.status, response.read(), dict(response.getheaders())

    def get(self, page, **headers):
        return self.request("GET", self.path + page, headers=headers)

    def post(self, page, body):
        return self.request("POST", self.path + page, json.dumps(body))

    def decide(self, index, keep):
        assert self.post("decide", {"pair": index, "keep": keep})[0] == 200

    def finish(self):
        assert self.post("finish", {})[0] == 200


@contextmanager
def serving(path, pairs=PAIRS, **options):
    """Serve the page in a thread, and finish it at the end of the block."""
    ready, addresses = threading.Event(), []

    def announce(address):
        addresses.append(address)
        ready.set()

    review = aa.ManualReview(path, announce=announce, **options)
    results = []
    thread = threading.Thread(target=lambda: results.append(review.serve(pairs, revisit=True)), daemon=True)
    thread.start()
    assert ready.wait(10)
    client = Client(addresses[0])
    try:
        yield client, results
    finally:
        if thread.is_alive():
            client.finish()
        thread.join(10)
    assert not thread.is_alive()


@pytest.mark.loopback
def test_pairs_are_kept_and_dropped_on_the_page(tmp_path):
    path = tmp_path / "runs" / "by-hand.jsonl"
    with serving(path) as (client, results):
        client.decide(0, keep=True)
        client.decide(1, keep=False)
        client.decide(2, keep=True)
        client.decide(2, keep=None)
        state = json.loads(client.get("state")[1])
    assert [shown["keep"] for shown in state["pairs"]] == [True, False, None, None]
    assert state["history"] == [0, 1]
    assert results == [aa.ReviewProgress(kept=1, dropped=1, undecided=2)]
    assert aa.RecordedDecisions(path).judge_batch(PAIRS[:2])[0].keep


@pytest.mark.loopback
def test_the_page_holds_the_prompts_the_regions_and_the_pictures(tmp_path):
    plan = aa.Plan("a", (aa.Region(aa.Box(0, 0, 0.5, 1), "brighter"), aa.Region(aa.Mask.from_array(np.eye(2)), "soft")))
    edited = replace(PAIRS[0], plan=plan, prompt="</script><b>bold")
    with serving(tmp_path / "x.jsonl", [edited, PAIRS[1]]) as (client, _):
        status, page, headers = client.get("")
        shown = json.loads(client.get("state")[1])["pairs"][0]
        pictures = {side: client.get(f"{side}/0.png")[1] for side in ("before", "after")}
    assert status == 200
    assert b"bold" not in page
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    nonce = headers["Content-Security-Policy"].partition("'nonce-")[2].partition("'")[0]
    assert page.count(f'nonce="{nonce}"'.encode()) == 2
    assert headers["Cache-Control"] == "no-store"
    assert shown["prompt"] == "</script><b>bold"
    assert shown["regions"] == [{"prompt": "brighter", "box": [0, 0, 0.5, 1]}, {"prompt": "soft", "box": None}]
    for side, data in pictures.items():
        (tmp_path / side).write_bytes(data)
        assert Image.open(tmp_path / side).tobytes() == getattr(edited, side).convert("RGB").tobytes()


@pytest.mark.loopback
def test_a_second_session_continues_the_first(tmp_path):
    path = tmp_path / "x.jsonl"
    with serving(path) as (client, _):
        client.decide(3, keep=True)
    with serving(path, PAIRS[::-1]) as (client, _):
        state = json.loads(client.get("state")[1])
        assert [shown["keep"] for shown in state["pairs"]] == [True, None, None, None]
        client.decide(1, keep=False)
    assert aa.ManualReview(path).progress(PAIRS) == aa.ReviewProgress(1, 1, 2)


@pytest.mark.loopback
def test_pairs_that_show_the_same_appear_once(tmp_path):
    path = tmp_path / "x.jsonl"
    with serving(path, [PAIRS[0], PAIRS[1], replace(PAIRS[0], seed=7)]) as (client, results):
        assert len(json.loads(client.get("state")[1])["pairs"]) == 2
        client.decide(0, keep=True)
    assert results == [aa.ReviewProgress(2, 0, 1)]


def deciding(keeps):
    """An ``announce`` that decides on the pairs in order and then finishes."""

    def announce(address):
        def run():
            client = Client(address)
            for index, keep in enumerate(keeps):
                client.decide(index, keep)
            client.finish()

        threading.Thread(target=run, daemon=True).start()

    return announce


@pytest.mark.loopback
def test_judging_shows_the_page_with_only_the_pairs_that_the_prefilter_keeps(tmp_path):
    gain = aa.Gain(Listed(), at_least=0.55)
    prior = gain.judge_batch(PAIRS)
    assert [verdict.keep for verdict in prior] == [False, True, True, True]
    review = aa.ManualReview(tmp_path / "x.jsonl", prefilter=gain, announce=deciding([True, False, True]))

    verdicts = review.judge_batch(PAIRS)

    assert [verdict.keep for verdict in verdicts] == [False, True, False, True]
    assert verdicts[0] == prior[0]
    assert verdicts[2] == aa.Verdict(False, f"{prior[2].reason}; dropped by hand", prior[2].scores)
    assert review.scorers == gain.scorers


@pytest.mark.loopback
def test_finishing_early_raises_and_keeps_the_decisions(tmp_path):
    path = tmp_path / "x.jsonl"
    review = aa.ManualReview(path, announce=deciding([True]))
    with pytest.raises(aa.UndecidedError, match="on 3 of 4 pairs"):
        review.judge_batch(PAIRS)
    second = aa.ManualReview(path, announce=deciding([True, False, False, False]))
    assert [verdict.keep for verdict in second.judge_batch(PAIRS)] == [True, False, False, False]


@pytest.mark.loopback
@pytest.mark.parametrize(
    ("method", "page", "body", "headers", "status"),
    [
        pytest.param("GET", "nothing", None, {}, 404, id="no-page"),
        pytest.param("GET", "before/9.png", None, {}, 404, id="no-pair"),
        pytest.param("GET", "before/-1.png", None, {}, 404, id="before-the-first"),
        pytest.param("GET", "before/" + "9" * 5000 + ".png", None, {}, 404, id="a-long-number"),
        pytest.param("GET", "before/../../../etc/passwd", None, {}, 404, id="a-path"),
        pytest.param("POST", "nothing", "{}", {}, 404, id="no-act"),
        pytest.param("POST", "decide", "{", {}, 400, id="no-json"),
        pytest.param("POST", "decide", b"\xff", {}, 400, id="no-text"),
        pytest.param("POST", "decide", "[1]", {}, 400, id="a-list"),
        pytest.param("POST", "decide", "{}", {}, 400, id="nothing-said"),
        pytest.param("POST", "decide", '{"pair": 0}', {}, 400, id="no-word"),
        pytest.param("POST", "decide", '{"pair": true, "keep": true}', {}, 400, id="a-truth-for-a-number"),
        pytest.param("POST", "decide", '{"pair": 0, "keep": 1}', {}, 400, id="a-number-for-a-truth"),
        pytest.param("POST", "decide", '{"pair": 4, "keep": true}', {}, 404, id="beyond-the-last"),
        pytest.param("POST", "decide", '{"pair": -1, "keep": true}', {}, 404, id="below-the-first"),
        pytest.param("POST", "decide", " " * 5000, {}, 413, id="too-long"),
        pytest.param("POST", "decide", "{}", {"Content-Type": "text/plain"}, 400, id="a-form"),
        pytest.param(
            "POST", "decide", '{"pair": 0, "keep": true}', {"Origin": "http://evil.example"}, 403, id="origin"
        ),
        pytest.param("POST", "decide", '{"pair": 0, "keep": true}', {"Origin": "null"}, 403, id="origin-hidden"),
        pytest.param("GET", "state", None, {"Sec-Fetch-Site": "cross-site"}, 403, id="from-another-site"),
        pytest.param("GET", "state", None, {"Host": "evil.example"}, 403, id="by-another-name"),
        pytest.param(
            "GET", "state", None, {"Host": "127.0.0.1.evil.example:80"}, 403, id="by-a-name-that-begins-alike"
        ),
        pytest.param("PUT", "state", None, {}, 501, id="another-method"),
    ],
)
def test_an_invalid_request_gets_an_error_and_records_no_decision(tmp_path, method, page, body, headers, status):
    with serving(tmp_path / "x.jsonl") as (client, results):
        assert client.request(method, client.path + page, body, headers)[0] == status
        assert client.get("state")[0] == 200
    assert results == [aa.ReviewProgress(0, 0, 4)]


@pytest.mark.loopback
def test_without_the_secret_every_request_is_refused(tmp_path):
    with serving(tmp_path / "x.jsonl") as (client, results):
        for path in ("/", "/state", f"/{'x' * 32}/state", client.path[:-2] + "/state"):
            status, body, _ = client.request("GET", path)
            assert status == 404
            assert client.path.strip("/").encode() not in body
        assert client.request("POST", "/finish", "{}")[0] == 404
        assert not results


@pytest.mark.loopback
def test_bytes_that_are_not_http_do_not_end_the_server(tmp_path):
    with serving(tmp_path / "x.jsonl") as (client, _):
        host, _, port = client.host.partition(":")
        for data in (
            b"\x16\x03\x01\x02",
            b"GET\r\n\r\n",
            "GET /é HTTP/1.1\r\nHost: localhost\r\n\r\n".encode(),
            b"POST " + client.path.encode() + b"decide HTTP/1.1\r\n",
        ):
            with closing(socket.create_connection((host, int(port)))) as connection:
                connection.sendall(data)
        assert client.get("")[0] == 200


@pytest.mark.loopback
def test_a_failed_write_is_reported_on_the_page(tmp_path):
    path = tmp_path / "x.jsonl"
    with serving(path) as (client, results):
        client.decide(0, keep=True)
        path.rename(tmp_path / "aside")
        path.mkdir()
        status, message, _ = client.post("decide", {"pair": 1, "keep": True})
        path.rmdir()
        (tmp_path / "aside").rename(path)
        client.decide(2, keep=True)
    assert status == 507
    assert b"x.jsonl" in message
    assert results == [aa.ReviewProgress(2, 0, 2)]


@pytest.mark.loopback
def test_the_server_listens_on_the_loopback_interface_only(tmp_path):
    with serving(tmp_path / "x.jsonl") as (client, _):
        assert client.host.startswith("127.0.0.1:")


def test_a_port_in_use_raises(tmp_path):
    with closing(socket.create_server(("127.0.0.1", 0))) as taken, pytest.raises(OSError, match="in use"):
        aa.ManualReview(tmp_path / "x.jsonl").serve(PAIRS, port=taken.getsockname()[1])


def test_an_invalid_file_raises_before_the_page_is_shown(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text("{}\n")
    with pytest.raises(StorageError, match="line 1 is not a decision"):
        aa.ManualReview(path).serve(PAIRS)


PROGRAM = """
import signal
import artaug as aa
from support.strategies import pair
pairs = [pair(10 * index, 10 * index + 5 + index, seed=index) for index in range(4)]
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may ignore SIGINT for background processes
try:
    aa.ManualReview({path!r}, announce=lambda address: print(address, flush=True)).serve(pairs)
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


@pytest.mark.loopback
@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGINT], ids=["killed", "interrupted"])
def test_a_kill_loses_no_confirmed_decision(tmp_path, signal_number):
    path = tmp_path / "x.jsonl"
    code = textwrap.dedent(PROGRAM).format(path=str(path))
    search = os.pathsep.join(entry for entry in sys.path if entry)
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": search}
    ) as program:
        client = Client(program.stdout.readline().strip())
        client.decide(0, keep=True)
        client.decide(1, keep=False)
        program.send_signal(signal_number)
        try:
            output, _ = program.communicate(timeout=30)
        finally:
            program.kill()
    assert output == ("interrupted\n" if signal_number is signal.SIGINT else "")
    assert aa.ManualReview(path).progress(PAIRS) == aa.ReviewProgress(1, 1, 2)


# --- in a browser -----------------------------------------------------------------------------------------------------


@pytest.mark.loopback
def test_the_secret_reaches_the_browser_by_a_file_that_only_this_user_can_read(tmp_path, monkeypatch):
    opened = {}

    def read_as_a_browser(address):
        file = Path(url2pathname(urlsplit(address).path))
        opened.update(address=address, file=file, modes=[path.stat().st_mode & 0o077 for path in (file, file.parent)])
        page = file.read_text()
        opened["url"] = re.search(r'url=(http://127[^"]*)"', page).group(1)
        opened["client"] = client = Client(opened["url"])
        tab = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}
        opened["page"] = client.request("GET", client.path, None, tab)[0]
        opened["state"] = client.request("GET", client.path + "state", None, tab)[0]
        opened["frame"] = client.request("GET", client.path, None, {**tab, "Sec-Fetch-Dest": "iframe"})[0]
        client.finish()

    monkeypatch.setattr("webbrowser.open", read_as_a_browser)
    aa.ManualReview(tmp_path / "new" / "x.jsonl").serve(PAIRS)

    secret = urlsplit(opened["url"]).path.strip("/")
    assert len(secret) > 20
    assert secret not in opened["address"]
    assert opened["modes"] == [0, 0]
    assert (opened["page"], opened["state"], opened["frame"]) == (200, 403, 403)
    assert not opened["file"].parent.exists()
