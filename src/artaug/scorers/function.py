"""Any Python function as a scorer."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

from PIL.Image import Image

from artaug.errors import InvalidValueError
from artaug.scoring import Scorer


@final
@dataclass(frozen=True, kw_only=True)
class FunctionScorer(Scorer):
    """Scores with a function of a picture and its prompt; higher is better.

    An exception in the function is not caught; raised in a batch, it gets a note saying for which prompt.

    Raises:
        InvalidValueError: if neither the scorer nor the function has a name.

    >>> from artaug.scorers import FunctionScorer
    >>> from PIL import Image
    >>> wide = FunctionScorer(function=lambda image, prompt: image.width / image.height, name="width")
    >>> wide.score(Image.new("RGB", (16, 8)), "a wall")
    2.0
    """

    function: Callable[[Image, str], float]
    """From a picture and its prompt to a finite number."""
    name: str = ""
    """What tables and verdicts call it; the name of the function if not given."""
    uses: tuple[Scorer, ...] = ()
    """Scorers whose numbers go into it, so that a comparison knows what it rests on."""

    def __post_init__(self) -> None:
        if not self.name:
            object.__setattr__(self, "name", getattr(self.function, "__name__", ""))
        if self.name in {"", "<lambda>"}:
            raise InvalidValueError(f"{self.function!r} has no name to be told apart by in a table: give it one.")

    @property
    def depends_on(self) -> frozenset[str]:
        return frozenset({self.name}).union(*(scorer.depends_on for scorer in self.uses))

    def score(self, image: Image, prompt: str) -> float:
        return self.function(image, prompt)
