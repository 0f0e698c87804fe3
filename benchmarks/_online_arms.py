"""The arms of `benchmarks.online`: what the pictures of a round become to learn from, and by which objective."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeAlias

import artaug as aa
from artaug.critics import PhotometricCritic
from benchmarks._ablation_arms import Arm, described, passes_a_step
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


PAIRED = Arm(aa.PairedPreference(anchor=0.05), 4e-3)
DPO = Arm(aa.DirectPreference(beta=5, anchor=0.1), 2e-3)
NFT = Arm(aa.NegativeAware(beta=1), 1e-3)
FINE_TUNING = Arm(aa.SupervisedFineTuning(), 4e-3)
BEST, JUDGED = (partial(extremes, chooser=chooser) for chooser in (ByScorer(), ByJudge(NoticeableDifference())))
ALL, ALL_JUDGED = (partial(packed, chooser=chooser) for chooser in (ByScorer(), ByJudge(NoticeableDifference())))
BOXES = Advice(PhotometricCritic(whole_image=False))
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
        BOXES, Arm(aa.PairedPreference(anchor=0.05, outside_weight=0), 4e-3)
    ),
    "boxes, PairedPreference, composite": OnlineArm(BOXES, Arm(aa.PairedPreference(anchor=0.05, composite=True), 4e-3)),
    "boxes, PairedDifference": OnlineArm(BOXES, Arm(aa.PairedDifference(), 4e-3)),
    "boxes, PairedDifference, outside 0": OnlineArm(BOXES, Arm(aa.PairedDifference(outside_weight=0), 4e-3)),
    "boxes, PairedDifference, composite": OnlineArm(BOXES, Arm(aa.PairedDifference(composite=True), 4e-3)),
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
