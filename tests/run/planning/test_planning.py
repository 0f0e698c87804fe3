"""The plan of a run: exact where every part has a known cost, near where it is measured, and nothing is left behind."""

import inspect
import json
import math
import re
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import artaug as aa
from artaug import playground
from artaug.critics import PhotometricCritic, Usage
from artaug.diffusion import DiffusersSynthesizer
from artaug.evaluation.statistics import wilson_interval
from artaug.run import events
from artaug.run.planning import sampling, training_costs
from artaug.run.planning.run_plan import advise
from artaug.scorers import Chroma, Exposure
from artaug.testing import FixedFilter, SwatchSynthesizer
from artaug.training import progress
from support.clock import FakeTime
from support.tiny_flux import TINY_SIZE, tiny_flux

ADVICE = aa.Critique((aa.Suggestion(aa.Box(0, 0, 0.5, 1), "a bright window"),))
HELD_OUT = [f"held-out picture {number}" for number in range(6)]
PROMPTS = [f"a kitchen with {number} windows" for number in range(8)]


@dataclass(frozen=True)
class TimedSynthesizer(aa.Synthesizer):
    """Lends the model of a tiny FLUX; a picture takes ``cost`` seconds, and ``lora_cost`` more with each LoRA."""

    clock: FakeTime = field(repr=False, compare=False)
    model: DiffusersSynthesizer = field(repr=False)
    cost: float
    lora_cost: float = 0.0
    training_cost: float = 0.0
    first_cost: float = 0.0
    """What the first picture of all takes more."""
    loras: int = 0
    drawn: list[int] = field(default_factory=list, repr=False, compare=False)
    draws_regions = True
    picture_size = (TINY_SIZE, TINY_SIZE)
    fingerprint = "timed"

    def synthesize(self, plan, *, seed):
        self.clock.now += self.cost + min(self.loras, 1) * self.lora_cost + self.first_cost * (not self.drawn)
        self.drawn.append(seed)
        return SwatchSynthesizer(TINY_SIZE, TINY_SIZE).synthesize(plan, seed=seed)

    def with_lora(self, lora, *, scale=1.0):
        return replace(self, loras=self.loras + 1)

    @contextmanager
    def training(self):
        self.clock.now += self.training_cost
        with self.model.training() as model:
            yield model


@dataclass(frozen=True)
class TimedCritic(aa.Critic):
    clock: FakeTime = field(repr=False, compare=False)
    cost: float
    answers: tuple[str, ...] = ()
    """Prompts whose pictures it finds good."""
    max_concurrency: int = 0

    def critique(self, image, prompt):
        self.clock.now += self.cost
        return aa.Critique() if prompt in self.answers else ADVICE


@dataclass(frozen=True)
class TimedScorer(aa.Scorer):
    clock: FakeTime = field(repr=False, compare=False)
    cost: float

    def score(self, image, prompt):
        self.clock.now += self.cost
        return float(len(prompt))


@dataclass(frozen=True)
class TimedJudge(aa.PairwiseJudge):
    """Calls everything a tie, and takes ``cost`` seconds for each question."""

    clock: FakeTime = field(repr=False, compare=False)
    cost: float

    def prefer(self, first, second, prompt):
        self.clock.now += self.cost
        return 0.5


@dataclass(frozen=True)
class TimedOptimizer(aa.Optimizer):
    clock: FakeTime = field(repr=False, compare=False)
    cost: float
    build_cost: float = 0.0

    def build(self, parameters, *, learning_rate):
        clock, cost = self.clock, self.cost
        clock.now += self.build_cost

        class Timed(torch.optim.SGD):
            def step(self, closure=None):
                clock.now += cost
                return super().step(closure)

        return Timed(parameters, lr=learning_rate)


@dataclass(frozen=True)
class TimedPlacement(aa.Placement):
    clock: FakeTime = field(repr=False, compare=False)
    cost: float
    """Of a model to come, and of one to leave."""

    @contextmanager
    def opened(self, *owners):
        yield self

    @contextmanager
    def stage(self, *owners):
        self.clock.now += self.cost
        yield
        self.clock.now += self.cost

    def check(self, owner, owners):
        pass


@pytest.fixture(scope="module")
def flux():
    return DiffusersSynthesizer(
        pipeline=tiny_flux(), guide=aa.OutputMix(), width=TINY_SIZE, height=TINY_SIZE, steps=2, max_sequence_length=32
    )


@contextmanager
def passing_time():
    """The time of the loop, the trainer and the plan, which passes in stand-in parts only."""
    fake = FakeTime()
    with pytest.MonkeyPatch.context() as patch:
        for module in (events, progress, sampling, training_costs):
            patch.setattr(module, "time", fake)
        yield fake


@pytest.fixture
def clock():
    with passing_time() as fake:
        yield fake


def arguments(clock, flux, *, draw=3.0, critique=2.0, score=0.0, step=1.0, **options):
    synthesizer = {key: options.pop(key) for key in ("lora_cost", "training_cost", "first_cost") if key in options}
    return {
        "synthesizer": TimedSynthesizer(clock, flux, draw, **synthesizer),
        "critic": TimedCritic(clock, critique),
        "planner": aa.GreedyPlanner(),
        "keep": FixedFilter(keep=True),
        "trainer": aa.DifferentialLoRATrainer(
            rank=2, steps=4, batch_size=2, learning_rate=1e-3, optimizer=TimedOptimizer(clock, step)
        ),
        "stop": aa.StopRule(TimedScorer(clock, score), HELD_OUT, at_least=-1e9),
        "rounds": 2,
        "batch_size": 3,
        "progress": False,
        **options,
    }


costs = st.floats(0.125, 500).map(lambda cost: round(cost * 8) / 8)


@settings(max_examples=3, deadline=None)
@given(
    each=st.fixed_dictionaries(
        dict.fromkeys(("draw", "critique", "score", "step", "lora_cost", "training_cost"), costs)
    ),
    move=costs,
    rounds=st.integers(1, 2),
    count=st.integers(1, 2),
    chunk_size=st.integers(1, 4),
)
def test_a_plan_is_exact_where_every_part_always_takes_the_same(flux, each, move, rounds, count, chunk_size):
    with passing_time() as clock:
        options = arguments(
            *(clock, flux),
            **each,
            rounds=rounds,
            chunk_size=chunk_size,
            candidates=aa.BestOf(count, by=TimedScorer(clock, each["score"])),
            placement=TimedPlacement(clock, move),
        )
        plan = aa.plan_run(PROMPTS, **options, sample=5, steps=3)
        result = aa.enhance(PROMPTS, **options)
    assert len(result.rounds) == rounds
    for stage, planned, real in plan.against(result):
        assert planned == pytest.approx(real, abs=1e-6), stage
    assert plan.bottleneck.seconds == max(planned for _, planned, _ in plan.against(result))
    assert f"bottleneck: {plan.bottleneck.stage}" in str(plan)


@dataclass(frozen=True)
class TimedPlanner(aa.RegionPlanner):
    clock: FakeTime = field(repr=False, compare=False)
    cost: float

    def plan(self, prompt, critique):
        self.clock.now += self.cost
        return aa.GreedyPlanner().plan(prompt, critique)


def test_on_one_gpu_a_plan_takes_what_its_stages_take_that_do_not_run_beside_drawing(clock, flux):
    options = arguments(clock, flux, critique=0.0, lora_cost=2.0, placement=TimedPlacement(clock, 5.0))
    plan = aa.plan_run(PROMPTS, **options, steps=2)
    stages = {stage.stage: stage for stage in plan.stages}
    (one,) = plan.on([1]).sizes
    drawing = sum(stages[name].seconds - stages[name].moving_seconds for name in ("draw", "redraw"))
    assert one.seconds_by_phase["loop"] == pytest.approx(drawing) == pytest.approx(one.busy["draw"])
    for name in ("train", "combine", "measure"):
        assert one.seconds_by_phase[name] == pytest.approx(stages[name].seconds)


def test_the_planners_time_and_the_critics_place_are_those_of_the_run(clock, flux):
    served = replace(arguments(clock, flux)["critic"], max_concurrency=5)
    options = {**arguments(clock, flux), "critic": served, "planner": TimedPlanner(clock, 9.0)}
    plan = aa.plan_run(PROMPTS, **options, steps=2)
    assert plan.chunks.planning_seconds == pytest.approx(9.0)
    assert (plan.chunks.prompts, plan.chunks.batch, plan.chunks.critics) == (3, 3, 5)
    (many,) = plan.on([64]).sizes
    assert many.critics == 5
    assert many.busy["plan"] == pytest.approx(2 * 8 * 9.0)
    assert not plan.chunks.judged_together


def test_a_plan_counts_the_questions_of_judges_that_filter_and_stop(clock, flux):
    options = arguments(clock, flux, lora_cost=1.0, placement=TimedPlacement(clock, 5.0))
    options["keep"] = aa.Preferred(TimedJudge(clock, 7.0)) | FixedFilter(keep=True)
    options["stop"] = aa.StopRule(TimedJudge(clock, 11.0), HELD_OUT, at_least=-1e9)
    plan = aa.plan_run(PROMPTS, **options, sample=5, steps=3)
    result = aa.enhance(PROMPTS, **options)
    for stage, planned, real in plan.against(result):
        assert planned == pytest.approx(real, abs=1e-6), stage
    measured = next(planned for stage, planned, _ in plan.against(result) if stage == "measure")
    assert measured > 2 * 2 * 11.0 * len(HELD_OUT)  # two rounds, and two questions a pair


def test_the_arguments_of_a_run_are_those_of_its_plan():
    run, plan = (dict(inspect.signature(function).parameters) for function in (aa.enhance, aa.plan_run))
    assert {name: parameter for name, parameter in plan.items() if name in run} == run


def test_what_the_first_call_takes_longer_is_paid_once(clock, flux):
    plan = aa.plan_run(PROMPTS, **arguments(clock, flux, draw=3.0, first_cost=100.0), steps=2)
    drawing = plan.stages[0]
    assert drawing.warm_up_seconds == pytest.approx(100)
    assert drawing.seconds == pytest.approx(100 + 2 * len(PROMPTS) * 3)


def test_moves_that_take_long_ask_for_chunks_in_which_they_do_not(clock, flux):
    slow = arguments(clock, flux, placement=TimedPlacement(clock, 30.0), stop=None, rounds=1)
    many = [f"{prompt}, {number}" for number in range(100) for prompt in PROMPTS]
    plan = aa.plan_run(many, **slow, steps=2)
    (advice,) = plan.advice
    larger = int(advice.split("chunk_size=")[1].split()[0])
    assert plan.stages[0].moving_seconds == pytest.approx(267 * 60)
    after = aa.plan_run(many, **slow, chunk_size=larger, steps=2)
    share = sum(stage.moving_seconds for stage in after.stages) / after.seconds
    assert share <= 0.05
    assert f"it would be {share:.0%}" in advice


def test_validations_of_a_training_are_part_of_its_time(clock, flux):
    validation = aa.Validation(
        scorer=TimedScorer(clock, 7.0), prompts=["a red door", "a blue door"], every=3, strengths=(0.5, 1.0)
    )
    options = arguments(clock, flux, lora_cost=5.0, rounds=1, stop=None, validation=validation)
    plan = aa.plan_run(PROMPTS, **options, steps=2)
    (training,) = (row for row in plan.against(aa.enhance(PROMPTS, **options)) if row[0] == "train")
    looks = 1 + 2 * 2  # of the base, and after steps 3 and 4 at two strengths
    assert training[1] == pytest.approx(4 * 1.0 + looks * 2 * (3.0 + 7.0) + (looks - 1) * 2 * 5.0)
    assert training[1] == pytest.approx(training[2])


def test_a_training_of_many_phases_is_planned_with_what_each_begins_with(clock, flux):
    options = arguments(clock, flux, rounds=1, stop=None)
    optimizer = TimedOptimizer(clock, 1.0, build_cost=11.0)
    trainer = replace(options["trainer"], objective=aa.TwoStage(), optimizer=optimizer, steps=14)
    options |= {"trainer": trainer}
    plan = aa.plan_run(PROMPTS[:3], **options, steps=1)
    result = aa.enhance(PROMPTS[:3], **options)
    (training,) = (row for row in plan.against(result) if row[0] == "train")
    assert training[1] == pytest.approx(14 * 1.0 + 3 * 2 * 11.0)
    assert training[1] == pytest.approx(training[2])


def test_memory_on_a_cuda_device_is_measured_by_stage(clock, flux, monkeypatch):
    peak = [0]

    @dataclass(frozen=True)
    class Allocating(TimedCritic):
        def critique(self, image, prompt):
            peak[0] = max(peak[0], 5_000_000_000)
            return super().critique(image, prompt)

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: peak[0])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _: peak.__setitem__(0, 7))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    options = {**arguments(clock, flux, rounds=1), "critic": Allocating(clock, 1.0)}
    plan = aa.plan_run(PROMPTS, **options, steps=2)
    peaks = {stage.stage: stage.peak_bytes for stage in plan.stages}
    assert peaks["critique"] == 5_000_000_000
    assert peaks["redraw"] == peaks["judge"] == peaks["train"] == 7
    assert "5 GB" in plan.table()


def stage_plan(stage, seconds):
    return aa.StagePlan(
        stage=stage,
        count=1,
        unit="things",
        seconds_by_round=(seconds,),
        interval=None,
        warm_up_seconds=0.0,
        moving_seconds=0.0,
        peak_bytes=None,
    )


@pytest.mark.parametrize(
    ("seconds", "situation", "words"),
    [
        ({"critique": 9, "draw": 1}, {"concurrency": 16}, "chunk_size of at least 16"),
        ({"critique": 9, "draw": 1}, {"concurrency": 4}, None),
        (
            {"draw": 8, "train": 1},
            {"candidates": 4, "concurrency": None},
            r"Each candidate of BestOf\(4\) takes 2\.0 s",
        ),
        ({"draw": 1, "train": 9}, {"validations_s": 6.0}, "validate less often"),
        ({"draw": 1, "train": 9}, {}, None),
    ],
)
def test_advice_follows_from_the_numbers(seconds, situation, words):
    stages = tuple(stage_plan(stage, float(number)) for stage, number in seconds.items())
    common = {"prompts": 100, "chunk": 8, "candidates": 1, "concurrency": None, "steps_s": 3.0, "validations_s": 0.0}
    advice = advise(stages, **{**common, **situation})
    assert len(advice) == (words is not None)
    assert words is None or re.search(words, advice[0])


def test_pairs_and_redraws_are_as_frequent_as_in_the_sample(clock, flux):
    good = tuple(PROMPTS[:6])
    plan = aa.plan_run(PROMPTS, **{**arguments(clock, flux), "critic": TimedCritic(clock, 1.0, good)}, steps=2)
    interval = wilson_interval(2, 8)
    assert plan.pairs == 2
    assert plan.redrawn == 0.25
    assert (plan.pairs_interval.low, plan.pairs_interval.high) == pytest.approx((8 * interval.low, 8 * interval.high))


def test_a_sample_without_a_pair_times_the_training_on_a_stand_in_and_says_so(clock, flux):
    plan = aa.plan_run(
        PROMPTS, **{**arguments(clock, flux), "critic": TimedCritic(clock, 1.0, tuple(PROMPTS))}, steps=2
    )
    assert plan.pairs == 0
    assert any("stand-in" in note for note in plan.notes)
    training = next(stage for stage in plan.stages if stage.stage == "train")
    assert training.seconds == pytest.approx(2 * 4 * 1.0)


@dataclass
class MeteredCritic(aa.Critic):
    """Counts what a server would, behind a wrapper that counts nothing."""

    usage: Usage = field(default_factory=Usage, repr=False)

    def critique(self, image, prompt):
        self.usage += Usage(replies=1, retries=1, input_tokens=1000, output_tokens=100)
        return ADVICE


def test_the_critics_tokens_and_their_price_are_those_of_all_pictures(clock, flux):
    critic = aa.critics.Retried(MeteredCritic())
    options = {
        **arguments(clock, flux, stop=None),
        "critic": critic,
        "candidates": aa.BestOf(2, by=TimedScorer(clock, 0)),
    }
    plan = aa.plan_run(PROMPTS, **options, steps=2, price_per_million_tokens=(2.0, 10.0))
    pictures = 2 * 2 * len(PROMPTS)
    assert plan.critic.cost == pytest.approx(pictures * 3e-3)
    assert replace(plan.critic, cost=None) == aa.CriticPlan(
        requests=2 * pictures,
        retries=pictures,
        input_tokens=1000 * pictures,
        output_tokens=100 * pictures,
        cost=None,
        is_lower_bound=False,
    )


@dataclass(eq=False)
class MeteredScorer(aa.Scorer):
    """Counts what a server would."""

    name: str = ""
    usage: Usage = field(default_factory=Usage, repr=False)

    def score(self, image, prompt):
        self.usage += Usage(replies=1, input_tokens=100, output_tokens=1, uncounted=1)
        return float(self.usage.replies)


def test_the_tokens_of_scorers_are_those_of_pairs_and_of_held_out_pictures(clock, flux):
    chooser, watcher, validator = map(MeteredScorer, ("chooser", "watcher", "validator"))
    held_out = [f"{number} plums" for number in range(6)]
    options = {
        **arguments(clock, flux),
        "keep": aa.Gain(chooser, at_least=-1e9),
        "stop": aa.StopRule(watcher, held_out, at_least=-1e9),
        "validation": aa.Validation(prompts=["a fig", "a quince"], scorer=validator, every=4, strengths=(0.5, 1.0)),
    }
    rounds, steps = options["rounds"], options["trainer"].steps
    plan = aa.plan_run(PROMPTS, **options, steps=2, price_per_million_tokens=(2.0, 10.0))
    requests = (
        rounds * 2 * len(PROMPTS)  # before and after
        + (rounds + 1) * 6
        + rounds * 2 * (1 + math.ceil(steps / 4) * 2)
    )
    assert plan.scorers.requests == requests
    assert (plan.scorers.input_tokens, plan.scorers.output_tokens) == (100 * requests, requests)
    assert plan.scorers.cost == pytest.approx(requests * (100 * 2 + 10) / 1e6)
    assert plan.scorers.is_lower_bound
    assert plan.critic is None
    assert f"scorers: {requests:,} requests, at least {100 * requests:,} input" in str(plan)


def test_scorers_that_ask_no_server_have_no_plan(clock, flux):
    assert aa.plan_run(PROMPTS, **arguments(clock, flux), steps=2).scorers is None


def test_a_plan_of_the_playground_is_near_the_run_in_disk_and_leaves_nothing(tmp_path, monkeypatch):
    scratch, store = tmp_path / "scratch", tmp_path / "run"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    options = {
        "synthesizer": playground.synthesizer(guide=aa.RegionalAttention(), steps=2),
        "critic": PhotometricCritic(),
        "planner": aa.GreedyPlanner(max_regions=3),
        "keep": aa.Gain(Chroma(), at_least=-1),
        "trainer": aa.DifferentialLoRATrainer(rank=2, steps=2, batch_size=2),
        "stop": aa.StopRule(Exposure(), playground.prompts(6, seed=0, held_out=True), at_least=-10),
        "rounds": 2,
        "progress": False,
        "store": store,
    }
    prompts = playground.prompts(8, seed=0)
    plan = aa.plan_run(prompts, **options, sample=4, steps=2)
    assert not store.exists()
    assert list(scratch.iterdir()) == []
    result = aa.enhance(prompts, **options)
    real = sum(file.stat().st_size for file in store.rglob("*") if file.is_file())
    assert plan.disk_bytes - plan.disk["checkpoints"] == pytest.approx(real, rel=0.2)
    assert plan.free_bytes > 0
    assert {stage for stage, _, seconds in plan.against(result) if seconds} == {stage.stage for stage in plan.stages}


@pytest.mark.parametrize(
    "wrong",
    [
        {"keep": Chroma()},
        {"rounds": 0},
        {"critic": PhotometricCritic},
        {"stop": "never"},
        {"batch_size": 2.5},
        {"check": "all"},
        {"trainer": aa.DifferentialLoRATrainer(targets="nothing")},
    ],
)
def test_what_enhance_refuses_a_plan_refuses_in_the_same_words(wrong, clock, flux):
    options = {**arguments(clock, flux), **wrong}
    with pytest.raises(aa.ArtAugError) as planned:
        aa.plan_run(PROMPTS, **options)
    with pytest.raises(aa.ArtAugError) as run:
        aa.enhance(PROMPTS, **options)
    assert str(planned.value).replace("plan_run", "enhance") == str(run.value)
    assert options["synthesizer"].drawn == []


@pytest.mark.parametrize(
    "wrong", [{"sample": 0}, {"steps": 1.5}, {"price_per_million_tokens": 3}, {"price_per_million_tokens": (1, -1)}]
)
def test_a_sample_that_makes_no_sense_is_refused(wrong, clock, flux):
    with pytest.raises(aa.InvalidValueError, match=next(iter(wrong))):
        aa.plan_run(PROMPTS, **arguments(clock, flux), **wrong)


def test_a_store_of_another_run_is_refused_before_anything_is_drawn(clock, flux, tmp_path):
    (tmp_path / "letters.txt").write_text("mine")
    options = arguments(clock, flux, store=tmp_path)
    with pytest.raises(aa.StorageError, match=r"letters\.txt"):
        aa.plan_run(PROMPTS, **options)
    assert options["synthesizer"].drawn == []


def test_a_plan_is_saved_shown_and_compared_in_the_report(clock, flux, tmp_path):
    options = arguments(clock, flux, rounds=1)
    plan = aa.plan_run(PROMPTS, **options, steps=2)
    plan.save(tmp_path / "plan.json")
    again = aa.RunPlan.load(tmp_path / "plan.json")
    assert again == plan
    assert json.loads(json.dumps(plan.to_dict()))["bottleneck"] == plan.bottleneck.stage
    assert str(plan).isascii()
    assert "<table>" in plan._repr_html_()
    result = aa.enhance(PROMPTS, **options)
    page = aa.write_report(tmp_path / "report.html", result=result, plan=again).read_text()
    assert '<tr><th scope="row">draw</th><td>24.0 s</td><td>24.0 s</td></tr>' in page
    with pytest.raises(aa.InvalidValueError, match="a plan and no result"):
        aa.write_report(
            tmp_path / "other.html",
            comparison=aa.compare(
                options["synthesizer"], {"same": options["synthesizer"]}, HELD_OUT, scorers=[Exposure()], progress=False
            ),
            plan=plan,
        )


@given(hits=st.integers(0, 40), more=st.integers(0, 40))
def test_wilsons_interval_is_where_the_score_test_accepts(hits, more):
    total = hits + more
    interval = wilson_interval(hits, total)
    assert 0 <= interval.low <= interval.high <= 1
    if total:
        for share in (interval.low, interval.high):
            if 1e-9 < share < 1 - 1e-9:
                distance = (hits / total - share) ** 2 / (share * (1 - share) / total)
                assert distance == pytest.approx(1.959964**2, rel=1e-4)
