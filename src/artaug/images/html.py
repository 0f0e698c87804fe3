"""Images in HTML and notebooks: encoding for pages, contact sheets, and critiques drawn on their image."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from PIL import Image, ImageDraw, ImageFont

from artaug._internal.annotations import checked
from artaug._internal.images import as_rgb, data_url
from artaug.critique import Abstention, Critique
from artaug.drawing import BOX_COLORS, DARK, draw_boxes, draw_heatmap
from artaug.errors import InvalidValueError
from artaug.image_files import ImageFile

__all__ = [
    "BOX_COLORS",
    "CritiqueView",
    "contact_sheet",
    "draw_boxes",
    "draw_heatmap",
    "encode_image",
    "image_data_url",
]

_CAPTION_PX = 15
_LOSSLESS_PX = 256
_WEB_PX = 768
_VIEW_PX = 512


@checked
def contact_sheet(
    images: Sequence[Image.Image], *, columns: int | None = None, labels: Sequence[str] | None = None, scale: int = 3
) -> Image.Image:
    """Arrange images of one size in a grid, enlarged, each with a label below it.

    Args:
        images: at least one; they are not changed.
        columns: images in a row; None for all in one row.
        labels: one for each image; None for no labels.
        scale: factor of the enlargement, at least 1.

    Raises:
        InvalidValueError: without images, for images of several sizes, or if there is not one label for each image.

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
        sheet.paste(as_rgb(image).resize((width, height), Image.Resampling.BICUBIC), (left, top))
        if labels is not None:
            pen.text((left + 2, top + height + 4), labels[number], fill=DARK, font=font)
    return sheet


@checked
def encode_image(image: Image.Image) -> tuple[bytes, str]:
    """Encode an image for a page: the content of the file, and its format, ``png`` or ``webp``.

    Up to 256 pixels a side it is a lossless PNG; a larger image becomes a WebP of at most 768 pixels a side. The same
    image gives the same bytes.

    >>> from artaug.images.html import encode_image
    >>> from PIL import Image
    >>> encode_image(Image.new("RGB", (300, 200)))[1]
    'webp'
    """
    image = as_rgb(image)
    buffer = io.BytesIO()
    if max(image.size) <= _LOSSLESS_PX:
        image.save(buffer, "png", optimize=True)
        return buffer.getvalue(), "png"
    image.thumbnail((_WEB_PX, _WEB_PX), Image.Resampling.LANCZOS)
    image.save(buffer, "webp", quality=88, method=2)  # half the time of the default, for 3% more bytes
    return buffer.getvalue(), "webp"


@checked
def image_data_url(image: Image.Image) -> str:
    """Encode an image as a ``data:`` URL, see `encode_image`.

    >>> from artaug.images.html import image_data_url
    >>> from PIL import Image
    >>> image_data_url(Image.new("RGB", (8, 8)))[:22]
    'data:image/png;base64,'
    """
    return data_url(*encode_image(image))


@checked
@dataclass(frozen=True)
class CritiqueView:
    """A critique beside its image; a notebook shows the boxes on the image and the texts beside it.

    All texts are escaped.

    >>> import artaug as aa
    >>> from artaug.images.html import CritiqueView
    >>> from PIL import Image
    >>> answer = aa.Critique((aa.Suggestion(aa.Box(0, 0, 0.5, 1), "a <b>bright</b> window"),))
    >>> "a &lt;b&gt;bright&lt;/b&gt; window" in CritiqueView(Image.new("RGB", (64, 48)), answer)._repr_html_()
    True
    """

    image: Image.Image | ImageFile
    """A file is read when it is shown."""
    answer: Critique | Abstention
    prompt: str = ""
    """Prompt of the image; not shown if empty."""

    def _repr_html_(self) -> str:
        suggestions = self.answer.suggestions if isinstance(self.answer, Critique) else ()
        image = self.image.load() if isinstance(self.image, ImageFile) else self.image
        scale = max(_VIEW_PX // max(image.size), 1)
        annotated = draw_boxes(image, [suggestion.box for suggestion in suggestions], scale=scale)
        items = "".join(
            f"<li><b style='background:{BOX_COLORS[index % len(BOX_COLORS)]};color:{DARK};padding:0 .4em'>{index + 1}</b> "
            f"{escape(suggestion.prompt)}{_small(suggestion.reason)}</li>"
            for index, suggestion in enumerate(suggestions)
        )
        prompt = _paragraph(self.prompt, "<i>{}</i>")
        return (
            "<div style='display:flex;gap:1em;align-items:flex-start'>"
            f"<img src='{image_data_url(annotated)}' alt='' style='max-width:50%'>"
            f"<div>{prompt}{self._summary()}<ul style='list-style:none;padding:0'>{items}</ul></div></div>"
        )

    def _summary(self) -> str:
        """The critique's summary and repairs, or the reason of an abstention."""
        if isinstance(self.answer, Abstention):
            return _paragraph(self.answer.reason, "<b>abstained</b>: {}")
        empty = "" if self.answer.suggestions else "<p>no suggestions</p>"
        repaired = "".join(f"<br>{escape(repair)}" for repair in self.answer.repairs)
        mended = (
            f"<details><summary>repairs: {len(self.answer.repairs)}</summary>{repaired}</details>" if repaired else ""
        )
        return _paragraph(self.answer.summary, "{}") + empty + mended


def _paragraph(text: str, template: str) -> str:
    return f"<p>{template.format(escape(text))}</p>" if text.strip() else ""


def _small(text: str) -> str:
    return f"<br><small>{escape(text)}</small>" if text.strip() else ""
