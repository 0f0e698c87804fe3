"""Pictures for people: boxes drawn on them, so that one sees where a critic looked, and their way into HTML."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from PIL import Image, ImageDraw, ImageFont

from artaug._internal.images import data_url
from artaug.critique import Abstention, Critique
from artaug.drawing import BOX_COLORS, DARK, draw_boxes
from artaug.errors import InvalidValueError

__all__ = [
    "BOX_COLORS",
    "ShownCritique",
    "contact_sheet",
    "data_address",
    "draw_boxes",
    "encoded",
]

_CAPTION_PX = 15
_LOSSLESS_PX = 256
_LARGEST_PX = 768
_SHOWN_PX = 512


def contact_sheet(
    images: Sequence[Image.Image], *, columns: int | None = None, labels: Sequence[str] | None = None, scale: int = 3
) -> Image.Image:
    """Set pictures of one size side by side, larger, each with a label below it.

    Args:
        images: at least one; they stay as they are.
        columns: pictures a row; all in one row if not given.
        labels: a word a picture; none if not given.
        scale: pixels of the sheet a pixel of a picture, at least 1.

    Raises:
        InvalidValueError: without pictures, for pictures of several sizes, or if there is not one label a picture.

    >>> from artaug.images.html import contact_sheet
    >>> from PIL import Image
    >>> contact_sheet([Image.new("RGB", (64, 64))] * 4, columns=2).size
    (392, 392)
    """
    sizes = sorted({image.size for image in images})
    if len(sizes) != 1 or (labels is not None and len(labels) != len(images)) or scale < 1:
        raise InvalidValueError(
            f"contact_sheet received {len(images)} pictures of sizes {sizes}, "
            f"{'no' if labels is None else len(labels)} labels and scale {scale}: need pictures of one size, one label "
            "each or none, and a scale of at least 1."
        )
    width, height = sizes[0][0] * scale, sizes[0][1] * scale
    font = ImageFont.load_default(_CAPTION_PX)
    gap, caption = 8, 0 if labels is None else _CAPTION_PX + 8
    columns = min(columns or len(images), len(images))
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + caption + gap) - gap), "white")
    pen = ImageDraw.Draw(sheet)
    for number, image in enumerate(images):
        left, top = number % columns * (width + gap), number // columns * (height + caption + gap)
        sheet.paste(image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC), (left, top))
        if labels is not None:
            pen.text((left + 2, top + height + 4), labels[number], fill=DARK, font=font)
    return sheet


def encoded(image: Image.Image) -> tuple[bytes, str]:
    """Give a picture as a file for a page, and the kind of file: ``png`` or ``webp``.

    Up to 256 pixels a side it is a PNG, without loss; a larger one becomes a WebP of at most 768 pixels a side, which
    is what a screen shows. The same picture gives the same bytes.

    >>> from artaug.images.html import encoded
    >>> from PIL import Image
    >>> encoded(Image.new("RGB", (300, 200)))[1]
    'webp'
    """
    picture = image if image.mode in {"RGB", "RGBA", "L"} else image.convert("RGB")
    held = io.BytesIO()
    if max(picture.size) <= _LOSSLESS_PX:
        picture.save(held, "png", optimize=True)
        return held.getvalue(), "png"
    picture = picture.copy()
    picture.thumbnail((_LARGEST_PX, _LARGEST_PX), Image.Resampling.LANCZOS)
    picture.save(held, "webp", quality=88, method=2)  # half the time of the default, for 3% more bytes
    return held.getvalue(), "webp"


def data_address(image: Image.Image) -> str:
    """Give a picture as a ``data:`` address that any page can hold, see `encoded`.

    >>> from artaug.images.html import data_address
    >>> from PIL import Image
    >>> data_address(Image.new("RGB", (8, 8)))[:22]
    'data:image/png;base64,'
    """
    data, kind = encoded(image)
    return data_url(data, kind)


@dataclass(frozen=True)
class ShownCritique:
    """A critic's answer beside the picture it is about; in a notebook one sees the boxes and reads the words.

    Nothing in the words is taken for HTML.

    >>> import artaug as aa
    >>> from artaug.images.html import ShownCritique
    >>> from PIL import Image
    >>> answer = aa.Critique((aa.Suggestion(aa.Box(0, 0, 0.5, 1), "a <b>bright</b> window"),))
    >>> "a &lt;b&gt;bright&lt;/b&gt; window" in ShownCritique(Image.new("RGB", (64, 48)), answer)._repr_html_()
    True
    """

    image: Image.Image
    answer: Critique | Abstention
    prompt: str = ""
    """What the picture was drawn from; left out if empty."""

    def _repr_html_(self) -> str:
        suggestions = self.answer.suggestions if isinstance(self.answer, Critique) else ()
        scale = max(_SHOWN_PX // max(self.image.size), 1)
        drawn = draw_boxes(self.image, [one.box for one in suggestions], scale=scale)
        asked = "".join(
            f"<li><b style='background:{BOX_COLORS[number % len(BOX_COLORS)]};color:{DARK};padding:0 .4em'>{number + 1}</b> "
            f"{escape(one.prompt)}{_aside(one.reason)}</li>"
            for number, one in enumerate(suggestions)
        )
        words = (_line(self.prompt, "<i>{}</i>"), self._told(), f"<ul style='list-style:none;padding:0'>{asked}</ul>")
        return (
            "<div style='display:flex;gap:1em;align-items:flex-start'>"
            f"<img src='{data_address(drawn)}' alt='' style='max-width:50%'><div>{''.join(words)}</div></div>"
        )

    def _told(self) -> str:
        """What the critic said of the picture as a whole, or why it said nothing."""
        if isinstance(self.answer, Abstention):
            return _line(self.answer.reason, "<b>abstained</b>: {}")
        nothing = "" if self.answer.suggestions else "<p>asks for nothing</p>"
        repaired = "".join(f"<br>{escape(repair)}" for repair in self.answer.repairs)
        mended = (
            f"<details><summary>{len(self.answer.repairs)} repairs</summary>{repaired}</details>" if repaired else ""
        )
        return _line(self.answer.summary, "{}") + nothing + mended


def _line(words: str, around: str) -> str:
    return f"<p>{around.format(escape(words))}</p>" if words.strip() else ""


def _aside(words: str) -> str:
    return f"<br><small>{escape(words)}</small>" if words.strip() else ""
