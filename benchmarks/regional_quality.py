"""Do regions do what they say, in the playground: the right things in the right places, and nothing else changed?"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from matplotlib import colormaps
from matplotlib.figure import Figure
from PIL.Image import Image

import artaug as aa
from artaug import playground
from artaug.regional import ELIGEN, INSTANTX, INVOKEAI, OPEN, Guide, Isolation
from artaug.scorers import Chroma, Contrast, Exposure, Sharpness
from benchmarks import _layouts as world
from benchmarks import _record as record
from benchmarks.playground import drawn

FAITHFUL = tuple(playground.Accuracy(of) for of in ("color", "shape", "place"))
JUDGES: Mapping[str, aa.Scorer] = {
    "vivid": Chroma(),
    "softly lit": Exposure(),
    "glowing": Contrast(),
    "sharp": Sharpness(),
}
"""What each adjective is about."""
LONG_PROMPT = 32
"""Tokens of four things and a setting."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A way of saying what is to be where."""

    guide: Guide | None = None
    """None for none: one long prompt says everything."""
    weight: float = 1.0
    """Of every region."""
    feather: float = 0.0
    """Of every region."""
    told: bool = False
    """Whether the plan's prompt names the things as well, as the demonstrations of some systems have it."""


def attending(isolation: Isolation, *, weight: float = 1.0, feather: float = 0.0, told: bool = False) -> Arm:
    """Regional attention."""
    return Arm(guide=aa.RegionalAttention(isolation=isolation), weight=weight, feather=feather, told=told)


ARMS: Mapping[str, Arm] = {
    "long prompt": Arm(),
    "OutputMix": Arm(guide=aa.OutputMix()),
    "OutputMix, weight 4": Arm(guide=aa.OutputMix(), weight=4),
    "OPEN": attending(OPEN),
    "OPEN, weight 4": attending(OPEN, weight=4),
    "OPEN, base 0": attending(replace(OPEN, base_weight=0.0)),
    "ELIGEN": attending(ELIGEN),
    "ELIGEN, base 0.3": attending(replace(ELIGEN, base_weight=0.3)),
    "ELIGEN, base 0": attending(replace(ELIGEN, base_weight=0.0)),
    "INSTANTX": attending(INSTANTX),
    "INVOKEAI": attending(INVOKEAI),
    "background, base 0": attending(Isolation(image_to_image="background")),
    "ELIGEN, base 0.3, feathered": attending(replace(ELIGEN, base_weight=0.3), feather=0.05),
    "OutputMix, told": Arm(guide=aa.OutputMix(), told=True),
    "ELIGEN, told": attending(ELIGEN, told=True),
    "INSTANTX, told": attending(INSTANTX, told=True),
}
"""Every preset as it is, and what becomes of it with other weights, soft edges, or a plan's prompt that says more."""

QUICK = ("long prompt", "OutputMix", "ELIGEN")


def measure(*, quick: bool) -> list[record.Row]:
    """Draw random layouts, and an adjective in a box, in every way; report what appeared where, and what else changed.

    Task ``things``: two to four regions, side by side in a plain scene, ask for a thing each. ``color`` is the share of
    regions in which a thing of the asked colour stands, ``thing`` of those where it has the asked shape too, ``mixed`` of
    those with another region's colour in them; ``scene`` the share of pictures whose sky is still the plan's.

    Task ``adjective``, which is ArtAug's: a region around one thing asks for the same caption and one adjective. ``gain``
    is the rise of what the adjective is about inside the box, over the rise where the whole picture gets the adjective;
    ``color``, ``shape`` and ``place`` are shares of what the caption asks for that the picture shows.

    In both, ``outside`` is the mean change of pixels in [0, 1] more than half a token away from all regions, against the
    plain picture of the plan's prompt and of the same seed, and ``seam`` the mean gradient across the regions' borders
    over that of the whole picture.
    """
    arms = {name: ARMS[name] for name in QUICK} if quick else ARMS
    return rows_of(arms, count=9 if quick else 210)


def rows_of(arms: Mapping[str, Arm], *, count: int) -> list[record.Row]:
    """The rows of both tasks, with so many pictures each."""
    return [*_things(arms, world.layouts(count, seed=11)), *_adjectives(arms, playground.prompts(count, seed=12))]


def _things(arms: Mapping[str, Arm], layouts: Sequence[world.Layout]) -> list[record.Row]:
    plain = playground.synthesizer()
    known = world.skies()
    before = drawn(plain, [aa.Plan(layout.scene) for layout in layouts])
    boxes = [layout.boxes for layout in layouts]
    rows: list[record.Row] = []
    for name, arm in arms.items():
        plans = [_plan(arm, layout) for layout in layouts]
        tokens = LONG_PROMPT if arm.told or arm.guide is None else plain.max_sequence_length
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # CLIP, which gives the gist alone, reads 25 tokens of it
            after = drawn(replace(plain, guide=arm.guide, max_sequence_length=tokens), plans)
        shown = list(zip(after, layouts, strict=True))
        places = [(len(layout.boxes), world.placed(image, layout)) for image, layout in shown]
        rows.append(
            _described("things", name, arm)
            | {key: fmean(getattr(one, key) for _, one in places) for key in ("color", "thing", "mixed")}
            | {f"color of {of}": fmean(one.color for count, one in places if count == of) for of in (2, 3, 4)}
            | {"scene": fmean(world.setting_of(image, known) == layout.setting for image, layout in shown)}
            | _changed(before, after, boxes)
        )
    return rows


def _plan(arm: Arm, layout: world.Layout) -> aa.Plan:
    """A layout as an arm has it."""
    if arm.guide is None:
        return aa.Plan(layout.long_prompt)
    plan = layout.plan(weight=arm.weight, feather=arm.feather)
    return replace(plan, prompt=layout.long_prompt) if arm.told else plan


def _adjectives(arms: Mapping[str, Arm], prompts: Sequence[str]) -> list[record.Row]:
    plain = playground.synthesizer()
    words = [list(JUDGES)[number % len(JUDGES)] for number in range(len(prompts))]
    asked = [f"{prompt}, {word}" for prompt, word in zip(prompts, words, strict=True)]
    before, whole = (drawn(plain, [aa.Plan(prompt) for prompt in said]) for said in (prompts, asked))
    boxes = [_around_a_thing(image) for image in before]
    full = _risen(words, boxes, before, whole)
    rows: list[record.Row] = []
    for name, arm in arms.items():
        if arm.told:
            continue  # here the plan's prompt names everything in any case
        plans = [
            aa.Plan(prompt, tuple(aa.Region(box, more, weight=arm.weight, feather=arm.feather) for box in here))
            for prompt, more, here in zip(prompts, asked, boxes, strict=True)
        ]
        after = whole if arm.guide is None else drawn(replace(plain, guide=arm.guide), plans)
        risen = _risen(words, boxes, before, after)
        parts = {word: risen[word] / most for word, most in full.items()}
        rows.append(
            _described("adjective", name, arm)
            | {"gain": fmean(parts.values())}
            | {f"gain {word}": part for word, part in parts.items()}
            | {judge.name: fmean(judge.score_batch(after, prompts)) for judge in FAITHFUL}
            | _changed(before, after, boxes)
        )
    return rows


def _around_a_thing(image: Image) -> tuple[aa.Box, ...]:
    """A box around the first thing of a picture, or none where there is none."""
    return tuple(found.box.padded(world.TOKEN / 2) for found in playground.detect(image)[:1])


def _risen(
    words: Sequence[str], boxes: Sequence[Sequence[aa.Box]], before: Sequence[Image], after: Sequence[Image]
) -> dict[str, float]:
    """How much more there is, inside the boxes, of what each adjective is about."""
    rises = dict.fromkeys(words, 0.0)
    for word, here, *pictures in zip(words, boxes, before, after, strict=True):
        for box in here:
            low, high = JUDGES[word].score_batch([one.crop(box.to_pixels(one.size)) for one in pictures], ["", ""])
            rises[word] += high - low
    return rises


def _described(task: str, name: str, arm: Arm) -> dict[str, object]:
    isolation = arm.guide.isolation if isinstance(arm.guide, aa.RegionalAttention) else None
    return {
        "task": task,
        "way": name,
        "weight": None if arm.guide is None else arm.weight,
        "base_weight": None if isolation is None else isolation.base_weight,
    }


def _changed(before: Sequence[Image], after: Sequence[Image], boxes: Sequence[Sequence[aa.Box]]) -> dict[str, float]:
    shown = [one for one in zip(before, after, boxes, strict=True) if one[2]]
    return {
        "outside": fmean(world.change_outside(*one) for one in shown),
        "seam": fmean(world.seam(image, here) for _, image, here in shown),
        "pictures": len(shown),
    }


def plot(rows: Sequence[record.Row]) -> Figure:
    """Success inside regions against change outside, for both tasks: up and to the left is better."""
    figure = Figure(figsize=(12, 4.5))
    ways = list(dict.fromkeys(row["way"] for row in rows))
    colors = colormaps["tab20"].resampled(20)
    for number, (task, inside) in enumerate((("things", "color"), ("adjective", "gain"))):
        axes = figure.add_subplot(1, 2, number + 1, title=task, xlabel="change outside", ylabel=f"{inside} inside")
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:.3g}")
        for row in rows:
            if row["task"] == task:
                color = colors(ways.index(row["way"]) % 20)
                axes.scatter(row["outside"], row[inside], color=color, edgecolor="black", label=row["way"])
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
    figure.tight_layout()
    return figure


if __name__ == "__main__":
    record.run("regional_quality", measure, plot)
