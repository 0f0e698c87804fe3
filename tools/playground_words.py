"""Teach the word encoder which words belong together, before any picture: FLUX's T5 has learned to read, too.

Where a place is named, colour, shape and adjectives of the thing that stands there must be readable.
"""

import copy
import logging
import random

import torch
from diffusers import FluxPipeline
from torch import Tensor, nn
from torch.nn import functional

from artaug.playground.world import ADJECTIVES, COLORS, PLACES, SHAPES, Scene
from playground_data import told, training_scene
from playground_pipeline import tokens, word_positions
from playground_workers import learning_rate

_logger = logging.getLogger("playground.words")
_PARTS = (len(COLORS), len(SHAPES), len(ADJECTIVES))


def train_words(pipeline: FluxPipeline, *, steps: int, seed: int, anchored: bool = False) -> None:
    """Train `pipeline.text_encoder_2` in place.

    Args:
        pipeline: Whose word encoder and tokenizer.
        steps: Batches of 64 captions.
        seed: Decides the captions.
        anchored: Keep close to what the encoder says now, for the sake of a transformer that reads it.
    """
    encoder, reader = pipeline.text_encoder_2, nn.Linear(pipeline.text_encoder_2.config.d_model, sum(_PARTS))
    positions = list(word_positions(encoder))
    others = [p for p in (*encoder.parameters(), *reader.parameters()) if p is not positions[0]]
    optimizer = torch.optim.AdamW([{"params": others, "haste": 1.0}, {"params": positions, "haste": 5.0}])
    chooser = random.Random(f"words {seed}")
    places = [pipeline.tokenizer_2.convert_tokens_to_ids(place.split()[-1]) for place in PLACES]
    before = copy.deepcopy(encoder)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = group["haste"] * learning_rate(step, steps=steps, peak=2e-3, warmup=50)
        scenes = [training_scene(chooser) for _ in range(64)]
        captions = [told(scene, chooser) for scene in scenes]
        words, _ = tokens(pipeline, captions, captions)
        states = encoder(words)[0]
        loss, right = _reading(reader, states, words, scenes, places)
        if anchored:
            with torch.no_grad():
                old = before(words)[0]
            loss = loss + (states - old).square().mean() / old.square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 0 or step == steps - 1:
            _logger.info("step %d, loss %.3f, colours read right %.3f", step, float(loss.detach()), right)


def _reading(
    reader: nn.Linear, states: Tensor, words: Tensor, scenes: list[Scene], places: list[int]
) -> tuple[Tensor, float]:
    found, colors, shapes, adjectives = [], [], [], []
    for row, scene in enumerate(scenes):
        for thing in scene.things:
            where = (words[row] == places[PLACES.index(thing.place)]).nonzero() if thing.place else words[:0]
            if len(where):
                found.append(states[row, int(where[0, 0])])
                colors.append(COLORS.index(thing.color))
                shapes.append(SHAPES.index(thing.shape))
                said = {*thing.adjectives, *scene.adjectives}
                adjectives.append([float(adjective in said) for adjective in ADJECTIVES])
    color, shape, adjective = reader(torch.stack(found)).split(_PARTS, dim=1)
    target = torch.tensor(colors)
    loss = functional.cross_entropy(color, target) + functional.cross_entropy(shape, torch.tensor(shapes))
    loss = loss + functional.binary_cross_entropy_with_logits(adjective, torch.tensor(adjectives))
    return loss, float((color.argmax(dim=1) == target).float().mean())
