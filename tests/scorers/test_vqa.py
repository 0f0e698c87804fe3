import pytest
import torch
import transformers
from PIL import Image

import artaug as aa
from artaug.scorers import LoadOptions, VQAScore
from artaug.scorers.vqa import QUESTION
from artaug.scoring import score_images
from artaug.testing import check_scorer
from support.tiny_llava import tiny_idefics3, tiny_llava

PICTURES = [Image.linear_gradient("L"), Image.effect_noise((40, 30), 80), Image.new("RGB", (9, 9), "teal")]
PROMPTS = ["a red ball", "fog that is rather thick and lies low over the hills", "a wall"]


@pytest.fixture(autouse=True)
def _quiet_transformers():
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity(before)


def scorer(make=tiny_llava, *, question=QUESTION, batch_size=8, answer="a"):
    model, processor = make()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(5 if weight.ndim > 1 else 1)
    return VQAScore(model=model, processor=processor, question=question, answer=answer, batch_size=batch_size)


def published(vqa, image, prompt):
    """P(answer) as the paper has it: the forward of the model on one unpadded question, and a softmax."""
    text = f'Does this figure show "{prompt}"? Please answer yes or no.'
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]
    chat = vqa.processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = vqa.processor(text=chat, images=image.convert("RGB"), return_tensors="pt")
    with torch.no_grad():
        logits = vqa.model(**inputs).logits[0, -1]
    (answer,) = vqa.processor.tokenizer.encode(vqa.answer, add_special_tokens=False)
    return float(logits.exp()[answer] / logits.exp().sum())


@pytest.mark.parametrize("make", [tiny_llava, tiny_idefics3])
def test_the_score_is_the_probability_of_the_answer_in_a_batch_too(make):
    vqa = scorer(make)
    expected = [published(vqa, image, prompt) for image, prompt in zip(PICTURES, PROMPTS, strict=True)]
    assert vqa.score_batch(PICTURES, PROMPTS) == pytest.approx(expected, abs=1e-5)
    assert max(expected) > 1.01 * min(expected)


def test_it_passes_the_scorer_checks():
    check_scorer(scorer(batch_size=4))


def test_a_model_that_answers_yes_scores_1():
    model, processor = tiny_llava(fixed_reply="Yes")
    sure = VQAScore(model=model, processor=processor)
    assert sure.score(PICTURES[0], "a wall") > 0.999


@pytest.mark.parametrize("answer", ["Y", "a"])
def test_a_model_that_thinks_before_it_answers_is_reported(answer):
    model, processor = tiny_llava(fixed_reply="So, the picture")
    thinking = VQAScore(model=model, processor=processor, answer=answer)
    with pytest.warns(
        UserWarning, match=r"the next token after the question is not an answer, but most likely 'So, the"
    ):
        scores = thinking.score_batch(PICTURES, PROMPTS)
    assert max(scores) < 1e-10


def test_a_model_that_answers_no_is_not_reported():
    model, processor = tiny_llava(fixed_reply="No")
    assert VQAScore(model=model, processor=processor, answer="Y").score(PICTURES[0], "a wall") < 1e-10


def test_another_question_replaces_the_prompt_and_is_part_of_the_name():
    fixed = scorer(question="Are all hands well drawn?")
    assert fixed.score(PICTURES[0], "a wall") == fixed.score(PICTURES[0], "fog")
    assert "Are all hands well drawn?" in fixed.name
    assert fixed.name != scorer().name


def test_braces_in_a_prompt_are_kept_as_text():
    assert 0 < scorer().score(PICTURES[0], "a {0} {prompt} }{") < 1


def test_a_saved_checkpoint_scores_as_the_model_did(tmp_path):
    vqa = scorer()
    vqa.model.save_pretrained(tmp_path)
    vqa.processor.save_pretrained(tmp_path)
    loaded = VQAScore.from_pretrained(str(tmp_path), answer="a", options=LoadOptions(dtype=torch.float32))
    assert loaded.score_batch(PICTURES, PROMPTS) == pytest.approx(vqa.score_batch(PICTURES, PROMPTS), abs=1e-6)
    assert loaded.name == f"VQAScore ({tmp_path})"


def test_the_model_is_left_as_it_was():
    vqa = scorer()
    before = vqa.model.generation_config.to_dict()
    vqa.score(PICTURES[0], "a wall")
    assert vqa.model.generation_config.to_dict() == before


def test_an_answer_of_several_tokens_is_refused():
    with pytest.raises(aa.InvalidValueError, match=r"the answer 'most certainly' is \d+ tokens of this model.*one"):
        scorer(answer="most certainly")


def test_a_processor_without_chat_template_is_refused():
    model, processor = tiny_llava()
    processor.chat_template = None
    with pytest.raises(aa.ModelError, match=r"no chat template"):
        VQAScore(model=model, processor=processor, answer="a")


def test_pictures_and_prompts_that_differ_in_number_are_refused():
    with pytest.raises(aa.InvalidValueError, match=r"3 pictures and 1 prompts"):
        scorer().score_batch(PICTURES, PROMPTS[:1])


def test_a_model_that_returns_nan_is_caught_by_score_images():
    vqa = scorer()
    with torch.no_grad():
        vqa.model.lm_head.weight.fill_(torch.nan)
    with pytest.raises(aa.NonFiniteError, match=r"returned nan"):
        score_images(vqa, PICTURES, PROMPTS)


def test_a_folder_without_a_processor_is_named(tmp_path):
    with pytest.raises(aa.ModelError, match=r"nowhere"):
        VQAScore.from_pretrained(str(tmp_path / "nowhere"))
