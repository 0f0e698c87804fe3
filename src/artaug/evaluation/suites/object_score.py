"""Object checks as in GenEval: whether a detector finds the objects, their number, colours and relative positions."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, TypeAlias, final

import numpy as np
from PIL.Image import Image

from artaug._internal.annotations import Seam, checked
from artaug._internal.contracts import check_result
from artaug.errors import ContractError, InvalidValueError
from artaug.evaluation.suites.suite import Case, Clause, ObjectCheck, Outcome, Suite, SuiteScorer
from artaug.geometry import Box

if TYPE_CHECKING:
    from torch import nn

_TOLERANCE = 0.1  # share of both boxes' extents that an offset of the centres has to exceed, as in GenEval
_MIN_OFFSET_PX = 1e-3


@checked
@final
@dataclass(frozen=True, kw_only=True)
class Detection:
    """An object that a detector found.

    Raises:
        InvalidValueError: unless the confidence is in [0, 1].
    """

    label: str
    """Its class; one of the labels requested, or another."""
    box: Box
    confidence: float = 1.0
    """In [0, 1]."""
    color: str | None = None
    """Its colour, if the detector names colours."""
    mask: Image | None = None
    """Its segmentation, as large as the picture, 255 (or 1) inside, if the detector has one; for naming its colour."""

    def __post_init__(self) -> None:
        if not 0 <= self.confidence <= 1:
            raise InvalidValueError(f"{self!r:.200}: need a confidence in [0, 1].")


class Detector(Seam):
    """Finds objects in a picture. Subclass it around a model of your own and write `detect`.

    >>> from artaug import playground
    >>> from artaug.evaluation.suites import Detection, Detector
    >>> class Playground(Detector):
    ...     def detect(self, image, labels):
    ...         found = playground.detect(image)
    ...         return [Detection(label=thing.shape, box=thing.box, color=thing.color) for thing in found]
    >>> [detection.label for detection in Playground().detect(playground.render("a red cone", seed=0), ["cone"])]
    ['cone']
    """

    @property
    def name(self) -> str:
        """Its name in tables."""
        return type(self).__name__

    @abstractmethod
    def detect(self, image: Image, labels: Sequence[str]) -> Sequence[Detection]:
        """Find objects in a picture; their order does not matter.

        Args:
            image: the picture.
            labels: the classes to find. A detector of fixed classes may return all of its own.
        """


ColorClassifier: TypeAlias = Callable[[Image, Sequence[Detection]], Sequence[str]]
"""Names the colour of each of some objects in a picture, as the checks name it (red, orange, ...)."""


@checked
@final
@dataclass(frozen=True, kw_only=True)
class ObjectScore(SuiteScorer):
    """1 for a picture with everything that its prompt asks for, else 0, by the rules of GenEval (Ghosh et al. 2023).

    Of each class only the most confident detections are used, as many as the clause counts; all of them must have the
    clause's colour and its position.

    Raises:
        InvalidValueError: for a suite of questions.
    """

    suite: Suite
    """Its cases have an `ObjectCheck`."""
    detector: Detector
    colors: ColorClassifier | None = None
    """Names colours, such as ``artaug.scorers.ClipColors``; if None, the detector has to."""

    def __post_init__(self) -> None:
        if not all(isinstance(case.check, ObjectCheck) for case in self.suite.cases):
            raise InvalidValueError(f"{self.suite!r} has questions, which a detector cannot answer. Use QuestionScore.")

    @property
    def name(self) -> str:
        return f"{self.suite.name} ({self.detector.name})"

    @property
    def models(self) -> "Sequence[nn.Module]":
        return (*getattr(self.detector, "models", ()), *getattr(self.colors, "models", ()))

    def check_images(self, images: Sequence[Image], cases: Sequence[Case]) -> list[Outcome]:
        return [self._outcome(image, case) for image, case in zip(images, cases, strict=True)]

    def _outcome(self, image: Image, case: Case) -> Outcome:
        check = case.check
        if not isinstance(check, ObjectCheck):
            raise InvalidValueError(f"the case of {case.prompt!r} has questions: need a case of {self.suite.name}.")
        labels = list(dict.fromkeys(clause.label for clause in (*check.include, *check.exclude)))
        detections = [detection for detection in self._detect(image, labels) if detection.confidence > check.confidence]
        detections.sort(key=lambda detection: -detection.confidence)
        reasons: list[str] = []
        matches: list[list[Detection] | None] = []  # the detections of each clause; None if it is not met
        for clause in check.include:
            candidates = [detection for detection in detections if detection.label == clause.label][: clause.count]
            reason = self._failure(image, clause, candidates, matches)
            if reason is not None:
                reasons.append(reason)
            matches.append(candidates if reason is None else None)
        for clause in check.exclude:
            count = sum(detection.label == clause.label for detection in detections)
            if count >= clause.count:
                reasons.append(f"expected fewer than {clause.count} {clause.label}, found {count}")
        passed = not reasons
        return Outcome(float(passed), tuple(reasons), ((case.category, passed),))

    def _detect(self, image: Image, labels: Sequence[str]) -> list[Detection]:
        detections = list(self.detector.detect(image, labels))
        for detection in detections:
            check_result(self.detector.name, "detect", detection, of=Detection, inputs=f"the labels {labels}")
        return detections

    def _failure(
        self,
        image: Image,
        clause: Clause,
        detections: Sequence[Detection],
        matches: Sequence[Sequence[Detection] | None],
    ) -> str | None:
        """Why a clause is not met, or None. As in GenEval, a position is checked only if number and colour are right."""
        if len(detections) < clause.count:
            return f"expected {clause.count} {clause.label}, found {len(detections)}"
        if clause.color is not None:
            colors = self._name_colors(image, detections)
            if colors.count(clause.color) < clause.count:
                return f"expected {clause.count} {clause.color} {clause.label}, found {', '.join(colors)}"
        if clause.position is None:
            return None
        relation, target = clause.position
        targets = matches[target]
        if targets is None:
            return f"{clause.label} cannot be {relation} clause {target}, which is not met"
        for detection, other in product(detections, targets):
            sides = relations(detection.box, other.box, size_px=image.size)
            if relation not in sides:
                found = " and ".join(sorted(sides)) or "neither side clearly"
                return f"expected {clause.label} {relation} {other.label}, found {found}"
        return None

    def _name_colors(self, image: Image, detections: Sequence[Detection]) -> list[str]:
        if self.colors is None:
            named = [detection.color for detection in detections]
        else:
            named = list(self.colors(image, detections))
        colors = [color for color in named if isinstance(color, str)]
        if len(colors) != len(detections):
            raise ContractError(
                f"{named!r} are the colors of {len(detections)} {detections[0].label}: need one each. Give "
                "ObjectScore(colors=...), such as artaug.scorers.ClipColors, or a detector that names colors."
            )
        return colors


def relations(box: Box, other: Box, *, size_px: tuple[int, int]) -> frozenset[str]:
    """On which sides of ``other`` a box lies, by GenEval's rule: none, one, or two such as left of and above.

    With o the offset of the centres and e the sum of both extents, in pixels, an axis i counts where
    ``max(|o_i| - 0.1 e_i, 0) > 0.5 ||o||`` (Ghosh et al. 2023, appendix).

    >>> import artaug as aa
    >>> from artaug.evaluation.suites.object_score import relations
    >>> sorted(relations(aa.Box(0, 0, 0.2, 0.2), aa.Box(0.7, 0, 0.9, 0.2), size_px=(100, 100)))
    ['left of']
    """
    size = np.array(size_px)
    offset = (np.array(box.center) - np.array(other.center)) * size
    extents = np.array([box.width + other.width, box.height + other.height]) * size
    clear = np.maximum(np.abs(offset) - _TOLERANCE * extents, 0) * np.sign(offset)
    if (np.abs(clear) < _MIN_OFFSET_PX).all():
        return frozenset()
    x, y = clear / np.linalg.norm(offset)
    sides = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return frozenset(side for side, holds in sides.items() if holds)
