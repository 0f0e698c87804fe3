"""What a notebook shows of a run and a comparison: the numbers, and nothing that runs."""

import re
from html import unescape

import pytest
import torch
from PIL import Image

import artaug as aa
from artaug._internal.text import duration
from artaug.testing import SwatchSynthesizer

EVIL = "<script>alert(1)</script>"
LORA = aa.LoRA({"blocks.0.to_q": aa.LowRank(torch.ones(2, 4), torch.ones(4, 2))})
GAIN = aa.ScoreRow(f"Light {EVIL}", "after", 0.5, 0.6, 0.1, 0.05, 0.15, 0.9, 64, p_value=0.01)


def make_round(number, *, gain=None, losses=(0.5, 0.25)):
    return aa.Round(
        number=number,
        attempts=(aa.Skipped("a moor", 1, f"too dark {EVIL}"), aa.Skipped("a pond", 2, "nothing to do", "plan")),
        training=aa.TrainingResult(lora=LORA, losses=losses, pairs=1200, steps=len(losses), seconds=2.5),
        lora=LORA,
        seconds={"draw": 60.0, "train": 5.0},
        gain=gain,
        accepted=number == 1,
    )


def visible_text(result):
    return re.sub(r"\s+", " ", unescape(re.sub(r"<[^>]+>", " ", result._repr_html_())))


def test_a_round_shows_its_numbers_and_its_funnel():
    text = visible_text(make_round(1, gain=GAIN))

    assert f"1 1,200 of 2 2 0.25 Light {EVIL} +0.1 [+0.05, +0.15] 1 min 05 s" in text
    assert "prompts 2 (100.0%)" in text
    assert "kept 0 (0.0%)" in text


def test_an_enhancement_shows_a_line_a_round_and_why_it_ended():
    result = aa.Enhancement(rounds=(make_round(1), make_round(2, gain=GAIN, losses=())), stop_reason=f"so {EVIL}")

    text = visible_text(result)

    assert "1 1,200 of 2 2 0.25 not measured" in text
    assert "2 (left out) 1,200 of 2 0 none Light" in text
    assert f"so {EVIL} " in text


def test_a_comparison_shows_its_verdicts():
    class Swatch(aa.Synthesizer):
        def synthesize(self, plan, *, seed):
            return Image.new("L", (8, 8), 60 + seed % 16)

    class Light(aa.Scorer):
        def score(self, image, prompt):
            return image.getpixel((0, 0)) / 255

    comparison = aa.compare(Swatch(), {EVIL: Swatch()}, ["a", "b"], scorers=[Light()], progress=False)

    assert f"{EVIL} : {comparison.verdict(EVIL)}" in visible_text(comparison)


@pytest.mark.parametrize("result", [make_round(1, gain=GAIN), aa.Enhancement(rounds=(), stop_reason=EVIL)])
def test_markup_in_a_result_does_not_run(result):
    assert "<script" not in result._repr_html_()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0.0 s"), (59.4, "59.4 s"), (59.96, "1 min 00 s"), (3599.6, "1 h 00 min"), (90061, "25 h 01 min")],
)
def test_a_time_has_units_that_fit_its_length(seconds, text):
    assert duration(seconds) == text


def test_a_printed_enhancement_is_a_short_table():
    result = aa.Enhancement(rounds=(make_round(1), make_round(2, gain=GAIN)), stop_reason="all 2 rounds ran")
    heading, first, second, ended = str(result).splitlines()
    assert heading.split()[:2] == ["round", "pairs"]
    assert first.index("1,200 of 2") == second.index("1,200 of 2") == heading.index("pairs")
    assert ended == "ended: all 2 rounds ran"


def test_a_strip_has_a_row_for_each_prompt_and_a_column_for_the_base_and_each_round():
    base = SwatchSynthesizer()
    result = aa.Enhancement(rounds=(make_round(1), make_round(2)), stop_reason="")
    one, two = result.strip(base, ["a moor"], scale=2), result.strip(base, ["a moor", "a pond"], scale=2)
    side = 2 * base.synthesize(aa.Plan("a moor"), seed=0).width
    assert one.width == two.width == 3 * (side + 8) - 8
    assert two.height == 2 * one.height + 8
    with pytest.raises(aa.PromptError):
        result.strip(base, [])


def test_a_training_shows_its_numbers_and_its_curves():
    validations = [aa.ValidationResult(step=step, strength=1.0, win_rate=step / 40, gain=0.1) for step in (10, 20)]
    result = aa.TrainingResult(
        lora=LORA, losses=(0.5, 0.25), pairs=3, steps=20, seconds=2.5, validations=tuple(validations)
    )
    assert result._repr_html_().count("<polyline") == 2
    assert "win rate 50% at step 20, strength 1" in visible_text(result)
    assert "<polyline" not in aa.TrainingResult(lora=LORA, losses=(), pairs=3, steps=0, seconds=0.0)._repr_html_()


def test_a_lora_shows_its_layers_by_kind():
    layers = {f"blocks.{index}.to_q": LORA.layers[next(iter(LORA.layers))] for index in range(3)}
    assert "blocks.*.to_q 3 2" in visible_text(aa.LoRA(layers))
