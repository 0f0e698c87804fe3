"""Placement in a run: the same attempts as with all models resident, and each stage's models on the device once a chunk."""

import pytest
from torch import nn

import artaug as aa
from artaug.diffusion import DiffusersSynthesizer
from artaug.placement import models_of
from artaug.scorers import Chroma, Exposure
from support.tiny_flux import TINY_SIZE, tiny_flux

PROMPTS = ["a red cone", "a blue ball", "a green cube", "a grey wall"]
MOVES = ["on", "off"]


class Watched(nn.Linear):
    """A layer that notes its moves."""

    def __init__(self, name, events):
        super().__init__(2, 2)
        self.name, self.events = name, events

    def to(self, device):
        self.events.append(self.name)
        return super().to(device)


class Critic(aa.Critic):
    identity = "a critic with a model"

    def __init__(self, model):
        self._model = model

    @property
    def models(self):
        return (self._model,)

    def critique(self, image, prompt):
        return aa.Critique((aa.Suggestion(aa.Box(0, 0, 0.5, 1), "a door"),))


class Score(aa.Scorer):
    identity = "chroma with a model"

    def __init__(self, model, by):
        self._model, self._by = model, by

    @property
    def name(self):
        return self._by.name

    @property
    def models(self):
        return (self._model,)

    def score(self, image, prompt):
        return self._by.score(image, prompt)


@pytest.fixture
def events():
    return []


@pytest.fixture
def synthesizer(events):
    pipeline = tiny_flux()
    move = pipeline.transformer.to
    pipeline.transformer.to = lambda *device: events.append("denoiser") or move(*device)
    return DiffusersSynthesizer(
        pipeline=pipeline, width=TINY_SIZE, height=TINY_SIZE, steps=1, guide=aa.RegionalAttention()
    )


def outcome(attempt):
    pair = attempt.pair
    return type(attempt), pair.prompt, pair.before.tobytes(), pair.after.tobytes(), attempt.verdict


def run(synthesizer, events, **options):
    scorer = Score(Watched("filter", events), Chroma())
    attempts = aa.improve(
        PROMPTS,
        synthesizer=synthesizer,
        critic=Critic(Watched("critic", events)),
        planner=aa.GreedyPlanner(),
        keep=aa.Gain(scorer, at_least=-1),
        seed=0,
        check="arguments",
        **options,
    )
    return [outcome(attempt) for attempt in attempts]


def test_each_stage_brings_its_models_to_the_device_and_takes_them_off_once_a_chunk(synthesizer, events):
    resident = run(synthesizer, events, batch_size=1, chunk_size=2)
    assert events == []
    assert run(synthesizer, events, batch_size=1, chunk_size=2, placement=aa.OneAtATime(device="cpu")) == resident
    chunk = [name for name in ("denoiser", "critic", "denoiser", "filter") for _ in MOVES]
    assert events == [*chunk, *chunk, "denoiser", "critic", "filter"]  # and home


def test_candidates_and_filters_that_judge_a_round_have_their_turn(synthesizer, events):
    options = {"candidates": aa.BestOf(2, by=Score(Watched("choice", events), Exposure())), "batch_size": 4}
    resident = run(synthesizer, events, **options)
    assert run(synthesizer, events, placement=aa.OneAtATime(device="cpu"), **options) == resident
    chunk = [name for name in ("denoiser", "critic", "denoiser", "choice", "filter") for _ in MOVES]
    assert events == [*chunk, "denoiser", "critic", "filter", "choice"]


def test_a_run_that_is_not_listened_to_the_end_leaves_every_model_where_it_was(synthesizer, events):
    weights = [parameter for model in models_of(synthesizer) for parameter in model.parameters()]
    flags = [parameter.requires_grad for parameter in weights]
    attempts = aa.improve(
        PROMPTS,
        synthesizer=synthesizer,
        critic=Critic(Watched("critic", events)),
        planner=aa.GreedyPlanner(),
        keep=aa.Gain(Chroma(), at_least=-1),
        seed=0,
        batch_size=2,
        placement=aa.OneAtATime(device="cpu"),
    )
    next(attempts)
    attempts.close()
    assert events[-2:] == ["denoiser", "critic"]
    now = [parameter for model in models_of(synthesizer) for parameter in model.parameters()]
    assert all(after is before for after, before in zip(now, weights, strict=True))
    assert [parameter.requires_grad for parameter in now] == flags


def test_a_whole_run_learns_the_same_lora(synthesizer, events):
    def enhanced(placement):
        return aa.enhance(
            PROMPTS[:2],
            synthesizer=synthesizer,
            critic=Critic(Watched("critic", events)),
            planner=aa.GreedyPlanner(),
            keep=aa.Gain(Chroma(), at_least=-1),
            trainer=aa.DifferentialLoRATrainer(rank=2, steps=2, batch_size=2),
            stop=aa.StopRule(Score(Watched("stop", events), Exposure()), [f"{number} cats" for number in range(2, 8)]),
            rounds=1,
            placement=placement,
            progress=False,
        )

    resident = enhanced(aa.Resident())
    assert events == []
    moved = enhanced(aa.OneAtATime(device="cpu"))
    assert moved.rounds[0].lora.digest == resident.rounds[0].lora.digest
    assert moved.rounds[0].gain == resident.rounds[0].gain
    assert moved.rounds[0].training.losses == resident.rounds[0].training.losses
    rehearsal = ["stop"] * 3  # on, off, home
    round_1 = [
        "denoiser",
        "critic",
        "denoiser",
        "denoiser",
        "denoiser",
        "stop",
        "denoiser",
        "stop",
    ]  # the fourth trains
    assert events == [*rehearsal, *(name for name in round_1 for _ in MOVES), "denoiser", "critic", "stop"]


def test_models_that_cannot_be_moved_are_refused_before_anything_is_drawn(synthesizer, events):
    hooked, unloaded = nn.Linear(2, 2), nn.Linear(2, 2, device="meta")
    vars(hooked)["_hf_hook"] = object()
    with pytest.raises(aa.InvalidValueError, match="2 things are wrong") as refusal:
        aa.improve(
            PROMPTS,
            synthesizer=synthesizer,
            critic=Critic(hooked),
            planner=aa.GreedyPlanner(),
            keep=aa.Gain(Score(unloaded, Chroma())),
            seed=0,
            placement=aa.OneAtATime(device="cpu"),
        )
    assert "the Linear of critic (Critic) cannot be moved" in str(refusal.value)
    assert "the Linear of keep (Gain) cannot be moved" in str(refusal.value)
    assert events == []


def test_what_is_no_placement_is_refused_by_name(synthesizer, events):
    for wrong in ("cpu", aa.OneAtATime, None):
        with pytest.raises(aa.InvalidValueError, match=r"improve\(placement="):
            run(synthesizer, events, placement=wrong)
