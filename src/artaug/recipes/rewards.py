"""Scores of several draws of each prompt as rewards, and pairs of them to learn from."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL.Image import Image

from artaug._internal.annotations import checked
from artaug._internal.arguments import argument_error
from artaug.image_files import ImageFile
from artaug.pairs import ImagePair

Array = NDArray[np.float64]


@checked
def normalized_rewards(scores: Array) -> Array:
    """Scores as rewards in [0, 1], as in DiffusionNFT (arXiv 2509.16117, section 3.3): (prompts, draws).

    ``1/2 + 1/2 clip((score - mean of the prompt) / z, -1, 1)``, with ``z`` the standard deviation over all pictures of what is
    above the line. Draws that all score the same have a reward of a half. The paper leaves ``z`` open, such as the standard
    deviation of all scores, which grows with how much prompts differ from one another; ours does not.

    Raises:
        InvalidValueError: unless there is a finite score for each draw of each prompt.

    >>> import numpy as np
    >>> from artaug.recipes import normalized_rewards
    >>> normalized_rewards(np.array([[0.2, 0.4], [0.3, 0.3]])).tolist()
    [[0.0, 1.0], [0.5, 0.5]]
    """
    if scores.ndim != 2 or not np.isfinite(scores).all():
        raise argument_error(
            "normalized_rewards", "scores", scores, expected="finite numbers of shape (prompts, draws)"
        )
    centred = scores - scores.mean(axis=1, keepdims=True)
    size = centred.std()
    parts = np.divide(centred, size, where=size > np.finfo(float).eps, out=np.zeros_like(centred))
    rewards: Array = 0.5 + 0.5 * parts.clip(-1, 1)
    return rewards


@checked
def draw_pairs(prompt: str, images: Sequence[Image | ImageFile], rewards: Sequence[float]) -> list[ImagePair]:
    """All draws of a prompt, two by two, with their rewards, for `NegativeAware`.

    Of an odd number, the last two are in two pairs with others: the last but one is in both.

    Args:
        prompt: of all of them.
        images: at least 2.
        rewards: one for each, in [0, 1].

    Raises:
        InvalidValueError: for fewer than 2 pictures, or another number of rewards.

    >>> from PIL import Image
    >>> from artaug.recipes import draw_pairs
    >>> images = [Image.new("RGB", (8, 8), color) for color in ("red", "green", "blue")]
    >>> [pair.rewards for pair in draw_pairs("a hill", images, [0.0, 0.4, 1.0])]
    [(0.0, 0.4), (1.0, 0.4)]
    """
    count = len(images)
    if count < 2 or len(rewards) != count:
        expected = f"a reward for each of 2 pictures or more, of which there are {count}"
        raise argument_error("draw_pairs", "rewards", rewards, expected=expected)
    numbers = [*range(count), *([count - 2] if count % 2 else [])]
    return [
        ImagePair(prompt=prompt, before=images[one], after=images[other], rewards=(rewards[one], rewards[other]))
        for one, other in zip(numbers[::2], numbers[1::2], strict=True)
    ]
