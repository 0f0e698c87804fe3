"""Finding out how a model writes boxes: it is shown rectangles whose places are known, and asked where they are."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from PIL import Image, ImageDraw

from artaug.critics.conversation import Message, in_words
from artaug.critics.coordinates import FAMILIES, Coordinates, Size, SmartResize
from artaug.critics.dialogue import Ask, Question, Reply
from artaug.critics.replies import parse_reply
from artaug.critique import Abstention, Critique
from artaug.geometry import Box

_Order: TypeAlias = Literal["xyxy", "yxyx", "xywh", "points"]
_GREY = (150, 150, 150)
_SHOWN: tuple[tuple[Size, str, tuple[float, float]], ...] = (  # a colour, and where its middle is
    ((640, 448), "red", (0.75, 0.25)),
    ((448, 640), "blue", (0.2, 0.7)),
    ((1536, 1024), "green", (0.8, 0.5)),
    ((512, 512), "yellow", (0.3, 0.85)),
    ((800, 320), "purple", (0.55, 0.2)),
    ((320, 800), "orange", (0.65, 0.8)),
)
_WIDEST = 0.25
_FITS = 0.5
_BEATS = 0.05


@dataclass(frozen=True)
class Target:
    """A grey picture with one rectangle in it."""

    image: Image.Image
    colour: str
    box: Box


@dataclass(frozen=True)
class Probe:
    """How well each convention explains where a model said some rectangles are.

    Its text is a table with a verdict.
    """

    asked: Coordinates
    """The convention that the critic has, and that the model was asked to use."""
    overlaps: Mapping[Coordinates, float]
    """The mean intersection over union of the boxes as read by each convention with the true ones, the best first."""
    replies: tuple[str, ...]
    """What the model said, or why it said nothing, a text for each rectangle."""

    @property
    def best(self) -> Coordinates:
        """The convention that explains the replies best; the critic's own where it does so too."""
        return next(iter(self.overlaps))

    @property
    def found(self) -> bool:
        """Whether some convention explains them at all: an overlap of at least 0.5."""
        return self.overlaps[self.best] >= _FITS

    @property
    def fits(self) -> bool:
        """Whether the critic's own convention is the right one, as far as this can tell."""
        return self.found and self.overlaps[self.asked] >= self.overlaps[self.best] - _BEATS

    def __str__(self) -> str:
        rows = [f"{overlap:5.2f}  {told(convention)}" for convention, overlap in list(self.overlaps.items())[:5]]
        if self.asked not in list(self.overlaps)[:5]:
            rows.append(f"{self.overlaps[self.asked]:5.2f}  {told(self.asked)}")
        return "\n".join(("IoU    convention", *rows, self._verdict()))

    def _verdict(self) -> str:
        if not self.found:
            return f"No convention fits: the model does not find rectangles, or writes none. It said {self.replies[0]!r:.120}."
        if self.fits:
            return f"The critic's own convention fits: {told(self.asked)}."
        return f"The critic reads {told(self.asked)}, and the model writes {told(self.best)}. Use {self.best!r}."


def probe(ask: Ask, asked: Coordinates) -> Probe:
    """Show a model rectangles and compare what it says by every convention.

    Args:
        ask: puts questions to the model.
        asked: the convention it is asked to use, which it may not keep to.
    """
    shown = targets(side=2 * asked.reach if asked.order == "points" else _WIDEST)
    heard = ask([_question(target, asked) for target in shown])
    replies = [reply.text if isinstance(reply, Reply) else reply.reason for reply in heard]
    overlaps = {
        convention: sum(_overlap(reply, target, convention) for reply, target in zip(heard, shown, strict=True))
        / len(shown)
        for convention in candidates(asked)
    }
    ranked = sorted(overlaps.items(), key=lambda one: -round(one[1], 3))
    return Probe(asked, dict(ranked), tuple(replies))


def targets(*, side: float) -> list[Target]:
    """The pictures of a probe, with rectangles that are ``side`` of the picture wide and high (at most a half)."""
    return [_target(size, colour, middle, min(side, 0.5)) for size, colour, middle in _SHOWN]


def candidates(asked: Coordinates) -> list[Coordinates]:
    """The conventions that are compared: the critic's own first, then every sensible one."""
    orders: tuple[_Order, ...] = ("points",) if asked.order == "points" else ("xyxy", "yxyx", "xywh")
    known: list[Coordinates] = [asked, *FAMILIES.values()]
    for order in orders:
        known += (Coordinates(unit, order=order) for unit in ("thousandths", "relative", "percent", "pixels"))
        known += (Coordinates(unit, order=order, frame="padded") for unit in ("thousandths", "relative", "pixels"))
        known.append(Coordinates("pixels", order=order, resize=SmartResize()))
    alike = (replace(one, key=asked.key, reach=asked.reach) for one in known if one.order in orders)
    return list(dict.fromkeys(alike))


def told(coordinates: Coordinates) -> str:
    """A convention in a few words.

    >>> from artaug.critics import Coordinates
    >>> from artaug.critics.probing import told
    >>> told(Coordinates("relative", order="yxyx", frame="padded"))
    'relative, yxyx, of the padded picture'
    """
    resized = ", of the resized picture" if coordinates.resize else ""
    framed = "" if coordinates.frame == "whole" else f", of the {coordinates.frame} picture"
    return f"{coordinates.unit}, {coordinates.order}{framed}{resized}"


def _target(size: Size, colour: str, middle: tuple[float, float], side: float) -> Target:
    edges = [
        round((min(max(at, side / 2), 1 - side / 2) + sign * side / 2) * length)
        for sign in (-1, 1)
        for at, length in zip(middle, size, strict=True)
    ]
    left, top, right, bottom = edges
    image = Image.new("RGB", size, _GREY)
    ImageDraw.Draw(image).rectangle((left, top, right - 1, bottom - 1), fill=colour)
    return Target(image, colour, Box.from_pixels(left, top, right, bottom, size=size))


def _question(target: Target, asked: Coordinates) -> Question:
    text = (
        f"There is one {target.colour} rectangle in this picture. Say where it is, with JSON only, as "
        f'{{"prompt": "the {target.colour} rectangle", "{asked.key}": [...]}}, with '
        f"{in_words(asked, target.image.size)}."
    )
    return Question((Message("user", text, target.image),))


def _overlap(reply: Reply | Abstention, target: Target, convention: Coordinates) -> float:
    if isinstance(reply, Abstention):
        return 0.0
    read = parse_reply(reply.text, size=target.image.size, coordinates=convention)
    return read.suggestions[0].box.iou(target.box) if isinstance(read, Critique) and read.suggestions else 0.0
