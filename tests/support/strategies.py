"""Where Hypothesis draws artaug's values from, for every test that states a law."""

from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image

import artaug as aa

MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "I;16")

prompts = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
nonblank_prompts = prompts.filter(str.strip)
numbers = st.floats(-1e6, 1e6)
fractions = st.floats(0, 1)


@st.composite
def spans(draw):
    """Two edges, the first before the second, both in [0, 1]."""
    low, high = sorted((draw(fractions), draw(fractions)))
    return (low, high) if low < high else (0.0, 1.0)


@st.composite
def preferences(draw):
    """A judge's two answers, often certain ones or ties."""
    answers = st.sampled_from((0.0, 0.5, 1.0)) | fractions
    return aa.Preference(draw(answers), draw(answers))


@st.composite
def boxes(draw):
    (left, right), (top, bottom) = draw(spans()), draw(spans())
    return aa.Box(left, top, right, bottom)


@st.composite
def pixel_boxes(draw):
    """An image size and whole-pixel edges inside it."""
    width, height = draw(st.integers(1, 2000)), draw(st.integers(1, 2000))
    left, top = draw(st.integers(0, width - 1)), draw(st.integers(0, height - 1))
    return (width, height), (left, top, draw(st.integers(left + 1, width)), draw(st.integers(top + 1, height)))


@st.composite
def masks(draw):
    shape = draw(st.tuples(st.integers(1, 6), st.integers(1, 6)))
    weights = draw(arrays.arrays(np.float32, shape, elements=st.floats(0, 1, width=32)))
    return aa.Mask.from_array(weights if weights.any() else np.ones(shape))


suggestions = st.builds(aa.Suggestion, boxes(), nonblank_prompts, prompts)
critiques = st.builds(
    aa.Critique, st.lists(suggestions, max_size=5).map(tuple), prompts, st.lists(prompts, max_size=2).map(tuple)
)
abstentions = st.builds(aa.Abstention, nonblank_prompts)
regions = st.builds(
    aa.Region,
    boxes() | masks(),
    nonblank_prompts,
    weight=st.floats(0, 100, exclude_min=True),
    feather=st.floats(0, 1),
    negative_prompt=st.none() | prompts,
    lora=st.none() | nonblank_prompts,
)
plans = st.builds(aa.Plan, prompts, st.lists(regions, max_size=4).map(tuple))
verdicts = st.builds(aa.Verdict, st.booleans(), prompts, st.dictionaries(prompts, numbers, max_size=4))
values = boxes() | masks() | suggestions | critiques | abstentions | regions | plans | verdicts


@st.composite
def pixels(draw, *, least=1, most=24):
    """Random pictures as arrays (height, width, 3) of 8-bit numbers: noise of one spread around one colour."""
    height, width = draw(st.integers(least, most)), draw(st.integers(least, most))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    colour, spread = generator.integers(0, 256, size=3), draw(st.sampled_from([0, 2, 20, 128]))
    noise = generator.integers(-spread, spread + 1, size=(height, width, 3))
    return np.clip(colour + noise, 0, 255).astype(np.uint8)


@st.composite
def images(draw, *, least=1, most=24):
    """Random pictures of any mode that pictures come in."""
    mode, picture = draw(st.sampled_from(MODES)), draw(pixels(least=least, most=most))
    if mode == "I;16":
        return Image.fromarray(picture[:, :, 0].astype(np.uint16) * 257)
    return (
        Image.fromarray(picture).convert("P").convert(mode) if mode == "PA" else Image.fromarray(picture).convert(mode)
    )


@dataclass(frozen=True)
class Listed(aa.Scorer):
    """Scores a grey picture by its grey level, over ten: a scorer whose answers a test can choose."""

    called: str = "Listed"

    @property
    def name(self):
        return self.called

    def score(self, image, prompt):
        return image.convert("L").getpixel((0, 0)) / 10


def pair(before, after, *, seed=0):
    """A pair that `Listed` scores ``before / 10`` and ``after / 10``."""
    first, second = Image.new("L", (2, 2), before), Image.new("L", (2, 2), after)
    return aa.ImagePair(prompt="a pear", seed=seed, before=first, after=second, plan=aa.Plan("a pear"))


levels = st.integers(0, 255)
pairs = st.builds(pair, levels, levels, seed=st.integers(0, 9))
