"""Faults of a critic that pass: they are retried or put off, cost no other answer, and are told from bugs."""

import errno
import http.client
import itertools
import socket
import urllib.error
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import artaug as aa
from artaug.critics import Cached, Conversation, Ensemble, OpenAICritic, Retried, TransientErrors
from artaug.critique import StreamingCritic, run_critic, stream_critic
from artaug.serving.client import RetryingClient
from artaug.serving.completion import RequestFailure
from artaug.serving.usage import UsageCounter
from artaug.testing import FixedCritic
from support.clock import FakeTime
from support.faulty_server import faulty_server, refuses

PICTURE = Image.new("RGB", (16, 16), "teal")
ADVICE = aa.Critique(summary="fine")
PASSING = aa.Abstention("Scripted raised TimeoutError: read timed out", transient=True)
PROMPTS = ["a pear", "a fig", "a plum", "a quince"]


@dataclass(frozen=True)
class Scripted(aa.Critic):
    """Gives its answers in turn, raises those that are exceptions, and records the prompts."""

    script: tuple = field(repr=False)
    prompts: list = field(default_factory=list, repr=False)

    def critique(self, image, prompt):
        answer = self.script[min(len(self.prompts), len(self.script) - 1)]
        self.prompts.append(prompt)
        if isinstance(answer, BaseException):
            raise answer
        return answer


@dataclass(frozen=True)
class InBatches(aa.Critic):
    """Fails at the whole batch."""

    error: Exception = field(repr=False)

    def critique(self, image, prompt):
        raise AssertionError

    def critique_batch(self, images, prompts):
        raise self.error


@pytest.fixture
def clock(monkeypatch):
    fake = FakeTime()
    monkeypatch.setattr("artaug.critics.wrappers.time", fake)
    return fake


def ask(critic, prompts=PROMPTS):
    return run_critic(critic, [PICTURE] * len(prompts), prompts)


# --- which are transient -----------------------------------------------------------------------------------------------


def with_fields(error, **fields):
    for name, content in fields.items():
        setattr(error, name, content)
    return error


class Timeout(OSError):  # noqa: N818 - its name is the point
    """As requests calls it."""


class APIConnectionError(Exception):
    """As the clients of OpenAI and Anthropic call it."""


class APITimeoutError(APIConnectionError):
    """As they call it, too."""


@pytest.mark.parametrize(
    "error",
    [
        TimeoutError("read timed out"),
        ConnectionRefusedError(),
        http.client.RemoteDisconnected(),
        http.client.IncompleteRead(b""),
        socket.gaierror(socket.EAI_AGAIN, "try again"),
        OSError(errno.EHOSTUNREACH, "no route to host"),
        urllib.error.URLError(TimeoutError()),
        urllib.error.HTTPError("http://a", 503, "busy", None, None),
        Timeout(),
        APITimeoutError(),
        with_fields(RuntimeError("rate limit"), status_code=429),
        with_fields(RuntimeError("overloaded"), response=with_fields(Exception(), status_code=529)),
        aa.HubError("the Hub is busy", status=502),
    ],
    ids=repr,
)
def test_what_passes_by_itself_is_an_abstention_that_knows_it(error):
    for critic in (Scripted((error,)), InBatches(error)):
        answers = ask(critic)
        assert all(isinstance(answer, aa.Abstention) and answer.transient for answer in answers)
        assert f"{type(critic).__name__} raised {type(error).__name__}" in answers[0].reason


@pytest.mark.parametrize(
    "error",
    [
        KeyError("boxes"),
        FileNotFoundError("no model"),
        PermissionError(),
        OSError(errno.ENOSPC, "no space left on device"),
        urllib.error.HTTPError("http://a", 401, "no key", None, None),
        urllib.error.URLError("unknown url type"),
        with_fields(RuntimeError("bad request"), status_code=400),
        with_fields(RuntimeError("not implemented"), status_code=501),
        aa.InvalidValueError("a box"),
    ],
    ids=repr,
)
def test_a_bug_raises_at_once_and_names_the_critic_and_the_prompt(error):
    critic = Scripted((ADVICE, ADVICE, error))
    with pytest.raises(
        aa.CriticError, match=rf"^Scripted raised {type(error).__name__}: .*first prompt 'a plum'"
    ) as caught:
        ask(critic)
    assert caught.value.__cause__ is error
    assert len(critic.prompts) == 3


@given(st.lists(st.booleans(), min_size=1, max_size=8))
def test_a_timeout_costs_no_other_answer_of_the_batch(times_out):
    critic = Scripted(tuple(TimeoutError("read timed out") if out else ADVICE for out in times_out))
    assert ask(critic, ["a pear"] * len(times_out)) == [PASSING if out else ADVICE for out in times_out]


def wrappers_of(critic, folder):
    return [
        Retried(critic),
        Cached(critic, folder=folder / "1", identity="1"),
        Ensemble((critic,), min_votes=1),
        Cached(Retried(Ensemble((Retried(critic),), min_votes=1)), folder=folder / "2", identity="2"),
    ]


def test_an_exception_is_wrapped_once_whatever_is_around_the_critic(tmp_path):
    for critic in wrappers_of(Scripted((KeyError("boxes"),)), tmp_path):
        with pytest.raises(aa.CriticError, match=r"^Scripted raised KeyError: 'boxes'.*'a pear'") as caught:
            ask(critic)
        assert isinstance(caught.value.__cause__, KeyError)
    for critic in wrappers_of(Scripted(("brighter",)), tmp_path):
        with pytest.raises(aa.ContractError, match=r"^Scripted.critique_batch returned str 'brighter'"):
            ask(critic)


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory")], ids=repr)
def test_running_out_of_memory_passes_every_wrapper_as_itself(tmp_path, error):
    for critic in wrappers_of(Scripted((error,)), tmp_path):
        with pytest.raises(type(error)) as caught:
            ask(critic)
        assert caught.value is error


# --- answers that come one by one ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Streaming(StreamingCritic):
    """Answers pictures in the given order."""

    order: tuple
    answer: object = ADVICE

    def critique_stream(self, images, prompts):
        yield from ((index, self.answer) for index in self.order)


def test_answers_that_come_in_any_order_are_put_in_order():
    assert ask(Streaming((2, 0, 3, 1))) == [ADVICE] * 4


@pytest.mark.parametrize(
    ("critic", "message"),
    [
        (Streaming((0, 1, 2)), r"Streaming.critique_stream returned no answer to pictures \[3\] for 4 picture"),
        (Streaming((0, 1, 1, 2, 3)), "returned a further answer to picture 1"),
        (Streaming((0, 1, 2, 3, 4)), "returned a further answer to picture 4"),
        (Streaming((0, 1, 2, 3), None), "returned None for 'a pear'. Expected artaug"),
    ],
    ids=repr,
)
def test_a_stream_with_another_count_or_type_is_named(critic, message):
    with pytest.raises(aa.ContractError, match=message):
        ask(critic)


# --- Cached --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [KeyError("boxes"), KeyboardInterrupt(), MemoryError()], ids=repr)
@pytest.mark.parametrize("around", [lambda critic: critic, Retried], ids=["bare", "retried"])
def test_answers_before_a_failure_are_kept(tmp_path, error, around):
    with pytest.raises(aa.CriticError if isinstance(error, KeyError) else type(error)):
        ask(Cached(around(Scripted((ADVICE, ADVICE, error))), folder=tmp_path))
    assert len(list(tmp_path.rglob("*.json"))) == 2

    healed = Scripted((ADVICE,))
    assert ask(Cached(around(healed), folder=tmp_path)) == [ADVICE] * 4
    assert healed.prompts == PROMPTS[2:]


def test_a_transient_abstention_is_never_cached(tmp_path):
    cached = Cached(Scripted((TimeoutError("read timed out"), ADVICE)), folder=tmp_path, cache_abstentions=True)
    assert [cached.critique(PICTURE, "a pear") for _ in range(2)] == [PASSING, ADVICE]


# --- Ensemble ------------------------------------------------------------------------------------------------------------


def test_an_ensemble_gives_each_answer_when_its_last_critic_has_it():
    last = Scripted((ADVICE, ADVICE, KeyError("boxes")))
    received = []
    with pytest.raises(aa.CriticError, match="Scripted raised KeyError"):
        received.extend(stream_critic(Ensemble((FixedCritic(ADVICE), last)), [PICTURE] * 4, PROMPTS))
    assert received == [(0, aa.Critique(summary="fine fine")), (1, aa.Critique(summary="fine fine"))]


# --- Retried -------------------------------------------------------------------------------------------------------------


def test_exceptions_that_pass_are_retried(clock):
    critic = Scripted((TimeoutError(), ConnectionResetError(), ADVICE))
    assert ask(Retried(critic), ["a pear"]) == [ADVICE]
    assert len(clock.slept) == 2


@pytest.mark.parametrize("deadline_s", [5.0, 60.0, 600.0, 3600.0])
def test_retries_last_as_long_as_the_deadline_says(clock, deadline_s):
    (answer,) = ask(Retried(Scripted((TimeoutError("read timed out"),)), retry_deadline_s=deadline_s), ["a pear"])
    assert answer.transient
    assert answer.reason.startswith(f"asked {len(clock.slept) + 1} times: Scripted raised TimeoutError")
    assert deadline_s - 30 <= clock.now <= deadline_s
    assert all(seconds <= 30 for seconds in clock.slept)


@pytest.mark.usefixtures("clock")
def test_the_deadline_counts_from_the_last_answer():
    hours = [error for _ in range(20) for error in [*[TimeoutError()] * 4, ADVICE]]
    answers = ask(Retried(Scripted(tuple(hours)), retry_deadline_s=20), ["a pear"] * 20)
    assert answers == [ADVICE] * 20


def test_a_critic_whose_own_patience_took_the_time_is_not_retried(clock):
    @dataclass(frozen=True)
    class Slow(aa.Critic):
        def critique(self, image, prompt):
            clock.sleep(700)
            return PASSING

    assert ask(Retried(Slow()), ["a pear"]) == [PASSING]


def test_which_exceptions_are_transient_is_a_value(clock):
    class ModelLoadingError(Exception):
        pass

    critic = Scripted((ModelLoadingError(), ADVICE))
    with pytest.raises(aa.CriticError, match="ModelLoadingError"):
        ask(Retried(critic), ["a pear"])
    loading = TransientErrors(names=("ModelLoadingError", *TransientErrors().names))
    assert ask(Retried(Scripted((ModelLoadingError(), ADVICE)), transient=loading), ["a pear"]) == [ADVICE]
    nested = Retried(Ensemble((Scripted((ModelLoadingError(), ADVICE)),), min_votes=1), transient=loading)
    assert ask(nested, ["a pear"]) == [ADVICE]
    strict = TransientErrors(names=(), statuses=frozenset())
    with pytest.raises(aa.CriticError, match="TimeoutError"):
        Retried(Scripted((TimeoutError(),)), transient=strict).critique(PICTURE, "a pear")
    assert len(clock.slept) == 2


@pytest.mark.usefixtures("clock")
def test_a_timeout_does_not_use_up_the_retries_of_abstentions():
    script = (
        TimeoutError(),
        TimeoutError(),
        aa.Abstention("no JSON"),
        TimeoutError(),
        aa.Abstention("no JSON"),
        ADVICE,
    )
    assert ask(Retried(Scripted(script), max_retries=2), ["a pear"]) == [ADVICE]


@pytest.mark.parametrize("seconds", [-1, float("nan")])
def test_a_deadline_that_is_no_time_is_refused(seconds):
    with pytest.raises(aa.InvalidValueError, match="need a time of at least 0 seconds"):
        Retried(FixedCritic(ADVICE), retry_deadline_s=seconds)


# --- Ensemble ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("other", "transient"), [(PASSING, True), (aa.Abstention("too dark"), False)])
def test_an_ensemble_waits_for_a_vote_that_can_still_count(other, transient):
    (answer,) = ask(Ensemble((FixedCritic(ADVICE), FixedCritic(other))), ["a pear"])
    assert answer.transient is transient


def test_an_ensemble_does_not_wait_for_a_vote_that_cannot_count():
    critics = (FixedCritic(aa.Abstention("too dark")), FixedCritic(PASSING))
    assert not ask(Ensemble(critics), ["a pear"])[0].transient


# --- a server ------------------------------------------------------------------------------------------------------------


@dataclass
class FakeGate(FakeTime):
    """A gate whose waits take no time."""

    silent_since_s: float = 0.0

    def wait(self, *, delay_s=0.0):
        self.now += delay_s

    def pause(self, seconds):
        pass

    def succeeded(self):
        self.silent_since_s = self.now

    def is_news(self):
        return False


def client_of(gate, monkeypatch, *, seconds=0.0, **options):
    def send(_):
        gate.now += seconds
        return RequestFailure("the connection failed", retryable=True)

    monkeypatch.setattr("artaug.serving.client.time", gate)
    defaults = {"max_attempts": None, "retry_deadline_s": 600.0}
    return RetryingClient(send, gate, UsageCounter(), server="http://here/v1", redact=str, **{**defaults, **options})


@pytest.mark.parametrize("deadline_s", [5.0, 60.0, 600.0])
def test_a_server_that_is_down_is_tried_as_long_as_the_deadline_says(monkeypatch, deadline_s):
    gate = FakeGate()
    failure = client_of(gate, monkeypatch, retry_deadline_s=deadline_s).complete({})
    assert deadline_s - 30 <= gate.now <= deadline_s
    assert f"times in {gate.now:.1f} s)" in failure.reason


def test_a_server_that_is_down_costs_its_batch_one_deadline(monkeypatch):
    gate = FakeGate()
    client = client_of(gate, monkeypatch)
    for _ in range(100):
        client.complete({})
    assert gate.now <= 600


def test_a_request_that_alone_fails_has_the_deadline_too(monkeypatch):
    gate = FakeGate()
    client = client_of(gate, monkeypatch, seconds=10.0)
    for _ in range(3):
        gate.succeeded()
        start = gate.now
        client.complete({})
        assert 560 <= gate.now - start <= 610


@pytest.mark.loopback
def test_a_server_that_fails_for_a_while_gives_a_transient_abstention():
    for failure, transient in ((refuses(503), True), (refuses(401), False)):
        with faulty_server(failure) as server:
            critic = OpenAICritic(base_url=server.url, model="m", conversation=Conversation(), max_attempts=1)
            assert critic.critique(PICTURE, "a wall").transient is transient


@pytest.mark.loopback
def test_a_lasting_500_is_told_early_from_a_schema_that_is_refused_and_then_waited_for(monkeypatch):
    monkeypatch.setattr("artaug._internal.transient._FIRST_DELAY_S", 0.001)
    with_schema = []
    with faulty_server(*itertools.repeat(refuses(500), 8), refuses(401)) as server:
        answer = OpenAICritic(base_url=server.url, model="m", conversation=Conversation()).critique(PICTURE, "a wall")
        with_schema = ["response_format" in request for request in server.requests]
    assert with_schema[:4] == [True, True, True, False]
    assert all(with_schema[4:8])
    assert not answer.transient
