"""Any Python function as a scorer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

from PIL.Image import Image

from artaug._internal.annotations import checked
from artaug.errors import InvalidValueError
from artaug.scoring import Scorer

if TYPE_CHECKING:
    from torch import nn


@checked
@final
@dataclass(frozen=True, kw_only=True)
class FunctionScorer(Scorer):
    """Scores with a function of a picture and its prompt; higher is better.

    Exceptions of the function pass through; raised in a batch, they get a note that names the prompt.

    Raises:
        InvalidValueError: if neither the scorer nor the function has a name.

    >>> from artaug.scorers import FunctionScorer
    >>> from PIL import Image
    >>> aspect_ratio = FunctionScorer(function=lambda image, prompt: image.width / image.height, name="aspect ratio")
    >>> aspect_ratio.score(Image.new("RGB", (16, 8)), "a wall")
    2.0
    """

    function: Callable[[Image, str], float]
    """From a picture and its prompt to a finite number."""
    name: str = ""
    """The name in tables; the name of the function if not given."""
    components: tuple[Scorer, ...] = ()
    """The scorers that the function calls, so that a comparison knows what the score depends on."""

    def __post_init__(self) -> None:
        if not self.name:
            object.__setattr__(self, "name", getattr(self.function, "__name__", ""))
        if self.name in {"", "<lambda>"}:
            raise InvalidValueError(f"{self.function!r} has no name, which tables need: give FunctionScorer a name.")

    @property
    def depends_on(self) -> frozenset[str]:
        return frozenset({self.name}).union(*(scorer.depends_on for scorer in self.components))

    @property
    def models(self) -> "Sequence[nn.Module]":
        return [model for scorer in self.components for model in scorer.models]

    def score(self, image: Image, prompt: str) -> float:
        return self.function(image, prompt)
