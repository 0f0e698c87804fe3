"""Whole runs whose critic is a real model on a real server: drawn beside asking, on several replicas, with one that goes away."""

import json
import threading
from dataclasses import dataclass, field

import pytest

import artaug as aa
from artaug._internal import transient
from artaug.critics import Conversation, Coordinates, OpenAICritic
from artaug.testing import FixedFilter, SwatchSynthesizer
from support.faulty_server import faulty_server
from support.served_llava import answers_with
from support.tiny_llava import suggestion_json, tiny_llava
from support.transformers_server import one_address, transformers_server

pytestmark = pytest.mark.loopback

PROMPTS = [f"prompt {number}." for number in range(8)]
SIZE = 2
"""Of a chunk."""


@pytest.fixture(autouse=True)
def _short_delays(monkeypatch):
    monkeypatch.setattr(transient, "_FIRST_DELAY_S", 0.01)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    for proxy in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(proxy, raising=False)


@dataclass(frozen=True)
class TellsWhatItDraws(aa.Synthesizer):
    seen: set = field(default_factory=set, repr=False)
    changed: threading.Condition = field(default_factory=threading.Condition, repr=False)

    def synthesize(self, plan, *, seed):
        with self.changed:
            self.seen.add(plan.prompt)
            self.changed.notify_all()
        return SwatchSynthesizer().synthesize(plan, seed=seed)

    def wait_for(self, prompt):
        with self.changed:
            return self.changed.wait_for(lambda: prompt in self.seen, timeout=30)


def improve(critic, *, synthesizer=None, store=None):
    return list(
        aa.improve(
            PROMPTS,
            synthesizer=synthesizer or SwatchSynthesizer(),
            critic=critic,
            planner=aa.GreedyPlanner(),
            keep=FixedFilter(keep=True),
            seed=0,
            batch_size=SIZE,
            store=store,
            check="arguments",
        )
    )


def test_while_a_real_server_answers_about_one_chunk_the_next_one_is_drawn(tmp_path):
    synthesizer, late = TellsWhatItDraws(), []

    def hold(request):
        """Hold an answer back until the next chunk is drawn: a run that waited for the answer would never draw it."""
        number = next(number for number, prompt in enumerate(PROMPTS) if prompt in prompt_of(request))
        following = (number // SIZE + 1) * SIZE
        if following < len(PROMPTS) and not synthesizer.wait_for(PROMPTS[following]):
            late.append(number)

    with (
        transformers_server(tmp_path, tiny_llava(fixed_reply=suggestion_json())) as (url, model),
        one_address(url) as address,
    ):
        address.before_answer = hold
        critic = OpenAICritic(
            base_url=address.url, model=model, conversation=Conversation(), max_new_tokens=16, max_attempts=2
        )
        result = improve(critic, synthesizer=synthesizer, store=tmp_path / "run")
    assert not late
    assert critic.usage.replies == len(PROMPTS)
    plan = aa.GreedyPlanner().plan(PROMPTS[0], aa.Critique((aa.Suggestion(aa.Box(0, 0, 0.5, 1), "a sunlit window"),)))
    assert [attempt.pair.plan.regions for attempt in result] == [plan.regions] * len(PROMPTS)


@pytest.fixture(scope="module")
def llava():
    return tiny_llava(fixed_reply=suggestion_json())


def test_replicas_behind_one_address_give_the_run_of_one_and_share_the_work(llava):
    with faulty_server(answers_with(*llava)) as first, faulty_server(answers_with(*llava)) as second:
        with one_address(first.url, second.url) as address:
            on_two = improve(asking(address.url))
            assert {address.answered.count(server.url) for server in (first, second)} == {len(PROMPTS) // 2}
        assert improve(asking(first.url)) == on_two
    assert [type(attempt) for attempt in on_two] == [aa.Kept] * len(PROMPTS)


def test_a_replica_that_goes_away_costs_retries_and_no_prompt(llava):
    with faulty_server(answers_with(*llava)) as first:
        with faulty_server(answers_with(*llava)) as second:
            gone = second.url
        with one_address(first.url, gone) as address:
            critic = asking(address.url)
            result = improve(critic)
        assert result == improve(asking(first.url))
    assert critic.usage.failures == 0
    assert critic.usage.retries >= len(PROMPTS) // 2


def test_all_requests_of_a_run_begin_with_the_same_system_prompt_and_carry_the_schema(llava):
    """What a server's cache of prefixes needs: the picture and its prompt come after what is the same for all."""
    with faulty_server(answers_with(*llava)) as server:
        improve(asking(server.url, structured=True, max_new_tokens=96))
    first = server.requests[0]
    for request in server.requests:
        system, user = request["messages"]
        assert system == first["messages"][0]
        assert len(system["content"]) > 800
        assert [part["type"] for part in user["content"]] == ["image_url", "text"]
        assert request["response_format"] == first["response_format"]


def test_the_second_request_of_a_two_stage_critique_begins_with_the_whole_first_one(llava):
    """A server that caches prefixes computes the picture, most of the tokens, once for both."""
    with faulty_server(answers_with(*llava)) as server:
        critic = asking(server.url, conversation=Conversation.in_two_stages(coordinates=Coordinates("thousandths")))
        critic.critique(SwatchSynthesizer().synthesize(aa.Plan("a"), seed=0), "a wall")
    first, second = (request["messages"] for request in server.requests)
    assert second[: len(first)] == first
    assert len(second) > len(first)


def asking(url, **options):
    defaults = {"structured": False, "max_new_tokens": 16, "conversation": Conversation()}
    return OpenAICritic(base_url=url, model="tiny", concurrency=2, max_attempts=4, **(defaults | options))


def prompt_of(request):
    return json.loads(request)["messages"][-1]["content"][-1]["text"]
