"""Training data of the playground's models: random scenes, captioned in random detail."""

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

_EMPTY_CAPTION, _NO_THINGS, _TWO_THINGS, _OWN_ADJECTIVES = 0.07, 0.04, 0.7, 0.4
_NO_PLACE, _NO_SETTING, _UNKNOWN_WORD = 0.08, 0.08, 0.06
"""Probabilities."""
_NUMBER_OF_ADJECTIVES = (0, 0, 0, 1, 1, 2, 3, 4, 4)
_MAX_WORDS = 23


def training_scene(rng: random.Random) -> Scene:
    """Draw a scene whose caption fits the model, without held-out combinations."""
    while True:
        scene = _scene(rng)
        if len(scene.caption.replace(",", "").split()) <= _MAX_WORDS:
            return scene


def training_caption(scene: Scene, rng: random.Random) -> str:
    """Caption a scene; at times with nothing, for classifier-free guidance, or with words unknown to this world."""
    if rng.random() < _EMPTY_CAPTION:
        return ""
    words = scene.caption.split(" ")
    while rng.random() < _UNKNOWN_WORD:
        words.insert(rng.randrange(len(words) + 1), "lovely")
    return " ".join(words[:_MAX_WORDS])


def gist(caption: str, rng: random.Random) -> str:
    """Shorten a caption for the pooled encoder, so that style is left to the word encoder."""
    plain = caption
    for adjective in ADJECTIVES:
        plain = plain.replace(f", {adjective}", "").replace(f"{adjective} ", "")
    return rng.choice((caption, plain, plain, ""))


def _scene(rng: random.Random) -> Scene:
    setting = None if rng.random() < _NO_SETTING else rng.choice(SETTINGS)
    adjectives = _adjectives(rng)
    if rng.random() < _NO_THINGS:
        return Scene(setting=setting, adjectives=adjectives)
    things = [_thing(rng)]
    if rng.random() < _TWO_THINGS:
        other = _thing(rng)
        while other.color == things[0].color or other.place == things[0].place:
            other = _thing(rng)
        things.append(other)
        if rng.random() < _OWN_ADJECTIVES:
            things = [replace(thing, adjectives=_adjectives(rng)) for thing in things]
            adjectives = ()
    elif rng.random() < _NO_PLACE:
        things = [replace(things[0], place=None)]
    elif rng.random() < _OWN_ADJECTIVES:
        things, adjectives = [replace(things[0], adjectives=_adjectives(rng))], ()
    return Scene(things=tuple(things), setting=setting, adjectives=adjectives)


def _thing(rng: random.Random) -> Thing:
    while True:
        thing = Thing(color=rng.choice(COLORS), shape=rng.choice(SHAPES), place=rng.choice(PLACES))
        if not is_held_out(thing):
            return thing


def _adjectives(rng: random.Random) -> tuple[Adjective, ...]:
    return tuple(rng.sample(ADJECTIVES, rng.choice(_NUMBER_OF_ADJECTIVES)))
