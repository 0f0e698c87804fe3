"""Who may look at whom while regions steer: a value, with the choices of the published systems as presets."""

from typing import Annotated, Literal

from pydantic import Field

from artaug._internal.values import value
from artaug.errors import InvalidValueError

_Share = Annotated[float, Field(ge=0, le=1)]


@value
class Isolation:
    """What image tokens and prompts see of each other, in which layers, and while how much noise is left.

    A token that a region covers by half or more of its largest share is a *member* of it; a token of no region is
    *background*. In layers outside ``blocks`` and ``every`` all see all. At noise levels outside ``sigma_range`` the plan's
    own prompt draws alone, as if there were no regions.

    Raises:
        InvalidValueError: if a range is empty or a number out of bounds.

    >>> import artaug as aa
    >>> aa.Isolation(image_to_image="regions", every=2).text_to_image
    'regions'
    """

    image_to_image: Literal["open", "background", "regions"] = "open"
    """Which image tokens an image token sees: all; those that share a region with it and, for and from the background,
    all; or those that share a region or are both background. The stricter, the cleaner and the more seams."""
    image_to_text: Literal["open", "regions"] = "regions"
    """Which prompts an image token sees: all alike, or each as strongly as its region weighs there."""
    text_to_image: Literal["open", "regions"] = "regions"
    """Which image tokens a prompt sees: all, or where it weighs half or more of what it weighs at most."""
    text_to_text: Literal["open", "own"] = "own"
    """Which prompts a prompt sees: all, or itself."""
    base_weight: _Share = 0.0
    """Weight of the plan's own prompt inside regions, where a region's has ``Region.weight``; outside it is 1."""
    blocks: tuple[_Share, _Share] = (0.0, 1.0)
    """The part of the model's depth where this holds, as fractions."""
    every: Annotated[int, Field(ge=1)] = 1
    """Of these layers, every n-th, beginning with the first."""
    sigma_range: tuple[_Share, _Share] = (0.0, 1.0)
    """The noise levels at which regions count: 1 is where a drawing begins, 0 where it ends."""

    def __post_init__(self) -> None:
        for name, (low, high) in (("blocks", self.blocks), ("sigma_range", self.sigma_range)):
            if low >= high:
                raise InvalidValueError(f"Isolation({name}={(low, high)}) is an empty range: need low < high.")

    def applies_to_block(self, block: int, *, of: int) -> bool:
        """Whether this holds in a layer: its place from 0, of so many."""
        first, last = (round(edge * of) for edge in self.blocks)
        return first <= block < max(last, first + 1) and (block - first) % self.every == 0

    def applies_at_sigma(self, level: float) -> bool:
        """Whether regions count at a noise level."""
        return self.sigma_range[0] <= level <= self.sigma_range[1]


BALANCED = Isolation(base_weight=0.3)
"""The default: image tokens see each other, a region's prompt its region, and the plan's prompt counts a little inside
regions. Chosen on the playground (``benchmarks/regional_quality.py``), where stricter choices changed more outside the
regions or drew sharper seams, and gentler ones let the plan's prompt drown the regions'."""

OPEN = Isolation(base_weight=1.0, text_to_image="open", text_to_text="open")
"""Regions add their prompts, nobody is kept apart: the gentlest, nearest to the paper's mixing of outputs."""

ELIGEN = Isolation(base_weight=1.0)
"""EliGen (Zhang et al. 2025): image tokens see each other and the plan's prompt, a region's prompt its region."""

INSTANTX = Isolation(image_to_image="regions", base_weight=0.2, sigma_range=(0.6, 1.0))
"""After Regional-Prompting-FLUX (Chen et al. 2024): regions apart while the layout forms, the plan's prompt alone after.
There the plan's prompt is blended in with a second stream; here it is a weaker prompt of the one stream."""

INVOKEAI = Isolation(image_to_image="background", every=2)
"""After InvokeAI's regional guidance for FLUX: apart in every other layer, the background in touch with all."""
