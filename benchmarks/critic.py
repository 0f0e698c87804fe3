"""How many objects of rendered scenes the boxes of the photometric critic find, and how many boxes are on none."""

from collections.abc import Sequence

from matplotlib.figure import Figure
from PIL.Image import Image

import artaug as aa
from artaug import playground
from artaug.critics import PhotometricCritic
from benchmarks import _record as record

STYLES = {"dull": "", "vivid": ", vivid", "praised": ", vivid, softly lit, sharp, glowing"}
MIN_IOU = 0.5  # of a box and an object that it finds


def measure(*, quick: bool) -> list[record.Row]:
    """Compare the boxes of a critic that suggests something for every region with the true boxes of rendered scenes.

    ``found`` is the fraction of objects with a box of IoU at least 0.5, ``extra`` the boxes per scene that match no
    object. The true boxes are those of the playground's detector, which is right on more than 99% of rendered scenes.
    ``suggestions`` are those of the critic with default thresholds, per scene.
    """
    prompts = playground.prompts(30 if quick else 300, seed=21)
    eager = PhotometricCritic(exposure=1, chroma=1, contrast=1, sharpness=1, whole_image=False)
    rows: list[record.Row] = []
    for style, suffix in STYLES.items():
        images = [playground.render(prompt + suffix, seed=seed) for seed, prompt in enumerate(prompts)]
        found = extra = things = 0
        for image, prompt in zip(images, prompts, strict=True):
            objects = [thing.box for thing in playground.detect(image)]
            boxes = suggested(eager, image, prompt)
            things += len(objects)
            found += sum(any(box.iou(true_box) >= MIN_IOU for box in boxes) for true_box in objects)
            extra += sum(all(box.iou(true_box) < MIN_IOU for true_box in objects) for box in boxes)
        suggestions = sum(
            len(suggested(PhotometricCritic(contrast=0.15), image, prompt))
            for image, prompt in zip(images, prompts, strict=True)
        )
        rows.append(
            {
                "pictures": style,
                "scenes": len(prompts),
                "things": things,
                "found": found / things,
                "extra": extra / len(prompts),
                "suggestions": suggestions / len(prompts),
            }
        )
    return rows


def suggested(critic: aa.Critic, image: Image, prompt: str) -> list[aa.Box]:
    """The boxes of a critic's suggestions."""
    answer = critic.critique(image, prompt)
    return [suggestion.box for suggestion in answer.suggestions] if isinstance(answer, aa.Critique) else []


def plot(rows: Sequence[record.Row]) -> Figure:
    """Found and extra, by style."""
    figure = Figure(figsize=(5, 3))
    axes = figure.add_subplot()
    for series, name in enumerate(("found", "extra")):
        axes.bar(
            [position + 0.4 * series for position in range(len(rows))], [row[name] for row in rows], 0.4, label=name
        )
    axes.set_xticks([position + 0.2 for position in range(len(rows))], [row["pictures"] for row in rows])
    axes.legend()
    return figure


if __name__ == "__main__":
    record.run("critic", measure, plot)
