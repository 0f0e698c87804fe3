import numpy as np
import pytest
import torch
from PIL import Image

import artaug as aa
from artaug.scorers import DualEncoder, ImageEncoder
from support.tiny_scorers import saved, tiny_clip, tiny_dino


def pictures(count, seed=0):
    generator = np.random.default_rng(seed)
    return [Image.fromarray(generator.integers(0, 256, (30, 40, 3), dtype=np.uint8)) for _ in range(count)]


def dino(batch_size=2):
    model, images = tiny_dino()
    return ImageEncoder(model=model, image_processor=images, name="tiny", batch_size=batch_size)


def test_a_dino_vector_is_the_first_token_after_the_last_norm_made_length_1():
    model, image_processor = tiny_dino()
    with torch.no_grad():
        pixels = image_processor(pictures(3), return_tensors="pt")["pixel_values"]
        expected = torch.nn.functional.normalize(model(pixel_values=pixels).last_hidden_state[:, 0], dim=-1)
    assert torch.allclose(dino().embed_images(pictures(3)), expected, atol=1e-5)


def test_a_saved_checkpoint_embeds_as_the_model_did(tmp_path):
    loaded = ImageEncoder.from_pretrained(saved(tmp_path, *tiny_dino()))
    assert torch.allclose(loaded.embed_images(pictures(3)), dino().embed_images(pictures(3)), atol=1e-6)


def test_the_similarity_of_the_same_picture_is_1_and_of_others_less():
    same, *others = aa.EmbeddingSimilarity(dino()).compare_batch(pictures(3), [pictures(3)[0], *pictures(2, seed=1)])
    assert same == pytest.approx(1, abs=1e-6)
    assert all(-1 <= similarity < 0.999 for similarity in others)


def test_similarity_is_the_cosine_of_the_vectors_of_a_clip():
    model, images, words = tiny_clip()
    clip = DualEncoder(model=model, image_processor=images, tokenizer=words)
    expected = torch.cosine_similarity(clip.embed_images(pictures(3)), clip.embed_images(pictures(3, seed=1)))
    similarities = aa.EmbeddingSimilarity(clip).compare_batch(pictures(3), pictures(3, seed=1))
    assert similarities == pytest.approx(expected.tolist(), abs=1e-6)


def test_a_model_without_a_vector_for_the_whole_picture_is_refused_when_it_is_used(monkeypatch):
    encoder = dino()
    forward = encoder.model.forward
    monkeypatch.setattr(encoder.model, "forward", lambda pixel_values: forward(pixel_values=pixel_values)[:1])
    with pytest.raises(aa.ModelError, match=r"tiny gives no pooler_output"):
        encoder.embed_images(pictures(1))
