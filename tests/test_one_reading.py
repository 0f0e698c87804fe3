"""One picture, one reading: every part sees of a picture of any mode what every other part sees."""

import numpy as np
import pytest
import torch
from PIL import Image

import artaug as aa
from artaug._internal.images import as_rgb
from artaug.critics import PhotometricCritic
from artaug.diffusion import DiffusersSynthesizer
from artaug.drawing import draw_boxes
from artaug.images.html import contact_sheet, encode_image
from artaug.images.similarity import StructuralSimilarity
from artaug.pairs import pair_digest
from artaug.scorers import Chroma, Exposure
from artaug.training.batches import EncodedPairs
from support.tiny_flux import TINY_SIZE, tiny_flux

MODES = ["1", "L", "LA", "La", "P", "PA", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "I;16", "P, transparent"]


@pytest.fixture(params=MODES)
def picture(request):
    """A picture with colors behind its transparent pixels, in a mode that keeps what it can of them."""
    levels = np.random.default_rng(0).integers(0, 256, (TINY_SIZE, TINY_SIZE, 4), dtype=np.uint8)
    levels[..., 3] = 255 * (levels[..., 3] > 127)
    rgba = Image.fromarray(levels)
    mode = request.param
    if mode == "I;16":
        return Image.fromarray(levels[..., 0].astype(np.uint16) * 257)
    if mode == "P, transparent":
        palette = rgba.convert("RGB").quantize(16)
        palette.info["transparency"] = 3
        return palette
    via = {"La": "LA", "RGBa": "RGBA", "PA": "P", "HSV": "RGB", "YCbCr": "RGB", "CMYK": "RGB"}.get(mode)
    return rgba.convert(via).convert(mode) if via else rgba.convert(mode)


@pytest.fixture(scope="module")
def synthesizer():
    return DiffusersSynthesizer(pipeline=tiny_flux(), width=TINY_SIZE, height=TINY_SIZE, max_sequence_length=24)


def pair_of(image):
    return aa.ImagePair.unchanged(image, prompt="a cone", seed=0)


def test_critics_scorers_and_measures_see_the_same_picture(picture):
    rgb = as_rgb(picture)
    for see in (
        lambda image: PhotometricCritic().critique(image, "a cone"),
        lambda image: Exposure().score(image, "a cone"),
        lambda image: Chroma().score(image, "a cone"),
        lambda image: StructuralSimilarity(side_px=16).compare(image, Image.linear_gradient("L").resize(image.size)),
        lambda image: pair_digest(pair_of(image)),
    ):
        assert see(picture) == see(rgb)


def test_pages_and_drawings_show_the_same_picture(picture):
    rgb = as_rgb(picture)
    plan = aa.Plan("a cone", (aa.Region(aa.Box(0, 0, 0.5, 1), "red"),))
    for show in (
        encode_image,
        lambda image: draw_boxes(image, [aa.Box(0, 0, 0.5, 1)]).tobytes(),
        lambda image: contact_sheet([image]).tobytes(),
        lambda image: plan.preview(image).tobytes(),
    ):
        assert show(picture) == show(rgb)


def test_a_training_learns_from_the_same_picture(picture, synthesizer):
    with synthesizer.training() as model:
        sized = model.at_size(*picture.size)
        encoded = [
            EncodedPairs.encode(sized, [pair_of(image)], micro_batch_size=1) for image in (picture, as_rgb(picture))
        ]
        latents = [item.buckets[0].pairs[0].load()["before"] for item in encoded]
        assert torch.equal(latents[0], latents[1])
        assert torch.equal(sized.encode_images([picture]), sized.encode_images([as_rgb(picture)]))
