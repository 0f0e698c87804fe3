"""The judges of a comparison: the base's pictures wait on disk, and those of each candidate are judged against them."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import nan
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from PIL.Image import Image

from artaug._internal.images import as_rgb
from artaug.critique import Abstention
from artaug.errors import ScoringError
from artaug.evaluation.comparison.comparison import Arm
from artaug.evaluation.comparison.scoring_log import ScoringLog
from artaug.image_files import ImageFile, ImageFolder, LoadedImages
from artaug.pairwise import Judgment, PairwiseJudge, judge_images
from artaug.placement import Placement

CHANCE = 0.5
"""The score of the base's pictures: their win rate against themselves."""
_SCORES = {"first": 1.0, "tie": CHANCE, "second": 0.0}


@dataclass(frozen=True)
class ComparisonJudges:
    """What judges of a comparison have said so far."""

    judges: tuple[PairwiseJudge, ...]
    base: list[Image | ImageFile]
    """The base's pictures, one a seed, as far as they are drawn."""
    folder: ImageFolder | None
    """Where they wait; None if they were drawn before."""
    judgments: dict[str, dict[str, list[Judgment | None]]] = field(default_factory=dict)
    """By candidate and judge, one a picture: the candidate's picture is the first of the two. None where the judge raised."""

    @classmethod
    @contextmanager
    def opened(
        cls, judges: Sequence[PairwiseJudge], base: Arm | None, *, pictures: int
    ) -> "Iterator[ComparisonJudges]":
        """The judges for a ``with`` block, without an answer yet.

        Args:
            judges: perhaps none.
            base: the base if it was drawn before, with all of its pictures; else None.
            pictures: of an arm.
        """
        if base is not None or not judges:
            yield cls(tuple(judges), [] if base is None else [*base.images], None)
            return
        with TemporaryDirectory(prefix="artaug-compare-") as folder:
            blank = ImageFile(Path(folder) / "not-drawn-yet", None, (1, 1))
            yield cls(tuple(judges), [blank] * pictures, ImageFolder(Path(folder)))

    def keep(self, batch: slice, images: Sequence[Image]) -> None:
        """Keep pictures of the base for the candidates to come."""
        if self.folder is not None:
            self.base[batch] = self.folder.add_all(images)

    def judge(
        self,
        batch: slice,
        images: Sequence[Image],
        prompts: Sequence[str],
        *,
        seeds: Sequence[int],
        arm: str,
        log: ScoringLog,
        placement: Placement,
    ) -> None:
        """Judge pictures of a candidate against the base's of the same seeds."""
        # What was on disk is in RGB, whatever was drawn, and a judge is to see both pictures alike.
        rivals, images = ([as_rgb(image) for image in side] for side in (LoadedImages(self.base[batch]), images))
        for judge in self.judges:
            by_picture = self.judgments.setdefault(arm, {}).setdefault(judge.name, [None] * len(self.base))

            def ask(part: slice, judge: PairwiseJudge = judge) -> list[Judgment]:
                return judge_images(judge, images[part], rivals[part], prompts[part])

            with placement.stage(judge):
                by_picture[batch] = log.ask(judge.name, ask, prompts, seeds=seeds, arm=arm)

    def base_scores(self) -> dict[str, tuple[float, ...]]:
        """The scores of the base, by judge."""
        return {judge.name: (CHANCE,) * len(self.base) for judge in self.judges}

    def candidate_scores(self, arm: str) -> dict[str, tuple[float, ...]]:
        """The scores of a candidate, by judge: 1 for a picture that won, 0.5 for a tie, 0 for one that lost, NaN for neither."""
        return {name: tuple(map(_score, judgments)) for name, judgments in self.judgments.get(arm, {}).items()}

    def check_answered(self, arms: Mapping[str, Arm], prompts: int) -> None:
        """Refuse a judge that had so few answers that no interval can be computed.

        Raises:
            ScoringError: naming the judge and the reason.
        """
        for arm, judgments in self.judgments.items():
            for name, by_picture in judgments.items():
                answered = arms[arm].by_prompt(name, prompts)
                silent = [judgment for judgment in by_picture if isinstance(judgment, Abstention)]
                if silent and np.isfinite(answered).sum() < 2:
                    raise ScoringError(
                        f"the judge {name!r} had no answer about {len(silent)} of {len(by_picture)} pictures of {arm!r}, and needs "
                        f"one for all pictures of at least 2 prompts. The first reason: {silent[0].reason}"
                    )


def _score(judgment: Judgment | None) -> float:
    return nan if judgment is None or isinstance(judgment, Abstention) else _SCORES[judgment.winner]
