import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig

import artaug as aa
from artaug.scorers import SafetyMargin
from artaug.testing import check_scorer
from support.tiny_scorers import TEXT, VISION, clip_pictures, saved

GENERATOR = np.random.default_rng(0)
PICTURES = [Image.fromarray(GENERATOR.integers(0, 256, (32, 40, 3), dtype=np.uint8)) for _ in range(24)]


def tiny_checker(seed=0):
    """A real safety checker of diffusers, tiny, with thresholds that some of the pictures pass."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        model = StableDiffusionSafetyChecker(
            CLIPConfig(vision_config=VISION, text_config=TEXT, projection_dim=8)
        ).eval()
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape) * (0.3 if weight.ndim else 1) + (weight.ndim == 1) * 0.1)
        near = cosines(model, model.concept_embeds)
        model.concept_embeds_weights.copy_(near.quantile(0.97, dim=0))
        model.special_care_embeds_weights.copy_(cosines(model, model.special_care_embeds).quantile(0.8, dim=0))
    return model


def pixel_values():
    return clip_pictures()(PICTURES, return_tensors="pt")["pixel_values"]


def cosines(model, embeds):
    with torch.no_grad():
        image_embeds = model.visual_projection(model.vision_model(pixel_values())[1])
    return torch.nn.functional.normalize(image_embeds) @ torch.nn.functional.normalize(embeds).T


def scorer(model, **options):
    return SafetyMargin(model=model, image_processor=clip_pictures(), **options)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_margin_has_the_sign_of_what_the_checker_of_diffusers_does(seed):
    model = tiny_checker(seed)
    margins = np.array(scorer(model, batch_size=5).score_batch(PICTURES, [""] * 24))
    _, flagged = model(clip_input=pixel_values(), images=np.ones((24, 2, 2, 3)))
    clear = np.abs(margins) > 0.0006
    assert clear.sum() > 18
    assert ((margins < 0) == np.array(flagged))[clear].all()
    assert 0 < sum(flagged) < 24


def test_the_margin_is_the_distance_by_the_published_formula():
    model = tiny_checker()
    near = cosines(model, model.concept_embeds) - model.concept_embeds_weights
    care = cosines(model, model.special_care_embeds) - model.special_care_embeds_weights
    lowered = near + 0.01 * (care.round(decimals=3) > 0).any(dim=1, keepdim=True)
    assert scorer(model).score_batch(PICTURES, [""] * 24) == pytest.approx(
        (-lowered.max(dim=1).values).tolist(), abs=1e-5
    )
    assert (care > 0).any(dim=1).any()


@pytest.mark.parametrize("published", [False, True], ids=["as-saved-now", "as-published"])
def test_a_checkpoint_scores_as_the_model_did(tmp_path, published):
    model = tiny_checker()
    folder = saved(tmp_path, model, clip_pictures())
    if published:  # by the transformers of the time, which nested the vision model in another one
        weights = load_file(tmp_path / "model.safetensors")
        nested = {
            name.replace("vision_model.", "vision_model.vision_model.", 1)
            if name.startswith("vision_model.")
            else name: weight
            for name, weight in weights.items()
        }
        save_file(nested, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = SafetyMargin.from_pretrained(folder)
    before = scorer(model).score_batch(PICTURES, [""] * 24)
    assert loaded.score_batch(PICTURES, [""] * 24) == pytest.approx(before, abs=1e-5)


def test_it_passes_the_scorer_checks():
    check_scorer(scorer(tiny_checker()))
    assert scorer(tiny_checker()).score_batch([], []) == []


def test_the_processor_may_be_elsewhere(tmp_path):
    model, processor = saved(tmp_path / "a", tiny_checker()), saved(tmp_path / "b", clip_pictures())
    assert SafetyMargin.from_pretrained(model, processor=processor).score(PICTURES[0], "") > -1
    with pytest.raises(aa.ModelError, match="could not be read by AutoImageProcessor"):
        SafetyMargin.from_pretrained(model)


def test_an_incomplete_checkpoint_is_refused(tmp_path):
    model = tiny_checker()
    partial = {name: weight for name, weight in model.state_dict().items() if "concept" not in name}
    folder = saved(tmp_path, clip_pictures())
    model.save_pretrained(tmp_path, state_dict=partial)
    with pytest.raises(
        aa.ModelError, match=r"lacks 2 of the weights of StableDiffusionSafetyChecker, 'concept_embeds'"
    ):
        SafetyMargin.from_pretrained(folder)


def test_a_checker_in_training_mode_is_refused():
    with pytest.raises(aa.ModelError, match="training mode"):
        scorer(tiny_checker().train())
