"""Probing how a model writes boxes, with rectangles whose positions are known."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from PIL import Image, ImageDraw

from artaug._internal.annotations import checked
from artaug.critics.conversation import coordinates_instruction
from artaug.critics.coordinates import FAMILIES, Coordinates, Size, SmartResize
from artaug.critics.dialogue import Generate
from artaug.critics.replies import parse_reply
from artaug.critique import Abstention
from artaug.errors import CriticError
from artaug.geometry import Box
from artaug.serving.chat import ChatReply, ChatRequest, Message

_Order: TypeAlias = Literal["xyxy", "yxyx", "xywh", "points"]
_GREY = (150, 150, 150)
_PROBES: tuple[tuple[Size, str, tuple[float, float]], ...] = (  # picture size, color and center of the rectangle
    ((640, 448), "red", (0.75, 0.25)),
    ((448, 640), "blue", (0.2, 0.7)),
    ((1536, 1024), "green", (0.8, 0.5)),
    ((512, 512), "yellow", (0.3, 0.85)),
    ((800, 320), "purple", (0.55, 0.2)),
    ((320, 800), "orange", (0.65, 0.8)),
)
_DEFAULT_SIDE = 0.25
_MIN_IOU = 0.5
_IOU_MARGIN = 0.05  # a convention this much worse than the best still counts as right
_ROWS = 5


@dataclass(frozen=True)
class ProbeTarget:
    """A grey picture with one rectangle in it."""

    image: Image.Image
    color: str
    box: Box


@checked
@dataclass(frozen=True)
class ProbeResult:
    """How well each convention explains the boxes that a model gave for known rectangles.

    Printed, it is a table with a conclusion.
    """

    requested: Coordinates
    """The convention of the critic, which the model was asked to use."""
    mean_iou: Mapping[Coordinates, float]
    """The mean intersection over union of the decoded boxes with the true ones, by convention, the best first."""
    replies: tuple[str, ...]
    """For each rectangle the model's reply, or the reason why there is none."""

    @property
    def best(self) -> Coordinates:
        """The convention that explains the replies best; the critic's own if it is as good as any other."""
        return next(iter(self.mean_iou))

    @property
    def conclusive(self) -> bool:
        """Whether any convention explains the replies: a mean IoU of at least 0.5."""
        return self.mean_iou[self.best] >= _MIN_IOU

    @property
    def fits(self) -> bool:
        """Whether the critic's own convention explains them, at most 0.05 worse than the best."""
        return self.conclusive and self.mean_iou[self.requested] >= self.mean_iou[self.best] - _IOU_MARGIN

    def __str__(self) -> str:
        rows = [f"{iou:5.2f}  {describe(convention)}" for convention, iou in list(self.mean_iou.items())[:_ROWS]]
        if self.requested not in list(self.mean_iou)[:_ROWS]:
            rows.append(f"{self.mean_iou[self.requested]:5.2f}  {describe(self.requested)}")
        if not self.conclusive:
            conclusion = (
                "No convention fits: the model does not find the rectangles, or writes no boxes. Its first reply is "
                f"{self.replies[0]!r:.120}."
            )
        elif self.fits:
            conclusion = f"The critic's own convention fits: {describe(self.requested)}."
        else:
            conclusion = (
                f"The critic expects {describe(self.requested)}, but the model writes {describe(self.best)}. "
                f"Use {self.best!r}."
            )
        return "\n".join(("IoU    convention", *rows, conclusion))


def probe_coordinates(generate: Generate, requested: Coordinates) -> ProbeResult:
    """Show rectangles to a model and compare the boxes it gives with the true ones, by every convention.

    Args:
        generate: sends requests to the model.
        requested: the convention that the model is asked to use; it may write another.

    Raises:
        CriticError: if the model answers no request.
    """
    targets = probe_targets(side=2 * requested.point_radius if requested.order == "points" else _DEFAULT_SIDE)
    received = dict(generate([_request(target, requested) for target in targets]))
    replies = [received[index] for index in range(len(targets))]
    failures = [reply.reason for reply in replies if isinstance(reply, Abstention)]
    if len(failures) == len(replies):
        raise CriticError(
            f"the model answered none of the {len(replies)} questions of the probe: {failures[0]}. Of a server, see that it "
            "runs, that base_url is its address with the path, which mostly ends in /v1, and that model is a name it serves."
        )
    mean_iou = {
        convention: sum(_iou(reply, target, convention) for reply, target in zip(replies, targets, strict=True))
        / len(targets)
        for convention in candidate_conventions(requested)
    }
    ranked = sorted(mean_iou.items(), key=lambda item: -round(item[1], 3))
    texts = tuple(reply.text if isinstance(reply, ChatReply) else reply.reason for reply in replies)
    return ProbeResult(requested, dict(ranked), texts)


def probe_targets(*, side: float) -> list[ProbeTarget]:
    """The pictures of a probe; each side of a rectangle is ``side`` of the picture's (at most a half)."""
    side = min(side, 0.5)
    targets = []
    for size, color, center in _PROBES:
        left, top, right, bottom = (
            round((min(max(middle, side / 2), 1 - side / 2) + sign * side / 2) * length)
            for sign in (-1, 1)
            for middle, length in zip(center, size, strict=True)
        )
        image = Image.new("RGB", size, _GREY)
        ImageDraw.Draw(image).rectangle((left, top, right - 1, bottom - 1), fill=color)
        targets.append(ProbeTarget(image, color, Box.from_pixels(left, top, right, bottom, size=size)))
    return targets


def candidate_conventions(requested: Coordinates) -> list[Coordinates]:
    """The conventions that are compared: the requested one first, then every plausible one."""
    orders: tuple[_Order, ...] = ("points",) if requested.order == "points" else ("xyxy", "yxyx", "xywh")
    conventions: list[Coordinates] = [requested, *FAMILIES.values()]
    for order in orders:
        conventions += (Coordinates(unit, order=order) for unit in ("thousandths", "relative", "percent", "pixels"))
        conventions += (
            Coordinates(unit, order=order, frame="padded") for unit in ("thousandths", "relative", "pixels")
        )
        conventions.append(Coordinates("pixels", order=order, resize=SmartResize()))
    # The key and the radius do not matter for the comparison: make them equal, so that duplicates are found.
    comparable = (
        replace(convention, key=requested.key, point_radius=requested.point_radius)
        for convention in conventions
        if convention.order in orders
    )
    return list(dict.fromkeys(comparable))


def describe(coordinates: Coordinates) -> str:
    """A convention in a few words.

    >>> from artaug.critics import Coordinates
    >>> from artaug.critics.probing import describe
    >>> describe(Coordinates("relative", order="yxyx", frame="padded"))
    'relative, yxyx, of the padded picture'
    """
    resized = ", of the resized picture" if coordinates.resize else ""
    framed = "" if coordinates.frame == "whole" else f", of the {coordinates.frame} picture"
    return f"{coordinates.unit}, {coordinates.order}{framed}{resized}"


def _request(target: ProbeTarget, requested: Coordinates) -> ChatRequest:
    text = (
        f"There is one {target.color} rectangle in this picture. Say where it is, with JSON only, as "
        f'{{"prompt": "the {target.color} rectangle", "{requested.key}": [...]}}, with '
        f"{coordinates_instruction(requested, target.image.size)}."
    )
    return ChatRequest((Message("user", text, target.image),))


def _iou(reply: ChatReply | Abstention, target: ProbeTarget, convention: Coordinates) -> float:
    if isinstance(reply, Abstention):
        return 0.0
    answer = parse_reply(reply.text, size=target.image.size, coordinates=convention)
    if isinstance(answer, Abstention) or not answer.suggestions:
        return 0.0
    return answer.suggestions[0].box.iou(target.box)
