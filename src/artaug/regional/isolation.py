"""Isolation: which image tokens and prompts attend to each other under regions; published systems as presets."""

from typing import Annotated, Literal

from pydantic import Field

from artaug._internal.values import value
from artaug.errors import InvalidValueError

_Fraction = Annotated[float, Field(ge=0, le=1)]


@value
class Isolation:
    """What image tokens and prompts attend to, in which layers, and at which noise levels.

    An image token is a *member* of a region that covers at least half of it (half of what the region covers of any
    token, if that is less); it may be a member of several, and one that is a member of none is *background*. It is a
    member of the plan's prompt if it has at least half of that prompt's largest weight. In layers outside
    ``block_range`` and ``block_stride`` every token attends to all. At noise levels outside ``sigma_range`` only the
    plan's own prompt is used, as if there were no regions.

    Raises:
        InvalidValueError: if a range is empty or a number out of bounds.

    >>> import artaug as aa
    >>> aa.Isolation(image_to_image="regions", block_stride=2).text_to_image
    'regions'
    """

    image_to_image: Literal["open", "background", "regions"] = "open"
    """Which image tokens an image token attends to. ``"open"``: all. ``"background"``: those that share a region with
    it; the background attends to all and all attend to it. ``"regions"``: those that share a region with it, or are
    background as it is. The stricter, the cleaner the regions and the more visible their seams."""
    image_to_text: Literal["open", "regions"] = "regions"
    """Which prompts an image token attends to: all equally, or each with its region's weight on the token."""
    text_to_image: Literal["open", "regions"] = "regions"
    """Which image tokens a prompt attends to: all, or the members of its region."""
    text_to_text: Literal["open", "own"] = "own"
    """Which prompts a prompt attends to: all, or only itself."""
    base_weight: _Fraction = 0.0
    """Weight of the plan's own prompt inside regions, where a region's has ``Region.weight``; outside it is 1."""
    block_range: tuple[_Fraction, _Fraction] = (0.0, 1.0)
    """The part of the model's depth where this applies, as fractions."""
    block_stride: Annotated[int, Field(ge=1)] = 1
    """Within that part, apply to every n-th layer, beginning with the first of each stack of layers: FLUX's single blocks
    are counted anew after its double blocks, as published systems do."""
    sigma_range: tuple[_Fraction, _Fraction] = (0.0, 1.0)
    """The noise levels at which regions count: sampling begins at 1 and ends at 0."""

    def __post_init__(self) -> None:
        for name, (low, high) in (("block_range", self.block_range), ("sigma_range", self.sigma_range)):
            if low >= high:
                raise InvalidValueError(f"Isolation({name}={(low, high)}) is an empty range: need low < high.")

    def applies_to_block(self, block: int, *, num_blocks: int, stack_start: int = 0) -> bool:
        """Whether this applies in layer ``block``, counted from 0, of a model with ``num_blocks`` layers.

        Args:
            block: the layer.
            num_blocks: layers of the model, of all stacks together.
            stack_start: the first layer of the stack that ``block`` is in.
        """
        # Rounded to whole layers, half to even as Python does: (0.25, 0.75) of 6 layers is round(1.5), round(4.5) =
        # layers 2 and 3. A range narrower than a layer still gets one.
        first, last = (round(edge * num_blocks) for edge in self.block_range)
        return first <= block < max(last, first + 1) and (block - max(first, stack_start)) % self.block_stride == 0

    @property
    def depends_on_sigma(self) -> bool:
        """Whether there are noise levels at which regions do not count."""
        return self.sigma_range != (0.0, 1.0)

    def applies_at_sigma(self, sigma: float) -> bool:
        """Whether regions count at a noise level."""
        return self.sigma_range[0] <= sigma <= self.sigma_range[1]


BALANCED = Isolation(base_weight=0.3)
"""The default: image tokens attend to each other, a region's prompt to its region, and the plan's prompt counts a little
inside regions. Chosen on the playground (``benchmarks/regional_quality.py``), where stricter choices changed more outside
the regions or drew sharper seams, and gentler ones let the plan's prompt dominate those of the regions."""

OPEN = Isolation(base_weight=1.0, text_to_image="open", text_to_text="open")
"""Regions add their prompts and nothing is isolated: the gentlest, nearest to the paper's mixing of outputs."""

ELIGEN = Isolation(base_weight=1.0)
"""EliGen (Zhang et al. 2025): image tokens attend to each other and to the plan's prompt, a region's prompt to its
region."""

INSTANTX = Isolation(image_to_image="regions", base_weight=0.2, sigma_range=(0.6, 1.0))
"""After Regional-Prompting-FLUX (Chen et al. 2024): regions isolated while the layout forms, the plan's prompt alone
after. There the plan's prompt is blended in with a second stream; here it is a weaker prompt of the one stream."""

INVOKEAI = Isolation(image_to_image="background", block_stride=2)
"""After InvokeAI's regional guidance for FLUX: isolated in every other layer, counted anew for the single blocks, the
background connected to all."""
