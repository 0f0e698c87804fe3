"""Quality of regions on the playground: the right things in the right places, and no change elsewhere."""

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
from benchmarks.playground import draw

FAITHFUL = tuple(playground.Accuracy(of) for of in ("color", "shape", "place"))
JUDGES: Mapping[str, aa.Scorer] = {
    "vivid": Chroma(),
    "softly lit": Exposure(),
    "glowing": Contrast(),
    "sharp": Sharpness(),
}
"""The scorer that each adjective should raise."""
LONG_PROMPT = 32
"""Tokens of four things and a setting."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A method of drawing things in places."""

    guide: Guide | None = None
    """None for one long prompt without regions."""
    weight: float = 1.0
    """Of every region."""
    feather: float = 0.0
    """Of every region."""
    names_things: bool = False
    """Whether the plan's prompt names the things as well, as in the demonstrations of some systems; *told* in names of arms."""


def regional_arm(isolation: Isolation, *, weight: float = 1.0, feather: float = 0.0, names_things: bool = False) -> Arm:
    """Regional attention."""
    return Arm(
        guide=aa.RegionalAttention(isolation=isolation), weight=weight, feather=feather, names_things=names_things
    )


ARMS: Mapping[str, Arm] = {
    "long prompt": Arm(),
    "OutputMix": Arm(guide=aa.OutputMix()),
    "OutputMix, weight 4": Arm(guide=aa.OutputMix(), weight=4),
    "OPEN": regional_arm(OPEN),
    "OPEN, weight 4": regional_arm(OPEN, weight=4),
    "OPEN, base 0": regional_arm(replace(OPEN, base_weight=0.0)),
    "ELIGEN": regional_arm(ELIGEN),
    "ELIGEN, base 0.3": regional_arm(replace(ELIGEN, base_weight=0.3)),
    "ELIGEN, base 0": regional_arm(replace(ELIGEN, base_weight=0.0)),
    "INSTANTX": regional_arm(INSTANTX),
    "INVOKEAI": regional_arm(INVOKEAI),
    "background, base 0": regional_arm(Isolation(image_to_image="background")),
    "ELIGEN, base 0.3, feathered": regional_arm(replace(ELIGEN, base_weight=0.3), feather=0.05),
    "OutputMix, told": Arm(guide=aa.OutputMix(), names_things=True),
    "ELIGEN, told": regional_arm(ELIGEN, names_things=True),
    "INSTANTX, told": regional_arm(INSTANTX, names_things=True),
}
"""Every preset, and variants with other weights, soft edges, or a plan's prompt that names the things."""

QUICK = ("long prompt", "OutputMix", "ELIGEN")


def measure(*, quick: bool) -> list[record.Row]:
    """Draw random layouts, and an adjective in a box, with every arm; report what appears where, and what else changes.

    Task ``things``: two to four regions, side by side in a plain scene, ask for a thing each. ``color`` is the share of
    regions with a thing of the requested colour, ``thing`` of those where it has the requested shape too, ``mixed`` of
    those with another region's colour in them; ``scene`` the share of pictures whose sky is still the plan's.

    Task ``adjective``, which is ArtAug's: a region around one thing asks for the same caption and one adjective. ``gain``
    is the rise of the adjective's scorer inside the box, over the rise when the whole picture gets the adjective;
    ``color``, ``shape`` and ``place`` are shares of what the caption asks for that the picture shows.

    In both, ``outside`` is the mean change of pixels in [0, 1] more than half a token away from all regions, against the
    plain picture of the plan's prompt and of the same seed, and ``seam`` the mean gradient across the regions' borders
    over that of the whole picture.
    """
    arms = {name: ARMS[name] for name in QUICK} if quick else ARMS
    return rows_of(arms, count=9 if quick else 210)


def rows_of(arms: Mapping[str, Arm], *, count: int) -> list[record.Row]:
    """The rows of both tasks, with so many pictures each."""
    return [
        *_thing_rows(arms, world.layouts(count, seed=11)),
        *_adjective_rows(arms, playground.prompts(count, seed=12)),
    ]


def _thing_rows(arms: Mapping[str, Arm], layouts: Sequence[world.Layout]) -> list[record.Row]:
    plain = playground.synthesizer()
    sky_colors = world.sky_colors()
    before = draw(plain, [aa.Plan(layout.scene) for layout in layouts])
    boxes = [layout.boxes for layout in layouts]
    rows: list[record.Row] = []
    for name, arm in arms.items():
        plans = [_plan(arm, layout) for layout in layouts]
        tokens = LONG_PROMPT if arm.names_things or arm.guide is None else plain.max_sequence_length
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # CLIP, used for the pooled prompt only, reads 25 tokens
            after = draw(replace(plain, guide=arm.guide, max_sequence_length=tokens), plans)
        image_layouts = list(zip(after, layouts, strict=True))
        accuracies = [(len(layout.boxes), world.region_accuracy(image, layout)) for image, layout in image_layouts]
        rows.append(
            _arm_columns("things", name, arm)
            | {key: fmean(getattr(accuracy, key) for _, accuracy in accuracies) for key in ("color", "thing", "mixed")}
            | {
                f"color of {regions}": fmean(accuracy.color for count, accuracy in accuracies if count == regions)
                for regions in (2, 3, 4)
            }
            | {
                "scene": fmean(
                    world.nearest_setting(image, sky_colors) == layout.setting for image, layout in image_layouts
                )
            }
            | _change_columns(before, after, boxes)
        )
    return rows


def _plan(arm: Arm, layout: world.Layout) -> aa.Plan:
    """An arm's plan of a layout."""
    if arm.guide is None:
        return aa.Plan(layout.long_prompt)
    plan = layout.plan(weight=arm.weight, feather=arm.feather)
    return replace(plan, prompt=layout.long_prompt) if arm.names_things else plan


def _adjective_rows(arms: Mapping[str, Arm], prompts: Sequence[str]) -> list[record.Row]:
    plain = playground.synthesizer()
    adjectives = [list(JUDGES)[number % len(JUDGES)] for number in range(len(prompts))]
    improved = [f"{prompt}, {adjective}" for prompt, adjective in zip(prompts, adjectives, strict=True)]
    before, fully_improved = (draw(plain, [aa.Plan(prompt) for prompt in texts]) for texts in (prompts, improved))
    boxes = [_around_a_thing(image) for image in before]
    full_gains = _gains(adjectives, boxes, before, fully_improved)
    rows: list[record.Row] = []
    for name, arm in arms.items():
        if arm.names_things:
            continue  # in this task the plan's prompt names the things in every arm
        plans = [
            aa.Plan(prompt, tuple(aa.Region(box, text, weight=arm.weight, feather=arm.feather) for box in image_boxes))
            for prompt, text, image_boxes in zip(prompts, improved, boxes, strict=True)
        ]
        after = fully_improved if arm.guide is None else draw(replace(plain, guide=arm.guide), plans)
        gains = _gains(adjectives, boxes, before, after)
        relative_gains = {adjective: gains[adjective] / full_gain for adjective, full_gain in full_gains.items()}
        rows.append(
            _arm_columns("adjective", name, arm)
            | {"gain": fmean(relative_gains.values())}
            | {f"gain {adjective}": relative_gain for adjective, relative_gain in relative_gains.items()}
            | {judge.name: fmean(judge.score_batch(after, prompts)) for judge in FAITHFUL}
            | _change_columns(before, after, boxes)
        )
    return rows


def _around_a_thing(image: Image) -> tuple[aa.Box, ...]:
    """A box around the first thing of a picture, or none if there is none."""
    return tuple(thing.box.padded(world.TOKEN / 2) for thing in playground.detect(image)[:1])


def _gains(
    adjectives: Sequence[str], boxes: Sequence[Sequence[aa.Box]], before: Sequence[Image], after: Sequence[Image]
) -> dict[str, float]:
    """The sum of gains inside the boxes, for each adjective, by its scorer."""
    gains = dict.fromkeys(adjectives, 0.0)
    for adjective, image_boxes, *pictures in zip(adjectives, boxes, before, after, strict=True):
        for box in image_boxes:
            low, high = JUDGES[adjective].score_batch(
                [image.crop(box.to_pixels(image.size)) for image in pictures], ["", ""]
            )
            gains[adjective] += high - low
    return gains


def _arm_columns(task: str, name: str, arm: Arm) -> dict[str, object]:
    isolation = arm.guide.isolation if isinstance(arm.guide, aa.RegionalAttention) else None
    return {
        "task": task,
        "way": name,
        "weight": None if arm.guide is None else arm.weight,
        "base_weight": None if isolation is None else isolation.base_weight,
    }


def _change_columns(
    before: Sequence[Image], after: Sequence[Image], boxes: Sequence[Sequence[aa.Box]]
) -> dict[str, float]:
    with_boxes = [item for item in zip(before, after, boxes, strict=True) if item[2]]
    return {
        "outside": fmean(world.change_outside(*item) for item in with_boxes),
        "seam": fmean(world.seam(image, image_boxes) for _, image, image_boxes in with_boxes),
        "pictures": len(with_boxes),
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
