"""Loss scaling: the gradients of a model that computes in float16 are kept where float16 can hold them."""

from dataclasses import dataclass, replace

import torch
from torch import nn

_GROWTH_INTERVAL = 2000


@dataclass(frozen=True, kw_only=True)
class LossScale:
    """What a loss is multiplied by before its backward pass: a power of two, so dividing gradients by it is exact.

    The gradient of a mean over all latents is about 1e-6 per latent, and float16 rounds below 6e-8 to zero: at 1,024 pixels
    most of it is lost. The rule is that of ``torch.amp.GradScaler``, with its constants: half the scale after a step whose
    gradient overflows, which is skipped; twice the scale after 2,000 steps without one (Micikevicius et al., arXiv
    1710.03740, section 3.2).

    >>> from artaug.training import LossScale
    >>> LossScale().after_overflow().after_step()
    LossScale(value=32768.0, steps_since_change=1, skipped_steps=1)
    """

    value: float = 2.0**16
    steps_since_change: int = 0
    """Steps taken since the scale was changed."""
    skipped_steps: int = 0
    """Steps that were not taken, in all."""

    @property
    def can_shrink(self) -> bool:
        """Whether a gradient that is not finite may be the scale's fault."""
        return self.value > 1

    def after_step(self) -> "LossScale":
        """The scale after a step that was taken."""
        steps = self.steps_since_change + 1
        if steps < _GROWTH_INTERVAL:
            return replace(self, steps_since_change=steps)
        return replace(self, value=2 * self.value, steps_since_change=0)

    def after_overflow(self) -> "LossScale":
        """The scale after a step that was skipped."""
        return replace(self, value=self.value / 2, steps_since_change=0, skipped_steps=self.skipped_steps + 1)


def computes_in_float16(module: nn.Module, device: torch.device) -> bool:
    """Whether some gradient of ``module`` is computed in float16: its weights', a quantized layer's, or autocast's type."""
    # The norms of a model stored in fp8 keep its type, and torchao's weights show theirs. bitsandbytes' layers have one more.
    layer_types = {getattr(layer, "compute_dtype", None) for layer in module.modules()}
    weight_types = {parameter.dtype for parameter in module.parameters()}
    if torch.is_autocast_enabled(device.type):
        layer_types.add(torch.get_autocast_dtype(device.type))
    return torch.float16 in layer_types | weight_types
