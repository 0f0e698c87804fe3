"""Checks of objects as GenEval makes them: are they there, so many, of that colour, on that side of each other?"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias, final

import numpy as np
from PIL.Image import Image

from artaug.errors import ContractError, InvalidValueError
from artaug.evaluation.suites.suite import Case, Clause, ObjectCheck, Outcome, Suite, SuiteScorer
from artaug.geometry import Box

_NEAR = 0.1
_NOWHERE_PX = 1e-3


@final
@dataclass(frozen=True, kw_only=True)
class Detection:
    """A thing that a detector found.

    Raises:
        InvalidValueError: unless the confidence is in [0, 1].
    """

    label: str
    """What it is; of the labels asked for, or another."""
    box: Box
    confidence: float = 1.0
    """How sure the detector is, in [0, 1]."""
    colour: str | None = None
    """Its colour, if the detector tells colours."""
    mask: Image | None = None
    """Where it is, as large as the picture and 255 (or 1) there, if the detector tells; colours are looked for there."""

    def __post_init__(self) -> None:
        if not 0 <= self.confidence <= 1:
            raise InvalidValueError(f"{self!r:.200}: need a confidence in [0, 1].")


class Detector(ABC):
    """Finds things in a picture. Subclass it around a model of your own and write `detect`.

    >>> from artaug import playground
    >>> from artaug.evaluation.suites import Detection, Detector
    >>> class Playground(Detector):
    ...     def detect(self, image, labels):
    ...         return [Detection(label=one.shape, box=one.box, colour=one.color) for one in playground.detect(image)]
    >>> [found.label for found in Playground().detect(playground.render("a red cone", seed=0), ["cone"])]
    ['cone']
    """

    @property
    def name(self) -> str:
        """What tables call it."""
        return type(self).__name__

    @abstractmethod
    def detect(self, image: Image, labels: Sequence[str]) -> Sequence[Detection]:
        """Find things in a picture, in any order.

        Args:
            image: the picture.
            labels: what is asked for. A detector of fixed classes may look for all of its own.
        """


Colours: TypeAlias = Callable[[Image, Sequence[Detection]], Sequence[str]]
"""Names the colour of each of some things in a picture, as the checks call it (red, orange, ...)."""


@final
@dataclass(frozen=True, kw_only=True)
class ObjectScore(SuiteScorer):
    """1 for a picture with everything its prompt asks for, else 0, by the rules of GenEval (Ghosh et al. 2023).

    Of each kind the surest detections are looked at, as many as asked for; they must all have the colour, and all lie on
    the side, that is asked for.

    Raises:
        InvalidValueError: for a suite that asks questions.
    """

    suite: Suite
    """Its cases have an `ObjectCheck`."""
    detector: Detector
    colours: Colours | None = None
    """Names colours, such as ``artaug.scorers.ClipColors``; if None, the detector does."""

    def __post_init__(self) -> None:
        if not all(isinstance(case.check, ObjectCheck) for case in self.suite.cases):
            raise InvalidValueError(
                f"{self.suite!r} asks questions, which a detector cannot answer. Use QuestionScore."
            )

    @property
    def name(self) -> str:
        return f"{self.suite.name} ({self.detector.name})"

    def outcomes(self, images: Sequence[Image], cases: Sequence[Case]) -> list[Outcome]:
        return [self._outcome(image, case) for image, case in zip(images, cases, strict=True)]

    def _outcome(self, image: Image, case: Case) -> Outcome:
        check = case.check
        if not isinstance(check, ObjectCheck):
            raise InvalidValueError(f"the case of {case.prompt!r} asks questions: need a case of {self.suite.name}.")
        labels = list(dict.fromkeys(clause.label for clause in (*check.include, *check.exclude)))
        found = [one for one in self._seen(image, labels) if one.confidence > check.confidence]
        found.sort(key=lambda one: -one.confidence)
        reasons: list[str] = []
        groups: list[list[Detection] | None] = []
        for clause in check.include:
            group = [one for one in found if one.label == clause.label][: clause.count]
            wrong = self._wrong(image, clause, group, groups)
            reasons += wrong
            groups.append(None if wrong else group)
        for clause in check.exclude:
            count = sum(one.label == clause.label for one in found)
            if count >= clause.count:
                reasons.append(f"expected fewer than {clause.count} {clause.label}, found {count}")
        right = not reasons
        return Outcome(float(right), tuple(reasons), ((case.category, right),))

    def _seen(self, image: Image, labels: Sequence[str]) -> list[Detection]:
        found = list(self.detector.detect(image, labels))
        for one in found:
            if not isinstance(one, Detection):
                raise ContractError(
                    f"{self.detector.name} returned {type(one).__name__}: {one!r:.120}. Expected artaug.evaluation.suites.Detection."
                )
        return found

    def _wrong(
        self, image: Image, clause: Clause, group: Sequence[Detection], groups: Sequence[Sequence[Detection] | None]
    ) -> list[str]:
        """What is wrong with the things found for a clause; position is only looked at where all else is right."""
        if len(group) < clause.count:
            return [f"expected {clause.count} {clause.label}, found {len(group)}"]
        if clause.colour is not None:
            colours = self._colours(image, group)
            if colours.count(clause.colour) < clause.count:
                return [f"expected {clause.count} {clause.colour} {clause.label}, found {', '.join(colours)}"]
        if clause.position is None:
            return []
        relation, target = clause.position
        others = groups[target]
        if others is None:
            return [f"nothing for {clause.label} to be {relation}, since clause {target} is not met"]
        for one in group:
            for other in others:
                sides = relations(one.box, other.box, size_px=image.size)
                if relation not in sides:
                    return [f"expected {clause.label} {relation} {other.label}, found {_listed(sides)}"]
        return []

    def _colours(self, image: Image, group: Sequence[Detection]) -> list[str]:
        named = [one.colour for one in group] if self.colours is None else list(self.colours(image, group))
        colours = [colour for colour in named if isinstance(colour, str)]
        if len(colours) != len(group):
            raise ContractError(
                f"{named!r} are the colours of {len(group)} {group[0].label}: need one each. Give ObjectScore(colours=...), "
                "such as artaug.scorers.ClipColors, or a detector that tells colours."
            )
        return colours


def relations(one: Box, other: Box, *, size_px: tuple[int, int]) -> frozenset[str]:
    """On which sides of another box a box lies, as GenEval has it: none, one, or two such as left of and above.

    The offset of the centres, less a tenth of both extents, has to make up more than half of their distance.

    >>> import artaug as aa
    >>> from artaug.evaluation.suites.object_score import relations
    >>> sorted(relations(aa.Box(0, 0, 0.2, 0.2), aa.Box(0.7, 0, 0.9, 0.2), size_px=(100, 100)))
    ['left of']
    """
    size = np.array(size_px)
    offset = (np.array(one.center) - np.array(other.center)) * size
    extents = np.array([one.width + other.width, one.height + other.height]) * size
    clear = np.maximum(np.abs(offset) - _NEAR * extents, 0) * np.sign(offset)
    if (np.abs(clear) < _NOWHERE_PX).all():
        return frozenset()
    across, down = clear / np.linalg.norm(offset)
    sides = {"left of": across < -0.5, "right of": across > 0.5, "above": down < -0.5, "below": down > 0.5}
    return frozenset(side for side, there in sides.items() if there)


def _listed(sides: frozenset[str]) -> str:
    return " and ".join(sorted(sides)) or "neither side clearly"
