"""The arms of `benchmarks.online`: what the pictures of a round become to learn from, and by which objective."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeAlias

import artaug as aa
from artaug.critics import PhotometricCritic
from benchmarks._ablation_arms import ARMS as FRONT
from benchmarks._ablation_arms import DEFAULT, PLAIN, Arm, described, passes_a_step
from benchmarks._online_draws import ByJudge, ByScorer, Draws, NoticeableDifference, extremes, packed, unselected


@dataclass(frozen=True)
class Advice:
    """The loop: a critic, a regional redraw, the filter."""

    critic: aa.Critic = field(default_factory=PhotometricCritic)


Selection: TypeAlias = Callable[[Draws], Sequence[aa.ImagePair]]
"""Several draws of a prompt, and what is learned of them."""


@dataclass(frozen=True)
class OnlineArm:
    """A source of pairs, and a way to learn from them."""

    source: Advice | Selection
    learning: Arm

    def steps(self, passes: int, *, batch_size: int) -> int:
        """The steps that come nearest to a number of passes, at least two."""
        return max(2, round(passes / (passes_a_step(self.learning) * batch_size)))


PAIRED, PLAIN_PAIRED, DPO, NFT, FINE_TUNING = (
    FRONT[name] for name in (DEFAULT, "PairedDifference", "DPO", "NegativeAware, beta 1", PLAIN)
)
"""As tuned for the ablation."""
BEST, JUDGED = (partial(extremes, chooser=chooser) for chooser in (ByScorer(), ByJudge(NoticeableDifference())))
ALL, ALL_JUDGED = (partial(packed, chooser=chooser) for chooser in (ByScorer(), ByJudge(NoticeableDifference())))
BOXES = Advice(PhotometricCritic(contrast=0.15, whole_image=False))
"""A critic that speaks of things in the picture alone: one that speaks of the whole has no outside."""

LOOP = "critic"
NO_CHOICE = "no choice, fine-tuning"
ONE_CRITIC: Mapping[str, OnlineArm] = {LOOP: OnlineArm(Advice(), PAIRED)}
SELECTIONS: Mapping[str, OnlineArm] = {
    "best and worst, PairedPreference": OnlineArm(BEST, PAIRED),
    "best and worst, DPO": OnlineArm(BEST, DPO),
    "best alone, fine-tuning": OnlineArm(BEST, FINE_TUNING),
    "all with rewards, NegativeAware": OnlineArm(ALL, NFT),
    "judged: PairedPreference": OnlineArm(JUDGED, PAIRED),
    "judged: NegativeAware": OnlineArm(ALL_JUDGED, NFT),
}
"""Arms whose draws of a prompt are a number to try."""
DENSE: Mapping[str, OnlineArm] = {
    "boxes, PairedPreference": OnlineArm(BOXES, PAIRED),
    "boxes, PairedPreference, outside 0": OnlineArm(
        BOXES, replace(PAIRED, objective=aa.PairedPreference(outside_weight=0))
    ),
    "boxes, PairedPreference, composite": OnlineArm(
        BOXES, replace(PAIRED, objective=aa.PairedPreference(composite=True))
    ),
    "boxes, PairedDifference": OnlineArm(BOXES, PLAIN_PAIRED),
    "boxes, PairedDifference, outside 0": OnlineArm(
        BOXES, replace(PLAIN_PAIRED, objective=aa.PairedDifference(outside_weight=0))
    ),
    "boxes, PairedDifference, composite": OnlineArm(
        BOXES, replace(PLAIN_PAIRED, objective=aa.PairedDifference(composite=True))
    ),
}
"""Arms whose pairs have boxes, with and without them as weights."""
ARMS: Mapping[str, OnlineArm] = {
    **ONE_CRITIC,
    **SELECTIONS,
    NO_CHOICE: OnlineArm(unselected, FINE_TUNING),
    **DENSE,
}
ON_THE_CURVE = ("best and worst, PairedPreference", "best alone, fine-tuning", "all with rewards, NegativeAware")
"""The arms that are measured at every number of draws; the others at the usual one."""
IN_ROUNDS = (LOOP, *SELECTIONS)


def made_by(name: str) -> str:
    """What the rows of an arm are measured with: those of an arm that has changed since are measured again."""
    arm = ARMS[name]
    if isinstance(arm.source, Advice):
        source = described(arm.source)
    elif isinstance(arm.source, partial):
        chooser = arm.source.keywords["chooser"]
        source = f"{arm.source.func.__name__} {chooser!r}"
    else:
        source = unselected.__name__
    return f"{source}: {described(arm.learning)}"
