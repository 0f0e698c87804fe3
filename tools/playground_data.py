"""What the playground's models are trained on: random scenes, told in random detail."""

import random
from dataclasses import replace

from artaug.playground.world import (
    ADJECTIVES,
    COLORS,
    PLACES,
    SETTINGS,
    SHAPES,
    Adjective,
    Scene,
    Thing,
    is_held_out,
)

_EMPTY, _BARE, _PAIR, _OWN = 0.07, 0.04, 0.7, 0.4
_UNPLACED, _UNSET, _BABBLE = 0.08, 0.08, 0.06
_NUMBER_OF_ADJECTIVES = (0, 0, 0, 1, 1, 2, 3, 4, 4)
_WORDS = 23


def training_scene(chooser: random.Random) -> Scene:
    """Draw a scene whose caption fits the model, without held-out combinations."""
    while True:
        scene = _scene(chooser)
        if len(scene.caption.replace(",", "").split()) <= _WORDS:
            return scene


def told(scene: Scene, chooser: random.Random) -> str:
    """Caption a scene; now and then say nothing, for guidance to compare with, or words that mean nothing here."""
    if chooser.random() < _EMPTY:
        return ""
    words = scene.caption.split(" ")
    while chooser.random() < _BABBLE:
        words.insert(chooser.randrange(len(words) + 1), "lovely")
    return " ".join(words[:_WORDS])


def gist(caption: str, chooser: random.Random) -> str:
    """Shorten a caption for the pooled encoder, so that style is left to the words themselves."""
    plain = caption
    for adjective in ADJECTIVES:
        plain = plain.replace(f", {adjective}", "").replace(f"{adjective} ", "")
    return chooser.choice((caption, plain, plain, ""))


def _scene(chooser: random.Random) -> Scene:
    setting = None if chooser.random() < _UNSET else chooser.choice(SETTINGS)
    said = _adjectives(chooser)
    if chooser.random() < _BARE:
        return Scene(setting=setting, adjectives=said)
    things = [_thing(chooser)]
    if chooser.random() < _PAIR:
        other = _thing(chooser)
        while other.color == things[0].color or other.place == things[0].place:
            other = _thing(chooser)
        things.append(other)
        if chooser.random() < _OWN:
            things = [replace(thing, adjectives=_adjectives(chooser)) for thing in things]
            said = ()
    elif chooser.random() < _UNPLACED:
        things = [replace(things[0], place=None)]
    elif chooser.random() < _OWN:
        things, said = [replace(things[0], adjectives=_adjectives(chooser))], ()
    return Scene(things=tuple(things), setting=setting, adjectives=said)


def _thing(chooser: random.Random) -> Thing:
    while True:
        thing = Thing(color=chooser.choice(COLORS), shape=chooser.choice(SHAPES), place=chooser.choice(PLACES))
        if not is_held_out(thing):
            return thing


def _adjectives(chooser: random.Random) -> tuple[Adjective, ...]:
    return tuple(chooser.sample(ADJECTIVES, chooser.choice(_NUMBER_OF_ADJECTIVES)))
