"""Checks of the parts of the loop: critics, planners, synthesizers, scorers and filters."""

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

from artaug._internal.annotations import checked
from artaug._internal.images import as_rgb, rgb_parts
from artaug._internal.values import from_json, to_json
from artaug.critique import Abstention, Critic, Critique, Suggestion
from artaug.filtering import PairFilter
from artaug.geometry import Box
from artaug.pairs import ImagePair, Verdict
from artaug.pairwise import PairwiseJudge
from artaug.plan import Plan, Region, RegionPlanner
from artaug.scoring import Scorer
from artaug.synthesis import Synthesizer
from artaug.testing.doubles import SwatchSynthesizer

_PROMPT = "a lighthouse above the sea, 海の上の灯台"


@checked
def check_critic(critic: Critic) -> None:
    """Check that a critic answers any picture with a critique or an abstention, and does not change the picture.

    The pictures are of several sizes and modes: noise, flat colors, a single pixel, grey and transparent ones. One
    prompt is long, one empty, one in another script.

    Raises:
        AssertionError: if it does not; the message says which rule was broken.
    """
    images, prompts = _unusual_pictures(), [_PROMPT, "a red ball", "", "word " * 2000, _PROMPT, "a red ball"]
    for image, prompt in zip(images, prompts, strict=True):
        original = image.copy()
        answer = critic.critique(image, prompt)
        call = f"{type(critic).__name__}.critique({image.mode} picture of {image.size}, {prompt[:20]!r}...)"
        assert isinstance(answer, Critique | Abstention), (
            f"{call} returned {type(answer).__name__}: expected artaug.Critique or artaug.Abstention"
        )
        assert image.tobytes() == original.tobytes(), f"{call} changed the picture"
        assert from_json(type(answer), to_json(answer)) == answer, (
            f"{call} returned an answer that is not the same after a round trip through JSON"
        )
    batch = critic.critique_batch(images, prompts)
    assert len(batch) == len(images), f"critique_batch returned {len(batch)} answers for {len(images)} pictures"
    assert all(isinstance(answer, Critique | Abstention) for answer in batch), (
        f"critique_batch returned {[type(answer).__name__ for answer in batch]}: expected Critique or Abstention"
    )
    assert critic.critique_batch([], []) == [], "critique_batch of no pictures should be an empty list"


@checked
def check_planner(planner: RegionPlanner) -> None:
    """Check that a planner makes a plan of any critique, the same for the same one, and that JSON keeps it.

    The critiques have no suggestion, one, a tiny one, one for the whole picture, and many that overlap.

    Raises:
        AssertionError: if it does not; the message says which rule was broken.
    """
    boxes = [Box(0, 0, 0.5, 1), Box(0.4, 0, 1, 1), Box(0, 0, 0.001, 0.001), Box(0, 0, 1, 1)]
    suggestions = [Suggestion(box, f"part {index}", reason="it is dark") for index, box in enumerate(boxes)]
    critiques = [Critique(), *(Critique((suggestion,)) for suggestion in suggestions), Critique((*suggestions,) * 5)]
    image = _unusual_pictures()[0]
    for critique in critiques:
        call = f"{type(planner).__name__}.plan_from(a picture, {_PROMPT!r}, a Critique of {len(critique.suggestions)} suggestions)"
        plan = planner.plan_from(image, _PROMPT, critique)
        assert isinstance(plan, Plan), f"{call} returned {type(plan).__name__}: expected artaug.Plan"
        assert plan.prompt.strip(), f"{call} returned a plan without a prompt"
        assert planner.plan_from(image, _PROMPT, critique) == plan, f"{call} returned two plans for the same arguments"
        assert from_json(Plan, to_json(plan)) == plan, f"{call} returned a plan that is not the same after JSON"


@checked
def check_synthesizer(synthesizer: Synthesizer) -> None:
    """Check that a synthesizer is deterministic, uses its seed, and draws a plan's regions.

    Raises:
        AssertionError: if it does not; the message says which rule was broken.
    """
    name, plan = type(synthesizer).__name__, Plan("a red ball")
    first, other = synthesizer.synthesize(plan, seed=1), synthesizer.synthesize(plan, seed=2)
    repeated = synthesizer.synthesize(plan, seed=1)
    assert isinstance(first, Image.Image), f"{name}.synthesize returned {type(first).__name__}: expected a PIL image"
    assert rgb_parts(first) == rgb_parts(repeated), f"{name} drew different pictures for the same plan and seed"
    assert rgb_parts(first) != rgb_parts(other), f"{name} drew the same picture for two seeds"
    regional = Plan("a red ball", (Region(Box(0, 0, 0.5, 0.5), "a blue cube"),))
    regional_image = synthesizer.synthesize(regional, seed=1)
    assert regional_image.size == first.size, (
        f"{name} drew {regional_image.size} with a region and {first.size} without"
    )
    assert rgb_parts(regional_image) != rgb_parts(first), (
        f"{name} ignores regions: the picture is the same with and without one"
    )
    batch = synthesizer.synthesize_batch([plan, regional], seeds=[1, 1])
    sizes = [image.size for image in batch]
    assert sizes == [first.size] * 2, f"{name}.synthesize_batch returned sizes {sizes} for 2 plans of {first.size}"


@checked
def check_scorer(scorer: Scorer) -> None:
    """Check that a scorer returns a finite number for any picture, the same alone and in a batch.

    Raises:
        AssertionError: if it does not; the message says which rule was broken.
    """
    images = [as_rgb(image).resize((64, 64)) for image in _unusual_pictures()]
    prompts = [_PROMPT] * len(images)
    alone = [scorer.score(image, prompt) for image, prompt in zip(images, prompts, strict=True)]
    assert all(math.isfinite(number) for number in alone), f"{scorer.name} returned {alone}: expected finite numbers"
    batch = scorer.score_batch(images, prompts)
    close = len(batch) == len(alone) and all(map(_close, alone, batch))
    assert close, f"{scorer.name} returned {alone} one by one and {list(batch)} in a batch"
    assert scorer.name, f"{type(scorer).__name__}.name is empty: tables need a name for it"


@checked
def check_judge(judge: PairwiseJudge) -> None:
    """Check that a judge answers for any two pictures with a number in [0, 1] or an abstention, the same alone and in a batch.

    Raises:
        AssertionError: if it does not; the message says which rule was broken.
    """
    first = [as_rgb(image).resize((64, 64)) for image in _unusual_pictures()]
    second, prompts = [*first[1:], first[0]], [_PROMPT] * len(first)
    alone = [judge.prefer(*question) for question in zip(first, second, prompts, strict=True)]
    for answer in alone:
        assert isinstance(answer, Abstention) or 0 <= answer <= 1, (
            f"{judge.name}.prefer returned {answer!r}: expected a number in [0, 1] or artaug.Abstention"
        )
    batch = judge.prefer_batch(first, second, prompts)
    same = len(batch) == len(alone) and all(map(_same_answer, alone, batch))
    assert same, f"{judge.name} answered {alone} one by one and {list(batch)} in a batch"
    assert judge.name, f"{type(judge).__name__}.name is empty: tables need a name for it"


@checked
def check_filter(keep: PairFilter) -> None:
    """Check that a filter returns a verdict with a reason for every pair, and one for each pair of a batch.

    Raises:
        AssertionError: if it does not; the message says which rule was broken.
    """
    synthesizer = SwatchSynthesizer()
    plans = [Plan("a red ball", (Region(Box(0, 0, 0.5, 1), f"part {part}"),)) for part in range(3)]
    pairs = [
        ImagePair(
            prompt=plan.prompt,
            seed=seed,
            before=synthesizer.synthesize(Plan(plan.prompt), seed=seed),
            after=synthesizer.synthesize(plan, seed=seed),
            plan=plan,
        )
        for seed, plan in enumerate(plans)
    ]
    name = type(keep).__name__
    for verdict in [*(keep.judge(pair) for pair in pairs), *keep.judge_batch(pairs)]:
        assert isinstance(verdict, Verdict), f"{name} returned {type(verdict).__name__}: expected artaug.Verdict"
        assert verdict.reason, f"{name} returned a verdict without a reason: {verdict!r}"
    batch = keep.judge_batch(pairs)
    assert len(batch) == len(pairs), f"{name}.judge_batch returned {len(batch)} verdicts for {len(pairs)} pairs"
    assert all(verdict.keep != other.keep for verdict, other in zip(batch, (~keep).judge_batch(pairs), strict=True)), (
        f"~{name} does not keep what {name} drops"
    )


def _unusual_pictures() -> Sequence[Image.Image]:
    noise = np.random.default_rng(0).integers(0, 256, size=(48, 64, 3), dtype=np.uint8)
    return [
        Image.fromarray(noise),
        Image.new("RGB", (64, 64), "black"),
        Image.new("RGB", (1, 1), "white"),
        Image.fromarray(noise).convert("L"),
        Image.fromarray(noise).convert("RGBA"),
        Image.new("RGB", (200, 10), (200, 30, 30)),
    ]


def _same_answer(alone: float | Abstention, in_batch: float | Abstention) -> bool:
    if isinstance(alone, Abstention) or isinstance(in_batch, Abstention):
        return alone == in_batch
    return _close(alone, in_batch)


def _close(number: float, other: float) -> bool:
    return math.isclose(number, other, rel_tol=1e-4, abs_tol=1e-5)
