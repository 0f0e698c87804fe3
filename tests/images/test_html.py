"""Pictures reach a page or a sheet whole, and so do a critic's words."""

import base64
import io
from html.parser import HTMLParser

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image, ImageColor

import artaug as aa
from artaug.images.html import ShownCritique, contact_sheet, data_address

GREY = Image.new("RGB", (40, 20), "#808080")


def read(address):
    head, _, body = address.partition(",")
    image = Image.open(io.BytesIO(base64.b64decode(body)))
    assert head == f"data:image/{image.format.lower()};base64"
    return image


@given(st.sampled_from(["RGB", "RGBA", "L", "P", "CMYK"]), st.integers(1, 256), st.integers(1, 256))
def test_a_small_picture_comes_back_without_loss(mode, width, height):
    image = Image.effect_noise((width, height), 60).convert(mode)

    back = read(data_address(image))

    assert back.convert("RGB").tobytes() == image.convert("RGB").tobytes()


def test_a_large_picture_is_reduced_and_the_original_stays():
    image = Image.linear_gradient("L").resize((1600, 800)).convert("RGB")

    back = read(data_address(image))

    assert (back.format, back.size) == ("WEBP", (768, 384))
    assert image.size == (1600, 800)


def test_a_contact_sheet_holds_every_picture_in_its_place():
    colours = ["red", "green", "blue"]
    sheet = contact_sheet([Image.new("RGB", (8, 8), colour) for colour in colours], columns=2, labels=["a", "b", "c"])
    step_x, step_y = 8 * 3 + 8, 8 * 3 + 8 + 23
    places = [(4, 4), (step_x + 4, 4), (4, step_y + 4)]
    assert [sheet.getpixel(place) for place in places] == [ImageColor.getrgb(colour) for colour in colours]
    assert sheet.getpixel((step_x + 4, step_y + 4)) == (255, 255, 255)


@pytest.mark.parametrize(
    ("images", "options"),
    [
        ([], {}),
        ([Image.new("RGB", (8, 8)), Image.new("RGB", (8, 9))], {}),
        ([Image.new("RGB", (8, 8))], {"labels": []}),
        ([Image.new("RGB", (8, 8))], {"scale": 0}),
    ],
    ids=["no pictures", "two sizes", "too few labels", "no scale"],
)
def test_a_contact_sheet_that_cannot_be_made_is_refused(images, options):
    with pytest.raises(aa.InvalidValueError, match="contact_sheet received"):
        contact_sheet(images, **options)


# --- ShownCritique ---------------------------------------------------------------------------------------------------

HOSTILE = "<script>alert('1')</script><img src=x onerror=\"alert(1)\">&amp;{} {0}"


class Tags(HTMLParser):
    """The tags and the words of a page."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.addresses, self.words = [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [worth for name, worth in attributes if name in {"src", "href"}]

    def handle_data(self, data):
        self.words.append(data)


def shown(answer, *, image=GREY, prompt=""):
    return Tags(ShownCritique(image, answer, prompt)._repr_html_())


def test_a_shown_critique_has_a_numbered_line_for_every_box():
    boxes = [aa.Box(0, 0, 0.4, 1), aa.Box(0.5, 0, 1, 1)]
    critique = aa.Critique(
        tuple(aa.Suggestion(box, f"a lamp {box.left}", "dark") for box in boxes), "dim", ("swapped",)
    )

    page = shown(critique, prompt="two lamps")

    words = " ".join(page.words)
    for said in ("1", "2", "a lamp 0.0", "a lamp 0.5", "dark", "dim", "two lamps", "1 repairs", "swapped"):
        assert said in words
    assert page.tags.count("li") == 2
    (address,) = page.addresses
    assert read(address).convert("RGB").size == (40 * 12, 20 * 12)


@given(st.text(st.characters(exclude_categories=["Cs"])).filter(str.strip))
@example(HOSTILE)
def test_no_word_of_a_critic_is_taken_for_html(words):
    critique = aa.Critique((aa.Suggestion(aa.Box(0, 0, 1, 1), words, words),), words, (words,))
    plain = aa.Critique((aa.Suggestion(aa.Box(0, 0, 1, 1), "a", "a"),), "a", ("a",))
    for answer, harmless in ((critique, plain), (aa.Abstention(words), aa.Abstention("a"))):
        assert shown(answer, prompt=words).tags == shown(harmless, prompt="a").tags


def test_a_shown_abstention_gives_its_reason():
    page = shown(aa.Abstention("the server did not answer"))
    assert "the server did not answer" in " ".join(page.words)
    assert page.tags.count("img") == 1


def test_a_critique_that_asks_for_nothing_says_so():
    assert "asks for nothing" in shown(aa.Critique()).words


@pytest.mark.parametrize("size", [(1, 1), (2000, 10), (513, 512)])
def test_pictures_of_any_size_are_shown(size):
    assert shown(aa.Critique(), image=Image.new("RGBA", size)).tags.count("img") == 1
