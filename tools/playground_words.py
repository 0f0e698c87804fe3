"""Pretrain the word encoder on captions alone, as FLUX's T5 is pretrained on text.

From its state at the word of a place, a linear layer has to read colour, shape and adjectives of the thing there.
"""

import copy
import logging
import random

import torch
from diffusers import FluxPipeline
from torch import Tensor, nn
from torch.nn import functional

from artaug.playground.world import ADJECTIVES, COLORS, PLACES, SHAPES, Scene
from playground_data import training_caption, training_scene
from playground_pipeline import position_biases, tokenize
from playground_workers import learning_rate

_logger = logging.getLogger("playground.words")
_PARTS = (len(COLORS), len(SHAPES), len(ADJECTIVES))


def train_words(pipeline: FluxPipeline, *, steps: int, seed: int, anchored: bool = False) -> None:
    """Train `pipeline.text_encoder_2` in place.

    Args:
        pipeline: Whose word encoder and tokenizer.
        steps: Batches of 64 captions.
        seed: Decides the captions.
        anchored: Stay close to the encoder's present output, for a transformer that was trained on it.
    """
    encoder, probe = pipeline.text_encoder_2, nn.Linear(pipeline.text_encoder_2.config.d_model, sum(_PARTS))
    positions = list(position_biases(encoder))
    others = [p for p in (*encoder.parameters(), *probe.parameters()) if p is not positions[0]]
    optimizer = torch.optim.AdamW([{"params": others, "lr_scale": 1.0}, {"params": positions, "lr_scale": 5.0}])
    rng = random.Random(f"words {seed}")
    places = [pipeline.tokenizer_2.convert_tokens_to_ids(place.split()[-1]) for place in PLACES]
    frozen = copy.deepcopy(encoder)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = group["lr_scale"] * learning_rate(step, steps=steps, peak=2e-3, warmup=50)
        scenes = [training_scene(rng) for _ in range(64)]
        captions = [training_caption(scene, rng) for scene in scenes]
        words, _ = tokenize(pipeline, captions, captions)
        states = encoder(words)[0]
        loss, accuracy = _probe_loss(probe, states, words, scenes, places)
        if anchored:
            with torch.no_grad():
                frozen_states = frozen(words)[0]
            loss = loss + (states - frozen_states).square().mean() / frozen_states.square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 0 or step == steps - 1:
            _logger.info("step %d, loss %.3f, color accuracy %.3f", step, float(loss.detach()), accuracy)


def _probe_loss(
    probe: nn.Linear, states: Tensor, words: Tensor, scenes: list[Scene], places: list[int]
) -> tuple[Tensor, float]:
    place_states, colors, shapes, adjectives = [], [], [], []
    for row, scene in enumerate(scenes):
        for thing in scene.things:
            positions = (words[row] == places[PLACES.index(thing.place)]).nonzero() if thing.place else words[:0]
            if len(positions):
                place_states.append(states[row, int(positions[0, 0])])
                colors.append(COLORS.index(thing.color))
                shapes.append(SHAPES.index(thing.shape))
                present = {*thing.adjectives, *scene.adjectives}
                adjectives.append([float(adjective in present) for adjective in ADJECTIVES])
    color, shape, adjective = probe(torch.stack(place_states)).split(_PARTS, dim=1)
    target = torch.tensor(colors)
    loss = functional.cross_entropy(color, target) + functional.cross_entropy(shape, torch.tensor(shapes))
    loss = loss + functional.binary_cross_entropy_with_logits(adjective, torch.tensor(adjectives))
    return loss, float((color.argmax(dim=1) == target).float().mean())
