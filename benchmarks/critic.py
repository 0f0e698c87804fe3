"""Does the photometric critic point at the things in a picture, and at little else?"""

from collections.abc import Sequence

from matplotlib.figure import Figure
from PIL.Image import Image

import artaug as aa
from artaug import playground
from artaug.critics import PhotometricCritic
from benchmarks import _record as record

STYLES = {"dull": "", "vivid": ", vivid", "praised": ", vivid, softly lit, sharp, glowing"}
SAME = 0.5  # intersection over union from which two boxes are about the same thing


def measure(*, quick: bool) -> list[record.Row]:
    """Show rendered scenes to a critic that suggests something for every part it finds, and compare its boxes.

    ``found`` is the share of things with a box of IoU at least 0.5, ``extra`` the boxes a scene that fit no thing. True
    boxes are those of the playground's detector, which is right on more than 99 rendered scenes in 100. ``suggestions``
    counts what the critic asks for a scene as it comes.
    """
    prompts = playground.prompts(30 if quick else 300, seed=21)
    eager = PhotometricCritic(exposure=1, chroma=1, contrast=1, sharpness=1, whole_image=False)
    rows: list[record.Row] = []
    for style, words in STYLES.items():
        images = [playground.render(prompt + words, seed=seed) for seed, prompt in enumerate(prompts)]
        found = extra = things = 0
        for image, prompt in zip(images, prompts, strict=True):
            truth = [thing.box for thing in playground.detect(image)]
            boxes = suggested(eager, image, prompt)
            things += len(truth)
            found += sum(any(box.iou(true) >= SAME for box in boxes) for true in truth)
            extra += sum(all(box.iou(true) < SAME for true in truth) for box in boxes)
        asked = sum(len(suggested(PhotometricCritic(), *shown)) for shown in zip(images, prompts, strict=True))
        rows.append(
            {
                "pictures": style,
                "scenes": len(prompts),
                "things": things,
                "found": found / things,
                "extra": extra / len(prompts),
                "suggestions": asked / len(prompts),
            }
        )
    return rows


def suggested(critic: aa.Critic, image: Image, prompt: str) -> list[aa.Box]:
    """The boxes a critic points at."""
    answer = critic.critique(image, prompt)
    return [one.box for one in answer.suggestions] if isinstance(answer, aa.Critique) else []


def plot(rows: Sequence[record.Row]) -> Figure:
    """Found and extra, by style."""
    figure = Figure(figsize=(5, 3))
    axes = figure.add_subplot()
    for number, name in enumerate(("found", "extra")):
        axes.bar([place + 0.4 * number for place in range(len(rows))], [row[name] for row in rows], 0.4, label=name)
    axes.set_xticks([place + 0.2 for place in range(len(rows))], [row["pictures"] for row in rows])
    axes.legend()
    return figure


if __name__ == "__main__":
    record.run("critic", measure, plot)
