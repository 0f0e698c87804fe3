import numpy as np
import pytest
from PIL import Image

import artaug as aa
from artaug.evaluation.suites import Case, Clause, Detection, Detector, ObjectCheck, ObjectScore, Suite
from artaug.scorers import ClipColors, DualEncoder
from support.tiny_scorers import tiny_clip

GENERATOR = np.random.default_rng(0)
PICTURE = Image.fromarray(GENERATOR.integers(0, 256, (60, 80, 3), dtype=np.uint8))


def clip_colors(seed=0, **options):
    model, images, words = tiny_clip(seed=seed)
    return ClipColors(encoder=DualEncoder(model=model, image_processor=images, tokenizer=words), **options)


def mask():
    inside = np.zeros((60, 80), dtype=np.uint8)
    inside[10:30, 20:60] = 255
    return Image.fromarray(inside)


DETECTIONS = [
    Detection(label="cup", box=aa.Box(0, 0, 0.5, 0.5)),
    Detection(label="bus", box=aa.Box(0.25, 0.25, 1, 1), mask=mask()),
    Detection(label="car", box=aa.Box(0.1, 0.3, 0.6, 0.9)),
]


def published(classifier, image, detection):
    """Zero-shot classification as in GenEval: text vectors averaged over templates, the crop on grey."""
    grey = Image.new("RGB", image.size, "#999")
    picture = image if detection.mask is None else Image.composite(image, grey, detection.mask)
    box = detection.box
    left, top, right, bottom = (round(side) for side in (box.left * 80, box.top * 60, box.right * 80, box.bottom * 60))
    crop = classifier.encoder.embed_images([picture.crop((left, top, right, bottom))])[0]
    scores = {}
    for color in classifier.colors:
        texts = [
            f"a photo of a {color} {detection.label}",
            f"a photo of a {color}-colored {detection.label}",
            f"a photo of a {color} object",
        ]
        mean = sum(classifier.encoder.embed_texts([text])[0] for text in texts) / 3
        scores[color] = float(mean / mean.norm() @ crop)
    return max(scores, key=scores.get)


@pytest.mark.filterwarnings("ignore: reads 32 tokens")
@pytest.mark.parametrize("seed", range(5))
def test_colors_are_those_of_the_published_rule(seed):
    classifier = clip_colors(seed)
    assert classifier(PICTURE, DETECTIONS) == [published(classifier, PICTURE, detection) for detection in DETECTIONS]


def test_pixels_outside_the_mask_are_grey(monkeypatch):
    seen, embed_images = [], DualEncoder.embed_images

    def recorded(encoder, images):
        seen.extend(images)
        return embed_images(encoder, images)

    monkeypatch.setattr(DualEncoder, "embed_images", recorded)
    clip_colors()(PICTURE, DETECTIONS[:2])
    unmasked, masked = seen
    assert unmasked.tobytes() == PICTURE.crop((0, 0, 40, 30)).tobytes()
    assert masked.size == (60, 45)
    assert masked.getpixel((59, 44)) == (0x99, 0x99, 0x99)
    assert masked.getpixel((0, 0)) == PICTURE.getpixel((20, 15))


def test_no_detections_have_no_colors():
    assert clip_colors()(PICTURE, []) == []


@pytest.mark.filterwarnings("ignore: reads 32 tokens")
def test_it_names_the_colors_of_an_object_score():
    class Fixed(Detector):
        def detect(self, image, labels):
            return DETECTIONS

    classifier = clip_colors()
    color = classifier(PICTURE, DETECTIONS[:1])[0]
    other = next(name for name in classifier.colors if name != color)
    suite = Suite(
        "mine", tuple(Case(f"a {name} cup", ObjectCheck((Clause("cup", 1, name),))) for name in (color, other))
    )
    scorer = ObjectScore(suite=suite, detector=Fixed(), colors=classifier)
    assert scorer.score_batch([PICTURE] * 2, [*suite.prompts]) == [1.0, 0.0]


def test_too_few_colors_and_a_mask_of_another_size_are_refused():
    with pytest.raises(aa.InvalidValueError, match="need two or more, all different"):
        clip_colors(colors=("red",))
    with pytest.raises(aa.InvalidValueError, match="need two or more, all different"):
        clip_colors(colors=("red", "red"))
    with pytest.raises(aa.InvalidValueError, match=r"the mask of cup is \(8, 8\), in a picture of \(80, 60\)"):
        clip_colors()(PICTURE, [Detection(label="cup", box=aa.Box(0, 0, 1, 1), mask=Image.new("L", (8, 8)))])
