"""The systems of `benchmarks.systems`: each learns what it learns, if it does, and then draws a picture of each prompt."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeAlias

import torch
from PIL.Image import Image

import artaug as aa
from artaug import playground
from artaug.critics import PhotometricCritic
from artaug.diffusion import DiffusersSynthesizer
from artaug.recipes import (
    AStar,
    AttendAndExcite,
    ChatReflection,
    ChatThought,
    checklist,
    dreamsync,
    irg,
    layout_first,
    rollouts,
    sepen,
)
from artaug.scorers import FunctionScorer, Photometric
from artaug.synthesis import draw, picture_seeds
from benchmarks._systems_world import Outcome, Request, box_of, request_of, wrong_things

BASE = "base"
MODELS: Mapping[str, float] = {"as it ships": 0.0, "confused": 1.5}
"""The models, and the noise in their keys of text, in standard deviations of each layer's weights.

The playground's model draws nearly all that is asked for, so no system could be told from another by it. With noise in the keys of its joint
attention it still draws as well, and loses which word belongs to which thing.
"""
PLANNER = aa.GreedyPlanner(max_regions=3, feather=0.05)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The size of the benchmark."""

    prompts: int = 24
    """Of a seed, with two things and with three."""
    sampling_steps: int = 8
    training_prompts: int = 32
    """That a system learns from, in each round; of one thing or two, as the playground's model was trained on."""
    training_steps: int = 48
    """Of each round."""
    artaug_steps: int = 30
    """Of each round of the loop."""
    rounds: int = 2
    draws: int = 4
    """Of each prompt, in DreamSync and rollouts."""
    faithful: float = 1.0
    """The part of what is asked for that a picture has to show to be learned from, in DreamSync."""
    gain: float = 0.02
    """Of `Photometric`, from which the loop keeps a pair."""


QUICK = Settings(
    prompts=2,
    sampling_steps=1,
    training_prompts=4,
    training_steps=2,
    artaug_steps=1,
    rounds=1,
    draws=2,
    faithful=0.0,
    gain=-1.0,
)


def model_with(noise: float, *, steps: int) -> DiffusersSynthesizer:
    """The playground's model with noise in its keys of text, the same each time."""
    synthesizer = playground.synthesizer(steps=steps)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in synthesizer.pipeline.transformer.named_parameters():
            if name.endswith("add_k_proj.weight"):
                weight.add_(noise * weight.std() * torch.randn(weight.shape, generator=generator))
    return synthesizer


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What a system may use: the model without a guide, and what it may learn from."""

    base: DiffusersSynthesizer
    settings: Settings
    seed: int

    @property
    def prompts(self) -> list[str]:
        """To learn from."""
        return playground.prompts(self.settings.training_prompts, seed=self.seed)

    @property
    def trainer(self) -> aa.DifferentialLoRATrainer:
        """Of the systems that learn from several draws, each with an objective of its own."""
        return aa.DifferentialLoRATrainer(
            rank=8, steps=self.settings.training_steps, batch_size=8, learning_rate=3e-3, echo=4
        )

    def guided(self, guide: aa.Guide) -> DiffusersSynthesizer:
        """The model with a guide."""
        return replace(self.base, guide=guide)


Drawer: TypeAlias = Callable[[Sequence[Request], int], list[Image]]
"""Draws a picture of each request; the number is the seed."""
System: TypeAlias = Callable[[Bench], Drawer]
"""Learns what there is to learn, and gives what draws."""


def plain(synthesizer: aa.Synthesizer, asked: Sequence[Request], seed: int) -> list[Image]:
    """One picture of each prompt."""
    return [
        draw(synthesizer, [aa.Plan(one.prompt)], seeds=[own])[0]
        for one, own in zip(asked, picture_seeds(seed, len(asked)), strict=True)
    ]


def regional(bench: Bench) -> Drawer:
    """Every thing in a box before the first picture; the layout is a rule in the place of a language model."""

    def drawer(asked: Sequence[Request], seed: int) -> list[Image]:
        laid_out = layout_first(
            [one.prompt for one in asked],
            synthesizer=bench.guided(aa.RegionalAttention()),
            lay_out=lambda prompt: aa.Critique(request_of(prompt).layout()),
            planner=PLANNER,
            seed=seed,
        )
        return [one.image for one in laid_out]

    return drawer


def phrases(plan: aa.Plan) -> list[str]:
    """What attention is to be had by: color and shape of each thing."""
    return [f"{thing.color} {thing.shape}" for thing in request_of(plan.prompt).things]


SEPEN_RATE = 3e-4
"""Learning rate of `sepen`. Chosen by hand: at 1e-3 and above things are lost that the base model draws."""
LATENT_STEP = 0.1
"""How far latents move along a gradient of norm 1. Chosen by hand: at 0.5 a thing is lost now and then, at 2 most are."""


def guided_by(guide: aa.Guide, bench: Bench) -> Drawer:
    """Plain prompts, with a guide at inference."""
    return partial(plain, bench.guided(guide))


@dataclass(frozen=True)
class FindsWrong(aa.Critic):
    """The detector as critic: a suggestion for every thing that is missing, or is otherwise than it should be."""

    def critique(self, image: Image, prompt: str) -> aa.Critique:
        wrong = wrong_things(image, request_of(prompt))
        return aa.Critique(tuple(aa.Suggestion(box_of(one), f"a {one.color} {one.shape}") for one in wrong))


RIGHT = FunctionScorer(function=lambda image, prompt: Outcome.of(image, request_of(prompt)).right, name="right")
STOP = aa.TurnRule(scorer=RIGHT, enough=1.0, patience=3)


def think(message: str) -> str:
    """The thought of a language model that adds nothing: what a prompt means is plain here."""
    return f"<think>Each thing in its place.</think> {message.splitlines()[1]}"


def reflect(message: str, image: Image) -> str:
    """The reflection of a multimodal model that sees what is wrong, and writes a prompt of the same length that names it first."""
    request = request_of(message.splitlines()[1])
    wrong = wrong_things(image, request)
    if not wrong:
        return "NOTHING TO IMPROVE"
    things = tuple(sorted(request.things, key=lambda one: one not in wrong))
    return f"Not all is right.\nImprovements: {len(wrong)}\nFinal prompt: {replace(request, things=things).prompt}"


def interleaved(turns: int, bench: Bench) -> Drawer:
    """IRG, by the words of the prompt alone."""

    def drawer(asked: Sequence[Request], seed: int) -> list[Image]:
        trajectories = irg(
            [one.prompt for one in asked],
            synthesizer=bench.base,
            think=ChatThought(think),
            reflect=ChatReflection(reflect),
            turns=turns,
            stop=STOP,
            seed=seed,
            progress=False,
        )
        return [trajectory.image for trajectory in trajectories]

    return drawer


def refined(turns: int, bench: Bench) -> Drawer:
    """`refine`, by regions where something is wrong."""

    def drawer(asked: Sequence[Request], seed: int) -> list[Image]:
        trajectories = aa.refine_each(
            [one.prompt for one in asked],
            synthesizer=bench.guided(aa.RegionalAttention()),
            critic=FindsWrong(),
            planner=PLANNER,
            turns=turns,
            stop=STOP,
            seed=seed,
            progress=False,
        )
        return [trajectory.image for trajectory in trajectories]

    return drawer


def checked(turns: int, bench: Bench) -> Drawer:
    """The checklist: every thing is a requirement, and a prompt is drawn anew, by new noise, while one of them fails."""

    def is_right(image: Image, requirement: str) -> float:
        return Outcome.of(image, request_of(requirement)).success

    def drawer(asked: Sequence[Request], seed: int) -> list[Image]:
        ended = checklist(
            [one.prompt for one in asked],
            synthesizer=bench.base,
            requirements=lambda prompt: [f"{thing} at noon" for thing in request_of(prompt).things],
            verify=FunctionScorer(function=is_right, name="is right"),
            turns=turns,
            seed=seed,
            progress=False,
        )
        return [one.image for one in ended]

    return drawer


FAITHFUL = FunctionScorer(
    function=lambda image, prompt: min(
        playground.Accuracy(part).score(image, prompt) for part in ("color", "shape", "place")
    ),
    name="faithful",
)


def learned_by_dreamsync(bench: Bench) -> Drawer:
    """The best of several draws that are right, fine-tuned on, in rounds."""
    result = dreamsync(
        bench.prompts,
        synthesizer=bench.base,
        faithful=aa.Floor(FAITHFUL, at_least=bench.settings.faithful),
        beautiful=aa.Floor(Photometric(), at_least=0.0),
        trainer=bench.trainer,
        candidates=bench.settings.draws,
        rounds=bench.settings.rounds,
        seed=bench.seed,
        progress=False,
    )
    return partial(plain, bench.base.with_lora(result.lora))


def learned_by_artaug(bench: Bench) -> Drawer:
    """The loop with the quickstart's settings: a critic, a regional redraw, the difference."""
    result = aa.enhance(
        bench.prompts,
        synthesizer=bench.guided(aa.RegionalAttention()),
        critic=PhotometricCritic(contrast=0.15),
        planner=aa.GreedyPlanner(max_regions=3),
        keep=aa.Gain(Photometric(), at_least=bench.settings.gain)
        & aa.Gain(FAITHFUL, at_least=min(0.0, bench.settings.gain)),
        trainer=aa.DifferentialLoRATrainer(
            objective=aa.PairedPreference(anchor=0.1),
            rank=8,
            steps=bench.settings.artaug_steps,
            batch_size=32,
            learning_rate=2e-3,
        ),
        rounds=bench.settings.rounds,
        seed=bench.seed,
        progress=False,
    )
    return partial(plain, bench.base.with_lora(result.lora))


def learned_by_rollouts(bench: Bench) -> Drawer:
    """Rewards by what is right and by how it looks, in equal parts; all draws are learned from."""
    reward = FunctionScorer(
        function=lambda image, prompt: (FAITHFUL.score(image, prompt) + Photometric().score(image, prompt)) / 2,
        name="reward",
    )
    result = rollouts(
        bench.prompts,
        synthesizer=bench.base,
        scorer=reward,
        unseen=playground.Accuracy("color"),
        held_out=playground.prompts(2, seed=bench.seed + 1, held_out=True),
        trainer=bench.trainer,
        draws=bench.settings.draws,
        rounds=bench.settings.rounds,
        seed=bench.seed,
        progress=False,
    )
    return partial(plain, bench.base.with_lora(result.lora))


def learned_by_sepen(bench: Bench) -> Drawer:
    """Separate-and-Enhance on many prompts: keys of the text, by attention alone; prompts of one thing stay as they are."""
    things = {prompt: [f"{one.color} {one.shape}" for one in request_of(prompt).things] for prompt in bench.prompts}
    result = sepen(
        {prompt: names for prompt, names in things.items() if len(names) > 1},
        synthesizer=bench.base,
        trainer=replace(bench.trainer, learning_rate=SEPEN_RATE),
        preserved=[prompt for prompt, names in things.items() if len(names) == 1],
        seed=bench.seed,
        progress=False,
    )
    return partial(plain, bench.base.with_lora(result.lora))


def tested_by_sepen(bench: Bench) -> Drawer:
    """Separate-and-Enhance at test time: a training for every prompt, with the LoRA of which it is drawn."""

    def drawn(one: Request, own: int) -> Image:
        result = sepen(
            {one.prompt: phrases(aa.Plan(one.prompt))},
            synthesizer=bench.base,
            trainer=replace(
                bench.trainer,
                steps=max(1, bench.settings.training_steps // 3),
                batch_size=4,
                learning_rate=SEPEN_RATE,
            ),
            seed=own,
            progress=False,
        )
        return draw(bench.base.with_lora(result.lora), [aa.Plan(one.prompt)], seeds=[own])[0]

    return lambda asked, seed: [
        drawn(one, own) for one, own in zip(asked, picture_seeds(seed, len(asked)), strict=True)
    ]


@dataclass(frozen=True)
class Arm:
    """A system, and what a row of it is measured with: rows of an arm whose words have changed are measured again."""

    system: System
    words: str
    learns: bool = field(default=False)


ARMS: Mapping[str, Arm] = {
    BASE: Arm(lambda bench: partial(plain, bench.base), "plain prompts"),
    "regional planning": Arm(regional, f"{PLANNER}, RegionalAttention"),
    "Attend-and-Excite": Arm(
        partial(guided_by, AttendAndExcite(phrases=phrases, step_size=LATENT_STEP, normalize="norm")),
        f"gradient of norm 1, step {LATENT_STEP}",
    ),
    "A-STAR": Arm(
        partial(guided_by, AStar(phrases=phrases, step_size=LATENT_STEP, normalize="norm")),
        f"gradient of norm 1, step {LATENT_STEP}",
    ),
    **{f"IRG, {turns} turns": Arm(partial(interleaved, turns), "what is wrong comes first") for turns in (1, 2, 3)},
    "refine, 3 turns": Arm(partial(refined, 3), f"regions where wrong, {PLANNER}"),
    "checklist, 4 turns": Arm(partial(checked, 4), "new noise"),
    "SepEn, a prompt at a time": Arm(tested_by_sepen, f"keys of text, a third of the steps, {SEPEN_RATE}"),
    "SepEn, many prompts": Arm(learned_by_sepen, f"keys of text, {SEPEN_RATE}", learns=True),
    "DreamSync": Arm(learned_by_dreamsync, "faithful, then Photometric", learns=True),
    "ArtAug": Arm(
        learned_by_artaug, "PhotometricCritic, Gain 0.02 and faithful, the quickstart's trainer", learns=True
    ),
    "rollouts": Arm(learned_by_rollouts, "faithful and Photometric", learns=True),
}
