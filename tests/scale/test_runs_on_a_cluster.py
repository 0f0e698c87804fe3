"""A run whose models are on two workers ends with the attempts and the LoRA of one process, to the bit."""

import pytest
import torch

import artaug as aa
from artaug import playground
from artaug.critics import PhotometricCritic
from artaug.image_files import ImageFile
from artaug.lora import LowRank
from artaug.scorers import Chroma, Photometric
from artaug.testing import check_synthesizer
from support.cluster_playground import build_playground

pytestmark = pytest.mark.loopback
PROMPTS = playground.prompts(10, seed=0)
HELD_OUT = playground.prompts(6, seed=0, held_out=True)


def enhance(synthesizer, store, **others):
    settings = {
        "critic": PhotometricCritic(),
        "planner": aa.GreedyPlanner(max_regions=2),
        "keep": aa.Gain(Chroma(), at_least=-1),
        "trainer": aa.DifferentialLoRATrainer(rank=2, steps=3, batch_size=2, learning_rate=1e-3),
        "stop": aa.StopRule(Photometric(), prompts=HELD_OUT, at_least=-10.0),
        "rounds": 2,
        "batch_size": 3,
        "progress": False,
    } | others
    return aa.enhance(PROMPTS, synthesizer=synthesizer, store=store, **settings)


def assert_same(one, other):
    assert [list(finished.attempts) for finished in one.rounds] == [
        list(finished.attempts) for finished in other.rounds
    ]
    assert [finished.training.losses for finished in one.rounds] == [
        finished.training.losses for finished in other.rounds
    ]
    assert [finished.gain for finished in one.rounds] == [finished.gain for finished in other.rounds]
    assert one.lora.digest == other.lora.digest


def test_a_whole_run_is_that_of_one_process_and_each_worker_loads_the_model_once(two_playgrounds, tmp_path):
    events = []
    on_two = enhance(two_playgrounds, tmp_path / "two", on_event=events.append)
    assert_same(on_two, enhance(build_playground(), tmp_path / "one"))
    assert two_playgrounds.loads == 2
    assert sum(isinstance(event, aa.training.StepEvent) for event in events) == 6
    pair = next(attempt.pair for attempt in on_two.rounds[0].attempts if isinstance(attempt, aa.Kept))
    assert all(isinstance(picture, ImageFile) for picture in pair.references)


def test_a_run_goes_on_on_a_cluster_that_one_process_began_and_the_other_way_round(two_playgrounds, tmp_path):
    whole = enhance(build_playground(), tmp_path / "whole", rounds=1)

    def interrupt_after(drawn):
        def on_event(event):
            if isinstance(event, aa.ProgressEvent) and event.stage == "draw" and not event.resumed:
                drawn.append(event.count)
                if sum(drawn) > 5:
                    raise InterruptedError

        return on_event

    for first, second in ((build_playground(), two_playgrounds), (two_playgrounds, build_playground())):
        store = tmp_path / f"begun by {type(first).__name__}"
        with pytest.raises(InterruptedError):
            enhance(first, store, rounds=1, on_event=interrupt_after([]))
        assert_same(enhance(second, store, rounds=1), whole)


def test_without_a_store_pictures_come_back_in_memory_and_are_the_same(two_playgrounds):
    parts = {"critic": PhotometricCritic(), "planner": aa.GreedyPlanner(), "keep": aa.Gain(Chroma(), at_least=-1)}
    runs = [
        list(aa.improve(PROMPTS, synthesizer=synthesizer, seed=3, batch_size=4, **parts))
        for synthesizer in (two_playgrounds, build_playground())
    ]
    assert runs[0] == runs[1]


def test_it_keeps_the_contract_of_a_synthesizer(two_playgrounds):
    check_synthesizer(two_playgrounds)
    assert repr(two_playgrounds) == "<DiffusersSynthesizer on 2 workers>"
    assert two_playgrounds.picture_size == build_playground().picture_size


def test_a_lora_that_does_not_fit_is_refused_when_it_is_given(two_playgrounds):
    layer = LowRank(torch.zeros(2, 4), torch.zeros(4, 2))
    with pytest.raises(aa.LoRAMismatchError):
        two_playgrounds.with_lora(aa.LoRA({"no.such.layer": layer}))


def test_critic_and_scorer_on_workers_of_their_own_give_the_same_run(cluster, two_playgrounds, tmp_path):
    critic, scorer = cluster.critic(PhotometricCritic, replicas=2), cluster.scorer(Chroma)
    assert (repr(critic), repr(scorer)) == ("<PhotometricCritic on 2 workers>", "<Chroma on 1 worker>")
    remote = enhance(
        two_playgrounds, tmp_path / "remote", critic=critic, keep=aa.Gain(scorer, at_least=-1), rounds=1, stop=None
    )
    local = enhance(build_playground(), tmp_path / "local", rounds=1, stop=None)
    assert_same(remote, local)
    # What they are is what one process would say they are: the run may go on without them.
    assert_same(enhance(build_playground(), tmp_path / "remote", rounds=1, stop=None), local)
