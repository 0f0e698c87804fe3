"""A person's decisions: on disk, as a filter, and through the page itself with a real client."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
from contextlib import closing, contextmanager
from urllib.parse import urlsplit

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import artaug as aa
from artaug.errors import StorageError
from artaug.pairs import pair_digest
from artaug.review.decisions import append_decision, read_decisions
from support.strategies import Listed, pair

PAIRS = [pair(10 * number, 10 * number + 5 + number, seed=number) for number in range(4)]


def same(one, *, image=lambda picture: picture, **changed):
    return aa.ImagePair(
        **{
            "prompt": one.prompt,
            "seed": one.seed,
            "before": image(one.before),
            "after": image(one.after),
            "plan": one.plan,
            **changed,
        }
    )


# --- the file -----------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from([True, False, None])), max_size=12))
def test_the_last_word_on_a_pair_counts(tmp_path_factory, said):
    path = tmp_path_factory.mktemp("queue") / "deep" / "by-hand.jsonl"
    wanted = {}
    for number, keep in said:
        append_decision(path, PAIRS[number], keep)
        wanted.pop(number, None)
        wanted |= {} if keep is None else {number: keep}
    assert list(read_decisions(path).items()) == [(pair_digest(PAIRS[at]), keep) for at, keep in wanted.items()]
    if said:
        assert len(path.read_text(encoding="utf-8").splitlines()) == len(said)


def test_a_pair_is_known_by_what_it_shows(tmp_path):
    one = PAIRS[1]
    stored = tmp_path / "one.png"

    def reread(picture):
        picture.save(stored)
        return Image.open(stored).convert("RGB")

    assert pair_digest(same(one, image=reread)) == pair_digest(one)
    assert pair_digest(same(one, seed=99, plan=aa.Plan("another"))) == pair_digest(one)
    others = [same(one, prompt="x"), same(one, before=one.after), same(one, before=one.after, after=one.before)]
    assert len({pair_digest(other) for other in (one, *others)}) == 4


@pytest.mark.parametrize("kept", range(1, 60, 7))
def test_a_line_torn_by_a_kill_is_as_if_it_was_never_begun(tmp_path, kept):
    path = tmp_path / "by-hand.jsonl"
    append_decision(path, PAIRS[0], keep=True)
    whole = path.read_bytes()
    append_decision(path, PAIRS[1], keep=False)
    path.write_bytes(path.read_bytes()[: len(whole) + kept])

    assert read_decisions(path) == {pair_digest(PAIRS[0]): True}
    append_decision(path, PAIRS[2], keep=True)
    assert read_decisions(path) == {pair_digest(PAIRS[0]): True, pair_digest(PAIRS[2]): True}


@pytest.mark.parametrize(
    "line", ["not JSON", "[]", '{"pair": "a"}', '{"pair": 3, "keep": true}', '{"pair": "a", "keep": 1}', ""]
)
def test_a_line_that_is_no_decision_is_named(tmp_path, line):
    path = tmp_path / "by-hand.jsonl"
    append_decision(path, PAIRS[0], keep=True)
    with path.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(StorageError, match=r"by-hand.jsonl', line 2 is no decision"):
        aa.RecordedDecisions(path).judge(PAIRS[0])


# --- as a filter --------------------------------------------------------------------------------------------------


def test_verdicts_are_what_was_decided(tmp_path):
    path = tmp_path / "by-hand.jsonl"
    append_decision(path, PAIRS[0], keep=True)
    append_decision(path, PAIRS[1], keep=False)
    found = aa.RecordedDecisions(path).judge_batch(PAIRS[:2])
    assert found == [aa.Verdict(True, "kept by hand", {}), aa.Verdict(False, "dropped by hand", {})]
    assert [verdict.keep for verdict in (~aa.RecordedDecisions(path)).judge_batch(PAIRS[:2])] == [False, True]
    assert aa.RecordedDecisions(path).scorers == frozenset()


def test_nobody_is_asked_by_verdicts_and_what_is_undecided_is_said(tmp_path):
    path = tmp_path / "by-hand.jsonl"
    append_decision(path, PAIRS[0], keep=True)
    with pytest.raises(aa.UndecidedError, match=r"'.*by-hand.jsonl' has no decision on 3 of 4 pairs yet") as caught:
        aa.RecordedDecisions(path).judge_batch(PAIRS)
    assert caught.value.undecided == 3
    with pytest.raises(aa.UndecidedError):
        (~aa.RecordedDecisions(path)).judge_batch(PAIRS)


def test_a_queue_with_everything_decided_shows_nothing(tmp_path):
    path = tmp_path / "by-hand.jsonl"
    for number, one in enumerate(PAIRS):
        append_decision(path, one, keep=number > 1)

    def never(address):
        raise AssertionError(address)

    queue = aa.ManualReview(path, announce=never)
    assert [verdict.keep for verdict in queue.judge_batch(PAIRS)] == [False, False, True, True]
    assert queue.serve(PAIRS) == aa.ReviewProgress(kept=2, dropped=2, undecided=0)
    assert queue.serve([]) == aa.ReviewProgress(0, 0, 0)
    assert queue.judge_batch([]) == []


def test_a_port_that_is_none_is_refused(tmp_path):
    with pytest.raises(aa.InvalidValueError, match="need 0"):
        aa.ManualReview(tmp_path / "x").serve(PAIRS, port=70000)


# --- through the page ---------------------------------------------------------------------------------------------


class Client:
    """Talks to the page as a browser does."""

    def __init__(self, address):
        parts = urlsplit(address)
        self.place, self.path = parts.netloc, parts.path

    def ask(self, method, path, body=None, headers=None):
        with closing(http.client.HTTPConnection(self.place, timeout=10)) as link:
            sent = {"Content-Type": "application/json"} if method == "POST" else {}
            link.request(method, path, body=body, headers={**sent, **(headers or {})})
            reply = link.getresponse()
            return reply.status, reply.read(), dict(reply.getheaders())

    def get(self, page, **headers):
        return self.ask("GET", self.path + page, headers=headers)

    def post(self, page, said):
        return self.ask("POST", self.path + page, json.dumps(said))

    def decide(self, number, keep):
        assert self.post("decide", {"pair": number, "keep": keep})[0] == 200

    def finish(self):
        assert self.post("finish", {})[0] == 200


@contextmanager
def asking(path, pairs=PAIRS, **options):
    """Show the page in a thread, as a notebook would wait for it, and end it in any case."""
    ready, seen = threading.Event(), []

    def announce(address):
        seen.append(address)
        ready.set()

    queue = aa.ManualReview(path, announce=announce, **options)
    found = []
    thread = threading.Thread(target=lambda: found.append(queue.serve(pairs, review=True)), daemon=True)
    thread.start()
    assert ready.wait(10)
    client = Client(seen[0])
    try:
        yield client, found
    finally:
        if thread.is_alive():
            client.finish()
        thread.join(10)
    assert not thread.is_alive()


@pytest.mark.loopback
def test_pairs_are_kept_and_dropped_on_the_page(tmp_path):
    path = tmp_path / "runs" / "by-hand.jsonl"
    with asking(path) as (client, found):
        client.decide(0, keep=True)
        client.decide(1, keep=False)
        client.decide(2, keep=True)
        client.decide(2, keep=None)
        state = json.loads(client.get("state")[1])
    assert [one["keep"] for one in state["pairs"]] == [True, False, None, None]
    assert state["history"] == [0, 1]
    assert found == [aa.ReviewProgress(kept=1, dropped=1, undecided=2)]
    assert aa.RecordedDecisions(path).judge_batch(PAIRS[:2])[0].keep


@pytest.mark.loopback
def test_the_page_holds_the_prompts_the_regions_and_the_pictures(tmp_path):
    plan = aa.Plan("a", (aa.Region(aa.Box(0, 0, 0.5, 1), "brighter"), aa.Region(aa.Mask.from_array(np.eye(2)), "soft")))
    one = same(PAIRS[0], plan=plan, prompt="</script><b>bold")
    with asking(tmp_path / "x.jsonl", [one, PAIRS[1]]) as (client, _):
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
        assert Image.open(tmp_path / side).tobytes() == getattr(one, side).convert("RGB").tobytes()


@pytest.mark.loopback
def test_the_first_run_is_continued_by_the_second(tmp_path):
    path = tmp_path / "x.jsonl"
    with asking(path) as (client, _):
        client.decide(3, keep=True)
    with asking(path, PAIRS[::-1]) as (client, _):
        state = json.loads(client.get("state")[1])
        assert [one["keep"] for one in state["pairs"]] == [True, None, None, None]
        client.decide(1, keep=False)
    assert aa.ManualReview(path).standing(PAIRS) == aa.ReviewProgress(1, 1, 2)


@pytest.mark.loopback
def test_pairs_that_show_the_same_are_asked_about_once(tmp_path):
    path = tmp_path / "x.jsonl"
    with asking(path, [PAIRS[0], PAIRS[1], same(PAIRS[0], seed=7)]) as (client, found):
        assert len(json.loads(client.get("state")[1])["pairs"]) == 2
        client.decide(0, keep=True)
    assert found == [aa.ReviewProgress(2, 0, 1)]


def answering(keeps):
    """What to announce to, so that a person decides at once: of each pair shown whether to keep it."""

    def announce(address):
        def act():
            client = Client(address)
            for number, keep in enumerate(keeps):
                client.decide(number, keep)
            client.finish()

        threading.Thread(target=act, daemon=True).start()

    return announce


@pytest.mark.loopback
def test_a_queue_asks_when_it_judges_and_only_among_what_another_filter_keeps(tmp_path):
    gain = aa.Gain(Listed(), at_least=0.55)
    first = gain.judge_batch(PAIRS)
    assert [verdict.keep for verdict in first] == [False, True, True, True]
    queue = aa.ManualReview(tmp_path / "x.jsonl", among=gain, announce=answering([True, False, True]))

    found = queue.judge_batch(PAIRS)

    assert [verdict.keep for verdict in found] == [False, True, False, True]
    assert found[0] == first[0]
    assert found[2] == aa.Verdict(False, f"{first[2].reason}; dropped by hand", first[2].scores)
    assert queue.scorers == gain.scorers


@pytest.mark.loopback
def test_to_finish_early_is_said_and_loses_nothing(tmp_path):
    path = tmp_path / "x.jsonl"
    queue = aa.ManualReview(path, announce=answering([True]))
    with pytest.raises(aa.UndecidedError, match="on 3 of 4 pairs"):
        queue.judge_batch(PAIRS)
    again = aa.ManualReview(path, announce=answering([True, False, False, False]))
    assert [verdict.keep for verdict in again.judge_batch(PAIRS)] == [True, False, False, False]


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
def test_a_bad_request_is_answered_and_decides_nothing(tmp_path, method, page, body, headers, status):
    with asking(tmp_path / "x.jsonl") as (client, found):
        assert client.ask(method, client.path + page, body, headers)[0] == status
        assert client.get("state")[0] == 200
    assert found == [aa.ReviewProgress(0, 0, 4)]


@pytest.mark.loopback
def test_without_the_secret_nothing_is_told(tmp_path):
    with asking(tmp_path / "x.jsonl") as (client, found):
        for path in ("/", "/state", f"/{'x' * 32}/state", client.path[:-2] + "/state"):
            status, body, _ = client.ask("GET", path)
            assert status == 404
            assert client.path.strip("/").encode() not in body
        assert client.ask("POST", "/finish", "{}")[0] == 404
        assert not found


@pytest.mark.loopback
def test_what_is_no_http_does_not_end_the_page(tmp_path):
    with asking(tmp_path / "x.jsonl") as (client, _):
        host, _, port = client.place.partition(":")
        for sent in (
            b"\x16\x03\x01\x02",
            b"GET\r\n\r\n",
            "GET /é HTTP/1.1\r\nHost: localhost\r\n\r\n".encode(),
            b"POST " + client.path.encode() + b"decide HTTP/1.1\r\n",
        ):
            with closing(socket.create_connection((host, int(port)))) as link:
                link.sendall(sent)
        assert client.get("")[0] == 200


@pytest.mark.loopback
def test_a_full_disk_is_told_to_the_person(tmp_path):
    path = tmp_path / "x.jsonl"
    with asking(path) as (client, found):
        client.decide(0, keep=True)
        path.rename(tmp_path / "aside")
        path.mkdir()
        status, told, _ = client.post("decide", {"pair": 1, "keep": True})
        path.rmdir()
        (tmp_path / "aside").rename(path)
        client.decide(2, keep=True)
    assert status == 507
    assert b"x.jsonl" in told
    assert found == [aa.ReviewProgress(2, 0, 2)]


@pytest.mark.loopback
def test_it_listens_on_this_machine_only(tmp_path):
    with asking(tmp_path / "x.jsonl") as (client, _):
        assert client.place.startswith("127.0.0.1:")


def test_a_taken_port_is_said(tmp_path):
    with closing(socket.create_server(("127.0.0.1", 0))) as taken, pytest.raises(OSError, match="in use"):
        aa.ManualReview(tmp_path / "x.jsonl").serve(PAIRS, port=taken.getsockname()[1])


def test_a_broken_file_is_said_before_anybody_begins(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text("{}\n")
    with pytest.raises(StorageError, match="line 1 is no decision"):
        aa.ManualReview(path).serve(PAIRS)


PROGRAM = """
import signal
import artaug as aa
from support.strategies import pair
pairs = [pair(10 * number, 10 * number + 5 + number, seed=number) for number in range(4)]
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell may have taken from us
try:
    aa.ManualReview({path!r}, announce=lambda address: print(address, flush=True)).serve(pairs)
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


@pytest.mark.loopback
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT], ids=["killed", "interrupted"])
def test_a_kill_at_any_time_loses_nothing_that_was_answered(tmp_path, end):
    path = tmp_path / "x.jsonl"
    code = textwrap.dedent(PROGRAM).format(path=str(path))
    search = os.pathsep.join(entry for entry in sys.path if entry)
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": search}
    ) as program:
        client = Client(program.stdout.readline().strip())
        client.decide(0, keep=True)
        client.decide(1, keep=False)
        program.send_signal(end)
        try:
            rest, _ = program.communicate(timeout=30)
        finally:
            program.kill()
    assert rest == ("interrupted\n" if end is signal.SIGINT else "")
    assert aa.ManualReview(path).standing(PAIRS) == aa.ReviewProgress(1, 1, 2)
