"""Each check passes what keeps the contract, and fails on what breaks it."""

import math
from contextlib import contextmanager, nullcontext, suppress

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional

import artaug as aa
from artaug.testing import (
    FixedCritic,
    FixedFilter,
    FixedJudge,
    FixedScorer,
    SwatchSynthesizer,
    check_critic,
    check_filter,
    check_fuser,
    check_guide,
    check_judge,
    check_objective,
    check_planner,
    check_scorer,
    check_synthesizer,
)
from artaug.training import Stage, TrainingPlan


def test_the_doubles_keep_their_contracts():
    check_critic(FixedCritic(aa.Critique()))
    check_critic(FixedCritic(aa.Abstention("it is only a double")))
    check_synthesizer(SwatchSynthesizer())
    check_scorer(FixedScorer(0.5))
    check_judge(FixedJudge(1.0))
    check_judge(FixedJudge(aa.Abstention("it is only a double")))
    check_filter(FixedFilter(keep=True))
    check_filter(FixedFilter(keep=False))


# --- critics, planners, synthesizers, scorers, filters -----------------------------------------------------------


class ReturnsNone(aa.Critic):
    def critique(self, image, prompt):
        return None


class PaintsOver(aa.Critic):
    def critique(self, image, prompt):
        image.paste(0 if image.mode == "L" else "red", (0, 0, 1, 1))
        return aa.Critique()


class AnswersOnce(aa.Critic):
    def critique(self, image, prompt):
        return aa.Critique()

    def critique_batch(self, images, prompts):
        return [aa.Critique()]


@pytest.mark.parametrize(
    ("critic", "message"),
    [
        (ReturnsNone(), "returned NoneType: expected artaug.Critique or artaug.Abstention"),
        (PaintsOver(), "changed the picture"),
        (AnswersOnce(), "returned 1 answers for 6 pictures"),
    ],
)
def test_check_critic_catches(critic, message):
    with pytest.raises(AssertionError, match=message):
        check_critic(critic)


class PlansText(aa.RegionPlanner):
    def plan(self, prompt, critique):
        return prompt


class PlansBlank(aa.RegionPlanner):
    def plan(self, prompt, critique):
        return aa.Plan(" ")


class PlansDifferently(aa.RegionPlanner):
    calls = 0

    def plan(self, prompt, critique):
        self.calls += 1
        return aa.Plan(f"{prompt} {self.calls}")


class NeedsASuggestion(aa.RegionPlanner):
    def plan(self, prompt, critique):
        return aa.Plan(critique.suggestions[0].prompt)


def test_check_planner_passes_the_greedy_planner():
    check_planner(aa.GreedyPlanner())
    check_planner(aa.GreedyPlanner(max_regions=1, min_area=0.5, feather=0.1))


@pytest.mark.parametrize(
    ("planner", "message"),
    [
        (PlansText(), "returned str: expected artaug.Plan"),
        (PlansBlank(), "a plan without a prompt"),
        (PlansDifferently(), "two plans for the same arguments"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_check_planner_catches(planner, message):
    with pytest.raises(AssertionError, match=message):
        check_planner(planner)


def test_check_planner_calls_with_a_critique_without_suggestions():
    with pytest.raises(IndexError):
        check_planner(NeedsASuggestion())


class NeverTheSame(aa.Synthesizer):
    def __init__(self):
        self.drawn = 0

    def synthesize(self, plan, *, seed):
        self.drawn += 1
        return Image.new("RGB", (8, 8), (self.drawn, 0, 0))


class IgnoresRegions(aa.Synthesizer):
    def synthesize(self, plan, *, seed):
        return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (8, 8, 3), dtype=np.uint8))


class IgnoresSeeds(aa.Synthesizer):
    def synthesize(self, plan, *, seed):
        return Image.new("RGB", (8, 8), (len(plan.regions), 0, 0))


@pytest.mark.parametrize(
    ("synthesizer", "message"),
    [
        (NeverTheSame(), "different pictures for the same plan and seed"),
        (IgnoresRegions(), "ignores regions"),
        (IgnoresSeeds(), "the same picture for two seeds"),
    ],
)
def test_check_synthesizer_catches(synthesizer, message):
    with pytest.raises(AssertionError, match=message):
        check_synthesizer(synthesizer)


class BatchBias(aa.Scorer):
    def score(self, image, prompt):
        return 0.5

    def score_batch(self, images, prompts):
        return [0.6 for _ in images]


@pytest.mark.parametrize(
    ("scorer", "message"),
    [(FixedScorer(math.nan), "expected finite numbers"), (BatchBias(), "in a batch")],
)
def test_check_scorer_catches(scorer, message):
    with pytest.raises(AssertionError, match=message):
        check_scorer(scorer)


class JudgesByBatch(aa.PairwiseJudge):
    def prefer(self, first, second, prompt):
        return 0.5

    def prefer_batch(self, first, second, prompts):
        return [0.6 for _ in prompts]


@pytest.mark.parametrize(
    ("judge", "message"),
    [(FixedJudge(1.5), r"returned 1.5: expected a number in \[0, 1\]"), (JudgesByBatch(), "in a batch")],
)
def test_check_judge_catches(judge, message):
    with pytest.raises(AssertionError, match=message):
        check_judge(judge)


class GivesNoReason(aa.PairFilter):
    def judge(self, pair):
        return aa.Verdict(keep=True, reason="", scores={})


class ReturnsBool(aa.PairFilter):
    def judge(self, pair):
        return True


@pytest.mark.parametrize(
    ("keep", "message"),
    [(GivesNoReason(), "a verdict without a reason"), (ReturnsBool(), "returned bool: expected artaug.Verdict")],
)
def test_check_filter_catches(keep, message):
    with pytest.raises(AssertionError, match=message):
        check_filter(keep)


# --- objectives --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "objective",
    [
        aa.PairedDifference(),
        aa.TwoStage(),
        aa.Bipolar(),
        aa.DirectPreference(),
        aa.DirectPreference(safeguard=0.5, norm_guard=1.0),
        aa.NegativeAware(),
        aa.PairedPreference(),
        aa.PairedDifference(at_before=0.5, reach=1.5),
        aa.SupervisedFineTuning(),
    ],
    ids=repr,
)
def test_check_objective_passes_every_objective(objective):
    check_objective(objective)


def spread(maps, _plans):
    """How little of a phrase's attention is at its peak."""
    return 1 - maps.mean().flatten(1).amax(dim=1)


class FromOwnNoise(aa.Objective):
    """Reads all that a batch can have, but for pictures."""

    reads_pictures, reads_own_noise = False, True

    def phrases_of(self, plan):
        return plan.prompt.split()[:1]

    def loss(self, model, batch):
        assert [len(tokens) for tokens in batch.phrase_tokens] == [1] * len(batch.plans)
        return model.predict(batch.own_noise, batch.sigmas, batch.conditioning).square().mean()


@pytest.mark.parametrize(
    "objective",
    [
        aa.AttentionObjective(phrases=["red"], attention_loss=spread),
        aa.AttentionObjective(phrases=["red"], attention_loss=spread, objective=aa.PairedDifference()),
        aa.AttentionObjective(
            phrases=lambda plan: ["door"] if "door" in plan.prompt else [], attention_loss=spread, preserve=1.0
        ),
        FromOwnNoise(),
    ],
    ids=["attention", "beside another", "preserving", "own noise"],
)
def test_check_objective_passes_those_that_look_into_the_model_or_need_no_pictures(objective):
    check_objective(objective, prompts=("a red barn", "a red door"))


def error(model, batch):
    """The squared error of a plain fine-tuning step, not yet averaged."""
    noisy = model.noise_schedule.add_noise(batch.after, batch.noise, batch.sigmas)
    target = model.noise_schedule.target(batch.after, batch.noise, batch.sigmas)
    return (model.predict(noisy, batch.sigmas, batch.conditioning) - target).square()


class NoTensor(aa.Objective):
    def loss(self, model, batch):
        return error(model, batch).mean().item()


class NotScalar(aa.Objective):
    def loss(self, model, batch):
        return error(model, batch).flatten(1).mean(dim=1)


class NotFinite(aa.Objective):
    def loss(self, model, batch):
        return error(model, batch).mean() / 0


class Detached(aa.Objective):
    def loss(self, model, batch):
        return error(model, batch).mean().detach()


class OfTheTeacher(aa.Objective):
    """Has a gradient, but none that reaches the LoRA."""

    def loss(self, model, batch):
        return 0 * error(model, batch).mean()


class ScalesTheBatch(aa.Objective):
    def loss(self, model, batch):
        loss = error(model, batch).mean()
        batch.noise.mul_(2)
        return loss


class DrawsNoise(aa.Objective):
    def loss(self, model, batch):
        noisy = model.noise_schedule.add_noise(batch.after, torch.randn_like(batch.noise), batch.sigmas)
        return functional.mse_loss(model.predict(noisy, batch.sigmas, batch.conditioning), batch.after)


class NamesUnknownPairs(aa.Objective):
    def loss(self, model, batch):
        return error(model, batch).mean()

    def training_plan(self, pairs):
        return TrainingPlan((tuple(range(pairs + 1)),), (Stage(self.loss),))


class FailsWithoutPictures(aa.Objective):
    reads_pictures = False

    def loss(self, model, batch):
        loss = model.predict(batch.noise, batch.sigmas, batch.conditioning).square().mean()
        return loss if hasattr(batch, "after") else loss.detach()


class FailsInItsSecondStage(NamesUnknownPairs):
    def training_plan(self, pairs):
        stages = (Stage(self.loss), Stage(Detached().loss))
        return TrainingPlan((tuple(range(pairs)),), stages)


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (NoTensor(), "is float: expected a torch.Tensor"),
        (NotScalar(), r"has shape \(3,\): expected a scalar"),
        (NotFinite(), "is inf: expected a finite number"),
        (Detached(), "has no gradient"),
        (OfTheTeacher(), "has a gradient of 0 for what learns"),
        (ScalesTheBatch(), "changed the batch's noise in place"),
        (DrawsNoise(), "for the same batch: draw no random numbers"),
        (NamesUnknownPairs(), r"names the pairs \[4\]: expected numbers below 4"),
        (FailsInItsSecondStage(), "has no gradient"),
        (FailsWithoutPictures(), "of a batch without pictures .* has no gradient"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_check_objective_catches(objective, message):
    with pytest.raises(AssertionError, match=message):
        check_objective(objective)


# --- fusers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fuser", [aa.ConcatFuser(), aa.SvdFuser(rank=1), aa.SvdFuser(energy=0.5)], ids=repr)
def test_check_fuser_passes_every_fuser(fuser):
    check_fuser(fuser)


class FuserFrom(aa.Fuser):
    """A fuser that is a function."""

    def __init__(self, fuse):
        self._fuse = fuse

    def fuse(self, loras):
        return self._fuse(aa.ConcatFuser(), loras)


def scale_in_place(exact, loras):
    for lora in loras:
        for update in lora.layers.values():
            update.up.mul_(2)
    return exact.fuse(loras)


def add_noise(exact, loras):
    fused = exact.fuse(loras)
    return fused.scaled(1 + torch.rand(()).item() / 100)


def of_nothing_nothing(exact, loras):
    return exact.fuse(loras) if loras else None


@pytest.mark.parametrize(
    ("fuse", "message"),
    [
        (lambda exact, loras: dict(exact.fuse(loras).layers), "returned dict: expected artaug.LoRA"),
        (
            lambda exact, loras: exact.fuse(loras[1:]) if loras else exact.fuse(loras),
            r"returned the layers \['first'\]",
        ),
        (lambda exact, loras: exact.fuse(loras).scaled(1 / max(len(loras), 1)), "is not three times it"),
        (scale_in_place, "changed the LoRAs it was given"),
        (add_noise, "returned two LoRAs for the same arguments"),
        (of_nothing_nothing, r"fuse\(\[\]\) returned None: expected artaug.LoRAError"),
    ],
    ids=["a dict", "one lost", "the mean", "in place", "noise", "nothing"],
)
def test_check_fuser_catches(fuse, message):
    with pytest.raises(AssertionError, match=message):
        check_fuser(FuserFrom(fuse))


# --- guides ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "guide",
    [aa.OutputMix(), *(aa.RegionalAttention(method=method) for method in ("auto", "merged", "dense"))],
    ids=lambda guide: getattr(guide, "method", "mix"),
)
def test_check_guide_passes_every_guide(guide):
    check_guide(guide)


class Nudge(aa.Guide):
    """Adds a number to the predictions of pictures with regions; its flags break one rule each."""

    def __init__(self, *flaws):
        self.flaws = flaws

    @contextmanager
    def applied(self, run):
        denoiser = run.denoiser
        rows = [row for row, row_regions in enumerate(run.regions) if row_regions or "everywhere" in self.flaws]
        if "first only" in self.flaws:
            rows = rows[:1]

        def hook(_module, _args, output):
            nudged = output.clone()
            nudged[rows] += torch.rand(()) if "random" in self.flaws else 1 + ("batch" in self.flaws) * len(output)
            return nudged

        handle = denoiser.module.register_forward_hook(hook)
        if "after an exception" in self.flaws:
            yield
            handle.remove()
            return
        with suppress(Exception) if "swallows" in self.flaws else nullcontext():
            try:
                yield
            finally:
                if "weights" in self.flaws:
                    denoiser.module.proj_out.bias.data += 1
                if "stays" not in self.flaws:
                    handle.remove()


def test_check_guide_passes_a_guide_that_keeps_the_rules():
    check_guide(Nudge())


@pytest.mark.parametrize(
    ("flaw", "message"),
    [
        ("everywhere", "changes the prediction of pictures without regions"),
        ("first only", "ignores the regions of picture 1"),
        ("random", "predicts differently for the same call"),
        ("batch", "predicts picture 0 of a batch differently than alone"),
        ("stays", "leaves a trace on the model: a forward hook"),
        ("weights", "leaves a trace on the model: other weights"),
        ("after an exception", "after an exception, leaves a trace on the model: a forward hook"),
        ("swallows", "swallows an exception"),
    ],
)
def test_check_guide_catches(flaw, message):
    with pytest.raises(AssertionError, match=message):
        check_guide(Nudge(flaw))
