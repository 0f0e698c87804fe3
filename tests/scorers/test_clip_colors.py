import numpy as np
import pytest
import torch
from PIL import Image

import artaug as aa
from artaug.evaluation.suites import Case, Clause, Detection, Detector, ObjectCheck, ObjectScore, Suite
from artaug.scorers import ClipColors, DualEncoder
from support.tiny_scorers import tiny_clip

GENERATOR = np.random.default_rng(0)
PICTURE = Image.fromarray(GENERATOR.integers(0, 256, (60, 80, 3), dtype=np.uint8))


def colours(seed=0, **options):
    model, images, words = tiny_clip(seed=seed)
    return ClipColors(encoder=DualEncoder(model=model, image_processor=images, tokenizer=words), **options)


def mask():
    there = np.zeros((60, 80), dtype=np.uint8)
    there[10:30, 20:60] = 255
    return Image.fromarray(there)


FOUND = [
    Detection(label="cup", box=aa.Box(0, 0, 0.5, 0.5)),
    Detection(label="bus", box=aa.Box(0.25, 0.25, 1, 1), mask=mask()),
    Detection(label="car", box=aa.Box(0.1, 0.3, 0.6, 0.9)),
]


def published(namer, image, one):
    """Zero-shot classification as in GenEval: text vectors averaged over templates, the crop on grey."""
    picture = image if one.mask is None else Image.composite(image, Image.new("RGB", image.size, "#999"), one.mask)
    left, top, right, bottom = (
        round(part) for part in (one.box.left * 80, one.box.top * 60, one.box.right * 80, one.box.bottom * 60)
    )
    seen = namer.encoder.embed_images([picture.crop((left, top, right, bottom))])[0]
    scores = {}
    for colour in namer.colours:
        texts = [
            f"a photo of a {colour} {one.label}",
            f"a photo of a {colour}-colored {one.label}",
            f"a photo of a {colour} object",
        ]
        mean = sum(namer.encoder.embed_texts([text])[0] for text in texts) / 3
        scores[colour] = float(mean / mean.norm() @ seen)
    return max(scores, key=scores.get)


@pytest.mark.filterwarnings("ignore: reads 32 tokens")
@pytest.mark.parametrize("seed", range(5))
def test_colours_are_those_of_the_published_rule(seed):
    namer = colours(seed)
    assert namer(PICTURE, FOUND) == [published(namer, PICTURE, one) for one in FOUND]


def test_what_the_mask_leaves_out_is_grey():
    class Noting:
        def embed_images(self, images):
            self.shown = images
            return torch.ones(len(images), 1)

        def embed_texts(self, texts):
            return torch.ones(len(texts), 1)

    noting = Noting()
    ClipColors(encoder=noting)(PICTURE, FOUND[:2])
    whole, cut = noting.shown
    assert whole.tobytes() == PICTURE.crop((0, 0, 40, 30)).tobytes()
    assert cut.size == (60, 45)
    assert cut.getpixel((59, 44)) == (0x99, 0x99, 0x99)
    assert cut.getpixel((0, 0)) == PICTURE.getpixel((20, 15))


def test_nothing_has_no_colour():
    assert colours()(PICTURE, []) == []


@pytest.mark.filterwarnings("ignore: reads 32 tokens")
def test_it_serves_an_object_score():
    class Sure(Detector):
        def detect(self, image, labels):
            return FOUND

    namer = colours()
    colour = namer(PICTURE, FOUND[:1])[0]
    other = next(one for one in namer.colours if one != colour)
    suite = Suite("mine", tuple(Case(f"a {one} cup", ObjectCheck((Clause("cup", 1, one),))) for one in (colour, other)))
    judge = ObjectScore(suite=suite, detector=Sure(), colours=namer)
    assert judge.score_batch([PICTURE] * 2, [*suite.prompts]) == [1.0, 0.0]


def test_what_cannot_be_named_is_refused():
    with pytest.raises(aa.InvalidValueError, match="need two or more, all different"):
        colours(colours=("red",))
    with pytest.raises(aa.InvalidValueError, match="need two or more, all different"):
        colours(colours=("red", "red"))
    with pytest.raises(aa.InvalidValueError, match=r"the mask of cup is \(8, 8\), in a picture of \(80, 60\)"):
        colours()(PICTURE, [Detection(label="cup", box=aa.Box(0, 0, 1, 1), mask=Image.new("L", (8, 8)))])
