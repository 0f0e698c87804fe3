"""Placement: one object's models on the device at a time, in the order of the stages, and all back where they were."""

import re
import threading
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

import artaug as aa
from artaug._internal.offloading import device_of
from artaug.critics import Cached, Ensemble, Retried
from artaug.diffusion import DiffusersSynthesizer
from artaug.evaluation import suites
from artaug.evaluation.suites import (
    Case,
    Clause,
    ObjectCheck,
    ObjectScore,
    Question,
    QuestionCheck,
    QuestionScore,
    Suite,
)
from artaug.placement import _Session, models_of
from artaug.scorers import ClipColors, FunctionScorer, MeanOf
from artaug.testing import FixedScorer
from support.tiny_flux import TINY_SIZE, tiny_flux

GPU, OTHER, CPU = torch.device("cuda", 0), torch.device("cuda", 1), torch.device("cpu")


class Model(nn.Module):
    """A model that notes where it is moved; the weights of its parts go with it."""

    def __init__(self, name, events, *, home=CPU, parts=()):
        super().__init__()
        self.name, self.events, self.where = name, events, home
        self.weight = nn.Parameter(torch.ones(2))
        self.parts = nn.ModuleList(parts)

    def to(self, device):
        device = torch.device(device)
        if device != self.where:
            self.events.append(f"{self.name} {'on' if device.type == 'cuda' else 'off'}")
        for part in self.modules():
            if isinstance(part, Model):
                part.where = device
        return self


class Owner:
    def __init__(self, *models):
        self.models = models


def colors_of(model):
    """A classifier of colors with a stand-in for its encoder."""
    made = object.__new__(ClipColors)
    object.__setattr__(made, "encoder", Owner(model))
    return made


@pytest.fixture
def events():
    return []


@pytest.fixture(autouse=True)
def where(monkeypatch):
    """Believe a `Model` where it is."""
    monkeypatch.setattr(
        "artaug.placement.device_of", lambda module: getattr(module, "where", None) or device_of(module)
    )


def session():
    return _Session(GPU, pin_memory=False)


def test_each_stage_brings_its_models_and_takes_them_off(events):
    draws, judges = Owner(Model("denoiser", events), Model("vae", events)), Owner(Model("critic", events))
    run = session()
    run.opened(draws, judges, Owner())
    for owner in (draws, judges, Owner(), draws):
        with run.stage(owner):
            events.append("-")
    run.close()
    drawing = ["denoiser on", "vae on", "-", "denoiser off", "vae off"]
    assert events == [*drawing, "critic on", "-", "critic off", "-", *drawing]


def test_what_was_on_the_device_leaves_it_when_the_run_begins_and_is_back_when_it_ends(events):
    first, second = Owner(Model("first", events, home=GPU)), Owner(Model("second", events, home=GPU))
    run = session()
    run.opened(first, second)
    assert events == ["first off", "second off"]
    with run.stage(second):
        assert (first.models[0].where, second.models[0].where) == (CPU, GPU)
    run.close()
    assert first.models[0].where == second.models[0].where == GPU


def test_after_an_exception_a_stage_s_models_are_off_and_all_are_back_where_they_were(events):
    owner, other = Owner(Model("model", events)), Owner(Model("other", events, home=GPU))
    run = session()
    run.opened(owner, other)

    def failing():
        with run.stage(owner):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        failing()
    assert owner.models[0].where == CPU
    run.close()
    assert other.models[0].where == GPU


def test_models_that_come_up_later_make_room_first(events):
    first, late = Owner(Model("first", events)), Owner(Model("late", events, home=GPU))
    run = session()
    run.opened(first)
    with run.stage(first):
        pass
    with run.stage(late):
        assert (first.models[0].where, late.models[0].where) == (CPU, GPU)
    run.close()
    assert (first.models[0].where, late.models[0].where) == (CPU, GPU)


def test_the_only_models_of_a_run_move_once(events):
    owner = Owner(Model("model", events))
    run = session()
    run.opened(owner, Owner())
    for _ in range(3):
        with run.stage(owner):
            pass
    run.close()
    assert events == ["model on", "model off"]


def test_a_model_of_two_objects_moves_once_in_a_stage_of_both(events):
    clip = Model("clip", events)
    run = session()
    run.opened(Owner(clip), Owner(clip), Owner(Model("other", events)))
    with run.stage(Owner(clip), Owner(clip)), run.stage(Owner(clip)):
        assert clip.where == GPU
    run.close()
    assert events == ["clip on", "clip off"]


def test_a_part_of_a_model_is_on_the_device_as_long_as_the_model_is_used(events):
    encoder = Model("encoder", events, home=GPU)
    vae = Model("vae", events, home=GPU, parts=[encoder])
    run = session()
    run.opened(Owner(vae), Owner(encoder), Owner(Model("other", events)))
    with run.stage(Owner(vae)):
        with run.stage(Owner(encoder)):
            assert encoder.where == GPU
        assert encoder.where == GPU
    with run.stage(Owner(encoder)):
        with run.stage(Owner(vae)):
            assert vae.where == GPU
        assert encoder.where == GPU
    run.close()
    assert vae.where == encoder.where == GPU


def test_models_on_another_gpu_stay_there(events):
    elsewhere = Owner(Model("elsewhere", events, home=OTHER))
    run = session()
    run.opened(elsewhere, Owner(Model("model", events)))
    with run.stage(elsewhere):
        assert elsewhere.models[0].where == OTHER
    run.close()
    assert events == []


def test_another_thread_does_not_get_models_taken_away(events):
    owner, other = Owner(Model("model", events)), Owner(Model("other", events))
    runs = [session(), session()]
    found, turns = [], threading.Barrier(2, timeout=60)

    def use(run):
        run.opened(owner, other)
        turns.wait()
        for _ in range(20):
            with run.stage(owner):
                found.append(owner.models[0].where)
                threading.Event().wait(0.001)
                found.append(owner.models[0].where)
        run.close()

    threads = [threading.Thread(target=use, args=(run,)) for run in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert set(found) == {GPU}
    assert len(found) == 80


def test_a_run_inside_a_run_moves_nothing_of_its_own(events):
    owner, other = Owner(Model("model", events, home=GPU)), Owner(Model("other", events))
    run = session()
    with run.opened(owner, other) as inner, inner.opened(owner) as innermost, innermost.stage(owner):
        pass
    assert events == ["model off", "model on", "model off"]
    run.close()


def test_a_stage_without_a_run_brings_its_models_and_leaves_all_as_it_was(events):
    owner = Owner(Model("model", events))
    with aa.OneAtATime(device="cpu").stage(owner):
        pass
    with aa.Resident().stage(owner), aa.Resident().opened(owner):
        pass
    assert owner.models[0].where == CPU


def test_by_default_stages_compute_where_a_model_is(events):
    placement = aa.OneAtATime()
    on_gpu, on_cpu = Model("a", events, home=OTHER), Model("b", events)
    assert placement.resolve([on_cpu, on_gpu]) == OTHER
    if not torch.accelerator.is_available():
        assert placement.resolve([on_cpu]) == CPU


class WithModels(aa.Critic):
    def __init__(self, *models):
        self._models = models

    @property
    def models(self):
        return self._models

    def critique(self, image, prompt):
        raise AssertionError


class ScorerWithModels(aa.Scorer):
    def __init__(self, *models):
        self._models = models

    @property
    def models(self):
        return self._models

    def score(self, image, prompt):
        raise AssertionError


class MetricWithModels(aa.ImageSimilarity):
    models = (nn.ReLU(),)

    def compare(self, first, second):
        raise AssertionError


FIRST, SECOND = nn.ReLU(), nn.Tanh()
CRITIC, SCORER, OTHER_SCORER = WithModels(FIRST), ScorerWithModels(FIRST), ScorerWithModels(SECOND)
OTHER_SCORER.__class__ = type("OtherScorer", (ScorerWithModels,), {})  # of another name


class Detector(suites.Detector):
    name = "detector"
    models = (SECOND,)

    def detect(self, image, labels):
        return []


def suite_of(check):
    return Suite("suite", (Case("a cat", check),))


OWNERS = {
    "an ensemble": (lambda: Ensemble((CRITIC, WithModels(SECOND))), [FIRST, SECOND]),
    "a cache": (lambda: Cached(CRITIC, folder=Path("unused"), identity="a"), [FIRST]),
    "a retried cache": (lambda: Retried(Cached(CRITIC, folder=Path("unused"), identity="a")), [FIRST]),
    "a gain": (lambda: aa.Gain(SCORER), [FIRST]),
    "a floor": (lambda: aa.Floor(SCORER, at_least=0), [FIRST]),
    "a top": (lambda: aa.TopFraction(SCORER, 0.5), [FIRST]),
    "several": (lambda: aa.ParetoGain([SCORER, OTHER_SCORER]), [FIRST, SECOND]),
    "a similarity": (lambda: aa.Similarity(MetricWithModels(), 0.5), list(MetricWithModels.models)),
    "a function": (lambda: aa.Similarity(lambda _first, _second: 1.0, 0.5), []),
    "an embedder": (lambda: aa.EmbeddingSimilarity(Owner(FIRST)), [FIRST]),
    "and not": (lambda: aa.Gain(SCORER) & ~aa.Gain(OTHER_SCORER), [FIRST, SECOND]),
    "or": (lambda: aa.Gain(SCORER) | aa.Gain(OTHER_SCORER), [FIRST, SECOND]),
    "candidates": (lambda: aa.BestOf(2, by=SCORER), [FIRST]),
    "a person after a filter": (lambda: aa.ManualReview("unused", prefilter=aa.Gain(SCORER)), [FIRST]),
    "a person": (lambda: aa.ManualReview("unused"), []),
    "a mean": (lambda: MeanOf((SCORER, OTHER_SCORER)), [FIRST, SECOND]),
    "components": (lambda: FunctionScorer(function=max, components=(SCORER,)), [FIRST]),
    "questions": (lambda: QuestionScore(suite=suite_of(QuestionCheck((Question(1, "A cat?"),))), vqa=SCORER), [FIRST]),
    "objects": (
        lambda: ObjectScore(
            suite=suite_of(ObjectCheck((Clause("cat"),))), detector=Detector(), colors=colors_of(FIRST)
        ),
        [SECOND, FIRST],
    ),
    "a scorer without": (FixedScorer, []),
    "none": (lambda: None, []),
}


@pytest.mark.parametrize("case", OWNERS)
def test_what_wraps_others_has_their_models(case):
    owner, expected = OWNERS[case]
    assert list(models_of(owner())) == expected


HOLDS = re.compile(
    r"Synthesizer|Critic|Scorer|PairFilter|Model|Encoder|Embedder|Detector|Classifier|SimilarityMetric|Pipeline|nn\.Module"
)


def test_a_built_in_part_that_holds_a_model_or_another_part_says_so():
    pending = [aa.Synthesizer, aa.Critic, aa.Scorer, aa.PairFilter, aa.ImageSimilarity, aa.BestOf]
    silent, holders = [], []
    while pending:
        part = pending.pop()
        pending += [cls for cls in part.__subclasses__() if cls.__module__.startswith("artaug")]
        if is_dataclass(part) and any(HOLDS.search(str(item.type)) for item in fields(part)):
            holders.append(part)
            silent += [part] if "models" not in vars(part) else []
    assert silent == []
    assert {"DiffusersSynthesizer", "VLMCritic", "ImageReward", "_Not", "MeanOf"} <= {cls.__name__ for cls in holders}


@pytest.mark.parametrize("models", [nn.ReLU(), [nn.ReLU(), "a name"], None, "cuda"], ids=repr)
def test_models_that_are_no_list_of_modules_are_refused_by_name(models):
    with pytest.raises(aa.ContractError, match=r"^WithWrong.models returned .* Expected a tuple of torch.nn.Module"):
        models_of(type("WithWrong", (), {"models": models})())


def test_all_that_cannot_be_moved_is_refused_at_once_and_by_name():
    hooked, unloaded = nn.Linear(2, 2), nn.Linear(2, 2, device="meta")
    vars(hooked)["_hf_hook"] = object()
    owners = {"synthesizer": Owner(hooked), "critic": Owner(nn.Linear(2, 2)), "keep": Owner(unloaded)}
    with pytest.raises(aa.InvalidValueError, match="2 things are wrong") as refusal:
        aa.OneAtATime(device="cpu").check("improve", owners)
    text = str(refusal.value)
    assert "the Linear of synthesizer (Owner) cannot be moved: hooks" in text
    assert "the Linear of keep (Owner) cannot be moved: some of its weights are on the meta device" in text
    aa.Resident().check("improve", owners)


def test_a_device_that_torch_does_not_know_is_refused_when_the_placement_is_made():
    with pytest.raises(aa.InvalidValueError, match="device is 'gpu'"):
        aa.OneAtATime(device="gpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="it has such a device")
def test_a_device_that_is_not_there_is_refused_before_the_run():
    with pytest.raises(aa.ModelError, match="no device 'cuda'"):
        aa.OneAtATime(device="cuda").check("improve", {})


def test_the_models_of_a_synthesizer_are_those_of_its_pipeline():
    pipeline = tiny_flux()
    synthesizer = DiffusersSynthesizer(pipeline=pipeline, width=TINY_SIZE, height=TINY_SIZE, steps=1)
    expected = [pipeline.transformer, pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2]
    assert set(models_of(synthesizer)) == set(expected)


class Watched(aa.Scorer):
    """Scores by a model that notes its moves."""

    def __init__(self, events):
        self._model = nn.Linear(3, 1)
        self._model.to = lambda device: events.append(f"scorer to {device}") or self._model

    @property
    def models(self):
        return (self._model,)

    def score(self, image, prompt):
        return image.convert("L").resize((1, 1)).getpixel((0, 0)) / 255


def flux_synthesizer():
    return DiffusersSynthesizer(pipeline=tiny_flux(), width=TINY_SIZE, height=TINY_SIZE, steps=1)


def watch(pipeline, events):
    """Note the moves of a pipeline's denoiser."""
    move = pipeline.transformer.to
    pipeline.transformer.to = lambda device: events.append(f"denoiser to {device}") or move(device)
    return pipeline


def test_a_training_that_takes_turns_with_its_validation_learns_the_same_bits(events):
    synthesizer = flux_synthesizer()
    pairs = [aa.ImagePair.unchanged(synthesizer.synthesize(aa.Plan("a cat"), seed=0), prompt="a cat", seed=0)]
    trainer = aa.DifferentialLoRATrainer(rank=2, steps=2, batch_size=1, objective=aa.SupervisedFineTuning())
    validation = aa.Validation(scorer=Watched(events), prompts=["a dog"], every=1)

    def trained(placement):
        return trainer.train(pairs, synthesizer, seed=0, placement=placement, validation=validation, progress=False)

    resident = trained(aa.Resident())
    assert events == []
    watch(synthesizer.pipeline, events)
    moved = trained(aa.OneAtATime(device="cpu"))
    assert moved.lora.digest == resident.lora.digest
    assert (moved.losses, moved.validations) == (resident.losses, resident.validations)
    score = ["scorer to cpu"] * 2
    turns = ["denoiser to cpu"] * 2
    # The base is validated, then each of two steps.
    assert events == [*turns, *score, *(turns + turns + score) * 2, "denoiser to cpu", "scorer to cpu"]


def test_a_comparison_that_takes_turns_has_the_same_scores(events):
    synthesizer = flux_synthesizer()

    def compared(placement):
        scorers = [Watched(events)]
        return aa.compare(
            synthesizer, {"same": synthesizer}, ["a", "b"], scorers=scorers, placement=placement, progress=False
        )

    resident = compared(aa.Resident())
    assert events == []
    watch(synthesizer.pipeline, events)
    assert compared(aa.OneAtATime(device="cpu")).rows == resident.rows
    stages = ["denoiser to cpu"] * 2 + ["scorer to cpu"] * 2
    assert events == [*stages * 2, "denoiser to cpu", "scorer to cpu"]


@pytest.mark.gpu
@pytest.mark.parametrize("home", ["cpu", "cuda"])
@pytest.mark.parametrize("pin_memory", [False, True])
def test_on_a_gpu_a_run_needs_the_memory_of_its_largest_part(home, pin_memory):
    parts = [Owner(nn.Sequential(*(nn.Linear(2048, 2048) for _ in range(count))).to(home)) for count in (4, 7, 2)]
    parameters = [[*owner.models[0].parameters()] for owner in parts]
    weights = [tensor.detach().cpu().clone() for tensors in parameters for tensor in tensors]
    sizes = [sum(tensor.nbytes for tensor in tensors) for tensors in parameters]
    inputs = torch.ones(8, 2048, device="cuda")

    def outputs():
        return [owner.models[0].to("cuda")(inputs).cpu() for owner in parts]

    expected = outputs()
    for owner in parts:
        owner.models[0].to(home)
    with torch.no_grad(), aa.OneAtATime(device="cuda", pin_memory=pin_memory).opened(*parts) as run:
        torch.cuda.reset_peak_memory_stats()
        base = torch.cuda.memory_allocated()
        for _ in range(2):
            for owner, output in zip(parts, expected, strict=True):
                with run.stage(owner):
                    assert torch.equal(owner.models[0](inputs).cpu(), output)
        assert torch.cuda.max_memory_allocated() - base <= max(sizes) + 16 * 2**20
        assert torch.cuda.memory_allocated() - base <= 2**20
    now = [[*owner.models[0].parameters()] for owner in parts]
    assert all(a is b for new, old in zip(now, parameters, strict=True) for a, b in zip(new, old, strict=True))
    assert {tensor.device.type for tensors in now for tensor in tensors} == {home}
    assert all(map(torch.equal, [tensor.detach().cpu() for tensors in now for tensor in tensors], weights))
    assert not any(tensor.is_pinned() for tensors in now for tensor in tensors)


@pytest.mark.gpu
def test_on_a_gpu_pictures_and_loras_are_those_of_a_resident_pipeline():
    pipeline = tiny_flux()
    synthesizer = DiffusersSynthesizer(pipeline=pipeline, width=TINY_SIZE, height=TINY_SIZE, steps=2)
    trainer = aa.DifferentialLoRATrainer(rank=2, steps=3, batch_size=1)

    def results(placement):
        with placement.opened(synthesizer, SCORER) as run, run.stage(synthesizer):
            image = synthesizer.synthesize(aa.Plan("a cat"), seed=0)
        pair = aa.ImagePair.unchanged(image, prompt="a cat", seed=0)
        lora = trainer.train([pair], synthesizer, seed=0, placement=placement, progress=False).lora
        return image.tobytes(), lora.digest

    moved = results(aa.OneAtATime(device="cuda"))
    assert {part.device.type for part in models_of(synthesizer)} == {"cpu"}
    pipeline.to("cuda")
    assert results(aa.Resident()) == moved
