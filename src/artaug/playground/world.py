"""A tiny world of captioned scenes: coloured things at places, in a setting.

There are no pictures here: `artaug.playground.rendering` draws a scene, `artaug.playground.detection` reads one back.
"""

import itertools
import random
import re
from dataclasses import dataclass, replace
from typing import Literal, cast, get_args

from artaug._internal.annotations import checked
from artaug.errors import ArtAugError

Color = Literal["red", "orange", "yellow", "green", "blue", "purple"]
Shape = Literal["ball", "cube", "cone", "ring"]
Place = Literal["on the left", "in the middle", "on the right"]
Setting = Literal["at noon", "at sunset", "at night", "in the snow"]
Adjective = Literal["vivid", "softly lit", "sharp", "glowing"]

COLORS: tuple[Color, ...] = get_args(Color)
SHAPES: tuple[Shape, ...] = get_args(Shape)
PLACES: tuple[Place, ...] = get_args(Place)
SETTINGS: tuple[Setting, ...] = get_args(Setting)
ADJECTIVES: tuple[Adjective, ...] = get_args(Adjective)

_MOST_THINGS = 2
_SINGLE_SHARE = 0.6
_TRIES = 200

_ADJECTIVE = "|".join(ADJECTIVES)
_THING = re.compile(
    rf"an? (?P<adjectives>(?:(?:{_ADJECTIVE}) )*)(?P<color>{'|'.join(COLORS)}) (?P<shape>{'|'.join(SHAPES)})"
    rf"(?: (?P<place>{'|'.join(PLACES)}))?",
)
_SETTING = re.compile(rf"(?:^|(?<= ))(?:{'|'.join(SETTINGS)})$")


class CaptionError(ArtAugError, ValueError):
    """A caption, or a scene, that this little world does not contain.

    Attributes:
        caption: The caption that could not be read.
    """

    def __init__(self, message: str, *, caption: str) -> None:
        """Keep the caption beside the message."""
        super().__init__(message)
        self.caption = caption


@checked
@dataclass(frozen=True, kw_only=True)
class Thing:
    """One object: its colour and shape, its place, and the adjectives that improve how it is drawn."""

    color: Color
    shape: Shape
    place: Place | None = None
    """None leaves the choice to the renderer or the model."""
    adjectives: tuple[Adjective, ...] = ()
    """Adjectives that improve this thing and its near surroundings only."""

    def __str__(self) -> str:
        """Return the words for it: `a vivid red cone on the left`."""
        words = [*self.adjectives, self.color, self.shape, *([self.place] if self.place else [])]
        article = "an" if words[0][0] in "aeiou" else "a"
        return " ".join([article, *words])


@checked
@dataclass(frozen=True, kw_only=True)
class Scene:
    """A setting with at most two things in it; any part may be left open.

    Raises:
        CaptionError: Three things or more, two things in one place, or an adjective twice.
    """

    things: tuple[Thing, ...] = ()
    setting: Setting | None = None
    adjectives: tuple[Adjective, ...] = ()
    """Adjectives that improve the whole picture."""

    def __post_init__(self) -> None:
        """Refuse what cannot be drawn."""
        places = [thing.place for thing in self.things if thing.place]
        if len(self.things) > _MOST_THINGS:
            raise _caption_error(self.caption, f"holds {len(self.things)} things, at most {_MOST_THINGS} fit")
        if len(set(places)) < len(places):
            raise _caption_error(self.caption, f"puts both things {places[0]}, give them different places")
        for adjectives in (self.adjectives, *(thing.adjectives for thing in self.things)):
            if len(set(adjectives)) < len(adjectives):
                raise _caption_error(self.caption, f"has an adjective twice: {', '.join(adjectives)}")

    @property
    def caption(self) -> str:
        """The words for this scene, which `parse` reads back exactly."""
        things = " and ".join(str(thing) for thing in self.things)
        head = " ".join(part for part in (things, self.setting) if part)
        return ", ".join([*([head] if head else []), *self.adjectives])


@checked
def parse(caption: str) -> Scene:
    """Read a caption; case, spacing and a final full stop do not matter.

    >>> from artaug import playground
    >>> playground.parse("a red cone on the left at night, vivid").things[0].color
    'red'

    Raises:
        CaptionError: The caption is not in the grammar of this world.
    """
    head, *suffixes = [" ".join(part.split()) for part in caption.lower().rstrip(". \n").split(",")]
    if head in ADJECTIVES:
        head, suffixes = "", [head, *suffixes]
    if unknown := [word for word in suffixes if word not in ADJECTIVES]:
        raise _caption_error(caption, f"ends on {unknown[0]!r}, known adjectives are {', '.join(ADJECTIVES)}")
    setting = _SETTING.search(head)
    words = head[: setting.start()].strip() if setting else head
    return Scene(
        things=tuple(_parse_thing(part, caption=caption) for part in words.split(" and ")) if words else (),
        setting=cast("Setting", setting.group()) if setting else None,
        adjectives=tuple(cast("Adjective", word) for word in suffixes),
    )


def is_held_out(thing: Thing) -> bool:
    """Whether this combination of colour, shape and place is left out of training.

    Twelve of the 72 triples are: colour number c with shape c (mod 4) at place c (mod 3), and with
    shape c + 2 at place c + 1. Each colour is in two of them, each shape in three, each place in four.
    """
    if thing.place is None:
        return False
    color, shape, place = COLORS.index(thing.color), SHAPES.index(thing.shape), PLACES.index(thing.place)
    return (shape, place) in {(color % 4, color % 3), ((color + 2) % 4, (color + 1) % 3)}


@checked
def prompts(n: int, *, seed: int, held_out: bool = False) -> list[str]:
    """Draw ``n`` captions without adjectives, distinct as long as there are new ones to find.

    Six in ten ask for one thing, the others for two of different colours.

    Args:
        n: How many.
        seed: Same seed, same captions.
        held_out: Ask for combinations of colour, shape and place that training never showed: every
            thing is one of them. Otherwise no thing is.
    """
    rng = random.Random(seed)
    combinations = (
        Thing(color=color, shape=shape, place=place)
        for color, shape, place in itertools.product(COLORS, SHAPES, PLACES)
    )
    triples = tuple(thing for thing in combinations if is_held_out(thing) == held_out)
    captions: dict[str, None] = {}
    repeats: list[str] = []
    tries = 0
    while len(captions) + len(repeats) < n:
        caption = _draw_scene(triples, rng).caption
        tries = tries + 1 if caption in captions else 0
        if tries > _TRIES:
            repeats.append(caption)
        captions.setdefault(caption)
    return [*captions, *repeats][:n]


def _draw_scene(triples: tuple[Thing, ...], rng: random.Random) -> Scene:
    first = rng.choice(triples)
    things = [first]
    if rng.random() >= _SINGLE_SHARE:
        others = [other for other in triples if other.color != first.color and other.place != first.place]
        things = rng.sample([first, rng.choice(others)], k=2)
    return Scene(things=tuple(things), setting=rng.choice(SETTINGS))


def _parse_thing(words: str, *, caption: str) -> Thing:
    match = _THING.fullmatch(words)
    if match is None:
        raise _caption_error(caption, f"has {words!r} where 'a <colour> <shape> [<place>]' was expected")
    adjectives = re.findall(_ADJECTIVE, match["adjectives"])
    thing = Thing(
        color=cast("Color", match["color"]),
        shape=cast("Shape", match["shape"]),
        adjectives=tuple(cast("Adjective", word) for word in adjectives),
    )
    return replace(thing, place=cast("Place", match["place"])) if match["place"] else thing


def _caption_error(caption: str, why: str) -> CaptionError:
    message = f"this world has no {caption!r}: it {why}. Write captions like 'a red cone on the left at night, vivid'."
    return CaptionError(message, caption=caption)
