"""The judge by a local model, against the forward of the model on one unpadded question."""

import pytest
import torch
import transformers
from PIL import Image

import artaug as aa
from artaug.judges import VLMJudge
from artaug.judges.question import QUESTION, expected_answer
from artaug.pairwise import judge_images
from artaug.scorers import LoadOptions
from artaug.testing import check_judge
from support.tiny_llava import tiny_idefics3, tiny_llava

FIRST = [Image.linear_gradient("L"), Image.effect_noise((40, 30), 80), Image.new("RGB", (9, 9), "teal")]
SECOND = [Image.new("RGB", (30, 20), "red"), Image.linear_gradient("L").rotate(90), Image.effect_noise((12, 40), 20)]
PROMPTS = ["a red ball", "fog that is rather thick and lies low over the hills", "a wall"]


@pytest.fixture(autouse=True)
def _quiet_transformers():
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity(before)


def judge(make=tiny_llava, *, question=QUESTION, ties=True, batch_size=4, factor=5):
    model, processor = make()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(factor if weight.ndim > 1 else 1)
    return VLMJudge(model=model, processor=processor, question=question, ties=ties, batch_size=batch_size)


def odds_of(judge, first, second, prompt, letters="ABC"):
    """The probabilities of the letters alone after the question, each with a space before it or without."""
    tie = ", or C if neither is better" if "C" in letters else ""
    text = (
        "There are two pictures: A is the first one, B the second. Both pictures were drawn from the prompt "
        f'"{prompt}". Which one answers it better, and is drawn better?\n\nTheir order says nothing. Reply with one letter '
        f"only: A or B{tie}."
    )
    content = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": text}]
    chat = judge.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    images = [[first.convert("RGB"), second.convert("RGB")]]
    inputs = judge.processor(text=[chat], images=images, return_tensors="pt")
    with torch.no_grad():
        shares = judge.model(**inputs).logits[0, -1].softmax(-1)
    encode = judge.processor.tokenizer.encode
    ids = {letter: {tuple(encode(letter)), tuple(encode(f" {letter}"))} for letter in letters}
    odds = {letter: sum(float(shares[token]) for (token, *rest) in ids[letter] if not rest) for letter in letters}
    return {letter: share / sum(odds.values()) for letter, share in odds.items()}


@pytest.mark.parametrize("make", [tiny_llava, tiny_idefics3])
@pytest.mark.parametrize("letters", ["AB", "ABC"])
def test_the_answer_is_that_of_the_odds_of_the_letters_in_a_batch_too(make, letters):
    tested = judge(make, ties="C" in letters)
    expected = [odds_of(tested, *question, letters) for question in zip(FIRST, SECOND, PROMPTS, strict=True)]
    assert tested.prefer_batch(FIRST, SECOND, PROMPTS) == pytest.approx([*map(expected_answer, expected)], abs=1e-5)
    assert max(odds["A"] for odds in expected) > 1.01 * min(odds["A"] for odds in expected)


def test_it_passes_the_checks_of_a_judge():
    check_judge(judge(batch_size=2))


def test_swapping_the_pictures_swaps_the_preference_and_equal_pictures_tie():
    tested = judge()
    forth = judge_images(tested, FIRST, SECOND, PROMPTS)
    back = judge_images(tested, SECOND, FIRST, PROMPTS)
    for one, other in zip(forth, back, strict=True):
        assert (one.forward, one.backward) == pytest.approx((other.backward, other.forward), abs=1e-5)
    assert all(same.score == pytest.approx(0.5, abs=1e-6) for same in judge_images(tested, FIRST, FIRST, PROMPTS))


@pytest.mark.parametrize(("reply", "position"), [("A", 1), ("B", -1), ("C", 0)])
def test_a_model_that_always_replies_the_same_letter_ties_and_its_bias_is_measured(reply, position):
    model, processor = tiny_llava()
    fixed = VLMJudge(model=model, processor=processor)
    (token,) = processor.tokenizer.encode(reply)
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.bias = torch.nn.Parameter(
            20.0 * torch.nn.functional.one_hot(torch.tensor(token), len(processor.tokenizer))
        )
    preferences = judge_images(fixed, FIRST * 2, SECOND * 2, PROMPTS * 2)
    assert {preference.winner for preference in preferences} == {"tie"}
    assert {preference.position for preference in preferences} == {position}
    assert aa.PositionBias.of("fixed", preferences).significant == (position != 0)


def test_a_model_that_thinks_before_it_answers_abstains_and_is_named():
    model, processor = tiny_llava(fixed_reply="So, the pictures")
    answers = judge_images(VLMJudge(model=model, processor=processor), FIRST, SECOND, PROMPTS)
    assert all(isinstance(answer, aa.Abstention) and not answer.transient for answer in answers)
    assert "none of A, B, C, but most likely 'So, the pictures'" in answers[0].reason
    assert "load its Instruct version" in answers[0].reason


def test_the_likeliest_answer_decides_and_a_close_one_is_close_to_a_half():
    assert expected_answer({"A": 0.02, "B": 0.01, "C": 0.97}) == 0.5
    assert expected_answer({"A": 0.5, "B": 0.1, "C": 0.4}) == pytest.approx(0.7)
    assert expected_answer({"A": 0.1, "B": 0.9}) == pytest.approx(0.1)


def test_another_question_is_part_of_the_name():
    fixed = judge(question="Which has better hands?")
    assert fixed.prefer(FIRST[0], SECOND[0], "a wall") == fixed.prefer(FIRST[0], SECOND[0], "fog")
    assert fixed.name.endswith(", 'Which has better hands?')")
    assert judge().name != fixed.name


def test_braces_and_chat_tokens_in_a_prompt_are_kept_as_text():
    assert 0 <= judge().prefer(FIRST[0], SECOND[0], "a {0} {prompt} }{ <image> <|im_end|>") <= 1


def test_a_saved_checkpoint_answers_as_the_model_did(tmp_path):
    tested = judge()
    tested.model.save_pretrained(tmp_path)
    tested.processor.save_pretrained(tmp_path)
    loaded = VLMJudge.from_pretrained(str(tmp_path), options=LoadOptions(dtype=torch.float32))
    assert loaded.prefer_batch(FIRST, SECOND, PROMPTS) == pytest.approx(
        tested.prefer_batch(FIRST, SECOND, PROMPTS), abs=1e-6
    )
    assert loaded.name == f"VLMJudge ({tmp_path})"
    assert loaded.models == (loaded.model,)


def test_the_model_is_left_as_it_was():
    tested = judge()
    before = tested.model.generation_config.to_dict()
    tested.prefer(FIRST[0], SECOND[0], "a wall")
    assert tested.model.generation_config.to_dict() == before


def test_a_model_that_returns_nan_is_caught():
    tested = judge()
    with torch.no_grad():
        tested.model.lm_head.weight.fill_(torch.nan)
    with pytest.raises(aa.NonFiniteError, match=r"returned nan"):
        judge_images(tested, FIRST, SECOND, PROMPTS)


def test_what_cannot_be_asked_is_refused():
    model, processor = tiny_llava()
    with pytest.raises(aa.InvalidValueError, match=r"VLMJudge needs a question"):
        VLMJudge(model=model, processor=processor, question=" ")
    with pytest.raises(aa.InvalidValueError, match=r"batch_size=0"):
        VLMJudge(model=model, processor=processor, batch_size=0)
    processor.chat_template = None
    with pytest.raises(aa.ModelError, match=r"no chat template"):
        VLMJudge(model=model, processor=processor)


def test_it_filters_pairs():
    keep = aa.Preferred(judge(), at_least=0.5)
    pair = aa.ImagePair(prompt="a wall", before=FIRST[2], after=FIRST[2].rotate(90), seed=0)
    verdict = keep.judge(pair)
    assert verdict.reason.startswith("VLMJudge (")
    assert verdict.keep == (verdict.scores[keep.by.name] >= 0.5)
