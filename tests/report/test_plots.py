"""The figures show the numbers they are given and touch no global state."""

import io
import subprocess
import sys
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex
from PIL import Image

import artaug as aa
from artaug.report import plots

LORA = aa.LoRA({"blocks.0.to_q": aa.LowRank(torch.ones(2, 4), torch.ones(4, 2))})
PROMPTS = tuple(f"a tree for $5 in the garden of a house, number {number}" for number in range(8))


@dataclass(frozen=True)
class Swatch(aa.Synthesizer):
    light: int = 60

    def synthesize(self, plan, *, seed):
        return Image.new("RGB", (12, 8), (self.light + seed % 5, 90, 120))


class Light(aa.Scorer):
    def score(self, image, prompt):
        return image.getpixel((0, 0))[0] / 255


class Width(aa.Scorer):
    def score(self, image, prompt):
        return float(image.width)


def make_comparison(**options):
    arms = {"dim": Swatch(50), "bright": Swatch(120)}
    options = {"scorers": [Light(), Width()], "guardrails": [aa.Guardrail("Light", 0.1)], **options}
    return aa.compare(Swatch(), arms, PROMPTS, filtered_by=["Width"], progress=False, **options)


def make_round(number, *, losses=(0.5, 0.25, 0.125), seconds=None):
    training = aa.TrainingResult(lora=LORA, losses=losses, pairs=2, steps=len(losses), seconds=2.5)
    return aa.Round(
        number=number,
        attempts=(),
        training=training,
        lora=LORA,
        seconds=seconds or {"draw": 60.0, "train": 120.0},
        gain=None,
        accepted=number < 2,
    )


RESULT = aa.Enhancement(rounds=(make_round(1), make_round(2, seconds={"draw": 30.0, "measure": 6.0})), stop_reason="so")


def render(figure):
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=60)
    return np.asarray(Image.open(buffer).convert("RGB"))


def test_a_forest_plot_has_every_interval():
    comparison = make_comparison()

    panels = plots.intervals(comparison).axes

    for row in comparison.rows:
        axes = next(panel for panel in panels if panel.get_title(loc="left").startswith(row.scorer))
        lines = [tuple(line.get_xdata()) for line in axes.lines]
        assert (row.ci_low, row.ci_high) in lines
        assert (row.delta,) in lines
    assert [panel.get_title(loc="left") for panel in panels] == ["Light", "Width *"]
    assert [label.get_text() for label in panels[0].get_yticklabels()] == ["dim", "bright"]


def test_only_significant_marks_are_filled_and_a_guardrail_is_drawn_at_its_margin():
    comparison = make_comparison()
    light, width = plots.intervals(comparison).axes

    fills = [to_hex(line.get_markerfacecolor()) for line in (*light.lines, *width.lines) if line.get_marker() == "o"]

    assert fills == [*plots.PALETTE[:2], "#ffffff", "#ffffff"]
    margin = comparison.guardrails[0].margin(comparison.rows[0])
    assert [-margin, -margin] in [list(line.get_xdata()) for line in light.lines]


def test_loss_curves_have_every_step_and_mark_rejected_rounds():
    axes = plots.losses(RESULT).axes[0]

    assert [list(line.get_ydata()) for line in axes.lines[::2]] == [[0.5, 0.25, 0.125]] * 2
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["round 1", "round 2 (rejected)"]


def test_times_add_up_to_the_rounds_minutes():
    axes = plots.times(RESULT).axes[0]

    ends = {}
    for bar in axes.patches:
        line = round(bar.get_y(), 3)
        ends[line] = max(ends.get(line, 0), bar.get_x() + bar.get_width())
    assert sorted(ends.values()) == pytest.approx([0.6, 3.0])
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["draw", "train", "measure"]


def test_a_gallery_shows_the_pictures_themselves():
    comparison = make_comparison()

    axes = plots.gallery(comparison, prompts=3).axes

    shown = [np.asarray(panel.images[0].get_array()) for panel in axes]
    arms = (comparison.base, *comparison.candidates.values())
    for pixels, image in zip(shown, [image for arm in arms for image in arm.images[:3]], strict=True):
        np.testing.assert_array_equal(pixels, np.asarray(image))
    assert [axes[index].get_ylabel() for index in (0, 3, 6)] == ["base", "dim", "bright"]


def test_pairs_are_drawn_before_above_after():
    before, after = (Swatch(light).synthesize(aa.Plan("a"), seed=1) for light in (60, 120))
    pair = aa.ImagePair(prompt="a", seed=1, before=before, after=after, plan=aa.Plan("b"))

    axes = plots.pairs([pair, replace(pair, prompt="b")]).axes

    np.testing.assert_array_equal(axes[1].images[0].get_array(), np.asarray(before))
    np.testing.assert_array_equal(axes[3].images[0].get_array(), np.asarray(after))
    assert axes[3].get_xlabel() == "b"


@pytest.mark.parametrize(
    "draw",
    [
        pytest.param(lambda: plots.intervals(make_comparison()), id="intervals"),
        pytest.param(lambda: plots.losses(RESULT), id="losses"),
        pytest.param(lambda: plots.times(RESULT), id="times"),
        pytest.param(lambda: plots.gallery(make_comparison()), id="gallery"),
        pytest.param(
            lambda: plots.losses(aa.Enhancement(rounds=(make_round(1, losses=()),), stop_reason="")), id="none"
        ),
    ],
)
def test_a_figure_renders_the_same_twice_and_is_not_blank(draw):
    first, again = render(draw()), render(draw())

    np.testing.assert_array_equal(first, again)
    assert (first < 250).mean() > 0.005


def test_a_notebook_shows_a_figure_in_its_own_resolution():
    figure = plots.losses(RESULT)

    png, shown = figure._repr_png_()

    inches = figure.get_size_inches()
    with Image.open(io.BytesIO(png)) as picture:
        assert picture.size == tuple((inches * figure.dpi).astype(int))
    assert shown == {"width": round(inches[0] * 96), "height": round(inches[1] * 96)}


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: plots.gallery(make_comparison(keep_images=0)), "holds 0 pictures"),
        (lambda: plots.gallery(make_comparison(), prompts=0), "prompts=0"),
        (lambda: plots.pairs([]), "received no pair"),
    ],
)
def test_nothing_to_show_is_an_error(draw, message):
    with pytest.raises(aa.InvalidValueError, match=message):
        draw()


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)

    with pytest.raises(
        aa.MissingExtraError, match=r'plots needs the matplotlib package. Run: pip install "artaug\[rep'
    ):
        plots.losses(RESULT)


def test_importing_the_plots_loads_no_matplotlib():
    program = "import sys, artaug.report.plots; print('matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True, text=True)
    assert done.stdout.strip() == "False"
