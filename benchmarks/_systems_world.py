"""The prompts of `benchmarks.systems`, two or three things each, and what a picture of one shows of it."""

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass

from PIL.Image import Image

import artaug as aa
from artaug import playground
from artaug.playground.detection import DetectedThing
from artaug.playground.world import COLORS, PLACES, SETTINGS, SHAPES, Place, Thing
from artaug.scorers import Photometric

COLUMN: dict[Place, float] = {place: number / len(PLACES) for number, place in enumerate(PLACES)}
"""Where a place begins, as a part of the picture's width."""
_AESTHETICS = Photometric()


@dataclass(frozen=True)
class Request:
    """A prompt, and the things that it asks for, each with a place of its own and all of different colors and shapes."""

    things: tuple[Thing, ...]
    setting: str

    @property
    def prompt(self) -> str:
        """The text. The playground's model has never seen one of three things."""
        return f"{' and '.join(map(str, self.things))} {self.setting}"

    def layout(self) -> tuple[aa.Suggestion, ...]:
        """Every thing in its place."""
        return tuple(aa.Suggestion(box_of(thing), _words(thing)) for thing in self.things)


def requests(count: int, *, things: int, seed: int) -> list[Request]:
    """Different requests of so many things, the same for the same seed."""
    rng = random.Random(f"{seed} {things}")
    found: dict[Request, None] = {}
    while len(found) < count:
        places = sorted(rng.sample(PLACES, things), key=PLACES.index)
        drawn = zip(rng.sample(COLORS, things), rng.sample(SHAPES, things), places, strict=True)
        asked = tuple(Thing(color=color, shape=shape, place=place) for color, shape, place in drawn)
        found[Request(asked, rng.choice(SETTINGS))] = None
    return list(found)


def request_of(prompt: str) -> Request:
    """What a prompt of `requests`, or one of the playground whose things all have places, asks for.

    >>> from benchmarks._systems_world import request_of
    >>> [thing.color for thing in request_of("a red cone on the left and a blue ball on the right at night").things]
    ['red', 'blue']
    """
    head = next(prompt.removesuffix(f" {setting}") for setting in SETTINGS if prompt.endswith(setting))
    things = tuple(playground.parse(text).things[0] for text in head.split(" and "))
    return Request(things, prompt.removeprefix(head).strip())


def box_of(thing: Thing) -> aa.Box:
    """The column of a thing's place."""
    left = COLUMN[thing.place or PLACES[1]]
    return aa.Box(left, 0, min(left + 1 / len(PLACES), 1), 1)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a picture shows of a request."""

    success: float
    """1 if all things are there, with their colors and shapes, in their places."""
    swapped: float
    """1 if a thing in its place has the color of another thing of the request, and not its own."""
    dropped: float
    """The part of the things for which the picture has none."""
    right: float
    """The part of all colors, shapes and places that are right."""
    aesthetics: float
    """`Photometric`: exposure, chroma, contrast and sharpness."""

    @classmethod
    def of(cls, image: Image, request: Request) -> "Outcome":
        """Judge a picture."""
        found = playground.detect(image)
        matched = _matched(request.things, found)
        right = [sum(_agreements(thing, one)) for thing, one in zip(request.things, matched, strict=True)]
        colors = {thing.color for thing in request.things}
        swapped = any(
            one is not None and one.place == thing.place and one.color != thing.color and one.color in colors
            for thing, one in zip(request.things, matched, strict=True)
        )
        count = len(request.things)
        return cls(
            success=float(right == [3] * count),
            swapped=float(swapped),
            dropped=max(0, count - len(found)) / count,
            right=sum(right) / (3 * count),
            aesthetics=_AESTHETICS.score(image, request.prompt),
        )


def wrong_things(image: Image, request: Request) -> list[Thing]:
    """The things of a request that a picture lacks, or has otherwise."""
    matched = _matched(request.things, playground.detect(image))
    return [thing for thing, one in zip(request.things, matched, strict=True) if not all(_agreements(thing, one))]


def _matched(things: Sequence[Thing], found: Sequence[DetectedThing]) -> list[DetectedThing | None]:
    """A different detected thing for each thing, or none, so that as much as possible is right."""
    candidates = [*found, *[None] * len(things)]
    return list(
        max(
            itertools.permutations(candidates, len(things)),
            key=lambda match: sum(sum(_agreements(thing, one)) for thing, one in zip(things, match, strict=True)),
        )
    )


def _agreements(thing: Thing, found: DetectedThing | None) -> tuple[bool, bool, bool]:
    if found is None:
        return False, False, False
    return found.color == thing.color, found.shape == thing.shape, found.place == thing.place


def _words(thing: Thing) -> str:
    """A thing without its place, for a region that is its place."""
    return f"a{'n' * (thing.color[0] in 'aeiou')} {thing.color} {thing.shape}"
