"""What `benchmarks.outside` measures of a candidate's pictures: our scorers, and judges that are not ours beside them."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from PIL.Image import Image

from artaug import playground
from artaug.playground.rendering import SIZE_PX
from artaug.playground.world import ADJECTIVES, COLORS, PLACES, SHAPES, Thing
from artaug.scorers import Photometric
from benchmarks._ablation_evaluation import Draw, draw_in_chunks
from benchmarks._outside_judges import Array, Brisque, EfficientNetLite0, LinearProbe, cosine, frechet_distance
from benchmarks.objectives import NEEDS_NOTHING, mean_squared_change

Measures = Mapping[str, Array]
"""Of each measure one number a prompt."""
SIZE_OF_NETWORK_PX = 128
"""Two of its pixels are one of the playground's: at 224 the probe is right a percent more often, for four times the time."""

_CROP_PX = 28
_STEP_PX = 19
_HEIGHT_PX = 42


@dataclass(frozen=True)
class SceneProbe:
    """Two linear probes that read color and shape from the part of a picture where a prompt places a thing."""

    network: EfficientNetLite0
    color: LinearProbe
    shape: LinearProbe

    @classmethod
    def fit(cls, network: EfficientNetLite0, *, scenes: int, seed: int = 0) -> "SceneProbe":
        """Fit on rendered scenes, with every mixture of the words that improve a picture."""
        prompts, images = rendered(scenes, seed=seed)
        things = [thing for prompt in prompts for thing in playground.parse(prompt).things]
        features = network.all_features(_crops(images, prompts))
        return cls(
            network,
            LinearProbe.fit(features, [COLORS.index(thing.color) for thing in things], classes=len(COLORS)),
            LinearProbe.fit(features, [SHAPES.index(thing.shape) for thing in things], classes=len(SHAPES)),
        )

    def read(self, images: Sequence[Image], prompts: Sequence[str]) -> Mapping[str, tuple[Array, Array]]:
        """Of color and shape: the probability of what the prompt asks for, and whether it is the likeliest; one a thing."""
        things = [thing for prompt in prompts for thing in playground.parse(prompt).things]
        features = self.network.all_features(_crops(images, prompts))
        asked = {
            "color": (self.color, [COLORS.index(thing.color) for thing in things]),
            "shape": (self.shape, [SHAPES.index(thing.shape) for thing in things]),
        }
        result: dict[str, tuple[Array, Array]] = {}
        for name, (probe, labels) in asked.items():
            probabilities = probe.probabilities(features)
            right = (probabilities.argmax(1) == labels).astype(np.float64)
            result[name] = probabilities[np.arange(len(labels)), labels], right
        return result

    def check(self, *, scenes: int, seed: int = 1) -> Mapping[str, float]:
        """How good the probe is on rendered scenes of combinations that it has not seen: accuracy and mean probability."""
        prompts, images = rendered(scenes, seed=seed, held_out=True)
        columns: dict[str, float] = {}
        for name, (probability, right) in self.read(images, prompts).items():
            columns |= {f"{name} accuracy": float(right.mean()), f"{name} confidence": float(probability.mean())}
        return columns | {"things": float(sum(len(playground.parse(prompt).things) for prompt in prompts))}


def rendered(count: int, *, seed: int, held_out: bool = False) -> tuple[list[str], list[Image]]:
    """Rendered scenes, each with any of the four words, and their prompts."""
    rng = random.Random(seed)
    prompts = [
        ", ".join([prompt, *(word for word in ADJECTIVES if rng.random() < 0.5)])
        for prompt in playground.prompts(count, seed=seed, held_out=held_out)
    ]
    return prompts, [playground.render(prompt, seed=10_000 * seed + index) for index, prompt in enumerate(prompts)]


def _crops(images: Sequence[Image], prompts: Sequence[str]) -> list[Image]:
    """The part of the picture around every thing's place, in the order of the prompts."""
    return [
        image.crop(_place_px(thing))
        for image, prompt in zip(images, prompts, strict=True)
        for thing in playground.parse(prompt).things
    ]


def _place_px(thing: Thing) -> tuple[int, int, int, int]:
    if thing.place is None:
        raise ValueError(f"the prompt has {thing} without a place. Give every thing one, as playground.prompts does.")
    center, half = SIZE_PX // 2 + (PLACES.index(thing.place) - 1) * _STEP_PX, _CROP_PX // 2
    return center - half, _HEIGHT_PX - half, center + half, _HEIGHT_PX + half


@dataclass(frozen=True)
class DrawnPictures:
    """A candidate's pictures of the held-out prompts."""

    plain: Sequence[Image]
    fine: Sequence[Image]
    """Of the same prompts with every word that improves a picture: they need no change."""


@dataclass(frozen=True)
class Exam:
    """The held-out prompts, the judges, and the base model to compare with."""

    prompts: Sequence[str]
    base: Draw
    network: EfficientNetLite0
    probe: SceneProbe
    brisque: Brisque

    def draw(self, draw: Draw, *, first_seed: int = 0) -> DrawnPictures:
        """All pictures of a candidate. The same seeds have the same noise for every candidate."""
        seeds = range(first_seed, first_seed + len(self.prompts))
        fine = [prompt + NEEDS_NOTHING for prompt in self.prompts]
        return DrawnPictures(draw_in_chunks(draw, self.prompts, seeds), draw_in_chunks(draw, fine, seeds))

    @cached_property
    def before(self) -> DrawnPictures:
        """The base's pictures."""
        return self.draw(self.base)

    def measure(self, drawn: DrawnPictures) -> tuple[Measures, Mapping[str, float]]:
        """Measures of each prompt, all of them changes from the base; and distances of whole sets.

        Ours: ``gain`` is the rise of the photometric scorers, ``color`` and ``shape`` that of the share of things that the
        playground's detector finds right, ``drift`` the mean squared change of a picture that needed none.

        Not ours: ``toward`` is how much nearer a picture comes, by the cosine of EfficientNet's features, to the base's
        picture of the prompt with every word that improves it; ``probe color`` and ``probe shape`` are the rise of the
        probability of what the prompt asks for; ``content`` is 1 less the cosine of a picture that needed no change with
        the base's; ``brisque`` is the fall of BRISQUE, which is lower for better pictures. ``frechet`` is the distance of
        the pictures that needed no change to the base's, ``nearer to rendered`` the fall of the others' distance to scenes
        rendered with those words.
        """
        before, plain, fine = self._judged_before, self._judge(drawn.plain), self.network.features(drawn.fine)
        measures = {name: plain.numbers[name] - before.numbers[name] for name in plain.numbers}
        measures["toward"] = cosine(plain.features, self._goal) - cosine(before.features, self._goal)
        pairs = zip(self.before.fine, drawn.fine, strict=True)
        measures["drift"] = np.array([mean_squared_change([old], [new]) for old, new in pairs])
        measures["content"] = 1 - cosine(fine, self._goal)
        distances = {
            "frechet": frechet_distance(fine, self._goal),
            "nearer to rendered": frechet_distance(before.features, self._rendered)
            - frechet_distance(plain.features, self._rendered),
        }
        return measures, distances

    def agreement_of_probe(self) -> Mapping[str, float]:
        """The share of the base's pictures of which the probe and the playground's detector say the same."""
        read = self.probe.read(self.before.plain, self.prompts)
        result: dict[str, float] = {}
        for name in ("color", "shape"):
            ours = np.array(_accuracy(name, self.before.plain, self.prompts)) == 1
            theirs = _by_prompt(read[name][1], self.prompts) == 1
            result[f"{name} agreement"] = float((ours == theirs).mean())
        return result

    @cached_property
    def _judged_before(self) -> "_Judged":
        return self._judge(self.before.plain)

    @cached_property
    def _goal(self) -> Array:
        return self.network.features(self.before.fine)

    @cached_property
    def _rendered(self) -> Array:
        scenes = [playground.render(prompt + NEEDS_NOTHING, seed=seed) for seed, prompt in enumerate(self.prompts)]
        return self.network.features(scenes)

    def _judge(self, images: Sequence[Image]) -> "_Judged":
        read = self.probe.read(images, self.prompts)
        numbers = {
            "gain": np.array(Photometric().score_batch(images, self.prompts)),
            **{name: np.array(_accuracy(name, images, self.prompts)) for name in ("color", "shape")},
            **{f"probe {name}": _by_prompt(read[name][0], self.prompts) for name in ("color", "shape")},
            "brisque": -self.brisque.scores(images),
        }
        return _Judged(numbers, self.network.features(images))


@dataclass(frozen=True)
class _Judged:
    numbers: Measures
    features: Array


def _accuracy(name: str, images: Sequence[Image], prompts: Sequence[str]) -> Sequence[float]:
    scorer = playground.Accuracy("color") if name == "color" else playground.Accuracy("shape")
    return scorer.score_batch(images, prompts)


def _by_prompt(things: Array, prompts: Sequence[str]) -> Array:
    """The mean of a prompt's things."""
    counts = [len(playground.parse(prompt).things) for prompt in prompts]
    return np.array([part.mean() for part in np.split(things, np.cumsum(counts)[:-1])])
