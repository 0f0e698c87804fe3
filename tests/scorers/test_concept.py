import pytest
import torch
from PIL import Image

import artaug as aa
from artaug.scorers import ConceptProbability
from artaug.testing import check_scorer
from support.tiny_scorers import saved, tiny_classifier

PICTURES = [Image.linear_gradient("L"), Image.effect_noise((40, 30), 80), Image.new("RGB", (9, 9), "teal")]


def scorer(*classes, batch_size=2):
    model, images = tiny_classifier()
    return ConceptProbability(model=model, image_processor=images, classes=classes, batch_size=batch_size)


def published():
    model, images = tiny_classifier()
    pixels = images([image.convert("RGB") for image in PICTURES], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        return model(pixel_values=pixels).logits.softmax(dim=-1)


def test_the_score_is_the_probability_of_the_class():
    assert scorer("normal").score_batch(PICTURES, [""] * 3) == pytest.approx(published()[:, 0].tolist(), abs=1e-5)


def test_probabilities_of_several_classes_add_up():
    both = scorer("unsafe", "normal").score_batch(PICTURES, [""] * 3)
    assert both == pytest.approx((1 - published()[:, 1]).tolist(), abs=1e-5)
    assert scorer("normal", "drawing", "unsafe").score(PICTURES[0], "") == pytest.approx(1)


def test_it_passes_the_scorer_checks():
    check_scorer(scorer("normal"))


def test_a_saved_checkpoint_scores_as_the_model_did(tmp_path):
    loaded = ConceptProbability.from_pretrained(saved(tmp_path, *tiny_classifier()), classes=("normal",))
    assert loaded.score_batch(PICTURES, [""] * 3) == pytest.approx(published()[:, 0].tolist(), abs=1e-5)
    assert loaded.name == f"P(normal) ({tmp_path})"
    assert loaded.depends_on == {loaded.name}


@pytest.mark.parametrize("classes", [(), ("nsfw",), ("normal", "normal")])
def test_classes_the_model_does_not_have_are_refused_and_those_it_has_named(classes):
    with pytest.raises(aa.InvalidValueError, match=r"one or more of \['normal', 'drawing', 'unsafe'\]"):
        scorer(*classes)


def test_a_multi_label_classifier_is_refused():
    model, images = tiny_classifier()
    model.config.problem_type = "multi_label_classification"
    with pytest.raises(aa.ModelError, match=r"is a multi-label classifier"):
        ConceptProbability(model=model, image_processor=images, classes=("normal",))
