"""Images and critiques in HTML: pixels are kept, texts are escaped."""

import base64
import io
from html.parser import HTMLParser

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image, ImageColor

import artaug as aa
from artaug.images.html import CritiqueView, contact_sheet, image_data_url

GREY = Image.new("RGB", (40, 20), "#808080")


def decode(url):
    head, _, body = url.partition(",")
    image = Image.open(io.BytesIO(base64.b64decode(body)))
    assert head == f"data:image/{image.format.lower()};base64"
    return image


@given(st.sampled_from(["RGB", "RGBA", "L", "P", "CMYK"]), st.integers(1, 256), st.integers(1, 256))
def test_a_small_image_is_encoded_without_loss(mode, width, height):
    image = Image.effect_noise((width, height), 60).convert(mode)

    decoded = decode(image_data_url(image))

    assert decoded.convert("RGB").tobytes() == image.convert("RGB").tobytes()


def test_a_large_image_is_reduced_and_the_original_is_not_changed():
    image = Image.linear_gradient("L").resize((1600, 800)).convert("RGB")

    decoded = decode(image_data_url(image))

    assert (decoded.format, decoded.size) == ("WEBP", (768, 384))
    assert image.size == (1600, 800)


def test_a_contact_sheet_has_every_image_in_its_place():
    colors = ["red", "green", "blue"]
    sheet = contact_sheet([Image.new("RGB", (8, 8), color) for color in colors], columns=2, labels=["a", "b", "c"])
    step_x, step_y = 8 * 3 + 8, 8 * 3 + 8 + 23
    corners = [(4, 4), (step_x + 4, 4), (4, step_y + 4)]
    assert [sheet.getpixel(corner) for corner in corners] == [ImageColor.getrgb(color) for color in colors]
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
def test_illegal_contact_sheets_are_refused(images, options):
    with pytest.raises(aa.InvalidValueError, match="contact_sheet received"):
        contact_sheet(images, **options)


# --- CritiqueView ---------------------------------------------------------------------------------------------------

HOSTILE = "<script>alert('1')</script><img src=x onerror=\"alert(1)\">&amp;{} {0}"


class Tags(HTMLParser):
    """The tags, URLs and texts of a page."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.urls, self.texts = [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.urls += [value for name, value in attributes if name in {"src", "href"}]

    def handle_data(self, data):
        self.texts.append(data)


def view(answer, *, image=GREY, prompt=""):
    return Tags(CritiqueView(image, answer, prompt)._repr_html_())


def test_a_critique_has_a_numbered_item_for_every_box():
    boxes = [aa.Box(0, 0, 0.4, 1), aa.Box(0.5, 0, 1, 1)]
    critique = aa.Critique(
        tuple(aa.Suggestion(box, f"a lamp {box.left}", "dark") for box in boxes), "dim", ("swapped",)
    )

    page = view(critique, prompt="two lamps")

    text = " ".join(page.texts)
    for expected in ("1", "2", "a lamp 0.0", "a lamp 0.5", "dark", "dim", "two lamps", "repairs: 1", "swapped"):
        assert expected in text
    assert page.tags.count("li") == 2
    (url,) = page.urls
    assert decode(url).convert("RGB").size == (40 * 12, 20 * 12)


@given(st.text(st.characters(exclude_categories=["Cs"])).filter(str.strip))
@example(HOSTILE)
def test_no_text_of_a_critic_is_taken_for_html(text):
    critique = aa.Critique((aa.Suggestion(aa.Box(0, 0, 1, 1), text, text),), text, (text,))
    plain = aa.Critique((aa.Suggestion(aa.Box(0, 0, 1, 1), "a", "a"),), "a", ("a",))
    for answer, harmless in ((critique, plain), (aa.Abstention(text), aa.Abstention("a"))):
        assert view(answer, prompt=text).tags == view(harmless, prompt="a").tags


def test_a_picture_by_reference_is_shown_as_the_picture(tmp_path):
    (file,) = aa.ImageFolder(tmp_path).add_all([GREY])

    assert view(aa.Critique(), image=file).urls == view(aa.Critique(), image=GREY).urls


def test_an_abstention_shows_its_reason():
    page = view(aa.Abstention("the server did not answer"))
    assert "the server did not answer" in " ".join(page.texts)
    assert page.tags.count("img") == 1


def test_a_critique_without_suggestions_says_so():
    assert "no suggestions" in view(aa.Critique()).texts


@pytest.mark.parametrize("size", [(1, 1), (2000, 10), (513, 512)])
def test_pictures_of_any_size_are_view(size):
    assert view(aa.Critique(), image=Image.new("RGBA", size)).tags.count("img") == 1
